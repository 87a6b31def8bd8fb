//! Searches for the batch of a submit in doubt, until it is found, proved absent, or left unknown.

use std::time::{Duration, Instant};

use tokio::time::timeout;
use tracing::{info, warn};

use crate::domain::command::CommandKind;
use crate::domain::result::Outcome;
use crate::elevenlabs::{Answer, Called, Candidate, Class, Error, Seen};
use crate::ledger::{Attempted, Lease};
use crate::retry::{Policy, Schedule};
use crate::telemetry::chain;

use super::super::VendorState;
use super::super::keys::Sees;
use super::super::outcome::submit_unknown;
use super::super::step::{Reading, Sight, Verdict, verdict};
use super::super::turn::{Clearance, SHORTEST_DELAY, Turn};
use super::super::vendor::Key;
use super::execution::{Doubt, Execution, Leave};
use super::{Waited, wait_for_ledger};

/// Between two readings, at least.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);

const OTHER_KEY: &str = "the API key was changed after the submit was sent, and the present one is not \
     known to see the former one's batches";

/// The end of a search.
pub enum Searched {
    Found(Answer),
    /// It is safe to send the submit again.
    NotCreated,
    Unknown(Outcome),
}

/// What one reading of the list has come to.
struct Looked {
    sight: Sight,
    answer: Option<Answer>,
    /// Why it is neither found nor absent, for a person.
    why: String,
    /// How long ElevenLabs asks to wait.
    asked: Duration,
}

impl Looked {
    fn of(sight: Sight) -> Self {
        Self { sight, answer: None, why: String::new(), asked: Duration::ZERO }
    }

    fn unreadable(why: String) -> Self {
        Self { why, ..Self::of(Sight::Unreadable) }
    }
}

