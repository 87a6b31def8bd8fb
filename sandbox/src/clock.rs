//! Two clocks: the wall's, for what a client waits for, and batch life, which runs at its own speed.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

#[derive(Debug)]
pub(crate) struct Clock {
    started: Instant,
    speed: f64,
    by_hand: Duration,
}

impl Clock {
    /// `speed` is seconds of batch life per second; what is no such number counts as 0.
    pub(crate) fn new(speed: f64) -> Self {
        let speed = if speed.is_finite() { speed.max(0.0) } else { 0.0 };
        Self { started: Instant::now(), speed, by_hand: Duration::ZERO }
    }

    pub(crate) fn advance(&mut self, by: Duration) {
        self.by_hand = self.by_hand.saturating_add(by);
    }

    /// Batch life since the start.
    pub(crate) fn life(&self) -> Duration {
        let moved = self.started.elapsed().as_secs_f64() * self.speed;
        Duration::try_from_secs_f64(moved).unwrap_or(Duration::MAX).saturating_add(self.by_hand)
    }

    /// Wall time since the start, moved forward by hand like batch life.
    pub(crate) fn wall(&self) -> Duration {
        self.started.elapsed().saturating_add(self.by_hand)
    }
}

/// The wall clock's time, in whole seconds since 1970.
pub(crate) fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
