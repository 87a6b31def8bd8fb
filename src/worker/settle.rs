//! One command from its delivery to its ack: executed, deferred, or given up as poison.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use tokio::sync::OwnedSemaphorePermit;
use tracing::{error, info, warn};

use crate::broker::{Delay, Delivery, PublishError};
use crate::crash;
use crate::domain::Earlier;
use crate::domain::command::CommandMessage;
use crate::domain::result::{ErrorCode, ResultEvent};
use crate::handler::Handled;
use crate::health::Part;
use crate::retry::Policy;
use crate::telemetry::chain;

use super::suspects::Verdict;
use super::{Link, Shared};

/// How fast to publish again what a full queue refused, and for how long: a submit may have been in hand
/// for 27 minutes, and the broker takes it back after 30.
const REPUBLISH: Policy = Policy {
    initial: Duration::from_millis(100),
    max: Duration::from_secs(5),
    horizon: Some(Duration::from_secs(2 * 60)),
};

/// How long a suspect waits before it is executed: what was delivered along with it is out of this worker's
/// hands by then, or done.
const SUSPECT_WAITS: Duration = Duration::from_secs(1);

/// One command from delivery to ack. The order is the promise: the result is confirmed before the
/// command is acknowledged, so a crash in between repeats a result and loses none.
pub async fn settle(
    shared: Arc<Shared>,
    delivery: Delivery,
    link: Link,
    _permit: OwnedSemaphorePermit,
) {
    let started = Instant::now();
    let message = &delivery.message;
    let (event, reason, is_recorded) = match handled(&shared, message, &link).await {
        Handled::Answered { event, is_recorded } => (event, None, is_recorded),
        Handled::Condemned { event, reason, is_recorded } => (event, Some(reason), is_recorded),
        Handled::Deferred { wait, earlier } => {
            return defer(&delivery, &link, wait, &earlier).await;
        }
        // What is given back in order is not what ends its workers, and the broker would count it.
        Handled::GivenBack if message.redeliveries > 0 && !link.lost.is_cancelled() => {
            let earlier = message.earlier.set_aside(message.came_back());
            return defer(&delivery, &link, Duration::ZERO, &earlier).await;
        }
        Handled::GivenBack => return delivery.give_back().await,
    };
    crash::point(6);
    let event = match publish(&link, event).await {
        Ok(event) => event,
        Err(error) => return lose(&delivery, &link, &error),
    };
    if let Some(reason) = &reason {
        error!(message_id = message.producer_id(), reason, "goes to the dead-letter queue");
        let copied = unrefused(&link, || link.publisher.dead_letter(&delivery, reason)).await;
        if let Err(error) = copied {
            return lose(&delivery, &link, &error);
        }
    }
    crash::point(8);
    if let Some(queue) = &message.reply_to {
        // The result is safe: a reply that hangs must not cost the ack.
        tokio::select! {
            () = link.publisher.reply(&event, queue) => {}
            () = link.stopping.now.cancelled() => {}
        }
    }
    if let Err(error) = delivery.ack().await {
        warn!(command_id = event.command_id, %error);
        link.lost.cancel();
        return;
    }
    if is_recorded {
        shared.handler.published(&event.command_id).await;
    }
    tell(&event, started);
}

/// The one log line of a command.
fn tell(event: &ResultEvent, started: Instant) {
    if event.kind.is_none() {
        let command_id = &event.command_id;
        warn!(command_id, "the routing key names no command; its result says which there are");
    }
    info!(
        command = event.command(),
        command_id = event.command_id,
        batch_id = event.batch_id(),
        status_code = event.status_code(),
        error_code = event.error_code().map(ErrorCode::name),
        attempts = event.ending.attempts,
        took_ms = started.elapsed().as_millis(),
        "answered"
    );
}

