//! The lines by which the tiny image tells what it sees: `HEARTH-GUEST <kind> [<name>] <key>=<value>…`.

use std::collections::BTreeMap;

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// `disk`, `nic`, `machine`, `smbios`, `net`, `ready`, …
    pub kind: String,
    /// `vda`, `eth0`, or empty.
    pub name: String,
    /// The rest.
    pub values: BTreeMap<String, String>,
}

impl Line {
    /// A value that must be there.
    pub fn get(&self, key: &str) -> &str {
        self.values.get(key).unwrap_or_else(|| panic!("no {key}= in {self:?}"))
    }
}

/// All report lines in a console's output.
pub fn lines(output: &str) -> Vec<Line> {
    let reports = output.lines().filter_map(|line| line.split_once("HEARTH-GUEST ").map(|(_, rest)| rest));
    reports
        .filter_map(|rest| {
            let mut words = rest.split_whitespace();
            let kind = words.next()?.to_owned();
            let mut line = Line { kind, name: String::new(), values: BTreeMap::new() };
            for word in words {
                match word.split_once('=') {
                    Some((key, value)) => drop(line.values.insert(key.to_owned(), value.to_owned())),
                    None => line.name = word.to_owned(),
                }
            }
            Some(line)
        })
        .collect()
}

/// The lines of one kind.
pub fn of_kind(output: &str, kind: &str) -> Vec<Line> {
    lines(output).into_iter().filter(|line| line.kind == kind).collect()
}

#[test]
fn report_lines_are_read_wherever_they_stand() {
    let output = "noise\r\ntiny# HEARTH-GUEST disk vda bytes=512 serial=vol1\r\nHEARTH-GUEST ready uptime=1.5\r\n";
    let disks = of_kind(output, "disk");
    assert_eq!((disks[0].name.as_str(), disks[0].get("serial")), ("vda", "vol1"));
    assert_eq!(of_kind(output, "ready")[0].get("uptime"), "1.5");
}
