//! Requests of front-ends: taken, given to connections as commands, finished.

use std::io;
use std::time::{Duration, Instant};

use super::{Phase, Session};
use crate::nbd::error::NbdError;
use crate::nbd::link::Purpose;
use crate::nbd::log::Content;
use crate::nbd::task::{Task, flush};
use crate::{Completion, Operation};

/// A flush to make room in the log failed: not again before.
const RETIRE_DELAY: Duration = Duration::from_secs(1);
/// How much may be in a link's line before more requests join it.
const MAX_COMMANDS: usize = 1024;

impl Session {
    pub(in crate::nbd) fn submit(&mut self, mut task: Task) {
        match task.check(&self.export, self.size, self.read_only()) {
            Ok(false) => {
                task.number = self.next_number;
                self.next_number += 1;
                let slot = self.free_tasks.pop().unwrap_or_else(|| {
                    self.tasks.push(None);
                    self.tasks.len() - 1
                });
                if let Some(place) = self.tasks.get_mut(slot) {
                    *place = Some(task);
                }
                self.waiting.push_back(slot);
            }
            Ok(true) => self.complete(task.queue, Completion { token: task.token, result: Ok(()) }),
            Err(error) => self.complete(task.queue, Completion { token: task.token, result: Err(error) }),
        }
    }

    pub(super) fn complete(&mut self, id: usize, completion: Completion) {
        if let Some(Some(queue)) = self.queues.get_mut(id) {
            queue.completions.push(completion);
            if self.draining != Some(id) {
                queue.signal();
            }
        }
    }

    pub(super) fn free_task(&mut self, slot: usize) -> Option<Task> {
        let task = self.tasks.get_mut(slot)?.take()?;
        self.free_tasks.push(slot);
        if let Some(bytes) = task.reserved {
            self.log.release(bytes);
        }
        Some(task)
    }

    /// Gives waiting requests to links.
    pub(super) fn dispatch(&mut self, id: usize) {
        if self.phase != Phase::Running {
            return;
        }
        self.make_room(id);
        self.throttled_until = None;
        let now = u64::try_from(self.born.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let mut position = 0;
        while let Some(slot) = self.waiting.get(position).copied() {
            let Some(Some(task)) = self.tasks.get_mut(slot) else {
                self.waiting.remove(position);
                continue;
            };
            // The rate concerns what has not begun; a flush never waits for it.
            if !task.admitted && task.operation != Operation::Flush {
                let admitted = match self.throttled_until {
                    Some(_) => false,
                    None => match self.limiter.admit(task.moved_bytes(), now) {
                        Ok(()) => true,
                        Err(at) => {
                            self.throttled_until = Some(self.born + Duration::from_nanos(at));
                            false
                        }
                    },
                };
                if !admitted {
                    position += 1;
                    continue;
                }
                task.admitted = true;
            }
            if let (Some(bytes), true, None, false) =
                (task.logged_bytes(), self.export.flush, task.reserved, task.through)
            {
                if self.log.reserve(bytes) {
                    task.reserved = Some(bytes);
                } else if self.log.has_entry() {
                    task.through = true;
                } else {
                    // Until the log has room; a flush for that is in flight or will be.
                    position += 1;
                    continue;
                }
            }
            let queue = task.queue;
            if self.link_for(queue, MAX_COMMANDS).is_none() {
                position += 1;
                continue;
            }
            let Some(Some(task)) = self.tasks.get_mut(slot) else { continue };
            if task.operation == Operation::Flush {
                task.mark = self.log.mark();
            }
            let command = task.next_command(slot, &self.export);
            if task.is_dispatched() {
                self.waiting.remove(position);
            }
            if let Some(link) = self.link_for(queue, MAX_COMMANDS) {
                link.push(command);
            }
        }
    }

    /// Has the log emptied by a flush of our own when it fills up.
    pub(super) fn make_room(&mut self, id: usize) {
        if self.retiring || self.retire_after.is_some() || !self.log.pressing() {
            return;
        }
        let mark = self.log.mark();
        if let Some(link) = self.link_for(id, usize::MAX) {
            link.push(flush(Purpose::Retire { mark }));
            self.retiring = true;
        }
    }

    // ---- outcomes

    pub(super) fn outcome(&mut self, purpose: Purpose, result: Result<(), i32>) -> Result<(), NbdError> {
        if result == Err(libc::ESHUTDOWN) {
            return Err(NbdError::ShuttingDown);
        }
        let replayed = |errno| NbdError::Replay(io::Error::from_raw_os_error(errno));
        match purpose {
            Purpose::Part { task } => self.part_done(task, result),
            Purpose::Settle { task } => {
                if let Some(Some(task)) = self.tasks.get_mut(task) {
                    task.commands = task.commands.saturating_sub(1);
                    task.error = result.err();
                }
                self.finish(task);
            }
            Purpose::Retire { mark } => {
                self.retiring = false;
                match result {
                    Ok(()) => self.log.retire(mark),
                    Err(_) => self.retire_after = Some(Instant::now() + RETIRE_DELAY),
                }
            }
            Purpose::Repeat => {
                result.map_err(replayed)?;
                if let Phase::Repeating(left) = self.phase {
                    self.repeated(left.saturating_sub(1));
                }
            }
            Purpose::RepeatFlush { mark } => {
                result.map_err(replayed)?;
                self.log.retire(mark);
                self.run()?;
            }
        }
        Ok(())
    }

    pub(super) fn part_done(&mut self, slot: usize, result: Result<(), i32>) {
        let Some(Some(task)) = self.tasks.get_mut(slot) else { return };
        task.commands = task.commands.saturating_sub(1);
        match result {
            Ok(()) => self.failures = 0,
            // A server may offer TRIM and yet not take this one. It is a hint.
            Err(libc::EOPNOTSUPP) if task.operation == Operation::Discard => {}
            Err(errno) => {
                task.error.get_or_insert(errno);
            }
        }
        if task.commands > 0 || !task.is_dispatched() && task.operation != Operation::Flush {
            return;
        }
        if task.error.is_none() && task.through && !self.export.fua && !task.settling {
            task.settling = true;
            task.commands += 1;
            let queue = task.queue;
            if let Some(link) = self.link_for(queue, usize::MAX) {
                link.push(flush(Purpose::Settle { task: slot }));
            }
            return;
        }
        self.finish(slot);
    }

    /// All of the task's commands are answered.
    pub(super) fn finish(&mut self, slot: usize) {
        let Some(mut task) = self.tasks.get_mut(slot).and_then(Option::take) else { return };
        self.free_tasks.push(slot);
        let reserved = task.reserved.take();
        let result = match task.error {
            Some(errno) => {
                reserved.into_iter().for_each(|bytes| self.log.release(bytes));
                Err(task.failure(errno))
            }
            None => {
                self.note_success(&task, reserved.is_some());
                Ok(())
            }
        };
        self.complete(task.queue, Completion { token: task.token, result });
    }

    pub(super) fn note_success(&mut self, task: &Task, reserved: bool) {
        let content = match task.operation {
            Operation::Flush => return self.log.retire(task.mark),
            Operation::Write if reserved => Content::Data(task.copy_data().into()),
            Operation::WriteZeroes { may_unmap } if reserved => Content::Zeros { no_hole: !may_unmap },
            Operation::Write | Operation::WriteZeroes { .. } => Content::Durable,
            Operation::Read | Operation::Discard => return,
        };
        self.log.push(task.offset, task.length, content);
    }
}
