//! Queues: which connections each waits for.

use std::sync::Arc;

use nix::sys::epoll::EpollEvent;

use super::{Phase, Queue, Session, Wakes, interest};
use crate::Completion;
use crate::nbd::error::NbdError;
use crate::nbd::link::Link;
use crate::nbd::task::Task;

impl Session {
    pub(in crate::nbd) fn open_queue(&mut self, own_link: bool) -> Result<(usize, Arc<Wakes>), NbdError> {
        let wakes = Arc::new(Wakes::new(&self.timer)?);
        let all_links = !self.export.multi_conn || !own_link;
        let queue = Queue { wakes: Arc::clone(&wakes), all_links, completions: Vec::new(), signalled: false };
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
    pub(in crate::nbd) fn close_queue(&mut self, id: usize) {
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
    pub(super) fn give_link(&mut self, id: usize) {
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
    pub(super) fn share_links(&mut self, id: usize) {
        if let Some(Some(queue)) = self.queues.get_mut(id) {
            queue.all_links = true;
        }
        for index in 0..self.links.len() {
            // Without it the queue waits for the other queues' threads.
            let _ = self.watch(index);
        }
    }

    /// A ready link for requests of this queue with fewer than so many commands in flight.
    pub(super) fn link_for(&mut self, id: usize, commands: usize) -> Option<&mut Link> {
        let all = self.queues.get(id).is_none_or(|queue| queue.as_ref().is_none_or(|queue| queue.all_links));
        self.links.iter_mut().find(|link| {
            link.is_ready() && link.in_flight() < commands && (all || link.owner.is_none_or(|owner| owner == id))
        })
    }

    /// Threads of queues that wait for this link wake for its events.
    pub(super) fn watch(&self, index: usize) -> Result<(), NbdError> {
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
    pub(super) fn watchers(&self, index: usize) -> impl Iterator<Item = &Queue> {
        let owner = self.links.get(index).and_then(|link| link.owner);
        let queues = self.queues.iter().enumerate();
        queues.filter_map(move |(id, queue)| {
            queue.as_ref().filter(|queue| queue.all_links || owner.is_none_or(|owner| owner == id))
        })
    }

    /// Does what there is to do for a queue; what is complete.
    pub(in crate::nbd) fn drain(&mut self, id: usize) -> Vec<Completion> {
        if let Some(Some(queue)) = self.queues.get_mut(id) {
            queue.look();
        }
        self.draining = Some(id);
        self.pump(id);
        self.draining = None;
        match self.queues.get_mut(id) {
            Some(Some(queue)) => std::mem::take(&mut queue.completions),
            _ => Vec::new(),
        }
    }
}
