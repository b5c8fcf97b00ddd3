//! Who is uploading what: each import has one seat, and the newest client takes it.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;

/// The seats of all uploads, by image.
#[derive(Default)]
pub(crate) struct Seats(Mutex<HashMap<String, Taken>>);

struct Taken {
    /// Tells the newest of those who sit or wait that another one has come.
    overtaken: CancellationToken,
    seat: Weak<tokio::sync::Mutex<()>>,
}

/// The right to write an upload's spool file. Given back when it is dropped.
pub(crate) struct Seat {
    overtaken: CancellationToken,
    _seat: OwnedMutexGuard<()>,
}

impl Seat {
    /// Comes when another one wants the seat.
    pub async fn overtaken(&self) {
        self.overtaken.cancelled().await;
    }
}

impl Seats {
    /// Takes an upload's seat; waits until the one before has risen.
    pub async fn take(&self, image: &str) -> Seat {
        let overtaken = CancellationToken::new();
        let seat = {
            let mut seats = self.0.lock();
            seats.retain(|_, taken| taken.seat.strong_count() > 0);
            let before = seats.get(image).and_then(|taken| Some((taken.overtaken.clone(), taken.seat.upgrade()?)));
            let seat = match before {
                Some((older, seat)) => {
                    older.cancel();
                    seat
                }
                None => Arc::default(),
            };
            let taken = Taken { overtaken: overtaken.clone(), seat: Arc::downgrade(&seat) };
            seats.insert(image.to_owned(), taken);
            seat
        };
        Seat { overtaken, _seat: seat.lock_owned().await }
    }

    /// Whether somebody has it.
    pub fn is_taken(&self, image: &str) -> bool {
        self.0.lock().get(image).is_some_and(|taken| taken.seat.strong_count() > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_gets_the_seat_when_the_one_before_has_risen() {
        let seats = Arc::new(Seats::default());
        let first = seats.take("ami-1").await;
        let _other = seats.take("ami-2").await;
        let take = |seats: &Arc<Seats>| {
            let seats = seats.clone();
            tokio::spawn(async move { seats.take("ami-1").await })
        };
        let second = take(&seats);
        first.overtaken().await;
        assert!(!second.is_finished(), "the first has not risen yet");
        drop(first);
        let second = second.await.unwrap();
        let third = take(&seats);
        second.overtaken().await;
        let fourth = take(&seats);
        drop(second);
        // Who was overtaken while it waited learns it when it gets the seat.
        third.await.unwrap().overtaken().await;
        let fourth = fourth.await.unwrap();
        assert!(!fourth.overtaken.is_cancelled() && seats.is_taken("ami-1"));
        drop(fourth);
        assert!(!seats.is_taken("ami-1") && seats.is_taken("ami-2"));
    }
}
