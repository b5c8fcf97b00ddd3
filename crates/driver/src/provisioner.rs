//! An operator's program that makes and deletes the exports of an NBD server, which NBD itself has no words for.

use std::path::PathBuf;
use std::time::Duration;

use crate::DriverError;
use crate::command::run;
use crate::rbd::Name;

/// The program. It is run as one of these, each of which may be repeated, and which succeed by exit code 0; what they write to
/// standard error is shown to people.
///
/// | arguments | what it does |
/// |---|---|
/// | `create VOLUME BYTES` | makes a blank export of that size, unless it is there |
/// | `attach VOLUME GENERATION BYTES` | fails if there is no such export, or if it was attached with a higher generation; makes it at least BYTES long; sees to it that connections made before are not served any more |
/// | `delete VOLUME` | deletes the export and its data; succeeds if there is none |
#[derive(Clone, Debug)]
pub(crate) struct Provisioner {
    pub program: PathBuf,
    /// Longest that one run may take.
    pub patience: Duration,
}

impl Provisioner {
    fn run(&self, words: &[&str]) -> Result<(), DriverError> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        run(&self.program.display().to_string(), &words, self.patience).map(drop)
    }

    pub fn create(&self, volume: &Name, bytes: u64) -> Result<(), DriverError> {
        self.run(&["create", volume.as_str(), &bytes.to_string()])
    }

    pub fn attach(&self, volume: &Name, generation: u64, bytes: u64) -> Result<(), DriverError> {
        self.run(&["attach", volume.as_str(), &generation.to_string(), &bytes.to_string()])
    }

    pub fn delete(&self, volume: &Name) -> Result<(), DriverError> {
        self.run(&["delete", volume.as_str()])
    }
}
