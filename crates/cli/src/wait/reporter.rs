//! Shows how resources change: bars on a terminal, lines elsewhere. All on standard error.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::Shown;
use crate::human;

const WORDS: &str = "{spinner} {prefix} {msg} ({elapsed})";
const BAR: &str = "{spinner} {prefix} {bar:30} {msg} ({elapsed})";

struct Line {
    bar: ProgressBar,
    last: String,
    measured: bool,
}

pub(super) struct Reporter {
    terminal: bool,
    bars: MultiProgress,
    lines: BTreeMap<String, Line>,
    began: Instant,
}

fn set_style(bar: &ProgressBar, template: &str) {
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
}

impl Reporter {
    pub fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { terminal, bars: MultiProgress::new(), lines: BTreeMap::new(), began: Instant::now() }
    }

    pub fn show(&mut self, id: &str, shown: &Shown, reached: bool) {
        let bars = &self.bars;
        let line = self.lines.entry(id.to_owned()).or_insert_with(|| {
            let bar = bars.add(ProgressBar::new_spinner());
            set_style(&bar, WORDS);
            bar.set_prefix(id.to_owned());
            bar.enable_steady_tick(Duration::from_millis(200));
            Line { bar, last: String::new(), measured: false }
        });
        if !self.terminal {
            // Lines of a log: one for each step, not for each percent.
            if line.last != shown.text {
                eprintln!("{id} {} after {}", shown.text, human::duration(self.began.elapsed()));
                line.last.clone_from(&shown.text);
            }
            return;
        }
        let measured = shown.total > 0 && !reached;
        if measured != line.measured {
            set_style(&line.bar, if measured { BAR } else { WORDS });
            line.measured = measured;
        }
        if reached {
            line.bar.finish_with_message(shown.text.clone());
            return;
        }
        if measured {
            line.bar.set_length(shown.total);
            line.bar.set_position(shown.done);
        }
        line.bar.set_message(format!("{} {}", shown.text, shown.share()).trim_end().to_owned());
    }

    pub fn end(&self) {
        for line in self.lines.values().filter(|line| !line.bar.is_finished()) {
            line.bar.abandon();
        }
    }
}
