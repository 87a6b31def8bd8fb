//! The supervisor: builds the connections and consumers of each lane again whenever they are lost,
//! receives commands, bounds how many are in hand, drains.

mod finisher;
mod intake;
mod settle;
mod supervision;
mod suspects;

use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use futures_util::future::join_all;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

use crate::broker::{self, Delivery, Generation, Lane, Publisher};
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

/// How fast to connect a lane again that could be connected and was lost: the broker works.
const REOPEN: Policy =
    Policy { initial: Duration::from_millis(250), max: Duration::from_secs(1), horizon: None };

/// A generation that held so long was a good one: the next reconnect starts at the shortest wait.
const STABLE_AFTER: Duration = Duration::from_secs(10);

/// When the vendor is back, everything else waits so long at most for the cancels.
const CANCELS_FIRST: Duration = Duration::from_secs(5);

/// How long the commands that were cut off may take to publish what they have to say.
const CUT_OFF_LIMIT: Duration = Duration::from_secs(5);

/// The worker: for each kind of command a lane, which has one generation of connections after the
/// other, until it is stopped. What ends the connections of one lane stops no other.
pub struct Worker {
    broker: broker::Settings,
    shared: Arc<Shared>,
    grace: Duration,
}

struct Shared {
    handler: Handler,
    readiness: Readiness,
    /// What runs in the background.
    tasks: TaskTracker,
    /// Commands in hand, of this generation and of earlier ones whose requests still run.
    in_hand: [TaskTracker; CommandKind::ALL.len()],
    /// Since when each lane consumes; `None` while it does not.
    consuming_since: Mutex<[Option<Instant>; CommandKind::ALL.len()]>,
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
    kind: CommandKind,
    publisher: Arc<Publisher>,
    /// `soon` when this generation is lost or the worker stops, `now` when the grace period is over.
    stopping: Stopping,
    /// Cancelled by whoever notices that the generation is of no use any more.
    lost: CancellationToken,
    readiness: Readiness,
    /// The next generation can declare what is missing.
    declares: bool,
}

impl Link {
    /// A message was confirmed: that the publisher works, but for an alarm, which has its own end.
    fn note_confirm(&self) {
        if !self.publisher.is_blocked() {
            self.readiness.good(Part::Publisher(self.kind));
        }
    }
}

/// How a lane is connected again.
struct Pace {
    failing: Schedule,
    lost: Schedule,
    /// With one command at a time: a message that ends its connection takes back all that was delivered
    /// along with it, and the broker counts that, up to its limit. Alone, it takes nothing.
    is_careful: bool,
}

impl Default for Pace {
    fn default() -> Self {
        Self { failing: RECONNECT.start(), lost: REOPEN.start(), is_careful: false }
    }
}

impl Pace {
    /// It was lost after so long.
    fn after_loss(&mut self, lived: Duration) -> &mut Schedule {
        self.failing = RECONNECT.start();
        self.is_careful = lived < STABLE_AFTER;
        if !self.is_careful {
            self.lost = REOPEN.start();
        }
        &mut self.lost
    }

    /// It could not be built.
    fn after_failure(&mut self, error: &broker::Error) -> &mut Schedule {
        if matches!(error, broker::Error::Delivering { .. }) {
            self.is_careful = true;
            return &mut self.lost;
        }
        &mut self.failing
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
                tasks: TaskTracker::new(),
                in_hand: CommandKind::ALL.map(|_| TaskTracker::new()),
                consuming_since: Mutex::default(),
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
        let beside = async {
            tokio::join!(
                self.shared.handler.probe(),
                self.report(self.shared.intake()),
                self.close_breaker(),
            )
        };
        tokio::select! {
            ended = self.consume(stop) => ended,
            // None ends before the handler does.
            _ = beside => Ok(()),
        }
    }

    async fn consume(&self, stop: CancellationToken) -> Result<(), broker::Error> {
        // An address that is no ElevenLabs' is found before commands are taken, not by failing them.
        self.shared.handler.ask_first(&stop).await;
        // An error of one lane is one of the settings, and ends the process: the others finish what they
        // have in hand.
        let halt = stop.child_token();
        let lanes = CommandKind::ALL.map(|kind| self.run_lane(kind, &halt));
        join_all(lanes).await.into_iter().collect()
    }

