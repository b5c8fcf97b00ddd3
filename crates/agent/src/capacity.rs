//! What this host has for instances, how fast it is, and what is taken.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use hearth_types::instance_type::ECU_CALIBRATION_SCORE;
use hearth_types::{InstanceId, Resources};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::config::AgentConfig;
use crate::state::{Layout, read_if_exists, write_atomically};

/// How long each host thread is measured.
const CALIBRATION: Duration = Duration::from_millis(100);
/// Name of the loop; another loop gets another name, so that old measurements of it are not used.
const LOOP: &str = "xorshift64*";
/// Rounds between two looks at the clock.
const ROUNDS: u64 = 10_000;

/// A measured speed and the machine it belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calibration {
    /// Which loop was measured, on which CPU, how many threads.
    pub machine: String,
    /// Threads that were measured together.
    pub threads: u32,
    /// Thousandths of an ECU that one thread does while all others are busy too.
    pub ecu_milli_per_thread: u64,
}

impl Calibration {
    /// The cached measurement of this machine, or a new one. Blocks for about [`CALIBRATION`].
    pub fn get(layout: &Layout) -> io::Result<Self> {
        let threads = std::thread::available_parallelism().map_or(1, |count| count.get() as u32);
        let machine = format!("{LOOP}: {threads} × {}", cpu_model());
        let path = layout.calibration();
        let cached: Option<Self> = read_if_exists(&path)?.and_then(|text| serde_json::from_slice(&text).ok());
        if let Some(cached) = cached.filter(|cached| cached.machine == machine && cached.ecu_milli_per_thread > 0) {
            return Ok(cached);
        }
        let measured = Self { machine, threads, ecu_milli_per_thread: measure(threads) };
        write_atomically(&path, &serde_json::to_vec_pretty(&measured)?, 0o600)?;
        Ok(measured)
    }

    /// Microseconds of CPU time in each 100 ms that give `ecu_milli` on this host; `None` = no limit.
    pub fn quota_us(&self, ecu_milli: u64) -> Option<u64> {
        let quota = u128::from(ecu_milli) * 100_000 / u128::from(self.ecu_milli_per_thread.max(1));
        (ecu_milli > 0)
            .then_some(u64::try_from(quota).unwrap_or(u64::MAX).clamp(1000, u64::from(self.threads) * 100_000))
    }
}

fn cpu_model() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    model.map_or_else(|| "unknown CPU".to_owned(), |(_, name)| name.trim().to_owned())
}

/// One round is a multiplication and three shift-and-xor steps that each need the result before (xorshift64*): nine to twelve
/// cycles of latency on any x86-64 core since 2007, so that 10^8 rounds/s are what a core of 1.0-1.2 GHz did then. Newer cores are
/// faster by their clock and by shorter latencies, not by their width, which guests do not get in full either. In assembly, so
/// that no compiler setting changes what an ECU is.
fn rounds(mut state: u64, count: u64) -> u64 {
    // SAFETY: only the named registers and the flags change; no memory is touched. `count` is never 0.
    unsafe {
        std::arch::asm!(
            "2:",
            "mov {t}, {s}", "shr {t}, 12", "xor {s}, {t}",
            "mov {t}, {s}", "shl {t}, 25", "xor {s}, {t}",
            "mov {t}, {s}", "shr {t}, 27", "xor {s}, {t}",
            "imul {s}, {m}",
            "dec {n}",
            "jnz 2b",
            s = inout(reg) state,
            t = out(reg) _,
            m = in(reg) 0x2545_f491_4f6c_dd1d_u64,
            n = inout(reg) count.max(1) => _,
            options(nomem, nostack),
        );
    }
    state
}

