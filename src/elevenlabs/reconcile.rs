//! Finds the batch of a submit whose answer was lost, by the marker that its recipients carry.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use reqwest::header::{DATE, HeaderMap};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use crate::domain::command::BatchId;

use super::client::{Answer, Client};
use super::error::Error;
use super::wire::{Listed, Marked, Page};

/// How far the list is read back beyond the first attempt: for the vendor's clock, whose machines
/// need not agree to the second.
const SLACK: Duration = Duration::from_secs(2 * 60);

/// The same where the list does not say what time it is there, and this machine's clock has to do.
const SLACK_OF_CLOCKS: Duration = Duration::from_secs(60 * 60);

/// How many pages of the list are read: 100,000 batches of one agent. Past that nothing is known.
const MAX_PAGES: usize = 1_000;

/// How many batches are remembered: some 3 MB.
const REMEMBERED: usize = 20_000;

/// How many candidates are read at the same time.
const AT_ONCE: usize = 8;

/// Larger batches are read off the reactor.
const INLINE_BYTES: usize = 256 * 1024;

/// What the lost batch is known by.
#[derive(Clone, Debug)]
pub struct Lost {
    /// `call_manager_command_id` of every recipient.
    pub command_id: String,
    /// The list is filtered by it.
    pub agent_id: String,
    /// `call_name`.
    pub name: String,
}

/// Looks for lost batches, and remembers of the others whose they are: a campaign may have hundreds
/// of batches with one name, and each is asked for once.
pub struct Finder {
    vendor: Client,
    turns: Semaphore,
    known: Mutex<Known>,
}

/// The newest batches whose marker is known. It never changes.
#[derive(Default)]
struct Known {
    /// A hash of the command id in the marker.
    by_batch: HashMap<Arc<str>, u64>,
    oldest: VecDeque<Arc<str>>,
}

impl Finder {
    /// A finder that knows nothing yet.
    pub fn new(vendor: Client) -> Self {
        Self { vendor, turns: Semaphore::new(AT_ONCE), known: Mutex::default() }
    }

    /// Whose a batch is, by its submit's answer or by its marker.
    pub fn note(&self, batch_id: &str, command_id: &str) {
        let batch_id: Arc<str> = batch_id.into();
        let mut known = self.known();
        if known.by_batch.insert(Arc::clone(&batch_id), hash(command_id)).is_none() {
            known.oldest.push_back(batch_id);
        }
        if known.oldest.len() > REMEMBERED
            && let Some(oldest) = known.oldest.pop_front()
        {
            known.by_batch.remove(&oldest);
        }
    }

    /// Looks once through the list, back to before the first attempt, which was `age` ago; that is
    /// asked when the vendor has said what time it is there.
    /// `Ok(None)` only where every batch that it could be was seen, and is not it. After an error,
    /// the next look need not ask again for what this one has learned.
    pub async fn look(
        &self,
        lost: &Lost,
        age: impl Fn() -> Duration,
    ) -> Result<Option<Answer>, Error> {
        let mut cursor: Option<String> = None;
        let mut since = None;
        let mut inconclusive = None;
        for _ in 0..MAX_PAGES {
            let (text, headers) = self.vendor.list(&lost.agent_id, cursor.as_deref()).await?;
            let since = *since.get_or_insert_with(|| first_second(&headers, age()));
            let page: Page<'_> = serde_json::from_str(&text)
                .map_err(|_| Error::unreadable("it is not a list of batches"))?;
            // One page that is too old as a whole ends the search: not every list is in perfect order.
            let mut too_old = !page.batch_calls.is_empty();
            for raw in &page.batch_calls {
                let listed: Listed = serde_json::from_str(raw.get()).map_err(|_| {
                    Error::unreadable("a batch in the list has no id, name or time")
                })?;
                if listed.created_at_unix < since {
                    continue;
                }
                too_old = false;
                if listed.name.trim() != lost.name.trim() {
                    continue;
                }
                match self.is_it(lost, &listed).await {
                    Ok(true) => {
                        // The list says of a batch what a submit answers.
                        let adopted = Answer::read((*raw).to_owned());
                        return adopted.map(Some).map_err(|reason| Error::unreadable(&reason));
                    }
                    Ok(false) => {}
                    Err(error) => inconclusive = Some(error),
                }
            }
            let more = page.has_more || page.next_doc.is_some();
            if too_old || !more {
                return inconclusive.map_or(Ok(None), Err);
            }
            let next = page.next_doc.ok_or_else(|| Error::unreadable("it has no next_doc"))?;
            if cursor.as_ref() == Some(&next) {
                return Err(Error::unreadable("its next_doc leads back to it"));
            }
            cursor = Some(next);
        }
        Err(Error::unreadable("the list of batches goes on and on"))
    }

