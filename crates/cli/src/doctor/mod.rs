//! `hearth doctor`: whether this machine can run instances, what is missing and how to mend it.

mod host;
mod kvm;

use std::fmt::Write as _;
use std::io::IsTerminal;

use serde_json::{Value, json};

use crate::args::{DoctorArgs, OutputForm};
use crate::error::CliError;
use crate::output;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Works, with drawbacks.
    Warn,
    /// Instances cannot run.
    Fail,
    /// Could not be found out.
    Skip,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
            Self::Skip => "skip",
        }
    }
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Stable name, for programs.
    pub name: &'static str,
    /// How it ended.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What that means; empty when all is well.
    pub meaning: String,
    /// How to mend it; empty when nothing needs mending.
    pub mend: String,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, found: found.into(), meaning: String::new(), mend: String::new() }
    }

    fn bad(name: &'static str, verdict: Verdict, found: impl Into<String>, meaning: &str, mend: &str) -> Self {
        Self { name, verdict, found: found.into(), meaning: meaning.to_owned(), mend: mend.to_owned() }
    }

    fn warn(name: &'static str, found: impl Into<String>, meaning: &str, mend: &str) -> Self {
        Self::bad(name, Verdict::Warn, found, meaning, mend)
    }

    fn fail(name: &'static str, found: impl Into<String>, meaning: &str, mend: &str) -> Self {
        Self::bad(name, Verdict::Fail, found, meaning, mend)
    }

    fn skip(name: &'static str, found: impl Into<String>, mend: &str) -> Self {
        Self::bad(name, Verdict::Skip, found, "", mend)
    }

    fn value(&self) -> Value {
        json!({
            "name": self.name,
            "verdict": self.verdict.name(),
            "found": self.found,
            "meaning": self.meaning,
            "mend": self.mend,
        })
    }
}

/// Checks that only the testbed can mend.
const VIRTUALIZATION: [&str; 3] = ["cpu", "kvm", "probe-guest"];

/// All checks together.
#[derive(Clone, Debug)]
pub struct Report {
    /// In the order of the report.
    pub checks: Vec<Check>,
}

impl Report {
    /// Nothing failed.
    pub fn is_fit(&self) -> bool {
        self.checks.iter().all(|check| check.verdict != Verdict::Fail)
    }

    /// KVM does not work here, whatever else is missing.
    pub fn needs_testbed(&self) -> bool {
        self.checks.iter().any(|check| check.verdict == Verdict::Fail && VIRTUALIZATION.contains(&check.name))
    }

    fn summary(&self) -> &'static str {
        if self.needs_testbed() {
            "This machine cannot run KVM guests directly: it needs the testbed (scripts/testbed), an emulated host with a \
             working /dev/kvm. scripts/up and scripts/test use it by themselves."
        } else if !self.is_fit() {
            "KVM works here, but something else is missing: mend what failed, then run `hearth doctor` again."
        } else {
            "This machine can run instances directly: `hearthd up` (or scripts/up) starts a cloud on it."
        }
    }

    fn value(&self) -> Value {
        json!({
            "fit": self.is_fit(),
            "testbed_needed": self.needs_testbed(),
            "summary": self.summary(),
            "checks": self.checks.iter().map(Check::value).collect::<Vec<_>>(),
        })
    }

    fn text(&self, colour: bool) -> String {
        let mut text = String::new();
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
        for check in &self.checks {
            let word = check.verdict.name();
            let word = match (colour, check.verdict) {
                (false, _) => format!("{word:4}"),
                (true, Verdict::Ok) => format!("\x1b[32m{word:4}\x1b[0m"),
                (true, Verdict::Fail) => format!("\x1b[1;31m{word:4}\x1b[0m"),
                (true, _) => format!("\x1b[33m{word:4}\x1b[0m"),
            };
            let _ = writeln!(text, "{word}  {:width$}  {}", check.name, check.found);
            let indent = " ".repeat(width + 8);
            if !check.meaning.is_empty() {
                let _ = writeln!(text, "{indent}{}", check.meaning);
            }
            if !check.mend.is_empty() {
                let _ = writeln!(text, "{indent}mend: {}", check.mend);
            }
        }
        let _ = writeln!(text, "\n{}", self.summary());
        text
    }
}

/// Runs all checks and prints the report; an error when instances cannot run here.
pub async fn run(args: &DoctorArgs, form: OutputForm) -> Result<(), CliError> {
    let mut checks = vec![kvm::cpu(), kvm::device()];
    checks.push(kvm::probe_guest(args.vmm.as_deref()).await);
    checks.extend(host::checks(&args.state_dir));
    let report = Report { checks };
    let text = match form {
        OutputForm::Json | OutputForm::Yaml => output::render_value(&report.value(), form)?,
        OutputForm::Id => {
            report.checks.iter().filter(|c| c.verdict == Verdict::Fail).map(|c| format!("{}\n", c.name)).collect()
        }
        _ => report.text(std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none()),
    };
    output::print(&text)?;
    if report.is_fit() { Ok(()) } else { Err(CliError::Unfit { testbed: report.needs_testbed() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(checks: &[(&'static str, Verdict)]) -> Report {
        let check =
            |(name, verdict): &(&'static str, Verdict)| Check::bad(name, *verdict, "found", "meaning", "mending");
        Report { checks: checks.iter().map(check).collect() }
    }

    #[test]
    fn only_failures_of_virtualization_ask_for_the_testbed() {
        let good = report(&[("cpu", Verdict::Ok), ("time", Verdict::Warn), ("nftables", Verdict::Skip)]);
        assert!(good.is_fit() && !good.needs_testbed());
        let other = report(&[("cpu", Verdict::Ok), ("cgroup2", Verdict::Fail)]);
        assert!(!other.is_fit() && !other.needs_testbed());
        let probe = report(&[("cpu", Verdict::Ok), ("probe-guest", Verdict::Fail)]);
        assert!(!probe.is_fit() && probe.needs_testbed());
        assert!(probe.summary().contains("scripts/testbed"));
    }

    #[test]
    fn every_form_tells_the_same() {
        let report = report(&[("cpu", Verdict::Fail)]);
        let text = report.text(false);
        assert!(text.starts_with("fail  cpu  found\n") && text.contains("mend: mending"), "{text}");
        let value = report.value();
        assert_eq!(value["fit"], false);
        assert_eq!(value["testbed_needed"], true);
        assert_eq!(value["checks"][0]["mend"], "mending");
    }
}
