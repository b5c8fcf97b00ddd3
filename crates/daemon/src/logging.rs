//! Log lines on standard error, and panics that end the process.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::error::DaemonError;
use crate::settings::{LogFormat, Settings};

/// Starts logging as the settings say. From here on a panic anywhere ends the whole process: half a daemon is worse than
/// one that is started again, and everything on disk is made for that.
pub fn start(settings: &Settings) -> Result<(), DaemonError> {
    let filter = settings.log.as_deref().unwrap_or("info");
    let filter = EnvFilter::try_new(filter)
        .map_err(|error| DaemonError::Setting { name: "log", reason: format!("'{filter}': {error}") })?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match settings.log_format.unwrap_or(LogFormat::Text) {
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).init(),
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).init(),
    }
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let text = panic
            .payload()
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.payload().downcast_ref::<&str>().copied())
            .unwrap_or("no message");
        let backtrace = std::backtrace::Backtrace::force_capture();
        tracing::error!(place, %backtrace, "this is a defect in hearthd; it ends here, instances keep running: {text}");
        std::process::abort();
    }));
    Ok(())
}
