use super::*;

use tempfile::TempDir;

const CA: &str = "-----BEGIN CERTIFICATE-----\n";

struct Home(TempDir);

impl Home {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    fn credentials(&self, name: &str, endpoint: &str) -> PathBuf {
        let text = format!(
            r#"{{"endpoint":"{endpoint}","ca_certificate":"ca of {name}","token":"hearth_{name}","account_id":"000000000001"}}"#
        );
        self.write(name, &text)
    }

    fn resolve(&self, global: &Global) -> Result<Connection, CliError> {
        Connection::resolve(global, Some(self.0.path()), &self.0.path().join("admin"))
    }
}

fn refused(result: Result<Connection, CliError>) -> String {
    let error = result.unwrap_err();
    assert_eq!(error.exit_code(), 2);
    error.to_string()
}

#[test]
fn on_the_control_planes_host_nothing_needs_to_be_said() {
    let home = Home::new();
    home.credentials("admin", "https://localhost:7443/");
    let connection = home.resolve(&Global::default()).unwrap();
    assert_eq!(connection.endpoint, "https://localhost:7443");
    assert_eq!(connection.token, "hearth_admin");
    assert!(!format!("{connection:?}").contains("hearth_admin"));
}

#[test]
fn without_anything_the_message_tells_what_to_do() {
    let text = refused(Home::new().resolve(&Global::default()));
    assert!(text.contains("hearthd up") && text.contains("HEARTH_ENDPOINT"), "{text}");
}

#[test]
fn flags_win_over_the_profile_and_the_profile_over_the_file_of_this_machine() {
    let home = Home::new();
    home.credentials("admin", "https://admin:1");
    home.credentials("work/creds.json", "https://work:2");
    home.write("work/ca.pem", CA);
    let text = "[profile.default]\nendpoint = 'https://default:3'\n\
                [profile.work]\ncredentials = '../../work/creds.json'\ntoken = 'hearth_profile'\n";
    home.write(".config/hearth/config.toml", text);
    let resolve = |global: Global| home.resolve(&global).unwrap();
    let connection = resolve(Global::default());
    assert_eq!((connection.endpoint.as_str(), connection.token.as_str()), ("https://default:3", "hearth_admin"));
    let work = Global { profile: Some("work".into()), ..Global::default() };
    let connection = resolve(work.clone());
    assert_eq!((connection.endpoint.as_str(), connection.token.as_str()), ("https://work:2", "hearth_profile"));
    assert_eq!(connection.ca_certificate.as_deref(), Some("ca of work/creds.json"));
    let ca = Some(home.0.path().join("work/ca.pem"));
    let connection = resolve(Global { token: Some("flag".into()), ca, ..work });
    assert_eq!((connection.token.as_str(), connection.ca_certificate.as_deref()), ("flag", Some(CA)));
}

#[test]
fn mistakes_are_named() {
    let home = Home::new();
    home.credentials("admin", "https://localhost:7443");
    let file = home.write(".config/hearth/config.toml", "[profile.a]\n[profile.b]\n");
    let with = |change: &dyn Fn(&mut Global)| {
        let mut global = Global::default();
        change(&mut global);
        home.resolve(&global)
    };
    assert!(refused(with(&|g| g.profile = Some("c".into()))).contains("there are: a, b"));
    assert!(refused(with(&|g| g.endpoint = Some("localhost:7443".into()))).contains("must be a URL"));
    assert!(refused(with(&|g| g.endpoint = Some("http://10.0.0.1:7443".into()))).contains("not encrypted"));
    assert!(refused(with(&|g| g.token = Some("two words".into()))).contains("token"));
    assert!(with(&|g| g.endpoint = Some("http://127.0.0.1:7443".into())).is_ok());
    let error = with(&|g| g.credentials = Some("/nonexistent".into())).unwrap_err();
    assert!(error.to_string().contains("/nonexistent"), "{error}");
    home.write("broken", "{}");
    assert!(refused(with(&|g| g.credentials = Some(home.0.path().join("broken")))).contains("broken"));
    fs::write(file, "[profile.a]\nendpoin = 'x'\n").unwrap();
    assert!(refused(home.resolve(&Global::default())).contains("endpoin"));
}
