//! Makes the topology at a broker.

use lapin::Channel;
use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};

use super::topology::{Argument, Arguments, Exchange, Queue, Topology};

impl Topology {
    /// Declares everything; harmless where it exists in the same way.
    pub async fn declare(&self, channel: &Channel) -> lapin::Result<()> {
        for exchange in self.exchanges() {
            declare_exchange(channel, exchange, false).await?;
        }
        for queue in self.queues() {
            declare_queue(channel, queue, false).await?;
        }
        for binding in self.bindings() {
            let (queue, exchange) = (binding.queue.into(), binding.exchange.into());
            let (key, options) = (binding.routing_key.into(), QueueBindOptions::default());
            channel.queue_bind(queue, exchange, key, options, FieldTable::default()).await?;
        }
        Ok(())
    }
}

async fn declare_exchange(
    channel: &Channel,
    exchange: Exchange,
    passive: bool,
) -> lapin::Result<()> {
    let options =
        ExchangeDeclareOptions { durable: true, passive, ..ExchangeDeclareOptions::default() };
    let arguments = table(exchange.arguments);
    channel.exchange_declare(exchange.name.into(), exchange.kind, options, arguments).await
}

async fn declare_queue(channel: &Channel, queue: Queue, passive: bool) -> lapin::Result<()> {
    let options = QueueDeclareOptions { durable: true, passive, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.name.into(), options, table(queue.arguments)).await?;
    Ok(())
}

fn table(arguments: Arguments) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in arguments {
        let value = match value {
            Argument::Text(text) => AMQPValue::LongString(text.into()),
            Argument::Number(number) => number.into(),
        };
        table.insert(name.into(), value);
    }
    table
}
