//! The daemon.

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;

use hearth_daemon::settings::{Arguments, DEFAULT_CONFIG_FILE, Role, Settings, Task};
use hearth_daemon::{DaemonError, backup, logging, run};

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
    let default_file = Path::new(DEFAULT_CONFIG_FILE);
    let (role, flags) = match arguments.task() {
        Task::Serve(role, flags) => (role, *flags),
        Task::Backup(args) => {
            return backup::backup(&Settings::resolve(args.place.settings(), default_file)?, &args.file);
        }
        Task::Restore(args) => {
            return backup::restore(&Settings::resolve(args.place.settings(), default_file)?, &args);
        }
    };
    let settings = Settings::resolve(flags, default_file)?;
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
