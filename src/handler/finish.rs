//! Finishes submits whose message does not come back, from the ledger alone: purged, expired, or
//! deleted with its queue.

use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

use crate::crash;
use crate::domain::Earlier;
use crate::domain::command::BatchId;
use crate::domain::result::{Ending, ResultEvent, ResultOf};
use crate::elevenlabs::{Class, Error};
use crate::ledger::{Attempted, Claim, Ended, Unavailable};
use crate::telemetry::chain;

use super::origin::{Origin, stand_in};
use super::submit::{Executed, Execution};
use super::turn::Turn;
use super::{Handler, Stopping};

/// How soon a cancel that came while its submit was executed is tried again.
const CANCEL_AGAIN: Duration = Duration::from_secs(5);

/// A result that nobody else publishes.
pub struct Unpublished {
    /// The result.
    pub event: Arc<ResultEvent>,
    /// The queue that gets a copy.
    pub reply_to: Option<String>,
}

impl Handler {
    /// Submits that nobody has touched for so long, and those whose batch has to be cancelled.
    pub async fn unfinished(&self, untouched: Duration) -> Result<Vec<Arc<str>>, Unavailable> {
        self.ledger.unfinished(untouched, CANCEL_AGAIN).await
    }

    /// Finishes one of them: searches for its batch where it is in doubt, and records what is known.
    /// `None` where there is nothing to publish (yet).
    pub async fn finish(&self, command_id: &str, stopping: &Stopping) -> Option<Unpublished> {
        let claim = match self.ledger.take_over(command_id).await {
            Ok(claim) => claim?,
            Err(error) => {
                info!(command_id, error = chain(&error), "waiting for the ledger");
                return None;
            }
        };
        let (lease, attempted) = match claim {
            Claim::Fresh(lease) => (lease, None),
            Claim::Abandoned(lease, attempted) => (lease, Some(attempted)),
            Claim::Settled(ended) => return self.finish_settled(command_id, ended).await,
            Claim::Held(_) | Claim::Conflict => return None,
        };
        let Some(origin) = lease.origin().and_then(|json| Origin::read(json)) else {
            warn!(
                command_id,
                "the ledger does not say how to finish this submit; look at it by hand"
            );
            return None;
        };
        info!(command_id, "the message of this submit did not come back; finishing it");
        crash::point(2);
        let earlier = self.earlier_rounds(attempted.as_ref());
        let mut turn = Turn::begin(self.retry, earlier, origin.deadline());
        let execution = Execution::new(self, &origin, None, stopping, lease, &mut turn)
            .after(attempted.as_ref());
        match execution.run().await {
            Executed::Ended(ended) => Some(unpublished(command_id, Some(&origin), ended.ending)),
            Executed::TakenOver | Executed::Deferred(..) | Executed::Stopped => None,
        }
    }

    /// A submit is finished within two horizons more than it was left alone for: a list that can never be
    /// read leaves its outcome unknown, and not unsaid.
    fn earlier_rounds(&self, attempted: Option<&Attempted>) -> Earlier {
        let age = attempted.map_or(Duration::ZERO, |attempted| attempted.age.now());
        let age = age.saturating_sub(self.horizon() * 2);
        if age.is_zero() {
            return Earlier::default();
        }
        Earlier::deferred(age, Duration::ZERO, 0, true)
    }

    async fn finish_settled(&self, command_id: &str, ended: Ended) -> Option<Unpublished> {
        self.cancel_struck(command_id, &ended).await;
        if ended.published {
            return None;
        }
        info!(command_id, "the result of this submit was recorded and not published");
        let origin = ended.origin.and_then(|json| Origin::read(&json));
        Some(unpublished(command_id, origin.as_ref(), ended.ending))
    }

    /// The broker has the result of a submit.
    pub async fn published(&self, command_id: &str) {
        self.ledger.published(command_id).await;
    }

    /// Cancels a batch whose submit was cancelled by its command id while it was executed. That
    /// cancel's own message may be gone.
    pub(super) async fn cancel_struck(&self, command_id: &str, ended: &Ended) {
        let Some((id, key)) = ended.cancel.clone() else { return };
        let Ok(batch) = BatchId::try_from(id) else { return };
        let batch_id = batch.as_str();
        match self.cancel(&batch).await {
            Ok(_) => info!(command_id, batch_id, "cancelled: a cancel came while it was created"),
            Err(Error::Refused { status: 404, .. }) if !self.has_seen(key) => {
                warn!(
                    command_id,
                    batch_id, "the API key does not see a batch that is to be cancelled"
                );
                return;
            }
            // Nothing more can be done: it has ended, or is gone.
            Err(error) if error.class() == Class::Refused && !self.still_calls(&batch).await => {
                warn!(command_id, batch_id, error = chain(&error), "it cannot be cancelled");
            }
            Err(error) => {
                let error = chain(&error);
                warn!(command_id, batch_id, error, "its cancel will be tried again");
                return;
            }
        }
        if let Err(error) = self.ledger.cancelled(command_id).await {
            warn!(command_id, error = chain(&error), "it will be cancelled once more");
        }
    }

    /// Whether a batch may go on calling people, as far as anybody can see.
    async fn still_calls(&self, batch: &BatchId) -> bool {
        match self.vendor.get(batch).await {
            Ok(shown) => {
                !matches!(shown.status.as_deref(), Some("completed" | "failed" | "cancelled"))
            }
            Err(error) => error.class() != Class::Refused,
        }
    }
}

fn unpublished(command_id: &str, origin: Option<&Origin>, ending: Ending) -> Unpublished {
    let message = stand_in(command_id, origin);
    let event = ResultEvent::new(&message, command_id, ResultOf::Command, ending);
    Unpublished { event: Arc::new(event), reply_to: message.reply_to }
}
