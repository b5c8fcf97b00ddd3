//! Everything else that instances need from their host.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::statvfs::statvfs;
use nix::sys::utsname::uname;

use super::Check;
use crate::human;

const GIB: u64 = 1 << 30;
/// A Debian image, one instance and logs.
const NEEDED_DISK: u64 = 2 * GIB;
const COMFORTABLE_DISK: u64 = 10 * GIB;
/// Controllers for weights, quotas, memory and process limits of instances.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// All of them, in the order of the report.
pub fn checks(state_dir: &Path) -> Vec<Check> {
    vec![
        root(),
        kernel(),
        cgroup2(),
        tun(),
        bridge(),
        nftables(),
        ip_forward(),
        io_uring(),
        disk(state_dir),
        memory(),
        time(),
    ]
}

fn read(path: &str) -> Result<String, io::Error> {
    fs::read_to_string(path).map(|text| text.trim().to_owned())
}

fn root() -> Check {
    if nix::unistd::geteuid().is_root() {
        Check::ok("root", "running as root")
    } else {
        Check::warn(
            "root",
            "not running as root",
            "hearthd needs root, and some checks see less without",
            "sudo hearth doctor",
        )
    }
}

fn kernel() -> Check {
    match uname() {
        Ok(name) => judge_kernel(&name.release().to_string_lossy()),
        Err(error) => Check::skip("kernel", format!("uname: {error}"), ""),
    }
}

fn judge_kernel(release: &str) -> Check {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|digits| digits.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (6, 1) {
        Check::ok("kernel", format!("Linux {release}"))
    } else if version >= (5, 10) {
        Check::warn("kernel", format!("Linux {release}"), "hearth is tested with 6.1 and newer", "upgrade the kernel")
    } else {
        Check::fail(
            "kernel",
            format!("Linux {release}"),
            "too old: pidfd, cgroup2 and io_uring features are missing",
            "upgrade to Debian 12 or newer",
        )
    }
}

fn cgroup2() -> Check {
    match read("/sys/fs/cgroup/cgroup.controllers") {
        Ok(controllers) => judge_controllers(&controllers),
        Err(_) => Check::fail(
            "cgroup2",
            "cgroup v2 is not mounted on /sys/fs/cgroup",
            "instances cannot be limited",
            "boot with systemd.unified_cgroup_hierarchy=1, or: mount -t cgroup2 none /sys/fs/cgroup",
        ),
    }
}

fn judge_controllers(text: &str) -> Check {
    let there: Vec<&str> = text.split_whitespace().collect();
    let missing: Vec<&str> = CONTROLLERS.into_iter().filter(|wanted| !there.contains(wanted)).collect();
    if missing.is_empty() {
        Check::ok("cgroup2", format!("controllers {}", there.join(" ")))
    } else {
        let found = format!("cgroup v2 without {}", missing.join(" "));
        Check::fail(
            "cgroup2",
            found,
            "instances cannot be limited",
            "are they taken by cgroup v1 (mount | grep cgroup) or switched off (cgroup_disable= on the kernel's command line)?",
        )
    }
}

fn tun() -> Check {
    match fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Check::ok("tun", "/dev/net/tun opens"),
        Err(error) => {
            Check::fail("tun", format!("/dev/net/tun: {error}"), "instances get no network interface", "modprobe tun")
        }
    }
}

/// Whether a module is loaded, built in, or can be loaded.
fn has_module(name: &str) -> bool {
    if Path::new("/sys/module").join(name).exists() {
        return true;
    }
    let Ok(system) = uname() else { return false };
    let folder = Path::new("/lib/modules").join(system.release());
    ["modules.dep", "modules.builtin"].iter().any(|list| {
        let text = fs::read_to_string(folder.join(list)).unwrap_or_default();
        text.lines().any(|line| line.split(':').next().is_some_and(|path| path.contains(&format!("/{name}.ko"))))
    })
}

fn bridge() -> Check {
    if has_module("bridge") {
        Check::ok("bridge", "the kernel has bridges")
    } else {
        Check::fail(
            "bridge",
            "the kernel has no bridge module",
            "instances cannot be connected",
            "install a distribution kernel (linux-image-amd64 or linux-image-cloud-amd64)",
        )
    }
}

fn nftables() -> Check {
    let listed = Command::new("nft").args(["list", "tables"]).stdin(Stdio::null()).output();
    match listed {
        Ok(output) if output.status.success() => Check::ok("nftables", "nft works"),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default().to_owned();
            if nix::unistd::geteuid().is_root() {
                Check::fail(
                    "nftables",
                    format!("nft fails: {said}"),
                    "instances reach nothing outside this host",
                    "modprobe nf_tables",
                )
            } else {
                Check::skip("nftables", "only root can look", "sudo hearth doctor")
            }
        }
        Err(_) => Check::fail(
            "nftables",
            "the program nft is not there",
            "instances reach nothing outside this host",
            "apt-get install nftables",
        ),
    }
}

