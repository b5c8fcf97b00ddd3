use super::*;

fn flags(line: &str) -> (Role, Settings) {
    let Task::Serve(role, settings) = Arguments::try_parse_from(line.split_whitespace()).unwrap().task() else {
        panic!("{line} does not serve")
    };
    (role, *settings)
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("hearthd.toml");
    let text = "listen = '10.0.0.1:8443'\nzone = 'attic-1b'\nstop-timeout = '2min'\ndns = ['9.9.9.9']\nlabels = ['rack=a']\nnat = false\n";
    std::fs::write(&file, text).unwrap();
    let (role, given) = flags("hearthd up --zone cellar-1a --label rack=b --label disk=nvme");
    assert_eq!(role, Role::Up);
    let settings = Settings::resolve(given, &file).unwrap();
    assert_eq!(settings.zone.as_deref(), Some("cellar-1a"));
    assert_eq!(settings.labels, ["rack=b", "disk=nvme"]);
    assert_eq!(settings.listen_or(Ipv4Addr::LOCALHOST.into()).to_string(), "10.0.0.1:8443");
    assert_eq!(settings.stop_timeout, Some(Span(Duration::from_secs(120))));
    assert_eq!(settings.dns, [Ipv4Addr::new(9, 9, 9, 9)]);
    assert_eq!(settings.nat, Some(false));
    assert_eq!(settings.state_dir(), Path::new("/var/lib/hearth"));
}

#[test]
fn a_named_file_must_exist_and_the_default_one_need_not() {
    let missing = Path::new("/nonexistent/hearthd.toml");
    let (_, given) = flags("hearthd control");
    assert_eq!(Settings::resolve(given.clone(), missing).unwrap(), given);
    let (_, given) = flags("hearthd control --config /nonexistent/hearthd.toml");
    let error = Settings::resolve(given, Path::new("/dev/null")).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/hearthd.toml"), "{error}");
    assert_eq!(error.exit_code(), 2);
}

#[test]
fn mistakes_in_the_file_are_shown_with_their_place() {
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("hearthd.toml");
    for (text, told) in [
        ("lissten = '1.2.3.4:5'", "lissten"),
        ("listen = 'here'", "listen"),
        ("stop-timeout = '9 fortnights'", "write it as 90s"),
        ("instance-cidr = '172.30.0.0/40'", "instance-cidr"),
        ("instance-cidr = '172.30.0.0/29'", "/8 to /28"),
        ("state-dir = ", "line 1"),
    ] {
        std::fs::write(&file, text).unwrap();
        let error = Settings::resolve(Settings::default(), &file).unwrap_err();
        let shown = error.to_string();
        assert!(shown.contains(told) && shown.contains("hearthd.toml"), "{text}: {shown}");
    }
}

#[test]
fn an_instance_network_is_one_that_the_network_takes() {
    for role in ["up", "agent"] {
        let parse = |cidr: &str| Arguments::try_parse_from(["hearthd", role, "--instance-cidr", cidr]);
        for fine in ["10.0.0.0/8", "172.30.0.0/20", "192.168.7.0/28"] {
            let (_, settings) = flags(&format!("hearthd {role} --instance-cidr {fine}"));
            assert_eq!(settings.instance_cidr.unwrap().0.to_string(), fine);
        }
        for (bad, told) in [
            ("172.30.0.0/29", "must be /8 to /28"),
            ("172.30.0.0/32", "must be /8 to /28"),
            ("0.0.0.0/0", "must be /8 to /28"),
            ("10.0.0.0/7", "must be /8 to /28"),
            ("172.30.0.1/20", "did you mean 172.30.0.0/20?"),
            ("172.30.0.0", "172.30.0.0/20"),
            ("fd00::/64", "no IPv4 network"),
        ] {
            let error = parse(bad).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            let shown = error.to_string();
            assert!(shown.contains("--instance-cidr") && shown.contains(told), "{bad}: {shown}");
        }
    }
}

#[test]
fn the_command_line_is_sound() {
    use clap::CommandFactory;
    Arguments::command().debug_assert();
    let error = Arguments::try_parse_from(["hearthd", "up", "--listen", "nowhere"]).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(Arguments::try_parse_from(["hearthd", "--version"]).unwrap_err().to_string().starts_with("hearthd 0."));
}

#[test]
fn volume_backends_stand_in_the_file() {
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("hearthd.toml");
    let text = "zone = 'a'\n[[volume-backend]]\nname = 'ceph'\nkind = 'rbd'\npool = 'volumes'\nuser = 'hearth'\n\
                [[volume-backend]]\nname = 'san'\nkind = 'nbd'\nuri = 'nbds://san/{volume}'\nprovisioner = '/p'\ntls-authority = '/ca'\n";
    std::fs::write(&file, text).unwrap();
    let settings = Settings::resolve(Settings::default(), &file).unwrap();
    let agent = crate::layout::agent(&settings).unwrap();
    let [BackendSettings::Rbd(ceph), BackendSettings::Nbd(san)] = agent.volume_backends.as_slice() else {
        panic!("{:?}", agent.volume_backends)
    };
    assert_eq!((ceph.pool.as_str(), ceph.user.as_deref()), ("volumes", Some("hearth")));
    assert_eq!((san.name.as_str(), san.tls_authority.as_deref()), ("san", Some(Path::new("/ca"))));
    for (text, told) in [
        ("[[volume-backend]]\nname = 'x'\nkind = 'iscsi'\n", "iscsi"),
        ("[[volume-backend]]\nname = 'x'\nkind = 'rbd'\npol = 'p'\n", "pol"),
    ] {
        std::fs::write(&file, text).unwrap();
        let error = Settings::resolve(Settings::default(), &file).unwrap_err().to_string();
        assert!(error.contains(told) && error.contains("hearthd.toml"), "{text}: {error}");
    }
}

#[test]
fn limits_of_accounts_reach_the_control_plane() {
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("hearthd.toml");
    std::fs::write(&file, "max-snapshots-per-account = 7\nmax-images-per-account = 8\n").unwrap();
    let line =
        "hearthd control --max-volumes-per-account 0 --max-volume-gib-per-account 500 --max-images-per-account 9";
    let settings = Settings::resolve(flags(line).1, &file).unwrap();
    let config = crate::layout::control(&settings, Ipv4Addr::LOCALHOST.into()).unwrap();
    assert_eq!((config.max_volumes_per_account, config.max_volume_gib_per_account), (0, 500));
    assert_eq!((config.max_snapshots_per_account, config.max_images_per_account), (7, 9));
}
