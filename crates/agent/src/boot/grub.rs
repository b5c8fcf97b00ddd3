//! Runs a grub.cfg far enough to know which kernel its default entry boots.
//!
//! Only what decides that is carried out: variables, conditions, loops, functions, `search`, `load_env`, `source`, menus, `linux`
//! and `initrd`. Everything that would draw or load modules succeeds without effect.

use std::collections::HashMap;
use std::rc::Rc;

use super::grub_parser::{Part, Statement, Word, parse};

/// Statements that are carried out at most, loops included.
const MAX_STEPS: usize = 20_000;
/// Deepest nesting of functions and sourced files.
const MAX_CALLS: usize = 16;
/// Longest value of a variable in bytes.
const MAX_VALUE: usize = 16 * 1024;
/// Most variables.
const MAX_VARIABLES: usize = 4096;
/// Longest command with its arguments after expansion, in bytes.
const MAX_COMMAND: usize = 64 * 1024;
/// Most menu entries.
const MAX_ENTRIES: usize = 1024;

/// What a script may ask about the disks.
pub trait GrubHost {
    /// A file's text. `device` is like `hd0,gpt1`.
    fn read(&self, device: &str, path: &str) -> Option<String>;
    /// Whether there is a file.
    fn is_file(&self, device: &str, path: &str) -> bool;
    /// Whether there is a directory.
    fn is_directory(&self, device: &str, path: &str) -> bool;
    /// Size of a file in bytes.
    fn size(&self, device: &str, path: &str) -> Option<u64>;
    /// The device whose file system has that UUID, label or file.
    fn search(&self, by: SearchBy, value: &str) -> Option<String>;
}

/// GRUB's `search` modes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SearchBy {
    /// `--fs-uuid`
    Uuid,
    /// `--label`
    Label,
    /// `--file`
    File,
}

/// A file as a script names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrubFile {
    /// Like `hd0,gpt1`.
    pub device: String,
    /// Absolute path on it.
    pub path: String,
}

/// What the default entry boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrubBoot {
    /// Kernel.
    pub kernel: GrubFile,
    /// Kernel arguments.
    pub cmdline: String,
    /// In this order.
    pub initrds: Vec<GrubFile>,
}

#[derive(Clone)]
struct MenuEntry {
    submenu: bool,
    title: String,
    id: Option<String>,
    body: Rc<Vec<Statement>>,
}

struct Machine<'a> {
    host: &'a dyn GrubHost,
    variables: HashMap<String, String>,
    functions: HashMap<String, Rc<Vec<Statement>>>,
    entries: Vec<MenuEntry>,
    kernel: Option<(GrubFile, String)>,
    initrds: Vec<GrubFile>,
    uses_blscfg: bool,
    steps: usize,
    calls: usize,
}

/// What running a configuration came to.
#[derive(Debug, PartialEq, Eq)]
pub enum GrubOutcome {
    /// The default entry (or, with none, the file itself) boots this.
    Boot(GrubBoot),
    /// Its entries are Boot Loader Specification files (`blscfg`).
    Bls {
        /// The `default` or `saved_entry` variable.
        default: String,
        /// The variables, for `$kernelopts` and the like.
        variables: HashMap<String, String>,
    },
}

/// Runs `text`, the grub.cfg in folder `prefix` of `device`.
pub fn run(host: &dyn GrubHost, device: &str, prefix: &str, text: &str) -> Result<GrubOutcome, String> {
    let mut machine = Machine {
        host,
        variables: HashMap::new(),
        functions: HashMap::new(),
        entries: Vec::new(),
        kernel: None,
        initrds: Vec::new(),
        uses_blscfg: false,
        steps: 0,
        calls: 0,
    };
    let (folder, cpu) = (format!("({device}){prefix}"), "x86_64");
    for (name, value) in [
        ("root", device),
        ("prefix", &folder),
        ("config_directory", &folder),
        ("grub_platform", "efi"),
        ("grub_cpu", cpu),
        ("menuentry_id_option", "--id"),
        ("feature_menuentry_id", "y"),
        ("feature_default_font_path", "y"),
        ("feature_platform_search_hint", "y"),
        ("feature_all_video_module", "y"),
        ("feature_timeout_style", "y"),
    ] {
        machine.variables.insert(name.to_owned(), value.to_owned());
    }
    machine.run(&parse(text)?)?;
    machine.boot_default()
}