    async fn run_lane(
        &self,
        kind: CommandKind,
        halt: &CancellationToken,
    ) -> Result<(), broker::Error> {
        let ended = self.connect_lane(kind, halt).await;
        if ended.is_err() {
            halt.cancel();
        }
        ended
    }

    /// One generation after the other, until it is stopped.
    async fn connect_lane(
        &self,
        kind: CommandKind,
        stop: &CancellationToken,
    ) -> Result<(), broker::Error> {
        let readiness = &self.shared.readiness;
        let intake = self.shared.intake();
        let mut pace = Pace::default();
        let mut worked_once = false;
        while !stop.is_cancelled() {
            let prefetch = if pace.is_careful { 1 } else { self.broker.prefetch };
            let takes_fresh = {
                let intake = intake.clone();
                move || intake.takes(kind)
            };
            let opened = tokio::select! {
                opened = broker::open(&self.broker, kind, prefetch, !worked_once, takes_fresh) => opened,
                () = stop.cancelled() => break,
            };
            match opened {
                Ok(generation) => {
                    worked_once = true;
                    let since = Instant::now();
                    self.note_consuming(kind, &generation.flaws);
                    let lost = self.serve(generation, pace.is_careful, stop).await;
                    self.shared.consuming_since()[kind as usize] = None;
                    let Some(reason) = lost else { return Ok(()) };
                    // The broker counts one more delivery of all that this lane had.
                    self.shared.suspects.returned(kind);
                    warn!(command = kind.name(), reason, "the lane is lost; connecting it again");
                    readiness.wrong(Part::Broker(kind), reason);
                    wait(pace.after_loss(since.elapsed()), stop).await;
                }
                Err(error) if !worked_once && error.needs_a_person() => return Err(error),
                Err(error) => {
                    if matches!(error, broker::Error::Delivering { .. }) {
                        self.shared.suspects.returned(kind);
                    }
                    self.tell(kind, &error);
                    wait(pace.after_failure(&error), stop).await;
                }
            }
        }
        // Of an earlier generation: there is no connection for their results, but a request that is
        // under way has to end before the process does.
        self.drain(kind).await;
        Ok(())
    }

    /// Tells why a lane cannot be built.
    fn tell(&self, kind: CommandKind, error: &broker::Error) {
        let (command, reason) = (kind.name(), chain(error));
        if error.is_connected() {
            error!(
                command,
                error = reason,
                "no commands can be taken from their queue; trying again"
            );
        } else {
            error!(command, error = reason, "no connection to the broker; trying again");
        }
        self.shared.readiness.wrong(Part::Broker(kind), reason);
    }

    fn note_consuming(&self, kind: CommandKind, flaws: &[broker::Error]) {
        let readiness = &self.shared.readiness;
        readiness.wrong(Part::Publisher(kind), "no message is confirmed yet");
        match flaws {
            [] => readiness.good(Part::Broker(kind)),
            [flaw, ..] => readiness.wrong(Part::Broker(kind), chain(flaw)),
        }
        let is_last = {
            let mut since = self.shared.consuming_since();
            since[kind as usize] = Some(Instant::now());
            since.iter().all(Option::is_some)
        };
        info!(command = kind.name(), "the lane is connected");
        if is_last {
            info!(prefetch = self.broker.prefetch, "consuming");
        }
    }

    /// Serves one generation; returns why it was lost, or `None` where the worker was stopped.
    async fn serve(
        &self,
        mut generation: Generation,
        is_careful: bool,
        stop: &CancellationToken,
    ) -> Option<String> {
        let lost = CancellationToken::new();
        let publisher = Arc::clone(&generation.publisher);
        // What this one has found and could not mend, the next one cannot either.
        let declares = self.broker.declares_topology && generation.flaws.is_empty();
        let (lane, events, pulse) = generation.parts();
        let kind = lane.kind;
        let link = Link {
            kind,
            publisher,
            stopping: Stopping {
                soon: stop.child_token(),
                claimed: stop.clone(),
                now: self.shared.now.clone(),
            },
            lost: lost.clone(),
            readiness: self.shared.readiness.clone(),
            declares,
        };
        let reason = {
            let mut receiving = pin!(self.receive(lane, &link, is_careful));
            tokio::select! {
                reason = &mut receiving => reason,
                reason = self.supervise(events, pulse, &link) => {
                    lost.cancel();
                    receiving.await;
                    Some(reason)
                }
            }
        };
        link.stopping.soon.cancel();
        if reason.is_none() && !lost.is_cancelled() {
            self.drain(kind).await;
            generation.flush().await;
            generation.close().await;
            return None;
        }
        let reason = generation.why_lost().await.or(reason);
        // Closed in the background: a dead broker answers nothing, and the next generation must
        // not wait for that. Commands in hand go on; their results will find no connection, and
        // the redelivered command gets them from the ledger.
        self.shared.tasks.spawn(generation.close());
        Some(reason.unwrap_or_else(|| "a result could not be published or settled".to_owned()))
    }

