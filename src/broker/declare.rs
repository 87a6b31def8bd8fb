//! Makes the topology at a broker, or checks that it is there.

use futures_util::future::try_join_all;
use lapin::options::{
    ExchangeBindOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::protocol::AMQPSoftError;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ErrorKind, ExchangeKind};
use tracing::{info, warn};

use crate::domain::command::CommandKind;
use crate::telemetry::chain;

use super::topology::{
    Argument, Arguments, Binding, EVERY_KEY, Exchange, New, Queue, Routing, Target, Topology,
};
use super::{Error, refused};

/// Where the topology is made or checked, and for whom.
pub(super) struct Place<'a> {
    pub connection: &'a Connection,
    /// host:port.
    pub at: &'a str,
    /// Whose lane it is; `None` for all of them. One lane leaves the queues of the others alone: what is
    /// wrong with those is theirs.
    pub kind: Option<CommandKind>,
    /// The first time, everything has to be as it is declared.
    pub is_first: bool,
}

/// One of what is declared.
enum Thing {
    Exchange(Exchange),
    Queue(Queue),
    Binding(Binding),
}

impl Thing {
    /// Of a binding, what it leads to.
    fn name(&self) -> &str {
        match self {
            Self::Exchange(exchange) => &exchange.name,
            Self::Queue(queue) => &queue.name,
            Self::Binding(binding) => binding.to.name(),
        }
    }
}

/// What was found there.
#[derive(Default)]
pub(super) struct Seen {
    /// What former versions did not have, and is not there, or not for this user.
    missing: Vec<String>,
    /// What is not as it was, and costs the lane nothing at once.
    pub flaws: Vec<Error>,
}

impl Seen {
    /// Whether an exchange or a queue of this name is there.
    pub fn has(&self, name: &str) -> bool {
        !self.missing.iter().any(|missing| missing == name)
    }
}

impl Place<'_> {
    fn of(&self, error: lapin::Error) -> Error {
        Error::of(error, self.at)
    }

    async fn channel(&self) -> Result<Channel, Error> {
        self.connection.create_channel().await.map_err(|error| self.of(error))
    }

    /// Whether the lane does without it: it is what all share, and was as it is declared before.
    fn tolerates(&self, topology: &Topology, name: &str, error: &Error) -> bool {
        let is_own = self.kind.is_none_or(|kind| topology.is_queue_of(kind, name));
        !self.is_first && !is_own && error.needs_a_person()
    }
}

impl Topology {
    /// Declares everything; harmless where it exists in the same way.
    pub async fn declare(&self, connection: &Connection) -> Result<(), Error> {
        let at = "the broker";
        self.declare_at(&Place { connection, at, kind: None, is_first: true }).await.map(drop)
    }

    /// Declares what a lane needs. What does not need each other is declared at the same time, on
    /// channels of its own: a channel takes one declaration after the other, and the way to the broker
    /// may be long.
    pub(super) async fn declare_at(&self, place: &Place<'_>) -> Result<Seen, Error> {
        // Commands have to have their place before the rest is sorted out.
        let is_rest = |binding: &Binding| binding.routing_key == EVERY_KEY;
        let all =
            self.bindings().into_iter().filter(|one| self.concerns(place.kind, one.to.name()));
        let (rest, places): (Vec<_>, Vec<_>) = all.partition(is_rest);
        let steps: [Vec<Thing>; 4] = [
            self.exchanges().into_iter().map(Thing::Exchange).collect(),
            self.queues_for(place.kind).into_iter().map(Thing::Queue).collect(),
            places.into_iter().map(Thing::Binding).collect(),
            rest.into_iter().map(Thing::Binding).collect(),
        ];
        let mut seen = Seen::default();
        for step in steps {
            let made = step.into_iter().map(|thing| self.make(place, thing));
            seen.flaws.extend(try_join_all(made).await?.into_iter().flatten());
        }
        Ok(seen)
    }

    /// Makes it on a channel of its own, and closes that; the flaw, where the lane does without it.
    async fn make(&self, place: &Place<'_>, thing: Thing) -> Result<Option<Error>, Error> {
        let name = thing.name().to_owned();
        let making = async {
            let channel = place.connection.create_channel().await?;
            let channel = match thing {
                Thing::Exchange(exchange) => {
                    match declare_exchange(&channel, exchange.clone(), false).await {
                        Ok(()) => channel,
                        Err(error) => self.take_former(place, exchange, error).await?,
                    }
                }
                Thing::Queue(queue) => {
                    declare_queue(&channel, queue, false).await?;
                    channel
                }
                Thing::Binding(binding) => bind(channel, binding).await?,
            };
            channel.close(200, "declared".into()).await
        };
        match making.await {
            Ok(()) => Ok(None),
            Err(error) => self.flaw(place, &name, place.of(error)).map(Some),
        }
    }

