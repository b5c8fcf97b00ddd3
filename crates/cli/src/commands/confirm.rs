//! Questions before something is lost.

use std::io::{BufRead, IsTerminal, Write};

use crate::error::CliError;

/// Asks on a terminal; elsewhere, or with `yes`, goes on: a script has decided when it was written.
pub fn confirm(question: &str, yes: bool) -> Result<(), CliError> {
    if yes || !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Ok(());
    }
    eprint!("{question} [y/N] ");
    std::io::stderr().flush().map_err(CliError::io("write to the terminal"))?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer).map_err(CliError::io("read from the terminal"))?;
    if matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") { Ok(()) } else { Err(CliError::Declined) }
}
