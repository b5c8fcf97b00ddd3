//! The mutex around a volume's shared state. Tests may replace it by one whose schedule a model checker chooses.

use std::sync::{Condvar, PoisonError};
use std::time::Duration;

#[cfg(test)]
pub(crate) use model::{MODELLED, Mutex, MutexGuard};
#[cfg(not(test))]
pub(crate) use std::sync::{Mutex, MutexGuard};

/// Something happened, for threads that wait with a time limit.
#[derive(Debug, Default)]
pub(crate) struct Notice {
    count: std::sync::Mutex<u64>,
    changed: Condvar,
}

impl Notice {
    pub(crate) fn notify(&self) {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.changed.notify_all();
    }

    /// To be taken before looking at what the notice is about.
    pub(crate) fn count(&self) -> u64 {
        *self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something happened since `seen`, or time is up.
    pub(crate) fn wait(&self, seen: u64, most: Duration) {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        // Waking early or late only makes the caller look again.
        let _ = self.changed.wait_timeout_while(count, most, |count| *count == seen);
    }
}

#[cfg(test)]
mod model {
    use std::ops::{Deref, DerefMut};
    use std::sync::LockResult;

    std::thread_local! {
        /// Mutexes made on this thread belong to a model.
        pub(crate) static MODELLED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    }

    pub(crate) enum Mutex<T> {
        Real(std::sync::Mutex<T>),
        Model(shuttle::sync::Mutex<T>),
    }

    pub(crate) enum MutexGuard<'a, T> {
        Real(std::sync::MutexGuard<'a, T>),
        Model(shuttle::sync::MutexGuard<'a, T>),
    }

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            if MODELLED.get() {
                Self::Model(shuttle::sync::Mutex::new(value))
            } else {
                Self::Real(std::sync::Mutex::new(value))
            }
        }

        pub(crate) fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
            Ok(match self {
                Self::Real(mutex) => MutexGuard::Real(mutex.lock().unwrap()),
                Self::Model(mutex) => MutexGuard::Model(mutex.lock().unwrap()),
            })
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            match self {
                Self::Real(guard) => guard,
                Self::Model(guard) => guard,
            }
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            match self {
                Self::Real(guard) => guard,
                Self::Model(guard) => guard,
            }
        }
    }
}
