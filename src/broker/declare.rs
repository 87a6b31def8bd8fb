//! Makes the topology at a broker, or checks that it is there.

use futures_util::future::try_join_all;
use lapin::options::{
    ExchangeBindOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ErrorKind, ExchangeKind};
use tracing::{info, warn};

use super::Error;
use super::topology::{
    Argument, Arguments, Binding, EVERY_KEY, Exchange, Queue, Routing, Target, Topology,
};

impl Topology {
    /// Declares everything; harmless where it exists in the same way. What does not need each other
    /// is declared at the same time, on channels of its own: a channel takes one declaration after
    /// the other, and the way to the broker may be long.
    pub async fn declare(&self, connection: &Connection) -> lapin::Result<()> {
        let retry = self.retry_exchange();
        let (retries, others) = self.exchanges().into_iter().partition(|one| one.name == retry);
        let declare = async |channel: Channel, exchange| {
            declare_exchange(&channel, exchange, false).await.map(|()| channel)
        };
        each(connection, others, declare).await?;
        for retry in retries {
            self.declare_retry(connection, retry).await?;
        }
        let declare = async |channel: Channel, queue| {
            declare_queue(&channel, queue, false).await.map(|()| channel)
        };
        each(connection, self.queues(), declare).await?;
        // Commands have to have their place before the rest is sorted out.
        let is_rest = |binding: &Binding| binding.routing_key == EVERY_KEY;
        let (rest, places) = self.bindings().into_iter().partition(is_rest);
        each(connection, places, bind).await?;
        each(connection, rest, bind).await
    }

    /// An exchange cannot be declared in another way, so that of the former version is replaced. It holds
    /// no messages. The delay queues, which alone publish to it, keep theirs until they have a way.
    async fn declare_retry(&self, connection: &Connection, retry: Exchange) -> lapin::Result<()> {
        let mut channel = connection.create_channel().await?;
        if let Err(error) = declare_exchange(&channel, retry.clone(), false).await {
            if !self.is_former_retry(&retry, &error) {
                return Err(error);
            }
            info!(exchange = retry.name, "replaces the exchange of the former version");
            channel = connection.create_channel().await?;
            let options = ExchangeDeleteOptions::default();
            channel.exchange_delete(retry.name.as_str().into(), options).await?;
            declare_exchange(&channel, retry, false).await?;
        }
        channel.close(200, "declared".into()).await
    }

    /// Sees that every exchange and queue is there, and creates nothing. Arguments are compared as
    /// far as the user has the right to configure; bindings show nowhere in AMQP. Returns whether
    /// canaries have their queue.
    pub(super) async fn check(&self, connection: &Connection, at: &str) -> Result<bool, Error> {
        let of = |error| Error::of(error, at);
        let channel = connection.create_channel().await.map_err(of)?;
        let (exchanges, queues) = self.of_former(true);
        for exchange in exchanges {
            let name = exchange.name.clone();
            let seen = declare_exchange(&channel, exchange, true).await;
            seen.map_err(|error| missing(error, at, "exchange", name))?;
        }
        for queue in queues {
            let name = queue.name.clone();
            let seen = declare_queue(&channel, queue, true).await;
            seen.map_err(|error| missing(error, at, "queue", name))?;
        }
        channel.close(200, "checked".into()).await.map_err(of)?;
        let has_new = self.has_new(connection).await.map_err(of)?;
        match self.compare(connection, has_new).await {
            Ok(()) => Ok(has_new),
            // At the first one it ends: each is an error in the broker's log, and a user who may not
            // configure one may hardly ever configure another.
            Err(error) => match of(error) {
                Error::Permission { reason } => {
                    info!(
                        reason,
                        "every exchange and queue is there; their arguments cannot be compared \
                         without the right to configure them"
                    );
                    Ok(has_new)
                }
                error => Err(error),
            },
        }
    }

