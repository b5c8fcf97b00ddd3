//! Users who do anything at any time, hosts that come and go and refuse, a control plane that restarts. When the storm is over,
//! everything is as wanted and the books agree with the hosts.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use hearth_proto::v1;
use v1::InstanceState as S;

use crate::agent::{FakeAgent, Session};
use crate::cloud::{Cloud, PATIENCE, User, config, reason, request};

/// xorshift64*: the same storm for the same seed, as far as the operating system lets it.
struct Dice(u64);

impl Dice {
    fn throw(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % sides
    }
}

/// Answers that are no surprise in a storm.
fn expected(status: &tonic::Status) -> bool {
    let reasons = [
        "IncorrectInstanceState",
        "InsufficientInstanceCapacity",
        "InvalidInstanceID.NotFound",
        "Unavailable",
        "InsufficientFreeAddressesInSubnet",
    ];
    reasons.contains(&reason(status).as_str())
}

async fn one_user(mut user: User, image: v1::Image, seed: u64, steps: usize) -> (BTreeSet<String>, BTreeSet<String>) {
    let mut dice = Dice(seed);
    let (mut launched, mut terminated) = (BTreeSet::<String>::new(), BTreeSet::new());
    for step in 0..steps {
        let some: String = launched.iter().nth(dice.throw(launched.len().max(1))).cloned().unwrap_or_default();
        let ids = vec![some.clone()];
        let result = match dice.throw(10) {
            0..4 => {
                let request = v1::RunInstancesRequest {
                    client_token: format!("{seed}-{step}"),
                    min_count: 1,
                    max_count: 1 + dice.throw(4) as u32,
                    placement: Some(v1::Placement {
                        strategy: (dice.throw(2) as i32) + 1,
                        spread_group: ["", "", "g1", "g2"][dice.throw(4)].into(),
                        ..Default::default()
                    }),
                    ..request(&image, ["t3.nano", "m5.large"][dice.throw(2)])
                };
                user.run(request).await.map(|answer| {
                    launched.extend(answer.instances.into_iter().map(|i| i.instance_id));
                })
            }
            _ if some.is_empty() => Ok(()),
            4 => user.stop(&some).await.map(|_| ()),
            5 => user.start(&some).await.map(|_| ()),
            6 => {
                let request = v1::RebootInstancesRequest { instance_ids: ids };
                user.instances.reboot_instances(request).await.map(|_| ())
            }
            7 => {
                let tags = vec![v1::Tag { key: "step".into(), value: step.to_string() }];
                user.tags.create_tags(v1::CreateTagsRequest { resource_ids: ids, tags }).await.map(|_| ())
            }
            _ => user.terminate(&some).await.map(|_| {
                terminated.insert(some.clone());
            }),
        };
        if let Err(status) = result {
            assert!(expected(&status), "{status:?}");
        }
    }
    (launched, terminated)
}

/// Cuts connections, has hosts refuse for a while and guests power off, until told to stop.
async fn weather(
    cloud: &Cloud,
    agents: &[FakeAgent],
    sessions: &mut [Option<Session>],
    dice: &mut Dice,
    rounds: usize,
) {
    for _ in 0..rounds {
        let which = dice.throw(agents.len());
        match dice.throw(5) {
            0 => sessions[which] = None,
            1 => {
                let full = Some("Server.InsufficientInstanceCapacity".to_owned());
                agents[which].memory.lock().manners.refuse = full;
            }
            2 => agents[which].memory.lock().manners.refuse = None,
            3 => {
                let running = agents[which].running();
                if let (Some(session), Some(id)) = (&sessions[which], running.first())
                    && agents[which].memory.lock().has.contains_key(id)
                {
                    agents[which]
                        .observe(session, id, |report| {
                            report.set_state(v1::ObservedState::Stopped);
                            report.guest_powered_off = true;
                        })
                        .await;
                }
            }
            _ => {
                // Also a second session of a host that has one.
                sessions[which] = agents[which].connect(cloud).await.ok();
            }
        }
        tokio::time::sleep(Duration::from_millis(5 + dice.throw(30) as u64)).await;
    }
}

