//! Finishes submits whose message does not come back. Whoever of a pool finds one first does it.

use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use futures_util::stream::{self, StreamExt as _};
use tracing::{info, warn};

use crate::broker::Delay;
use crate::crash;
use crate::domain::command::CommandKind;
use crate::domain::result::ErrorCode;
use crate::handler::Unpublished;
use crate::telemetry::chain;

use super::settle::publish;
use super::{Link, Worker};

/// How often to ask the ledger whether there is something to finish.
const EVERY: Duration = Duration::from_secs(5);

/// How many submits are finished at the same time.
const AT_ONCE: usize = 4;

impl Worker {
    /// Finishes what the ledger names, for as long as the generation lives. That is one of the lane of
    /// cancels: what cancels of this batch or that are still to be done does not wait for submits.
    pub(super) async fn finish(&self, link: &Link) -> String {
        // No copy on its way is overtaken: each is delivered within this time, where submits are taken.
        let untouched = self.shared.handler.horizon() + Delay::Long.duration();
        let mut intake = self.shared.intake();
        let mut taken_since = Instant::now();
        loop {
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = intake.changed() => {}
            }
            if !intake.takes(CommandKind::Submit) {
                taken_since = Instant::now();
            }
            // What is to be cancelled waits for no credits.
            if !intake.takes(CommandKind::Cancel) {
                continue;
            }
            // Copies lie in the queues of submits as long as their lane does not consume.
            let consumed_since = self.shared.consuming_since()[CommandKind::Submit as usize];
            let has_waited =
                consumed_since.is_some_and(|since| since.max(taken_since).elapsed() >= untouched);
            self.finish_some(link, if has_waited { untouched } else { Duration::MAX }).await;
        }
    }

    async fn finish_some(&self, link: &Link, untouched: Duration) {
        // Whoever follows the ledger says why it cannot be asked.
        let Ok(ids) = self.shared.handler.unfinished(untouched).await else { return };
        // Collected, because the compiler cannot see of a lazy one that it may change threads.
        let all: Vec<_> = ids.iter().map(|id| self.finish_one(link, id).boxed()).collect();
        stream::iter(all).buffer_unordered(AT_ONCE).collect::<Vec<()>>().await;
    }

    async fn finish_one(&self, link: &Link, command_id: &str) {
        let handler = &self.shared.handler;
        let Some(Unpublished { event, reply_to }) =
            handler.finish(command_id, &link.stopping).await
        else {
            return;
        };
        crash::point(6);
        let event = match publish(link, event).await {
            Ok(event) => event,
            Err(error) => {
                warn!(command_id, error = chain(&error), "its result will be published later");
                return;
            }
        };
        crash::point(8);
        if let Some(queue) = &reply_to {
            link.publisher.reply(&event, queue).await;
        }
        handler.published(command_id).await;
        info!(
            command = event.command(),
            command_id,
            batch_id = event.batch_id(),
            status_code = event.status_code(),
            error_code = event.error_code().map(ErrorCode::name),
            attempts = event.ending.attempts,
            "answered without its message"
        );
    }
}
