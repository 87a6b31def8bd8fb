//! What a command brings along from earlier times in a worker's hands: the headers of a deferral.

use std::time::{Duration, SystemTime};

/// Numbers, all of them: Unix milliseconds, counts, and 1 for yes.
const FIRST_SEEN: &str = "x-call-manager-first-seen";
const RETRY_AT: &str = "x-call-manager-retry-at";
const ATTEMPTS: &str = "x-call-manager-attempts";
const IN_DOUBT: &str = "x-call-manager-in-doubt";
const DELIVERIES: &str = "x-call-manager-deliveries";
const MET_ROW: &str = "x-call-manager-met-row";
const EXPIRES_AT: &str = "x-call-manager-expires-at";

/// No worker counts so far; a producer may write anything.
const MOST: i64 = 1_000_000;

/// What is known of a command from before it was delivered this time. Only what comes from the worker's
/// own delay queues says it: anybody can write a header.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Earlier {
    /// When a worker had it in hand first; `None` the first time.
    pub first_seen: Option<SystemTime>,
    /// The vendor asked not to be called for it before.
    pub retry_at: Option<SystemTime>,
    /// Calls to the vendor, at most.
    pub attempts: u32,
    /// One of them gave no answer, and may have been done.
    pub in_doubt: bool,
    /// How often it came back to its queue without having been settled, before it was set aside.
    pub deliveries: u32,
    /// A ledger has a row of it. Where none is found, it is another ledger, and the row is lost.
    pub met_row: bool,
    /// It is not begun later than that: what is left of the property `expiration`, which no copy has.
    pub expires_at: Option<SystemTime>,
}

impl Earlier {
    /// Reads the headers.
    pub fn read(header: impl Fn(&str) -> Option<i64>) -> Self {
        let time = |name| {
            let millis = header(name).and_then(|millis| u64::try_from(millis).ok())?;
            SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(millis))
        };
        let count = |name| {
            let count = header(name).unwrap_or_default().clamp(0, MOST);
            u32::try_from(count).unwrap_or_default()
        };
        Self {
            first_seen: time(FIRST_SEEN).map(|seen| seen.min(SystemTime::now())),
            retry_at: time(RETRY_AT),
            attempts: count(ATTEMPTS),
            in_doubt: count(IN_DOUBT) > 0,
            deliveries: count(DELIVERIES),
            met_row: count(MET_ROW) > 0,
            expires_at: time(EXPIRES_AT),
        }
    }

    /// The headers that say it to whoever has the command next.
    pub fn headers(&self) -> Vec<(&'static str, i64)> {
        let millis = |time: SystemTime| {
            let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
        };
        let all = [
            (FIRST_SEEN, self.first_seen.map(millis)),
            (RETRY_AT, self.retry_at.map(millis)),
            (ATTEMPTS, Some(self.attempts.into())),
            (IN_DOUBT, self.in_doubt.then_some(1)),
            (DELIVERIES, (self.deliveries > 0).then_some(self.deliveries.into())),
            (MET_ROW, self.met_row.then_some(1)),
            (EXPIRES_AT, self.expires_at.map(millis)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }

    /// Whether a header is one of these.
    pub fn is_header(name: &str) -> bool {
        name.starts_with("x-call-manager-")
    }

    /// How long ago a worker had it in hand first; a clock that is behind counts as now.
    pub fn age(&self) -> Duration {
        self.first_seen.and_then(|seen| seen.elapsed().ok()).unwrap_or_default()
    }

    /// How long the vendor still asks not to be called for it.
    pub fn asked_to_wait(&self) -> Duration {
        let left = self.retry_at.and_then(|at| at.duration_since(SystemTime::now()).ok());
        left.unwrap_or_default()
    }

    /// Of a command that ended a time in hand without an answer, is `age` old by now, and is not to
    /// be called for before `wait` is over.
    pub fn deferred(age: Duration, wait: Duration, attempts: u32, in_doubt: bool) -> Self {
        let now = SystemTime::now();
        Self {
            first_seen: now.checked_sub(age).or(Some(now)),
            retry_at: now.checked_add(wait).filter(|_| !wait.is_zero()),
            attempts,
            in_doubt,
            // It came to its end without taking the worker along.
            deliveries: 0,
            ..Self::default()
        }
    }

    /// The same, set aside before it was begun because it came back `deliveries` times.
    #[must_use]
    pub fn set_aside(&self, deliveries: u32) -> Self {
        let first_seen = self.first_seen.or(Some(SystemTime::now()));
        Self { first_seen, deliveries, ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn carried(earlier: &Earlier) -> Earlier {
        let headers = earlier.headers();
        assert!(headers.iter().all(|(name, _)| Earlier::is_header(name)));
        Earlier::read(|name| headers.iter().find(|(other, _)| *other == name).map(|(_, v)| *v))
    }

    #[test]
    fn what_is_written_is_read_again() {
        let at = |millis| Some(SystemTime::UNIX_EPOCH + Duration::from_millis(millis));
        let earlier = Earlier {
            first_seen: at(1_700_000_000_123),
            retry_at: at(1_700_000_060_123),
            attempts: 7,
            in_doubt: true,
            deliveries: 3,
            met_row: true,
            expires_at: at(1_700_000_099_123),
        };
        assert_eq!(carried(&earlier), earlier);
        assert_eq!(carried(&Earlier::default()), Earlier::default());
    }

    #[test]
    fn nonsense_of_a_producer_counts_as_nothing_or_as_much() {
        let read = |value: i64| Earlier::read(|_| Some(value));
        assert_eq!(read(-1), Earlier::default());
        let much = read(i64::MAX);
        assert_eq!(much.attempts, 1_000_000);
        assert!(much.age() < Duration::from_secs(60), "seen in the future counts as now");
    }

    #[test]
    fn the_age_is_kept_and_a_time_in_hand_that_ended_well_clears_the_suspicion() {
        let minute = Duration::from_secs(60);
        let first = Earlier::deferred(minute, Duration::ZERO, 2, true).set_aside(5);
        assert_eq!((first.age().as_secs(), first.deliveries), (60, 5));
        let then = Earlier::deferred(first.age(), Duration::ZERO, 2, true);
        assert_eq!((then.age().as_secs(), then.retry_at), (60, None));
        assert_eq!((then.attempts, then.in_doubt, then.deliveries), (2, true, 0));
        let asked = Earlier::deferred(minute, minute, 3, true).asked_to_wait();
        assert!(asked > minute * 5 / 6, "{asked:?}");
    }
}
