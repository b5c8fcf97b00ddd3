//! What the commands do.

mod account;
mod build;
mod bundle;
mod confirm;
mod console;
mod download;
mod host;
mod image;
mod instance;
mod key_pair;
pub(crate) mod lookup;
mod mapping;
mod meter;
mod snapshot;
mod storage;
mod tag;
mod terminal;
mod token;
mod upload;
mod volume;

use std::path::{Path, PathBuf};

use clap::CommandFactory;
use hearth_types::Credentials;

use crate::args::{Arguments, Command, Global, OutputForm};
use crate::client::Client;
use crate::config::{ADMIN_CREDENTIALS, Connection};
use crate::error::CliError;
use crate::output;

/// A command's surroundings.
pub struct Context {
    /// The control plane.
    pub client: Client,
    /// Where it is and who calls.
    pub connection: Connection,
    /// How to print.
    pub output: OutputForm,
}

impl Context {
    fn new(global: &Global) -> Result<Self, CliError> {
        let home = std::env::var_os("HOME").map(PathBuf::from);
        let connection = Connection::resolve(global, home.as_deref(), Path::new(ADMIN_CREDENTIALS))?;
        Ok(Self { client: Client::new(&connection)?, connection, output: global.output })
    }

    /// Whether a person reads the answer.
    pub fn for_people(&self) -> bool {
        matches!(self.output, OutputForm::Table | OutputForm::Wide)
    }
}

/// Runs one command.
pub async fn run(arguments: Arguments) -> Result<(), CliError> {
    let global = &arguments.global;
    match arguments.command {
        Command::Completion(args) => {
            let mut script = Vec::new();
            clap_complete::generate(args.shell, &mut Arguments::command(), "hearth", &mut script);
            output::print(&String::from_utf8_lossy(&script))
        }
        Command::Doctor(args) => crate::doctor::run(&args, global.output).await,
        Command::Instance(command) => instance::run(&Context::new(global)?, command).await,
        Command::Image(command) => image::run(&Context::new(global)?, command).await,
        Command::Bundle(command) => bundle::run(&Context::new(global)?, command).await,
        Command::Volume(command) => volume::run(&Context::new(global)?, command).await,
        Command::Snapshot(command) => snapshot::run(&Context::new(global)?, command).await,
        Command::Storage(command) => storage::run(&Context::new(global)?, command).await,
        Command::InstanceType(command) => instance::types(&Context::new(global)?, command).await,
        Command::Host(command) => host::run(&Context::new(global)?, command).await,
        Command::KeyPair(command) => key_pair::run(&Context::new(global)?, command).await,
        Command::Tag(command) => tag::run(&Context::new(global)?, command).await,
        Command::Token(command) => token::run(&Context::new(global)?, command).await,
        Command::Account(command) => account::run(&Context::new(global)?, command).await,
    }
}

/// Writes a secret to a new file that only its owner may read.
fn save_secret(path: &Path, content: &[u8]) -> Result<(), CliError> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let opened = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let mut file = opened.map_err(CliError::io(format!("create {}", path.display())))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(CliError::io(format!("write {}", path.display())))
}

/// Writes a credentials file for a new token, which is printed when that fails: it exists nowhere else.
fn save_credentials(context: &Context, path: &Path, token: &str, account_id: &str) -> Result<(), CliError> {
    let credentials = Credentials {
        endpoint: context.connection.endpoint.clone(),
        ca_certificate: context.connection.ca_certificate.clone().unwrap_or_default(),
        token: token.to_owned(),
        account_id: account_id.to_owned(),
    };
    let text = serde_json::to_string_pretty(&credentials)
        .map_err(|error| CliError::Io { action: "write credentials".to_owned(), source: error.into() })?;
    if let Err(error) = save_secret(path, (text + "\n").as_bytes()) {
        output::print(&format!("{token}\n"))?;
        return Err(error);
    }
    eprintln!("credentials: {} (use them with --credentials or HEARTH_CREDENTIALS)", path.display());
    Ok(())
}

/// Reads a whole file, or standard input for "-", of at most `limit` bytes.
fn read_input(path: &Path, limit: usize, what: &str) -> Result<Vec<u8>, CliError> {
    use std::io::Read;
    let mut content = Vec::new();
    let read = |reader: &mut dyn Read, content: &mut Vec<u8>| reader.take(limit as u64 + 1).read_to_end(content);
    let result = if path == Path::new("-") {
        read(&mut std::io::stdin().lock(), &mut content)
    } else {
        std::fs::File::open(path).and_then(|mut file| read(&mut file, &mut content))
    };
    result.map_err(CliError::io(format!("read {what} {}", path.display())))?;
    if content.len() > limit {
        return Err(CliError::Usage(format!("{what} {} is larger than {limit} bytes", path.display())));
    }
    Ok(content)
}
