//! hearth: the command line.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic))]

pub mod args;
pub mod client;
pub mod commands;
pub mod config;
pub mod doctor;
pub mod error;
pub mod human;
pub mod output;
pub mod view;
pub mod wait;

use std::process::ExitCode;

use clap::Parser;

use crate::args::Arguments;
use crate::error::CliError;

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    restore_sigpipe();
    let arguments = Arguments::parse();
    // Fails only when a provider is installed already, which is the one wanted.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report(&CliError::Io { action: "start".to_owned(), source: error }),
    };
    let result = runtime.block_on(commands::run(arguments));
    // A read of the terminal that nobody waits for any more must not keep the process.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report(&error),
    }
}

fn report(error: &CliError) -> ExitCode {
    error.print();
    ExitCode::from(error.exit_code())
}

/// `hearth … | head` must end quietly, as other commands do; Rust starts with SIGPIPE ignored.
fn restore_sigpipe() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: the default action installs no handler, and no other thread runs yet.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
}
