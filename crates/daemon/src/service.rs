//! The service manager's side: readiness, watchdog, signals.

use std::time::Duration;

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::error::DaemonError;

/// Exit status after a second signal, as shells have it for SIGINT.
const IMPATIENT: i32 = 130;

/// Tells systemd (if it is there) that the daemon serves, and answers its watchdog from then on.
pub fn ready(status: &str, shutdown: &CancellationToken) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
    if let Some(interval) = sd_notify::watchdog_enabled() {
        let shutdown = shutdown.clone();
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval((interval / 2).max(Duration::from_millis(10)));
            while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
                notify(&[NotifyState::Watchdog]);
            }
        });
    }
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "cannot tell the service manager");
    }
}

/// Cancels `shutdown` at the first SIGTERM or SIGINT; ends the process at the second.
pub fn end_on_signals(shutdown: CancellationToken) -> Result<(), DaemonError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(DaemonError::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DaemonError::Runtime)?;
    tokio::spawn(async move {
        let mut name = "SIGTERM";
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => name = "SIGINT",
        }
        tracing::info!("{name}: ending; instances keep running");
        notify(&[NotifyState::Stopping]);
        shutdown.cancel();
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::warn!("second signal: ending at once");
        std::process::exit(IMPATIENT);
    });
    Ok(())
}
