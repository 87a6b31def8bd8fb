//! Executes a submit that was claimed: search, send, record. One loop asks `step.rs` what comes next.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::crash;
use crate::domain::command::CommandKind;
use crate::domain::result::{Ending, Outcome};
use crate::elevenlabs::{Answer, Class, Error, SubmitRequest};
use crate::ledger::{Attempted, Ended, Go, Lease};
use crate::retry::{Policy, Schedule};
use crate::telemetry::chain;

use super::super::account::Pass;
use super::super::origin::Origin;
use super::super::outcome::{
    expired, failure, message_gone, provider_warning, struck, succeeded, unavailable,
};
use super::super::step::{Reason, Standing, Step, next};
use super::super::turn::{Clearance, Deferral, May, Next, Turn};
use super::super::vendor::Key;
use super::super::{Handler, Stopping, Then, Tried, VendorState, then};
use super::search::Searched;
use super::{CLAIMING, Waited, wait_for_ledger};

/// How often to try a ledger that cannot be used once a request has been sent, and for how long: what
/// the request has come to is worth waiting for, but without it the batch is found again.
const RECORDING: Policy = Policy { horizon: Some(Duration::from_secs(60)), ..CLAIMING };

/// A submit that this task has claimed.
pub struct Execution<'a> {
    pub handler: &'a Handler,
    pub origin: &'a Origin,
    /// `None` where its message does not come back.
    pub request: Option<&'a SubmitRequest>,
    pub stopping: &'a Stopping,
    pub lease: Lease,
    /// Of all workers; the last ones of one that was killed may be missing.
    pub attempts: u32,
    pub turn: &'a mut Turn,
    pub doubt: Doubt,
    /// This one has sent a request itself.
    sent: bool,
    /// The horizon is over.
    spent: bool,
    /// While the ledger cannot be used.
    ledger_pace: Option<Schedule>,
}

/// Whether an attempt may have been done although its outcome is not known.
pub enum Doubt {
    None,
    /// Why, for a person.
    Since {
        lost: String,
        /// This task has seen its own request end, and the ledger does not know it yet.
        ended: bool,
    },
}

/// How an execution ends without an answer.
pub enum Leave {
    /// It has to wait too long, for ElevenLabs or for the ledger.
    Deferred(Deferral),
    /// It is another worker's now.
    TakenOver,
    /// The worker is stopping.
    Stopped,
}

/// The end of an execution.
pub enum Executed {
    Ended(Ended),
    TakenOver,
    Deferred(Deferral, Tried),
    Stopped,
}

/// The end of a request.
enum Sent {
    Done(Answer),
    Over(Outcome),
    /// To be decided anew.
    Undone,
}

/// The end of a pause.
pub(super) enum Paused {
    ToTheEnd,
    /// By a stop, a cancel, or a lost lease.
    Interrupted,
}

impl<'a> Execution<'a> {
    /// Of a claim under which nothing was done yet.
    pub fn new(
        handler: &'a Handler,
        origin: &'a Origin,
        request: Option<&'a SubmitRequest>,
        stopping: &'a Stopping,
        lease: Lease,
        turn: &'a mut Turn,
    ) -> Self {
        let attempts = lease.attempts().max(turn.earlier().attempts);
        let (ledger_pace, doubt) = (None, Doubt::None);
        Self {
            handler,
            origin,
            request,
            stopping,
            lease,
            attempts,
            turn,
            doubt,
            sent: false,
            spent: false,
            ledger_pace,
        }
    }

    /// After what others did, if they left no word.
    pub fn after(mut self, attempted: Option<&Attempted>) -> Self {
        if attempted.is_some() {
            let lost = "the worker that had it in hand ended before it had recorded an answer";
            self.doubt = Doubt::Since { lost: lost.to_owned(), ended: false };
        }
        self
    }

    pub async fn run(mut self) -> Executed {
        match self.execute().await {
            Ok(ended) => {
                // A cancel came while the batch was created: whoever records the batch cancels it.
                self.handler.cancel_struck(&self.origin.search.command_id, &ended).await;
                Executed::Ended(ended)
            }
            Err(Leave::TakenOver) => Executed::TakenOver,
            Err(Leave::Deferred(deferral)) => {
                let tried = Tried { attempts: self.attempts, in_doubt: self.is_in_doubt() };
                self.release().await;
                Executed::Deferred(deferral, tried)
            }
            Err(Leave::Stopped) => {
                self.release().await;
                Executed::Stopped
            }
        }
    }

    async fn execute(&mut self) -> Result<Ended, Leave> {
        loop {
            let outcome = match next(self.standing()) {
                Step::Search => match self.search().await? {
                    Searched::Found(answer) => return self.exists(answer).await,
                    Searched::NotCreated => {
                        self.not_created()?;
                        continue;
                    }
                    Searched::Unknown(outcome) => outcome,
                },
                Step::Send => match self.send().await? {
                    Sent::Done(answer) => return self.exists(answer).await,
                    Sent::Over(outcome) => outcome,
                    Sent::Undone => continue,
                },
                Step::End(reason) => self.outcome(reason),
            };
            return self.settle(outcome).await;
        }
    }