    /// The error again, where the lane does without what it is about.
    fn flaw(&self, place: &Place<'_>, name: &str, error: Error) -> Result<Error, Error> {
        if !place.tolerates(self, name, &error) {
            return Err(error);
        }
        warn!(error = chain(&error), "not all is as it was declared; working without it");
        Ok(error)
    }

    /// An exchange cannot be declared in another way. The retry exchange of a former version is replaced:
    /// it holds no messages, and the delay queues, which alone publish to it, keep theirs until they have a
    /// way. The commands exchange is left as it is: producers publish to it, and others may be bound to it.
    async fn take_former(
        &self,
        place: &Place<'_>,
        exchange: Exchange,
        error: lapin::Error,
    ) -> lapin::Result<Channel> {
        if self.is_former_commands(&exchange, &error) {
            self.tell_former_commands(place);
            return place.connection.create_channel().await;
        }
        if !self.is_former_retry(&exchange, &error) {
            return Err(error);
        }
        info!(exchange = exchange.name, "replaces the exchange of the former version");
        let channel = place.connection.create_channel().await?;
        let options = ExchangeDeleteOptions::default();
        channel.exchange_delete(exchange.name.as_str().into(), options).await?;
        declare_exchange(&channel, exchange, false).await.map(|()| channel)
    }

    fn tell_former_commands(&self, place: &Place<'_>) {
        // Once is enough: a lane for all of them, when it is built first.
        if !place.is_first || place.kind.is_some_and(|kind| kind != CommandKind::Get) {
            return;
        }
        let (commands, unknown) = (self.commands_exchange(), self.unknown());
        warn!(
            "the exchange {commands} is that of a former version: it drops what has a routing key that \
             names no command, and nobody is told, unless a policy gives it an alternate exchange. \
             This does, while everything runs: rabbitmqctl set_policy -p VIRTUAL_HOST {unknown} \
             '^{}$' '{{\"alternate-exchange\":\"{unknown}\"}}' --apply-to exchanges",
            commands.replace('.', "\\."),
        );
    }

    /// Sees that every exchange and queue that a lane needs is there, and creates nothing. Arguments are
    /// compared as far as the user has the right to configure; bindings show nowhere in AMQP.
    pub(super) async fn check(&self, place: &Place<'_>) -> Result<Seen, Error> {
        let mut seen = Seen::default();
        let new: Vec<_> = self.news().into_iter().flat_map(|new| new.names).collect();
        let mut channel = place.channel().await?;
        for exchange in self.exchanges().into_iter().filter(|one| !new.contains(&one.name)) {
            let name = exchange.name.clone();
            let found = declare_exchange(&channel, exchange, true).await;
            self.note(place, found, ("exchange", name), &mut seen.flaws, &mut channel).await?;
        }
        for queue in self.queues_for(place.kind).into_iter().filter(|one| !new.contains(&one.name))
        {
            let name = queue.name.clone();
            let found = declare_queue(&channel, queue, true).await;
            self.note(place, found, ("queue", name), &mut seen.flaws, &mut channel).await?;
        }
        channel.close(200, "checked".into()).await.map_err(|e| place.of(e))?;
        for new in self.news() {
            if !self.has_new(place.connection, &new).await.map_err(|e| place.of(e))? {
                seen.missing.extend(new.names);
            }
        }
        match self.compare(place, &seen).await {
            Ok(flaws) => seen.flaws.extend(flaws),
            // At the first one it ends: each is an error in the broker's log, and a user who may not
            // configure one may hardly ever configure another.
            Err(Error::Permission { reason }) => info!(
                reason,
                "every exchange and queue is there; their arguments cannot be compared without the \
                 right to configure them"
            ),
            Err(error) => return Err(error),
        }
        Ok(seen)
    }

