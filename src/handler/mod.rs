//! Executes one command: claim, call the vendor, record, result. Knows no AMQP.

mod outcome;
mod submit;
mod turn;
mod vendor;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tracing::info;
use uuid::Uuid;

use crate::domain::command::{BatchId, Command, CommandKind, CommandMessage, Target};
use crate::domain::result::{Ending, ErrorCode, Outcome, ResultEvent, ResultOf};
use crate::domain::{Earlier, Rejection};
use crate::elevenlabs::{Answer, Breaker, Class, Client, Error, Finder, Lost, SubmitRequest};
use crate::ledger::{Found, History, Ledger};
use crate::retry::Policy;
use crate::telemetry::chain;

pub use crate::elevenlabs::State as VendorState;

use submit::SubmitJob;
use turn::{Clearance, Deferral, Next, Turn};
use vendor::Key;

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
    /// It has none yet, and has to wait too long for a command in hand: to a delay queue, from where
    /// it comes back.
    Deferred {
        /// About so long.
        wait: Duration,
        /// What it has to take along.
        earlier: Earlier,
    },
    /// It is not executed any more: to the dead-letter queue, once its result is published.
    Condemned {
        /// The result.
        event: Arc<ResultEvent>,
        /// Why, for who finds it there.
        reason: String,
    },
    /// It has none, and nothing is lost by that: back to its queue. The worker is stopping.
    GivenBack,
}

/// Executes commands against the vendor.
pub struct Handler {
    finder: Arc<Finder>,
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
    /// Find out whether the key is refused for everything. Then wait for a person; else fail.
    AskAboutKey,
}

/// The whole policy. Reading and cancelling twice is harmless, submitting twice is not.
pub const fn then(kind: CommandKind, class: Class) -> Then {
    match (kind, class) {
        (_, Class::Refused) => Then::Fail,
        (_, Class::Unauthorized) => Then::AskAboutKey,
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

/// A series of attempts, over all times in hand.
#[derive(Clone, Copy)]
struct Tried {
    attempts: u32,
    /// One of them may have been done although it gave no answer.
    in_doubt: bool,
}

/// The end of a series of attempts.
enum Attempts {
    Ended(Result<Answer, Error>),
    /// The horizon is over, and the vendor asks for more time, or refuses the key.
    GivenUp(String),
    /// `not_after` has passed.
    Expired,
    Deferred(Deferral),
    /// The worker is stopping.
    Stopped,
}

impl Handler {
    /// A handler that remembers submits in `ledger`.
    pub fn new(vendor: Client, ledger: Ledger, timing: Timing) -> Self {
        Self {
            finder: Arc::new(Finder::new(vendor.clone())),
            vendor,
            ledger,
            retry: timing.retry,
            settling_window: timing.settling_window,
            large_bodies: Arc::new(Semaphore::new(LARGE_BODIES_AT_ONCE)),
        }
    }

    /// Executes `message`. Waits as long as the retry policy and `stopping` say.
    pub async fn handle(&self, message: Arc<CommandMessage>, stopping: &Stopping) -> Handled {
        let command_id = command_id(&message);
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
        let deadline = message.deadline().unwrap_or_default();
        let mut turn = Turn::begin(self.retry, message.earlier.clone(), deadline);
        let (kind, target) = match job {
            Job::Submit(submit) => {
                return self.submit(&message, &command_id, &submit, turn, stopping).await;
            }
            Job::Existing(kind, target) => (kind, target),
        };
        let mut tried = Tried {
            attempts: turn.earlier().attempts,
            // Whoever had it before, and left no word, may have sent it.
            in_doubt: turn.earlier().in_doubt || message.came_back() > 0,
        };
        let outcome = match self.batch_of(kind, target, &turn, tried, stopping).await {
            Looked::Batch(id) => {
                let attempts = if kind == CommandKind::Cancel {
                    let call = || self.cancel(&id);
                    self.attempt(kind, &mut turn, &mut tried, stopping, call).await
                } else {
                    let call = || self.vendor.get(&id);
                    self.attempt(kind, &mut turn, &mut tried, stopping, call).await
                };
                match attempts {
                    Attempts::Ended(Ok(answer)) => outcome::succeeded(answer, None),
                    Attempts::Ended(Err(error)) => outcome::not_done(kind, &error, tried),
                    Attempts::GivenUp(reason) => outcome::given_up(kind, &reason, tried),
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
        answered(&message, &command_id, ResultOf::Command, ending)
    }

    /// Gives up a command that came back `deliveries` times: without reading its body, which may be
    /// what ended the workers.
    pub async fn condemn(&self, message: &CommandMessage, deliveries: u32) -> Handled {
        let kind = message.kind();
        let command_id = command_id(message);
        let poison = Ending {
            attempts: message.earlier.attempts,
            outcome: outcome::poison(kind, deliveries),
        };
        // An id that is refused is no id of a submit.
        let is_known = message.producer_id().is_some() && message.check_ids().is_ok();
        let ending = if kind == CommandKind::Submit && is_known {
            let ending = |begun: Option<History>| match begun {
                None => poison.clone(),
                Some(history) => Ending {
                    attempts: history.attempts,
                    outcome: outcome::poison_begun(&command_id, deliveries),
                },
            };
            match self.ledger.condemn(&command_id, ending).await {
                Ok(Found::Settled(ending)) => ending,
                // Nothing is answered that is not known to be true.
                Ok(Found::InHand | Found::Nobody) | Err(_) => {
                    let earlier = message.earlier.set_aside(deliveries);
                    return Handled::Deferred { wait: Duration::ZERO, earlier };
                }
            }
        } else {
            poison
        };
        let event = Arc::new(ResultEvent::new(message, &command_id, ResultOf::Command, ending));
        let said = event.error_code().map_or("the batch exists", ErrorCode::name);
        let reason = format!(
            "{}: it came back {deliveries} times without an end; its result says: {said}",
            ErrorCode::PoisonMessage
        );
        Handled::Condemned { event, reason }
    }

    /// Why the ledger cannot be written, if so.
    pub fn ledger_trouble(&self) -> watch::Receiver<Option<String>> {
        self.ledger.trouble()
    }

    /// What the outcomes of all calls say about the vendor.
    pub fn breaker(&self) -> &Breaker {
        self.vendor.breaker()
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
    async fn batch_of(
        &self,
        kind: CommandKind,
        target: Target,
        turn: &Turn,
        tried: Tried,
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
                return Looked::Nothing(outcome::too_late(kind, tried));
            }
            let found = self.ledger.find(&submit_id, strike).await;
            let is_away = found.is_err();
            // One is enough, and each is a write.
            strike &= is_away;
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
                Ok(Found::InHand) if turn.remaining(Duration::ZERO).is_zero() => {
                    return Looked::Nothing(outcome::still_in_hand(kind, &submit_id));
                }
                Ok(Found::InHand) | Err(_) => {}
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
                Then::Again | Then::Look => {}
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

/// What a cancel or a get is about.
enum Looked {
    Batch(BatchId),
    /// There is no batch (yet).
    Nothing(Outcome),
    Deferred(Deferral),
    Stopped,
}

fn command_id(message: &CommandMessage) -> String {
    // A made-up one tells nothing apart; it only ties the result to the log line.
    message.producer_id().map_or_else(|| Uuid::now_v7().to_string(), str::to_owned)
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

fn deferred(deferral: Deferral, tried: Tried) -> Handled {
    let Deferral { wait, asked, age } = deferral;
    let earlier = Earlier::deferred(age, asked, tried.attempts, tried.in_doubt);
    Handled::Deferred { wait, earlier }
}
