//! Executes one command: claim, call the vendor, record, result. Knows no AMQP.

mod account;
mod existing;
mod finish;
mod keys;
mod origin;
mod outcome;
mod step;
mod submit;
mod turn;
mod vendor;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tracing::info;
use uuid::Uuid;

use crate::domain::command::{Command, CommandKind, CommandMessage, Target};
use crate::domain::result::{Ending, ErrorCode, Outcome, ResultEvent, ResultOf};
use crate::domain::{Earlier, Rejection, short};
use crate::elevenlabs::{Breaker, Class, Client, Finder, SubmitRequest};
use crate::ledger::{Body, Ended, Found, Ledger};
use crate::retry::Policy;
use crate::telemetry::chain;

pub use crate::elevenlabs::State as VendorState;
pub use account::Watch as AccountWatch;
pub use finish::Unpublished;

use account::Account;
use keys::SeenKeys;
use origin::Origin;
use submit::SubmitJob;
use turn::Turn;

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
    Answered {
        /// The result.
        event: Arc<ResultEvent>,
        /// The ledger keeps it, and has to be told when it is published.
        is_recorded: bool,
    },
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
        /// The ledger keeps the result, and has to be told when it is published.
        is_recorded: bool,
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
    seen_keys: SeenKeys,
    account: Account,
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
    /// Hold all submits until ElevenLabs takes one.
    Hold,
}

/// The whole policy. Reading and cancelling twice is harmless, submitting twice is not.
pub const fn then(kind: CommandKind, class: Class) -> Then {
    match (kind, class) {
        (_, Class::Refused) => Then::Fail,
        (_, Class::Unauthorized) => Then::AskAboutKey,
        (CommandKind::Submit, Class::Unknown) => Then::Look,
        (CommandKind::Submit, Class::Account) => Then::Hold,
        (_, Class::NeverSent | Class::RateLimited)
        | (CommandKind::Cancel | CommandKind::Get, Class::Account | Class::Unknown) => Then::Again,
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

impl Handler {
    /// A handler that remembers submits in `ledger`.
    pub fn new(vendor: Client, ledger: Ledger, timing: Timing) -> Self {
        Self {
            finder: Arc::new(Finder::new(vendor.clone())),
            vendor,
            ledger,
            retry: timing.retry,
            settling_window: timing.settling_window,
            seen_keys: SeenKeys::default(),
            account: Account::default(),
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
        let deadline = message.begin_before();
        let turn = Turn::begin(self.retry, message.earlier.clone(), deadline);
        match job {
            Job::Submit(submit) => {
                self.submit(&message, &command_id, &submit, turn, stopping).await
            }
            Job::Existing(kind, target) => {
                self.existing(&message, &command_id, (kind, target), turn, stopping).await
            }
        }
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
        let (of, ending) = if kind == CommandKind::Submit && is_known {
            let condemned = self.condemn_submit(message, &command_id, &poison, deliveries).await;
            let Some(condemned) = condemned else {
                // Nothing is answered that is not known to be true.
                let earlier = message.earlier.set_aside(deliveries);
                return Handled::Deferred { wait: Duration::ZERO, earlier };
            };
            condemned
        } else {
            (ResultOf::Command, poison)
        };
        let event = Arc::new(ResultEvent::new(message, &command_id, of, ending));
        let said = event.error_code().map_or("the batch exists", ErrorCode::name);
        let reason = format!(
            "{}: it came back {deliveries} times without an end; its result says: {said}",
            ErrorCode::PoisonMessage
        );
        let is_recorded = kind == CommandKind::Submit && of == ResultOf::Command;
        Handled::Condemned { event, reason, is_recorded }
    }

    /// Records that a submit is given up; `None` where somebody has it, or the ledger cannot be used.
    async fn condemn_submit(
        &self,
        message: &CommandMessage,
        command_id: &str,
        poison: &Ending,
        deliveries: u32,
    ) -> Option<(ResultOf, Ending)> {
        let ending_of = |attempts, begun| {
            let outcome = outcome::poison_begun(command_id, deliveries);
            if begun { Ending { attempts, outcome } } else { poison.clone() }
        };
        let (hash, doubt) = (hash(&message.body), self.is_in_doubt(message));
        match self.ledger.condemn(command_id, hash, doubt, ending_of).await {
            Ok(Found::Settled(ended)) => Some((ResultOf::Command, ended.ending)),
            // The row is another message's: neither its result is this one's, nor this one's its.
            Ok(Found::Conflict) => Some((ResultOf::Refusal, poison.clone())),
            Ok(Found::InHand | Found::Nobody) | Err(_) => None,
        }
    }

    /// Whether somebody may have begun a submit that the ledger does not know: its message has met a
    /// row, which another ledger has, or it came back, and this ledger was not there all the time.
    fn is_in_doubt(&self, message: &CommandMessage) -> bool {
        let Earlier { met_row, in_doubt, .. } = message.earlier;
        met_row || in_doubt || message.came_back() > 0 && !self.ledger.was_drained()
    }

    /// Notes that no submit waits in any queue: see [`Ledger::note_drained`].
    pub async fn note_drained(&self) {
        if let Err(error) = self.ledger.note_drained().await {
            info!(error = chain(&error), "it is not noted that the queues were empty");
        }
    }

    /// How long a command is retried.
    pub fn horizon(&self) -> Duration {
        self.retry.horizon.unwrap_or_default()
    }

    /// Why the ledger cannot be written, if so.
    pub fn ledger_trouble(&self) -> watch::Receiver<Option<String>> {
        self.ledger.trouble()
    }

    /// What the outcomes of all calls say about the vendor.
    pub fn breaker(&self) -> &Breaker {
        self.vendor.breaker()
    }

    /// Whether fresh submits are taken for the account.
    pub fn account(&self) -> AccountWatch {
        self.account.watch(account::FOR_DEFERRED)
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
            let origin = Origin::new(message, command_id, &submit);
            let body = Body {
                fingerprint: submit.fingerprint(),
                hash: hash(&message.body),
                origin: origin.to_json(),
            };
            Job::Submit(Box::new(SubmitJob { request, body, origin }))
        }
        Command::Cancel(target) => Job::Existing(CommandKind::Cancel, target),
        Command::Get(target) => Job::Existing(CommandKind::Get, target),
    })
}

/// Of a body's raw bytes, read or not.
fn hash(body: &[u8]) -> Uuid {
    short(blake3::hash(body).into())
}

fn answered(message: &CommandMessage, command_id: &str, of: ResultOf, ending: Ending) -> Handled {
    let event = Arc::new(ResultEvent::new(message, command_id, of, ending));
    Handled::Answered { event, is_recorded: false }
}

/// What the ledger keeps until the broker has it.
fn recorded(message: &CommandMessage, command_id: &str, ended: Ended) -> Handled {
    let event = ResultEvent::new(message, command_id, ResultOf::Command, ended.ending);
    Handled::Answered { event: Arc::new(event), is_recorded: !ended.published }
}

#[cfg(test)]
mod model;
