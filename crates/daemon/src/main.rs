//! The daemon.

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;

use hearth_daemon::settings::{Arguments, DEFAULT_CONFIG_FILE, Role, Settings};
use hearth_daemon::{DaemonError, logging, run};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match start(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hearthd: error: {error}");
            if let Some(advice) = error.advice() {
                eprintln!("hearthd: {advice}");
            }
            ExitCode::from(error.exit_code())
        }
    }
}

fn start(arguments: Arguments) -> Result<(), DaemonError> {
    let (role, flags) = arguments.split();
    let settings = Settings::resolve(flags, Path::new(DEFAULT_CONFIG_FILE))?;
    logging::start(&settings)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("hearthd")
        .build()
        .map_err(DaemonError::Runtime)?;
    let result = runtime.block_on(async {
        match role {
            Role::Up => run::up(&settings).await,
            Role::Control => run::control(&settings).await,
            Role::Agent => run::agent(&settings).await,
        }
    });
    // Blocking work that is still going on (a copy of an image) is abandoned: everything on disk is made for that.
    runtime.shutdown_background();
    result
}