impl Execution<'_> {
    /// Searches until there is a verdict.
    pub async fn search(&mut self) -> Result<Searched, Leave> {
        let Doubt::Since { lost, .. } = &self.doubt else { return Ok(Searched::NotCreated) };
        let (lost, window) = (lost.clone(), self.handler.settling_window);
        let command_id = self.origin.search.command_id.clone();
        warn!(command_id, reason = lost, "in doubt: searching ElevenLabs for its batch");
        let mut pace = Policy { horizon: None, ..self.handler.retry }.start();
        // What shows late: recipients and their markers.
        let mut undecided_since: Option<Instant> = None;
        loop {
            if let Some(asked) = self.may_look().await? {
                return self.conclude(Verdict::Unknown, &lost, &asked).await;
            }
            let Some(attempted) = self.attempted(&mut pace).await? else { continue };
            let Some(mut looked) = self.look(&attempted).await? else { continue };
            let has_time = match looked.sight {
                Sight::Undecided => {
                    undecided_since.get_or_insert_with(Instant::now).elapsed() < window
                }
                _ => !self.turn.remaining(window * 2).is_zero(),
            };
            let sees_all_keys = self.sees_all_keys(&mut looked, &attempted).await;
            let reading =
                Reading { sight: looked.sight, quiet: attempted.quiet, sees_all_keys, has_time };
            match (verdict(reading, window), looked.answer.take()) {
                (Verdict::Found, Some(answer)) => {
                    info!(command_id, batch_id = answer.batch_id, "found");
                    return Ok(Searched::Found(answer));
                }
                (Verdict::ReadAgain | Verdict::Found, _) => {
                    self.before_next(&looked, &attempted, &mut pace).await?;
                }
                (verdict, _) => return self.conclude(verdict, &lost, &looked.why).await,
            }
        }
    }

    /// Waits until the list may be read; returns why it is not to be asked any more, if so.
    async fn may_look(&mut self) -> Result<Option<String>, Leave> {
        let window = self.handler.settling_window;
        // That it is too late to send it says nothing about what was sent.
        let late = |turn: &Turn, kind: CommandKind, vendor: &VendorState| {
            turn.may_look(kind, vendor, window * 2)
        };
        match self.clearance(late).await {
            Clearance::Call | Clearance::Expired => Ok(None),
            Clearance::Defer(deferral) => Err(Leave::Deferred(deferral)),
            Clearance::NoMore(asked) => Ok(Some(asked)),
            Clearance::Stopped => Err(Leave::Stopped),
        }
    }

    /// What the ledger knows of the attempts; `None` where it has to be asked again.
    async fn attempted(&mut self, pace: &mut Schedule) -> Result<Option<Attempted>, Leave> {
        let ended = matches!(self.doubt, Doubt::Since { ended: true, .. });
        let renewed = if ended {
            self.lease.renew_after_request(self.attempts).await
        } else {
            self.lease.renew(self.attempts).await
        };
        match renewed {
            Ok(None) => Err(Leave::TakenOver),
            Ok(attempted) => {
                if let Doubt::Since { ended, .. } = &mut self.doubt {
                    *ended = false;
                }
                Ok(attempted)
            }
            Err(error) => {
                let command_id = &self.origin.search.command_id;
                let (left, stop) = (self.turn.left_in_hand(), &self.stopping.claimed);
                match wait_for_ledger(pace, left, command_id, &error, stop).await {
                    Waited::TryAgain => Ok(None),
                    Waited::TooLong => {
                        Err(Leave::Deferred(self.turn.patient_deferral(Duration::ZERO)))
                    }
                    Waited::Stopped => Err(Leave::Stopped),
                }
            }
        }
    }

    /// Reads the list once; `None` where the key is refused, which the breaker knows by now.
    async fn look(&mut self, attempted: &Attempted) -> Result<Option<Looked>, Leave> {
        let age = attempted.age;
        let looking = self.handler.finder.look(&self.origin.search, move || age.now());
        let looked = tokio::select! {
            biased;
            looked = timeout(self.lease.length(), looking) => looked,
            () = keep(&mut self.lease, self.attempts) => return Err(Leave::TakenOver),
            () = self.stopping.now.cancelled() => return Err(Leave::Stopped),
        };
        Ok(Some(match looked {
            Ok(Ok(Seen::Batch(answer))) => {
                Looked { answer: Some(answer), ..Looked::of(Sight::Batch) }
            }
            Ok(Ok(Seen::Absent)) => Looked::of(Sight::Absent),
            Ok(Ok(Seen::Undecided(candidates))) => self.without_others(candidates).await,
            Ok(Err(error)) => {
                // Whether it is the key as such, or this search: then the horizon counts.
                if error.class() == Class::Unauthorized
                    && matches!(self.handler.key().await, Key::Refused)
                {
                    return Ok(None);
                }
                self.unreadable(&error)
            }
            Err(_) => Looked::unreadable("reading the list of batches took too long".to_owned()),
        }))
    }

    fn unreadable(&self, error: &Error) -> Looked {
        let command_id = &self.origin.search.command_id;
        info!(command_id, error = chain(error), "the list of batches cannot be read");
        let asked = error.retry_after().unwrap_or_default();
        Looked { asked, ..Looked::unreadable(error.to_string()) }
    }

    /// The ledger may know whose the candidates are.
    async fn without_others(&self, candidates: Vec<Candidate>) -> Looked {
        let ids = candidates.iter().map(|candidate| candidate.batch_id.clone()).collect();
        let owners = match self.handler.ledger.owners(ids).await {
            Ok(owners) => owners,
            Err(error) => return Looked::unreadable(error.to_string()),
        };
        let own = &self.origin.search.command_id;
        let others = |id: &String| owners.get(id).is_some_and(|owner| owner != own);
        match candidates.iter().find(|candidate| !others(&candidate.batch_id)) {
            None => Looked::of(Sight::Absent),
            Some(Candidate { batch_id, why }) => Looked {
                why: format!("batch {batch_id} may be the one: {why}"),
                ..Looked::of(Sight::Undecided)
            },
        }
    }

    /// Absence is no proof under a key that does not see what another key created.
    async fn sees_all_keys(&self, looked: &mut Looked, attempted: &Attempted) -> bool {
        if looked.sight != Sight::Absent || attempted.quiet < self.handler.settling_window {
            return true;
        }
        match self.handler.sees_all(&attempted.keys).await {
            Sees::All => true,
            Sees::NotAll => {
                OTHER_KEY.clone_into(&mut looked.why);
                false
            }
            Sees::CannotTell(why) => {
                *looked = Looked::unreadable(why);
                true
            }
        }
    }

    /// Waits until it is worth reading again.
    async fn before_next(
        &mut self,
        looked: &Looked,
        attempted: &Attempted,
        pace: &mut Schedule,
    ) -> Result<(), Leave> {
        let window = self.handler.settling_window;
        let pause = if looked.sight == Sight::Unreadable {
            let left = self.turn.remaining(window * 2);
            let asked = looked.asked.min(left);
            let pause = pace.next_wait(None).unwrap_or(left).max(asked).min(left);
            if pause > self.turn.left_in_hand().max(SHORTEST_DELAY) {
                return Err(Leave::Deferred(self.turn.deferral(asked)));
            }
            pause
        } else {
            let left = match looked.sight {
                Sight::Undecided => window,
                _ => attempted.busy + window.saturating_sub(attempted.quiet),
            };
            (window / 3).min(left).max(SHORTEST_PAUSE)
        };
        self.pause(pause).await;
        if self.stopping.claimed.is_cancelled() { Err(Leave::Stopped) } else { Ok(()) }
    }

    /// Before it is sent again or left unknown, the calls are asked: one of its own proves that the batch
    /// exists. None proves nothing.
    async fn conclude(
        &mut self,
        verdict: Verdict,
        lost: &str,
        why: &str,
    ) -> Result<Searched, Leave> {
        let command_id = self.origin.search.command_id.clone();
        let asking = self.handler.finder.conversation(&self.origin.search);
        let called = tokio::select! {
            biased;
            called = timeout(self.lease.length(), asking) => called.unwrap_or(Called::Nothing),
            () = keep(&mut self.lease, self.attempts) => return Err(Leave::TakenOver),
            () = self.stopping.now.cancelled() => return Err(Leave::Stopped),
        };
        let unknown = |why: &str| submit_unknown(&self.origin.search, lost, why);
        Ok(match (called, verdict) {
            (Called::Batch(answer), _) => {
                info!(command_id, batch_id = answer.batch_id, "found by one of its calls");
                Searched::Found(answer)
            }
            (Called::Somewhere, _) => {
                let why = "a call of it was made, but its batch cannot be read";
                warn!(command_id, reason = why, "its outcome stays unknown");
                Searched::Unknown(unknown(why))
            }
            (Called::Nothing, Verdict::NotCreated) => {
                info!(command_id, "not there: it was not created");
                Searched::NotCreated
            }
            (Called::Nothing, _) => {
                warn!(command_id, reason = why, "its outcome stays unknown");
                Searched::Unknown(unknown(why))
            }
        })
    }
}

/// Keeps the submit for as long as it is awaited; returns when another worker has taken it over.
async fn keep(lease: &mut Lease, attempts: u32) {
    loop {
        tokio::time::sleep(lease.length() / 4).await;
        if let Ok(None) = lease.renew(attempts).await {
            return;
        }
    }
}
