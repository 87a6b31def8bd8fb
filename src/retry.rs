//! When to try again: exponential pace with jitter, `Retry-After`, and a horizon. The one place of
//! the `backoff` crate.

use std::time::{Duration, Instant};

use backoff::ExponentialBackoff;
use backoff::backoff::Backoff as _;

/// How long and how fast to retry.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// The first wait, before jitter.
    pub initial: Duration,
    /// The longest wait that is not asked for by `Retry-After`.
    pub max: Duration,
    /// No wait ends later than this after the first attempt; `None` retries for ever.
    pub horizon: Option<Duration>,
}

/// The pace of attempts at the vendor; the horizon is a setting.
pub const VENDOR: Policy =
    Policy { initial: Duration::from_millis(500), max: Duration::from_secs(10), horizon: None };

impl Policy {
    /// Starts the clock of one command (or of one connection).
    pub fn start(self) -> Schedule {
        Schedule {
            pace: ExponentialBackoff {
                current_interval: self.initial,
                initial_interval: self.initial,
                max_interval: self.max,
                multiplier: 2.0,
                randomization_factor: 0.5,
                // The crate would stop after 15 minutes by itself; the horizon decides here.
                max_elapsed_time: None,
                ..ExponentialBackoff::default()
            },
            policy: self,
            started: Instant::now(),
        }
    }
}

/// The waits of one command.
#[derive(Clone, Debug)]
pub struct Schedule {
    pace: ExponentialBackoff,
    policy: Policy,
    started: Instant,
}

impl Schedule {
    /// How long to wait before the next attempt, at least `retry_after`; `None` where that would
    /// end past the horizon.
    pub fn next_wait(&mut self, retry_after: Option<Duration>) -> Option<Duration> {
        self.wait_at(self.started.elapsed(), retry_after)
    }

    /// How much is left of the horizon; without one, for ever.
    pub fn remaining(&self) -> Duration {
        let elapsed = self.started.elapsed();
        self.policy.horizon.map_or(Duration::MAX, |horizon| horizon.saturating_sub(elapsed))
    }

    fn wait_at(&mut self, elapsed: Duration, retry_after: Option<Duration>) -> Option<Duration> {
        // The crate adds its jitter after the cap.
        let pace = self.pace.next_backoff()?.min(self.policy.max);
        let wait = pace.max(retry_after.unwrap_or_default());
        match self.policy.horizon {
            Some(horizon) if elapsed.saturating_add(wait) > horizon => None,
            _ => Some(wait),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: Policy = Policy {
        initial: Duration::from_millis(500),
        max: Duration::from_secs(10),
        horizon: Some(Duration::from_secs(60)),
    };

    #[test]
    fn waits_grow_and_never_pass_the_longest() {
        let mut schedule = POLICY.start();
        let waits: Vec<_> =
            (0..20).map(|_| schedule.wait_at(Duration::ZERO, None).unwrap()).collect();
        assert!(waits[0] <= Duration::from_millis(750), "{waits:?}");
        assert!(waits[19] >= Duration::from_secs(5), "{waits:?}");
        assert!(waits.iter().all(|wait| *wait <= POLICY.max), "{waits:?}");
    }

    #[test]
    fn retry_after_is_honoured_but_not_past_the_horizon() {
        let mut schedule = POLICY.start();
        let asked = Duration::from_secs(42);
        assert_eq!(schedule.wait_at(Duration::ZERO, Some(asked)), Some(asked));
        assert_eq!(schedule.wait_at(Duration::from_secs(19), Some(asked)), None);
        assert_eq!(schedule.wait_at(Duration::ZERO, Some(Duration::MAX)), None);
    }

    #[test]
    fn without_a_horizon_there_is_always_a_next_time() {
        let policy = Policy { horizon: None, ..POLICY };
        let mut schedule = policy.start();
        assert!(schedule.wait_at(Duration::from_secs(86_400), None).is_some());
    }
}
