//! Finds the batch of a submit whose answer was lost, by the marker that its recipients carry.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::FutureExt as _;
use futures_util::stream::{self, StreamExt as _};
use reqwest::header::{DATE, HeaderMap};
use serde_json::value::RawValue;
use tokio::sync::{Semaphore, oneshot};
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

/// How many times the list is read at the same time: one that has to go far back need not hold up the
/// others.
const READINGS_AT_ONCE: usize = 4;

/// How many candidates are read at the same time.
const CANDIDATES_AT_ONCE: usize = 8;

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

/// What a look has come to. `Ok(None)` only where every batch that it could be was seen, and is not
/// it.
pub type Looked = Result<Option<Answer>, Arc<Error>>;

/// Looks for lost batches: many with one reading of the list, because an outage loses many answers
/// at once. Remembers of the other batches whose they are: a campaign may have hundreds with one
/// name, and each is asked for once.
pub struct Finder {
    vendor: Client,
    readings: Semaphore,
    candidates: Semaphore,
    waiting: Mutex<Vec<Look>>,
    known: Mutex<Known>,
}

/// A look: it waits for a reading of the list that begins after it.
struct Look {
    lost: Lost,
    age: Box<dyn Fn() -> Duration + Send>,
    /// The second, by the vendor's clock, from which on the batch can have been created.
    since: i64,
    /// Why a batch that it could be cannot be ruled out.
    inconclusive: Option<Arc<Error>>,
    tell: oneshot::Sender<Looked>,
}

impl Look {
    fn is_for(&self, listed: &Listed) -> bool {
        self.since <= listed.created_at_unix && self.lost.name.trim() == listed.name.trim()
    }

    /// The list says of a batch what a submit answers.
    fn adopt(self, raw: &RawValue) {
        let answer = Answer::read(raw.to_owned());
        self.tell(answer.map(Some).map_err(|reason| Arc::new(Error::unreadable(&reason))));
    }

    fn not_found(mut self) {
        let inconclusive = self.inconclusive.take();
        self.tell(inconclusive.map_or(Ok(None), Err));
    }