    fn is_in_doubt(&self) -> bool {
        matches!(self.doubt, Doubt::Since { .. })
    }

    fn standing(&self) -> Standing {
        Standing {
            in_doubt: self.is_in_doubt(),
            struck: self.lease.is_struck(),
            expired: self.turn.has_expired(),
            has_body: self.request.is_some(),
            spent: self.spent,
        }
    }

    fn outcome(&self, reason: Reason) -> Outcome {
        match reason {
            Reason::Struck => struck(self.attempts),
            Reason::Expired => expired(self.attempts),
            Reason::MessageGone => message_gone(self.attempts),
            Reason::Unavailable => {
                let reason = "its answer was lost, and its batch was searched for and is not there";
                unavailable(self.attempts, reason)
            }
        }
    }

    /// A search has proved that nothing was created.
    fn not_created(&mut self) -> Result<(), Leave> {
        self.doubt = Doubt::None;
        // What another worker has tried is no reason to give up.
        self.spent = self.sent && self.turn.remaining(Duration::ZERO).is_zero();
        // One that is lost again and again is not held for ever.
        if self.sent && !self.spent && self.turn.left_in_hand().is_zero() {
            return Err(Leave::Deferred(self.turn.deferral(Duration::ZERO)));
        }
        Ok(())
    }

    /// Sends it, if it may leave now.
    async fn send(&mut self) -> Result<Sent, Leave> {
        let Some(request) = self.request else { return Ok(Sent::Undone) };
        match self.clearance(Turn::may_call).await {
            Clearance::Call => {}
            Clearance::Defer(deferral) => return Err(Leave::Deferred(deferral)),
            Clearance::Expired => return Ok(Sent::Undone),
            Clearance::NoMore(reason) => {
                return Ok(Sent::Over(unavailable(self.attempts, &reason)));
            }
            Clearance::Stopped => return Err(Leave::Stopped),
        }
        let Some(pass) = self.pass().await? else { return Ok(Sent::Undone) };
        // The ledger may have taken its time.
        if !self.is_allowed().await? || self.turn.has_expired() {
            return Ok(Sent::Undone);
        }
        crash::point(2);
        self.attempts += 1;
        self.sent = true;
        let result = tokio::select! {
            biased;
            result = self.handler.vendor.submit(request) => result,
            () = self.stopping.now.cancelled() => {
                let lost = "the worker was stopped before an answer came".to_owned();
                self.doubt = Doubt::Since { lost, ended: false };
                return Err(Leave::Stopped);
            }
        };
        let error = match result {
            Ok(answer) if self.handler.finder.may_be_of(&answer, &self.origin.search) => {
                pass.accepted();
                return Ok(Sent::Done(answer));
            }
            Ok(_) => Error::another_batch(),
            Err(error) => error,
        };
        if error.class() == Class::Account {
            pass.refused(&self.origin.search.command_id, &error);
        } else {
            drop(pass);
        }
        self.failed(&error).await
    }

