//! A whole cloud of built programs, in a network namespace of its own.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::console::{Console, PATIENCE};
use crate::{program, scratch, tiny_image};

/// An operator's own instance type: h1d.tiny with a part of one thread, less than the slowest host of a testbed has.
const OWN_TYPE: &str = r#"
[[instance_type]]
name = "own.capped"
vcpus = 1
memory_mib = 128
ecu_milli = 700
instance_store_gib = [1, 1]
max_network_interfaces = 2
"#;

/// What runs in which process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// `hearthd up`.
    One,
    /// `hearthd control` and `hearthd agent`.
    Apart,
    /// `hearthd control` and this many agents, each in a network namespace of its own.
    Hosts(usize),
}

/// What is not as it is by itself.
#[derive(Default)]
pub struct Settings {
    /// Configuration file of the agents.
    pub agents: String,
    /// More flags of the control plane.
    pub control: Vec<String>,
    /// More of its environment.
    pub variables: Vec<(&'static str, String)>,
}

/// A running cloud. Dropping it ends every process of it.
pub struct Cloud {
    folder: tempfile::TempDir,
    shape: Shape,
    control: Option<Child>,
    agents: Vec<Option<Child>>,
    cgroup: String,
    /// The network namespace that the test was started in.
    outside: File,
    settings: Settings,
}

/// Ends a process without giving it a chance.
pub fn kill_now(child: &mut Child) {
    let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
    let _ = child.wait();
}

impl Drop for Cloud {
    fn drop(&mut self) {
        let daemons = self.control.iter_mut().chain(self.agents.iter_mut().flatten());
        daemons.for_each(kill_now);
        if std::thread::panicking() {
            for name in std::iter::once("control".to_owned()).chain((0..self.agents.len()).map(|n| format!("agent{n}")))
            {
                let log = std::fs::read_to_string(self.path(&format!("{name}.log"))).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                eprintln!("--- the end of {name}'s log:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
            }
        }
        for group in self.cgroups() {
            let _ = std::fs::write(group.join("cgroup.kill"), "1");
        }
        let _ = wait_until(Duration::from_secs(10), || self.vmm_pids().is_empty());
        for group in self.instance_cgroups().into_iter().chain(self.host_cgroups()).chain(self.cgroups()) {
            let _ = std::fs::remove_dir(group);
        }
    }
}

/// Tries again and again; whether it came true.
pub fn wait_until(patience: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + patience;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn folders_in(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.path().is_dir() && entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect()
}

fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status().unwrap();
    assert!(status.success(), "ip {words}");
}

impl Cloud {
    /// Starts it and waits until every host is there.
    pub fn start(shape: Shape) -> Self {
        Self::start_with(shape, |_| String::new())
    }

    /// The same with a configuration file for the agents, whose text may name files in the cloud's folder.
    pub fn start_with(shape: Shape, agents: impl FnOnce(&Path) -> String) -> Self {
        Self::start_on(shape, |folder| Settings { agents: agents(folder), ..Settings::default() })
    }

    /// The same with other settings. What they need is made by `prepare`, in the cloud's network and with its folder.
    pub fn start_on(shape: Shape, prepare: impl FnOnce(&Path) -> Settings) -> Self {
        let outside = File::open("/proc/thread-self/ns/net").unwrap();
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("these tests need root");
        ip("link set lo up");
        let cgroup = format!("hearth-test-{}", std::process::id());
        let folder = scratch();
        let settings = prepare(folder.path());
        std::fs::write(folder.path().join("agent.toml"), &settings.agents).unwrap();
        let mut cloud = Self { folder, shape, control: None, agents: Vec::new(), cgroup, outside, settings };
        if let Shape::Hosts(_) = shape {
            ip("link add hosts type bridge forward_delay 0");
            ip("address add 10.99.0.254/24 dev hosts");
            ip("link set hosts up");
        }
        cloud.start_control();
        let hosts = match shape {
            Shape::One => 1,
            Shape::Apart => {
                cloud.agents.push(None);
                1
            }
            Shape::Hosts(count) => {
                cloud.agents.extend((0..count).map(|_| None));
                count
            }
        };
        for host in 0..cloud.agents.len() {
            cloud.start_agent(host);
        }
        cloud.wait_for_hosts(hosts);
        cloud
    }

