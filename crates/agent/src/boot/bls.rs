//! Boot Loader Specification type 1 entries (UAPI group, "Boot Loader Specification"), as systemd-boot and GRUB's `blscfg` read
//! them.

use std::cmp::Ordering;
use std::collections::HashMap;

/// One `loader/entries/*.conf`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// File name without `.conf`.
    pub id: String,
    /// Title.
    pub title: String,
    /// Version to sort by.
    pub version: String,
    /// Kernel path.
    pub linux: String,
    /// Initrd paths in order.
    pub initrds: Vec<String>,
    /// Kernel arguments, variables not yet expanded.
    pub options: String,
    /// For another architecture than x86-64.
    pub foreign: bool,
}

/// Reads one entry; `None` when it names no kernel.
pub fn parse(id: &str, text: &str) -> Option<Entry> {
    let mut entry = Entry { id: id.to_owned(), ..Entry::default() };
    for line in text.lines() {
        let line = line.trim();
        let Some((key, value)) = line.split_once(char::is_whitespace).filter(|_| !line.starts_with('#')) else {
            continue;
        };
        let value = value.trim();
        match key {
            "title" => entry.title = value.to_owned(),
            "version" => entry.version = value.to_owned(),
            "linux" => entry.linux = value.to_owned(),
            "initrd" => entry.initrds.extend(value.split_whitespace().map(str::to_owned)),
            "options" if entry.options.is_empty() => entry.options = value.to_owned(),
            "options" => entry.options = format!("{} {value}", entry.options),
            "architecture" => entry.foreign = !value.eq_ignore_ascii_case("x64"),
            _ => {}
        }
    }
    (!entry.linux.is_empty()).then_some(entry)
}

/// Order of boot: the default first (by id, title, or `*` pattern at its end), then the highest version; rescue entries last.
pub fn sort(entries: &mut Vec<Entry>, default: &str) {
    entries.retain(|entry| !entry.foreign);
    let is_default = |entry: &Entry| {
        let default = default.strip_suffix(".conf").unwrap_or(default);
        match default.strip_suffix('*') {
            Some(start) => !default.is_empty() && entry.id.starts_with(start),
            None => !default.is_empty() && (entry.id == default || entry.title == default),
        }
    };
    let is_rescue = |entry: &Entry| entry.id.contains("rescue") || entry.version.contains("rescue");
    entries.sort_by(|a, b| {
        is_default(b)
            .cmp(&is_default(a))
            .then(is_rescue(a).cmp(&is_rescue(b)))
            .then_with(|| compare_versions(&b.version, &a.version))
            .then_with(|| compare_versions(&b.id, &a.id))
    });
    // GRUB's saved default may also be a position in that order.
    if let Some(index) = default.parse::<usize>().ok().filter(|index| *index < entries.len()) {
        entries.rotate_left(index);
    }
}

/// Replaces `$name` and `${name}` in options; unknown names vanish.
pub fn expand(options: &str, variables: &HashMap<String, String>) -> String {
    let mut expanded = String::new();
    let mut rest = options;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        let (name, tail) = match after.strip_prefix('{').and_then(|braced| braced.split_once('}')) {
            Some(pair) => pair,
            None => {
                let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
                after.split_at(end)
            }
        };
        expanded.push_str(variables.get(name).map_or("", String::as_str));
        rest = tail;
    }
    expanded.push_str(rest);
    expanded
}

/// Compares versions as people read them: runs of digits by value, other characters by code; `~` sorts before the end.
pub fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        let digits = |text: &str| text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (a_number, a_rest) = a.split_at(digits(a));
        let (b_number, b_rest) = b.split_at(digits(b));
        let (a_number, b_number) = (a_number.trim_start_matches('0'), b_number.trim_start_matches('0'));
        let order = a_number.len().cmp(&b_number.len()).then_with(|| a_number.cmp(b_number));
        if order != Ordering::Equal {
            return order;
        }
        let rank = |c: Option<char>| match c {
            Some('~') => (0, '~'),
            None => (1, '\0'),
            Some(c) => (2, c),
        };
        let (mut a_chars, mut b_chars) = (a_rest.chars(), b_rest.chars());
        let (a_next, b_next) = (a_chars.next(), b_chars.next());
        let order = rank(a_next).cmp(&rank(b_next));
        if order != Ordering::Equal || a_next.is_none() {
            return order;
        }
        (a, b) = (a_chars.as_str(), b_chars.as_str());
    }
}
