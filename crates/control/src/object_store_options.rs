//! How to reach the object store, told by the variables that S3 clients share.
//! Source: <https://docs.aws.amazon.com/sdkref/latest/guide/settings-reference.html>

use hearth_snapshot::{S3Options, StoreOptions};

use crate::error::ControlError;

/// The variables that [`object_store_options`] looks at, each with what it is for.
pub const OBJECT_STORE_VARIABLES: [(&str, &str); 10] = [
    ("AWS_ACCESS_KEY_ID", "access key of an S3 object store; none (with no secret) = requests are not signed"),
    ("AWS_SECRET_ACCESS_KEY", "its secret"),
    ("AWS_SESSION_TOKEN", "token of temporary credentials"),
    ("AWS_REGION", "region that requests are signed for [default: us-east-1]"),
    ("AWS_DEFAULT_REGION", "the same, when AWS_REGION is not set"),
    ("AWS_ENDPOINT_URL_S3", "https://host[:port] of the service [default: Amazon's]"),
    ("AWS_ENDPOINT_URL", "the same, when AWS_ENDPOINT_URL_S3 is not set"),
    ("AWS_CA_BUNDLE", "file with certificates (PEM) of authorities to trust beside the system's"),
    ("AWS_ALLOW_HTTP", "true = take an http:// endpoint"),
    ("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true = bucket.host instead of host/bucket"),
];

/// Options for [`crate::ControlConfig::object_store_options`] from variables, as `get` knows them: usually those of the process.
/// An empty variable counts as not set.
///
/// # Errors
/// [`ControlError::Setting`] for a switch that is neither true nor false, [`ControlError::Io`] for certificates that cannot be read.
pub fn object_store_options(get: impl Fn(&str) -> Option<String>) -> Result<StoreOptions, ControlError> {
    let text = |name: &str| get(name).filter(|value| !value.is_empty());
    let switch = |name: &'static str| match text(name).as_deref().map(str::to_ascii_lowercase).as_deref() {
        None | Some("false" | "0") => Ok(false),
        Some("true" | "1") => Ok(true),
        Some(other) => {
            let reason = format!("is '{other}', must be true or false");
            Err(ControlError::Setting { name, reason })
        }
    };
    let ca_pem = match text("AWS_CA_BUNDLE") {
        Some(path) => Some(std::fs::read(&path).map_err(ControlError::io("read", path))?),
        None => None,
    };
    let s3 = S3Options {
        endpoint: text("AWS_ENDPOINT_URL_S3").or_else(|| text("AWS_ENDPOINT_URL")),
        region: text("AWS_REGION").or_else(|| text("AWS_DEFAULT_REGION")),
        access_key_id: text("AWS_ACCESS_KEY_ID"),
        secret_access_key: text("AWS_SECRET_ACCESS_KEY"),
        session_token: text("AWS_SESSION_TOKEN"),
        allow_http: switch("AWS_ALLOW_HTTP")?,
        virtual_hosted: switch("AWS_VIRTUAL_HOSTED_STYLE_REQUEST")?,
        no_conditional_put: false,
        ca_pem,
    };
    Ok(StoreOptions { s3, retry_timeout: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<StoreOptions, ControlError> {
        let known = |name: &str| OBJECT_STORE_VARIABLES.iter().any(|(known, _)| *known == name);
        object_store_options(|name| {
            assert!(known(name), "{name} is not in the list that operators read");
            variables.iter().find(|(other, _)| *other == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn variables_say_how_to_reach_the_store() {
        let found = of(&[]).unwrap().s3;
        assert_eq!((found.endpoint, found.access_key_id, found.allow_http), (None, None, false));
        let found = of(&[
            ("AWS_ACCESS_KEY_ID", "id"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_SESSION_TOKEN", ""),
            ("AWS_ENDPOINT_URL", "https://all.example"),
            ("AWS_ENDPOINT_URL_S3", "http://s3.example:9000"),
            ("AWS_DEFAULT_REGION", "here-1"),
            ("AWS_ALLOW_HTTP", "True"),
        ]);
        let found = found.unwrap().s3;
        assert_eq!(found.endpoint.as_deref(), Some("http://s3.example:9000"));
        assert_eq!((found.access_key_id.as_deref(), found.secret_access_key.as_deref()), (Some("id"), Some("secret")));
        assert_eq!((found.region.as_deref(), found.session_token), (Some("here-1"), None));
        assert!(found.allow_http && !found.virtual_hosted);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        assert!(of(&[("AWS_ALLOW_HTTP", "perhaps")]).unwrap_err().to_string().contains("AWS_ALLOW_HTTP"));
        assert!(
            of(&[("AWS_CA_BUNDLE", "/nonexistent/ca.pem")]).unwrap_err().to_string().contains("/nonexistent/ca.pem")
        );
    }
}