/// Executes it, unless it came back too often.
async fn handled(shared: &Shared, message: &Arc<CommandMessage>, link: &Link) -> Handled {
    // It is refused unread, and a copy of it would have a command's routing key.
    if message.named().is_none() {
        return shared.handler.handle(Arc::clone(message), &link.stopping).await;
    }
    let set_aside = |deliveries| {
        let earlier = message.earlier.set_aside(deliveries);
        Handled::Deferred { wait: Duration::ZERO, earlier }
    };
    let among_few = match shared.suspects.judge(message) {
        Verdict::Innocent => None,
        Verdict::Suspect(permit) => Some(permit),
        Verdict::SetAside(deliveries) => return set_aside(deliveries),
        Verdict::Poison(deliveries) => return shared.handler.condemn(message, deliveries).await,
    };
    if among_few.is_some() {
        tokio::select! {
            () = tokio::time::sleep(SUSPECT_WAITS) => {}
            () = link.stopping.soon.cancelled() => return Handled::GivenBack,
        }
    }
    crash::on(message.producer_id());
    let handling = async {
        crash::panic_on(message.producer_id());
        shared.handler.handle(Arc::clone(message), &link.stopping).await
    };
    AssertUnwindSafe(handling).catch_unwind().await.unwrap_or_else(|_| {
        // Whose fault it is, is known: the others need not be delivered again for it.
        let deliveries = message.came_back() + 1;
        error!(message_id = message.producer_id(), deliveries, "the command's task panicked");
        set_aside(deliveries)
    })
}

/// To a delay queue, and only then acknowledged.
async fn defer(delivery: &Delivery, link: &Link, wait: Duration, earlier: &Earlier) {
    let delay = Delay::of(wait);
    if let Err(error) = unrefused(link, || link.publisher.defer(delivery, delay, earlier)).await {
        return lose(delivery, link, &error);
    }
    crash::point(9);
    let message = &delivery.message;
    if let Err(error) = delivery.ack().await {
        warn!(message_id = message.producer_id(), %error);
        link.lost.cancel();
        return;
    }
    info!(
        command = message.kind().name(),
        message_id = message.producer_id(),
        attempts = earlier.attempts,
        delay_s = delay.duration().as_secs(),
        "deferred"
    );
}

/// Publishes until the broker takes it, the generation ends, or it is held for too long: a full queue
/// is no reason to lose at once all that is in hand.
async fn unrefused<F>(link: &Link, publish: impl Fn() -> F) -> Result<(), PublishError>
where
    F: Future<Output = Result<(), PublishError>>,
{
    let mut pace = REPUBLISH.start();
    let mut was_refused = false;
    loop {
        let error = match publish().await {
            // The topology is declared again with the next generation.
            Err(error @ PublishError::Unheard { .. }) if link.declares => return Err(error),
            Err(error @ (PublishError::Refused | PublishError::Unheard { .. })) => error,
            Ok(()) if was_refused => {
                link.note_confirm();
                return Ok(());
            }
            other => return other,
        };
        // A stop alone is no reason: unpublished, the command would be executed again.
        if link.stopping.now.is_cancelled() || link.lost.is_cancelled() {
            return Err(error);
        }
        was_refused = true;
        warn!(%error, "trying again");
        link.readiness.wrong(Part::Publisher(link.kind), error.to_string());
        let Some(wait) = pace.next_wait(None) else { return Err(error) };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = link.stopping.now.cancelled() => {}
            () = link.lost.cancelled() => {}
        }
    }
}

fn lose(delivery: &Delivery, link: &Link, error: &PublishError) {
    let message_id = delivery.message.producer_id();
    warn!(message_id, error = chain(error), "will be delivered again");
    link.lost.cancel();
}

/// Publishes until the broker has the result or the generation ends; returns what was published.
pub async fn publish(
    link: &Link,
    mut event: Arc<ResultEvent>,
) -> Result<Arc<ResultEvent>, PublishError> {
    loop {
        match unrefused(link, || link.publisher.publish(&event)).await {
            Ok(()) => return Ok(event),
            Err(PublishError::TooLarge { bytes }) => {
                warn!(
                    command_id = event.command_id,
                    bytes, "the broker takes no such large message"
                );
                event = Arc::new(event.too_large(bytes));
            }
            Err(error) => return Err(error),
        }
    }
}
