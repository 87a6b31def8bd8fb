//! One time that a command is in hand: whether it may call the vendor, waits a moment, goes to a
//! delay queue, or has waited long enough.

use std::ops::ControlFlow::{self, Break, Continue};
use std::time::{Duration, Instant, SystemTime};

use crate::domain::Earlier;
use crate::domain::command::CommandKind;
use crate::elevenlabs::State;
use crate::retry::{Policy, Schedule};

/// How long a command waits in hand when it is there for the first time: what passes quickly needs
/// no delay queue. The broker takes back what is held for 30 minutes.
const IN_HAND: Duration = Duration::from_secs(10);

/// No wait shorter than the shortest delay queue is worth a delay queue.
pub const SHORTEST_DELAY: Duration = Duration::from_secs(2);

/// The clocks of one command.
pub struct Turn {
    /// Its horizon counts from when a worker had the command in hand first.
    schedule: Schedule,
    in_hand_until: Instant,
    /// `not_after`.
    deadline: Option<SystemTime>,
    earlier: Earlier,
}

/// Whether a command may call the vendor.
#[derive(Debug, PartialEq)]
pub enum Clearance {
    /// Yes, now.
    Call,
    /// Not while the command is in hand.
    Defer(Deferral),
    /// It is not worth doing any more.
    Expired,
    /// The horizon is over and the vendor is not to be asked: it said so.
    NoMore(String),
    /// The worker is stopping.
    Stopped,
}

/// The same; [`Continue`]: not yet, wait so long at most, or until the breaker changes, and ask again.
pub type May = ControlFlow<Clearance, Duration>;

/// What follows an attempt that has to be repeated.
#[derive(Debug, PartialEq)]
pub enum Next {
    /// Wait so long, and try again.
    Wait(Duration),
    /// The wait is too long for a command in hand.
    Defer(Deferral),
    /// The horizon is over.
    Over,
}

/// How long a command leaves the worker's hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deferral {
    /// About so long.
    pub wait: Duration,
    /// The vendor asks not to be called before.
    pub asked: Duration,
    /// How long it has been retried by now, as it counts for the horizon.
    pub age: Duration,
}

impl Turn {
    /// Begins a command's time in hand.
    pub fn begin(policy: Policy, earlier: Earlier, deadline: Option<SystemTime>) -> Self {
        let in_hand = if earlier.first_seen.is_none() { IN_HAND } else { Duration::ZERO };
        Self {
            schedule: policy.start_aged(earlier.age()),
            in_hand_until: Instant::now() + in_hand,
            deadline,
            earlier,
        }
    }

    /// What it brought along.
    pub fn earlier(&self) -> &Earlier {
        &self.earlier
    }

    /// Its row was seen: whoever has the command next knows that there is one.
    pub fn meet_row(&mut self) {
        self.earlier.met_row = true;
    }

    /// `not_after` has passed.
    pub fn has_expired(&self) -> bool {
        self.deadline.is_some_and(|deadline| deadline < SystemTime::now())
    }

    /// How much is left of the horizon and `more`.
    pub fn remaining(&self, more: Duration) -> Duration {
        self.schedule.remaining(more)
    }

    /// How long the command may still wait in hand.
    pub fn left_in_hand(&self) -> Duration {
        self.in_hand_until.saturating_duration_since(Instant::now())
    }

    /// Has to say [`Clearance::Call`] immediately before each call.
    pub fn may_call(&self, kind: CommandKind, vendor: &State) -> May {
        if self.has_expired() {
            Break(Clearance::Expired)
        } else {
            self.may_look(kind, vendor, Duration::ZERO)
        }
    }

    /// The same for a read that tells what came of an earlier call, whatever time it is, until the
    /// horizon and `more`.
    pub fn may_look(&self, kind: CommandKind, vendor: &State, more: Duration) -> May {
        let in_hand = self.left_in_hand();
        let asked = self.earlier.asked_to_wait();
        let left = self.remaining(more);
        // Nobody asks for more than the horizon but a producer who makes it up.
        if !asked.is_zero() && asked <= left {
            let fits = asked <= in_hand;
            return if fits {
                Continue(asked)
            } else {
                Break(Clearance::Defer(self.deferral(asked)))
            };
        }
        if vendor.lets_through(kind) {
            return Break(Clearance::Call);
        }
        let deferral = self.deferral(Duration::ZERO);
        let (wait, deferral) = match vendor {
            State::Closed | State::HalfOpen => (in_hand, deferral),
            // Nobody's campaign fails because somebody changed a key.
            State::Open(outage) if outage.is_about_the_key() => {
                (in_hand, self.patient_deferral(Duration::ZERO))
            }
            State::Open(outage) if left.is_zero() && !outage.asks_for().is_zero() => {
                return Break(Clearance::NoMore(outage.reason.clone()));
            }
            // Nothing is given up without a last attempt of its own.
            State::Open(_) if left.is_zero() => return Break(Clearance::Call),
            State::Open(_) => (in_hand.min(left), deferral),
        };
        if wait.is_zero() { Break(Clearance::Defer(deferral)) } else { Continue(wait) }
    }

    /// After an attempt that has to be repeated.
    pub fn next(&mut self, retry_after: Option<Duration>) -> Next {
        let Some(wait) = self.schedule.next_wait(retry_after) else { return Next::Over };
        let soon = wait <= SHORTEST_DELAY && self.remaining(Duration::ZERO) <= SHORTEST_DELAY;
        if soon || wait <= self.left_in_hand() {
            Next::Wait(wait)
        } else {
            Next::Defer(self.deferral(retry_after.unwrap_or_default()))
        }
    }

