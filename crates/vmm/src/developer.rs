//! `hearth-vmm run`: a machine without an agent. It opens what the agent would have opened and then goes the same way.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Instant;

use crate::boot::Placement;
use crate::console_ring;
use crate::control::protocol::{BootSpec, ConsoleSpec, DiskBacking, DiskSpec, FdIndex, MachineSpec, NicSpec, exit};
use crate::control::server::{Server, log};
use crate::control::socket;
use crate::machine::{Descriptors, Machine};

/// Help text of the options.
pub const HELP: &str = "\
Options of hearth-vmm run:
  --kernel FILE           ELF vmlinux with a PVH note, or bzImage (needed)
  --initrd FILE
  --cmdline TEXT
  --memory MIB            default 256
  --cpus N                default 1
  --disk FILE[,ro][,serial=TEXT][,queues=N]   may be repeated
  --tap NAME[,mac=xx:xx:xx:xx:xx:xx][,mtu=N]  an existing tap device; may be repeated
  --console stdio|none|SOCKET                 COM1; default stdio
  --console-ring FILE     keep the last output there
  --control SOCKET        listen for control connections there
  --map-images            map kernel and initrd copy-on-write instead of copying them
  --report                print counters and memory use to standard error at the end
  --uuid UUID --instance-id ID --instance-type TYPE
";

/// Bytes the console ring keeps.
const RING_CAPACITY: u64 = 64 << 10;
/// `TUNSETIFF` (linux/if_tun.h).
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

#[derive(Debug, Default)]
struct Options {
    kernel: Option<String>,
    initrd: Option<String>,
    cmdline: String,
    memory_mib: Option<u64>,
    cpus: Option<u8>,
    disks: Vec<Disk>,
    taps: Vec<Tap>,
    console: Option<String>,
    console_ring: Option<String>,
    control: Option<String>,
    report: bool,
    map_images: bool,
    uuid: Option<[u8; 16]>,
    instance_id: Option<String>,
    instance_type: Option<String>,
}

impl Options {
    fn console(&self) -> &str {
        self.console.as_deref().unwrap_or("stdio")
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Disk {
    path: String,
    read_only: bool,
    serial: Option<String>,
    queues: u16,
}

#[derive(Debug, PartialEq, Eq)]
struct Tap {
    name: String,
    mac: Option<[u8; 6]>,
    mtu: u16,
}

/// Boots what `words` say and serves it until it ends; the exit code.
pub fn run<'a>(words: impl Iterator<Item = &'a str>, born: Instant) -> i32 {
    let options = match parse(words) {
        Ok(options) => options,
        Err(text) => {
            log(&format!("{text}; see --help"));
            return exit::USAGE;
        }
    };
    let failed = |text: String| {
        log(&text);
        exit::HOST_ERROR
    };
    let (mut machine, control, report) = match create(&options, born) {
        Ok(parts) => parts,
        Err(text) => return failed(text),
    };
    // Before the start, which takes away the right to do so.
    let raw = (options.console() == "stdio").then(RawTerminal::enter).flatten();
    let served = machine.start().map_err(|e| e.to_string());
    let served = served.and_then(|()| Server::with_machine(machine, control, report, born).map_err(|e| e.to_string()));
    let code = served.map_or_else(failed, Server::run);
    drop(raw);
    code
}

fn parse<'a>(mut words: impl Iterator<Item = &'a str>) -> Result<Options, String> {
    let mut options = Options::default();
    while let Some(word) = words.next() {
        let mut value = || words.next().map(str::to_owned).ok_or_else(|| format!("{word} needs a value"));
        match word {
            "--kernel" => options.kernel = Some(value()?),
            "--initrd" => options.initrd = Some(value()?),
            "--cmdline" => options.cmdline = value()?,
            "--memory" => options.memory_mib = Some(number(word, &value()?)?),
            "--cpus" => options.cpus = Some(number(word, &value()?)?),
            "--disk" => options.disks.push(parse_disk(&value()?)?),
            "--tap" => options.taps.push(parse_tap(&value()?)?),
            "--console" => options.console = Some(value()?),
            "--console-ring" => options.console_ring = Some(value()?),
            "--control" => options.control = Some(value()?),
            "--map-images" => options.map_images = true,
            "--report" => options.report = true,
            "--uuid" => options.uuid = Some(parse_uuid(&value()?)?),
            "--instance-id" => options.instance_id = Some(value()?),
            "--instance-type" => options.instance_type = Some(value()?),
            other => return Err(format!("option {other:?} is not known")),
        }
    }
    if options.kernel.is_none() {
        return Err("--kernel is needed".into());
    }
    Ok(options)
}

