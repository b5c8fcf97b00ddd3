//! The three roles.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use hearth_control::Control;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::error::DaemonError;
use crate::settings::Settings;
use crate::{layout, service};

/// How long parts may take to end after a signal.
const GRACE: Duration = Duration::from_secs(20);
/// The token with which a host joins its own control plane is used at once.
const OWN_TOKEN_TTL: Duration = Duration::from_secs(300);

/// Parts that run until one of them ends or a signal comes; then all are asked to end.
struct Parts {
    tasks: JoinSet<(&'static str, Result<(), DaemonError>)>,
    shutdown: CancellationToken,
}

impl Parts {
    fn new(shutdown: CancellationToken) -> Self {
        Self { tasks: JoinSet::new(), shutdown }
    }

    fn add(&mut self, name: &'static str, part: impl Future<Output = Result<(), DaemonError>> + Send + 'static) {
        self.tasks.spawn(async move { (name, part.await) });
    }

    /// The first failure, or `Ok` when all ended because they were asked to.
    async fn finish(mut self) -> Result<(), DaemonError> {
        let mut result = Ok(());
        // Runs until the first part ends, by itself or because of a signal.
        if let Some(ended) = self.tasks.join_next().await {
            result = judge(ended, self.shutdown.is_cancelled());
        }
        self.shutdown.cancel();
        let rest = async {
            let mut result = Ok(());
            while let Some(ended) = self.tasks.join_next().await {
                result = result.and(judge(ended, true));
            }
            result
        };
        let rest = tokio::time::timeout(GRACE, rest).await.unwrap_or(Err(DaemonError::Stuck(GRACE.as_secs())));
        let result = result.and(rest);
        if result.is_ok() {
            tracing::info!("ended cleanly");
        }
        result
    }
}

type Ended = Result<(&'static str, Result<(), DaemonError>), tokio::task::JoinError>;

fn judge(ended: Ended, expected: bool) -> Result<(), DaemonError> {
    match ended {
        Ok((name, Ok(()))) if expected => {
            tracing::debug!("the {name} has ended");
            Ok(())
        }
        Ok((name, Ok(()))) => Err(DaemonError::Ended(name)),
        Ok((name, Err(error))) => {
            tracing::error!("the {name} failed: {error}");
            Err(error)
        }
        // A panic ends the process before this, see `logging`.
        Err(_) => Err(DaemonError::Ended("task")),
    }
}

fn need_root() -> Result<(), DaemonError> {
    if nix::unistd::geteuid().is_root() { Ok(()) } else { Err(DaemonError::NotRoot) }
}

fn begin() -> Result<CancellationToken, DaemonError> {
    // Fails only when a provider is installed already, which is the one wanted.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let shutdown = CancellationToken::new();
    service::end_on_signals(shutdown.clone())?;
    Ok(shutdown)
}

/// Control plane and agent; the first start joins the host without a manual step.
pub async fn up(settings: &Settings) -> Result<(), DaemonError> {
    need_root()?;
    let mut agent = layout::agent(settings)?;
    let config = layout::control(settings, IpAddr::V4(Ipv4Addr::LOCALHOST))?;
    let credentials = config.admin_credentials_path();
    let shutdown = begin()?;
    let Some(started) = shutdown.run_until_cancelled(Control::start(config)).await else { return Ok(()) };
    let control = started?;
    agent.objects = Some(control.objects());
    let endpoint = layout::own_endpoint(control.local_addr());
    agent.join_token = Some(control.create_join_token(OWN_TOKEN_TTL).await?);
    agent.control_endpoints = vec![endpoint.clone()];

    let mut parts = Parts::new(shutdown.clone());
    let child = shutdown.clone();
    parts.add("control plane", async move { Ok(control.serve(child).await?) });
    let child = shutdown.clone();
    parts.add("agent", async move { Ok(hearth_agent::run(agent, child).await?) });
    tracing::info!(%endpoint, credentials = %credentials.display(), "hearth is up");
    service::ready(&format!("API at {endpoint}"), &shutdown);
    parts.finish().await
}

/// Only the control plane.
pub async fn control(settings: &Settings) -> Result<(), DaemonError> {
    let mut config = layout::control(settings, IpAddr::V4(Ipv4Addr::UNSPECIFIED))?;
    if let Some(name) = &settings.name {
        config.name.clone_from(name);
    }
    let credentials = config.admin_credentials_path();
    let shutdown = begin()?;
    let Some(started) = shutdown.run_until_cancelled(Control::start(config)).await else { return Ok(()) };
    let control = started?;
    let address = control.local_addr();
    let mut parts = Parts::new(shutdown.clone());
    let child = shutdown.clone();
    parts.add("control plane", async move { Ok(control.serve(child).await?) });
    tracing::info!(%address, credentials = %credentials.display(), "the control plane is up");
    service::ready(&format!("API at {address}"), &shutdown);
    parts.finish().await
}

/// Only the agent.
pub async fn agent(settings: &Settings) -> Result<(), DaemonError> {
    need_root()?;
    let mut config = layout::agent(settings)?;
    layout::join(settings, &mut config)?;
    let shutdown = begin()?;
    let mut parts = Parts::new(shutdown.clone());
    let child = shutdown.clone();
    parts.add("agent", async move { Ok(hearth_agent::run(config, child).await?) });
    service::ready("agent", &shutdown);
    parts.finish().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_parts_end_with_the_first_and_its_failure_is_told() {
        let shutdown = CancellationToken::new();
        let mut parts = Parts::new(shutdown.clone());
        let child = shutdown.clone();
        parts.add("waiting", async move {
            child.cancelled().await;
            Ok(())
        });
        parts.add("failing", async { Err(DaemonError::NotRoot) });
        assert!(matches!(parts.finish().await, Err(DaemonError::NotRoot)));
        assert!(shutdown.is_cancelled());
    }

    #[tokio::test]
    async fn ending_when_asked_is_fine_and_ending_unasked_is_not() {
        for asked in [true, false] {
            let shutdown = CancellationToken::new();
            let mut parts = Parts::new(shutdown.clone());
            parts.add("part", async { Ok(()) });
            if asked {
                shutdown.cancel();
            }
            assert_eq!(parts.finish().await.is_ok(), asked);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_part_that_hangs_does_not_keep_the_process() {
        let shutdown = CancellationToken::new();
        let mut parts = Parts::new(shutdown.clone());
        parts.add("hanging", std::future::pending());
        parts.add("ending", async { Ok(()) });
        shutdown.cancel();
        assert!(matches!(parts.finish().await, Err(DaemonError::Stuck(_))));
    }
}
