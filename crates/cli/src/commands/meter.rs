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
        Self { bar, terminal, last_line: std::cell::Cell::new(None) }
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
}
