//! The exchanges and queues of the contract, with a reason on each flag.

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, ExchangeKind};

use crate::domain::command::CommandKind;

/// Redeliveries before the broker itself dead-letters a command. Restarts and lost connections
/// count, so it is far above what those make; unset, 4.x would use 20 and 3.x none.
const DELIVERY_LIMIT: i64 = 50;

/// The catch-all of results that nobody is bound for keeps the newest of so many.
const UNROUTED_MAX_MESSAGES: i64 = 10_000;
/// …and so many bytes: a `get` of 10,000 recipients is megabytes.
const UNROUTED_MAX_BYTES: i64 = 256 * 1024 * 1024;

/// The names, made of one prefix.
#[derive(Clone, Debug)]
pub struct Topology {
    prefix: String,
}

impl Topology {
    /// Names that begin with `prefix`, `call-manager` by default.
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    /// Where producers publish.
    pub fn commands_exchange(&self) -> String {
        format!("{}.commands", self.prefix)
    }

    /// Where results appear.
    pub fn results_exchange(&self) -> String {
        format!("{}.results", self.prefix)
    }

    /// Exchange and queue of results that no queue is bound for.
    pub fn unrouted(&self) -> String {
        format!("{}.unrouted", self.prefix)
    }

    /// Exchange and queue of commands that the broker gave up on.
    pub fn dead_letter(&self) -> String {
        format!("{}.dead-letter", self.prefix)
    }

    /// The queue of one command.
    pub fn queue(&self, kind: CommandKind) -> String {
        format!("{}.{kind}", self.prefix)
    }

    /// Declares everything; harmless where it exists in the same way.
    pub async fn declare(&self, channel: &Channel) -> lapin::Result<()> {
        let dead = self.dead_letter();
        exchange(channel, &dead, ExchangeKind::Fanout, FieldTable::default()).await?;
        // Bounded only by disk: what lies here was promised not to be lost.
        queue(channel, &dead, quorum()).await?;
        bind(channel, &dead, &dead, "").await?;

        let unrouted = self.unrouted();
        exchange(channel, &unrouted, ExchangeKind::Fanout, FieldTable::default()).await?;
        let mut catch_all = quorum();
        catch_all.insert("x-max-length".into(), UNROUTED_MAX_MESSAGES.into());
        catch_all.insert("x-max-length-bytes".into(), UNROUTED_MAX_BYTES.into());
        // reject-publish would refuse results, and so stop all work, where nobody listens.
        catch_all.insert("x-overflow".into(), text("drop-head"));
        queue(channel, &unrouted, catch_all).await?;
        bind(channel, &unrouted, &unrouted, "").await?;

        let mut results = FieldTable::default();
        // Makes `mandatory` unnecessary on results, which lapin cannot do with many in flight.
        results.insert("alternate-exchange".into(), text(&unrouted));
        exchange(channel, &self.results_exchange(), ExchangeKind::Topic, results).await?;

        let commands = self.commands_exchange();
        exchange(channel, &commands, ExchangeKind::Topic, FieldTable::default()).await?;
        for kind in CommandKind::ALL {
            let name = self.queue(kind);
            let mut arguments = quorum();
            arguments.insert("x-delivery-limit".into(), DELIVERY_LIMIT.into());
            // Without it the broker drops what is past the delivery limit.
            arguments.insert("x-dead-letter-exchange".into(), text(&dead));
            // The default, at-most-once, loses the message where the target is away; at-least-once
            // needs reject-publish, which does nothing on a queue without a length limit.
            arguments.insert("x-dead-letter-strategy".into(), text("at-least-once"));
            arguments.insert("x-overflow".into(), text("reject-publish"));
            queue(channel, &name, arguments).await?;
            bind(channel, &name, &commands, &kind.routing_key()).await?;
        }
        Ok(())
    }
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

/// Replicated and durable: a classic queue loses what it holds with its node.
fn quorum() -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), text("quorum"));
    arguments
}

async fn exchange(
    channel: &Channel,
    name: &str,
    kind: ExchangeKind,
    arguments: FieldTable,
) -> lapin::Result<()> {
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel.exchange_declare(name.into(), kind, options, arguments).await
}

async fn queue(channel: &Channel, name: &str, arguments: FieldTable) -> lapin::Result<()> {
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(name.into(), options, arguments).await?;
    Ok(())
}

async fn bind(channel: &Channel, queue: &str, exchange: &str, key: &str) -> lapin::Result<()> {
    let options = QueueBindOptions::default();
    channel
        .queue_bind(queue.into(), exchange.into(), key.into(), options, FieldTable::default())
        .await
}
