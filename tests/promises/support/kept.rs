//! Results that survive a restart of the broker, in a queue of a world with a broker of its own.

use std::time::Duration;

use lapin::options::{
    BasicConsumeOptions, ConfirmSelectOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Consumer};
use tokio::time::{sleep, timeout};

use super::{LIMIT, World};

/// A broker that has only just come back may take a connection and not answer on it.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(3);

/// Declares the queue, binds it for everything and consumes it.
pub async fn listen(channel: &Channel, exchange: &str, queue: &str) -> lapin::Result<Consumer> {
    let mut quorum = FieldTable::default();
    quorum.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.into(), durable, quorum).await?;
    let options = QueueBindOptions::default();
    let table = FieldTable::default();
    channel.queue_bind(queue.into(), exchange.into(), "#".into(), options, table).await?;
    let options = BasicConsumeOptions::default();
    channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await
}

/// The properties without what the queue adds to those of a message that was delivered before.
pub fn as_published(properties: BasicProperties) -> BasicProperties {
    let added = ["x-delivery-count", "x-acquired-count"];
    let Some(headers) = properties.headers() else {
        return properties;
    };
    let mut kept = FieldTable::default();
    for (name, value) in headers.inner() {
        if !added.contains(&name.as_str()) {
            kept.insert(name.clone(), value.clone());
        }
    }
    properties.with_headers(kept)
}

impl World {
    /// Waits until the broker is there, and listens to the results again. Those that were not taken
    /// yet come again.
    pub async fn reconnect(&mut self) {
        // Still open, it would keep what it has from the next one.
        let close = self.connection.close(200, "reconnecting".into());
        timeout(ATTEMPT_LIMIT, close).await.ok();
        let trying = async {
            loop {
                if let Ok(Ok(there)) = timeout(ATTEMPT_LIMIT, self.connected_again()).await {
                    return there;
                }
                sleep(Duration::from_millis(100)).await;
            }
        };
        let there = timeout(LIMIT, trying).await.expect("the broker is there again in time");
        (self.connection, self.channel, self.results) = there;
    }

    async fn connected_again(&self) -> anyhow::Result<(Connection, Channel, Consumer)> {
        let connection = Connection::connect(&self.url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let queue = self.kept.as_ref().expect("a world with a broker of its own");
        // Declared again as well: a test may have deleted what it was bound to.
        self.topology.declare(&connection).await?;
        let results = listen(&channel, &self.topology.results_exchange(), queue).await?;
        Ok((connection, channel, results))
    }
}
