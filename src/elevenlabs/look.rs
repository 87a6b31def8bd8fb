//! One look for a lost batch: what it has come to so far, and how far the list is read for it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use reqwest::header::{DATE, HeaderMap};
use serde_json::value::RawValue;
use tokio::sync::oneshot;

use super::client::Answer;
use super::error::Error;
use super::evidence::{Listed, SearchKey};
use super::reconcile::{Candidate, Looked, Seen};

/// How far the list is read back beyond the first attempt: for clocks that differ or were put back. It
/// only costs pages.
const SLACK: Duration = Duration::from_secs(60 * 60);

/// A batch that is older than all that are looked for by so much, in seconds, is past them: a time may be
/// that of another zone.
pub(super) const DAY: i64 = 24 * 60 * 60;

/// A list is in order all the same where its times differ by so little, in seconds.
const DISORDER: i64 = 60;

/// How many batches that may be the one are named. With more, nothing can be said.
const MOST_CANDIDATES: usize = 100;

/// A look: it waits for a reading of the list that begins after it.
pub(super) struct Look {
    pub(super) key: SearchKey,
    pub(super) age: Box<dyn Fn() -> Duration + Send>,
    /// The second, by the vendor's clock, from which on the batch can have been created.
    pub(super) since: i64,
    /// Why nothing can be said.
    pub(super) inconclusive: Option<Arc<Error>>,
    pub(super) undecided: Vec<Candidate>,
    /// What is left of the list is older.
    pub(super) is_past: bool,
    /// A batch was ruled out by what the list shows, without its marker having been read.
    pub(super) has_unread: bool,
    pub(super) tell: oneshot::Sender<Looked>,
}

/// Which batches a reading of the list looks at closely.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Depth {
    /// Those that the list does not rule out: what is there is found so, in general.
    Plausible,
    /// All that a marker could be in: a name, an agent or a time may be masked or changed.
    All,
}

impl Look {
    /// Before each reading: nothing of an earlier one may end it.
    pub(super) fn begin(&mut self) {
        self.is_past = false;
        self.has_unread = false;
        self.undecided.clear();
    }

    /// There is an end: a closer look would show nothing more.
    pub(super) fn is_decided(&self) -> bool {
        self.inconclusive.is_some() || !self.has_unread
    }

    /// Whether a batch that shows no marker may be the one.
    pub(super) fn is_for(&self, listed: &Listed) -> bool {
        !listed.is_anothers(&self.key, self.since)
    }

    pub(super) fn is_worth_reading(&self, listed: &Listed, depth: Depth) -> bool {
        match depth {
            Depth::Plausible => self.is_for(listed),
            Depth::All => listed.is_worth_reading(&self.key, self.since),
        }
    }

    /// The list says of a batch what a submit answers.
    pub(super) fn adopt(self, raw: &RawValue) {
        let answer = Answer::read(raw.to_owned());
        self.tell(answer.map(Seen::Batch).map_err(|reason| Arc::new(Error::unreadable(&reason))));
    }

    pub(super) fn not_found(mut self) {
        let undecided = std::mem::take(&mut self.undecided);
        let looked = match self.inconclusive.take() {
            Some(error) => Err(error),
            None if undecided.is_empty() => Ok(Seen::Absent),
            None => Ok(Seen::Undecided(undecided)),
        };
        self.tell(looked);
    }

    pub(super) fn doubt(&mut self, listed: &Listed, why: &str) {
        if self.undecided.len() < MOST_CANDIDATES {
            let (batch_id, why) = (listed.id.clone(), why.to_owned());
            self.undecided.push(Candidate { batch_id, why });
        } else {
            // Those that are not named may be the one.
            let why = format!("more than {MOST_CANDIDATES} batches may be the one");
            self.inconclusive = Some(Arc::new(Error::unreadable(&why)));
        }
    }

    pub(super) fn tell(self, looked: Looked) {
        // Whoever has stopped looking need not know.
        drop(self.tell.send(looked));
    }
}

/// In what order the list has come so far.
#[derive(Default)]
pub(super) struct Order {
    newest: Option<i64>,
    last: Option<i64>,
    is_broken: bool,
}

impl Order {
    pub(super) fn note(&mut self, listed: &Listed) {
        let Some(created) = listed.created_at() else { return };
        self.newest = self.newest.max(Some(created));
        self.is_broken |= self.last.is_some_and(|last| created > last + DISORDER);
        self.last = Some(created);
    }

    /// One time alone tells of no order.
    pub(super) fn is_newest_first(&self) -> bool {
        !self.is_broken && self.newest > self.last
    }
}

/// The second, by the vendor's clock, from which on the batch can have been created.
pub(super) fn first_second(headers: &HeaderMap, age: Duration) -> i64 {
    let date = headers.get(DATE).and_then(|value| value.to_str().ok());
    let date = date.and_then(|date| httpdate::parse_http_date(date).ok());
    // One that is ahead would hide the batch.
    let now = date.map_or_else(SystemTime::now, |date| date.min(SystemTime::now()));
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.saturating_sub(age).saturating_sub(SLACK).as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    #[test]
    fn the_list_is_read_back_to_before_the_first_attempt_by_the_vendors_clock() {
        let mut headers = HeaderMap::new();
        headers.insert(DATE, HeaderValue::from_static("Thu, 01 Jan 1970 02:00:00 GMT"));
        assert_eq!(first_second(&headers, Duration::from_secs(60)), 3600 - 60);
        assert_eq!(first_second(&headers, Duration::MAX), 0);
        let by_our_clock = first_second(&HeaderMap::new(), Duration::ZERO);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        assert!(i64::try_from(now).unwrap() - by_our_clock >= 3600);
    }
}