async fn storm(seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = config(dir.path());
    settings.host_timeout = Duration::from_millis(300);
    let mut cloud = Cloud::start_with(settings.clone()).await;
    let mut agents = Vec::new();
    let mut sessions = Vec::new();
    for name in ["host-a", "host-b", "host-c"] {
        let (agent, session) = FakeAgent::connected(&cloud, name).await;
        agents.push(agent);
        sessions.push(Some(session));
    }
    let image = cloud.user().await.import("debian").await;
    let mut dice = Dice(seed);
    let (mut launched, mut terminated) = (BTreeSet::new(), BTreeSet::new());
    for round in 0..3 {
        let mut users = Vec::new();
        for n in 0..4 {
            let seed = seed.wrapping_mul(31).wrapping_add(round * 10 + n + 1);
            users.push(tokio::spawn(one_user(cloud.user().await, image.clone(), seed, 25)));
        }
        weather(&cloud, &agents, &mut sessions, &mut dice, 25).await;
        for user in users {
            let (more, fewer) = user.await.unwrap();
            launched.extend(more);
            terminated.extend(fewer);
        }
        sessions.iter_mut().for_each(|session| *session = None);
        cloud.stop().await.unwrap();
        cloud = Cloud::start_with(settings.clone()).await;
    }
    for (agent, session) in agents.iter().zip(&mut sessions) {
        agent.memory.lock().manners.refuse = None;
        *session = Some(agent.connect(&cloud).await.unwrap());
    }
    settle(&cloud, &agents, &launched, &terminated).await;
}

async fn settle(cloud: &Cloud, agents: &[FakeAgent], launched: &BTreeSet<String>, terminated: &BTreeSet<String>) {
    let mut user = cloud.user().await;
    let settled = tokio::time::timeout(PATIENCE, async {
        loop {
            let all = user.list().await;
            let quiet = |i: &v1::Instance| matches!(i.state(), S::Running | S::Stopped | S::Terminated);
            if all.iter().all(quiet) && mismatch(&mut user, &all, agents).await.is_none() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let calm = settled.await;
    let all = user.list().await;
    let wrong = mismatch(&mut user, &all, agents).await;
    let restless: Vec<_> =
        all.iter().filter(|i| !matches!(i.state(), S::Running | S::Stopped | S::Terminated)).collect();
    assert!(calm.is_ok(), "never calm: {wrong:?} {restless:#?}");
    let known: BTreeMap<&str, S> = all.iter().map(|i| (i.instance_id.as_str(), i.state())).collect();
    for id in launched {
        assert!(known.contains_key(id.as_str()), "an acknowledged launch is lost: {id}");
    }
    for id in terminated {
        assert_eq!(known[id.as_str()], S::Terminated, "an acknowledged terminate is lost: {id}");
    }
    let live: Vec<_> = all.iter().filter(|i| i.state() != S::Terminated).collect();
    let macs: BTreeSet<_> = live.iter().flat_map(|i| &i.network_interfaces).map(|n| &n.mac_address).collect();
    let addresses: BTreeSet<_> = live
        .iter()
        .flat_map(|i| i.network_interfaces.iter().map(move |n| (&i.host_id, &n.private_ip_address)))
        .collect();
    assert_eq!((macs.len(), addresses.len()), (live.len(), live.len()), "an address is used twice");
}

/// What the hosts and the books have that they should not, or lack.
async fn mismatch(user: &mut User, all: &[v1::Instance], agents: &[FakeAgent]) -> Option<String> {
    for agent in agents {
        let here = |state: S| -> BTreeSet<String> {
            let on = all.iter().filter(|i| i.host_id == agent.host_id && i.state() == state);
            on.map(|i| i.instance_id.clone()).collect()
        };
        let (should_run, should_stand) = (here(S::Running), here(S::Stopped));
        let runs: BTreeSet<String> = agent.running().into_iter().collect();
        let has: BTreeSet<String> = agent.memory.lock().has.keys().cloned().collect();
        if runs != should_run {
            return Some(format!("{} runs {runs:?}, should run {should_run:?}", agent.host_id));
        }
        if !has.is_subset(&should_run.union(&should_stand).cloned().collect()) {
            return Some(format!("{} still has {has:?}", agent.host_id));
        }
        let vcpus: u32 = all
            .iter()
            .filter(|i| should_run.contains(&i.instance_id))
            .map(|i| if i.instance_type == "m5.large" { 2 } else { 1 })
            .sum();
        let host = user.host(&agent.host_id).await;
        if host.allocated.unwrap().vcpus != vcpus {
            return Some(format!("{}: {:?} promised, {vcpus} vCPUs run", agent.host_id, host.allocated));
        }
        let (allocated, capacity) = (host.allocated.unwrap(), host.capacity.unwrap());
        if allocated.vcpus > capacity.vcpus || allocated.memory_mib > capacity.memory_mib {
            return Some(format!("{} is promised more than it has", agent.host_id));
        }
    }
    None
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_storm_all_is_as_wanted() {
    // HEARTH_STORM_SEEDS=1,2,3 replays or widens.
    let seeds = std::env::var("HEARTH_STORM_SEEDS").unwrap_or_else(|_| "1,2,3".to_owned());
    for seed in seeds.split(',').map(|seed| seed.trim().parse::<u64>().unwrap()) {
        eprintln!("storm {seed}");
        storm(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1).await;
    }
}
