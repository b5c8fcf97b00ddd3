//! Hardware virtualization.

use std::fs;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::{Check, Verdict};
use crate::human;

/// Longer than the probe's own alarm.
const PATIENCE: Duration = Duration::from_secs(30);
const TESTBED: &str = "use the testbed (scripts/testbed; scripts/up does it by itself)";

/// The CPU's flags.
pub fn cpu() -> Check {
    match fs::read_to_string("/proc/cpuinfo") {
        Ok(text) => judge_cpu(&text),
        Err(error) => Check::skip("cpu", format!("cannot read /proc/cpuinfo: {error}"), ""),
    }
}

fn judge_cpu(cpuinfo: &str) -> Check {
    let field = |name: &str| {
        cpuinfo
            .lines()
            .find_map(|line| line.split_once(':').filter(|(key, _)| key.trim() == name))
            .map(|(_, v)| v.trim())
    };
    let flags: Vec<&str> = field("flags").unwrap_or_default().split_whitespace().collect();
    let model = field("model name").unwrap_or("unknown CPU");
    let threads = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let (flag, nested_paging) = match (flags.contains(&"vmx"), flags.contains(&"svm")) {
        (true, _) => ("VT-x", flags.contains(&"ept")),
        (_, true) => ("AMD-V", flags.contains(&"npt")),
        _ => {
            let virtual_machine = flags.contains(&"hypervisor");
            let mend = if virtual_machine {
                format!("this is a virtual machine: ask its host for nested virtualization, or {TESTBED}")
            } else {
                format!("switch on VT-x or AMD-V (SVM) in the firmware, or {TESTBED}")
            };
            let found = format!("{model}, {threads} threads, neither vmx nor svm");
            return Check::fail("cpu", found, "the CPU offers no hardware virtualization", &mend);
        }
    };
    if nested_paging {
        Check::ok("cpu", format!("{model}, {threads} threads, {flag} with nested paging"))
    } else {
        let found = format!("{model}, {threads} threads, {flag} without nested paging");
        Check::warn("cpu", found, "guests will run slowly: page tables are shadowed in software", "")
    }
}

/// Whether /dev/kvm opens. That it does more is the probe guest's business.
pub fn device() -> Check {
    let opened = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    match opened {
        Ok(_) => Check::ok("kvm", "/dev/kvm opens"),
        Err(error) => {
            let mend = match error.kind() {
                io::ErrorKind::NotFound => {
                    "load the module: modprobe kvm-intel or kvm-amd (in a container: pass /dev/kvm in)"
                }
                io::ErrorKind::PermissionDenied => "run this as root, or join the group kvm",
                _ => "load the module again: modprobe -r and modprobe kvm-intel or kvm-amd",
            };
            Check::fail("kvm", format!("/dev/kvm does not open: {error}"), "no guest can run", mend)
        }
    }
}

/// `hearth-vmm` beside this program, else where packages put it.
fn find_vmm(named: Option<&Path>) -> PathBuf {
    if let Some(path) = named {
        return path.to_owned();
    }
    std::env::current_exe()
        .ok()
        .and_then(|program| program.parent().map(|folder| folder.join("hearth-vmm")))
        .filter(|path| path.exists())
        .unwrap_or_else(|| PathBuf::from("/usr/lib/hearth/hearth-vmm"))
}

/// Runs the tiny guests of `hearth-vmm probe`.
pub async fn probe_guest(vmm: Option<&Path>) -> Check {
    let vmm = find_vmm(vmm);
    let began = Instant::now();
    let mut command = tokio::process::Command::new(&vmm);
    command.arg("probe").stdin(Stdio::null()).kill_on_drop(true);
    let output = match tokio::time::timeout(PATIENCE, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => {
            let found = format!("cannot run {}: {error}", vmm.display());
            return Check::skip("probe-guest", found, "build it (cargo build --release) or name it with --vmm");
        }
        Err(_) => {
            return Check::fail("probe-guest", "it hangs", "guests do not run here", TESTBED);
        }
    };
    let took = human::duration(began.elapsed());
    let text = String::from_utf8_lossy(&output.stdout);
    match output.status.code() {
        Some(code) => judge_probe(&text, Some(code), &took),
        None => judge_probe(&text, None, &format!("ended by signal {}", output.status.signal().unwrap_or_default())),
    }
}

/// Lines are "STEP begin" and "STEP ok|fail|skip TEXT".
fn judge_probe(text: &str, code: Option<i32>, how: &str) -> Check {
    let results: Vec<(&str, &str, &str)> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.splitn(3, ' ');
            Some((words.next()?, words.next()?, words.next().unwrap_or_default()))
        })
        .collect();
    let failed: Vec<String> = results
        .iter()
        .filter(|(_, result, _)| *result == "fail")
        .map(|(step, _, text)| format!("{step} ({text})"))
        .collect();
    let passed = results.iter().filter(|(_, result, _)| *result == "ok").count();
    let meaning = "this KVM does not run the code that stock kernels start with";
    match code {
        _ if !failed.is_empty() => {
            let found = format!("{} of {} steps fail: {}", failed.len(), passed + failed.len(), failed.join(", "));
            Check::fail("probe-guest", found, meaning, TESTBED)
        }
        Some(0) if passed > 1 => Check::ok("probe-guest", format!("{passed} steps pass in {how}")),
        Some(code) => Check::bad(
            "probe-guest",
            Verdict::Fail,
            format!("hearth-vmm probe ended with {code} after {passed} steps"),
            "guests do not run here",
            TESTBED,
        ),
        None => {
            let hung = results.last().map(|(step, ..)| *step).unwrap_or("start");
            Check::fail("probe-guest", format!("{how} in step {hung}"), "guests hang here", TESTBED)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMD: &str =
        "processor\t: 0\nmodel name\t: EPYC\nflags\t\t: fpu svm npt\n\nprocessor\t: 1\nflags\t\t: fpu svm npt\n";

    #[test]
    fn cpus_with_and_without_virtualization() {
        let check = judge_cpu(AMD);
        assert_eq!((check.verdict, check.found.as_str()), (Verdict::Ok, "EPYC, 2 threads, AMD-V with nested paging"));
        let check = judge_cpu("processor\t: 0\nmodel name\t: X\nflags\t\t: fpu vmx\n");
        assert_eq!(check.verdict, Verdict::Warn);
        // "svm_lock" and the like are other flags.
        let check = judge_cpu("processor\t: 0\nflags\t\t: fpu svm_lock hypervisor\n");
        assert_eq!(check.verdict, Verdict::Fail);
        assert!(check.mend.contains("nested") && check.mend.contains("scripts/testbed"), "{}", check.mend);
    }

    #[test]
    fn a_step_that_fails_or_hangs_is_named() {
        let good = "open begin\nopen ok x\nint3 begin\nint3 ok breakpoints\n";
        assert_eq!(judge_probe(good, Some(0), "0.1 s").verdict, Verdict::Ok);
        let bad = "open begin\nopen ok x\nint3 begin\nint3 fail KVM cannot\n";
        let check = judge_probe(bad, Some(1), "0.1 s");
        assert_eq!(check.verdict, Verdict::Fail);
        assert!(check.found.contains("1 of 2 steps fail: int3 (KVM cannot)"), "{}", check.found);
        let check = judge_probe("open begin\nopen ok x\nint3 begin\n", None, "ended by signal 14");
        assert!(check.found.contains("in step int3"), "{}", check.found);
        // A probe that says nothing proves nothing.
        assert_eq!(judge_probe("", Some(0), "0 s").verdict, Verdict::Fail);
    }
}