fn measure(threads: u32) -> u64 {
    let one = || {
        let (start, mut done, mut state) = (Instant::now(), 0u64, 0x9e37_79b9_7f4a_7c15);
        while start.elapsed() < CALIBRATION {
            state = std::hint::black_box(rounds(state, ROUNDS));
            done += ROUNDS;
        }
        let nanoseconds = start.elapsed().as_nanos().max(1);
        u128::from(done) * 1_000_000_000 / nanoseconds
    };
    let mut scores: Vec<u128> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        running.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    // The median: one thread that had to wait for other work does not count.
    scores.sort_unstable();
    let score = scores.get(scores.len() / 2).copied().unwrap_or(u128::from(ECU_CALIBRATION_SCORE));
    u64::try_from(score * 1000 / u128::from(ECU_CALIBRATION_SCORE)).unwrap_or(u64::MAX).max(1)
}

/// What the host has for instances, before overcommit.
pub fn capacity(config: &AgentConfig, calibration: &Calibration) -> io::Result<Resources> {
    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    let total_kib = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"));
    let total_mib = total_kib.and_then(|kib| kib.trim().parse::<u64>().ok()).unwrap_or(0) / 1024;
    let reserved = config.reserved_memory_mib.unwrap_or_else(|| (total_mib / 8).clamp(256, 4096));
    Ok(Resources {
        vcpus: calibration.threads,
        memory_mib: total_mib.saturating_sub(reserved),
        ecu_milli: calibration.ecu_milli_per_thread.saturating_mul(u64::from(calibration.threads)),
        instance_store_bytes: disk_bytes(&config.state_dir)?.saturating_sub(reserved_disk_bytes(config)?),
    })
}

fn disk_bytes(folder: &Path) -> io::Result<u64> {
    let info = nix::sys::statvfs::statvfs(folder)?;
    Ok(info.blocks().saturating_mul(info.fragment_size()))
}

/// Bytes of the state folder's file system that are kept free as far as possible.
pub fn reserved_disk_bytes(config: &AgentConfig) -> io::Result<u64> {
    match config.reserved_disk_bytes {
        Some(bytes) => Ok(bytes),
        None => Ok(disk_bytes(&config.state_dir)? / 10),
    }
}

/// Who takes what. The scheduler has decided before; this is the last word, from the machine itself.
pub struct Admission {
    allocatable: Resources,
    held: Mutex<HashMap<InstanceId, Resources>>,
}

impl Admission {
    /// Room for `capacity`, its vCPUs counted `vcpu_overcommit_percent` times over.
    pub fn new(capacity: Resources, vcpu_overcommit_percent: u32) -> Self {
        let vcpus = u64::from(capacity.vcpus) * u64::from(vcpu_overcommit_percent) / 100;
        let allocatable = Resources { vcpus: u32::try_from(vcpus).unwrap_or(u32::MAX), ..capacity };
        Self { allocatable, held: Mutex::new(HashMap::new()) }
    }

    /// Takes resources for an instance that is about to start; one that holds some already keeps them.
    ///
    /// # Errors
    /// What is short, for people.
    pub fn take(&self, instance: &InstanceId, wanted: Resources) -> Result<(), String> {
        let mut held = self.held.lock();
        if held.get(instance) == Some(&wanted) {
            return Ok(());
        }
        let others = held.iter().filter(|(id, _)| *id != instance).map(|(_, taken)| *taken);
        let sum = others.into_iter().try_fold(wanted, |sum, taken| sum.checked_add(&taken)).unwrap_or(Resources {
            vcpus: u32::MAX,
            memory_mib: u64::MAX,
            ecu_milli: u64::MAX,
            instance_store_bytes: u64::MAX,
        });
        if !self.allocatable.fits(&sum) {
            return Err(short_of(&self.allocatable, &sum));
        }
        held.insert(instance.clone(), wanted);
        Ok(())
    }

    /// Books resources of an instance that runs already, whether they fit or not.
    pub fn book(&self, instance: &InstanceId, taken: Resources) {
        self.held.lock().insert(instance.clone(), taken);
    }

    /// Gives back what an instance holds.
    pub fn release(&self, instance: &InstanceId) {
        self.held.lock().remove(instance);
    }
}

