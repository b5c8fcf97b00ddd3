//! Volumes that are attached and detached in any order, on two hosts whose agents die, by a control plane that dies.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

use std::process::{Child, Stdio};

use hearth_tests::choices::Choices;
use hearth_tests::cloud::{Cloud, Shape, wait_until};
use hearth_tests::console::{Console, PATIENCE};
use hearth_tests::disks::{disk, find_disk, shell, volume};
use serde_json::Value;

const GUESTS: [&str; 2] = ["a", "b"];
const ROUNDS: u64 = 6;

struct Volume {
    name: String,
    id: String,
    /// Number in `GUESTS` of the one that has it.
    with: Option<usize>,
    /// How often it was written.
    writes: u64,
}

impl Volume {
    fn about(&self, cloud: &Cloud) -> Value {
        cloud.json(&["volume", "describe", &self.id])
    }

    /// Whose it is when nothing is under way with it, `None` while something is.
    fn settled(&self, cloud: &Cloud) -> Option<Option<usize>> {
        let about = self.about(cloud);
        let attachments = about["attachments"].as_array().unwrap_or_else(|| panic!("{about:#}"));
        assert!(attachments.len() <= 1, "attached twice: {about:#}");
        match (about["state"].as_str()?, attachments.first()) {
            ("available", None) => Some(None),
            ("in-use", Some(attachment)) if attachment["state"] == "attached" => {
                let instance = cloud.instance(attachment["instance_id"].as_str()?);
                Some(GUESTS.iter().position(|name| instance["name"] == *name))
            }
            _ => None,
        }
    }

    fn content(&self) -> String {
        format!("yes '{} {}' | head -c 1048576", self.name, self.writes)
    }
}

/// A call that is under way.
struct Call {
    volume: usize,
    wanted: Option<usize>,
    forced: bool,
    children: Vec<Child>,
}

struct Storm {
    cloud: Cloud,
    volumes: Vec<Volume>,
    consoles: Vec<Option<Console>>,
    choices: Choices,
}

impl Storm {
    fn console(&mut self, guest: usize) -> &mut Console {
        let cloud = &self.cloud;
        self.consoles[guest].get_or_insert_with(|| shell(cloud, GUESTS[guest]))
    }

    /// Begins to attach or detach a volume, perhaps twice at once.
    fn begin(&mut self, number: usize) -> Call {
        let forced = self.choices.below(4) == 0;
        let twice = self.choices.below(3) == 0;
        let volume = &self.volumes[number];
        let (wanted, arguments) = match volume.with {
            Some(_) if forced => (None, vec!["volume", "detach", &volume.id, "--yes", "--force"]),
            Some(_) => (None, vec!["volume", "detach", &volume.id, "--yes"]),
            None => {
                let guest = self.choices.below(2) as usize;
                (Some(guest), vec!["volume", "attach", &volume.id, GUESTS[guest]])
            }
        };
        println!("{} {}", volume.name, arguments.join(" "));
        let start = || {
            let mut command = self.cloud.command(&arguments);
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        };
        let children = (0..1 + usize::from(twice)).map(|_| start()).collect();
        Call { volume: number, wanted, forced, children }
    }

    /// Kills something, or nothing.
    fn disturb(&mut self) {
        let victim = self.choices.below(5);
        println!("disturbance {victim}");
        self.choices.pause(1500);
        match victim {
            0 => {
                self.cloud.kill_control();
                self.cloud.start_control();
            }
            1 | 2 => {
                self.cloud.kill_agent(victim as usize - 1);
                self.choices.pause(3000);
                self.cloud.start_agent(victim as usize - 1);
            }
            3 => {
                self.cloud.kill_agent(0);
                self.cloud.kill_agent(1);
                self.cloud.kill_control();
                self.cloud.start_control();
                self.cloud.start_agent(1);
                self.cloud.start_agent(0);
            }
            _ => return,
        }
        self.cloud.wait_for_hosts(2);
        self.consoles = vec![None, None];
    }

    /// Waits for the end of a call; an acknowledged one must have been carried out.
    fn end(&mut self, call: Call) {
        let ends: Vec<bool> = call.children.into_iter().map(|mut child| child.wait().unwrap().success()).collect();
        let acknowledged = ends.contains(&true);
        let (cloud, volume) = (&self.cloud, &mut self.volumes[call.volume]);
        let mut found = None;
        wait_until(PATIENCE, || {
            found = volume.settled(cloud);
            found.is_some()
        });
        let with = found.unwrap_or_else(|| panic!("{} is not done: {:#}", volume.name, volume.about(cloud)));
        assert!(with == call.wanted || (!acknowledged && with == volume.with), "{:#}", volume.about(cloud));
        volume.with = with;
        self.look(call.volume, call.forced);
    }

