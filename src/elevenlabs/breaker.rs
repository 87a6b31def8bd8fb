//! Notices from the outcomes of calls that the vendor cannot be used, and says so until it can.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::domain::command::CommandKind;

use super::error::{Class, Error};

/// The longest time that all commands are kept waiting because one answer asked for it. A probe after
/// that is but a read.
const LONGEST_ASKED: Duration = Duration::from_secs(10 * 60);

/// Whether the vendor can be used, in the usual words: closed is good.
#[derive(Clone, Debug)]
pub enum State {
    /// Calls go out.
    Closed,
    /// It answers again: cancels go first, the rest waits a moment.
    HalfOpen,
    /// Nothing goes out but reads that ask whether it is over.
    Open(Outage),
}

impl State {
    /// Whether such a command may go.
    pub fn lets_through(&self, kind: CommandKind) -> bool {
        match self {
            Self::Closed => true,
            Self::HalfOpen => kind == CommandKind::Cancel,
            // A limit on submits must not go on calling people who should be left alone.
            Self::Open(outage) => kind == CommandKind::Cancel && outage.class == Class::RateLimited,
        }
    }
}

/// Why the vendor cannot be used.
#[derive(Clone, Debug)]
pub struct Outage {
    /// Of the failures that told.
    pub class: Class,
    /// The last one, for a person.
    pub reason: String,
    /// Until when the vendor asks to be left alone.
    retry_at: Option<Instant>,
}

impl Outage {
    fn of(error: &Error) -> Self {
        Self {
            class: error.class(),
            reason: error.to_string(),
            retry_at: error.retry_after().map(|wait| Instant::now() + wait.min(LONGEST_ASKED)),
        }
    }

    /// How long the vendor still asks to be left alone.
    pub fn asks_for(&self) -> Duration {
        self.retry_at.map(|at| at.saturating_duration_since(Instant::now())).unwrap_or_default()
    }

    /// The key is refused: that ends when a person ends it, and what waits for it is not failed.
    pub fn is_about_the_key(&self) -> bool {
        self.class == Class::Unauthorized
    }
}

/// How many failures in a row, of whichever calls, say that it is not one command's own.
const fn limit(class: Class) -> u32 {
    match class {
        Class::NeverSent => 3,
        Class::RateLimited | Class::Unknown => 5,
        // The answers of a vendor that works; a refused key is found out by a probe.
        Class::Refused | Class::Unauthorized | Class::Account => u32::MAX,
    }
}

/// One per vendor; every call reports to it.
#[derive(Debug)]
pub struct Breaker {
    state: watch::Sender<State>,
    /// In a row.
    failures: AtomicU32,
}

impl Default for Breaker {
    fn default() -> Self {
        Self { state: watch::Sender::new(State::Closed), failures: AtomicU32::new(0) }
    }
}