fn short_of(have: &Resources, sum: &Resources) -> String {
    let mut short = Vec::new();
    let mut look = |name: &str, have: u64, sum: u64| {
        if sum > have {
            short.push(format!("{name} ({have} in all, {sum} would be taken)"));
        }
    };
    look("vCPUs", have.vcpus.into(), sum.vcpus.into());
    look("MiB of memory", have.memory_mib, sum.memory_mib);
    look("thousandths of ECU", have.ecu_milli, sum.ecu_milli);
    look("bytes of instance store", have.instance_store_bytes, sum.instance_store_bytes);
    format!("the host is short of {}", short.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_calibration_is_measured_once_per_machine() {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout::new(folder.path(), folder.path());
        let first = Calibration::get(&layout).unwrap();
        assert!(first.ecu_milli_per_thread > 0);
        let marked = Calibration { ecu_milli_per_thread: 4321, ..first.clone() };
        std::fs::write(layout.calibration(), serde_json::to_vec(&marked).unwrap()).unwrap();
        assert_eq!(Calibration::get(&layout).unwrap(), marked);
        std::fs::write(
            layout.calibration(),
            serde_json::to_vec(&Calibration { machine: "other".into(), ..marked }).unwrap(),
        )
        .unwrap();
        assert_eq!(Calibration::get(&layout).unwrap().machine, first.machine);
        std::fs::write(layout.calibration(), b"{").unwrap();
        assert!(Calibration::get(&layout).is_ok());
    }

    #[test]
    fn quotas_follow_the_measured_speed() {
        let host = Calibration { machine: String::new(), threads: 4, ecu_milli_per_thread: 2000 };
        assert_eq!(host.quota_us(0), None);
        assert_eq!(host.quota_us(500), Some(25_000));
        assert_eq!(host.quota_us(2000), Some(100_000));
        assert_eq!(host.quota_us(u64::MAX), Some(400_000), "no more than the machine has");
        assert_eq!(host.quota_us(1), Some(1000), "the kernel's minimum");
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let capacity = Resources { vcpus: 2, memory_mib: 1000, ecu_milli: 4000, instance_store_bytes: 0 };
        let admission = Admission::new(capacity, 200);
        let id = |n: u32| format!("i-{n:017x}").parse::<InstanceId>().unwrap();
        let wanted = Resources { vcpus: 2, memory_mib: 400, ecu_milli: 0, instance_store_bytes: 0 };
        admission.take(&id(1), wanted).unwrap();
        admission.take(&id(1), wanted).unwrap();
        admission.take(&id(2), wanted).unwrap();
        let refusal = admission.take(&id(3), wanted).unwrap_err();
        assert!(refusal.contains("vCPUs (4 in all, 6 would") && refusal.contains("MiB of memory (1000"), "{refusal}");
        admission.release(&id(1));
        admission.take(&id(3), wanted).unwrap();
        admission.book(&id(4), wanted);
        admission.release(&id(2));
        assert!(admission.take(&id(5), wanted).is_err(), "3 and 4 hold all");
    }

    proptest! {
        #[test]
        fn admitted_instances_never_exceed_the_host(
            steps in prop::collection::vec((0u32..6, 0u32..4, 0u64..500, any::<bool>()), 0..60),
        ) {
            let capacity = Resources { vcpus: 6, memory_mib: 900, ecu_milli: 0, instance_store_bytes: 0 };
            let admission = Admission::new(capacity, 100);
            for (instance, vcpus, memory_mib, release) in steps {
                let id: InstanceId = format!("i-{instance:017x}").parse().unwrap();
                if release {
                    admission.release(&id);
                } else {
                    let _ = admission.take(&id, Resources { vcpus, memory_mib, ..Resources::default() });
                }
                let held = admission.held.lock();
                prop_assert!(held.values().map(|r| r.vcpus).sum::<u32>() <= 6);
                prop_assert!(held.values().map(|r| r.memory_mib).sum::<u64>() <= 900);
            }
        }
    }
}
