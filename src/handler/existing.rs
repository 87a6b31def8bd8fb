//! Executes a cancel or a get: finds the batch it is about, calls, and says what came of it.

use std::time::Duration;

use tracing::info;

use crate::domain::Earlier;
use crate::domain::command::{BatchId, CommandKind, CommandMessage, Target};
use crate::domain::result::{Ending, Outcome, ResultOf};
use crate::elevenlabs::{Answer, Class, Error};
use crate::ledger::Found;
use crate::retry::Policy;
use crate::telemetry::chain;

use super::turn::{Clearance, Deferral, Next, Turn};
use super::vendor::Key;
use super::{Handled, Handler, Stopping, Then, Tried, answered, outcome, then};

/// How often to ask whether a submit that is in hand has ended.
const LOOKING: Policy =
    Policy { initial: Duration::from_millis(50), max: Duration::from_millis(500), horizon: None };

/// What a batch is in which nobody is called any more, but for `cancelled`.
const ENDED: [&str; 2] = ["completed", "failed"];

/// The end of a series of attempts.
enum Attempts {
    /// ElevenLabs does not know a batch that the ledger knows.
    KnownAndGone,
    Ended(Result<Answer, Error>),
    /// The horizon is over, and the vendor asks for more time, or refuses the key.
    GivenUp(String),
    /// `not_after` has passed.
    Expired,
    Deferred(Deferral),
    /// The worker is stopping.
    Stopped,
}

/// What a cancel or a get is about.
enum Looked {
    Batch(BatchId),
    /// There is no batch (yet).
    Nothing(Outcome),
    Deferred(Deferral),
    Stopped,
}

impl Handler {
    pub(super) async fn existing(
        &self,
        message: &CommandMessage,
        command_id: &str,
        (kind, target): (CommandKind, Target),
        mut turn: Turn,
        stopping: &Stopping,
    ) -> Handled {
        let mut tried = Tried {
            attempts: turn.earlier().attempts,
            // Whoever had it before, and left no word, may have sent it.
            in_doubt: turn.earlier().in_doubt || message.came_back() > 0,
        };
        let outcome = match self.batch_of(kind, target, &turn, &mut tried, stopping).await {
            Looked::Batch(id) => {
                match self.call(kind, &id, &mut turn, &mut tried, stopping).await {
                    Attempts::Ended(Ok(answer)) => outcome::succeeded(answer, None),
                    Attempts::Ended(Err(error)) => outcome::not_done(kind, &error, tried),
                    Attempts::GivenUp(reason) => outcome::given_up(kind, &reason, tried),
                    Attempts::KnownAndGone => outcome::known_and_gone(kind, id.as_str()),
                    Attempts::Expired => outcome::too_late(kind, tried),
                    Attempts::Deferred(deferral) => return deferred(deferral, tried),
                    // To read or to cancel twice is harmless.
                    Attempts::Stopped => return Handled::GivenBack,
                }
            }
            Looked::Nothing(outcome) => outcome,
            Looked::Deferred(deferral) => return deferred(deferral, tried),
            Looked::Stopped => return Handled::GivenBack,
        };
        let ending = Ending { attempts: tried.attempts, outcome };
        answered(message, command_id, ResultOf::Command, ending)
    }

    async fn call(
        &self,
        kind: CommandKind,
        id: &BatchId,
        turn: &mut Turn,
        tried: &mut Tried,
        stopping: &Stopping,
    ) -> Attempts {
        let attempts = if kind == CommandKind::Cancel {
            self.attempt(kind, turn, tried, stopping, || self.cancel(id)).await
        } else {
            self.attempt(kind, turn, tried, stopping, || self.vendor.get(id)).await
        };
        match attempts {
            Attempts::Ended(Err(Error::Refused { status: 404, .. })) => {
                self.gone(id, turn, attempts).await
            }
            attempts => attempts,
        }
    }

    /// ElevenLabs does not know the batch. That is no answer about one that the ledger knows: the key
    /// may not see it any more.
    async fn gone(&self, id: &BatchId, turn: &Turn, refused: Attempts) -> Attempts {
        match self.ledger.owners(vec![id.as_str().to_owned()]).await {
            Ok(owners) if owners.is_empty() => refused,
            Ok(_) => Attempts::KnownAndGone,
            Err(error) => {
                info!(batch_id = id.as_str(), error = chain(&error), "waiting for the ledger");
                Attempts::Deferred(turn.patient_deferral(Duration::ZERO))
            }
        }
    }

    /// A cancel that finds the batch already cancelled has what it wanted. One that finds it ended in
    /// another way has its answer: there is nothing left to cancel.
    pub(super) async fn cancel(&self, id: &BatchId) -> Result<Answer, Error> {
        let refused = match self.vendor.cancel(id).await {
            Err(
                error @ (Error::Refused { .. }
                | Error::Account { .. }
                | Error::Inconclusive { status: 409, .. }),
            ) => error,
            other => return other,
        };
        match self.vendor.get(id).await {
            Ok(batch) if batch.status.as_deref() == Some("cancelled") => Ok(batch),
            Ok(Answer { status: Some(status), .. }) if ENDED.contains(&status.as_str()) => {
                Err(refused.of_ended(&status))
            }
            // It is there: that it is not is no answer.
            Ok(_) if matches!(refused, Error::Refused { status: 404, .. }) => {
                Err(refused.contradicted())
            }
            // Not known yet: the next attempt asks both again.
            Err(error) if refused.class() == Class::Refused && error.class() != Class::Refused => {
                Err(error)
            }
            Ok(_) | Err(_) => Err(refused),
        }
    }

