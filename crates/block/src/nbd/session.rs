//! All state of one NBD volume: its connections, its queues' requests, the log, and where a reconnection stands. One lock guards
//! it, so that the thread of any queue can take every step.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::error::NbdError;
use super::handshake::Export;
use super::link::{Command, Link, Payload, Purpose};
use super::log::{Content, Log, Repeat};
use super::task::{Task, flush};
use super::{Connector, NbdEvents, NbdOptions, wire};
use crate::{Completion, Operation};

const FIRST_DELAY: Duration = Duration::from_millis(20);
const LONGEST_DELAY: Duration = Duration::from_secs(5);
/// A flush to make room in the log failed: not again before.
const RETIRE_DELAY: Duration = Duration::from_secs(1);
/// How much may be in a link's line before more requests join it.
const MAX_COMMANDS: usize = 1024;

/// Where the volume stands with its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// No connection until then.
    Down(Instant),
    /// The first connection negotiates, at most until then.
    Opening(Instant),
    /// So many writes of the log are not yet repeated.
    Repeating(usize),
    /// They are, and become durable.
    Flushing,
}

/// The file descriptors that one queue's thread waits for.
#[derive(Debug)]
pub(super) struct Wakes {
    epoll: Epoll,
    done: EventFd,
}

impl Wakes {
    fn new(timer: &TimerFd) -> Result<Self, NbdError> {
        let make = || -> nix::Result<Self> {
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
            let done = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
            epoll.add(&done, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
            epoll.add(timer, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
            Ok(Self { epoll, done })
        };
        make().map_err(|errno| NbdError::Events(errno.into()))
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    /// Makes the eventfd unreadable.
    pub(super) fn clear(&self) {
        // Empty: nothing to clear.
        let _ = self.done.read();
    }
}

#[derive(Debug)]
struct Queue {
    wakes: Arc<Wakes>,
    /// Waits for every link's events.
    all_links: bool,
    completions: Vec<Completion>,
}

pub(super) struct Session {
    connector: Box<dyn Connector>,
    events: Arc<dyn NbdEvents>,
    options: NbdOptions,
    export: Export,
    size: u64,
    phase: Phase,
    links: Vec<Link>,
    queues: Vec<Option<Queue>>,
    tasks: Vec<Option<Task>>,
    free_tasks: Vec<usize>,
    /// Slots of tasks that have commands to send, in order.
    waiting: VecDeque<usize>,
    next_number: u64,
    log: Log,
    /// A flush to make room in the log is in flight, or not allowed before.
    retiring: bool,
    retire_after: Option<Instant>,
    /// Connections in a row that brought nothing.
    failures: u32,
    /// `lost` was reported.
    impaired: bool,
    timer: TimerFd,
    armed: Option<Instant>,
}

impl Session {
    /// Takes the first, negotiated connection.
    pub(super) fn new(
        connector: Box<dyn Connector>,
        events: Arc<dyn NbdEvents>,
        options: NbdOptions,
        link: Link,
        export: Export,
    ) -> Result<Self, NbdError> {
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)
            .map_err(|errno| NbdError::Events(errno.into()))?;
        let log = Log::new(if export.flush { options.log_bytes } else { 0 });
        Ok(Self {
            connector,
            events,
            options,
            export,
            size: export.size_bytes,
            phase: Phase::Running,
            links: vec![link],
            queues: Vec::new(),
            tasks: Vec::new(),
            free_tasks: Vec::new(),
            waiting: VecDeque::new(),
            next_number: 0,
            log,
            retiring: false,
            retire_after: None,
            failures: 0,
            impaired: false,
            timer,
            armed: None,
        })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn read_only(&self) -> bool {
        self.export.read_only || self.options.read_only
    }

    pub(super) fn connect(&self) -> Result<OwnedFd, NbdError> {
        self.connector.connect().map_err(NbdError::Connect)
    }

    pub(super) fn options(&self) -> &NbdOptions {
        &self.options
    }

    /// The export was found larger: new connections see it so.
    pub(super) fn grown(&mut self, size: u64) {
        self.size = size;
        self.lose(NbdError::Renegotiate);
        self.failures = 0;
        self.phase = Phase::Down(Instant::now());
        self.pump_all();
    }

    // ---- queues

    pub(super) fn open_queue(&mut self, own_link: bool) -> Result<(usize, Arc<Wakes>), NbdError> {
        let wakes = Arc::new(Wakes::new(&self.timer)?);
        let all_links = !self.export.multi_conn || !own_link;
        let queue = Queue { wakes: Arc::clone(&wakes), all_links, completions: Vec::new() };
        let id = self.queues.iter().position(Option::is_none).unwrap_or(self.queues.len());
        if id == self.queues.len() {
            self.queues.push(None);
        }
        if let Some(place) = self.queues.get_mut(id) {
            *place = Some(queue);
        }
        if !all_links {
            self.give_link(id);
        }
        for index in 0..self.links.len() {
            self.watch(index)?;
        }
        self.arm();
        Ok((id, wakes))
    }

    /// Forgets the queue; its unfinished requests are called off.
    pub(super) fn close_queue(&mut self, id: usize) {
        let unfinished = |task: &Option<Task>| task.as_ref().is_some_and(|task| task.queue == id);
        if self.tasks.iter().any(|task| unfinished(task) && task.as_ref().is_some_and(|task| task.commands > 0)) {
            // Commands with pointers into the submitter's memory end with their connection.
            self.lose(NbdError::Renegotiate);
        }
        for slot in 0..self.tasks.len() {
            if self.tasks.get(slot).is_some_and(unfinished) {
                self.waiting.retain(|waiting| *waiting != slot);
                self.free_task(slot);
            }
        }
        if let Some(queue) = self.queues.get_mut(id) {
            *queue = None;
        }
        let heir = self.queues.iter().position(|queue| queue.as_ref().is_some_and(|queue| !queue.all_links));
        let mut others = self.links.len();
        self.links.retain_mut(|link| {
            if link.owner != Some(id) {
                return true;
            }
            // Idle and not the last: the next queue would make one of its own.
            if link.in_flight() == 0 && others > 1 {
                link.disconnect();
                others -= 1;
                return false;
            }
            link.owner = heir;
            true
        });
        for index in 0..self.links.len() {
            // Without it the other queues' threads see the link's events when they have others.
            let _ = self.watch(index);
        }
        self.pump_all();
    }

    /// A link for this queue alone: spare ones, or a new one.
    fn give_link(&mut self, id: usize) {
        let mut found = false;
        for link in self.links.iter_mut().filter(|link| link.owner.is_none()) {
            link.owner = Some(id);
            found = true;
            for queue in
                self.queues.iter().enumerate().filter(|(other, _)| *other != id).filter_map(|(_, queue)| queue.as_ref())
            {
                if !queue.all_links {
                    // It did not wait for the link.
                    let _ = queue.wakes.epoll.delete(link.socket());
                }
            }
        }
        // While there is no connection, all queues wait for the next; each gets its own then.
        if found || self.phase != Phase::Running {
            return;
        }
        match self.connect().and_then(|socket| Link::new(socket, &self.options.export, Some(id))) {
            Ok(link) => self.links.push(link),
            Err(_) => self.share_links(id),
        }
    }

    /// The queue gets no link of its own: the others' carry its requests.
    fn share_links(&mut self, id: usize) {
        if let Some(Some(queue)) = self.queues.get_mut(id) {
            queue.all_links = true;
        }
        for index in 0..self.links.len() {
            // Without it the queue waits for the other queues' threads.
            let _ = self.watch(index);
        }
    }

    /// A ready link for requests of this queue with fewer than so many commands in flight.
    fn link_for(&mut self, id: usize, commands: usize) -> Option<&mut Link> {
        let all = self.queues.get(id).is_none_or(|queue| queue.as_ref().is_none_or(|queue| queue.all_links));
        self.links.iter_mut().find(|link| {
            link.is_ready() && link.in_flight() < commands && (all || link.owner.is_none_or(|owner| owner == id))
        })
    }

    /// Threads of queues that wait for this link wake for its events.
    fn watch(&self, index: usize) -> Result<(), NbdError> {
        let Some(link) = self.links.get(index) else { return Ok(()) };
        for queue in self.watchers(index) {
            match queue.wakes.epoll.add(link.socket(), EpollEvent::new(interest(link), 0)) {
                Ok(()) | Err(nix::errno::Errno::EEXIST) => {}
                Err(errno) => return Err(NbdError::Events(errno.into())),
            }
        }
        Ok(())
    }

    /// All queues that wait for this link.
    fn watchers(&self, index: usize) -> impl Iterator<Item = &Queue> {
        let owner = self.links.get(index).and_then(|link| link.owner);
        let queues = self.queues.iter().enumerate();
        queues.filter_map(move |(id, queue)| {
            queue.as_ref().filter(|queue| queue.all_links || owner.is_none_or(|owner| owner == id))
        })
    }

    pub(super) fn take_completions(&mut self, id: usize) -> Vec<Completion> {
        match self.queues.get_mut(id) {
            Some(Some(queue)) => std::mem::take(&mut queue.completions),
            _ => Vec::new(),
        }
    }

    // ---- requests

    pub(super) fn submit(&mut self, mut task: Task) {
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

    fn complete(&mut self, id: usize, completion: Completion) {
        if let Some(Some(queue)) = self.queues.get_mut(id) {
            queue.completions.push(completion);
            // The counter cannot overflow: the queue's thread resets it.
            let _ = queue.wakes.done.write(1);
        }
    }

    fn free_task(&mut self, slot: usize) -> Option<Task> {
        let task = self.tasks.get_mut(slot)?.take()?;
        self.free_tasks.push(slot);
        if let Some(bytes) = task.reserved {
            self.log.release(bytes);
        }
        Some(task)
    }

    /// Gives waiting requests to links.
    fn dispatch(&mut self, id: usize) {
        if self.phase != Phase::Running {
            return;
        }
        self.make_room(id);
        let mut position = 0;
        while let Some(slot) = self.waiting.get(position).copied() {
            let Some(Some(task)) = self.tasks.get_mut(slot) else {
                self.waiting.remove(position);
                continue;
            };
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
    fn make_room(&mut self, id: usize) {
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

    fn outcome(&mut self, purpose: Purpose, result: Result<(), i32>) -> Result<(), NbdError> {
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

    fn part_done(&mut self, slot: usize, result: Result<(), i32>) {
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
    fn finish(&mut self, slot: usize) {
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

    fn note_success(&mut self, task: &Task, reserved: bool) {
        let content = match task.operation {
            Operation::Flush => return self.log.retire(task.mark),
            Operation::Write if reserved => Content::Data(task.copy_data().into()),
            Operation::WriteZeroes { may_unmap } if reserved => Content::Zeros { no_hole: !may_unmap },
            Operation::Write | Operation::WriteZeroes { .. } => Content::Durable,
            Operation::Read | Operation::Discard => return,
        };
        self.log.push(task.offset, task.length, content);
    }

    // ---- connections

    /// Gives up all connections. What is not answered waits for the next.
    fn lose(&mut self, why: NbdError) {
        for link in &mut self.links {
            link.disconnect();
        }
        self.links.clear();
        self.retiring = false;
        self.waiting.clear();
        let mut unfinished: Vec<(u64, usize)> = Vec::new();
        for (slot, task) in self.tasks.iter_mut().enumerate() {
            if let Some(task) = task {
                task.reset();
                unfinished.push((task.number, slot));
            }
        }
        unfinished.sort_unstable();
        self.waiting.extend(unfinished.into_iter().map(|(_, slot)| slot));
        let doubled = FIRST_DELAY.saturating_mul(1 << self.failures.min(16)).min(LONGEST_DELAY);
        let delay = if self.failures == 0 { Duration::ZERO } else { doubled };
        self.failures = self.failures.saturating_add(1);
        self.phase = Phase::Down(Instant::now() + delay);
        if !matches!(why, NbdError::Renegotiate) {
            self.impaired = true;
            self.events.lost(&why);
        }
    }

    fn reconnect(&mut self) {
        // Every queue's thread can take the steps of the reconnection.
        let link = self.connect().and_then(|socket| Link::new(socket, &self.options.export, None));
        match link {
            Ok(link) => {
                self.phase = Phase::Opening(Instant::now() + self.options.handshake_timeout);
                self.links.push(link);
                if let Err(error) = self.watch(self.links.len() - 1) {
                    self.lose(error);
                }
            }
            Err(error) => self.lose(error),
        }
    }

    /// A link finished its negotiation.
    fn negotiated(&mut self, export: &Export) -> Result<(), NbdError> {
        self.export.accepts(export).map_err(NbdError::Changed)?;
        if export.size_bytes < self.size {
            return Err(NbdError::Changed(format!("it has {} bytes and had {}", export.size_bytes, self.size)));
        }
        if !matches!(self.phase, Phase::Opening(_)) {
            return Ok(());
        }
        let repeats = self.log.repeats();
        if repeats.is_empty() {
            return self.run();
        }
        let mut count = 0;
        for repeat in repeats {
            let mut done = 0;
            while done < repeat.length {
                let length = (repeat.length - done).min(u64::from(self.export.max_payload_bytes));
                let command = repeat_command(&repeat, done, length);
                if let Some(link) = self.links.first_mut() {
                    link.push(command);
                }
                done += length;
                count += 1;
            }
        }
        self.repeated(count);
        Ok(())
    }

    fn repeated(&mut self, left: usize) {
        self.phase = Phase::Repeating(left);
        if left == 0 {
            self.phase = Phase::Flushing;
            let mark = self.log.mark();
            if let Some(link) = self.links.first_mut() {
                link.push(flush(Purpose::RepeatFlush { mark }));
            }
        }
    }

    /// Requests go on.
    fn run(&mut self) -> Result<(), NbdError> {
        self.phase = Phase::Running;
        if std::mem::take(&mut self.impaired) {
            self.events.recovered();
        }
        for id in 0..self.queues.len() {
            let wants = self.queues.get(id).is_some_and(|queue| queue.as_ref().is_some_and(|q| !q.all_links));
            if wants && !self.links.iter().any(|link| link.owner == Some(id)) {
                self.give_link(id);
                self.watch(self.links.len().saturating_sub(1))?;
            }
        }
        Ok(())
    }

    // ---- driving

    /// Sends what waits; called after `submit`.
    pub(super) fn kick(&mut self, id: usize) {
        self.dispatch(id);
        for index in 0..self.links.len() {
            if let Err(error) = self.transmit(index) {
                self.lose(error);
                break;
            }
        }
        self.arm();
    }

    /// Takes every step that can be taken for the links this queue waits for.
    pub(super) fn pump(&mut self, id: usize) {
        let all = self.queues.get(id).is_none_or(|queue| queue.as_ref().is_none_or(|queue| queue.all_links));
        self.timeouts();
        let mut index = 0;
        while let Some(link) = self.links.get(index) {
            let negotiating = !link.is_ready();
            if all || link.owner == Some(id) || link.owner.is_none() {
                match self.step(index) {
                    Ok(()) => {}
                    // A further connection that the server does not want: the others do.
                    Err(_) if negotiating && self.phase == Phase::Running => {
                        if let Some(owner) = self.links.remove(index).owner {
                            self.share_links(owner);
                        }
                        continue;
                    }
                    Err(error) => {
                        self.lose(error);
                        break;
                    }
                }
            }
            index += 1;
        }
        self.timeouts();
        self.kick(id);
    }

    fn pump_all(&mut self) {
        self.pump(usize::MAX);
    }

    fn step(&mut self, index: usize) -> Result<(), NbdError> {
        let Some(link) = self.links.get_mut(index) else { return Ok(()) };
        let received = link.receive();
        // What was answered before the connection ended counts.
        let finished = link.take_finished();
        for (purpose, result) in finished {
            self.outcome(purpose, result)?;
        }
        if let Some(export) = received? {
            self.negotiated(&export)?;
        }
        self.transmit(index)
    }

    fn transmit(&mut self, index: usize) -> Result<(), NbdError> {
        let Some(link) = self.links.get_mut(index) else { return Ok(()) };
        let before = link.blocked;
        link.transmit()?;
        if link.blocked == before {
            return Ok(());
        }
        if let Some(link) = self.links.get(index) {
            for queue in self.watchers(index) {
                let mut event = EpollEvent::new(interest(link), 0);
                let modified = queue.wakes.epoll.modify(link.socket(), &mut event);
                modified.map_err(|errno| NbdError::Events(errno.into()))?;
            }
        }
        Ok(())
    }

    fn timeouts(&mut self) {
        // Not armed, or not yet due: nothing to read.
        let _ = self.timer.wait();
        let now = Instant::now();
        if self.armed.is_some_and(|at| at <= now) {
            self.armed = None;
        }
        self.retire_after = self.retire_after.filter(|after| *after > now);
        match self.phase {
            Phase::Opening(until) if until <= now => self.lose(NbdError::Silent("negotiation")),
            Phase::Down(_) | Phase::Opening(_) => {}
            Phase::Running | Phase::Repeating(_) | Phase::Flushing => {
                let patience = self.options.reply_timeout;
                let silent = |link: &Link| link.in_flight() > 0 && link.last_received + patience <= now;
                if self.links.iter().any(silent) {
                    self.lose(NbdError::Silent("a request"));
                }
                let patience = self.options.handshake_timeout;
                let late = |link: &Link| !link.is_ready() && link.last_received + patience <= now;
                while let Some(index) = self.links.iter().position(late) {
                    if let Some(owner) = self.links.remove(index).owner {
                        self.share_links(owner);
                    }
                }
            }
        }
        if let Phase::Down(until) = self.phase
            && until <= now
        {
            self.reconnect();
        }
    }

    /// Sets the timer to the next moment at which something is due.
    fn arm(&mut self) {
        let next = match self.phase {
            Phase::Down(at) | Phase::Opening(at) => Some(at),
            _ => {
                let silence = self.links.iter().filter_map(|link| match link.is_ready() {
                    true if link.in_flight() > 0 => Some(link.last_received + self.options.reply_timeout),
                    true => None,
                    false => Some(link.last_received + self.options.handshake_timeout),
                });
                silence.chain(self.retire_after).min()
            }
        };
        let Some(next) = next else { return };
        // One that fires too early costs little: it is set again then. Requests do not pay for it.
        if self.armed.is_some_and(|at| at <= next) {
            return;
        }
        let delay = next.saturating_duration_since(Instant::now()).max(Duration::from_micros(1));
        let expiration = Expiration::OneShot(TimeSpec::from_duration(delay));
        if self.timer.set(expiration, TimerSetTimeFlags::empty()).is_ok() {
            self.armed = Some(next);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for link in &mut self.links {
            link.disconnect();
        }
    }
}

fn interest(link: &Link) -> EpollFlags {
    if link.blocked { EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN }
}

fn repeat_command(repeat: &Repeat, done: u64, length: u64) -> Command {
    let (command, flags, payload) = match &repeat.content {
        Content::Data(data) => {
            let payload = Payload::Log(Arc::clone(data), repeat.start + done as usize, length as usize);
            (wire::CMD_WRITE, 0, payload)
        }
        Content::Zeros { no_hole: true } => (wire::CMD_WRITE_ZEROES, wire::CMD_FLAG_NO_HOLE, Payload::None),
        Content::Zeros { no_hole: false } | Content::Durable => (wire::CMD_WRITE_ZEROES, 0, Payload::None),
    };
    Command {
        purpose: Purpose::Repeat,
        command,
        flags,
        offset: repeat.offset + done,
        // At most the longest payload, which fits.
        length: length as u32,
        payload,
        into: Vec::new(),
    }
}
