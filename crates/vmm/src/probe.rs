//! `hearth-vmm probe`: whether this host's KVM really runs guests.
//!
//! That /dev/kvm opens says little: some KVMs interpret guest kernel code and stop where Linux' early boot uses
//! `cmpxchg16b`, `xrstor` or `int3`. So tiny guests run here, one for each thing that a stock kernel needs in its first
//! milliseconds. Each result is one line on standard output:
//!
//! ```text
//! STEP ok|fail|skip TEXT
//! ```
//!
//! The line `STEP begin` goes before it: what began and has no result hung and was ended by SIGALRM.

use std::io::Write;
use std::os::fd::OwnedFd;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region, kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::kvm::vm::Vm;

/// Exit codes of the probe.
pub mod exit {
    /// Stock kernels will run.
    pub const GOOD: i32 = 0;
    /// Something that stock kernels need does not work.
    pub const BAD: i32 = 1;
}

/// All steps together take milliseconds; what takes this long hangs.
const PATIENCE_SECONDS: u32 = 20;
/// A guest that does not come to its end within so many exits will not.
const MOST_EXITS: u32 = 64;
const MEMORY_BYTES: usize = 2 << 20;
const CODE: u64 = 0x2000;
const SCRATCH: u64 = 0x4000;
const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const STACK_TOP: u64 = 0xa000;
const PML4: u64 = 0x1_0000;
const PDPT: u64 = 0x1_1000;
const PD: u64 = 0x1_2000;
const PORT: u16 = 0x3f8;
const INT3_VECTOR: u64 = 3;
const PAGE_FAULT_VECTOR: u64 = 14;

// Guest code. On entry rdi is SCRATCH; each piece says its letter on the port when it went well, then halts.
std::arch::global_asm!(
    r#"
    .pushsection .rodata.hearth_probe, "a"
    .globl hearth_probe_begin, hearth_probe_end
    .globl hearth_probe_int3_handler, hearth_probe_fault_handler
    .globl hearth_probe_real, hearth_probe_arithmetic, hearth_probe_int3, hearth_probe_cmpxchg16b
    .globl hearth_probe_xsave, hearth_probe_paging, hearth_probe_fault, hearth_probe_msr
hearth_probe_begin:
    .code16
hearth_probe_real:
    mov dx, 0x3f8
    add al, bl
    out dx, al
    hlt
    .code64
hearth_probe_int3_handler:
    inc qword ptr [rdi]
    iretq
hearth_probe_fault_handler:
    mov [rdi], rax
    mov rax, cr2
    mov [rdi + 8], rax
    add rsp, 8
    mov [rsp], r8
    iretq
hearth_probe_arithmetic:
    mov rax, 0x123456789abcdef
    mov rbx, rax
    imul rbx
    mov rbx, 0xdca5e20890f2a521
    cmp rax, rbx
    mov al, 'A'
    je say
    mov al, '-'
    jmp say
hearth_probe_int3:
    int3
    mov al, 'I'
    jmp say
hearth_probe_cmpxchg16b:
    mov rax, [rdi]
    mov rdx, [rdi + 8]
    mov rbx, 0x1111
    mov rcx, 0x2222
    lock cmpxchg16b [rdi]
    mov al, 'C'
    jz say
    mov al, '-'
    jmp say
hearth_probe_xsave:
    mov eax, 3
    xor edx, edx
    xsave64 [rdi]
    xrstor64 [rdi]
    mov al, 'X'
    jmp say
hearth_probe_paging:
    mov rax, cr3
    mov cr3, rax
    invlpg [rdi]
    mov rax, cr4
    xor rax, 0x80
    mov cr4, rax
    xor rax, 0x80
    mov cr4, rax
    mov al, 'P'
    jmp say
hearth_probe_fault:
    lea r8, [rip + 2f]
    mov rax, 0x7f
    mov rbx, 0x40000000
    mov rax, [rbx]
    mov al, '-'
    jmp say
2:  mov al, 'F'
    jmp say
hearth_probe_msr:
    mov ecx, 0xc0000101
    mov eax, 0x12345000
    mov edx, 0x7fff
    wrmsr
    swapgs
    mov ecx, 0xc0000102
    rdmsr
    cmp eax, 0x12345000
    mov al, 'M'
    je say
    mov al, '-'
say:
    mov dx, 0x3f8
    out dx, al
    hlt
hearth_probe_end:
    .popsection
    "#
);