    /// Out of hand for a quarter of the time it has waited by now: that is exponential too, and what
    /// waited for a short outage is back soon after it. Not past the horizon, but for what the vendor
    /// asks.
    pub fn deferral(&self, asked: Duration) -> Deferral {
        let left = self.remaining(Duration::ZERO);
        let left = if left.is_zero() { Duration::MAX } else { left };
        let age = self.schedule.age();
        let wait = (age / 4).min(left).max(SHORTEST_DELAY).max(asked);
        Deferral { wait, asked, age }
    }

    /// The same where it waits for a person or for the ledger: half of the horizon is left for what
    /// comes then.
    pub fn patient_deferral(&self, asked: Duration) -> Deferral {
        let deferral = self.deferral(asked);
        let age = deferral.age.min(self.schedule.horizon() / 2);
        Deferral { age, ..deferral }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elevenlabs::{Breaker, Error};

    const POLICY: Policy = Policy {
        initial: Duration::from_millis(500),
        max: Duration::from_secs(10),
        horizon: Some(Duration::from_secs(900)),
    };

    fn seen(ago: u64) -> Earlier {
        let first_seen = SystemTime::now().checked_sub(Duration::from_secs(ago));
        Earlier { first_seen, ..Earlier::default() }
    }

    fn turn(earlier: Earlier) -> Turn {
        Turn::begin(POLICY, earlier, None)
    }

    fn open(status: u16, retry_after: Option<u64>) -> State {
        let breaker = Breaker::default();
        let message = "x".to_owned();
        let (retry_after, request_id) = (retry_after.map(Duration::from_secs), None);
        breaker.open(&match status {
            401 => Error::Refused { status, message, request_id },
            429 => Error::RateLimited { message, retry_after, request_id },
            _ => Error::Inconclusive { status, message, retry_after, request_id },
        });
        breaker.watch().borrow().clone()
    }

    fn is_deferred(may: &May) -> bool {
        matches!(may, Break(Clearance::Defer(_)))
    }

    #[test]
    fn during_an_outage_a_fresh_command_waits_a_moment_and_a_returned_one_goes_back() {
        let fresh = turn(Earlier::default()).may_call(CommandKind::Submit, &open(503, None));
        assert!(matches!(fresh, Continue(wait) if wait > Duration::from_secs(9)), "{fresh:?}");
        assert!(is_deferred(&turn(seen(20)).may_call(CommandKind::Submit, &open(503, None))));
    }

    #[test]
    fn past_the_horizon_there_is_one_more_attempt_unless_the_vendor_asks_for_time() {
        let old = || turn(seen(901));
        assert_eq!(old().may_call(CommandKind::Get, &open(503, None)), Break(Clearance::Call));
        let asked = old().may_call(CommandKind::Get, &open(503, Some(100)));
        assert!(matches!(asked, Break(Clearance::NoMore(_))), "{asked:?}");
        assert_eq!(old().next(None), Next::Over);
    }

    #[test]
    fn what_waits_for_a_key_waits_past_every_horizon() {
        let may = turn(seen(90_000)).may_call(CommandKind::Submit, &open(401, None));
        let half = Duration::from_secs(450);
        assert!(matches!(may, Break(Clearance::Defer(d)) if d.age == half), "{may:?}");
    }

    #[test]
    fn half_open_or_under_a_rate_limit_only_cancels_go() {
        for state in [State::HalfOpen, open(429, Some(100))] {
            let may = |kind| turn(Earlier::default()).may_call(kind, &state);
            assert_eq!(may(CommandKind::Cancel), Break(Clearance::Call));
            assert!(matches!(may(CommandKind::Get), Continue(_)));
        }
    }

    #[test]
    fn a_command_is_not_called_for_before_the_vendor_said_or_after_its_time() {
        let retry_at = SystemTime::now().checked_add(Duration::from_secs(50));
        let asked = turn(Earlier { retry_at, ..seen(60) });
        let may = asked.may_call(CommandKind::Get, &State::Closed);
        assert!(
            matches!(may, Break(Clearance::Defer(d)) if d.wait > Duration::from_secs(40)),
            "{may:?}"
        );
        let past = SystemTime::now().checked_sub(Duration::from_secs(1));
        let late = Turn::begin(POLICY, Earlier::default(), past);
        assert_eq!(late.may_call(CommandKind::Submit, &State::Closed), Break(Clearance::Expired));
    }

    #[test]
    fn the_longer_it_has_waited_the_longer_it_leaves_but_not_past_the_horizon() {
        let wait = |ago| turn(seen(ago)).deferral(Duration::ZERO).wait.as_secs();
        assert_eq!([wait(0), wait(2), wait(40), wait(400)], [2, 2, 10, 100]);
        assert!(wait(890) <= 10, "{}", wait(890));
        assert_eq!(wait(2_000), 500);
        let next = turn(seen(899)).next(None);
        assert!(matches!(next, Next::Wait(_)), "the last attempt is at the horizon: {next:?}");
        assert!(matches!(turn(seen(60)).next(None), Next::Defer(_)));
        assert!(matches!(turn(Earlier::default()).next(None), Next::Wait(_)));
    }
}
