//! Volumes as their guests see them.

use crate::cloud::{Cloud, wait_until};
use crate::console::{Console, PATIENCE};

/// A shell on an instance's console.
pub fn shell(cloud: &Cloud, instance: &str) -> Console {
    let mut console = cloud.console(instance);
    console.wait_for_shell();
    console
}

/// A new volume with a name; its id.
pub fn volume(cloud: &Cloud, name: &str, more: &[&str]) -> String {
    cloud.hearth(&[&["volume", "create", "--name", name, "--wait", "-o", "id"], more].concat()).trim().to_owned()
}

/// The guest's device of a volume, if it has one.
pub fn find_disk(console: &mut Console, volume: &str) -> Option<String> {
    let serial = volume.replace('-', "");
    let look =
        format!("for d in /sys/block/vd*; do [ \"$(cat $d/serial)\" = {serial} ] && echo /dev/${{d##*/}}; done; true");
    Some(console.run(&look)).filter(|device| !device.is_empty())
}

/// Waits until the guest has a volume; its device.
pub fn disk(console: &mut Console, volume: &str) -> String {
    let mut found = None;
    wait_until(PATIENCE, || {
        found = find_disk(console, volume);
        found.is_some()
    });
    found.unwrap_or_else(|| panic!("the guest does not see {volume}"))
}

/// What one writer has written to its blocks, in the order of its rounds: the guest's `writer` makes the same choices.
pub struct Writer {
    /// By which it is known.
    pub name: String,
    /// First block of 4 KiB on the disk, and how many.
    pub blocks: (u64, u64),
    /// Where its choices begin.
    pub seed: u64,
}

/// Program of a writer, for a guest's shell: it overwrites a few blocks at a random place with lines of 64 bytes that tell round,
/// place and length, makes that durable and only then says so.
pub const WRITER: &str = r#"#!/bin/sh
device=$1 name=$2 first=$3 blocks=$4 x=$5 round=0
write() {
    yes "$(printf '%020d %020d %021d' $round $1 $2)" | head -c $(($2 * 4096)) |
        dd of=$device bs=4096 seek=$((first + $1)) iflag=fullblock conv=fsync,notrunc 2>/dev/null || exit 1
    echo "FLUSHED $name $round"
}
write 0 $blocks
while :; do
    round=$((round + 1))
    x=$(((x * 1103515245 + 12345) & 0x7fffffff)) count=$(((x >> 8) % 16 + 1))
    x=$(((x * 1103515245 + 12345) & 0x7fffffff)) at=$(((x >> 8) % (blocks - count + 1)))
    write $at $count
done
"#;

impl Writer {
    /// Place and length of a round's write, in blocks; round 0 is everything.
    fn rounds(&self, last: u64) -> Vec<(u64, u64)> {
        let mut x = self.seed;
        let mut next = || {
            x = (x * 1_103_515_245 + 12345) & 0x7fff_ffff;
            x >> 8
        };
        let mut rounds = vec![(0, self.blocks.1)];
        for _ in 0..last {
            let count = next() % 16 + 1;
            rounds.push((next() % (self.blocks.1 - count + 1), count));
        }
        rounds
    }

    /// The command line that starts it on `device`, in the background.
    pub fn command(&self, device: &str, program: &str) -> String {
        let (first, count) = self.blocks;
        format!("sh {program} {device} {} {first} {count} {} &", self.name, self.seed)
    }

    /// The last round that the guest has called flushed in what its console said.
    pub fn flushed(&self, output: &str) -> Option<u64> {
        let begin = format!("FLUSHED {} ", self.name);
        output.lines().filter_map(|line| line.trim().strip_prefix(&begin)?.parse().ok()).max()
    }

    /// Fails unless the disk has every block as the last flushed round left it, or as a later round that had begun.
    pub fn check(&self, console: &mut Console, device: &str, flushed: u64) {
        // What the guest says stays in its console's buffer for a while: it may be further than that.
        let rounds = self.rounds(flushed + 100);
        let mut oldest = vec![0; self.blocks.1 as usize];
        for (round, (at, count)) in rounds.iter().enumerate().take(flushed as usize + 1) {
            oldest[*at as usize..(at + count) as usize].fill(round as u64);
        }
        let (first, count) = self.blocks;
        console.run("echo 3 >/proc/sys/vm/drop_caches");
        let found = console.run(&format!("dd if={device} bs=4096 skip={first} count={count} 2>/dev/null | uniq -c"));
        let mut line_number = 0;
        for line in found.lines() {
            let numbers: Vec<u64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
            let [repeated, round, at, length] = numbers[..] else { panic!("{} on {device}: {line:?}", self.name) };
            assert_eq!(rounds.get(round as usize), Some(&(at, length)), "{} never wrote {line:?}", self.name);
            for number in line_number..line_number + repeated {
                let block = number / 64;
                assert!((at..at + length).contains(&block), "{} on {device}: block {block} has {line:?}", self.name);
                let oldest = oldest[block as usize];
                assert!(
                    round >= oldest,
                    "{} on {device}: block {block} has round {round}, but {oldest} was flushed (of {flushed})",
                    self.name
                );
            }
            line_number += repeated;
        }
        assert_eq!(line_number, count * 64, "{} on {device}: {found}", self.name);
    }
}
