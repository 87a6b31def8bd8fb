//! Asks a broker that says nothing whether everything is still as it was built.

use std::sync::Arc;

use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use lapin::{Channel, Queue};
use tokio::time::timeout;

use crate::domain::command::CommandKind;
use crate::telemetry::chain;

use super::CALL_LIMIT;
use super::publisher::Publisher;
use super::topology::{Delay, Topology};

/// What one generation can be asked.
pub struct Pulse {
    /// Of the consuming connection, for nothing else.
    channel: Channel,
    publisher: Arc<Publisher>,
    topology: Topology,
}

impl Pulse {
    pub(super) fn new(channel: Channel, publisher: Arc<Publisher>, topology: Topology) -> Self {
        Self { channel, publisher, topology }
    }

    /// Whether the publisher gets its confirms and each queue exists; returns the queues that
    /// should have a consumer and have none. `Err` says what is wrong; then all of it has to be built
    /// again.
    pub async fn check(
        &self,
        is_consumed: impl Fn(CommandKind) -> bool,
    ) -> Result<Vec<String>, String> {
        self.publish().await?;
        let mut unconsumed = Vec::new();
        for kind in CommandKind::ALL {
            for (name, consumed) in [
                (self.topology.retry_queue(kind), true),
                (self.topology.queue(kind), is_consumed(kind)),
            ] {
                let queue = self.look(&name).await?;
                if consumed && queue.consumer_count() == 0 {
                    unconsumed.push(name);
                }
            }
        }
        Ok(unconsumed)
    }

    /// Whether the publisher gets its confirms.
    pub async fn publish(&self) -> Result<(), String> {
        self.publisher.pulse().await.map_err(|error| chain(&error))
    }

    /// How many commands lie in their queue, not those in a worker's hands.
    pub async fn ready(&self, kind: CommandKind) -> Result<u32, String> {
        Ok(self.look(&self.topology.queue(kind)).await?.message_count())
    }

    /// How many submits lie in any queue, not those in a worker's hands.
    pub async fn waiting_submits(&self) -> Result<u32, String> {
        let kind = CommandKind::Submit;
        let delays = Delay::ALL.map(|delay| self.topology.delay(delay));
        let queues = [self.topology.queue(kind), self.topology.retry_queue(kind)];
        let mut waiting = 0_u32;
        for name in queues.iter().chain(&delays) {
            waiting = waiting.saturating_add(self.look(name).await?.message_count());
        }
        Ok(waiting)
    }

    async fn look(&self, name: &str) -> Result<Queue, String> {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let look = self.channel.queue_declare(name.into(), options, FieldTable::default());
        match timeout(CALL_LIMIT, look).await {
            Ok(queue) => queue.map_err(|error| error.to_string()),
            Err(_) => Err(format!("the broker is silent about the queue {name}")),
        }
    }
}
