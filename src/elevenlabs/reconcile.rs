//! Reads ElevenLabs' list for the batches of submits in doubt: many with one reading.

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use futures_util::stream::{self, StreamExt as _};
use serde_json::value::RawValue;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::spawn_blocking;

use crate::domain::command::{BatchId, marker};

use super::client::{Answer, Client};
use super::error::{Class, Error};
use super::evidence::{Judgement, Listed, SearchKey, Shown};
use super::lately::Lately;
use super::look::{DAY, Depth, Look, Order, first_second};
use super::wire::Page;

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

/// What a reading of the list has shown of a submit's batch.
#[derive(Debug)]
pub enum Seen {
    /// It exists: `data` is what the list says of it, which is what a submit answers.
    Batch(Answer),
    /// Every batch of that agent and time was seen, and ruled out by evidence against it.
    Absent,
    /// These may be it: there is evidence neither for them nor against them.
    Undecided(Vec<Candidate>),
}

/// A batch that may be the one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// ElevenLabs' id.
    pub batch_id: String,
    /// Why nobody can tell, for a person.
    pub why: String,
}

/// What has come of a reading. After an error nothing is known.
pub type Looked = Result<Seen, Arc<Error>>;

/// Looks for lost batches: many with one reading of the list, because an outage loses many answers
/// at once. Remembers of the other batches whose they are: a campaign may have hundreds with one
/// name, and each is asked for once.
pub struct Finder {
    pub(super) vendor: Client,
    readings: Semaphore,
    candidates: Semaphore,
    waiting: Mutex<Vec<Look>>,
    known: Mutex<Known>,
    lately: Mutex<Lately>,
}