unsafe extern "C" {
    safe static hearth_probe_begin: u8;
    safe static hearth_probe_end: u8;
    safe static hearth_probe_int3_handler: u8;
    safe static hearth_probe_fault_handler: u8;
    safe static hearth_probe_real: u8;
    safe static hearth_probe_arithmetic: u8;
    safe static hearth_probe_int3: u8;
    safe static hearth_probe_cmpxchg16b: u8;
    safe static hearth_probe_xsave: u8;
    safe static hearth_probe_paging: u8;
    safe static hearth_probe_fault: u8;
    safe static hearth_probe_msr: u8;
}

fn address(symbol: &'static u8) -> u64 {
    CODE + (std::ptr::from_ref(symbol) as u64 - std::ptr::from_ref(&hearth_probe_begin) as u64)
}

fn code() -> &'static [u8] {
    let begin = std::ptr::from_ref(&hearth_probe_begin);
    let length = std::ptr::from_ref(&hearth_probe_end) as usize - begin as usize;
    // SAFETY: both symbols stand in the same read-only section, in this order, with the code between them.
    unsafe { std::slice::from_raw_parts(begin, length) }
}

/// One guest.
struct Step {
    name: &'static str,
    needs: &'static str,
    start: &'static u8,
    long_mode: bool,
    says: u8,
    /// What must stand at SCRATCH afterwards (two words), if anything.
    leaves: Option<[u64; 2]>,
}

fn steps() -> [Step; 8] {
    let step = |name, needs, start, says, leaves| Step { name, needs, start, long_mode: true, says, leaves };
    [
        Step {
            name: "real-mode",
            needs: "16-bit code, port output and halt",
            start: &hearth_probe_real,
            long_mode: false,
            says: b'4',
            leaves: None,
        },
        step("long-mode", "64-bit code behind page tables", &hearth_probe_arithmetic, b'A', None),
        step("int3", "breakpoints (static calls and kprobes of Linux)", &hearth_probe_int3, b'I', Some([1, 0])),
        step("cmpxchg16b", "16-byte compare and exchange", &hearth_probe_cmpxchg16b, b'C', Some([0x1111, 0x2222])),
        step("page-fault", "page faults", &hearth_probe_fault, b'F', Some([0x7f, 0x4000_0000])),
        step("paging", "TLB flushes by CR3, CR4 and INVLPG", &hearth_probe_paging, b'P', None),
        step("msr", "WRMSR, RDMSR and SWAPGS", &hearth_probe_msr, b'M', None),
        step("xsave", "XSAVE and XRSTOR", &hearth_probe_xsave, b'X', None),
    ]
}

/// Runs all guests and prints what came of them; the result is the process' exit code.
pub fn run(device: &str) -> i32 {
    nix::unistd::alarm::set(PATIENCE_SECONDS);
    let mut good = report("open", check_open(device));
    if good {
        for step in steps() {
            good &= report(step.name, check_guest(device, &step));
        }
    }
    if good { exit::GOOD } else { exit::BAD }
}

enum Verdict {
    Ok(String),
    Skip(String),
}

fn report(name: &str, check: impl FnOnce() -> Result<Verdict, String>) -> bool {
    let mut out = std::io::stdout();
    // A reader that is gone does not need the lines.
    let _ = writeln!(out, "{name} begin").and_then(|()| out.flush());
    let (word, text, good) = match check() {
        Ok(Verdict::Ok(text)) => ("ok", text, true),
        Ok(Verdict::Skip(text)) => ("skip", text, true),
        Err(text) => ("fail", text, false),
    };
    let _ = writeln!(out, "{name} {word} {text}").and_then(|()| out.flush());
    good
}

