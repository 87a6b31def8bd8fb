//! Executes a submit: claim, look for what an earlier attempt left, send, record.

mod reconcile;

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::crash;
use crate::domain::Earlier;
use crate::domain::command::{CommandKind, CommandMessage};
use crate::domain::result::{Ending, Outcome, ResultOf};
use crate::elevenlabs::{Answer, Class, Error, Lost, SubmitRequest};
use crate::ledger::{Claim, Go, Lease, Unavailable};
use crate::retry::{Policy, Schedule};
use crate::telemetry::chain;

use reconcile::Reconciled;

use super::outcome::{
    expired, failure, provider_warning, reused, struck, submit_unknown, succeeded, unavailable,
};
use super::turn::{Clearance, Deferral, May, Next, Turn};
use super::vendor::Key;
use super::{Handled, Handler, Stopping, Then, Tried, VendorState, answered, deferred, then};

/// How often to try a ledger that cannot be used, before anything of a submit has begun.
const CLAIMING: Policy =
    Policy { initial: Duration::from_millis(100), max: Duration::from_secs(5), horizon: None };

/// The same once a request has been sent, and for how long: what it has come to is worth waiting for,
/// but without it the batch is found again.
const RECORDING: Policy = Policy { horizon: Some(Duration::from_secs(60)), ..CLAIMING };

/// How often to ask whether another worker is done.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// A checked submit, encoded for the vendor.
pub struct SubmitJob {
    pub request: SubmitRequest,
    pub fingerprint: Uuid,
    pub lost: Lost,
    pub phone_provider: Option<String>,
}

/// A submit that this task has claimed.
struct Execution<'a> {
    handler: &'a Handler,
    job: &'a SubmitJob,
    stopping: &'a Stopping,
    lease: Lease,
    /// Of all workers; the last ones of one that was killed may be missing.
    attempts: u32,
    /// This one has sent a request itself.
    sent: bool,
    /// One of the attempts may have been done although it gave no answer.
    in_doubt: bool,
    turn: &'a mut Turn,
    /// While the ledger cannot be used.
    ledger_pace: Option<Schedule>,
}

/// What comes next in an execution.
enum Step {
    /// An answer was lost, so: look for the batch first.
    Look(String),
    Send,
    Exists(Answer),
    Settle(Outcome),
    Defer(Deferral),
    TakenOver,
    LetGo,
}

/// The end of an execution.
enum Executed {
    Ended(Ending),
    /// It is another worker's now.
    TakenOver,
    /// It has to wait too long, for the vendor or for the ledger.
    Deferred(Deferral, Tried),
    /// The worker is stopping.
    LetGo,
}

/// The end of a pause.
enum Paused {
    ToTheEnd,
    /// By a stop, a cancel, or a lost lease.
    Interrupted,
}

/// The end of a wait for the ledger.
enum Waited {
    TryAgain,
    TooLong,
    Stopped,
}

impl Handler {
    pub(super) async fn submit(
        &self,
        message: &CommandMessage,
        command_id: &str,
        job: &SubmitJob,
        mut turn: Turn,
        stopping: &Stopping,
    ) -> Handled {
        let mut pace = CLAIMING.start();
        // It is not executed, so what is held against it stands.
        let held = |turn: &Turn| not_begun(Turn::deferral, turn, message.came_back());
        loop {
            crash::point(1);
            let left = turn.left_in_hand();
            let claim = match self.ledger.claim(command_id, job.fingerprint).await {
                Ok(claim) => claim,
                Err(error) => {
                    match wait_for_ledger(&mut pace, left, command_id, &error, &stopping.soon).await
                    {
                        Waited::TryAgain => continue,
                        Waited::TooLong => return not_begun(Turn::patient_deferral, &turn, 0),
                        Waited::Stopped => return Handled::GivenBack,
                    }
                }
            };
            let (lease, before) = match claim {
                Claim::Fresh(lease) => (lease, None),
                Claim::Abandoned(lease, history) => (lease, Some(history)),
                Claim::Held(_) if left.is_zero() => return held(&turn),
                Claim::Held(holder) => {
                    tokio::select! {
                        () = holder.freed(LOOK_AGAIN) => continue,
                        () = tokio::time::sleep(left) => return held(&turn),
                        () = stopping.soon.cancelled() => return Handled::GivenBack,
                    }
                }
                Claim::Settled(ending) => {
                    return answered(message, command_id, ResultOf::Command, ending);
                }
                Claim::Conflict => {
                    let ending = Ending { attempts: 0, outcome: reused(command_id) };
                    return answered(message, command_id, ResultOf::Refusal, ending);
                }
            };
            let known = before.map_or(0, |before| before.attempts);
            let execution = Execution {
                handler: self,
                job,
                stopping,
                lease,
                attempts: known.max(turn.earlier().attempts),
                sent: false,
                in_doubt: before.is_some(),
                turn: &mut turn,
                ledger_pace: None,
            };
            match execution.run().await {
                Executed::Ended(ending) => {
                    return answered(message, command_id, ResultOf::Command, ending);
                }
                Executed::TakenOver => {}
                Executed::Deferred(deferral, tried) => return deferred(deferral, tried),
                Executed::LetGo => return Handled::GivenBack,
            }
        }
    }
}