/// The newest batches whose marker is known. It never changes.
#[derive(Default)]
struct Known {
    /// A hash of the marker.
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
            lately: Mutex::default(),
        }
    }

    /// Whose a batch is, by its submit's answer.
    pub fn note(&self, batch_id: &str, command_id: &str) {
        self.remember(batch_id, &marker(command_id));
    }

    /// Whether the answer to a submit may be about its batch: it has the agent or the name that was sent,
    /// nothing that contradicts, and is not known to be another command's.
    pub fn may_be_of(&self, answer: &Answer, key: &SearchKey) -> bool {
        let wanted = HashSet::from([hash(&marker(&key.command_id))]);
        let Ok(shown) = serde_json::from_str::<Listed>(answer.data.get()) else { return false };
        let says_something = shown.name.is_string() || shown.agent_id.is_string();
        says_something
            && !shown.is_anothers(key, i64::MIN)
            && !self.is_others(&answer.batch_id, &wanted)
    }

    fn remember(&self, batch_id: &str, marker: &str) {
        let batch_id: Arc<str> = batch_id.into();
        let mut known = self.known();
        let marker = hash(&marker.to_ascii_lowercase());
        if known.by_batch.insert(Arc::clone(&batch_id), marker).is_none() {
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
        key: &SearchKey,
        age: impl Fn() -> Duration + Send + 'static,
    ) -> Looked {
        let (tell, told) = oneshot::channel();
        let (key, age, agent_id) = (key.clone(), Box::new(age), key.agent_id.clone());
        let (since, inconclusive, undecided) = (i64::MIN, None, Vec::new());
        let (is_past, has_unread) = (false, false);
        let look = Look { key, age, since, inconclusive, undecided, is_past, has_unread, tell };
        self.waiting().push(look);
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
        self.waiting().extract_if(.., |look| look.key.agent_id == agent_id).collect()
    }

    /// Reads the list, once more and closely where that may show more, and tells every look what that
    /// has come to.
    async fn read_for(&self, mut looks: Vec<Look>, agent_id: &str) {
        for depth in [Depth::Plausible, Depth::All] {
            if let Err(error) = self.read(&mut looks, agent_id, depth).await {
                let error = Arc::new(error);
                for look in &mut looks {
                    look.inconclusive = Some(Arc::clone(&error));
                }
            }
            looks.extract_if(.., |look| look.is_decided()).for_each(Look::not_found);
        }
    }

    /// Reads the list page by page. The looks that have found theirs leave.
    async fn read(&self, looks: &mut Vec<Look>, agent_id: &str, depth: Depth) -> Result<(), Error> {
        let mut cursor: Option<String> = None;
        let mut order = Order::default();
        let (began, agent) = (Instant::now(), Arc::from(agent_id));
        let mut shown = HashSet::new();
        looks.iter_mut().for_each(Look::begin);
        for page in 0.. {
            if page == MAX_PAGES {
                return Err(Error::unreadable("the list of batches goes on and on"));
            }
            looks.retain(|look| !look.tell.is_closed());
            if looks.iter().all(|look| look.is_past) {
                break;
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
            self.search(looks, &batches, depth).await;
            if batches.len() < page.batch_calls.len() {
                return Err(Error::unreadable("a batch in the list has no id"));
            }
            for (listed, _) in &batches {
                order.note(listed);
                shown.insert(listed.id.clone());
            }
            self.note_shown(looks, &agent, &batches);
            // One page that is too old as a whole ends a look, where the newest came first so far.
            for look in looks.iter_mut().filter(|_| order.is_newest_first()) {
                let since = look.since.saturating_sub(DAY);
                look.is_past |= batches.iter().all(|(listed, _)| listed.is_older_than(since));
            }
            if !page.has_more && page.next_doc.is_none() {
                break;
            }
            let next = page.next_doc.ok_or_else(|| Error::unreadable("it has no next_doc"))?;
            if cursor.as_ref() == Some(&next) {
                return Err(Error::unreadable("its next_doc leads back to it"));
            }
            cursor = Some(next);
        }
        self.compare(looks, agent_id, &shown, began);
        Ok(())
    }

    /// Those that a later reading can be compared with: older ones are none of its business.
    fn note_shown(&self, looks: &[Look], agent_id: &Arc<str>, page: &[(Listed, &RawValue)]) {
        let since = looks.iter().map(|look| look.since).min();
        let mut lately = self.lately();
        for (listed, _) in page {
            if listed.created_at() >= since {
                lately.note(agent_id, listed);
            }
        }
    }

    /// A reading that leaves out what one before it has shown may leave out any other batch as well.
    fn compare(&self, looks: &mut [Look], agent_id: &str, shown: &HashSet<String>, began: Instant) {
        let Some(newest) = self.lately().newest_left_out(agent_id, shown, began) else { return };
        for look in looks.iter_mut().filter(|look| look.since <= newest) {
            let error = Error::unreadable("it leaves out a batch that it has shown before");
            look.inconclusive = Some(Arc::new(error));
        }
    }

    /// Looks at those batches of a page that a look could be for.
    async fn search<'a>(
        &self,
        looks: &mut Vec<Look>,
        page: &'a [(Listed, &'a RawValue)],
        depth: Depth,
    ) {
        let wanted: HashSet<u64> =
            looks.iter().map(|look| hash(&marker(&look.key.command_id))).collect();
        for look in looks.iter_mut() {
            look.has_unread |= page.iter().any(|(listed, _)| {
                look.is_worth_reading(listed, Depth::All)
                    && !look.is_worth_reading(listed, depth)
                    && !self.is_others(&listed.id, &wanted)
            });
        }
        let candidates = page.iter().filter(|(listed, _)| {
            looks.iter().any(|look| look.is_worth_reading(listed, depth))
                && !self.is_others(&listed.id, &wanted)
        });
        let ask = |(listed, raw): &'a (Listed, &'a RawValue)| {
            let shown = self.shown(listed, &wanted);
            async move { (listed, *raw, shown.await) }.boxed()
        };
        // Collected, because the compiler cannot see of a lazy one that it may change threads.
        let asked: Vec<_> = candidates.map(ask).collect();
        let mut asked = stream::iter(asked).buffer_unordered(CANDIDATES_AT_ONCE);
        while !looks.is_empty()
            && let Some((listed, raw, shown)) = asked.next().await
        {
            match shown {
                Ok(Sight::Others) => {}
                Ok(Sight::Shown(shown)) => judge(looks, listed, raw, &shown),
                Ok(Sight::Hidden(why)) => {
                    for look in looks.iter_mut().filter(|look| look.is_for(listed)) {
                        look.doubt(listed, why);
                    }
                }
                Err(error) => {
                    let error = Arc::new(error);
                    let wants = |look: &&mut Look| look.is_worth_reading(listed, depth);
                    for look in looks.iter_mut().filter(wants) {
                        look.inconclusive = Some(Arc::clone(&error));
                    }
                }
            }
        }
    }

    /// What the recipients of a batch show.
    async fn shown(&self, listed: &Listed, wanted: &HashSet<u64>) -> Result<Sight, Error> {
        // A batch with 10,000 recipients has megabytes, and a campaign many of them.
        let _turn = self.candidates.acquire().await;
        // Another reading may have learned it meanwhile.
        if self.is_others(&listed.id, wanted) {
            return Ok(Sight::Others);
        }
        // One that could not be asked for is no other's on that ground.
        let Ok(id) = BatchId::try_from(listed.id.clone()) else {
            return Ok(Sight::Hidden("its id has a form that cannot be asked for"));
        };
        let batch = match self.vendor.get(&id).await {
            Ok(answer) => answer.data,
            Err(error) if error.class() == Class::Refused => {
                return Ok(Sight::Hidden("it is in the list, and cannot be read"));
            }
            Err(error) => return Err(error),
        };
        let small = batch.get().len() <= INLINE_BYTES;
        let read = move || Shown::read(batch.get());
        let read = if small { read() } else { spawn_blocking(read).await.ok().flatten() };
        let shown = read.ok_or_else(|| Error::unreadable("the recipients cannot be read"))?;
        // That there is none may change: what is listed may not be complete yet.
        if let Some(owner) = shown.owner() {
            self.remember(&listed.id, owner);
        }
        Ok(Sight::Shown(shown))
    }

    /// Whether a batch is known to be none of these commands'.
    fn is_others(&self, batch_id: &str, wanted: &HashSet<u64>) -> bool {
        self.known().by_batch.get(batch_id).is_some_and(|marker| !wanted.contains(marker))
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Look>> {
        // A look is in it as a whole or not at all.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lately(&self) -> MutexGuard<'_, Lately> {
        // Each change is one step, so a panic elsewhere leaves none half-done.
        self.lately.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // What a panic elsewhere leaves half-done is asked for again.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What can be seen of one batch.
enum Sight {
    Shown(Shown),
    /// It is known to be another command's.
    Others,
    /// Nothing, for this reason.
    Hidden(&'static str),
}

/// Whose batch it is, of those who look.
fn judge(looks: &mut Vec<Look>, listed: &Listed, raw: &RawValue, shown: &Shown) {
    let ours = |look: &mut Look| shown.judge(&look.key) == Judgement::Ours;
    looks.extract_if(.., ours).for_each(|look| look.adopt(raw));
    for look in looks.iter_mut().filter(|look| look.is_for(listed)) {
        if shown.judge(&look.key) == Judgement::Undecided {
            look.doubt(
                listed,
                "its recipients show neither a marker that can be read nor a number of others",
            );
        }
    }
}

/// Two that collide cost one look at a batch that is another's.
fn hash(marker: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    marker.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
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
        let is_others = |id, of| finder.is_others(id, &HashSet::from([hash(&marker(of))]));
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
}
