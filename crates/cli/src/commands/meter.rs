//! How far long work is, on standard error.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::human;

/// A bar on a terminal, now and then a line elsewhere.
pub struct Meter {
    pub bar: ProgressBar,
    terminal: bool,
    last_line: std::cell::Cell<Option<Instant>>,
    last_reason: std::cell::RefCell<String>,
}

impl Meter {
    /// `size` in bytes; 0 = not known yet.
    pub fn new(step: &str, size: u64) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::new(size) } else { ProgressBar::hidden() };
        let template = "{msg} {wide_bar} {binary_bytes} of {binary_total_bytes} ({eta} left)";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(step.to_owned());
        Self { bar, terminal, last_line: std::cell::Cell::new(None), last_reason: std::cell::RefCell::default() }
    }

    pub fn show(&self, step: &str, done: u64, total: u64) {
        if self.terminal {
            self.bar.set_message(step.to_owned());
            if total > 0 {
                self.bar.set_length(total);
                self.bar.set_position(done);
            }
        } else if self.last_line.get().is_none_or(|last| last.elapsed() > Duration::from_secs(5)) {
            self.last_line.set(Some(Instant::now()));
            eprintln!("{step} {}", human::progress(done, total));
        }
    }

    /// Something that is said once.
    pub fn note(&self, text: &str) {
        self.last_reason.borrow_mut().clear();
        match self.terminal {
            true => self.bar.println(text),
            false => eprintln!("{text}"),
        }
    }

    /// Work stands still for this reason, and is tried again for `left`.
    pub fn wait(&self, reason: &str, left: Duration) {
        let left = human::duration(left);
        if self.terminal {
            self.bar.set_message(format!("reconnecting, for another {left}: {reason}"));
        } else if *self.last_reason.borrow() != reason {
            self.last_reason.replace(reason.to_owned());
            eprintln!("reconnecting, for {left}: {reason}");
        }
    }
}