impl Execution<'_> {
    async fn run(mut self) -> Executed {
        let left = "the worker that had it in hand ended before it had recorded an answer";
        let mut step = if self.in_doubt { Step::Look(left.to_owned()) } else { Step::Send };
        loop {
            step = match step {
                Step::Look(lost) => self.look(&lost).await,
                Step::Send => match self.may_send().await {
                    None => self.send().await,
                    Some(step) => step,
                },
                Step::Exists(answer) => return self.exists(answer).await,
                Step::Settle(outcome) => return self.settle(outcome).await,
                Step::Defer(deferral) => return self.defer(deferral).await,
                Step::TakenOver => return Executed::TakenOver,
                Step::LetGo => return self.let_go().await,
            };
        }
    }

    /// Whether a lost answer left a batch.
    async fn look(&mut self, lost: &str) -> Step {
        match self.reconcile(lost).await {
            Reconciled::Found(answer) => Step::Exists(answer),
            Reconciled::Unknown(asked) => {
                let Lost { command_id, name, .. } = &self.job.lost;
                Step::Settle(submit_unknown(command_id, name, lost, &asked))
            }
            // What another worker has tried is no reason to give up.
            Reconciled::Absent if self.sent && self.turn.remaining(Duration::ZERO).is_zero() => {
                let reason = format!("{lost}, and its batch was looked for and is not there");
                Step::Settle(unavailable(self.attempts, &reason))
            }
            Reconciled::Absent => {
                self.in_doubt = false;
                // One that is lost again and again is not held for ever.
                if self.sent && self.turn.left_in_hand().is_zero() {
                    Step::Defer(self.turn.deferral(Duration::ZERO))
                } else {
                    Step::Send
                }
            }
            Reconciled::Deferred(deferral) => Step::Defer(deferral),
            Reconciled::TakenOver => Step::TakenOver,
            Reconciled::Stopped => Step::LetGo,
        }
    }

    /// `None` where the request may leave, now.
    async fn may_send(&mut self) -> Option<Step> {
        // Whatever else it would have to wait for.
        if self.lease.is_struck() {
            return Some(Step::Settle(struck(self.attempts)));
        }
        match self.clearance(Turn::may_call).await {
            Clearance::Call => {}
            Clearance::Defer(deferral) => return Some(Step::Defer(deferral)),
            Clearance::Expired => return Some(Step::Settle(expired(self.attempts))),
            Clearance::NoMore(reason) => {
                return Some(Step::Settle(unavailable(self.attempts, &reason)));
            }
            Clearance::Stopped => return Some(Step::LetGo),
        }
        match self.lease.before_request(self.attempts + 1).await {
            // The ledger may have taken its time.
            Ok(Go::Ahead) if self.turn.has_expired() => Some(Step::Settle(expired(self.attempts))),
            Ok(Go::Ahead) => {
                self.ledger_pace = None;
                None
            }
            Ok(Go::Struck) => Some(Step::Settle(struck(self.attempts))),
            Ok(Go::Gone) => Some(Step::TakenOver),
            Err(error) => {
                let command_id = &self.job.lost.command_id;
                let pace = self.ledger_pace.get_or_insert_with(|| RECORDING.start());
                let stop = &self.stopping.claimed;
                match wait_for_ledger(pace, Duration::MAX, command_id, &error, stop).await {
                    Waited::TryAgain => Some(Step::Send),
                    Waited::TooLong => {
                        Some(Step::Defer(self.turn.patient_deferral(Duration::ZERO)))
                    }
                    Waited::Stopped => Some(Step::LetGo),
                }
            }
        }
    }

    async fn send(&mut self) -> Step {
        crash::point(2);
        self.attempts += 1;
        self.sent = true;
        let result = tokio::select! {
            biased;
            result = self.handler.vendor.submit(&self.job.request) => result,
            () = self.stopping.now.cancelled() => {
                self.in_doubt = true;
                return Step::LetGo;
            }
        };
        let error = match result {
            Ok(answer) => return Step::Exists(answer),
            Err(error) => error,
        };
        match then(CommandKind::Submit, error.class()) {
            Then::Fail => return Step::Settle(failure(&error, self.attempts)),
            Then::Look => {
                self.in_doubt = true;
                return Step::Look(error.to_string());
            }
            Then::AskAboutKey => match self.handler.key().await {
                Key::Accepted => return Step::Settle(failure(&error, self.attempts)),
                // The breaker is open by now.
                Key::Refused => return Step::Send,
                Key::Unknown => {}
            },
            Then::Again => {}
        }
        match self.turn.next(error.retry_after()) {
            Next::Wait(wait) => {
                self.log_retry(&error, wait);
                self.pause(wait).await;
                Step::Send
            }
            Next::Defer(deferral) => Step::Defer(deferral),
            // Whether it is the key could not be found out.
            Next::Over if error.class() == Class::Unauthorized => {
                Step::Settle(unavailable(self.attempts, &error.to_string()))
            }
            Next::Over => Step::Settle(failure(&error, self.attempts)),
        }
    }

    /// Waits until the vendor may be called, and keeps the submit meanwhile.
    async fn clearance(
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
            command_id = self.job.lost.command_id,
            attempt = self.attempts,
            wait_ms = wait.as_millis(),
            request_id = error.request_id(),
            error = chain(error),
            "will try again"
        );
    }

    /// Waits, and keeps the submit meanwhile. Ends early where the next step has a reason not to
    /// send: a stop, a cancel, a lost lease.
    async fn pause(&mut self, wait: Duration) -> Paused {
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

    /// The batch exists, by an answer or by the list.
    async fn exists(self, answer: Answer) -> Executed {
        crash::point(5);
        self.handler.finder.note(&answer.batch_id, &self.job.lost.command_id);
        let warning = provider_warning(self.job.phone_provider.as_deref(), &answer);
        if warning.is_some() {
            warn!(
                command_id = self.job.lost.command_id,
                batch_id = answer.batch_id,
                expected = self.job.phone_provider,
                actual = answer.phone_provider,
                "the batch exists, but its phone provider is not the one the command names"
            );
        }
        self.settle(succeeded(answer, warning)).await
    }

    async fn settle(self, outcome: Outcome) -> Executed {
        let ending = Ending { attempts: self.attempts, outcome };
        let mut pace = RECORDING.start();
        loop {
            match self.lease.settle(&ending).await {
                Ok(Some(ending)) => return Executed::Ended(ending),
                Ok(None) => return Executed::TakenOver,
                Err(error) => {
                    let command_id = &self.job.lost.command_id;
                    let stop = &self.stopping.now;
                    // Whoever gets the command next finds it abandoned, and looks.
                    match wait_for_ledger(&mut pace, Duration::MAX, command_id, &error, stop).await
                    {
                        Waited::TryAgain => {}
                        Waited::TooLong => {
                            let deferral = self.turn.patient_deferral(Duration::ZERO);
                            return Executed::Deferred(deferral, self.tried());
                        }
                        Waited::Stopped => return Executed::LetGo,
                    }
                }
            }
        }
    }

    async fn let_go(self) -> Executed {
        self.release().await;
        Executed::LetGo
    }

    /// Out of this worker's hands for a while; whoever has it then claims it again.
    async fn defer(self, deferral: Deferral) -> Executed {
        let tried = self.tried();
        self.release().await;
        Executed::Deferred(deferral, tried)
    }

    fn tried(&self) -> Tried {
        Tried { attempts: self.attempts, in_doubt: self.in_doubt }
    }

    async fn release(self) {
        let command_id = &self.job.lost.command_id;
        if let Err(error) = self.lease.release(self.in_doubt).await {
            warn!(command_id, error = chain(&error), "the lease has to run out by itself");
        }
    }
}

