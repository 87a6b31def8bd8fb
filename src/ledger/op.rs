//! What can be done to the row of one submit: pure, the same for every store.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::row::{
    Batch, History, Hold, LONG_AGO, Millis, Row, Settled, State, after, before, between,
};

/// What a claim says of the message that it is made for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Body {
    /// Of its value.
    pub fingerprint: Uuid,
    /// Of its raw bytes.
    pub hash: Uuid,
    /// What the submit is finished with when its message does not come back, as JSON.
    pub origin: Arc<str>,
}

/// Something to do with one row.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Take it in hand.
    Claim {
        /// `None`: to finish what is there, without a message.
        body: Option<Body>,
        /// Of this claim alone.
        token: Uuid,
        /// Who claims. One worker has no two live claims of one submit.
        worker: Uuid,
        /// How long nobody else may take it.
        lease: Duration,
        /// The longest request, and the key it is made with: a fresh claim covers the first one.
        send: Dispatch,
        /// The message says that somebody may have begun it, whatever this ledger knows.
        doubt: bool,
    },
    /// Keep it in hand.
    Renew {
        /// The claim.
        token: Uuid,
        /// From now on.
        lease: Duration,
        /// How often ElevenLabs was called, this time included.
        attempts: u32,
        /// What for.
        purpose: Purpose,
    },
    /// Record how it ended.
    Settle {
        /// The claim.
        token: Uuid,
        /// How.
        end: End,
    },
    /// Let go of it.
    Release {
        /// The claim.
        token: Uuid,
        /// A request may have left: whoever comes next has to search for its batch first.
        may_have_left: bool,
        /// How often ElevenLabs was called.
        attempts: u32,
    },
    /// Record how it ended, unless somebody has it in hand.
    Condemn {
        /// Who asks. What it had in hand itself it has not any more.
        worker: Uuid,
        /// Hash of the message's raw bytes.
        body: Uuid,
        /// The message says that somebody may have begun it, whatever this ledger knows.
        doubt: bool,
        /// `None` only asks what was done for it.
        sentence: Option<Sentence>,
    },
    /// See where it stands.
    Find {
        /// Unless it is finished, let nobody begin it so long.
        strike: Option<Duration>,
    },
    /// The broker has its result.
    Published,
    /// The batch that a cancel came for is cancelled, or cannot be any more.
    Cancelled,
}

/// How a submit that is given up ends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sentence {
    /// What it rests on: a request may have left. Recorded only where that is still so.
    pub begun: bool,
    /// As JSON.
    pub ending: Arc<str>,
}

/// A request that is about to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dispatch {
    /// How long it takes at most.
    pub takes: Duration,
    /// Hash of the API key.
    pub key: Uuid,
}

/// Why a claim is renewed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// To keep it.
    Keep,
    /// A request leaves now.
    Request(Dispatch),
    /// The holder has seen its own request end: the one that `attempts` counts last.
    Ended,
}

/// How a submit ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct End {
    /// As JSON.
    pub ending: Arc<str>,
    /// Of a success: the batch surely exists.
    pub batch: Option<Batch>,
    /// When the calls begin, where that is later than now.
    pub begins_at: Option<Millis>,
}

/// What came of an [`Op`].
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// Claim: the caller has it. Renew: still. Condemn: it could, and nothing is recorded.
    Yours(Yours),
    /// Claim, condemn: a live lease of another worker. Find: somebody's.
    InHand {
        /// How long the lease still lasts.
        remaining: Duration,
    },
    /// It ended so: recorded now (settle, condemn), or before.
    Settled(Finished),
    /// Claim, condemn: the id belongs to another body.
    Conflict,
    /// Renew, settle: another worker has taken it over.
    Gone,
    /// Release, published, cancelled: done. Find: nobody has begun it. Claim without a message:
    /// there is nothing to finish.
    Nobody,
}

/// What a holder is told.
#[derive(Clone, Debug, PartialEq)]
pub struct Yours {
    /// What there was before: nothing for a fresh claim.
    pub history: Option<History>,
    /// How often ElevenLabs was called before.
    pub attempts: u32,
    /// A cancel came first.
    pub struck: bool,
    /// What the submit is finished with when its message does not come back, as JSON.
    pub origin: Option<Arc<str>>,
}

/// What is told of a submit that is finished.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// As JSON.
    pub ending: Arc<str>,
    /// Its result is with the broker.
    pub published: bool,
    /// Its batch has to be cancelled.
    pub cancel: Option<Batch>,
    /// What the submit is finished with when its message does not come back, as JSON.
    pub origin: Option<Arc<str>>,
}

