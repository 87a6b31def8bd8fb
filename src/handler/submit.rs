//! Executes a submit: claim, look for what an earlier attempt left, send, record.

use std::time::{Duration, Instant};

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use crate::crash;
use crate::domain::command::{CommandKind, CommandMessage};
use crate::domain::result::{Ending, Outcome, ResultOf};
use crate::elevenlabs::{Answer, Error, Lost, SubmitRequest};
use crate::ledger::{Claim, Go, Lease, Unavailable};
use crate::retry::{Policy, Schedule};
use crate::telemetry::chain;

use super::outcome::{
    failure, provider_warning, reused, struck, submit_unknown, succeeded, unavailable,
};
use super::{Handled, Handler, Stopping, Then, answered, then};

/// How long to wait for a ledger that cannot be used before anything of a submit has begun. Then it
/// goes back to its queue: the broker takes back what is in hand for 30 minutes.
const CLAIMING: Policy = Policy {
    initial: Duration::from_millis(100),
    max: Duration::from_secs(5),
    horizon: Some(Duration::from_secs(15 * 60)),
};

/// The same once a request has been sent, on top of the time that took.
const RECORDING: Policy = Policy { horizon: Some(Duration::from_secs(60)), ..CLAIMING };

/// How often to ask whether another worker is done.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// How many looks at least prove that a batch is not there.
const LOOKS: u32 = 2;

/// Between two looks, while the settling window lasts.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);

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
    schedule: Schedule,
}

/// The end of an execution.
enum Executed {
    Ended(Ending),
    /// It is another worker's now.
    TakenOver,
    /// The worker is stopping, or the ledger cannot be used.
    LetGo,
}

/// The end of a search for a batch.
enum Reconciled {
    Found(Answer),
    /// Surely not there: it is safe to send the submit again.
    Absent,
    /// The list could not be read.
    Unknown(String),
    TakenOver,
    Stopped,
}