    fn tell(self, looked: Looked) {
        // Whoever has stopped looking need not know.
        drop(self.tell.send(looked));
    }
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
        Self {
            vendor,
            readings: Semaphore::new(READINGS_AT_ONCE),
            candidates: Semaphore::new(CANDIDATES_AT_ONCE),
            waiting: Mutex::default(),
            known: Mutex::default(),
        }
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
    /// asked when the vendor has said what time it is there. After an error, the next look need not
    /// ask again for what this one has learned.
    pub async fn look(
        self: &Arc<Self>,
        lost: &Lost,
        age: impl Fn() -> Duration + Send + 'static,
    ) -> Looked {
        let (tell, told) = oneshot::channel();
        let (lost, age) = (lost.clone(), Box::new(age));
        let agent_id = lost.agent_id.clone();
        self.waiting().push(Look { lost, age, since: i64::MIN, inconclusive: None, tell });
        let finder = Arc::clone(self);
        // Not in this task: whoever stops looking must not stop the others.
        #[expect(
            clippy::disallowed_methods,
            reason = "a read that a shutdown cuts off is no loss"
        )]
        tokio::spawn(async move {
            let _turn = finder.readings.acquire().await;
            finder.read_for(finder.take(&agent_id), &agent_id).await;
        });
        told.await.unwrap_or_else(|_| Err(Error::unreadable("reading it was broken off").into()))
    }

    /// Every look that waits for a reading of this agent's batches; none where an earlier reading has
    /// taken them.
    fn take(&self, agent_id: &str) -> Vec<Look> {
        self.waiting().extract_if(.., |look| look.lost.agent_id == agent_id).collect()
    }

    /// Reads the list once, and tells every look what that has come to.
    async fn read_for(&self, mut looks: Vec<Look>, agent_id: &str) {
        let error = self.read(&mut looks, agent_id).await.err().map(Arc::new);
        for mut look in looks {
            look.inconclusive = error.clone().or(look.inconclusive);
            look.not_found();
        }
    }

    /// Reads the list page by page. The looks that are over leave; those that remain at its end
    /// have not found theirs.
    async fn read(&self, looks: &mut Vec<Look>, agent_id: &str) -> Result<(), Error> {
        let mut cursor: Option<String> = None;
        for _ in 0..MAX_PAGES {
            looks.retain(|look| !look.tell.is_closed());
            if looks.is_empty() {
                return Ok(());
            }
            let (text, headers) = self.vendor.list(agent_id, cursor.as_deref()).await?;
            if cursor.is_none() {
                for look in looks.iter_mut() {
                    look.since = first_second(&headers, (look.age)());
                }
            }
            let page: Page<'_> = serde_json::from_str(&text)
                .map_err(|_| Error::unreadable("it is not a list of batches"))?;
            let read = |raw: &&'_ RawValue| serde_json::from_str(raw.get()).ok();
            let batches = page.batch_calls.iter().filter_map(|raw| Some((read(raw)?, *raw)));
            let batches: Vec<(Listed, &RawValue)> = batches.collect();
            self.search(looks, &batches).await;
            if batches.len() < page.batch_calls.len() {
                return Err(Error::unreadable("a batch in the list has no id, name or time"));
            }
            // One page that is too old as a whole ends a look: not every list is in perfect order.
            let newest = batches.iter().map(|(listed, _)| listed.created_at_unix).max();
            let past = |look: &mut Look| newest.is_some_and(|newest| newest < look.since);
            looks.extract_if(.., past).for_each(Look::not_found);
            if !page.has_more && page.next_doc.is_none() {
                return Ok(());
            }
            let next = page.next_doc.ok_or_else(|| Error::unreadable("it has no next_doc"))?;
            if cursor.as_ref() == Some(&next) {
                return Err(Error::unreadable("its next_doc leads back to it"));
            }
            cursor = Some(next);
        }
        Err(Error::unreadable("the list of batches goes on and on"))
    }

    /// Looks at those batches of a page that a look could be for.
    async fn search<'a>(&self, looks: &mut Vec<Look>, page: &'a [(Listed, &'a RawValue)]) {
        let lost: HashSet<u64> = looks.iter().map(|look| hash(&look.lost.command_id)).collect();
        let wanted = |(listed, _): &&(Listed, &RawValue)| {
            looks.iter().any(|look| look.is_for(listed)) && !self.is_others(&listed.id, &lost)
        };
        let candidates: Vec<_> = page.iter().filter(wanted).collect();
        let ask = |(listed, raw): &'a (Listed, &'a RawValue)| {
            let markers = self.markers(listed, &lost);
            async move { (listed, *raw, markers.await) }.boxed()
        };
        // Collected, because the compiler cannot see of a lazy one that it may change threads.
        let asked: Vec<_> = candidates.into_iter().map(ask).collect();
        let mut asked = stream::iter(asked).buffer_unordered(CANDIDATES_AT_ONCE);
        while !looks.is_empty()
            && let Some((listed, raw, markers)) = asked.next().await
        {
            match markers {
                Ok(command_ids) => {
                    let its = |look: &mut Look| command_ids.contains(&look.lost.command_id);
                    looks.extract_if(.., its).for_each(|look| look.adopt(raw));
                }
                Err(error) => {
                    let error = Arc::new(error);
                    for look in looks.iter_mut().filter(|look| look.is_for(listed)) {
                        look.inconclusive = Some(Arc::clone(&error));
                    }
                }
            }
        }
    }

    /// Whose the batch is; nobody's where it is known to be none of the lost. The proof is the
    /// marker alone: how many calls ElevenLabs counts is its own business.
    async fn markers(
        &self,
        listed: &Listed,
        lost: &HashSet<u64>,
    ) -> Result<BTreeSet<String>, Error> {
        // A batch with 10,000 recipients has megabytes, and a campaign many of them.
        let _turn = self.candidates.acquire().await;
        // Another reading may have learned it meanwhile.
        if self.is_others(&listed.id, lost) {
            return Ok(BTreeSet::new());
        }
        // One that could not be asked for is no other's on that ground.
        let id = BatchId::try_from(listed.id.clone())
            .map_err(|_| Error::unreadable("a batch in the list has an id of another form"))?;
        let batch = self.vendor.get(&id).await?.data;
        let small = batch.get().len() <= INLINE_BYTES;
        let read = move || {
            let marked = serde_json::from_str::<Marked>(batch.get()).ok()?;
            Some((marked.command_ids(), marked.recipients.len() as u64))
        };
        let read = if small { read() } else { spawn_blocking(read).await.ok().flatten() };
        let (command_ids, recipients) =
            read.ok_or_else(|| Error::unreadable("the recipients cannot be read"))?;
        let expected = listed.total_calls_scheduled.unwrap_or_default().max(1);
        if command_ids.is_empty() && recipients < expected {
            return Err(Error::unreadable("the batch does not have all of its recipients yet"));
        }
        // That there is none may change: what is listed may not be complete yet.
        if let (1, Some(command_id)) = (command_ids.len(), command_ids.first()) {
            self.note(&listed.id, command_id);
        }
        Ok(command_ids)
    }

    /// Whether a batch is known to be none of these commands'.
    fn is_others(&self, batch_id: &str, lost: &HashSet<u64>) -> bool {
        self.known().by_batch.get(batch_id).is_some_and(|marker| !lost.contains(marker))
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Look>> {
        // A look is in it as a whole or not at all.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
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
        let is_others = |id, of| finder.is_others(id, &HashSet::from([hash(of)]));
        assert!(!is_others("b", "c-1"), "nothing is known of it");
        finder.note("b", "c-2");
        assert!(is_others("b", "c-1"));
        assert!(!is_others("b", "c-2"));
        for n in 0..REMEMBERED {
            finder.note(&n.to_string(), "c");
        }
        assert!(!is_others("b", "c-1"), "the oldest are forgotten");
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