fn ip_forward() -> Check {
    match read("/proc/sys/net/ipv4/ip_forward").as_deref() {
        Ok("0") => Check::warn(
            "ip-forward",
            "off",
            "instances reach this host only; hearthd switches it on when it starts",
            "sysctl net.ipv4.ip_forward=1",
        ),
        Ok(_) => Check::ok("ip-forward", "on"),
        Err(error) => Check::skip("ip-forward", error.to_string(), ""),
    }
}

fn io_uring() -> Check {
    match read("/proc/sys/kernel/io_uring_disabled").as_deref() {
        Ok("0") | Err(_) => Check::ok("io-uring", "not switched off"),
        Ok(value) => Check::warn(
            "io-uring",
            format!("kernel.io_uring_disabled is {value}"),
            "disks of instances use threads instead, which is slower",
            "sysctl kernel.io_uring_disabled=0",
        ),
    }
}

/// The folder itself or the nearest one above that exists.
fn existing(folder: &Path) -> PathBuf {
    let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned());
    absolute.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/")).to_owned()
}

fn disk(state_dir: &Path) -> Check {
    let folder = existing(state_dir);
    match statvfs(&folder) {
        Ok(stat) => judge_disk(&folder, stat.blocks_available() * stat.fragment_size()),
        Err(error) => Check::skip("disk", format!("{}: {error}", folder.display()), ""),
    }
}

fn judge_disk(folder: &Path, free: u64) -> Check {
    let found = format!("{} free in {}", human::bytes(free), folder.display());
    let mend = "free some space, or choose another folder with --state-dir";
    if free < NEEDED_DISK {
        Check::fail("disk", found, "there is no room for an image and an instance", mend)
    } else if free < COMFORTABLE_DISK {
        Check::warn("disk", found, "there is room for few instances", mend)
    } else {
        Check::ok("disk", found)
    }
}

fn memory() -> Check {
    match read("/proc/meminfo") {
        Ok(text) => judge_memory(&text),
        Err(error) => Check::skip("memory", error.to_string(), ""),
    }
}

fn judge_memory(meminfo: &str) -> Check {
    let number = |name: &str| {
        let line = meminfo.lines().find(|line| line.split(':').next() == Some(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    let total = number("MemTotal").unwrap_or(0) << 10;
    let available = number("MemAvailable").unwrap_or(0) << 10;
    let mut found = format!("{} of {} available", human::bytes(available), human::bytes(total));
    if let Some(pages) = number("HugePages_Total").filter(|pages| *pages > 0) {
        let size = number("Hugepagesize").unwrap_or(0) << 10;
        found = format!("{found}, {} in huge pages, which instances do not use", human::bytes(pages * size));
    }
    if available < GIB {
        Check::warn("memory", found, "there is room for few small instances", "stop other programs, or add memory")
    } else {
        Check::ok("memory", found)
    }
}

fn time() -> Check {
    // SAFETY: timex is plain data for which zeros are valid; no modes are set, so the kernel only reads the clock's state.
    let state = unsafe {
        let mut timex: nix::libc::timex = std::mem::zeroed();
        nix::libc::adjtimex(&raw mut timex)
    };
    match state {
        nix::libc::TIME_ERROR => Check::warn(
            "time",
            "the clock is not synchronized",
            "certificates and time stamps depend on it when there are several hosts",
            "apt-get install systemd-timesyncd (or chrony)",
        ),
        -1 => Check::skip("time", format!("adjtimex: {}", io::Error::last_os_error()), ""),
        _ => Check::ok("time", "the clock is synchronized"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    #[test]
    fn kernels_are_judged_by_version() {
        for (release, verdict) in [
            ("6.1.0-56-cloud-amd64", Verdict::Ok),
            ("7.0.1", Verdict::Ok),
            ("5.15.0-91-generic", Verdict::Warn),
            ("4.19.0", Verdict::Fail),
            ("weird", Verdict::Fail),
        ] {
            assert_eq!(judge_kernel(release).verdict, verdict, "{release}");
        }
    }

    #[test]
    fn missing_controllers_are_named() {
        assert_eq!(judge_controllers("cpuset cpu io memory hugetlb pids rdma").verdict, Verdict::Ok);
        let check = judge_controllers("cpuset io pids");
        assert_eq!(check.verdict, Verdict::Fail);
        assert!(check.found.contains("without cpu memory"), "{}", check.found);
    }

    #[test]
    fn room_is_judged_by_what_an_instance_needs() {
        let folder = Path::new("/x");
        assert_eq!(judge_disk(folder, 20 * GIB).verdict, Verdict::Ok);
        assert_eq!(judge_disk(folder, 5 * GIB).verdict, Verdict::Warn);
        assert_eq!(judge_disk(folder, GIB).verdict, Verdict::Fail);
        let text = "MemTotal:       8000000 kB\nMemAvailable:    500000 kB\nHugePages_Total:      10\nHugepagesize:       2048 kB\n";
        let check = judge_memory(text);
        assert_eq!(check.verdict, Verdict::Warn);
        assert!(check.found.contains("20 MiB in huge pages"), "{}", check.found);
    }

    #[test]
    fn a_missing_folder_is_judged_by_the_one_above() {
        let folder = tempfile::TempDir::new().unwrap();
        assert_eq!(existing(&folder.path().join("a/b/c")), folder.path());
    }
}
