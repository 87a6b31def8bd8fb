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
    /// No wait ends later than this after the first attempt, where the last one is; `None` retries
    /// for ever.
    pub horizon: Option<Duration>,
}

/// The pace of attempts at the vendor; the horizon is a setting.
pub const VENDOR: Policy =
    Policy { initial: Duration::from_millis(500), max: Duration::from_secs(10), horizon: None };

impl Policy {
    /// Starts the clock of one command (or of one connection).
    pub fn start(self) -> Schedule {
        self.start_aged(Duration::ZERO)
    }

    /// The same, of a command that is retried since `age`.
    pub fn start_aged(self, age: Duration) -> Schedule {
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
            before: age,
            started: Instant::now(),
        }
    }
}

/// The waits of one command.
#[derive(Clone, Debug)]
pub struct Schedule {
    pace: ExponentialBackoff,
    policy: Policy,
    /// How old it was when it was started.
    before: Duration,
    started: Instant,
}

impl Schedule {
    /// How long to wait before the next attempt, at least `retry_after`. The last one is at the
    /// horizon; `None` past it, and where `retry_after` ends past it.
    pub fn next_wait(&mut self, retry_after: Option<Duration>) -> Option<Duration> {
        self.wait_at(self.age(), retry_after)
    }

    /// How long it has been retried.
    pub fn age(&self) -> Duration {
        self.before.saturating_add(self.started.elapsed())
    }

    /// Of its policy; without one, for ever.
    pub fn horizon(&self) -> Duration {
        self.policy.horizon.unwrap_or(Duration::MAX)
    }

    /// How much is left of the horizon and `more`; without a horizon, for ever.
    pub fn remaining(&self, more: Duration) -> Duration {
        let horizon = self.policy.horizon;
        horizon.map_or(Duration::MAX, |horizon| (horizon + more).saturating_sub(self.age()))
    }

    fn wait_at(&mut self, age: Duration, retry_after: Option<Duration>) -> Option<Duration> {
        // The crate adds its jitter after the cap.
        let pace = self.pace.next_backoff()?.min(self.policy.max);
        let asked = retry_after.unwrap_or_default();
        let Some(horizon) = self.policy.horizon else { return Some(pace.max(asked)) };
        let left = horizon.saturating_sub(age);
        (!left.is_zero() && asked <= left).then(|| pace.min(left).max(asked))
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
    fn the_last_attempt_is_at_the_horizon() {
        let mut schedule = POLICY.start();
        let last = Duration::from_millis(100);
        assert_eq!(schedule.wait_at(Duration::from_millis(59_900), None), Some(last));
        assert_eq!(schedule.wait_at(Duration::from_secs(60), None), None);
        let aged = POLICY.start_aged(Duration::from_secs(59));
        assert!(aged.remaining(Duration::ZERO) <= Duration::from_secs(1));
        assert!(aged.remaining(Duration::from_secs(5)) > Duration::from_secs(5));
    }

    #[test]
    fn without_a_horizon_there_is_always_a_next_time() {
        let policy = Policy { horizon: None, ..POLICY };
        let mut schedule = policy.start();
        assert!(schedule.wait_at(Duration::from_secs(86_400), None).is_some());
    }
}