impl Handler {
    pub(super) async fn submit(
        &self,
        message: &CommandMessage,
        command_id: &str,
        job: &SubmitJob,
        schedule: Schedule,
        stopping: &Stopping,
    ) -> Handled {
        let mut pace = CLAIMING.start();
        loop {
            crash::point(1);
            let claim = match self.ledger.claim(command_id, job.fingerprint).await {
                Ok(claim) => claim,
                Err(error) => {
                    if wait_for_ledger(&mut pace, command_id, &error, &stopping.soon).await {
                        continue;
                    }
                    return Handled::GivenBack;
                }
            };
            let (lease, before) = match claim {
                Claim::Fresh(lease) => (lease, None),
                Claim::Abandoned(lease, history) => (lease, Some(history)),
                // By now whoever has it has held it longer than the broker lets this copy wait.
                Claim::Held(_) if pace.remaining().is_zero() => return Handled::GivenBack,
                Claim::Held(held) => {
                    tokio::select! {
                        () = held.freed(LOOK_AGAIN) => continue,
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
            let execution = Execution {
                handler: self,
                job,
                stopping,
                lease,
                attempts: before.map_or(0, |before| before.attempts),
                sent: false,
                in_doubt: before.is_some(),
                schedule: schedule.clone(),
            };
            match execution.run().await {
                Executed::Ended(ending) => {
                    return answered(message, command_id, ResultOf::Command, ending);
                }
                Executed::TakenOver => {}
                Executed::LetGo => return Handled::GivenBack,
            }
        }
    }
}

impl Execution<'_> {
    async fn run(mut self) -> Executed {
        let left = "the worker that had it in hand ended before it had recorded an answer";
        let mut doubt = self.in_doubt.then(|| left.to_owned());
        let mut ledger_pace = None;
        loop {
            if let Some(lost) = doubt.take() {
                match self.reconcile(&lost).await {
                    Reconciled::Found(answer) => return self.exists(answer).await,
                    Reconciled::Unknown(asked) => {
                        let Lost { command_id, name, .. } = &self.job.lost;
                        let outcome = submit_unknown(command_id, name, &lost, &asked);
                        return self.settle(outcome).await;
                    }
                    Reconciled::TakenOver => return Executed::TakenOver,
                    Reconciled::Stopped => return self.let_go().await,
                    // What another worker has tried is no reason to give up.
                    Reconciled::Absent if self.sent && self.schedule.remaining().is_zero() => {
                        let reason =
                            format!("{lost}, and its batch was looked for and is not there");
                        let outcome = unavailable(self.attempts, &reason);
                        return self.settle(outcome).await;
                    }
                    Reconciled::Absent => self.in_doubt = false,
                }
            }
            if self.stopping.claimed.is_cancelled() {
                return self.let_go().await;
            }
            match self.lease.before_request(self.attempts + 1).await {
                Ok(Go::Ahead) => ledger_pace = None,
                Ok(Go::Struck) => {
                    let outcome = struck(self.attempts);
                    return self.settle(outcome).await;
                }
                Ok(Go::Gone) => return Executed::TakenOver,
                Err(error) => {
                    let command_id = &self.job.lost.command_id;
                    let stop = &self.stopping.claimed;
                    let pace = ledger_pace.get_or_insert_with(|| RECORDING.start());
                    if wait_for_ledger(pace, command_id, &error, stop).await {
                        continue;
                    }
                    return self.let_go().await;
                }
            }
            crash::point(2);
            self.attempts += 1;
            self.sent = true;
            let result = tokio::select! {
                biased;
                result = self.handler.vendor.submit(&self.job.request) => result,
                () = self.stopping.now.cancelled() => {
                    self.in_doubt = true;
                    return self.let_go().await;
                }
            };
            let error = match result {
                Ok(answer) => return self.exists(answer).await,
                Err(error) => error,
            };
            match then(CommandKind::Submit, error.class()) {
                Then::Fail => {
                    let outcome = failure(&error, self.attempts);
                    return self.settle(outcome).await;
                }
                Then::Look => {
                    self.in_doubt = true;
                    doubt = Some(error.to_string());
                }
                Then::Again => {
                    let Some(wait) = self.schedule.next_wait(error.retry_after()) else {
                        let outcome = failure(&error, self.attempts);
                        return self.settle(outcome).await;
                    };
                    self.log_retry(&error, wait);
                    self.pause(wait).await;
                }
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
    async fn pause(&mut self, wait: Duration) {
        let over = Instant::now() + wait;
        loop {
            let left = over.saturating_duration_since(Instant::now());
            let slice = left.min(self.lease.length() / 4);
            tokio::select! {
                () = tokio::time::sleep(slice) => {}
                () = self.stopping.claimed.cancelled() => return,
            }
            if slice == left {
                return;
            }
            let renewed = self.lease.renew(self.attempts).await;
            if self.lease.is_struck() || matches!(renewed, Ok(None)) {
                return;
            }
        }
    }

    /// Looks for the batch until it is found, or the settling window has passed without it.
    async fn reconcile(&mut self, lost: &str) -> Reconciled {
        let command_id = &self.job.lost.command_id;
        info!(command_id, reason = lost, "looking in ElevenLabs for the batch of this submit");
        let window = self.handler.settling_window;
        // A list that cannot be read late in the horizon gets a window's time more.
        let horizon = self.schedule.remaining().max(window * 2);
        let mut pace = Policy { horizon: Some(horizon), ..self.handler.retry }.start();
        // Since the first look that saw everything: what a vendor that was away shows first may be old.
        let mut settling: Option<Instant> = None;
        let mut looks = 0;
        loop {
            let began = Instant::now();
            let age = match self.lease.renew(self.attempts).await {
                Ok(Some(age)) => age,
                Ok(None) => return Reconciled::TakenOver,
                Err(error) => {
                    if wait_for_ledger(&mut pace, command_id, &error, &self.stopping.claimed).await
                    {
                        continue;
                    }
                    return Reconciled::Stopped;
                }
            };
            let looking = self.handler.finder.look(&self.job.lost, || age.now());
            let looked = tokio::select! {
                biased;
                looked = timeout(self.lease.length(), looking) => looked,
                () = keep(&mut self.lease, self.attempts) => return Reconciled::TakenOver,
                () = self.stopping.now.cancelled() => return Reconciled::Stopped,
            };
            let pause = match looked {
                Ok(Ok(Some(answer))) => {
                    info!(command_id, batch_id = answer.batch_id, "found");
                    return Reconciled::Found(answer);
                }
                Ok(Ok(None)) => {
                    looks += 1;
                    let first = *settling.get_or_insert(began);
                    if began.duration_since(first) >= window && looks >= LOOKS {
                        info!(command_id, looks, "not there: it was not created");
                        return Reconciled::Absent;
                    }
                    let left = window.saturating_sub(first.elapsed());
                    (window / 3).min(left).max(SHORTEST_PAUSE)
                }
                failed => {
                    let (said, cause, asked) = match &failed {
                        Ok(Err(error)) => (error.to_string(), chain(error), error.retry_after()),
                        _ => ("it took too long".to_owned(), "too slow".to_owned(), None),
                    };
                    let Some(pause) = pace.next_wait(None) else {
                        return Reconciled::Unknown(said);
                    };
                    // One more look when the horizon is over, however long it is asked to wait.
                    let pause = pause.max(asked.unwrap_or_default()).min(pace.remaining());
                    let wait_ms = pause.as_millis();
                    info!(command_id, wait_ms, error = cause, "cannot look; will try again");
                    pause
                }
            };
            self.pause(pause).await;
            if self.stopping.claimed.is_cancelled() {
                return Reconciled::Stopped;
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
                    if !wait_for_ledger(&mut pace, command_id, &error, stop).await {
                        // Whoever gets the command next finds it abandoned, and looks.
                        return Executed::LetGo;
                    }
                }
            }
        }
    }

    async fn let_go(self) -> Executed {
        let command_id = &self.job.lost.command_id;
        if let Err(error) = self.lease.release(self.in_doubt).await {
            warn!(command_id, error = chain(&error), "the lease has to run out by itself");
        }
        Executed::LetGo
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

/// `false` where there is no time left to wait.
async fn wait_for_ledger(
    pace: &mut Schedule,
    command_id: &str,
    error: &Unavailable,
    stop: &CancellationToken,
) -> bool {
    let Some(wait) = pace.next_wait(None) else {
        warn!(command_id, error = chain(error), "the command goes back to its queue");
        return false;
    };
    info!(command_id, wait_ms = wait.as_millis(), error = chain(error), "waiting for the ledger");
    tokio::select! {
        () = tokio::time::sleep(wait) => true,
        () = stop.cancelled() => false,
    }
}