fn number<T: std::str::FromStr>(option: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{option}: {text:?} is not a fitting number"))
}

fn parse_disk(text: &str) -> Result<Disk, String> {
    let mut parts = text.split(',');
    let path = parts.next().unwrap_or_default().to_owned();
    let mut disk = Disk { path, read_only: false, serial: None, queues: 1 };
    for part in parts {
        match part.split_once('=') {
            None if part == "ro" => disk.read_only = true,
            Some(("serial", serial)) => disk.serial = Some(serial.to_owned()),
            Some(("queues", queues)) => disk.queues = number("--disk queues", queues)?,
            _ => return Err(format!("--disk: {part:?} is not known")),
        }
    }
    Ok(disk)
}

fn parse_tap(text: &str) -> Result<Tap, String> {
    let mut parts = text.split(',');
    let name = parts.next().unwrap_or_default().to_owned();
    let mut tap = Tap { name, mac: None, mtu: 1500 };
    for part in parts {
        match part.split_once('=') {
            Some(("mac", mac)) => {
                tap.mac = Some(parse_hex(mac, ':').ok_or_else(|| format!("--tap: {mac:?} is not a MAC address"))?)
            }
            Some(("mtu", mtu)) => tap.mtu = number("--tap mtu", mtu)?,
            _ => return Err(format!("--tap: {part:?} is not known")),
        }
    }
    Ok(tap)
}

/// `N` bytes in hexadecimal, with or without `separator` between groups.
fn parse_hex<const N: usize>(text: &str, separator: char) -> Option<[u8; N]> {
    let digits: Vec<u8> =
        text.chars().filter(|c| *c != separator).map(|c| c.to_digit(16).map(|d| d as u8)).collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| (byte << 4) | digit)).collect();
    if digits.len() == 2 * N { bytes.try_into().ok() } else { None }
}

fn parse_uuid(text: &str) -> Result<[u8; 16], String> {
    parse_hex(text, '-').ok_or_else(|| format!("--uuid: {text:?} is not a UUID"))
}

/// Descriptors in the making of a `Create` message.
#[derive(Default)]
struct Fds(Vec<OwnedFd>);

impl Fds {
    fn add(&mut self, fd: impl Into<OwnedFd>) -> FdIndex {
        self.0.push(fd.into());
        (self.0.len() - 1) as FdIndex
    }

    fn open(&mut self, path: &str, write: bool) -> Result<FdIndex, String> {
        let file =
            OpenOptions::new().read(true).write(write).open(path).map_err(|e| format!("cannot open {path}: {e}"))?;
        Ok(self.add(file))
    }
}

/// The machine, the socket to control it by, and its memory map to report from.
fn create(options: &Options, born: Instant) -> Result<(Machine, Option<OwnedFd>, Option<File>), String> {
    let console = options.console();
    let mut fds = Fds::default();
    let spec = MachineSpec {
        instance_id: options.instance_id.clone().unwrap_or_else(|| "i-00000000000000000".into()),
        uuid: options.uuid.unwrap_or(*b"\xec\x20\0\0\0\0\x40\0\x80\0\0\0\0\0\0\x01"),
        instance_type: options.instance_type.clone().unwrap_or_else(|| "developer".into()),
        vcpus: options.cpus.unwrap_or(1),
        memory_mib: options.memory_mib.unwrap_or(256),
        kvm: fds.open("/dev/kvm", true)?,
        rng: Some(fds.open("/dev/urandom", false)?),
        boot: BootSpec {
            kernel: fds.open(options.kernel.as_deref().unwrap_or_default(), false)?,
            initrd: options.initrd.as_deref().map(|path| fds.open(path, false)).transpose()?,
            cmdline: options.cmdline.clone(),
        },
        disks: disks(options, &mut fds)?,
        nics: nics(options, &mut fds)?,
        console: ConsoleSpec { ring: ring(options, &mut fds)?, listener: console_listener(console, &mut fds)? },
    };
    let control = options.control.as_deref().map(|path| {
        let _ = std::fs::remove_file(path);
        socket::listen_at(Path::new(path)).map_err(|e| format!("cannot listen on {path}: {e}"))
    });
    let control = control.transpose()?;
    let placement = if options.map_images { Placement::Map } else { Placement::Copy };
    let mut machine = Machine::create(&spec, Descriptors::new(fds.0), placement, born).map_err(|e| e.to_string())?;
    if console == "stdio" {
        machine.console().add_stdio(standard(0)?, standard(1)?);
    }
    let report = options.report.then(|| File::open("/proc/self/smaps")).transpose();
    let report = report.map_err(|e| format!("cannot open /proc/self/smaps: {e}"))?;
    Ok((machine, control, report))
}