    /// Lets [`Shape::Hosts`] reach what can be reached from where the test was started, by a cable and behind its address.
    pub fn connect_to_outside(&self) {
        let outside = format!("/proc/{}/fd/{}", std::process::id(), self.outside.as_raw_fd());
        let there = |script: &str| {
            let mut command = Command::new("nsenter");
            let status = command.arg(format!("--net={outside}")).args(["sh", "-ec", script]).status().unwrap();
            assert!(status.success(), "{script}");
        };
        // Of an attempt before this one.
        there("ip link delete test-hosts 2>/dev/null || true");
        ip(&format!("link add outside type veth peer name test-hosts netns {outside}"));
        ip("address add 10.99.1.2/30 dev outside");
        ip("link set outside up");
        there(
            "ip address add 10.99.1.1/30 dev test-hosts
             ip link set test-hosts up
             ip route add 10.99.0.0/24 via 10.99.1.2
             nft add table ip test-hosts
             nft 'add chain ip test-hosts nat { type nat hook postrouting priority srcnat; }'
             nft flush table ip test-hosts
             nft 'add rule ip test-hosts nat ip saddr { 10.99.0.0/24, 10.99.1.0/30 } masquerade'",
        );
        ip("route add default via 10.99.1.1");
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    }

    /// Waits until that many hosts are connected.
    pub fn wait_for_hosts(&self, count: usize) {
        let connected = || match self.try_hearth(&["host", "list", "-o", "json"]) {
            (Some(0), text) => {
                let hosts: Value = serde_json::from_str(&text).unwrap_or_default();
                hosts.as_array().into_iter().flatten().filter(|host| host["connected"] == true).count()
            }
            _ => 0,
        };
        assert!(wait_until(PATIENCE, || connected() == count), "no {count} connected hosts");
    }

    /// A path in the cloud's own folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn daemon(&self, name: &str, mut command: Command) -> Child {
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(self.path(&format!("{name}.log"))).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap()
    }

    /// Folder of what ends with the host's boot.
    pub fn run_dir(&self, host: usize) -> PathBuf {
        format!("/run/{}-{host}", self.cgroup).into()
    }