impl Row {
    fn finished(&self, settled: &Settled) -> Reply {
        Reply::Settled(Finished {
            ending: Arc::clone(&settled.ending),
            published: settled.published,
            cancel: settled.batch.clone().filter(|_| self.struck_until.is_some()),
            origin: self.origin.clone(),
        })
    }
}

impl Op {
    /// Applies itself to the row of its submit, at the time `now`.
    pub fn apply(&self, row: &mut Option<Row>, now: Millis) -> Reply {
        match self {
            Self::Claim { body, token, worker, lease, send, doubt } => {
                let hold = Hold {
                    token: *token,
                    worker: *worker,
                    lease_until: after(now, *lease),
                    sent_from: now,
                    busy_until: after(now, send.takes),
                    attempts: 0,
                    keys: vec![send.key],
                };
                claim(row, now, body.as_ref(), hold, Known { takes: send.takes, doubt: *doubt })
            }
            Self::Renew { token, lease, attempts, purpose } => {
                renew(row, now, (*token, *lease, *attempts), *purpose)
            }
            Self::Settle { token, end } => settle(row, now, *token, end),
            Self::Release { token, may_have_left, attempts } => {
                release(row, now, *token, *may_have_left, *attempts)
            }
            Self::Condemn { worker, body, doubt, sentence } => {
                condemn(row, now, (*worker, *body, *doubt), sentence.as_ref())
            }
            Self::Find { strike } => find(row, now, *strike),
            Self::Published => note(row, |row, settled| {
                settled.published = true;
                row.origin = None;
            }),
            Self::Cancelled => note(row, |row, _| row.struck_until = None),
        }
    }
}

/// What a claim knows besides the row.
#[derive(Clone, Copy)]
struct Known {
    takes: Duration,
    doubt: bool,
}

fn claim(
    slot: &mut Option<Row>,
    now: Millis,
    body: Option<&Body>,
    mut new: Hold,
    known: Known,
) -> Reply {
    let waiting = || Row::new(now, State::Waiting);
    let row = match (slot, body) {
        (None, None) => return Reply::Nobody,
        (slot, _) => slot.get_or_insert_with(waiting),
    };
    let differs = |body: &Body| row.fingerprint.is_some_and(|known| known != body.fingerprint);
    if body.is_some_and(differs) {
        return Reply::Conflict;
    }
    let (mut history, mut attempts) = (None, 0);
    match &row.state {
        State::Waiting if body.is_none() => return Reply::Nobody,
        // Somebody's request may be under way. With which key it was made, nobody knows.
        State::Waiting if known.doubt => {
            new.sent_from = before(now, LONG_AGO);
            history = Some(History::of(&new, now));
        }
        State::Waiting => {}
        State::Released { attempts: before } => attempts = *before,
        State::Settled(settled) => {
            let finished = row.finished(settled);
            if body.is_none() && row.is_to_cancel() {
                // Whoever finishes has had a look at it: it is the turn of another one.
                row.touched_at = now;
            }
            return finished;
        }
        State::InHand(held) if held.worker != new.worker && held.lease_until > now => {
            return Reply::InHand { remaining: between(now, held.lease_until) };
        }
        State::InHand(held) => {
            new.take_over(held, now, after(now, known.takes));
            attempts = held.attempts;
            history = Some(History::of(&new, now));
        }
    }
    let struck = row.is_struck(now);
    row.struck_until = row.struck_until.filter(|_| struck);
    if let Some(body) = body {
        row.take(body);
    }
    row.touched_at = now;
    // A fresh claim covers the first request.
    new.attempts = attempts.saturating_add(u32::from(history.is_none()));
    row.state = State::InHand(new);
    Reply::Yours(Yours { history, attempts, struck, origin: row.origin.clone() })
}

fn renew(
    row: &mut Option<Row>,
    now: Millis,
    (token, lease, attempts): (Uuid, Duration, u32),
    purpose: Purpose,
) -> Reply {
    let Some(row) = row else { return Reply::Gone };
    let struck = row.is_struck(now);
    let origin = row.origin.clone();
    let State::InHand(hold) = &mut row.state else { return Reply::Gone };
    if hold.token != token {
        return Reply::Gone;
    }
    hold.lease_until = after(now, lease);
    let is_last = attempts >= hold.attempts;
    hold.attempts = hold.attempts.max(attempts);
    match purpose {
        Purpose::Request(send) => {
            hold.busy_until = after(now, send.takes);
            hold.note_key(send.key);
        }
        Purpose::Ended if is_last => hold.busy_until = now,
        // The end of an earlier request, told late: the next one is under way.
        Purpose::Ended | Purpose::Keep => {}
    }
    let history = Some(History::of(hold, now));
    let attempts = hold.attempts;
    row.touched_at = now;
    Reply::Yours(Yours { history, attempts, struck, origin })
}