fn disks(options: &Options, fds: &mut Fds) -> Result<Vec<DiskSpec>, String> {
    let spec = |(number, disk): (usize, &Disk)| {
        Ok(DiskSpec {
            serial: disk.serial.clone().unwrap_or_else(|| format!("vol{number:017x}")),
            backing: DiskBacking::Raw { file: fds.open(&disk.path, !disk.read_only)? },
            read_only: disk.read_only,
            queues: disk.queues,
        })
    };
    options.disks.iter().enumerate().map(spec).collect()
}

fn nics(options: &Options, fds: &mut Fds) -> Result<Vec<NicSpec>, String> {
    let spec = |(number, tap): (usize, &Tap)| {
        Ok(NicSpec {
            mac: tap.mac.unwrap_or([2, 0, 0, 0, 0, number as u8 + 1]),
            mtu: tap.mtu,
            tap: fds.add(open_tap(&tap.name).map_err(|e| format!("cannot open tap {}: {e}", tap.name))?),
        })
    };
    options.taps.iter().enumerate().map(spec).collect()
}

fn open_tap(name: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the name is too long"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads one ifreq, which is valid and NUL-terminated.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
}

fn ring(options: &Options, fds: &mut Fds) -> Result<FdIndex, String> {
    let fail = |e: &dyn std::fmt::Display| format!("cannot make the console ring: {e}");
    let file = match &options.console_ring {
        Some(path) => {
            OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).map_err(|e| fail(&e))?
        }
        // SAFETY: the name is a NUL-terminated string, and the new descriptor is owned by nobody else.
        None => unsafe {
            let fd = libc::memfd_create(c"console".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(fail(&io::Error::last_os_error()));
            }
            File::from_raw_fd(fd)
        },
    };
    console_ring::create(&file, RING_CAPACITY).map_err(|e| fail(&e))?;
    Ok(fds.add(file))
}

fn console_listener(console: &str, fds: &mut Fds) -> Result<FdIndex, String> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::SocketAddr;
    let listener = match console {
        // The spec wants a listener; nobody knows this one's name.
        "stdio" | "none" => SocketAddr::from_abstract_name(format!("hearth-vmm-{}", std::process::id()))
            .and_then(|address| UnixListener::bind_addr(&address)),
        path => {
            let _ = std::fs::remove_file(path);
            UnixListener::bind(path)
        }
    };
    Ok(fds.add(listener.map_err(|e| format!("cannot listen for console clients: {e}"))?))
}

/// A copy of standard input or output.
fn standard(fd: i32) -> Result<File, String> {
    // SAFETY: dup makes a new descriptor that nobody else owns, or fails.
    match unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) } {
        // SAFETY: as above.
        new if new >= 0 => Ok(unsafe { File::from_raw_fd(new) }),
        _ => Err(format!("cannot use standard input and output: {}", io::Error::last_os_error())),
    }
}

/// Keeps the terminal raw while the guest has it.
struct RawTerminal(libc::termios);

impl RawTerminal {
    fn enter() -> Option<Self> {
        // SAFETY: termios is plain data and both calls take valid pointers.
        unsafe {
            let mut saved: libc::termios = std::mem::zeroed();
            if libc::isatty(0) == 0 || libc::tcgetattr(0, &raw mut saved) != 0 {
                return None;
            }
            let mut raw = saved;
            libc::cfmakeraw(&raw mut raw);
            (libc::tcsetattr(0, libc::TCSANOW, &raw const raw) == 0).then_some(Self(saved))
        }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // SAFETY: restores the attributes read from this terminal.
        unsafe { libc::tcsetattr(0, libc::TCSANOW, &raw const self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_understood_or_named() {
        let words = "--kernel k --memory 512 --cpus 2 --disk a,ro,serial=vol1,queues=2 --disk b --tap t0,mac=02:00:00:00:00:09,mtu=9001";
        let options = parse(words.split(' ')).unwrap();
        assert_eq!((options.memory_mib, options.cpus), (Some(512), Some(2)));
        assert_eq!(
            options.disks[0],
            Disk { path: "a".into(), read_only: true, serial: Some("vol1".into()), queues: 2 }
        );
        assert_eq!(options.taps[0], Tap { name: "t0".into(), mac: Some([2, 0, 0, 0, 0, 9]), mtu: 9001 });
        for bad in [
            "",
            "--kernel",
            "--kernel k --memory x",
            "--kernel k --disk a,zz",
            "--kernel k --tap t,mac=1",
            "--kernel k --uuid ec2",
            "--what",
        ] {
            let words = bad.split(' ').filter(|w| !w.is_empty());
            assert!(parse(words).is_err(), "{bad}");
        }
    }
}
