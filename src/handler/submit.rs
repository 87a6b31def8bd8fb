//! Executes a submit: claim, search for what an earlier attempt left, send, record.

mod execution;
mod search;

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::crash;
use crate::domain::Earlier;
use crate::domain::command::{Command, CommandMessage};
use crate::domain::result::{Ending, ResultOf};
use crate::elevenlabs::SubmitRequest;
use crate::ledger::{Body, Claim, Unavailable};
use crate::retry::{Policy, Schedule};
use crate::telemetry::chain;

pub(super) use execution::{Executed, Execution};

use super::origin::Origin;
use super::outcome::reused;
use super::turn::{Deferral, Turn};
use super::{Handled, Handler, Stopping, Tried, answered, recorded};

/// How often to try a ledger that cannot be used, before anything of a submit has begun.
const CLAIMING: Policy =
    Policy { initial: Duration::from_millis(100), max: Duration::from_secs(5), horizon: None };

/// How often to ask whether another worker is done.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// A checked submit, encoded for ElevenLabs.
pub struct SubmitJob {
    /// What is sent.
    pub request: SubmitRequest,
    /// What the claim says of it.
    pub body: Body,
    /// What it is finished with.
    pub origin: Origin,
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
            let claim = match self.claim(message, command_id, job).await {
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
            turn.meet_row();
            let (lease, attempted) = match claim {
                Claim::Fresh(lease) => (lease, None),
                Claim::Abandoned(lease, attempted) => (lease, Some(attempted)),
                Claim::Held(_) if left.is_zero() => return held(&turn),
                Claim::Held(holder) => {
                    tokio::select! {
                        () = holder.freed(LOOK_AGAIN) => continue,
                        () = tokio::time::sleep(left) => return held(&turn),
                        () = stopping.soon.cancelled() => return Handled::GivenBack,
                    }
                }
                Claim::Settled(ended) => return recorded(message, command_id, ended),
                Claim::Conflict => {
                    let ending = Ending { attempts: 0, outcome: reused(command_id) };
                    return answered(message, command_id, ResultOf::Refusal, ending);
                }
            };
            let request = Some(&job.request);
            let execution = Execution::new(self, &job.origin, request, stopping, lease, &mut turn)
                .after(attempted.as_ref());
            match execution.run().await {
                Executed::Ended(ended) => return recorded(message, command_id, ended),
                Executed::TakenOver => {}
                Executed::Deferred(deferral, tried) => return deferred(deferral, tried),
                Executed::Stopped => return Handled::GivenBack,
            }
        }
    }

    async fn claim(
        &self,
        message: &CommandMessage,
        command_id: &str,
        job: &SubmitJob,
    ) -> Result<Claim, Unavailable> {
        let doubt = self.is_in_doubt(message);
        let claim = self.ledger.claim(command_id, job.body.clone(), doubt).await?;
        if !matches!(claim, Claim::Conflict) {
            return Ok(claim);
        }
        // A row of the former version tells bodies apart in another way.
        let Ok(Command::Submit(submit)) = message.parse() else { return Ok(claim) };
        let body = Body { fingerprint: submit.former_fingerprint(), ..job.body.clone() };
        self.ledger.claim(command_id, body, doubt).await
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
    let met_row = earlier.met_row;
    let earlier = Earlier::deferred(age, asked, earlier.attempts, earlier.in_doubt);
    Handled::Deferred { wait, earlier: Earlier { met_row, ..earlier }.set_aside(came_back) }
}

/// Of a submit that has a row.
fn deferred(deferral: Deferral, tried: Tried) -> Handled {
    let Deferral { wait, asked, age } = deferral;
    let earlier = Earlier::deferred(age, asked, tried.attempts, tried.in_doubt);
    Handled::Deferred { wait, earlier: Earlier { met_row: true, ..earlier } }
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
