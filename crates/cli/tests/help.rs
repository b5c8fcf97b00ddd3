//! Help, usage errors and what needs no control plane.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, missing_docs)]

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, Output};

use clap::CommandFactory;
use hearth_cli::args::Arguments;

fn hearth(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_hearth")).args(args).env_clear().env("HOME", "/nonexistent").output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Every command's help, one after the other.
fn all_help(command: &mut clap::Command, path: &str, out: &mut String) {
    writeln!(out, "### {path}\n\n{}", command.render_help()).unwrap();
    let names: Vec<String> =
        command.get_subcommands().map(|c| c.get_name().to_owned()).filter(|name| name != "help").collect();
    for name in names {
        all_help(command.find_subcommand_mut(&name).unwrap(), &format!("{path} {name}"), out);
    }
}

/// The whole grammar in one file, so that a change of it is seen in review. HEARTH_BLESS=1 writes it anew.
#[test]
fn help_is_as_reviewed() {
    let mut command = Arguments::command().term_width(100);
    command.build();
    let mut help = String::new();
    all_help(&mut command, "hearth", &mut help);
    let help: String = help.lines().map(|line| line.trim_end().to_owned() + "\n").collect();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/help.txt");
    if std::env::var_os("HEARTH_BLESS").is_some() {
        std::fs::write(&file, &help).unwrap();
    }
    let reviewed = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(help == reviewed, "help differs from tests/snapshots/help.txt; look at the change with HEARTH_BLESS=1");
}

#[test]
fn every_verb_has_an_example_and_every_flag_a_text() {
    fn check(command: &clap::Command, path: &str) {
        for argument in command.get_arguments() {
            assert!(argument.get_help().is_some(), "{path}: {}", argument.get_id());
        }
        if command.get_subcommands().next().is_none() && !path.ends_with(" help") {
            let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(after.contains("Example"), "{path} has no example");
        }
        for sub in command.get_subcommands() {
            check(sub, &format!("{path} {}", sub.get_name()));
        }
    }
    let command = Arguments::command();
    command.clone().debug_assert();
    check(&command, "hearth");
}

#[test]
fn wrong_usage_ends_with_two_and_a_suggestion() {
    for (args, told) in [
        (&["instnace", "list"][..], "instance"),
        (&["instance", "lits"], "list"),
        (&["instance", "run"], "<IMAGE>"),
        (&["instance", "list", "--filter", "running"], "NAME=VALUE"),
        (&["instance", "run", "x", "--root-size", "many"], "20G"),
        (&["instance", "list", "-o", "xml"], "json"),
        (&["instance", "list", "--profile", "work"], "no profile 'work'"),
    ] {
        let output = hearth(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let said = text(&output.stderr);
        assert!(said.contains(told), "{args:?}: {said}");
        assert!(output.stdout.is_empty());
    }
    assert_eq!(hearth(&[]).status.code(), Some(2));
}

#[test]
fn version_and_completions_need_nothing() {
    assert!(text(&hearth(&["--version"]).stdout).starts_with("hearth 0."));
    for shell in ["bash", "zsh", "fish"] {
        let script = text(&hearth(&["completion", shell]).stdout);
        assert!(script.contains("console-output"), "{shell}");
    }
}

#[test]
fn doctor_tells_programs_what_it_tells_people() {
    let output = hearth(&["doctor", "-o", "json", "--state-dir", "/nonexistent/state"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let fit = report["fit"].as_bool().unwrap();
    assert_eq!(output.status.code(), Some(if fit { 0 } else { 1 }));
    let checks = report["checks"].as_array().unwrap();
    let names: Vec<_> = checks.iter().map(|check| check["name"].as_str().unwrap()).collect();
    for name in ["cpu", "kvm", "probe-guest", "cgroup2", "nftables", "tun", "disk", "memory", "time"] {
        assert!(names.contains(&name), "{name}");
    }
    for check in checks {
        let verdict = check["verdict"].as_str().unwrap();
        assert!(["ok", "warn", "fail", "skip"].contains(&verdict));
        assert!(verdict != "fail" || !check["mend"].as_str().unwrap().is_empty(), "{check} says not how to mend it");
    }
    let failed = checks.iter().any(|check| check["verdict"] == "fail");
    assert_eq!(fit, !failed);
    assert!(text(&hearth(&["doctor", "--state-dir", "/"]).stdout).contains(report["summary"].as_str().unwrap()));
}
