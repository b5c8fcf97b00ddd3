//! Random requests, checked against a model of the volume.

use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Random;
use crate::{IoError, Operation, Request, Volume, VolumeQueue};

const SECTOR: u64 = 512;
/// Only a test that hangs reaches it.
const PATIENCE: Duration = Duration::from_secs(120);

/// What to do.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) requests: usize,
    pub(super) queues: usize,
    pub(super) depth: usize,
    /// Longest request in sectors.
    pub(super) longest: u64,
    pub(super) discard: bool,
    pub(super) zeroes: bool,
    /// Failures are no surprise: what a failed write covers is unknown afterwards.
    pub(super) may_fail: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            seed: 1,
            requests: 2000,
            queues: 1,
            depth: 16,
            longest: 64,
            discard: true,
            zeroes: true,
            may_fail: false,
        }
    }
}

/// What the run saw.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) failed: Vec<IoError>,
    /// Content that must be there; `None` = may be anything.
    pub(super) model: Vec<Option<u8>>,
}

impl Outcome {
    /// The first sector that is not as it must be.
    pub(super) fn check(&self, bytes: &[u8]) {
        for (sector, (model, found)) in
            self.model.chunks(SECTOR as usize).zip(bytes.chunks(SECTOR as usize)).enumerate()
        {
            let equal = model.iter().zip(found).all(|(model, found)| model.is_none_or(|model| model == *found));
            assert!(equal, "sector {sector} differs: {:?} instead of {:?}", &found[..8], &model[..8]);
        }
    }
}

struct Pending {
    operation: Operation,
    offset: u64,
    length: u64,
    buffer: Vec<u8>,
    queue: usize,
    active: bool,
}

/// Runs the plan. `between` is called before every request with its number.
pub(super) fn run(volume: &dyn Volume, plan: &Plan, mut between: impl FnMut(usize)) -> Outcome {
    let mut random = Random::new(plan.seed);
    // Before the queues, to outlive them.
    let mut slots: Vec<Pending> = Vec::new();
    let mut queues: Vec<Box<dyn VolumeQueue>> =
        (0..plan.queues).map(|_| volume.open_queue(plan.depth).unwrap()).collect();
    let mut outcome = Outcome { failed: Vec::new(), model: vec![Some(0); volume.size_bytes() as usize] };
    let sectors = volume.size_bytes() / SECTOR;
    let mut number = 0;
    while number < plan.requests {
        for _ in 0..=random.below(8) {
            let (operation, offset, length) = choose(&mut random, plan, sectors);
            let overlaps =
                |slot: &Pending| slot.active && slot.offset < offset + length && offset < slot.offset + slot.length;
            let queue = random.below(plan.queues as u64) as usize;
            if slots.iter().any(overlaps) || queues[queue].in_flight() >= queues[queue].capacity() {
                continue;
            }
            between(number);
            number += 1;
            let mut buffer = vec![0xa5; length as usize];
            if operation == Operation::Write {
                buffer.chunks_mut(8).for_each(|bytes| bytes.copy_from_slice(&random.next().to_le_bytes()));
            }
            let pending = Pending { operation, offset, length, buffer, queue, active: true };
            let token = slots.iter().position(|slot| !slot.active).unwrap_or(slots.len());
            if token == slots.len() {
                slots.push(pending)
            } else {
                slots[token] = pending
            }
            submit(&mut *queues[queue], &mut slots[token], token as u64, &mut random);
        }
        queues.iter_mut().for_each(|queue| queue.kick().unwrap());
        if slots.iter().filter(|slot| slot.active).count() > plan.depth / 2 {
            collect(&mut queues, &mut slots, plan, &mut outcome);
        }
    }
    while slots.iter().any(|slot| slot.active) {
        collect(&mut queues, &mut slots, plan, &mut outcome);
    }
    outcome
}

/// One request, waited for.
pub(super) fn one(
    queue: &mut dyn VolumeQueue,
    operation: Operation,
    offset: u64,
    buffer: &mut [u8],
) -> Result<(), IoError> {
    let iovec = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let buffers = [iovec];
    let request = Request { operation, offset, length: buffer.len() as u64, buffers: &buffers, token: 7 };
    // SAFETY: the buffer outlives the wait below.
    unsafe { queue.submit(request).unwrap() };
    queue.kick().unwrap();
    let until = Instant::now() + PATIENCE;
    let mut outcome = None;
    while outcome.is_none() {
        queue.drain(&mut |completion| outcome = Some(completion.result)).unwrap();
        if outcome.is_none() {
            assert!(Instant::now() < until, "the request hangs");
            sleep(&[&*queue]);
        }
    }
    outcome.unwrap()
}

