//! Where the control plane is and who calls: flags and HEARTH_* variables, then a profile of the configuration file, then
//! the credentials file that hearthd wrote on this machine.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use hearth_types::Credentials;
use serde::Deserialize;

use crate::args::Global;
use crate::error::CliError;

/// Written by `hearthd up`.
pub const ADMIN_CREDENTIALS: &str = "/var/lib/hearth/admin.json";

/// All that is needed to call.
#[derive(Clone, PartialEq, Eq)]
pub struct Connection {
    /// `https://host:port`.
    pub endpoint: String,
    /// PEM; none only for an unencrypted endpoint on this machine.
    pub ca_certificate: Option<String>,
    /// Bearer token.
    pub token: String,
}

/// Leaves the token out.
impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigFile {
    #[serde(default)]
    profile: BTreeMap<String, Profile>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Profile {
    endpoint: Option<String>,
    ca: Option<PathBuf>,
    token: Option<String>,
    credentials: Option<PathBuf>,
}

impl Connection {
    /// Puts the settings together. `home` is the user's home folder, `admin` the credentials file of this machine.
    pub fn resolve(global: &Global, home: Option<&Path>, admin: &Path) -> Result<Self, CliError> {
        let profile = profile(global, home)?;
        let named = global.credentials.clone().or(profile.credentials);
        // Whoever says all three needs no file; otherwise a file that was named must be readable.
        let complete = |g: &Global, p: &Option<String>, c: &Option<PathBuf>, t: &Option<String>| {
            (g.endpoint.is_some() || p.is_some())
                && (g.ca.is_some() || c.is_some())
                && (g.token.is_some() || t.is_some())
        };
        let file = match &named {
            Some(path) => Some(read_credentials(path)?),
            None if complete(global, &profile.endpoint, &profile.ca, &profile.token) => None,
            None => match read_credentials(admin) {
                Ok(credentials) => Some(credentials),
                Err(CliError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
                Err(CliError::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
                    return Err(CliError::Usage(format!(
                        "no credentials: {} is readable by root only; use sudo, HEARTH_TOKEN with HEARTH_CA and \
                         HEARTH_ENDPOINT, or --credentials FILE",
                        admin.display()
                    )));
                }
                Err(error) => return Err(error),
            },
        };
        let endpoint = global.endpoint.clone().or(profile.endpoint).or(file.as_ref().map(|f| f.endpoint.clone()));
        let token = global.token.clone().or(profile.token).or(file.as_ref().map(|f| f.token.clone()));
        let (Some(endpoint), Some(token)) = (endpoint, token) else {
            return Err(CliError::Usage(format!(
                "no control plane is known: there is no {} (does hearthd run on this machine? start it with `hearthd up` or \
                 scripts/up); or name one: HEARTH_ENDPOINT, HEARTH_CA and HEARTH_TOKEN, or --credentials FILE",
                admin.display()
            )));
        };
        let ca_certificate = match global.ca.as_ref().or(profile.ca.as_ref()) {
            Some(path) => Some(read(path, "the CA certificate")?),
            None => file.map(|f| f.ca_certificate),
        };
        let connection = Self { endpoint: endpoint.trim_end_matches('/').to_owned(), ca_certificate, token };
        connection.check()?;
        Ok(connection)
    }

    fn check(&self) -> Result<(), CliError> {
        let usage = |text: String| Err(CliError::Usage(text));
        if let Some(host) = self.endpoint.strip_prefix("http://") {
            // A token must not cross a network in clear text.
            let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
            if !matches!(host, "localhost" | "127.0.0.1" | "[::1]") {
                return usage(format!("endpoint {} is not encrypted: use https://", self.endpoint));
            }
        } else if !self.endpoint.starts_with("https://") {
            return usage(format!("endpoint '{}' must be a URL like https://localhost:7443", self.endpoint));
        } else if self.ca_certificate.is_none() {
            return usage("the control plane's CA certificate is missing: --ca, HEARTH_CA or --credentials".to_owned());
        }
        if self.token.is_empty() || !self.token.chars().all(|c| c.is_ascii_graphic()) {
            return usage("the token is empty or holds characters that no token has".to_owned());
        }
        Ok(())
    }
}

fn profile(global: &Global, home: Option<&Path>) -> Result<Profile, CliError> {
    let default = home.map(|home| home.join(".config/hearth/config.toml"));
    let Some(path) = global.config.clone().or(default) else { return Ok(Profile::default()) };
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound && global.config.is_none() => {
            return match &global.profile {
                Some(name) => Err(CliError::Usage(format!("no profile '{name}': there is no {}", path.display()))),
                None => Ok(Profile::default()),
            };
        }
        Err(error) => return Err(CliError::io(format!("read {}", path.display()))(error)),
    };
    let file: ConfigFile = toml::from_str(&text)
        .map_err(|error| CliError::Usage(format!("{}: {}", path.display(), error.to_string().trim_end())))?;
    let name = global.profile.as_deref().unwrap_or("default");
    match file.profile.get(name) {
        Some(profile) => {
            // Files are named relative to the one that names them.
            let beside = |file: &PathBuf| path.parent().unwrap_or(Path::new(".")).join(file);
            let (ca, credentials) = (profile.ca.as_ref().map(beside), profile.credentials.as_ref().map(beside));
            Ok(Profile { ca, credentials, ..profile.clone() })
        }
        None if global.profile.is_none() => Ok(Profile::default()),
        None => {
            let known: Vec<_> = file.profile.keys().map(String::as_str).collect();
            Err(CliError::Usage(format!("no profile '{name}' in {}; there are: {}", path.display(), known.join(", "))))
        }
    }
}

fn read(path: &Path, what: &str) -> Result<String, CliError> {
    fs::read_to_string(path).map_err(CliError::io(format!("read {what} {}", path.display())))
}

fn read_credentials(path: &Path) -> Result<Credentials, CliError> {
    let text = read(path, "credentials")?;
    serde_json::from_str(&text)
        .map_err(|error| CliError::Usage(format!("{} is no credentials file: {error}", path.display())))
}

#[cfg(test)]
#[path = "config_test.rs"]
mod tests;