impl Breaker {
    /// Follows the state.
    pub fn watch(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// What came of a call.
    pub(super) fn record<T>(&self, result: &Result<T, Error>) {
        let Err(error) = result else {
            self.failures.store(0, Ordering::Relaxed);
            return;
        };
        let class = error.class();
        if matches!(class, Class::Refused | Class::Unauthorized | Class::Account) {
            self.failures.store(0, Ordering::Relaxed);
            return;
        }
        let failures = self.failures.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let asked = error.retry_after().is_some_and(|wait| !wait.is_zero());
        self.state.send_if_modified(|state| {
            let limit = match state {
                State::Closed | State::HalfOpen if asked => 1,
                State::Closed => limit(class),
                // It has just answered: cancels that fail must not keep everything else waiting.
                State::HalfOpen => return false,
                State::Open(outage) => {
                    // The longest wait asked for counts, whoever was asked.
                    let retry_at = Outage::of(error).retry_at.max(outage.retry_at);
                    let longer = retry_at != outage.retry_at;
                    outage.retry_at = retry_at;
                    return longer;
                }
            };
            if failures < limit {
                return false;
            }
            *state = State::Open(Outage::of(error));
            true
        });
    }

    /// Opens it, or says why it stays open.
    pub fn open(&self, error: &Error) {
        self.state.send_modify(|state| {
            let mut outage = Outage::of(error);
            if let State::Open(before) = state {
                outage.retry_at = outage.retry_at.max(before.retry_at);
                // That it cannot be asked now does not mean that the key is good.
                if before.is_about_the_key() {
                    outage.class = before.class;
                }
            }
            *state = State::Open(outage);
        });
    }

    /// The vendor answers: cancels may go.
    pub fn half_open(&self) {
        self.failures.store(0, Ordering::Relaxed);
        self.state.send_replace(State::HalfOpen);
    }

    /// Everything may go, unless it has opened again meanwhile.
    pub fn close(&self) {
        self.state.send_if_modified(|state| {
            let half_open = matches!(state, State::HalfOpen);
            if half_open {
                self.failures.store(0, Ordering::Relaxed);
                *state = State::Closed;
            }
            half_open
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(status: u16, retry_after: Option<u64>) -> Result<(), Error> {
        let retry_after = retry_after.map(Duration::from_secs);
        let message = "x".to_owned();
        Err(match status {
            429 => Error::RateLimited { message, retry_after, request_id: None },
            400..=499 => Error::Refused { status, message, request_id: None },
            _ => Error::Inconclusive { status, message, retry_after, request_id: None },
        })
    }

    fn is_open(breaker: &Breaker) -> bool {
        matches!(*breaker.watch().borrow(), State::Open(_))
    }

    #[test]
    fn failures_in_a_row_open_it_and_an_answer_in_between_does_not() {
        let breaker = Breaker::default();
        for _ in 0..4 {
            breaker.record(&failed(503, None));
        }
        breaker.record(&Ok::<_, Error>(()));
        for _ in 0..4 {
            breaker.record(&failed(503, None));
        }
        breaker.record(&failed(404, None));
        for _ in 0..4 {
            breaker.record(&failed(503, None));
        }
        assert!(!is_open(&breaker));
        breaker.record(&failed(503, None));
        assert!(is_open(&breaker));
    }

    #[test]
    fn a_vendor_that_asks_for_time_gets_it_at_once_and_the_longest_it_asked_for() {
        let breaker = Breaker::default();
        breaker.record(&failed(429, Some(0)));
        assert!(!is_open(&breaker), "no time was asked for");
        breaker.record(&failed(429, Some(100)));
        breaker.record(&failed(503, Some(3)));
        breaker.record(&failed(503, None));
        let State::Open(outage) = breaker.watch().borrow().clone() else { panic!("it is open") };
        assert!(outage.asks_for() > Duration::from_secs(90), "{outage:?}");
        assert_eq!(outage.class, Class::RateLimited);
    }

    #[test]
    fn only_a_longer_time_is_news_while_it_is_open() {
        let breaker = Breaker::default();
        breaker.record(&failed(429, Some(100)));
        let mut watch = breaker.watch();
        watch.mark_unchanged();
        breaker.record(&failed(503, Some(3)));
        breaker.record(&failed(503, None));
        assert!(!watch.has_changed().unwrap());
        breaker.record(&failed(503, Some(200)));
        assert!(watch.has_changed().unwrap());
    }

    #[test]
    fn cancels_that_fail_half_open_do_not_keep_it_open_but_a_time_that_is_asked_for_does() {
        let breaker = Breaker::default();
        breaker.half_open();
        for _ in 0..9 {
            breaker.record(&failed(500, None));
            breaker.record(&failed(401, None));
        }
        assert!(!is_open(&breaker));
        breaker.record(&failed(503, Some(u64::from(u32::MAX))));
        assert!(is_open(&breaker));
        let State::Open(outage) = breaker.watch().borrow().clone() else { panic!("it is open") };
        assert!(outage.asks_for() <= LONGEST_ASKED, "{outage:?}");
        breaker.close();
        assert!(is_open(&breaker), "only what was half open closes");
        breaker.half_open();
        breaker.close();
        assert!(matches!(*breaker.watch().borrow(), State::Closed));
    }
}