    /// Waits a moment while ElevenLabs takes no submits of the account; `None`: to be decided anew.
    async fn pass(&mut self) -> Result<Option<Pass<'a>>, Leave> {
        let account = &self.handler.account;
        let mut held = account.watch(Duration::ZERO);
        if let Some(pass) = account.pass() {
            return Ok(Some(pass));
        }
        let left = self.turn.left_in_hand();
        if left.is_zero() {
            // Nobody's campaign fails because the credits are used up.
            return Err(Leave::Deferred(self.turn.patient_deferral(Duration::ZERO)));
        }
        tokio::select! {
            () = held.changed() => {}
            _ = self.pause(left) => {}
        }
        Ok(None)
    }

    /// Whether the lease covers a request, and no cancel has come.
    async fn is_allowed(&mut self) -> Result<bool, Leave> {
        let error = match self.lease.before_request(self.attempts + 1).await {
            Ok(Go::Ahead) => {
                self.ledger_pace = None;
                return Ok(true);
            }
            Ok(Go::Struck) => return Ok(false),
            Ok(Go::Gone) => return Err(Leave::TakenOver),
            Err(error) => error,
        };
        let command_id = &self.origin.search.command_id;
        let pace = self.ledger_pace.get_or_insert_with(|| RECORDING.start());
        let stop = &self.stopping.claimed;
        match wait_for_ledger(pace, Duration::MAX, command_id, &error, stop).await {
            Waited::TryAgain => Ok(false),
            Waited::TooLong => Err(Leave::Deferred(self.turn.patient_deferral(Duration::ZERO))),
            Waited::Stopped => Err(Leave::Stopped),
        }
    }

    async fn failed(&mut self, error: &Error) -> Result<Sent, Leave> {
        match then(CommandKind::Submit, error.class()) {
            Then::Fail => return Ok(Sent::Over(failure(error, self.attempts))),
            Then::Look => {
                self.doubt = Doubt::Since { lost: error.to_string(), ended: true };
                return Ok(Sent::Undone);
            }
            Then::AskAboutKey => match self.handler.key().await {
                Key::Accepted => return Ok(Sent::Over(failure(error, self.attempts))),
                // The breaker is open by now.
                Key::Refused => return Ok(Sent::Undone),
                Key::Unknown => {}
            },
            // It waits for its pass.
            Then::Hold => return Ok(Sent::Undone),
            Then::Again => {}
        }
        match self.turn.next(error.retry_after()) {
            Next::Wait(wait) => {
                self.log_retry(error, wait);
                self.pause(wait).await;
                Ok(Sent::Undone)
            }
            Next::Defer(deferral) => Err(Leave::Deferred(deferral)),
            // Whether it is the key could not be found out.
            Next::Over if error.class() == Class::Unauthorized => {
                Ok(Sent::Over(unavailable(self.attempts, &error.to_string())))
            }
            Next::Over => Ok(Sent::Over(failure(error, self.attempts))),
        }
    }

    /// Waits until ElevenLabs may be called, and keeps the submit meanwhile.
    pub(super) async fn clearance(
        &mut self,
        may: impl Fn(&Turn, CommandKind, &VendorState) -> May,
    ) -> Clearance {
        let mut vendor = self.handler.breaker().watch();
        loop {
            if self.stopping.claimed.is_cancelled() {
                return Clearance::Stopped;
            }
            let limit = match may(self.turn, CommandKind::Submit, &vendor.borrow_and_update()) {
                ControlFlow::Break(clearance) => return clearance,
                ControlFlow::Continue(limit) => limit,
            };
            tokio::select! {
                changed = vendor.changed() => if changed.is_err() { return Clearance::Stopped },
                paused = self.pause(limit) => match paused {
                    Paused::ToTheEnd => {}
                    Paused::Interrupted if self.stopping.claimed.is_cancelled() => {}
                    // A cancel or a lost lease: which it is, is found before the request.
                    Paused::Interrupted => return Clearance::Call,
                },
            }
        }
    }

    fn log_retry(&self, error: &Error, wait: Duration) {
        info!(
            command = "submit",
            command_id = self.origin.search.command_id,
            attempt = self.attempts,
            wait_ms = wait.as_millis(),
            request_id = error.request_id(),
            error = chain(error),
            "will try again"
        );
    }

    /// Waits, and keeps the submit meanwhile. Ends early where the next step has a reason not to
    /// send: a stop, a cancel, a lost lease.
    pub(super) async fn pause(&mut self, wait: Duration) -> Paused {
        let over = Instant::now() + wait;
        loop {
            let left = over.saturating_duration_since(Instant::now());
            let slice = left.min(self.lease.length() / 4);
            tokio::select! {
                () = tokio::time::sleep(slice) => {}
                () = self.stopping.claimed.cancelled() => return Paused::Interrupted,
            }
            if slice == left {
                return Paused::ToTheEnd;
            }
            let renewed = self.lease.renew(self.attempts).await;
            if self.lease.is_struck() || matches!(renewed, Ok(None)) {
                return Paused::Interrupted;
            }
        }
    }

    /// The batch exists, by an answer or by the search.
    async fn exists(&mut self, answer: Answer) -> Result<Ended, Leave> {
        crash::point(5);
        let command_id = &self.origin.search.command_id;
        self.handler.finder.note(&answer.batch_id, command_id);
        let warning = provider_warning(self.origin.phone_provider.as_deref(), &answer);
        if warning.is_some() {
            warn!(
                command_id,
                batch_id = answer.batch_id,
                expected = self.origin.phone_provider,
                actual = answer.phone_provider,
                "the batch exists, but its phone provider is not the one the command names"
            );
        }
        // Unrecorded, it has to be searched for.
        let lost = "its answer could not be recorded".to_owned();
        self.doubt = Doubt::Since { lost, ended: true };
        self.settle(succeeded(answer, warning)).await
    }

    async fn settle(&mut self, outcome: Outcome) -> Result<Ended, Leave> {
        let ending = Ending { attempts: self.attempts, outcome };
        let mut pace = RECORDING.start();
        loop {
            let error = match self.lease.settle(&ending, self.origin.begins_at).await {
                Ok(Some(ended)) => return Ok(ended),
                Ok(None) => return Err(Leave::TakenOver),
                Err(error) => error,
            };
            let (command_id, stop) = (&self.origin.search.command_id, &self.stopping.now);
            match wait_for_ledger(&mut pace, Duration::MAX, command_id, &error, stop).await {
                Waited::TryAgain => {}
                Waited::TooLong => {
                    return Err(Leave::Deferred(self.turn.patient_deferral(Duration::ZERO)));
                }
                Waited::Stopped => return Err(Leave::Stopped),
            }
        }
    }

    async fn release(self) {
        let command_id = &self.origin.search.command_id;
        let in_doubt = self.is_in_doubt();
        if let Err(error) = self.lease.release(in_doubt, self.attempts).await {
            warn!(command_id, error = chain(&error), "the lease has to run out by itself");
        }
    }
}