    /// Whether there is what the former version did not have, and the user may see it.
    async fn has_new(&self, connection: &Connection) -> lapin::Result<bool> {
        let channel = connection.create_channel().await?;
        match look(&channel, self.of_former(false)).await {
            Ok(()) => channel.close(200, "seen".into()).await.map(|()| true),
            Err(error) if refused(&error, AMQPSoftError::NOTFOUND) => {
                let reason = error.to_string();
                warn!(reason, "{}; what is no command may block the delay queues", self.advice());
                Ok(false)
            }
            Err(error) if refused(&error, AMQPSoftError::ACCESSREFUSED) => {
                let reason = error.to_string();
                info!(reason, "nobody watches whether the delay queues let commands out");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// A passive declare compares no arguments; an active one does, and creates nothing where the
    /// thing exists.
    async fn compare(&self, connection: &Connection, has_new: bool) -> lapin::Result<()> {
        let mut channel = connection.create_channel().await?;
        let (exchanges, queues) =
            if has_new { (self.exchanges(), self.queues()) } else { self.of_former(true) };
        for queue in queues {
            declare_queue(&channel, queue, false).await?;
        }
        for exchange in exchanges {
            match declare_exchange(&channel, exchange.clone(), false).await {
                Ok(()) => {}
                Err(error) if self.is_former_retry(&exchange, &error) => {
                    warn!(
                        "{}; until then, who may publish to the exchange {} can pass for the worker",
                        self.advice(),
                        exchange.name
                    );
                    // The refusal has closed the former one.
                    channel = connection.create_channel().await?;
                }
                Err(error) => return Err(error),
            }
        }
        channel.close(200, "compared".into()).await
    }

    /// What the former version had already, or what it had not.
    fn of_former(&self, had: bool) -> (Vec<Exchange>, Vec<Queue>) {
        let exchanges = self.exchanges().into_iter().filter(|one| self.is_new(&one.name) != had);
        let queues = self.queues().into_iter().filter(|one| self.is_new(&one.name) != had);
        (exchanges.collect(), queues.collect())
    }

    fn advice(&self) -> String {
        format!(
            "the topology is that of a former version, and works as it did: delete the exchange {} \
             and import what `call-manager topology` prints, at once, or start one worker with \
             TOPOLOGY=declare",
            self.retry_exchange()
        )
    }

    /// Whether an exchange was refused because the former version's is there: not internal.
    fn is_former_retry(&self, exchange: &Exchange, error: &lapin::Error) -> bool {
        exchange.name == self.retry_exchange()
            && refused(error, AMQPSoftError::PRECONDITIONFAILED)
            && error.to_string().contains("'internal'")
    }
}

async fn look(
    channel: &Channel,
    (exchanges, queues): (Vec<Exchange>, Vec<Queue>),
) -> lapin::Result<()> {
    for exchange in exchanges {
        declare_exchange(channel, exchange, true).await?;
    }
    for queue in queues {
        declare_queue(channel, queue, true).await?;
    }
    Ok(())
}

async fn bind(channel: Channel, binding: Binding) -> lapin::Result<Channel> {
    let (from, key) = (binding.exchange.into(), binding.routing_key.into());
    let none = FieldTable::default();
    match binding.to {
        Target::Queue(queue) => {
            let options = QueueBindOptions::default();
            channel.queue_bind(queue.into(), from, key, options, none).await?;
        }
        Target::Exchange(exchange) => {
            let options = ExchangeBindOptions::default();
            channel.exchange_bind(exchange.into(), from, key, options, none).await?;
        }
    }
    Ok(channel)
}

/// Whether the broker answered with this error.
fn refused(error: &lapin::Error, code: AMQPSoftError) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(said) if *said.kind() == AMQPErrorKind::Soft(code))
}

fn missing(error: lapin::Error, at: &str, what: &'static str, name: String) -> Error {
    if refused(&error, AMQPSoftError::NOTFOUND)
        && let ErrorKind::ProtocolError(refusal) = error.kind()
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
    let options = ExchangeDeclareOptions {
        durable: true,
        internal: exchange.internal,
        passive,
        ..ExchangeDeclareOptions::default()
    };
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
