//! The supervisor: builds connections and consumers again whenever they are lost, receives commands,
//! bounds how many are in hand, drains.

mod finisher;
mod intake;
mod settle;
mod suspects;

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
    self, Change, Deferral, Delivery, Events, Generation, Lane, PULSE, Publisher, Pulse,
};
use crate::domain::command::CommandKind;
use crate::handler::{Handler, Stopping};
use crate::health::{Part, Readiness};
use crate::retry::{Policy, Schedule};
use crate::telemetry::chain;

use intake::Intake;
use settle::settle;
use suspects::Suspects;

/// How fast to connect again; there is no limit on attempts.
const RECONNECT: Policy =
    Policy { initial: Duration::from_millis(250), max: Duration::from_secs(5), horizon: None };

/// A generation that held so long was a good one: the next reconnect starts at the shortest wait.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// When the vendor is back, everything else waits so long at most for the cancels.
const CANCELS_FIRST: Duration = Duration::from_secs(5);

/// Between two looks whether the cancels are through.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What a worker had in hand whose machine is gone is with nobody until RabbitMQ misses its heartbeats.
/// Queues that are empty before that prove nothing.
const LIMBO: Duration = Duration::from_secs(60);

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
    /// The commands among it.
    commands: [TaskTracker; CommandKind::ALL.len()],
    /// Prefetch bounds what one generation receives; these bound what all of them execute. One
    /// per queue, so that a cancel never waits behind submits.
    permits: [Arc<Semaphore>; CommandKind::ALL.len()],
    suspects: Suspects,
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
    readiness: Readiness,
}