/// Of a submit that this task has not begun. It has no horizon, because nothing could be answered that
/// is known to be true.
fn not_begun(
    deferral: impl Fn(&Turn, Duration) -> Deferral,
    turn: &Turn,
    came_back: u32,
) -> Handled {
    let earlier = turn.earlier();
    let Deferral { wait, asked, age } = deferral(turn, earlier.asked_to_wait());
    let earlier = Earlier::deferred(age, asked, earlier.attempts, earlier.in_doubt);
    Handled::Deferred { wait, earlier: earlier.set_aside(came_back) }
}

/// Waits a moment for a ledger that cannot be used, `limit` at most.
async fn wait_for_ledger(
    pace: &mut Schedule,
    limit: Duration,
    command_id: &str,
    error: &Unavailable,
    stop: &CancellationToken,
) -> Waited {
    let wait = pace.next_wait(None).filter(|_| !limit.is_zero());
    let Some(wait) = wait.map(|wait| wait.min(limit)) else {
        warn!(
            command_id,
            error = chain(error),
            "the command waits for the ledger in a delay queue"
        );
        return Waited::TooLong;
    };
    info!(command_id, wait_ms = wait.as_millis(), error = chain(error), "waiting for the ledger");
    tokio::select! {
        () = tokio::time::sleep(wait) => Waited::TryAgain,
        () = stop.cancelled() => Waited::Stopped,
    }
}