fn settle(row: &mut Option<Row>, now: Millis, token: Uuid, end: &End) -> Reply {
    let row = row.get_or_insert_with(|| Row::new(now, State::Waiting));
    match &row.state {
        State::Settled(settled) => return row.finished(settled),
        // That its own request created no batch says nothing about the other holder's.
        State::InHand(hold) if hold.token != token && end.batch.is_none() => return Reply::Gone,
        _ => {}
    }
    // A cancel that came while it was in hand holds for the batch.
    row.struck_until = row.struck_until.filter(|_| end.batch.is_some());
    row.touched_at = now;
    let settled = Settled {
        at: end.begins_at.map_or(now, |begins| begins.max(now)),
        ending: Arc::clone(&end.ending),
        published: false,
        batch: end.batch.clone(),
    };
    let reply = row.finished(&settled);
    row.state = State::Settled(settled);
    reply
}

fn release(
    row: &mut Option<Row>,
    now: Millis,
    token: Uuid,
    may_have_left: bool,
    attempts: u32,
) -> Reply {
    if let Some(row) = row
        && let State::InHand(hold) = &mut row.state
        && hold.token == token
    {
        row.touched_at = now;
        if may_have_left {
            hold.lease_until = now;
        } else {
            row.state = State::Released { attempts };
        }
    }
    Reply::Nobody
}

fn condemn(
    row: &mut Option<Row>,
    now: Millis,
    (asks, body, doubt): (Uuid, Uuid, bool),
    sentence: Option<&Sentence>,
) -> Reply {
    if row.as_ref().and_then(|row| row.body).is_some_and(|known| known != body) {
        return Reply::Conflict;
    }
    let mut attempts = 0;
    let unknown =
        History { age: LONG_AGO, quiet: Duration::ZERO, busy: Duration::ZERO, keys: Vec::new() };
    let history = match row.as_ref().map(|row| &row.state) {
        Some(State::Settled(settled)) => {
            return row.as_ref().map_or(Reply::Nobody, |row| row.finished(settled));
        }
        Some(State::InHand(hold)) if hold.worker != asks && hold.lease_until > now => {
            return Reply::InHand { remaining: between(now, hold.lease_until) };
        }
        Some(State::InHand(hold)) => {
            attempts = hold.attempts;
            Some(History::of(hold, now))
        }
        Some(State::Released { attempts: before }) => {
            attempts = *before;
            None
        }
        None | Some(State::Waiting) => doubt.then_some(unknown),
    };
    let Some(sentence) = sentence.filter(|sentence| sentence.begun == history.is_some()) else {
        return Reply::Yours(Yours { history, attempts, struck: false, origin: None });
    };
    let row = row.get_or_insert_with(|| Row::new(now, State::Waiting));
    (row.body, row.struck_until, row.touched_at) = (Some(body), None, now);
    let ending = Arc::clone(&sentence.ending);
    let settled = Settled { at: now, ending, published: false, batch: None };
    let reply = row.finished(&settled);
    row.state = State::Settled(settled);
    reply
}

fn find(row: &mut Option<Row>, now: Millis, strike: Option<Duration>) -> Reply {
    let reply = match row.as_ref().map(|row| (row, &row.state)) {
        None | Some((_, State::Waiting | State::Released { .. })) => Reply::Nobody,
        Some((_, State::InHand(hold))) => {
            Reply::InHand { remaining: between(now, hold.lease_until) }
        }
        Some((row, State::Settled(settled))) => return row.finished(settled),
    };
    if let Some(strike) = strike {
        let row = row.get_or_insert_with(|| Row::new(now, State::Waiting));
        row.struck_until = row.struck_until.max(Some(after(now, strike)));
    }
    reply
}

fn note(row: &mut Option<Row>, change: impl FnOnce(&mut Row, &mut Settled)) -> Reply {
    if let Some(row) = row
        && let State::Settled(mut settled) = row.state.clone()
    {
        change(row, &mut settled);
        row.state = State::Settled(settled);
    }
    Reply::Nobody
}

#[cfg(test)]
#[path = "op_tests.rs"]
mod tests;