fn open(device: &str) -> Result<OwnedFd, String> {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(device);
    opened.map(OwnedFd::from).map_err(|error| format!("cannot open {device}: {error}"))
}

fn check_open(device: &str) -> impl FnOnce() -> Result<Verdict, String> {
    let device = device.to_owned();
    move || {
        let vm = Vm::new(open(&device)?).map_err(|error| error.to_string())?;
        let entries = vm.supported_cpuid().as_slice().len();
        Ok(Verdict::Ok(format!("KVM API with everything hearth-vmm needs, {entries} CPUID entries")))
    }
}

fn check_guest(device: &str, step: &Step) -> impl FnOnce() -> Result<Verdict, String> {
    let device = device.to_owned();
    move || {
        let guest = Guest::new(&device).map_err(|error| format!("cannot make a guest: {error}"))?;
        guest.run(step)
    }
}

struct Guest {
    vcpu: VcpuFd,
    memory: GuestMemoryMmap,
    has_xsave: bool,
    // Before the memory in use by it; dropped last.
    _vm: VmFd,
}

impl Guest {
    fn new(device: &str) -> Result<Self, String> {
        let text = |error: kvm_ioctls::Error| error.to_string();
        let path = std::ffi::CString::new(device).map_err(|error| error.to_string())?;
        let kvm = Kvm::new_with_path(path).map_err(text)?;
        let vm = kvm.create_vm().map_err(text)?;
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).map_err(|error| error.to_string())?;
        let host = memory.get_host_address(GuestAddress(0)).map_err(|error| error.to_string())?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY_BYTES as u64,
            userspace_addr: host as u64,
        };
        // SAFETY: the mapping is MEMORY_BYTES long and lives as long as the virtual machine, both in this struct.
        unsafe { vm.set_user_memory_region(region) }.map_err(text)?;
        let vcpu = vm.create_vcpu(0).map_err(text)?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(text)?;
        vcpu.set_cpuid2(&cpuid).map_err(text)?;
        // CPUID.1:ECX bit 26.
        let has_xsave = cpuid.as_slice().iter().any(|entry| entry.function == 1 && entry.ecx & 1 << 26 != 0);
        Ok(Self { vcpu, memory, has_xsave, _vm: vm })
    }

    fn write(&self, value: u64, at: u64) -> Result<(), String> {
        self.memory.write_obj(value, GuestAddress(at)).map_err(|error| error.to_string())
    }

    /// Segments, tables and control registers as a 64-bit kernel has them.
    fn enter_long_mode(&self, sregs: &mut kvm_sregs) -> Result<(), String> {
        self.write(PDPT | 3, PML4)?;
        self.write(PD | 3, PDPT)?;
        // One 2 MiB page: everything below MEMORY_BYTES.
        self.write(0x83, PD)?;
        self.write(0x00af_9b00_0000_ffff, GDT + 8)?;
        self.write(0x00cf_9300_0000_ffff, GDT + 16)?;
        for (vector, handler) in
            [(INT3_VECTOR, &hearth_probe_int3_handler), (PAGE_FAULT_VECTOR, &hearth_probe_fault_handler)]
        {
            // Interrupt gate, present, selector 8; all addresses fit 16 bits.
            self.write(address(handler) | 8 << 16 | 0x8e00 << 32, IDT + vector * 16)?;
            self.write(0, IDT + vector * 16 + 8)?;
        }
        let flat = kvm_segment { base: 0, limit: u32::MAX, present: 1, s: 1, g: 1, ..kvm_segment::default() };
        sregs.cs = kvm_segment { selector: 8, type_: 11, l: 1, ..flat };
        let data = kvm_segment { selector: 16, type_: 3, db: 1, ..flat };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.gdt.base = GDT;
        sregs.gdt.limit = 23;
        sregs.idt.base = IDT;
        sregs.idt.limit = 0xfff;
        // PE, MP, ET, NE, WP, PG; PAE, OSFXSR, OSXMMEXCPT (and OSXSAVE); LME, LMA. AMD volume 2, sections 3.1 and 14.
        sregs.cr0 = 0x8001_0033;
        sregs.cr4 = 0x620 | if self.has_xsave { 1 << 18 } else { 0 };
        sregs.cr3 = PML4;
        sregs.efer = 0x500;
        Ok(())
    }

    fn run(mut self, step: &Step) -> Result<Verdict, String> {
        let text = |error: kvm_ioctls::Error| error.to_string();
        if step.name == "xsave" && !self.has_xsave {
            return Ok(Verdict::Skip("this CPU has no XSAVE".to_owned()));
        }
        self.memory.write_slice(code(), GuestAddress(CODE)).map_err(|error| error.to_string())?;
        let mut sregs = self.vcpu.get_sregs().map_err(text)?;
        if step.long_mode {
            self.enter_long_mode(&mut sregs)?;
        } else {
            sregs.cs.base = 0;
            sregs.cs.selector = 0;
        }
        self.vcpu.set_sregs(&sregs).map_err(text)?;
        if step.long_mode && self.has_xsave {
            let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
            if let Some(first) = xcrs.xcrs.first_mut() {
                *first = kvm_xcr { xcr: 0, value: 3, ..kvm_xcr::default() };
            }
            self.vcpu.set_xcrs(&xcrs).map_err(text)?;
        }
        let regs = kvm_regs {
            rip: address(step.start),
            rax: u64::from(b'2'),
            rbx: 2,
            rdi: SCRATCH,
            rsp: STACK_TOP,
            rflags: 2,
            ..kvm_regs::default()
        };
        self.vcpu.set_regs(&regs).map_err(text)?;
        let said = self.follow()?;
        if said != [step.says] {
            return Err(format!(
                "the guest said {:?} instead of '{}'",
                said.escape_ascii().to_string(),
                step.says as char
            ));
        }
        if let Some(leaves) = step.leaves {
            let left: [u64; 2] = self.memory.read_obj(GuestAddress(SCRATCH)).map_err(|error| error.to_string())?;
            if left != leaves {
                return Err(format!("the guest left {left:x?} in memory instead of {leaves:x?}"));
            }
        }
        Ok(Verdict::Ok(step.needs.to_owned()))
    }

    /// Runs until the guest halts; what it said.
    fn follow(&mut self) -> Result<Vec<u8>, String> {
        let mut said = Vec::new();
        for _ in 0..MOST_EXITS {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(PORT, data)) => said.extend_from_slice(data),
                Ok(VcpuExit::Hlt) => return Ok(said),
                Ok(VcpuExit::InternalError) => {
                    return Err("KVM cannot emulate what the guest does (internal error)".to_owned());
                }
                Ok(VcpuExit::Shutdown) => return Err("the guest crashed (triple fault)".to_owned()),
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    return Err(format!("the CPU refuses the guest (reason {reason:#x})"));
                }
                Ok(other) => return Err(format!("unexpected exit: {other:?}")),
                Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {}
                Err(error) => return Err(format!("KVM_RUN: {error}")),
            }
        }
        Err("the guest does not come to its end".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_fits_its_place_and_handlers_fit_a_gate() {
        assert!(code().len() < (SCRATCH - CODE) as usize);
        for step in steps() {
            assert!((CODE..CODE + code().len() as u64).contains(&address(step.start)), "{}", step.name);
        }
        assert!(address(&hearth_probe_fault_handler) < 0x1_0000);
    }

    #[test]
    fn a_device_that_is_not_kvm_is_told() {
        assert_eq!(run("/dev/null"), exit::BAD);
        assert_eq!(run("/nonexistent"), exit::BAD);
    }
}