impl Link {
    /// A message was confirmed: that the publisher works, but for an alarm, which has its own end.
    fn note_confirm(&self) {
        if !self.publisher.is_blocked() {
            self.readiness.good(Part::Publisher);
        }
    }
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
                commands: CommandKind::ALL.map(|_| TaskTracker::new()),
                permits: CommandKind::ALL.map(|_| Arc::new(Semaphore::new(permits))),
                suspects: Suspects::default(),
                now: CancellationToken::new(),
            }),
            grace,
        }
    }

    /// Works until `stop` is cancelled and what is in hand is settled. An error is one that only a
    /// person can mend, and comes only before the first connection has worked.
    pub async fn run(self, stop: CancellationToken) -> Result<(), broker::Error> {
        let beside =
            async { tokio::join!(self.shared.handler.probe(), self.report(self.shared.intake())) };
        tokio::select! {
            ended = self.consume(stop) => ended,
            // Neither ends before the handler does.
            _ = beside => Ok(()),
        }
    }

    async fn consume(&self, stop: CancellationToken) -> Result<(), broker::Error> {
        let readiness = &self.shared.readiness;
        // An address that is no ElevenLabs' is found before commands are taken, not by failing them.
        self.shared.handler.ask_first(&stop).await;
        let intake = self.shared.intake();
        let mut pace = RECONNECT.start();
        let mut worked_once = false;
        while !stop.is_cancelled() {
            let opened = tokio::select! {
                opened = broker::open(&self.broker, |kind| intake.takes(kind)) => opened,
                () = stop.cancelled() => break,
            };
            match opened {
                Ok(generation) => {
                    worked_once = true;
                    let since = Instant::now();
                    info!(prefetch = self.broker.prefetch, "consuming");
                    readiness.wrong(Part::Publisher, "no message is confirmed yet");
                    readiness.good(Part::Broker);
                    let Some(reason) = self.serve(generation, &stop).await else {
                        return Ok(());
                    };
                    warn!(reason, "the broker is lost; connecting again");
                    readiness.wrong(Part::Broker, reason);
                    if since.elapsed() >= STABLE_AFTER {
                        pace = RECONNECT.start();
                    }
                }
                Err(error) if !worked_once && error.needs_a_person() => return Err(error),
                Err(error) => {
                    error!(error = chain(&error), "no connection to the broker; trying again");
                    readiness.wrong(Part::Broker, chain(&error));
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
            readiness: self.shared.readiness.clone(),
        };
        let reasons = {
            let (lanes, events, pulse) = generation.parts();
            let lanes = lanes.iter_mut().map(|lane| self.receive(lane, &link));
            let mut receiving = pin!(join_all(lanes));
            tokio::select! {
                reasons = &mut receiving => reasons,
                reason = self.supervise(events, pulse, &link) => {
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
            generation.flush().await;
            generation.close().await;
            return None;
        }
        let reason = generation.why_lost().await.or(reason);
        // Closed in the background: a dead broker answers nothing, and the next generation must
        // not wait for that. Commands in hand go on; their results will find no connection, and
        // the redelivered command gets them from the ledger.
        self.shared.in_hand.spawn(generation.close());
        Some(reason.unwrap_or_else(|| "a result could not be published or settled".to_owned()))
    }

    /// Watches over one generation until it is lost; returns why.
    async fn supervise(&self, events: &mut Events, pulse: &Pulse, link: &Link) -> String {
        tokio::select! {
            reason = self.watch(events) => reason,
            reason = self.ask(pulse, link) => reason,
            reason = self.let_cancels_through(pulse) => reason,
            reason = self.finish(link) => reason,
        }
    }

    /// Asks now and then, since nothing tells of a consumer that is not there any more, and not
    /// always of a connection.
    async fn ask(&self, pulse: &Pulse, link: &Link) -> String {
        let intake = self.shared.intake();
        let began = Instant::now();
        let (mut unconsumed, mut was_drained, mut is_stuck) = (Vec::new(), false, false);
        if let Err(reason) = pulse.publish().await {
            return reason;
        }
        link.note_confirm();
        loop {
            tokio::time::sleep(PULSE).await;
            let may_be_drained = !was_drained && began.elapsed() >= LIMBO;
            if may_be_drained && self.no_submit_waits(pulse).await {
                self.shared.handler.note_drained().await;
                was_drained = true;
            }
            match pulse.check(|kind| intake.takes(kind)).await {
                Ok(found) => {
                    // Once may be a moment between resting and resuming.
                    if let Some(name) = found.iter().find(|name| unconsumed.contains(*name)) {
                        return format!("the queue {name} has no consumer any more");
                    }
                    unconsumed = found;
                }
                Err(reason) => return reason,
            }
            match pulse.deferral().await {
                Ok(found) => self.tell_deferral(found, &mut is_stuck),
                Err(reason) => return reason,
            }
        }
    }

    /// Whether no submit is in this worker's hands or in a queue.
    async fn no_submit_waits(&self, pulse: &Pulse) -> bool {
        let is_idle = || self.is_idle(CommandKind::Submit);
        // Asked twice: one may have been delivered while the broker was asked.
        is_idle() && pulse.waiting_submits().await == Ok(0) && is_idle()
    }

    /// Tells of what is deferred and does not come back; in the log once.
    fn tell_deferral(&self, found: Deferral, is_stuck: &mut bool) {
        let readiness = &self.shared.readiness;
        match found {
            // On its way: nothing is known that was not known before.
            Deferral::Unknown => {}
            Deferral::Works | Deferral::Unwatched => {
                readiness.good(Part::Deferral);
                if std::mem::take(is_stuck) {
                    info!("deferred commands come back again");
                }
            }
            Deferral::Stuck(reason) => {
                if !std::mem::replace(is_stuck, true) {
                    warn!(reason, "deferred commands may stay where they are");
                }
                readiness.wrong(Part::Deferral, reason);
            }
        }
    }

    /// When the vendor is back: closes the breaker once the cancels that waited are through.
    async fn let_cancels_through(&self, pulse: &Pulse) -> String {
        let kind = CommandKind::Cancel;
        let mut intake = self.shared.intake();
        loop {
            intake.half_open().await;
            let since = Instant::now();
            let mut idle = 0;
            while idle < 2 && since.elapsed() < CANCELS_FIRST {
                match pulse.ready(kind).await {
                    Ok(0) if self.is_idle(kind) => idle += 1,
                    Ok(_) => idle = 0,
                    Err(reason) => return reason,
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            self.shared.handler.breaker().close();
        }
    }

    /// Whether no such command is in hand.
    fn is_idle(&self, kind: CommandKind) -> bool {
        self.shared.commands[kind as usize].is_empty()
    }

    /// Tells whoever asks why nothing is taken.
    async fn report(&self, mut intake: Intake) {
        let readiness = &self.shared.readiness;
        loop {
            match intake.vendor() {
                None => readiness.good(Part::Elevenlabs),
                Some(reason) => readiness.wrong(Part::Elevenlabs, reason),
            }
            match intake.ledger() {
                None => readiness.good(Part::Ledger),
                Some(reason) => readiness.wrong(Part::Ledger, reason),
            }
            intake.changed().await;
        }
    }

    /// Follows the connections until one is lost; returns why. During an alarm, what is in hand
    /// waits for its confirm.
    async fn watch(&self, events: &mut Events) -> String {
        loop {
            match events.next().await {
                Change::Blocked(reason) => {
                    warn!(reason, "the broker takes no messages (memory or disk alarm); waiting");
                    let reason = format!("the broker takes no messages: {reason}");
                    self.shared.readiness.wrong(Part::Publisher, reason);
                }
                Change::Unblocked => {
                    info!("the broker takes messages again");
                    self.shared.readiness.good(Part::Publisher);
                }
                Change::Lost(reason) => return reason,
            }
        }
    }

    /// Takes deliveries from one queue until the worker stops (`None`) or the generation is lost.
    async fn receive(&self, lane: &mut Lane, link: &Link) -> Option<String> {
        let permits = &self.shared.permits[lane.kind as usize];
        let mut intake = self.shared.intake();
        loop {
            let changed = match (intake.takes(lane.kind), lane.is_resting()) {
                (true, true) => {
                    info!(command = lane.kind.name(), "takes commands again");
                    lane.resume().await
                }
                (false, false) => {
                    let reason = intake.vendor().or_else(|| intake.ledger());
                    let command = lane.kind.name();
                    warn!(command, reason, "takes no commands; they wait in their queue");
                    lane.rest().await
                }
                _ => Ok(()),
            };
            if let Err(reason) = changed {
                link.lost.cancel();
                return Some(reason);
            }
            let permit = tokio::select! {
                permit = Arc::clone(permits).acquire_owned() => permit,
                () = intake.changed() => continue,
                () = link.stopping.soon.cancelled() => break,
                () = link.lost.cancelled() => return None,
            };
            let delivery = tokio::select! {
                delivery = lane.next() => delivery,
                () = intake.changed() => continue,
                () = link.stopping.soon.cancelled() => break,
                () = link.lost.cancelled() => return None,
            };
            match (delivery, permit) {
                (Ok(delivery), Ok(permit)) => self.execute(lane.kind, delivery, link, permit),
                (Err(reason), _) => {
                    link.lost.cancel();
                    return Some(reason);
                }
                (_, Err(_closed)) => break,
            }
        }
        self.shared.readiness.wrong(Part::Worker, "stopping");
        lane.stop().await;
        None
    }

    /// Executes and settles a command, in a task of its own.
    fn execute(
        &self,
        kind: CommandKind,
        delivery: Delivery,
        link: &Link,
        permit: OwnedSemaphorePermit,
    ) {
        let settled = settle(Arc::clone(&self.shared), delivery, link.clone(), permit);
        let lost = link.lost.clone();
        let command = async move {
            if AssertUnwindSafe(settled).catch_unwind().await.is_err() {
                error!("a command's task panicked; the command will be delivered again");
                lost.cancel();
            }
        };
        let tracked = self.shared.commands[kind as usize].track_future(command);
        self.shared.in_hand.spawn(tracked);
    }

    /// Waits for what is in hand as long as the grace period allows, then cuts it off.
    async fn drain(&self) {
        let in_hand = &self.shared.in_hand;
        self.shared.readiness.wrong(Part::Worker, "stopping");
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

impl Shared {
    fn intake(&self) -> Intake {
        Intake::new(self.handler.breaker().watch(), self.handler.ledger_trouble())
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