impl Machine<'_> {
    fn boot_default(mut self) -> Result<GrubOutcome, String> {
        let mut choice = self.variable("default");
        if choice == "saved" {
            choice = self.variable("saved_entry");
        }
        if self.uses_blscfg && self.pick(&choice).is_none_or(|entry| choice.is_empty() || entry.title != choice) {
            return Ok(GrubOutcome::Bls { default: choice, variables: self.variables });
        }
        if self.kernel.is_none() {
            let mut rest = choice.as_str();
            for _ in 0..=MAX_CALLS {
                let (head, tail) = rest.split_once('>').unwrap_or((rest, ""));
                let entry = self.pick(head).or_else(|| self.entries.first().cloned());
                let Some(entry) = entry else { return Err("it has no menu entries".into()) };
                self.entries.clear();
                self.variables.insert("chosen".into(), entry.title.clone());
                self.run(&entry.body)?;
                if !entry.submenu {
                    break;
                }
                rest = if tail.is_empty() { "0" } else { tail };
            }
        }
        match self.kernel {
            Some((kernel, cmdline)) => {
                Ok(GrubOutcome::Boot(GrubBoot { kernel, cmdline, initrds: std::mem::take(&mut self.initrds) }))
            }
            None => Err("its default entry loads no Linux kernel".into()),
        }
    }

    fn pick(&self, choice: &str) -> Option<MenuEntry> {
        let by_number = choice.parse::<usize>().ok().and_then(|index| self.entries.get(index));
        by_number
            .or_else(|| self.entries.iter().find(|e| e.id.as_deref() == Some(choice) || e.title == choice))
            .or_else(|| self.entries.first().filter(|_| choice.is_empty()))
            .cloned()
    }

    fn variable(&self, name: &str) -> String {
        self.variables.get(name).cloned().unwrap_or_default()
    }

    fn set(&mut self, name: &str, mut value: String) {
        if value.len() > MAX_VALUE {
            value = value.chars().take(MAX_VALUE / 4).collect();
        }
        if self.variables.len() < MAX_VARIABLES || self.variables.contains_key(name) {
            self.variables.insert(name.to_owned(), value);
        }
    }

    fn expand(&self, words: &[Word]) -> Vec<String> {
        let mut expanded: Vec<String> = Vec::new();
        let mut bytes = 0;
        for word in words {
            if bytes > MAX_COMMAND {
                break;
            }
            let before = expanded.len();
            let mut current = String::new();
            let mut present = word.quoted;
            for part in &word.parts {
                match part {
                    Part::Text(text) => {
                        current.push_str(text);
                        present = true;
                    }
                    Part::Variable { name, quoted: true } => current.push_str(&self.variable(name)),
                    Part::Variable { name, quoted: false } => {
                        let value = self.variable(name);
                        let mut pieces = value.split_whitespace();
                        if let Some(first) = pieces.next() {
                            current.push_str(first);
                            present = true;
                        }
                        for piece in pieces {
                            expanded.push(std::mem::replace(&mut current, piece.to_owned()));
                        }
                    }
                }
                current.truncate(current.floor_char_boundary(MAX_VALUE));
            }
            if present || !current.is_empty() {
                expanded.push(current);
            }
            bytes += expanded.iter().skip(before).map(|word| word.len() + 1).sum::<usize>();
        }
        expanded
    }

    /// Carries out statements; the last one's success.
    fn run(&mut self, statements: &[Statement]) -> Result<bool, String> {
        let mut status = true;
        for statement in statements {
            self.steps += 1;
            if self.steps > MAX_STEPS {
                return Err(format!("it runs more than {MAX_STEPS} commands"));
            }
            status = self.statement(statement)?;
        }
        Ok(status)
    }

    fn statement(&mut self, statement: &Statement) -> Result<bool, String> {
        match statement {
            Statement::Command(words) => {
                let words = self.expand(words);
                match words.split_first() {
                    Some((name, arguments)) => self.command(name, arguments),
                    None => Ok(true),
                }
            }
            Statement::If(branches, otherwise) => {
                for (condition, body) in branches {
                    if self.run(condition)? {
                        return self.run(body);
                    }
                }
                self.run(otherwise)
            }
            Statement::For(name, values, body) => {
                let name = self.expand(std::slice::from_ref(name)).concat();
                for value in self.expand(values) {
                    self.set(&name, value);
                    self.run(body)?;
                }
                Ok(true)
            }
            Statement::While { until, condition, body } => {
                while self.run(condition)? != *until {
                    self.steps += 1;
                    if self.steps > MAX_STEPS {
                        return Err(format!("it runs more than {MAX_STEPS} commands"));
                    }
                    self.run(body)?;
                }
                Ok(true)
            }
            Statement::Function(name, body) => {
                let name = self.expand(std::slice::from_ref(name)).concat();
                self.functions.insert(name, body.clone());
                Ok(true)
            }
            Statement::Menu { submenu, words, body } => {
                let words = self.expand(words);
                let id = words.iter().position(|w| w == "--id").and_then(|at| words.get(at + 1)).cloned();
                let id = id.or_else(|| words.iter().find_map(|w| w.strip_prefix("--id=").map(str::to_owned)));
                let title = words.first().cloned().unwrap_or_default();
                if self.entries.len() < MAX_ENTRIES {
                    self.entries.push(MenuEntry { submenu: *submenu, title, id, body: body.clone() });
                }
                Ok(true)
            }
        }
    }

    fn command(&mut self, name: &str, arguments: &[String]) -> Result<bool, String> {
        match (name, arguments) {
            ("set", [assignment, ..]) => Ok(self.assign(assignment)),
            ("unset", [name, ..]) => Ok(self.variables.remove(name).is_some()),
            ("[", _) => {
                let inner = arguments.strip_suffix(&["]".to_owned()]).unwrap_or(arguments);
                Ok(self.test(inner))
            }
            ("test", _) => Ok(self.test(arguments)),
            ("false", _) => Ok(false),
            ("!", [name, rest @ ..]) => Ok(!self.command(name, rest)?),
            ("search" | "search.fs_uuid" | "search.fs_label" | "search.file", _) => Ok(self.search(name, arguments)),
            ("load_env", _) => Ok(self.load_env(arguments)),
            ("source" | "." | "configfile", [path, ..]) => self.source(path),
            ("blscfg", _) => {
                self.uses_blscfg = true;
                Ok(true)
            }
            ("linux" | "linuxefi" | "linux16", [path, rest @ ..]) => {
                self.kernel = Some((self.file(path), rest.join(" ")));
                self.initrds.clear();
                Ok(true)
            }
            ("initrd" | "initrdefi" | "initrd16", paths) => {
                self.initrds = paths.iter().filter(|p| !p.starts_with("--")).map(|path| self.file(path)).collect();
                Ok(true)
            }
            _ if self.functions.contains_key(name) => self.call(name, arguments),
            _ if arguments.is_empty() && name.contains('=') => Ok(self.assign(name)),
            _ => Ok(true),
        }
    }

    fn assign(&mut self, assignment: &str) -> bool {
        match assignment.split_once('=') {
            Some((name, value)) => {
                self.set(name, value.to_owned());
                true
            }
            None => false,
        }
    }

    fn call(&mut self, name: &str, arguments: &[String]) -> Result<bool, String> {
        let Some(body) = self.functions.get(name).cloned() else { return Ok(false) };
        self.deeper()?;
        for (index, argument) in (1..10).zip(arguments) {
            self.set(&index.to_string(), argument.clone());
        }
        let status = self.run(&body);
        self.calls -= 1;
        status
    }

    fn deeper(&mut self) -> Result<(), String> {
        self.calls += 1;
        if self.calls > MAX_CALLS {
            return Err(format!("functions or files nested deeper than {MAX_CALLS}"));
        }
        Ok(())
    }

    fn source(&mut self, path: &str) -> Result<bool, String> {
        let file = self.file(path);
        let Some(text) = self.host.read(&file.device, &file.path) else { return Ok(false) };
        self.deeper()?;
        let status = parse(&text).and_then(|statements| self.run(&statements));
        self.calls -= 1;
        status
    }

    /// `(device)/path`, or `/path` on `$root`.
    fn file(&self, path: &str) -> GrubFile {
        let named = path.strip_prefix('(').and_then(|rest| rest.split_once(')'));
        let (device, path) = named.map(|(d, p)| (d.to_owned(), p)).unwrap_or_else(|| (self.variable("root"), path));
        let device = device.trim_matches(['(', ')']).to_owned();
        GrubFile { device, path: format!("/{}", path.trim_start_matches('/')) }
    }

    fn search(&mut self, command: &str, arguments: &[String]) -> bool {
        let mut by = match command {
            "search.fs_label" => SearchBy::Label,
            "search.file" => SearchBy::File,
            _ => SearchBy::Uuid,
        };
        let (mut variable, mut value) = ("root".to_owned(), None);
        let mut words = arguments.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--fs-uuid" | "-u" => by = SearchBy::Uuid,
                "--label" | "--fs-label" | "-l" => by = SearchBy::Label,
                "--file" | "-f" => by = SearchBy::File,
                "--set" | "-s" => variable = words.next().cloned().unwrap_or_default(),
                "--hint" => {
                    words.next();
                }
                option => match option.strip_prefix("--set=") {
                    Some(name) => variable = name.to_owned(),
                    None if option.starts_with('-') => {}
                    None if value.is_some() => variable = option.to_owned(),
                    None => value = Some(option.to_owned()),
                },
            }
        }
        let found = value.and_then(|value| self.host.search(by, &value));
        let ok = found.is_some();
        if let Some(device) = found {
            self.set(&variable, device);
        }
        ok
    }

    /// grubenv: lines `name=value` after a comment line, filled up with '#'.
    fn load_env(&mut self, arguments: &[String]) -> bool {
        let mut words = arguments.iter();
        let mut path = format!("{}/grubenv", self.variable("prefix"));
        let mut only = Vec::new();
        while let Some(word) = words.next() {
            match word.as_str() {
                "-f" | "--file" => path = words.next().cloned().unwrap_or_default(),
                option if option.starts_with('-') => {}
                name => only.push(name),
            }
        }
        let file = self.file(&path);
        let Some(text) = self.host.read(&file.device, &file.path) else { return false };
        for (name, value) in text.lines().filter(|line| !line.starts_with('#')).filter_map(|l| l.split_once('=')) {
            if only.is_empty() || only.contains(&name) {
                self.set(name, value.to_owned());
            }
        }
        true
    }

    fn test(&self, words: &[String]) -> bool {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        words.split(|word| *word == "-o").any(|any| any.split(|word| *word == "-a").all(|all| self.test_one(all)))
    }

    fn test_one(&self, words: &[&str]) -> bool {
        let file = |path: &str| self.file(path);
        match words {
            ["!", rest @ ..] => !rest.is_empty() && !self.test_one(rest),
            ["-z", text] => text.is_empty(),
            ["-n", text] => !text.is_empty(),
            ["-e", path] => {
                let file = file(path);
                self.host.is_file(&file.device, &file.path) || self.host.is_directory(&file.device, &file.path)
            }
            ["-f", path] => self.host.is_file(&file(path).device, &file(path).path),
            ["-d", path] => self.host.is_directory(&file(path).device, &file(path).path),
            ["-s", path] => self.host.size(&file(path).device, &file(path).path).is_some_and(|size| size > 0),
            [text] => !text.is_empty(),
            [left, operator, right] => {
                let numbers = left.parse::<i64>().ok().zip(right.parse::<i64>().ok());
                let compare = |holds: fn(&i64, &i64) -> bool| numbers.as_ref().is_some_and(|(l, r)| holds(l, r));
                match *operator {
                    "=" | "==" => left == right,
                    "!=" => left != right,
                    "-eq" => compare(i64::eq),
                    "-ne" => compare(i64::ne),
                    "-lt" => compare(i64::lt),
                    "-le" => compare(i64::le),
                    "-gt" => compare(i64::gt),
                    "-ge" => compare(i64::ge),
                    _ => false,
                }
            }
            _ => false,
        }
    }
}