    fn agent_flags(&self, host: usize) -> Vec<String> {
        let base = 300_000 + (std::process::id() % 1000) * 1000 + host as u32 * 100;
        let run = self.run_dir(host);
        let vmm = program("hearth-vmm");
        let cidr = format!("172.30.{}.0/24", host + 1);
        [
            ("--config", self.path("agent.toml").to_str().unwrap()),
            ("--run-dir", run.to_str().unwrap()),
            ("--vmm", vmm.to_str().unwrap()),
            ("--cgroup-parent", &format!("{}-{host}", self.cgroup)),
            ("--uid-base", &base.to_string()),
            ("--uid-count", "100"),
            ("--instance-cidr", &cidr),
            ("--name", &format!("host{host}")),
            ("--reserved-memory-mib", "256"),
            ("--vcpu-overcommit-percent", "4000"),
            ("--stop-timeout", "60s"),
        ]
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value.to_owned()])
        .collect()
    }

    /// Starts the control plane (with [`Shape::One`], the whole daemon).
    pub fn start_control(&mut self) {
        let mut command = Command::new(program("hearthd"));
        let state = self.path("state");
        match self.shape {
            Shape::One => command.arg("up").args(self.agent_flags(0)).args(["--listen", "127.0.0.1:7443"]),
            Shape::Apart => command.arg("control").args(["--listen", "127.0.0.1:7443"]),
            Shape::Hosts(_) => {
                command.arg("control").args(["--listen", "0.0.0.0:7443", "--server-name", "10.99.0.254"])
            }
        };
        let types = self.path("types.toml");
        std::fs::write(&types, OWN_TYPE).unwrap();
        command.arg("--state-dir").arg(state).args(["--host-timeout", "10s", "--log", "info"]);
        command.arg("--instance-types").arg(types).args(&self.settings.control);
        command.envs(self.settings.variables.iter().map(|(name, value)| (name, value)));
        self.control = Some(self.daemon("control", command));
        let admin = self.path("state/admin.json");
        assert!(
            wait_until(PATIENCE, || admin.exists() && self.try_hearth(&["host", "list"]).0 == Some(0)),
            "no control plane"
        );
    }

    /// Starts an agent; it joins if it has not yet.
    pub fn start_agent(&mut self, host: usize) {
        let state = self.path(&format!("agent{host}"));
        let mut flags = self.agent_flags(host);
        flags.extend(["--state-dir".into(), state.to_str().unwrap().into(), "--log".into(), "info".into()]);
        let apart = matches!(self.shape, Shape::Hosts(_));
        let control = if apart { "https://10.99.0.254:7443" } else { "https://localhost:7443" };
        flags.extend(["--control".into(), control.into()]);
        if !state.join("agent/identity.json").exists() {
            flags.extend(["--join".into(), self.hearth(&["host", "token", "-o", "id"]).trim().into()]);
        }
        let hearthd = program("hearthd");
        let child = if apart {
            // The daemon waits in its new namespace for the cable that is plugged in from here.
            let address = format!("10.99.0.{}/24", host + 1);
            let script = format!(
                "ip link set lo up; until ip link show eth0 >/dev/null 2>&1; do sleep 0.1; done; \
                 ip address add {address} dev eth0; ip link set eth0 up; ip route add default via 10.99.0.254; \
                 exec \"$@\""
            );
            let mut command = Command::new("unshare");
            command.args(["-n", "sh", "-c", &script, "sh"]).arg(hearthd).arg("agent").args(flags);
            let child = self.daemon(&format!("agent{host}"), command);
            let own = std::fs::read_link("/proc/self/ns/net").unwrap();
            let theirs = format!("/proc/{}/ns/net", child.id());
            assert!(wait_until(PATIENCE, || std::fs::read_link(&theirs).is_ok_and(|ns| ns != own)));
            let _ = Command::new("ip").args(["link", "delete", &format!("h{host}")]).stderr(Stdio::null()).status();
            ip(&format!("link add h{host} type veth peer name eth0 netns {}", child.id()));
            ip(&format!("link set h{host} master hosts up"));
            child
        } else {
            let mut command = Command::new(hearthd);
            command.arg("agent").args(flags);
            self.daemon(&format!("agent{host}"), command)
        };
        self.agents[host] = Some(child);
    }

    /// `kill -9` of the control plane (with [`Shape::One`], of the whole daemon).
    pub fn kill_control(&mut self) {
        kill_now(&mut self.control.take().expect("the control plane runs"));
    }

    /// `kill -9` of an agent.
    pub fn kill_agent(&mut self, host: usize) {
        kill_now(&mut self.agents[host].take().expect("the agent runs"));
    }

    /// A command of the CLI as the operator.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("hearth"));
        command.args(arguments).env("HEARTH_CREDENTIALS", self.path("state/admin.json")).stdin(Stdio::null());
        command
    }

    /// Exit code and everything printed.
    pub fn try_hearth(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let Output { status, stdout, stderr } = self.command(arguments).output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        (status.code(), if status.success() { out.into_owned() } else { format!("{out}{err}") })
    }

    /// What a command that must succeed prints on its standard output.
    pub fn hearth(&self, arguments: &[&str]) -> String {
        let (code, text) = self.try_hearth(arguments);
        assert_eq!(code, Some(0), "hearth {}: {text}", arguments.join(" "));
        text
    }

    /// The same as JSON.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let text = self.hearth(&[arguments, &["-o", "json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
    }

    /// Registers the tiny image.
    pub fn import_tiny(&self) {
        self.hearth(&["image", "import", tiny_image().to_str().unwrap(), "--name", "tiny"]);
    }

    /// Everything about one instance.
    pub fn instance(&self, name: &str) -> Value {
        self.json(&["instance", "describe", name])
    }

    /// Waits until an instance is in a state.
    pub fn wait_for_state(&self, name: &str, state: &str) {
        let mut last = Value::Null;
        let reached = wait_until(PATIENCE, || {
            last = self.instance(name);
            last["state"] == state
        });
        assert!(reached, "{name} does not become {state}: {last:#}");
    }

    /// Waits until the console's output holds a text so many times.
    pub fn wait_for_output(&self, name: &str, text: &str, times: usize) -> String {
        let mut output = String::new();
        let reached = wait_until(PATIENCE, || {
            output = self.try_hearth(&["instance", "console-output", name]).1;
            output.matches(text).count() >= times
        });
        assert!(reached, "{name} does not say {text:?} {times} times:\n{output}");
        output
    }

    /// An interactive console.
    pub fn console(&self, name: &str) -> Console {
        let mut command = self.command(&["instance", "console", name, "--follow"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let console = Console::new(child.stdin.take().unwrap(), child.stdout.take().unwrap());
        std::thread::spawn(move || child.wait());
        console
    }

    fn cgroups(&self) -> Vec<PathBuf> {
        let hosts = self.agents.len().max(1);
        (0..hosts).map(|host| Path::new("/sys/fs/cgroup").join(format!("{}-{host}", self.cgroup))).collect()
    }

    /// Each agent has its own below the parent it was given.
    fn host_cgroups(&self) -> Vec<PathBuf> {
        self.cgroups().iter().flat_map(|group| folders_in(group, "h-")).collect()
    }

    fn instance_cgroups(&self) -> Vec<PathBuf> {
        self.host_cgroups().iter().flat_map(|group| folders_in(group, "i-")).collect()
    }

    /// Process ids of all VMMs of this cloud.
    pub fn vmm_pids(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        for group in self.instance_cgroups() {
            let procs = std::fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            // KVM keeps a kernel thread of each machine in the same cgroup.
            let is_vmm =
                |pid: &&str| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c == "hearth-vmm\n");
            pids.extend(procs.lines().filter(is_vmm).filter_map(|line| line.parse::<i32>().ok()));
        }
        pids
    }

    /// Fails if an instance has left something on its host: a process, cgroup, tap, file, socket or mount.
    pub fn assert_nothing_left(&self) {
        let leftovers = || -> Vec<String> {
            let mut found: Vec<String> = self.vmm_pids().iter().map(|pid| format!("process {pid}")).collect();
            let mut folders: Vec<PathBuf> = self.host_cgroups();
            for host in 0..self.agents.len().max(1) {
                let state =
                    if self.agents.is_empty() { "state/agent".to_owned() } else { format!("agent{host}/agent") };
                folders.push(self.path(&state).join("instances"));
                folders.push(PathBuf::from(format!("/run/{}-{host}/instances", self.cgroup)));
            }
            for folder in folders {
                found.extend(folders_in(&folder, "i-").iter().map(|path| path.display().to_string()));
            }
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
            found.extend(mounts.lines().filter(|line| line.contains(&self.cgroup)).map(str::to_owned));
            let links = Command::new("ip").args(["-br", "link"]).output().unwrap();
            let links = String::from_utf8_lossy(&links.stdout).into_owned();
            found.extend(links.lines().filter(|line| line.starts_with("ht")).map(str::to_owned));
            found
        };
        wait_until(Duration::from_secs(20), || leftovers().is_empty());
        assert_eq!(leftovers(), Vec::<String>::new());
    }
}
