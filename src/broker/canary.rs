//! When to send a canary through the shortest delay queue, and when it is late.

use std::time::{Duration, Instant};

use super::topology::Delay;

/// Past its delay: a leader election, a broker that has much to do.
const PATIENCE: Duration = Duration::from_secs(20);

/// A canary lies where it is looked for for half a minute. Looks that are further apart may miss it.
const LONGEST_GAP: Duration = Duration::from_secs(20);

/// Before the second one; twice as long before each further one. The broker keeps what has no way out
/// of a delay queue, and 32 of those hold up everything behind them.
const SEND_AGAIN: Duration = Duration::from_secs(60);

/// Whether deferred commands come back.
#[derive(Debug, PartialEq)]
pub enum Deferral {
    /// A canary has.
    Works,
    /// A canary is on its way.
    Unknown,
    /// There is no queue for canaries, or none that the user may see.
    Unwatched,
    /// They do not; the reason, for a person.
    Stuck(String),
}

/// The canary of one generation. Any worker's will do: they share the delay queues.
#[derive(Debug, Default)]
pub(super) struct Canary {
    /// The first one that was not seen yet.
    sent: Option<Instant>,
    /// Past this, one more is sent.
    next: Option<Instant>,
    wait: Duration,
    looked: Option<Instant>,
}

impl Canary {
    /// After a look that found one or not: whether to send one, and whether it is late.
    pub(super) fn look(&mut self, is_back: bool, now: Instant) -> (bool, bool) {
        let since = |then: Option<Instant>| then.map(|then| now.duration_since(then));
        if since(self.looked.replace(now)).is_none_or(|gap| gap > LONGEST_GAP) || is_back {
            *self = Self { looked: Some(now), ..Self::default() };
        }
        if is_back {
            return (false, false);
        }
        let is_due = self.next.is_none_or(|next| next <= now);
        if is_due {
            self.wait = (self.wait * 2).max(SEND_AGAIN);
            self.next = now.checked_add(self.wait);
        }
        let sent = *self.sent.get_or_insert(now);
        (is_due, now.duration_since(sent) > Delay::Short.duration() + PATIENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of looks at these seconds.
    fn looks(canary: &mut Canary, begin: Instant, all: &[(u64, bool)]) -> Vec<(bool, bool)> {
        let at = |seconds| begin + Duration::from_secs(seconds);
        all.iter().map(|(seconds, is_back)| canary.look(*is_back, at(*seconds))).collect()
    }

    #[test]
    fn one_is_sent_when_none_is_there_and_is_late_when_no_look_has_found_it() {
        let (mut canary, begin) = (Canary::default(), Instant::now());
        let good = looks(&mut canary, begin, &[(0, false), (10, true), (20, true), (30, false)]);
        assert_eq!(good, [(true, false), (false, false), (false, false), (true, false)]);
        let late = looks(&mut canary, begin, &[(40, false), (50, false), (60, false), (70, false)]);
        assert_eq!(late, [(false, false), (false, false), (false, true), (false, true)]);
        let back = looks(&mut canary, begin, &[(80, true), (90, false), (100, false)]);
        assert_eq!(back, [(false, false), (true, false), (false, false)]);
    }

    #[test]
    fn what_the_broker_keeps_is_not_made_more_every_time() {
        let (mut canary, begin) = (Canary::default(), Instant::now());
        let a_day: Vec<_> = (0..8640).map(|look| (look * 10, false)).collect();
        let sent = looks(&mut canary, begin, &a_day).iter().filter(|(is_due, _)| *is_due).count();
        assert_eq!(sent, 11);
    }

    #[test]
    fn a_look_that_comes_too_late_to_find_it_proves_nothing() {
        let (mut canary, begin) = (Canary::default(), Instant::now());
        let paused = looks(&mut canary, begin, &[(0, false), (60, false), (70, true)]);
        assert_eq!(paused, [(true, false), (true, false), (false, false)]);
    }
}
