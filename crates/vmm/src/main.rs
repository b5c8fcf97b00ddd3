//! One microVM. See `hearth-vmm --help`.

use std::process::exit;
use std::time::Instant;

use hearth_vmm::control::lock;
use hearth_vmm::control::protocol::{CONTROL_LISTENER_FD, exit as code};
use hearth_vmm::control::server::{Server, inherited_listener, log};
use hearth_vmm::{developer, probe};

const HELP: &str = "\
One microVM.

Usage:
  hearth-vmm              serve the control socket inherited as file descriptor 3 (how the agent starts it)
  hearth-vmm run OPTION...  boot a machine without an agent, for development and measurements
  hearth-vmm probe [DEVICE] run tiny guests that show whether KVM really works here; 0 = yes, 1 = no
  hearth-vmm --help | --version

Exit codes: 0 guest powered off, 2 wrong usage, 10 guest reset, 11 guest crashed, 12 killed by the agent,
13 the host failed, 14 internal error.
";

fn main() {
    let born = Instant::now();
    lock::claim();
    end_on_panic();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut words = arguments.iter().map(String::as_str);
    let result = match words.next() {
        None => serve(born),
        Some("run") => developer::run(words, born),
        Some("probe") => probe::run(words.next().unwrap_or("/dev/kvm")),
        Some("--help" | "-h") => {
            print!("{HELP}\n{}", developer::HELP);
            code::POWER_OFF
        }
        Some("--version") => {
            println!("hearth-vmm {}", env!("CARGO_PKG_VERSION"));
            code::POWER_OFF
        }
        Some(other) => {
            log(&format!("{other:?} is not understood; see --help"));
            code::USAGE
        }
    };
    lock::record_exit(result);
    exit(result)
}

/// A panic anywhere is an internal error of the whole machine, and its exit code must say so.
fn end_on_panic() {
    std::panic::set_hook(Box::new(|info| {
        log(&format!("internal error: {info}"));
        lock::record_exit(code::INTERNAL);
        exit(code::INTERNAL);
    }));
}

fn serve(born: Instant) -> i32 {
    match inherited_listener(CONTROL_LISTENER_FD).and_then(|listener| Server::new(listener, born)) {
        Ok(server) => server.run(),
        Err(e) => {
            log(&format!("file descriptor {CONTROL_LISTENER_FD} must be a listening control socket: {e}"));
            code::USAGE
        }
    }
}
