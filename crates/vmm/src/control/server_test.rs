use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::control::client::{Client, ClientError};
use crate::control::protocol::{
    BootSpec, ConsoleSpec, DiskBacking, DiskSpec, MachineSpec, MachineState, NicSpec, Outcome,
};

/// Long enough for a loaded machine; nothing here waits that long unless it fails.
const PATIENCE: Duration = Duration::from_secs(60);

struct Vmm {
    dir: tempfile::TempDir,
    thread: Option<JoinHandle<i32>>,
}

impl Vmm {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = socket::listen_at(&dir.path().join("control")).unwrap();
        let server = Server::new(listener, Instant::now()).unwrap();
        Self { dir, thread: Some(std::thread::spawn(|| server.run())) }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("control")
    }

    fn connect(&self) -> Client {
        let (client, peer) = Client::connect(&self.path(), PATIENCE).unwrap();
        assert_eq!((peer.instance_id.as_str(), peer.state), ("", MachineState::Empty));
        client
    }

    /// Ends the server and returns its exit code.
    fn kill(mut self) -> i32 {
        assert_eq!(self.connect().call(Command::Kill, &[], PATIENCE).unwrap(), Outcome::Done);
        self.thread.take().unwrap().join().unwrap()
    }
}

fn spec() -> MachineSpec {
    MachineSpec {
        instance_id: "i-0123456789abcdef0".into(),
        uuid: [0xec; 16],
        instance_type: "t3.nano".into(),
        vcpus: 1,
        memory_mib: 128,
        boot: BootSpec { kernel: 0, initrd: None, cmdline: String::new() },
        disks: vec![],
        nics: vec![],
        console: ConsoleSpec { ring: 1, listener: 2 },
        kvm: 3,
        rng: None,
    }
}

#[test]
fn commands_before_create_are_refused_and_kill_ends_it() {
    let vmm = Vmm::start();
    let mut client = vmm.connect();
    for command in [Command::Start, Command::Pause, Command::Resume, Command::PowerButton, Command::Stats] {
        match client.call(command, &[], PATIENCE) {
            Err(ClientError::Refused(text)) => assert!(text.contains("no machine"), "{text}"),
            other => panic!("{other:?}"),
        }
    }
    match client.call(Command::Hello { version: 999 }, &[], PATIENCE) {
        Err(ClientError::Refused(text)) => assert!(text.contains("999"), "{text}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(vmm.kill(), exit::KILLED);
}

#[test]
fn a_new_connection_replaces_the_old_one() {
    let vmm = Vmm::start();
    let mut old = vmm.connect();
    let mut new = vmm.connect();
    assert!(matches!(old.call(Command::Stats, &[], PATIENCE), Err(ClientError::Closed | ClientError::Socket(_))));
    assert!(matches!(new.call(Command::Stats, &[], PATIENCE), Err(ClientError::Refused(_))));
    assert_eq!(vmm.kill(), exit::KILLED);
}

#[test]
fn a_spec_that_cannot_be_is_refused_with_its_reason() {
    let vmm = Vmm::start();
    let mut client = vmm.connect();
    let file = std::fs::File::open("/dev/null").unwrap();
    let listener = UnixListener::bind(vmm.dir.path().join("console")).unwrap();
    let fds = [file.as_fd(), file.as_fd(), listener.as_fd(), file.as_fd()];
    let disk = |serial: &str, queues| DiskSpec {
        serial: serial.into(),
        backing: DiskBacking::Raw { file: 0 },
        read_only: false,
        queues,
    };
    let nic = NicSpec { mac: [1, 0, 0, 0, 0, 0], mtu: 1500, tap: 0 };
    for (wrong, reason) in [
        (MachineSpec { vcpus: 0, ..spec() }, "vCPUs"),
        (MachineSpec { vcpus: 33, ..spec() }, "vCPUs"),
        (MachineSpec { kvm: 9, ..spec() }, "descriptor 9, but only 4 came"),
        (MachineSpec { disks: vec![disk("longer than twenty bytes", 1)], ..spec() }, "20 ASCII bytes"),
        (MachineSpec { disks: vec![disk("vol1", 0)], ..spec() }, "queues"),
        (MachineSpec { disks: vec![disk("vol1", 1); 31], ..spec() }, "at most 29"),
        (MachineSpec { nics: vec![nic], ..spec() }, "group address"),
        (spec(), "kvm"),
    ] {
        match client.call(Command::Create(Box::new(wrong)), &fds, PATIENCE) {
            Err(ClientError::Refused(text)) => assert!(text.contains(reason), "{text} lacks {reason}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(vmm.kill(), exit::KILLED);
}

#[test]
fn garbage_costs_the_sender_its_connection_and_nobody_else() {
    let vmm = Vmm::start();
    for garbage in [vec![0xff; 100], vec![], vec![0; 65536], b"GET / HTTP/1.1".to_vec()] {
        let raw = socket::connect_to(&vmm.path()).unwrap();
        socket::send(raw.as_fd(), &garbage, &[]).unwrap();
        assert!(socket::wait_readable(raw.as_fd(), 60_000).unwrap(), "{} bytes", garbage.len());
        let end = socket::receive(raw.as_fd());
        assert!(matches!(end, Ok(None)) || end.is_err(), "{end:?}");
    }
    assert_eq!(vmm.kill(), exit::KILLED);
}

proptest! {
    #[test]
    fn any_bytes_decode_or_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = postcard::from_bytes::<Request>(&bytes);
        let _ = postcard::from_bytes::<Message>(&bytes);
    }

    #[test]
    fn a_damaged_request_is_another_request_or_refused(at: prop::sample::Index, value: u8, cut: prop::sample::Index) {
        let request = Request { id: 7, command: Command::Create(Box::new(spec())) };
        let mut bytes = postcard::to_allocvec(&request).unwrap();
        prop_assert_eq!(postcard::from_bytes::<Request>(&bytes).unwrap(), request);
        let at = at.index(bytes.len());
        bytes[at] = value;
        bytes.truncate(cut.index(bytes.len()) + 1);
        if let Ok(Request { command: Command::Create(spec), .. }) = postcard::from_bytes::<Request>(&bytes) {
            let _ = crate::machine::validate(&spec);
        }
    }
}