    /// The batch that a cancel or a get is about. Waits for a submit that is in hand.
    async fn batch_of(
        &self,
        kind: CommandKind,
        target: Target,
        turn: &Turn,
        tried: &mut Tried,
        stopping: &Stopping,
    ) -> Looked {
        let submit_id = match target {
            Target::Batch(id) => return Looked::Batch(id),
            Target::Submit(id) => id,
        };
        let mut pace = LOOKING.start();
        let mut strike = kind == CommandKind::Cancel;
        loop {
            if turn.has_expired() {
                return Looked::Nothing(outcome::too_late(kind, *tried));
            }
            let found = self.ledger.find(&submit_id, strike).await;
            // It holds from now on. Without an answer, it may hold all the same.
            tried.in_doubt |= strike && !matches!(found, Ok(Found::Settled(_)));
            let is_away = found.is_err();
            // One is enough, and each is a write.
            strike &= is_away;
            match found {
                Ok(Found::Nobody) => {
                    return Looked::Nothing(outcome::nothing_begun(kind, &submit_id));
                }
                Ok(Found::Settled(ended)) => {
                    let ending = ended.ending;
                    let id = ending.batch_id().and_then(|id| BatchId::try_from(id.to_owned()).ok());
                    return match id {
                        Some(id) => Looked::Batch(id),
                        None => Looked::Nothing(outcome::no_batch(&submit_id, &ending)),
                    };
                }
                Ok(Found::InHand) if turn.remaining(Duration::ZERO).is_zero() => {
                    return Looked::Nothing(outcome::still_in_hand(kind, &submit_id));
                }
                Ok(Found::InHand | Found::Conflict) | Err(_) => {}
            }
            let left = turn.left_in_hand().min(turn.remaining(Duration::ZERO));
            if left.is_zero() {
                return Looked::Deferred(if is_away {
                    turn.patient_deferral(Duration::ZERO)
                } else {
                    turn.deferral(Duration::ZERO)
                });
            }
            tokio::select! {
                () = tokio::time::sleep(pace.next_wait(None).unwrap_or_default().min(left)) => {}
                () = stopping.soon.cancelled() => return Looked::Stopped,
            }
        }
    }

    /// Calls until there is an end: an answer, a refusal, the retry horizon, or a stop. To read or
    /// to cancel once more is harmless, whatever became of the attempt before.
    async fn attempt<F>(
        &self,
        kind: CommandKind,
        turn: &mut Turn,
        tried: &mut Tried,
        stopping: &Stopping,
        call: impl Fn() -> F,
    ) -> Attempts
    where
        F: Future<Output = Result<Answer, Error>>,
    {
        loop {
            match self.clearance(kind, turn, &stopping.soon).await {
                Clearance::Call => {}
                Clearance::Defer(deferral) => return Attempts::Deferred(deferral),
                Clearance::Expired => return Attempts::Expired,
                Clearance::NoMore(reason) => return Attempts::GivenUp(reason),
                Clearance::Stopped => return Attempts::Stopped,
            }
            tried.attempts += 1;
            let result = tokio::select! {
                biased;
                result = call() => result,
                () = stopping.now.cancelled() => return Attempts::Stopped,
            };
            let Err(error) = &result else { return Attempts::Ended(result) };
            tried.in_doubt |= error.class() == Class::Unknown;
            match then(kind, error.class()) {
                Then::Fail => return Attempts::Ended(result),
                Then::AskAboutKey => match self.key().await {
                    Key::Accepted => return Attempts::Ended(result),
                    Key::Refused => continue,
                    Key::Unknown => {}
                },
                Then::Again | Then::Look | Then::Hold => {}
            }
            let wait = match turn.next(error.retry_after()) {
                Next::Wait(wait) => wait,
                Next::Defer(deferral) => return Attempts::Deferred(deferral),
                // Whether it is the key could not be found out.
                Next::Over if error.class() == Class::Unauthorized => {
                    return Attempts::GivenUp(error.to_string());
                }
                Next::Over => return Attempts::Ended(result),
            };
            info!(
                command = kind.name(),
                attempt = tried.attempts,
                wait_ms = wait.as_millis(),
                request_id = error.request_id(),
                error = chain(error),
                "will try again"
            );
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stopping.soon.cancelled() => return Attempts::Stopped,
            }
        }
    }
}

fn deferred(deferral: Deferral, tried: Tried) -> Handled {
    let Deferral { wait, asked, age } = deferral;
    let earlier = Earlier::deferred(age, asked, tried.attempts, tried.in_doubt);
    Handled::Deferred { wait, earlier }
}
