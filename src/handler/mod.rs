//! Executes one command: claim, call the vendor, record, result. Knows no AMQP.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::domain::command::{BatchId, COMMAND_ID_VARIABLE, Command, CommandKind, CommandMessage};
use crate::domain::result::{ErrorCode, Outcome, ResultEvent, ResultOf};
use crate::domain::{Rejection, excerpt};
use crate::elevenlabs::{Answer, Class, Client, Error, SubmitRequest};
use crate::ledger::{Claim, Memory};
use crate::retry::Policy;
use crate::telemetry::chain;

/// Larger bodies are parsed off the reactor: 10,000 recipients take some 20 ms.
const INLINE_BODY_BYTES: usize = 256 * 1024;

/// How many large bodies are read at the same time: one of 16 MB can take some 300 MB of memory.
const LARGE_BODIES_AT_ONCE: usize = 2;

/// How urgently a handler has to come to an end.
#[derive(Clone, Debug, Default)]
pub struct Stopping {
    /// Begin nothing more: no new attempt, no further waiting.
    pub soon: CancellationToken,
    /// Do not even wait for the request that is under way.
    pub now: CancellationToken,
}

/// What became of a command.
pub enum Handled {
    /// It has a result, to be published before the command is acknowledged.
    Answered(Arc<ResultEvent>),
    /// The worker is stopping and nothing of it is under way: back to its queue.
    GivenBack,
}

/// Executes commands against the vendor.
pub struct Handler {
    vendor: Client,
    ledger: Arc<Memory>,
    retry: Policy,
    large_bodies: Arc<Semaphore>,
}

/// A checked command, encoded for the vendor.
enum Job {
    Submit(Box<SubmitJob>),
    Cancel(BatchId),
    Get(BatchId),
}

struct SubmitJob {
    request: SubmitRequest,
    fingerprint: Uuid,
    call_name: String,
    phone_provider: Option<String>,
}

/// The end of a series of attempts.
enum Attempts {
    Ended {
        result: Result<Answer, Error>,
        attempts: u32,
        /// One of them may have been done although it gave no answer.
        in_doubt: bool,
    },
    /// Stopped before the first attempt or between two, after which another one is harmless.
    Stopped,
    /// Stopped while a request was under way.
    CutOff { attempts: u32 },
}