    /// Keeps what was not found for a flaw, where the lane does without it. The broker has closed the
    /// channel then, and another one takes its place.
    async fn note(
        &self,
        place: &Place<'_>,
        found: lapin::Result<()>,
        (what, name): (&'static str, String),
        flaws: &mut Vec<Error>,
        channel: &mut Channel,
    ) -> Result<(), Error> {
        let Err(error) = found else { return Ok(()) };
        let error = missing(error, place.at, what, name.clone());
        flaws.push(self.flaw(place, &name, error)?);
        *channel = place.channel().await?;
        Ok(())
    }

    /// Whether there is what a former version did not have, and the user may see it.
    async fn has_new(&self, connection: &Connection, new: &New) -> lapin::Result<bool> {
        let channel = connection.create_channel().await?;
        match self.look(&channel, new).await {
            Ok(()) => channel.close(200, "seen".into()).await.map(|()| true),
            Err(error) if refused(&error, AMQPSoftError::NOTFOUND) => {
                let reason = error.to_string();
                warn!(
                    reason,
                    "the topology is that of a former version: {}. Until then, {}",
                    new.how,
                    new.lost
                );
                Ok(false)
            }
            Err(error) if refused(&error, AMQPSoftError::ACCESSREFUSED) => {
                let reason = error.to_string();
                info!(reason, "{}", new.unseen);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    async fn look(&self, channel: &Channel, new: &New) -> lapin::Result<()> {
        for exchange in self.exchanges().into_iter().filter(|one| new.names.contains(&one.name)) {
            declare_exchange(channel, exchange, true).await?;
        }
        for queue in self.queues().into_iter().filter(|one| new.names.contains(&one.name)) {
            declare_queue(channel, queue, true).await?;
        }
        Ok(())
    }

    /// A passive declare compares no arguments; an active one does, and creates nothing where the
    /// thing exists.
    async fn compare(&self, place: &Place<'_>, seen: &Seen) -> Result<Vec<Error>, Error> {
        let mut flaws = Vec::new();
        let mut channel = place.channel().await?;
        for queue in self.queues_for(place.kind).into_iter().filter(|one| seen.has(&one.name)) {
            let name = queue.name.clone();
            if let Err(error) = declare_queue(&channel, queue, false).await {
                flaws.push(self.differs(place, &name, error)?);
                channel = place.channel().await?;
            }
        }
        for exchange in self.exchanges().into_iter().filter(|one| seen.has(&one.name)) {
            let Err(error) = declare_exchange(&channel, exchange.clone(), false).await else {
                continue;
            };
            if self.is_former_retry(&exchange, &error) {
                warn!(
                    "the topology is that of a former version: {}. Until then, who may publish to the \
                     exchange {} can pass for the worker",
                    self.how_to_replace_retry(),
                    exchange.name
                );
            } else if self.is_former_commands(&exchange, &error) {
                self.tell_former_commands(place);
            } else {
                flaws.push(self.differs(place, &exchange.name, error)?);
            }
            // The refusal has closed the former one.
            channel = place.channel().await?;
        }
        channel.close(200, "compared".into()).await.map_err(|e| place.of(e))?;
        Ok(flaws)
    }

    /// What has other arguments may be a flaw; that it cannot be compared is none.
    fn differs(&self, place: &Place<'_>, name: &str, error: lapin::Error) -> Result<Error, Error> {
        match place.of(error) {
            error @ Error::Permission { .. } => Err(error),
            error => self.flaw(place, name, error),
        }
    }

    /// The queues that all lanes share, and those of one kind.
    fn queues_for(&self, kind: Option<CommandKind>) -> Vec<Queue> {
        self.queues().into_iter().filter(|queue| self.concerns(kind, &queue.name)).collect()
    }

    /// Whether something of this name is no other lane's.
    fn concerns(&self, kind: Option<CommandKind>, name: &str) -> bool {
        let is_another = |other| Some(other) != kind && self.is_queue_of(other, name);
        kind.is_none() || !CommandKind::ALL.into_iter().any(is_another)
    }

    fn is_queue_of(&self, kind: CommandKind, name: &str) -> bool {
        name == self.queue(kind) || name == self.retry_queue(kind)
    }

    /// Whether an exchange was refused because the former version's is there: not internal.
    fn is_former_retry(&self, exchange: &Exchange, error: &lapin::Error) -> bool {
        exchange.name == self.retry_exchange()
            && refused(error, AMQPSoftError::PRECONDITIONFAILED)
            && error.to_string().contains("'internal'")
    }

    /// Whether an exchange was refused because the former version's is there: without an alternate.
    fn is_former_commands(&self, exchange: &Exchange, error: &lapin::Error) -> bool {
        let reason = error.to_string();
        exchange.name == self.commands_exchange()
            && refused(error, AMQPSoftError::PRECONDITIONFAILED)
            && reason.contains("'alternate-exchange'")
            // RabbitMQ cuts what it says after 252 bytes, and this stands at the end.
            && !reason.contains("current is the value")
            && (reason.contains("current is none") || reason.contains("..."))
    }
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
