//! One microVM. See `hearth-vmm --help`.

use std::process::exit;
use std::time::Instant;

use hearth_vmm::control::protocol::{CONTROL_LISTENER_FD, exit as code};
use hearth_vmm::control::server::{Server, inherited_listener, log};
use hearth_vmm::developer;

const HELP: &str = "\
One microVM.

Usage:
  hearth-vmm              serve the control socket inherited as file descriptor 3 (how the agent starts it)
  hearth-vmm run OPTION...  boot a machine without an agent, for development and measurements
  hearth-vmm --help | --version

Exit codes: 0 guest powered off, 2 wrong usage, 10 guest reset, 11 guest crashed, 12 killed by the agent,
13 the host failed, 14 internal error.
";

fn main() {
    let born = Instant::now();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut words = arguments.iter().map(String::as_str);
    exit(match words.next() {
        None => serve(born),
        Some("run") => developer::run(words, born),
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
    })
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