    /// When the vendor is back: closes the breaker after a while, whatever becomes of the cancels that
    /// waited, and of their lane.
    async fn close_breaker(&self) {
        let mut intake = self.shared.intake();
        loop {
            intake.half_open().await;
            tokio::time::sleep(CANCELS_FIRST).await;
            self.shared.handler.breaker().close();
        }
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

    /// Takes deliveries from one queue until the worker stops (`None`) or the generation is lost.
    async fn receive(&self, lane: &mut Lane, link: &Link, mut is_careful: bool) -> Option<String> {
        let permits = &self.shared.permits[lane.kind as usize];
        let mut intake = self.shared.intake();
        let stable = tokio::time::Instant::now() + STABLE_AFTER;
        loop {
            let is_stable = is_careful && tokio::time::Instant::now() >= stable;
            is_careful &= !is_stable;
            if let Err(reason) = self.adjust(lane, &intake, is_stable).await {
                link.lost.cancel();
                return Some(reason);
            }
            let permit = tokio::select! {
                permit = Arc::clone(permits).acquire_owned() => permit,
                () = intake.changed() => continue,
                () = tokio::time::sleep_until(stable), if is_careful => continue,
                () = link.stopping.soon.cancelled() => break,
                () = link.lost.cancelled() => return None,
            };
            let delivery = tokio::select! {
                delivery = lane.next() => delivery,
                () = intake.changed() => continue,
                () = tokio::time::sleep_until(stable), if is_careful => continue,
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

    /// Has the lane take what it is to take now. `Err` says why it cannot.
    async fn adjust(&self, lane: &mut Lane, intake: &Intake, widens: bool) -> Result<(), String> {
        let command = lane.kind.name();
        match (intake.takes(lane.kind), lane.is_resting()) {
            (true, true) => {
                info!(command, "takes commands again");
                lane.resume().await?;
            }
            (false, false) => {
                let reason = intake.vendor().or_else(|| intake.ledger());
                warn!(command, reason, "takes no commands; they wait in their queue");
                // What it gives back, the broker may count as delivered once more.
                self.shared.suspects.returned(lane.kind);
                lane.rest().await?;
            }
            _ => {}
        }
        if widens {
            self.shared.suspects.returned(lane.kind);
            lane.widen(self.broker.prefetch).await?;
        }
        Ok(())
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
        self.shared.in_hand[kind as usize].spawn(command);
    }

    /// Waits for what a lane has in hand as long as the grace period allows, then cuts it off.
    async fn drain(&self, kind: CommandKind) {
        let in_hand = &self.shared.in_hand[kind as usize];
        self.shared.readiness.wrong(Part::Worker, "stopping");
        in_hand.close();
        if in_hand.is_empty() {
            return;
        }
        let command = kind.name();
        info!(command, in_hand = in_hand.len(), grace_s = self.grace.as_secs(), "stopping");
        if timeout(self.grace, in_hand.wait()).await.is_ok() {
            return;
        }
        warn!(command, in_hand = in_hand.len(), "the grace period is over; requests are cut off");
        self.shared.now.cancel();
        if timeout(CUT_OFF_LIMIT, in_hand.wait()).await.is_err() {
            warn!(command, in_hand = in_hand.len(), "what is still in hand returns to its queue");
        }
    }
}

impl Shared {
    fn intake(&self) -> Intake {
        Intake::new(&self.handler)
    }

    fn consuming_since(&self) -> MutexGuard<'_, [Option<Instant>; CommandKind::ALL.len()]> {
        // Each change is one step, so a panic elsewhere leaves none half-done.
        self.consuming_since.lock().unwrap_or_else(PoisonError::into_inner)
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
