//! The command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    hearth_cli::main()
}