    /// The proof is the marker alone: how many calls ElevenLabs counts is its own business.
    async fn is_it(&self, lost: &Lost, listed: &Listed) -> Result<bool, Error> {
        // A batch with 10,000 recipients has megabytes, and a campaign many of them.
        let _turn = self.turns.acquire().await;
        if self.is_anothers(&listed.id, &lost.command_id) {
            return Ok(false);
        }
        // One that could not be asked for is no other's on that ground.
        let id = BatchId::try_from(listed.id.clone())
            .map_err(|_| Error::unreadable("a batch in the list has an id of another form"))?;
        let batch = self.vendor.get(&id).await?.data;
        let small = batch.get().len() <= INLINE_BYTES;
        let read = move || serde_json::from_str::<Marked>(batch.get());
        let marked = if small { Ok(read()) } else { spawn_blocking(read).await };
        let marked = marked.ok().and_then(Result::ok);
        let marked = marked.ok_or_else(|| Error::unreadable("the recipients cannot be read"))?;
        let command_ids = marked.command_ids();
        let expected = listed.total_calls_scheduled.unwrap_or_default().max(1);
        if command_ids.is_empty() && (marked.recipients.len() as u64) < expected {
            return Err(Error::unreadable("the batch does not have all of its recipients yet"));
        }
        // That there is none may change: what is listed may not be complete yet.
        if let (1, Some(command_id)) = (command_ids.len(), command_ids.first()) {
            self.note(&listed.id, command_id);
        }
        Ok(command_ids.contains(lost.command_id.as_str()))
    }

    fn is_anothers(&self, batch_id: &str, command_id: &str) -> bool {
        let known = self.known().by_batch.get(batch_id).copied();
        known.is_some_and(|marker| marker != hash(command_id))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // What a panic elsewhere leaves half-done is asked for again.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Two that collide cost one look at a batch that is another's.
fn hash(command_id: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    command_id.hash(&mut hasher);
    hasher.finish()
}

/// The second, by the vendor's clock, from which on the batch can have been created.
fn first_second(headers: &HeaderMap, age: Duration) -> i64 {
    let date = headers.get(DATE).and_then(|value| value.to_str().ok());
    let (now, slack) = match date.and_then(|date| httpdate::parse_http_date(date).ok()) {
        Some(now) => (now, SLACK),
        None => (SystemTime::now(), SLACK_OF_CLOCKS),
    };
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.saturating_sub(age).saturating_sub(slack).as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;
    use crate::elevenlabs::Settings;

    fn finder() -> Finder {
        let settings = Settings {
            api_key: "k".into(),
            base_url: "http://127.0.0.1:9".parse().unwrap(),
            connect_timeout: Duration::from_secs(1),
            timeout: Duration::from_secs(2),
        };
        Finder::new(Client::new(&settings).unwrap())
    }

    #[test]
    fn a_batch_is_anothers_only_where_its_marker_is_known_to_be() {
        let finder = finder();
        assert!(!finder.is_anothers("b", "c-1"), "nothing is known of it");
        finder.note("b", "c-2");
        assert!(finder.is_anothers("b", "c-1"));
        assert!(!finder.is_anothers("b", "c-2"));
        for n in 0..REMEMBERED {
            finder.note(&n.to_string(), "c");
        }
        assert!(!finder.is_anothers("b", "c-1"), "the oldest are forgotten");
        assert_eq!(finder.known().by_batch.len(), REMEMBERED);
    }

    #[test]
    fn the_list_is_read_back_to_before_the_first_attempt_by_the_vendors_clock() {
        let mut headers = HeaderMap::new();
        headers.insert(DATE, HeaderValue::from_static("Thu, 01 Jan 1970 01:00:00 GMT"));
        assert_eq!(first_second(&headers, Duration::from_secs(60)), 3600 - 60 - 120);
        assert_eq!(first_second(&headers, Duration::MAX), 0);
        let by_our_clock = first_second(&HeaderMap::new(), Duration::ZERO);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        assert!(i64::try_from(now).unwrap() - by_our_clock >= 3600);
    }

    #[test]
    fn a_marker_is_found_on_any_recipient_and_nothing_else_is_taken_for_one() {
        let by = |json: &str| {
            serde_json::from_str::<Marked>(json).unwrap().command_ids().contains("c-1")
        };
        let recipient = |data: &str| {
            format!(
                r#"{{"recipients":[{{"id":"r"}},{{"conversation_initiation_client_data":{data}}}]}}"#
            )
        };
        assert!(by(&recipient(r#"{"dynamic_variables":{"x":1,"call_manager_command_id":"c-1"}}"#)));
        assert!(!by(&recipient(r#"{"dynamic_variables":{"call_manager_command_id":"c-12"}}"#)));
        assert!(!by(&recipient(r#"{"dynamic_variables":null}"#)));
        assert!(!by(&recipient("null")));
        assert!(!by(r#"{"recipients":[]}"#));
    }
}
