//! Asks a broker that says nothing whether everything is still as it was built.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use lapin::{Channel, Queue};
use tokio::time::timeout;

use crate::domain::command::CommandKind;
use crate::telemetry::chain;

use super::CALL_LIMIT;
use super::canary::{Canary, Deferral};
use super::declare::Seen;
use super::publisher::Publisher;
use super::topology::{Delay, Topology};

/// What one generation of a lane can be asked.
pub struct Pulse {
    kind: CommandKind,
    /// Of the consuming connection, for nothing else.
    channel: Channel,
    publisher: Arc<Publisher>,
    topology: Topology,
    /// `None` where canaries have no queue.
    canary: Option<Mutex<Canary>>,
    /// There is a queue of what has a routing key that names no command.
    has_unknown: bool,
    /// The lane consumes it.
    takes_unknown: bool,
}

impl Pulse {
    pub(super) fn new(
        kind: CommandKind,
        channel: Channel,
        publisher: Arc<Publisher>,
        topology: Topology,
        seen: &Seen,
        takes_unknown: bool,
    ) -> Self {
        let canary = seen.has(&topology.canary()).then(Mutex::default);
        let has_unknown = seen.has(&topology.unknown());
        Self { kind, channel, publisher, topology, canary, has_unknown, takes_unknown }
    }

    /// Whether the publisher gets its confirms and the lane's queues exist; returns those that should
    /// have a consumer and have none. `Err` says what is wrong; then the lane has to be built again.
    pub async fn check(&self, takes_fresh: bool) -> Result<Vec<String>, String> {
        self.publish().await?;
        let mut unconsumed = Vec::new();
        let unknown = self.takes_unknown.then(|| (self.topology.unknown(), true));
        let own = [
            (self.topology.retry_queue(self.kind), true),
            (self.topology.queue(self.kind), takes_fresh),
        ];
        for (name, is_consumed) in own.into_iter().chain(unknown) {
            let queue = self.look(&name).await?;
            if is_consumed && queue.consumer_count() == 0 {
                unconsumed.push(name);
            }
        }
        Ok(unconsumed)
    }

    /// Whether the publisher gets its confirms.
    pub async fn publish(&self) -> Result<(), String> {
        self.publisher.pulse().await.map_err(|error| chain(&error))
    }

    /// How many commands lie in the lane's queue, not those in a worker's hands.
    pub async fn ready(&self) -> Result<u32, String> {
        Ok(self.look(&self.topology.queue(self.kind)).await?.message_count())
    }

    /// Whether what is deferred comes back, as a canary shows. To be asked every [`PULSE`]. `Err` says
    /// what is wrong; then the lane has to be built again.
    ///
    /// [`PULSE`]: super::PULSE
    pub async fn deferral(&self) -> Result<Deferral, String> {
        let Some(canary) = &self.canary else { return Ok(Deferral::Unwatched) };
        let is_back = self.look(&self.topology.canary()).await?.message_count() > 0;
        let (is_due, is_late) = {
            let mut canary = canary.lock().unwrap_or_else(PoisonError::into_inner);
            canary.look(is_back, Instant::now())
        };
        if is_back {
            return Ok(Deferral::Works);
        }
        if is_due && let Err(error) = self.publisher.canary().await {
            // A channel that was closed before says nothing about what is deferred.
            if error.is_of_closed_channel() {
                return Err(chain(&error));
            }
            return Ok(Deferral::Stuck(format!("nothing can be deferred: {}", chain(&error))));
        }
        if !is_late {
            return Ok(Deferral::Unknown);
        }
        let delay = self.topology.delay(Delay::Short);
        Ok(Deferral::Stuck(format!("deferred commands do not come back from {delay}")))
    }

    /// How many submits wait, at most: in their queue, in their retry queue, and among all that lies in
    /// the delay queues or came under a wrong routing key. Without those in a worker's hands, and without those whose delay is over and
    /// that find no way out of a delay queue: the broker counts them nowhere.
    pub async fn waiting_submits(&self) -> Result<u32, String> {
        let kind = CommandKind::Submit;
        let delays = Delay::ALL.map(|delay| self.topology.delay(delay));
        let queues = [self.topology.queue(kind), self.topology.retry_queue(kind)];
        let unknown = self.has_unknown.then(|| self.topology.unknown());
        let mut waiting = 0_u32;
        for name in queues.iter().chain(&delays).chain(&unknown) {
            waiting = waiting.saturating_add(self.look(name).await?.message_count());
        }
        Ok(waiting)
    }

    async fn look(&self, name: &str) -> Result<Queue, String> {
        match timeout(CALL_LIMIT, look(&self.channel, name)).await {
            Ok(queue) => queue.map_err(|error| error.to_string()),
            Err(_) => Err(format!("the broker is silent about the queue {name}")),
        }
    }
}

async fn look(channel: &Channel, name: &str) -> lapin::Result<Queue> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(name.into(), options, FieldTable::default()).await
}
