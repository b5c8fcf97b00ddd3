//! What a guest may see in one sector.

use super::world::Value;

/// Values a sector may have after a power cut, oldest first.
#[derive(Clone, Debug)]
pub(super) struct History {
    pub(super) values: Vec<Value>,
    /// Older values that a flush has put out of reach.
    pub(super) dropped: usize,
    /// Number (dropped ones included) of the first value that a read may return. Several may when writes raced.
    pub(super) current: usize,
    /// The same once the writes in flight are done.
    pub(super) next: usize,
    pub(super) writing: usize,
}

impl History {
    pub(super) fn new(value: Value) -> Self {
        Self { values: vec![value], dropped: 0, current: 0, next: 0, writing: 0 }
    }

    pub(super) fn end(&self) -> usize {
        self.dropped + self.values.len()
    }

    /// A write begins.
    pub(super) fn push(&mut self, value: Value) {
        if self.writing == 0 {
            self.next = self.end();
        }
        self.writing += 1;
        self.values.push(value);
    }

    /// A write was acknowledged.
    pub(super) fn acknowledge(&mut self) {
        self.writing -= 1;
        if self.writing == 0 {
            self.current = self.next;
        }
    }

    /// A flush covered what was current then.
    pub(super) fn raise(&mut self, current: usize) {
        let drop = current.saturating_sub(self.dropped);
        self.values.drain(..drop);
        self.dropped += drop;
    }

    /// What a read may return, with what writes in flight may have stored.
    pub(super) fn possible(&self) -> Vec<Value> {
        self.values[self.current - self.dropped..].to_vec()
    }

    /// A process that opened the volume saw the sector hold this: whatever else it might have held is out of reach.
    pub(super) fn observe(&mut self, value: Value) {
        *self = Self::new(value);
    }
}
