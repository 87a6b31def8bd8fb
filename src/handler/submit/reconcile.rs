//! Looks for the batch of a submit whose answer was lost, until it is found or surely not there.

use std::time::{Duration, Instant};

use tokio::time::timeout;
use tracing::info;

use crate::domain::command::CommandKind;
use crate::elevenlabs::{Answer, Class};
use crate::ledger::Lease;
use crate::retry::Policy;
use crate::telemetry::chain;

use super::super::VendorState;
use super::super::turn::{Clearance, Deferral, SHORTEST_DELAY, Turn};
use super::super::vendor::Key;
use super::{Execution, Waited, wait_for_ledger};

/// How many looks at least prove that a batch is not there.
const LOOKS: u32 = 2;

/// Between two looks, while the settling window lasts.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);

/// The end of a search for a batch.
pub enum Reconciled {
    Found(Answer),
    /// Surely not there: it is safe to send the submit again.
    Absent,
    /// The list could not be read.
    Unknown(String),
    Deferred(Deferral),
    TakenOver,
    Stopped,
}

impl Execution<'_> {
    /// Looks for the batch until it is found, or the settling window has passed without it.
    pub async fn reconcile(&mut self, lost: &str) -> Reconciled {
        let command_id = &self.job.lost.command_id;
        info!(command_id, reason = lost, "looking in ElevenLabs for the batch of this submit");
        let window = self.handler.settling_window;
        let mut pace = Policy { horizon: None, ..self.handler.retry }.start();
        // Since the first look that saw everything: what a vendor that was away shows first may be old.
        let mut settling: Option<Instant> = None;
        let mut looks = 0;
        loop {
            // That it is too late to send it says nothing about what was sent.
            let late = |turn: &Turn, kind: CommandKind, vendor: &VendorState| {
                turn.may_look(kind, vendor, window * 2)
            };
            match self.clearance(late).await {
                Clearance::Call | Clearance::Expired => {}
                Clearance::Defer(deferral) => return Reconciled::Deferred(deferral),
                Clearance::NoMore(asked) => return Reconciled::Unknown(asked),
                Clearance::Stopped => return Reconciled::Stopped,
            }
            let began = Instant::now();
            let age = match self.lease.renew(self.attempts).await {
                Ok(Some(age)) => age,
                Ok(None) => return Reconciled::TakenOver,
                Err(error) => {
                    let (left, stop) = (self.turn.left_in_hand(), &self.stopping.claimed);
                    match wait_for_ledger(&mut pace, left, command_id, &error, stop).await {
                        Waited::TryAgain => continue,
                        Waited::TooLong => {
                            return Reconciled::Deferred(
                                self.turn.patient_deferral(Duration::ZERO),
                            );
                        }
                        Waited::Stopped => return Reconciled::Stopped,
                    }
                }
            };
            let looking = self.handler.finder.look(&self.job.lost, move || age.now());
            let looked = tokio::select! {
                biased;
                looked = timeout(self.lease.length(), looking) => looked,
                () = keep(&mut self.lease, self.attempts) => return Reconciled::TakenOver,
                () = self.stopping.now.cancelled() => return Reconciled::Stopped,
            };
            // Whether it is the key as such, or this search: then the horizon counts.
            if let Ok(Err(error)) = &looked
                && error.class() == Class::Unauthorized
                && matches!(self.handler.key().await, Key::Refused)
            {
                (settling, looks) = (None, 0);
                continue;
            }
            let pause = match looked {
                Ok(Ok(Some(answer))) => {
                    info!(command_id, batch_id = answer.batch_id, "found");
                    return Reconciled::Found(answer);
                }
                Ok(Ok(None)) => {
                    looks += 1;
                    // Not since it began: it may have waited for its turn, or for the vendor.
                    let first = *settling.get_or_insert_with(Instant::now);
                    if began.duration_since(first) >= window && looks >= LOOKS {
                        info!(command_id, looks, "not there: it was not created");
                        return Reconciled::Absent;
                    }
                    let left = window.saturating_sub(first.elapsed());
                    (window / 3).min(left).max(SHORTEST_PAUSE)
                }
                failed => {
                    let had_begun = settling.take().is_some();
                    looks = 0;
                    let (said, cause, asked) = match &failed {
                        Ok(Err(error)) => (error.to_string(), chain(&**error), error.retry_after()),
                        _ => ("it took too long".to_owned(), "too slow".to_owned(), None),
                    };
                    // A list that cannot be read late in the horizon gets a while more.
                    let left = self.turn.remaining(window * 2);
                    if left.is_zero() {
                        return Reconciled::Unknown(said);
                    }
                    let asked = asked.unwrap_or_default().min(left);
                    let pause = pace.next_wait(None).unwrap_or(left).max(asked).min(left);
                    let wait_ms = pause.as_millis();
                    info!(command_id, wait_ms, error = cause, "cannot look; will try again");
                    // A window that has to begin again is not in hand together with the one before.
                    let in_hand = self.turn.left_in_hand();
                    if pause > in_hand.max(SHORTEST_DELAY) || had_begun && in_hand.is_zero() {
                        return Reconciled::Deferred(self.turn.deferral(asked));
                    }
                    pause
                }
            };
            self.pause(pause).await;
            if self.stopping.claimed.is_cancelled() {
                return Reconciled::Stopped;
            }
        }
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
