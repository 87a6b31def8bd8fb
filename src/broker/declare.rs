//! Makes the topology at a broker, or checks that it is there.

use futures_util::future::try_join_all;
use lapin::options::{
    ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ErrorKind, ExchangeKind};
use tracing::{info, warn};

use super::Error;
use super::topology::{Argument, Arguments, Binding, Exchange, Queue, Routing, Topology};

impl Topology {
    /// Declares everything; harmless where it exists in the same way. What does not need each other
    /// is declared at the same time, on channels of its own: a channel takes one declaration after
    /// the other, and the way to the broker may be long.
    pub async fn declare(&self, connection: &Connection) -> lapin::Result<()> {
        let declare = async |channel: Channel, exchange| {
            declare_exchange(&channel, exchange, false).await.map(|()| channel)
        };
        let (retry, others) = self.exchanges_by_age();
        for exchange in retry {
            declare_retry(connection, exchange).await?;
        }
        each(connection, others, declare).await?;
        let declare = async |channel: Channel, queue| {
            declare_queue(&channel, queue, false).await.map(|()| channel)
        };
        each(connection, self.queues(), declare).await?;
        let bind = async |channel: Channel, binding: Binding| {
            let (queue, exchange) = (binding.queue.into(), binding.exchange.into());
            let (key, options) = (binding.routing_key.into(), QueueBindOptions::default());
            let bind = channel.queue_bind(queue, exchange, key, options, FieldTable::default());
            bind.await.map(|()| channel.clone())
        };
        each(connection, self.bindings(), bind).await
    }

    /// Sees that every exchange and queue is there, and creates nothing. Arguments are compared as
    /// far as the user has the right to configure; bindings show nowhere in AMQP.
    pub(super) async fn check(&self, connection: &Connection, at: &str) -> Result<(), Error> {
        let of = |error| Error::of(error, at);
        let channel = connection.create_channel().await.map_err(of)?;
        for exchange in self.exchanges() {
            let name = exchange.name.clone();
            let seen = declare_exchange(&channel, exchange, true).await;
            seen.map_err(|error| missing(error, at, "exchange", name))?;
        }
        for queue in self.queues() {
            let name = queue.name.clone();
            let seen = declare_queue(&channel, queue, true).await;
            seen.map_err(|error| missing(error, at, "queue", name))?;
        }
        match self.compare(&channel).await {
            Ok(()) => channel.close(200, "checked".into()).await.map_err(of),
            // The refusal has closed the channel. At the first one it ends: each is an error in the
            // broker's log, and a user who may not configure one may hardly ever configure another.
            Err(error) => match of(error) {
                Error::Permission { reason } => {
                    info!(
                        reason,
                        "every exchange and queue is there; their arguments cannot be compared \
                         without the right to configure them"
                    );
                    Ok(())
                }
                Error::OtherArguments { reason }
                    if reason.contains(&format!("exchange '{}'", self.retry_exchange())) =>
                {
                    warn!(
                        reason,
                        "the retry exchange is that of a former version; delete it and import what \
                         `call-manager topology` prints"
                    );
                    Ok(())
                }
                error => Err(error),
            },
        }
    }

    /// The retry exchange, which version 0.1.0 declared without an alternate exchange, and the others.
    fn exchanges_by_age(&self) -> (Vec<Exchange>, Vec<Exchange>) {
        let retry = self.retry_exchange();
        self.exchanges().into_iter().partition(|exchange| exchange.name == retry)
    }

    /// A passive declare compares no arguments; an active one does, and creates nothing where the
    /// thing exists.
    async fn compare(&self, channel: &Channel) -> lapin::Result<()> {
        for queue in self.queues() {
            declare_queue(channel, queue, false).await?;
        }
        let (retry, others) = self.exchanges_by_age();
        for exchange in others {
            declare_exchange(channel, exchange, false).await?;
        }
        for exchange in retry {
            declare_exchange(channel, exchange, false).await?;
        }
        Ok(())
    }
}

/// Replaces the one of a former version. An exchange holds no messages, and a delay queue keeps its own
/// until the exchange is there again.
async fn declare_retry(connection: &Connection, exchange: Exchange) -> lapin::Result<()> {
    let channel = connection.create_channel().await?;
    let Err(error) = declare_exchange(&channel, exchange.clone(), false).await else {
        return channel.close(200, "declared".into()).await;
    };
    let other = AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED);
    let is_former =
        matches!(error.kind(), ErrorKind::ProtocolError(refusal) if *refusal.kind() == other);
    if !is_former {
        return Err(error);
    }
    info!(exchange = exchange.name, "replacing the exchange that a former version declared");
    let channel = connection.create_channel().await?;
    let options = ExchangeDeleteOptions::default();
    channel.exchange_delete(exchange.name.as_str().into(), options).await?;
    declare_exchange(&channel, exchange, false).await?;
    channel.close(200, "declared".into()).await
}

fn missing(error: lapin::Error, at: &str, what: &'static str, name: String) -> Error {
    if let ErrorKind::ProtocolError(refusal) = error.kind()
        && *refusal.kind() == AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND)
    {
        let reason = refusal.get_message().to_string();
        // A queue whose node is down is answered with the same code, and comes back by itself.
        if reason.contains(&format!("no {what}")) {
            return Error::Missing { what, name, reason };
        }
    }
    Error::of(error, at)
}

/// Does something with each of them, each on a channel of its own, and closes the channels.
async fn each<T>(
    connection: &Connection,
    them: Vec<T>,
    make: impl AsyncFn(Channel, T) -> lapin::Result<Channel>,
) -> lapin::Result<()> {
    let make = &make;
    let all = them.into_iter().map(async |one| {
        let channel = make(connection.create_channel().await?, one).await?;
        channel.close(200, "declared".into()).await
    });
    try_join_all(all).await.map(drop)
}

async fn declare_exchange(
    channel: &Channel,
    exchange: Exchange,
    passive: bool,
) -> lapin::Result<()> {
    let options =
        ExchangeDeclareOptions { durable: true, passive, ..ExchangeDeclareOptions::default() };
    let arguments = table(exchange.arguments);
    let kind = match exchange.routing {
        Routing::Fanout => ExchangeKind::Fanout,
        Routing::Topic => ExchangeKind::Topic,
    };
    channel.exchange_declare(exchange.name.into(), kind, options, arguments).await
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