impl Handler {
    /// A handler with an empty ledger.
    pub fn new(vendor: Client, retry: Policy) -> Self {
        Self {
            vendor,
            ledger: Arc::default(),
            retry,
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
                let failed = Outcome::Failed {
                    code: ErrorCode::InvalidCommand,
                    error: rejection.to_string(),
                };
                return answered(&message, &command_id, ResultOf::Refusal, failed, 0);
            }
        };
        match job {
            Job::Submit(submit) => self.submit(&message, &command_id, &submit, stopping).await,
            Job::Cancel(id) => {
                let attempts =
                    self.attempt(CommandKind::Cancel, stopping, || self.cancel(&id)).await;
                finish(&message, &command_id, attempts)
            }
            Job::Get(id) => {
                let attempts =
                    self.attempt(CommandKind::Get, stopping, || self.vendor.get(&id)).await;
                finish(&message, &command_id, attempts)
            }
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

    async fn submit(
        &self,
        message: &CommandMessage,
        command_id: &str,
        job: &SubmitJob,
        stopping: &Stopping,
    ) -> Handled {
        let claim = loop {
            match self.ledger.claim(command_id, job.fingerprint) {
                Claim::Held(held) => tokio::select! {
                    () = held.freed() => {}
                    () = stopping.soon.cancelled() => return Handled::GivenBack,
                },
                Claim::Fresh(fresh) => break fresh,
                Claim::Settled(result) => {
                    return Handled::Answered(Arc::new(result.for_repeat(message)));
                }
                Claim::Abandoned => {
                    let outcome =
                        outcome_unknown(command_id, job, "the task that sent it ended early");
                    return answered(message, command_id, ResultOf::Command, outcome, 1);
                }
                Claim::Conflict => {
                    let failed = Outcome::Failed {
                        code: ErrorCode::CommandIdReused,
                        error: format!(
                            "The message_id \"{}\" was already used for a submit with another body, \
                             so this one was not executed. Publish it again with a message_id of its own.",
                            excerpt(command_id)
                        ),
                    };
                    return answered(message, command_id, ResultOf::Refusal, failed, 0);
                }
            }
        };
        let attempt = || self.vendor.submit(&job.request);
        let (result, attempts) = match self.attempt(CommandKind::Submit, stopping, attempt).await {
            Attempts::Ended { result, attempts, .. } => (Some(result), attempts),
            Attempts::Stopped => {
                claim.release();
                return Handled::GivenBack;
            }
            Attempts::CutOff { attempts } => (None, attempts),
        };
        let outcome = match result {
            // Given back, it would be sent again by the next worker.
            None => {
                outcome_unknown(command_id, job, "the worker was stopped before the answer came")
            }
            Some(Ok(answer)) => {
                let warning = provider_warning(job.phone_provider.as_deref(), &answer);
                if warning.is_some() {
                    warn!(
                        command_id,
                        batch_id = answer.batch_id,
                        expected = job.phone_provider,
                        actual = answer.phone_provider,
                        "the batch exists, but its phone provider is not the one the command names"
                    );
                }
                Outcome::Succeeded { data: answer.data, batch_id: answer.batch_id, warning }
            }
            Some(Err(error)) if error.class() == Class::Unknown => {
                outcome_unknown(command_id, job, &error.to_string())
            }
            Some(Err(error)) => failure(&error, attempts),
        };
        let result = ResultEvent::new(message, command_id, ResultOf::Command, outcome, attempts);
        let result = Arc::new(result);
        claim.settle(Arc::clone(&result));
        Handled::Answered(result)
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

    /// Calls until there is an end: an answer, an error that another attempt cannot or must not
    /// change, the retry horizon, or a stop.
    async fn attempt<F>(
        &self,
        kind: CommandKind,
        stopping: &Stopping,
        call: impl Fn() -> F,
    ) -> Attempts
    where
        F: Future<Output = Result<Answer, Error>>,
    {
        let mut schedule = self.retry.start();
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
                () = stopping.now.cancelled() => return Attempts::CutOff { attempts },
            };
            let wait = match &result {
                Ok(_) => None,
                Err(error) => {
                    in_doubt |= error.class() == Class::Unknown;
                    let retry = may_retry(kind, error.class());
                    retry.then(|| schedule.next_wait(error.retry_after())).flatten()
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

/// Reading and cancelling twice is harmless; a submit is sent again only where it surely created
/// nothing.
pub const fn may_retry(kind: CommandKind, class: Class) -> bool {
    match (kind, class) {
        (_, Class::Refused) | (CommandKind::Submit, Class::Unknown) => false,
        (_, Class::NeverSent | Class::RateLimited)
        | (CommandKind::Cancel | CommandKind::Get, Class::Unknown) => true,
    }
}

fn prepare(message: &CommandMessage, command_id: &str) -> Result<Job, Rejection> {
    Ok(match message.parse()? {
        Command::Submit(submit) => {
            let request = SubmitRequest::encode(&submit, command_id)
                .map_err(|_| Rejection::of("the body could not be encoded for ElevenLabs"))?;
            Job::Submit(Box::new(SubmitJob {
                request,
                fingerprint: submit.fingerprint(),
                call_name: submit.call_name,
                phone_provider: submit.phone_provider,
            }))
        }
        Command::Cancel(id) => Job::Cancel(id),
        Command::Get(id) => Job::Get(id),
    })
}

fn answered(
    message: &CommandMessage,
    command_id: &str,
    of: ResultOf,
    outcome: Outcome,
    attempts: u32,
) -> Handled {
    Handled::Answered(Arc::new(ResultEvent::new(message, command_id, of, outcome, attempts)))
}

fn finish(message: &CommandMessage, command_id: &str, ended: Attempts) -> Handled {
    let (result, attempts, in_doubt) = match ended {
        Attempts::Ended { result, attempts, in_doubt } => (result, attempts, in_doubt),
        // To read or to cancel twice is harmless.
        Attempts::Stopped | Attempts::CutOff { .. } => return Handled::GivenBack,
    };
    let outcome = match result {
        Ok(answer) => {
            Outcome::Succeeded { data: answer.data, batch_id: answer.batch_id, warning: None }
        }
        Err(error)
            if in_doubt
                && message.kind() == CommandKind::Cancel
                && error.class() != Class::Refused =>
        {
            Outcome::Failed {
                code: ErrorCode::OutcomeUnknown,
                error: format!(
                    "It is not known whether ElevenLabs cancelled this batch: {error}. People may \
                     still be called: publish the cancel again with a new message_id (repeating it \
                     is harmless), or look at the batch's status in ElevenLabs."
                ),
            }
        }
        Err(error) => failure(&error, attempts),
    };
    answered(message, command_id, ResultOf::Command, outcome, attempts)
}

/// The result of an error that is not going to be retried.
fn failure(error: &Error, attempts: u32) -> Outcome {
    let (code, error) = match error {
        Error::Refused { status: 401 | 403, message, .. } => (
            ErrorCode::Unauthorized,
            format!(
                "ElevenLabs refused the worker's API key: {message}. The operator of call-manager \
                 has to check ELEVENLABS_API_KEY and its permissions; then publish the command again with \
                 a new message_id."
            ),
        ),
        Error::Refused { status: 404, message, .. } => (
            ErrorCode::NotFound,
            format!("ElevenLabs does not know it: {message}. Check the ids in the command."),
        ),
        Error::Refused { message, .. } => (
            ErrorCode::RejectedByElevenlabs,
            format!(
                "ElevenLabs refused the command: {message}. Correct it and publish it again with a new \
                 message_id."
            ),
        ),
        unavailable => (
            ErrorCode::UpstreamUnavailable,
            format!(
                "ElevenLabs could not do it in {attempts} attempt(s); the last one ended so: \
                 {unavailable}. Publish the command again later, with a new message_id."
            ),
        ),
    };
    Outcome::Failed { code, error }
}

fn outcome_unknown(command_id: &str, job: &SubmitJob, reason: &str) -> Outcome {
    Outcome::Failed {
        code: ErrorCode::OutcomeUnknown,
        error: format!(
            "It is not known whether ElevenLabs created this batch: {reason}. Nothing was sent \
             again. Look in ElevenLabs for a batch named \"{}\" whose recipients carry the dynamic \
             variable {COMMAND_ID_VARIABLE} = \"{}\"; only if there is none, publish the submit \
             again with a new message_id.",
            excerpt(&job.call_name),
            excerpt(command_id),
        ),
    }
}

fn provider_warning(expected: Option<&str>, answer: &Answer) -> Option<String> {
    let expected = expected?;
    let actual = answer.phone_provider.as_deref().unwrap_or("none");
    (actual != expected).then(|| {
        format!(
            "phone_provider is {expected} in the command, but the agent_phone_number_id belongs to \
             {}; the batch was created with the latter",
            excerpt(actual)
        )
    })
}
