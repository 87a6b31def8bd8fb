//! Executes one command: claim, call the vendor, record, result. Knows no AMQP.

mod outcome;
mod submit;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::info;
use uuid::Uuid;

use crate::domain::Rejection;
use crate::domain::command::{BatchId, Command, CommandKind, CommandMessage, Target};
use crate::domain::result::{Ending, ErrorCode, Outcome, ResultEvent, ResultOf};
use crate::elevenlabs::{Answer, Class, Client, Error, Finder, Lost, SubmitRequest};
use crate::ledger::{Found, Ledger};
use crate::retry::{Policy, Schedule};
use crate::telemetry::chain;

use submit::SubmitJob;

/// How often to ask whether a submit that is in hand has ended.
const LOOKING: Policy =
    Policy { initial: Duration::from_millis(50), max: Duration::from_millis(500), horizon: None };

/// Larger bodies are parsed off the reactor: 10,000 recipients take some 20 ms.
const INLINE_BODY_BYTES: usize = 256 * 1024;

/// How many large bodies are read at the same time: one of 16 MB can take some 300 MB of memory.
const LARGE_BODIES_AT_ONCE: usize = 2;

/// How urgently a handler has to come to an end.
#[derive(Clone, Debug, Default)]
pub struct Stopping {
    /// Begin nothing more: no new attempt, no further waiting. The worker stops, or the connection
    /// that the command came by is lost.
    pub soon: CancellationToken,
    /// The same, for a submit that is claimed: it goes on without the connection, and its result
    /// waits in the ledger for the copy that is delivered again. Only a stop of the worker ends it.
    pub claimed: CancellationToken,
    /// Do not even wait for the request that is under way.
    pub now: CancellationToken,
}

/// What became of a command.
pub enum Handled {
    /// It has a result, to be published before the command is acknowledged.
    Answered(Arc<ResultEvent>),
    /// It has none, and nothing is lost by that: back to its queue. The worker is stopping, or the
    /// ledger cannot be used.
    GivenBack,
}

/// Executes commands against the vendor.
pub struct Handler {
    finder: Finder,
    vendor: Client,
    ledger: Ledger,
    retry: Policy,
    settling_window: Duration,
    large_bodies: Arc<Semaphore>,
}

/// A checked command, encoded for the vendor.
enum Job {
    Submit(Box<SubmitJob>),
    /// A cancel or a get.
    Existing(CommandKind, Target),
}

/// What follows a call that did not give a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Another attempt would end the same way.
    Fail,
    /// Wait, and try again: the first attempt did nothing, or repeating it is harmless.
    Again,
    /// It may have created a batch: look for it before anything is sent again.
    Look,
}

/// The whole policy. Reading and cancelling twice is harmless, submitting twice is not.
pub const fn then(kind: CommandKind, class: Class) -> Then {
    match (kind, class) {
        (_, Class::Refused) => Then::Fail,
        (CommandKind::Submit, Class::Unknown) => Then::Look,
        (_, Class::NeverSent | Class::RateLimited)
        | (CommandKind::Cancel | CommandKind::Get, Class::Unknown) => Then::Again,
    }
}

/// How the handler takes its time.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Attempts at the vendor.
    pub retry: Policy,
    /// How long a batch can take to show in the vendor's list. A submit whose answer was lost is
    /// sent again only when its batch is still missing after that.
    pub settling_window: Duration,
}

/// The end of a series of attempts.
enum Attempts {
    Ended {
        result: Result<Answer, Error>,
        attempts: u32,
        /// One of them may have been done although it gave no answer.
        in_doubt: bool,
    },
    /// The worker is stopping.
    Stopped,
}

impl Handler {
    /// A handler that remembers submits in `ledger`.
    pub fn new(vendor: Client, ledger: Ledger, timing: Timing) -> Self {
        Self {
            finder: Finder::new(vendor.clone()),
            vendor,
            ledger,
            retry: timing.retry,
            settling_window: timing.settling_window,
            large_bodies: Arc::new(Semaphore::new(LARGE_BODIES_AT_ONCE)),
        }
    }

    /// Executes `message`. Waits as long as the retry policy and `stopping` say.
    pub async fn handle(&self, message: Arc<CommandMessage>, stopping: &Stopping) -> Handled {
        let command_id = match message.producer_id() {
            Some(id) => id.to_owned(),
            // Nothing can be told apart by it; it only ties the result to the log line.
            None => Uuid::now_v7().to_string(),
        };
        let job = match self.prepare(Arc::clone(&message), &command_id).await {
            Ok(job) => job,
            Err(rejection) => {
                let outcome = Outcome::Failed {
                    code: ErrorCode::InvalidCommand,
                    error: rejection.to_string(),
                };
                let ending = Ending { attempts: 0, outcome };
                return answered(&message, &command_id, ResultOf::Refusal, ending);
            }
        };
        // One horizon, also for a wait before the first attempt.
        let schedule = self.retry.start();
        match job {
            Job::Submit(submit) => {
                self.submit(&message, &command_id, &submit, schedule, stopping).await
            }
            Job::Existing(kind, target) => match self.batch_of(kind, target, stopping).await {
                Looked::Batch(id) => {
                    let attempts = match kind {
                        CommandKind::Cancel => {
                            self.attempt(kind, schedule, stopping, || self.cancel(&id)).await
                        }
                        _ => self.attempt(kind, schedule, stopping, || self.vendor.get(&id)).await,
                    };
                    finish(&message, &command_id, attempts)
                }
                Looked::Nothing(outcome) => {
                    let ending = Ending { attempts: 0, outcome };
                    answered(&message, &command_id, ResultOf::Command, ending)
                }
                Looked::Stopped => Handled::GivenBack,
            },
        }
    }