    /// The guest that has a volume finds in it what was flushed last, and writes something else; the others do not see it.
    fn look(&mut self, number: usize, forced: bool) {
        let id = self.volumes[number].id.clone();
        for (guest, name) in GUESTS.iter().enumerate() {
            if self.volumes[number].with == Some(guest) {
                let console = self.console(guest);
                let device = disk(console, &id);
                self.write(number, guest, &device);
            } else if !forced {
                let console = self.console(guest);
                assert!(wait_until(PATIENCE, || find_disk(console, &id).is_none()), "{name} still has {id}");
            }
        }
    }

    fn write(&mut self, number: usize, guest: usize, device: &str) {
        let before = self.volumes[number].content();
        self.volumes[number].writes += 1;
        let after = self.volumes[number].content();
        let (name, writes) = (self.volumes[number].name.clone(), self.volumes[number].writes);
        let console = self.console(guest);
        console.run("echo 3 >/proc/sys/vm/drop_caches");
        if writes > 1 {
            let found = console.run(&format!("dd if={device} bs=1M skip={} count=1 2>/dev/null | md5sum", writes - 1));
            assert_eq!(found, console.run(&format!("{before} | md5sum")), "{name} in {}", GUESTS[guest]);
        }
        console.run(&format!(
            "{after} | dd of={device} bs=1M seek={writes} iflag=fullblock conv=fsync,notrunc 2>/dev/null"
        ));
    }
}

#[test]
fn volumes_come_and_go_while_daemons_die() {
    let choices = Choices::new();
    let cloud = Cloud::start(Shape::Hosts(2));
    cloud.import_tiny();
    cloud.hearth(&["instance", "run", "tiny", "--type", "h1.tiny", "--name", "a", "--wait"]);
    let host = cloud.instance("a")["host_id"].as_str().unwrap().to_owned();
    cloud.hearth(&["host", "drain", &host]);
    cloud.hearth(&["instance", "run", "tiny", "--type", "h1.tiny", "--name", "b", "--wait"]);
    assert_ne!(cloud.instance("b")["host_id"], *host);
    let pids = cloud.vmm_pids();
    let make = |number: usize| {
        let name = format!("v{number}");
        Volume { id: volume(&cloud, &name, &["--size", "1G"]), name, with: None, writes: 0 }
    };
    let volumes: Vec<Volume> = (0..3).map(make).collect();
    let mut storm = Storm { cloud, volumes, consoles: vec![None, None], choices };
    for round in 0..ROUNDS {
        println!("round {round}");
        // One volume after the other, or two at a time.
        let first = storm.choices.below(3) as usize;
        let mut calls = vec![storm.begin(first)];
        if storm.choices.below(2) == 0 {
            calls.push(storm.begin((first + 1) % 3));
        }
        storm.disturb();
        for call in calls {
            storm.end(call);
        }
        assert_eq!(storm.cloud.vmm_pids(), pids, "no guest has ended");
    }
    // Everything that was ever written is there, at the one guest that has them all in the end.
    for number in 0..storm.volumes.len() {
        if let Some(guest) = storm.volumes[number].with.filter(|guest| *guest != 0) {
            println!("v{number} leaves {}", GUESTS[guest]);
            storm.cloud.hearth(&["volume", "detach", &storm.volumes[number].id, "--yes", "--wait"]);
            storm.volumes[number].with = None;
        }
        if storm.volumes[number].with.is_none() {
            storm.cloud.hearth(&["volume", "attach", &storm.volumes[number].id, "a", "--wait"]);
            storm.volumes[number].with = Some(0);
        }
        let (id, name, writes) =
            (storm.volumes[number].id.clone(), storm.volumes[number].name.clone(), storm.volumes[number].writes);
        let console = storm.console(0);
        let device = disk(console, &id);
        for write in 1..=writes {
            let found = console.run(&format!("dd if={device} bs=1M skip={write} count=1 2>/dev/null | md5sum"));
            let wanted = console.run(&format!("yes '{name} {write}' | head -c 1048576 | md5sum"));
            assert_eq!(found, wanted, "{name}, write {write}");
        }
    }
    let Storm { cloud, volumes, consoles, .. } = storm;
    drop(consoles);
    cloud.hearth(&["storage", "verify"]);
    cloud.hearth(&["instance", "terminate", "a", "b", "--yes", "--wait"]);
    for volume in &volumes {
        assert!(wait_until(PATIENCE, || volume.settled(&cloud) == Some(None)), "{:#}", volume.about(&cloud));
        cloud.hearth(&["volume", "delete", &volume.id, "--yes", "--wait"]);
    }
    cloud.assert_nothing_left();
}
