//! What a test can see of the sandbox from behind: its batches, and the requests it got.

use std::collections::VecDeque;
use std::time::Instant;

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::life::{BatchStatus, CallStatus};
use crate::route::Route;

/// A batch that was created at some time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Batch {
    /// The id the vendor gave it.
    pub id: String,
    /// The `call_name` it was submitted with.
    pub name: String,
    /// The agent it was submitted for.
    pub agent_id: String,
    /// The number it was submitted with.
    pub phone_number_id: Option<String>,
    /// Where it stands now.
    pub status: BatchStatus,
    /// How often it was retried.
    pub retry_count: u32,
    /// Whether somebody deleted it since.
    pub deleted: bool,
    /// When it was created, in seconds since 1970.
    pub created_at_unix: i64,
    /// When its calls begin, in seconds since 1970.
    pub scheduled_time_unix: i64,
    /// Whom it calls, in the order of the submit.
    pub recipients: Vec<Recipient>,
}

/// Somebody a batch calls.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recipient {
    /// The id that was submitted, or the one the vendor gave.
    pub id: String,
    /// The number that was submitted.
    pub phone_number: Option<String>,
    /// Where the call stands now.
    pub status: CallStatus,
    /// The dynamic variables that were submitted.
    pub dynamic_variables: Map<String, Value>,
}

/// A request to the vendor's part of the sandbox.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Request {
    /// `POST`, for example.
    pub method: String,
    /// The path with its query, as it was sent.
    pub path: String,
    /// Which operation that means; [`Route::Any`] for none.
    pub route: Route,
    /// The status that was answered, or none as long as nothing was (yet).
    pub status: Option<u16>,
    /// The fault the request took, by its name in JSON.
    pub fault: Option<String>,
    /// Whether the vendor did what was asked, or refused it, whatever the client saw.
    pub processed: bool,
    /// When it had come, to its last byte; not in JSON.
    #[serde(skip)]
    pub at: Instant,
    /// The body; a string where it is no JSON, null where there is none.
    pub body: Value,
}

/// How many requests the log keeps; the oldest go first.
const MAX_REQUESTS: usize = 100_000;
/// How many bytes of bodies it keeps.
const MAX_BODY_BYTES: usize = 256 * 1024 * 1024;

/// One request as the log keeps it: the body is parsed only when somebody looks.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) route: Route,
    pub(crate) status: Option<u16>,
    pub(crate) fault: Option<&'static str>,
    pub(crate) processed: bool,
    pub(crate) at: Instant,
    pub(crate) body: Bytes,
}

#[derive(Debug, Default)]
pub(crate) struct RequestLog {
    entries: VecDeque<Entry>,
    /// How many entries are gone already, so that a number stays valid.
    dropped: usize,
    body_bytes: usize,
}

impl RequestLog {
    /// Adds a request. The number it gives finds the entry again.
    pub(crate) fn push(&mut self, entry: Entry) -> usize {
        self.body_bytes += entry.body.len();
        self.entries.push_back(entry);
        while self.entries.len() > MAX_REQUESTS || self.body_bytes > MAX_BODY_BYTES {
            let Some(oldest) = self.entries.pop_front() else {
                break;
            };
            self.body_bytes -= oldest.body.len();
            self.dropped += 1;
        }
        self.dropped + self.entries.len() - 1
    }

    /// The entry, unless it is gone.
    pub(crate) fn entry(&mut self, number: usize) -> Option<&mut Entry> {
        self.entries.get_mut(number.checked_sub(self.dropped)?)
    }

    pub(crate) fn all(&self) -> Vec<Request> {
        self.entries.iter().map(Entry::request).collect()
    }
}

impl Entry {
    fn request(&self) -> Request {
        let body = if self.body.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&self.body)
                .unwrap_or_else(|_| String::from_utf8_lossy(&self.body).into())
        };
        Request {
            method: self.method.clone(),
            path: self.path.clone(),
            route: self.route,
            status: self.status,
            fault: self.fault.map(str::to_owned),
            processed: self.processed,
            at: self.at,
            body,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: usize, body: Bytes) -> Entry {
        Entry {
            method: "GET".to_owned(),
            path: path.to_string(),
            route: Route::Get,
            status: None,
            fault: None,
            processed: false,
            at: Instant::now(),
            body,
        }
    }

    #[test]
    fn the_log_forgets_the_oldest_and_still_finds_the_newest() {
        let mut log = RequestLog::default();
        let mut newest = 0;
        for number in 0..MAX_REQUESTS + 5 {
            newest = log.push(entry(number, Bytes::from_static(b"{}")));
        }
        assert_eq!(log.entries.len(), MAX_REQUESTS);
        assert_eq!(log.body_bytes, 2 * MAX_REQUESTS);
        assert_eq!(log.entry(newest).unwrap().path, (MAX_REQUESTS + 4).to_string());
        assert!(log.entry(4).is_none());
        assert_eq!(log.entry(5).unwrap().path, "5");
    }

    #[test]
    fn the_log_keeps_no_more_bytes_of_bodies_than_its_limit() {
        let mut log = RequestLog::default();
        let third = Bytes::from(vec![b'0'; MAX_BODY_BYTES / 3]);
        for number in 0..5 {
            log.push(entry(number, third.clone()));
        }
        assert_eq!(log.entries.len(), 3);
        assert_eq!(log.entries[0].path, "2");
        assert!(log.body_bytes <= MAX_BODY_BYTES);
    }
}