    async fn prepare(
        &self,
        message: Arc<CommandMessage>,
        command_id: &str,
    ) -> Result<Job, Rejection> {
        if message.body.len() <= INLINE_BODY_BYTES {
            return prepare(&message, command_id);
        }
        let turn = Arc::clone(&self.large_bodies).acquire_owned().await;
        let command_id = command_id.to_owned();
        let parsed = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            prepare(&message, &command_id)
        })
        .await;
        parsed.unwrap_or_else(|_| Err(Rejection::of("the body could not be read")))
    }

    /// A cancel that finds the batch already cancelled has what it wanted.
    async fn cancel(&self, id: &BatchId) -> Result<Answer, Error> {
        let refused = match self.vendor.cancel(id).await {
            Err(error @ (Error::Refused { .. } | Error::Inconclusive { status: 409, .. })) => error,
            other => return other,
        };
        match self.vendor.get(id).await {
            Ok(batch) if batch.status.as_deref() == Some("cancelled") => Ok(batch),
            // Not known yet: the next attempt asks both again.
            Err(error) if refused.class() == Class::Refused && error.class() != Class::Refused => {
                Err(error)
            }
            Ok(_) | Err(_) => Err(refused),
        }
    }

    /// The batch that a cancel or a get is about. Waits for a submit that is in hand.
    async fn batch_of(&self, kind: CommandKind, target: Target, stopping: &Stopping) -> Looked {
        let submit_id = match target {
            Target::Batch(id) => return Looked::Batch(id),
            Target::Submit(id) => id,
        };
        let mut pace = Policy { horizon: self.retry.horizon, ..LOOKING }.start();
        let mut strike = kind == CommandKind::Cancel;
        loop {
            let found = self.ledger.find(&submit_id, strike).await;
            // One is enough, and each is a write.
            strike &= found.is_err();
            match found {
                Ok(Found::Nobody) => {
                    return Looked::Nothing(outcome::nothing_begun(kind, &submit_id));
                }
                Ok(Found::Settled(ending)) => {
                    let id = ending.batch_id().and_then(|id| BatchId::try_from(id.to_owned()).ok());
                    return match id {
                        Some(id) => Looked::Batch(id),
                        None => Looked::Nothing(outcome::no_batch(&submit_id, &ending)),
                    };
                }
                Ok(Found::InHand) | Err(_) => {}
            }
            let Some(wait) = pace.next_wait(None) else {
                return match found {
                    Ok(_) => Looked::Nothing(outcome::still_in_hand(kind, &submit_id)),
                    Err(_) => Looked::Stopped,
                };
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stopping.soon.cancelled() => return Looked::Stopped,
            }
        }
    }

    /// Calls until there is an end: an answer, a refusal, the retry horizon, or a stop. To read or
    /// to cancel once more is harmless, whatever became of the attempt before.
    async fn attempt<F>(
        &self,
        kind: CommandKind,
        mut schedule: Schedule,
        stopping: &Stopping,
        call: impl Fn() -> F,
    ) -> Attempts
    where
        F: Future<Output = Result<Answer, Error>>,
    {
        let mut attempts = 0;
        let mut in_doubt = false;
        loop {
            if stopping.soon.is_cancelled() {
                return Attempts::Stopped;
            }
            attempts += 1;
            let result = tokio::select! {
                biased;
                result = call() => result,
                () = stopping.now.cancelled() => return Attempts::Stopped,
            };
            let wait = match &result {
                Ok(_) => None,
                Err(error) => {
                    in_doubt |= error.class() == Class::Unknown;
                    let again = then(kind, error.class()) == Then::Again;
                    again.then(|| schedule.next_wait(error.retry_after())).flatten()
                }
            };
            let (Some(wait), Err(error)) = (wait, &result) else {
                return Attempts::Ended { result, attempts, in_doubt };
            };
            info!(
                command = kind.name(),
                attempt = attempts,
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

/// What a cancel or a get is about.
enum Looked {
    Batch(BatchId),
    /// There is no batch (yet).
    Nothing(Outcome),
    Stopped,
}

fn prepare(message: &CommandMessage, command_id: &str) -> Result<Job, Rejection> {
    Ok(match message.parse()? {
        Command::Submit(submit) => {
            let request = SubmitRequest::encode(&submit, command_id)
                .map_err(|_| Rejection::of("the body could not be encoded for ElevenLabs"))?;
            Job::Submit(Box::new(SubmitJob {
                request,
                fingerprint: submit.fingerprint(),
                lost: Lost {
                    command_id: command_id.to_owned(),
                    agent_id: submit.agent_id,
                    name: submit.call_name,
                },
                phone_provider: submit.phone_provider,
            }))
        }
        Command::Cancel(target) => Job::Existing(CommandKind::Cancel, target),
        Command::Get(target) => Job::Existing(CommandKind::Get, target),
    })
}

fn answered(message: &CommandMessage, command_id: &str, of: ResultOf, ending: Ending) -> Handled {
    Handled::Answered(Arc::new(ResultEvent::new(message, command_id, of, ending)))
}

fn finish(message: &CommandMessage, command_id: &str, ended: Attempts) -> Handled {
    let (result, attempts, in_doubt) = match ended {
        Attempts::Ended { result, attempts, in_doubt } => (result, attempts, in_doubt),
        // To read or to cancel twice is harmless.
        Attempts::Stopped => return Handled::GivenBack,
    };
    let outcome = match result {
        Ok(answer) => outcome::succeeded(answer, None),
        Err(error)
            if in_doubt
                && message.kind() == CommandKind::Cancel
                && error.class() != Class::Refused =>
        {
            outcome::cancel_unknown(&error.to_string())
        }
        Err(error) => outcome::failure(&error, attempts),
    };
    answered(message, command_id, ResultOf::Command, Ending { attempts, outcome })
}
