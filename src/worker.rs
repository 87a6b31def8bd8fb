//! Receives commands, bounds how many are in hand, publishes each result, settles, drains.

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use futures_util::future::join_all;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::broker::{
    self, Delivery, Generation, Lane, PublishError, Publisher, Publishing, PublishingEvents,
};
use crate::crash;
use crate::domain::command::CommandKind;
use crate::domain::result::{ErrorCode, ResultEvent};
use crate::handler::{Handled, Handler, Stopping};
use crate::health::Readiness;
use crate::retry::{Policy, Schedule};
use crate::telemetry::chain;

/// How fast to connect again; there is no limit on attempts.
const RECONNECT: Policy =
    Policy { initial: Duration::from_millis(250), max: Duration::from_secs(5), horizon: None };

/// How fast to publish again what a full queue refused.
const REPUBLISH: Policy =
    Policy { initial: Duration::from_millis(100), max: Duration::from_secs(5), horizon: None };

/// A generation that held so long was a good one: the next reconnect starts at the shortest wait.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// How long the commands that were cut off may take to publish what they have to say.
const CUT_OFF_LIMIT: Duration = Duration::from_secs(5);

/// The worker: one generation of connections after the other, until it is stopped.
pub struct Worker {
    broker: broker::Settings,
    shared: Arc<Shared>,
    grace: Duration,
}

struct Shared {
    handler: Handler,
    readiness: Readiness,
    /// Commands in hand, of this generation and of earlier ones whose requests still run.
    in_hand: TaskTracker,
    /// Prefetch bounds what one generation receives; these bound what all of them execute. One
    /// per queue, so that a cancel never waits behind submits.
    permits: [Arc<Semaphore>; CommandKind::ALL.len()],
    /// Cancelled when the grace period is over.
    now: CancellationToken,
}

/// What a command in hand needs of the generation that delivered it.
#[derive(Clone)]
struct Link {
    publisher: Arc<Publisher>,
    /// `soon` when this generation is lost or the worker stops, `now` when the grace period is over.
    stopping: Stopping,
    /// Cancelled by whoever notices that the generation is of no use any more.
    lost: CancellationToken,
}

impl Worker {
    /// A worker that gives commands in hand up to `grace` to finish when it is stopped.
    pub fn new(
        broker: broker::Settings,
        handler: Handler,
        readiness: Readiness,
        grace: Duration,
    ) -> Self {
        let permits = usize::from(broker.prefetch);
        Self {
            broker,
            shared: Arc::new(Shared {
                handler,
                readiness,
                in_hand: TaskTracker::new(),
                permits: CommandKind::ALL.map(|_| Arc::new(Semaphore::new(permits))),
                now: CancellationToken::new(),
            }),
            grace,
        }
    }

    /// Works until `stop` is cancelled and what is in hand is settled. An error is one that only a
    /// person can mend, and comes only before the first connection has worked.
    pub async fn run(self, stop: CancellationToken) -> Result<(), broker::Error> {
        let readiness = &self.shared.readiness;
        let mut pace = RECONNECT.start();
        let mut worked_once = false;
        while !stop.is_cancelled() {
            let opened = tokio::select! {
                opened = broker::open(&self.broker) => opened,
                () = stop.cancelled() => break,
            };
            match opened {
                Ok(generation) => {
                    worked_once = true;
                    let since = Instant::now();
                    info!(prefetch = self.broker.prefetch, "consuming");
                    readiness.consuming();
                    let Some(reason) = self.serve(generation, &stop).await else {
                        return Ok(());
                    };
                    warn!(reason, "the broker is lost; connecting again");
                    readiness.lost(format!("broker: {reason}"));
                    if since.elapsed() >= STABLE_AFTER {
                        pace = RECONNECT.start();
                    }
                }
                Err(error) if !worked_once && error.needs_a_person() => return Err(error),
                Err(error) => {
                    error!(error = chain(&error), "no connection to the broker; trying again");
                    readiness.lost(format!("broker: {}", chain(&error)));
                }
            }
            wait(&mut pace, &stop).await;
        }
        // Of an earlier generation: there is no connection for their results, but a request that is
        // under way has to end before the process does.
        self.drain().await;
        Ok(())
    }

    /// Serves one generation; returns why it was lost, or `None` where the worker was stopped.
    async fn serve(&self, mut generation: Generation, stop: &CancellationToken) -> Option<String> {
        let lost = CancellationToken::new();
        let link = Link {
            publisher: Arc::clone(&generation.publisher),
            stopping: Stopping {
                soon: stop.child_token(),
                claimed: stop.clone(),
                now: self.shared.now.clone(),
            },
            lost: lost.clone(),
        };
        let reasons = {
            let (lanes, mut events) = generation.parts();
            let lanes = lanes.iter_mut().map(|lane| self.receive(lane, &link));
            let mut receiving = pin!(join_all(lanes));
            tokio::select! {
                reasons = &mut receiving => reasons,
                reason = self.watch(&mut events) => {
                    lost.cancel();
                    receiving.await;
                    vec![Some(reason)]
                }
            }
        };
        link.stopping.soon.cancel();
        let reason = reasons.into_iter().flatten().next();
        if reason.is_none() && !lost.is_cancelled() {
            self.drain().await;
            generation.close().await;
            return None;
        }
        // Closed in the background: a dead broker answers nothing, and the next generation must
        // not wait for that. Commands in hand go on; their results will find no connection, and
        // the redelivered command gets them from the ledger.
        self.shared.in_hand.spawn(generation.close());
        Some(reason.unwrap_or_else(|| "a result could not be published or settled".to_owned()))
    }