/// The whole volume.
pub(super) fn read_all(volume: &dyn Volume) -> Vec<u8> {
    let mut queue = volume.open_queue(4).unwrap();
    let mut bytes = vec![0; volume.size_bytes() as usize];
    one(&mut *queue, Operation::Read, 0, &mut bytes).unwrap();
    bytes
}

fn choose(random: &mut Random, plan: &Plan, sectors: u64) -> (Operation, u64, u64) {
    let length = 1 + random.below(plan.longest.min(sectors));
    let offset = random.below(sectors - length + 1);
    let operation = match random.below(20) {
        0..8 => Operation::Read,
        8..15 => Operation::Write,
        15..17 => return (Operation::Flush, 0, 0),
        17 if plan.discard => Operation::Discard,
        18..20 if plan.zeroes => Operation::WriteZeroes { may_unmap: random.chance(2) },
        _ => Operation::Write,
    };
    (operation, offset * SECTOR, length * SECTOR)
}

fn submit(queue: &mut dyn VolumeQueue, pending: &mut Pending, token: u64, random: &mut Random) {
    let mut buffers = Vec::new();
    let mut rest = &mut pending.buffer[..];
    while !rest.is_empty() {
        let length = (1 + random.below(5000) as usize).min(rest.len());
        let (part, later) = rest.split_at_mut(length);
        buffers.push(libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() });
        rest = later;
    }
    let Pending { operation, offset, length, .. } = *pending;
    let request = Request { operation, offset, length, buffers: &buffers, token };
    // SAFETY: the buffer lives in `slots`, whose heap memory stays in place until the slot is reused after its completion.
    unsafe { queue.submit(request).unwrap() };
}

pub(super) fn sleep(queues: &[&dyn VolumeQueue]) {
    let mut fds: Vec<PollFd<'_>> =
        queues.iter().map(|queue| PollFd::new(queue.completion_fd(), PollFlags::POLLIN)).collect();
    poll(&mut fds, PollTimeout::try_from(Duration::from_secs(5)).unwrap()).unwrap();
}

/// Waits for at least one completion.
fn collect(queues: &mut [Box<dyn VolumeQueue>], slots: &mut [Pending], plan: &Plan, outcome: &mut Outcome) {
    let until = Instant::now() + PATIENCE;
    let mut any = false;
    loop {
        for (index, queue) in queues.iter_mut().enumerate() {
            queue
                .drain(&mut |completion| {
                    any = true;
                    let slot = &mut slots[completion.token as usize];
                    assert!(slot.active && slot.queue == index, "a completion that nobody waits for");
                    slot.active = false;
                    settle(slot, completion.result, plan, outcome);
                })
                .unwrap();
        }
        if any {
            return;
        }
        assert!(Instant::now() < until, "requests hang");
        sleep(&queues.iter().map(|queue| &**queue).collect::<Vec<_>>());
    }
}

fn settle(slot: &Pending, result: Result<(), IoError>, plan: &Plan, outcome: &mut Outcome) {
    let range = slot.offset as usize..(slot.offset + slot.length) as usize;
    if let Err(error) = result {
        assert!(plan.may_fail, "{error}");
        if !matches!(slot.operation, Operation::Read | Operation::Flush) {
            outcome.model[range].fill(None);
        }
        outcome.failed.push(error);
        return;
    }
    match slot.operation {
        Operation::Read => {
            for (at, (model, found)) in outcome.model[range].iter().zip(&slot.buffer).enumerate() {
                assert!(
                    model.is_none_or(|model| model == *found),
                    "byte {} reads {found}, not {model:?}",
                    slot.offset + at as u64
                );
            }
        }
        Operation::Write => {
            for (model, byte) in outcome.model[range].iter_mut().zip(&slot.buffer) {
                *model = Some(*byte);
            }
        }
        Operation::Discard => outcome.model[range].fill(None),
        Operation::WriteZeroes { .. } => outcome.model[range].fill(Some(0)),
        Operation::Flush => {}
    }
}