    /// Follows the publishing connection until it is lost; returns why. During an alarm, what is in
    /// hand waits for its confirm.
    async fn watch(&self, events: &mut PublishingEvents<'_>) -> String {
        loop {
            match events.next().await {
                Publishing::Blocked(reason) => {
                    warn!(reason, "the broker takes no messages (memory or disk alarm); waiting");
                    self.shared.readiness.lost(format!("broker: takes no messages: {reason}"));
                }
                Publishing::Unblocked => {
                    info!("the broker takes messages again");
                    self.shared.readiness.consuming();
                }
                Publishing::Lost(reason) => return reason,
            }
        }
    }

    /// Takes deliveries from one queue until the worker stops (`None`) or the generation is lost.
    async fn receive(&self, lane: &mut Lane, link: &Link) -> Option<String> {
        let permits = &self.shared.permits[lane.kind as usize];
        loop {
            let permit = tokio::select! {
                permit = Arc::clone(permits).acquire_owned() => permit,
                () = link.stopping.soon.cancelled() => break,
                () = link.lost.cancelled() => return None,
            };
            let delivery = tokio::select! {
                delivery = lane.next() => delivery,
                () = link.stopping.soon.cancelled() => break,
                () = link.lost.cancelled() => return None,
            };
            match (delivery, permit) {
                (Ok(delivery), Ok(permit)) => {
                    let settled = settle(Arc::clone(&self.shared), delivery, link.clone(), permit);
                    let lost = link.lost.clone();
                    self.shared.in_hand.spawn(async move {
                        if AssertUnwindSafe(settled).catch_unwind().await.is_err() {
                            error!(
                                "a command's task panicked; the command will be delivered again"
                            );
                            lost.cancel();
                        }
                    });
                }
                (Err(reason), _) => {
                    link.lost.cancel();
                    return Some(reason);
                }
                (_, Err(_closed)) => break,
            }
        }
        self.shared.readiness.lost("worker: stopping");
        lane.stop().await;
        None
    }

    /// Waits for what is in hand as long as the grace period allows, then cuts it off.
    async fn drain(&self) {
        let in_hand = &self.shared.in_hand;
        self.shared.readiness.lost("worker: stopping");
        in_hand.close();
        if in_hand.is_empty() {
            return;
        }
        info!(in_hand = in_hand.len(), grace_s = self.grace.as_secs(), "stopping");
        if timeout(self.grace, in_hand.wait()).await.is_ok() {
            return;
        }
        warn!(in_hand = in_hand.len(), "the grace period is over; requests are cut off");
        self.shared.now.cancel();
        if timeout(CUT_OFF_LIMIT, in_hand.wait()).await.is_err() {
            warn!(in_hand = in_hand.len(), "what is still in hand returns to its queue");
        }
    }
}

/// One command from delivery to ack. The order is the promise: the result is confirmed before the
/// command is acknowledged, so a crash in between repeats a result and loses none.
async fn settle(
    shared: Arc<Shared>,
    delivery: Delivery,
    link: Link,
    _permit: OwnedSemaphorePermit,
) {
    let started = Instant::now();
    let message = &delivery.message;
    let event = match shared.handler.handle(Arc::clone(message), &link.stopping).await {
        Handled::Answered(event) => event,
        Handled::GivenBack => return delivery.give_back().await,
    };
    crash::point(6);
    let event = match publish(&link, event).await {
        Ok(event) => event,
        Err(error) => {
            warn!(
                message_id = message.producer_id(),
                error = chain(&error),
                "will be delivered again"
            );
            link.lost.cancel();
            return;
        }
    };
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
    info!(
        command = event.kind.name(),
        command_id = event.command_id,
        batch_id = event.batch_id(),
        status_code = event.status_code(),
        error_code = event.error_code().map(ErrorCode::name),
        attempts = event.ending.attempts,
        took_ms = started.elapsed().as_millis(),
        "answered"
    );
}

/// Publishes until the broker has the result or the generation ends; returns what was published.
async fn publish(
    link: &Link,
    mut event: Arc<ResultEvent>,
) -> Result<Arc<ResultEvent>, PublishError> {
    let mut pace = REPUBLISH.start();
    loop {
        match link.publisher.publish(&event).await {
            Ok(()) => return Ok(event),
            Err(PublishError::TooLarge { bytes }) => {
                warn!(
                    command_id = event.command_id,
                    bytes, "the broker takes no such large message"
                );
                event = Arc::new(event.too_large(bytes));
            }
            Err(error @ PublishError::Refused) => {
                warn!(command_id = event.command_id, %error, "trying again");
                // A stop alone is no reason: unpublished, the command would be executed again.
                if link.stopping.now.is_cancelled() || link.lost.is_cancelled() {
                    return Err(error);
                }
                tokio::select! {
                    () = wait(&mut pace, &link.stopping.now) => {}
                    () = link.lost.cancelled() => {}
                }
            }
            Err(error) => return Err(error),
        }
    }
}

async fn wait(pace: &mut Schedule, stop: &CancellationToken) {
    let Some(wait) = pace.next_wait(None) else {
        return;
    };
    tokio::select! {
        () = tokio::time::sleep(wait) => {}
        () = stop.cancelled() => {}
    }
}
