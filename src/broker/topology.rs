//! The exchanges, queues and bindings of the contract as data, with a reason on each flag.

use crate::domain::command::CommandKind;

pub use super::delay::Delay;

/// Redeliveries before the broker itself dead-letters a command. Restarts and lost connections
/// count, so it is far above what those make; unset, 4.x would use 20 and 3.x none.
pub(super) const DELIVERY_LIMIT: i64 = 50;

/// The catch-all of results that nobody is bound for keeps the newest of so many.
const UNROUTED_MAX_MESSAGES: i64 = 10_000;
/// …and so many bytes: a `get` of 10,000 recipients is megabytes.
const UNROUTED_MAX_BYTES: i64 = 256 * 1024 * 1024;

/// How long a canary lies where it is looked for: several looks, and then the next one is due.
const CANARY_STAYS_MILLIS: i64 = 30_000;

/// The routing key of a canary.
pub(super) const CANARY: &str = "canary";

/// The topic pattern that takes every routing key.
pub(super) const EVERY_KEY: &str = "#";

/// The names, made of one prefix, and what is declared under them.
#[derive(Clone, Debug)]
pub struct Topology {
    prefix: String,
}

/// A durable exchange.
#[derive(Clone, Debug)]
pub(super) struct Exchange {
    pub name: String,
    pub routing: Routing,
    /// Nobody can publish to it; it takes what the broker itself routes there.
    pub internal: bool,
    pub arguments: Arguments,
}

/// Which of its queues an exchange gives a message to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Routing {
    /// All.
    Fanout,
    /// Those bound with its routing key.
    Topic,
}

/// A durable queue.
#[derive(Clone, Debug)]
pub(super) struct Queue {
    pub name: String,
    pub arguments: Arguments,
}

/// What a former version did not have, under these names. The rest is for a person.
pub(super) struct New {
    pub names: Vec<String>,
    /// What to do where it is not there.
    pub how: String,
    /// What it costs that it is not there.
    pub lost: &'static str,
    /// What it costs that the worker has no right to it.
    pub unseen: &'static str,
}

/// From an exchange to a queue or to another exchange.
#[derive(Clone, Debug)]
pub(super) struct Binding {
    pub exchange: String,
    pub to: Target,
    pub routing_key: String,
}

/// Where a binding leads.
#[derive(Clone, Debug)]
pub(super) enum Target {
    Queue(String),
    Exchange(String),
}

impl Target {
    pub fn name(&self) -> &str {
        match self {
            Self::Queue(name) | Self::Exchange(name) => name,
        }
    }
}

/// In the order of declaring.
pub(super) type Arguments = Vec<(&'static str, Argument)>;

/// The value of an argument.
#[derive(Clone, Debug)]
pub(super) enum Argument {
    Text(String),
    Number(i64),
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

    /// Where deferred commands return to, with their own routing key.
    pub fn retry_exchange(&self) -> String {
        format!("{}.retry", self.prefix)
    }

    /// Where results appear.
    pub fn results_exchange(&self) -> String {
        format!("{}.results", self.prefix)
    }

    /// Exchange and queue of results that no queue is bound for.
    pub fn unrouted(&self) -> String {
        format!("{}.unrouted", self.prefix)
    }

    /// Exchange and queue of messages to the commands exchange whose routing key names no command.
    pub fn unknown(&self) -> String {
        format!("{}.unknown", self.prefix)
    }

    /// Exchange and queue of commands that the broker gave up on.
    pub fn dead_letter(&self) -> String {
        format!("{}.dead-letter", self.prefix)
    }

    /// Exchange and queue where a command rests for so long before it goes to the retry exchange.
    pub fn delay(&self, delay: Delay) -> String {
        format!("{}.delay.{delay}", self.prefix)
    }

    /// The queue of one command.
    pub fn queue(&self, kind: CommandKind) -> String {
        format!("{}.{kind}", self.prefix)
    }

    /// The queue of one command for what was deferred: it comes back here and not to the tail of a
    /// full command queue, and is taken also while fresh commands are not.
    pub fn retry_queue(&self, kind: CommandKind) -> String {
        format!("{}.{kind}.retry", self.prefix)
    }

    /// The exchange that sorts out what left a delay queue and is no command.
    pub fn stray(&self) -> String {
        format!("{}.stray", self.prefix)
    }

    /// The queue where canaries are looked for: messages that a worker sends through the shortest delay
    /// queue to see whether that one lets them out.
    pub fn canary(&self) -> String {
        format!("{}.canary", self.prefix)
    }

    /// Whether a queue is the worker's own, so that no reply may go there.
    pub(super) fn is_own_queue(&self, name: &str) -> bool {
        name == self.pulse() || self.queues().iter().any(|queue| queue.name == name)
    }

    /// What former versions did not have. A worker does its work without it.
    pub(super) fn news(&self) -> [New; 2] {
        [
            New {
                names: vec![self.stray(), self.canary()],
                how: self.how_to_replace_retry(),
                lost: "what is no command may block the delay queues",
                unseen: "nobody watches whether the delay queues let commands out",
            },
            New {
                names: vec![self.unknown()],
                how: format!(
                    "import what `call-manager topology` prints, give {} the policy that the README \
                     names, and restart the workers; or start one worker with TOPOLOGY=declare",
                    self.commands_exchange()
                ),
                lost: "what has a routing key that names no command is dropped, and nobody told",
                unseen: "what has a routing key that names no command is not answered",
            },
        ]
    }

    pub(super) fn how_to_replace_retry(&self) -> String {
        format!(
            "delete the exchange {} and import what `call-manager topology` prints, at once, or start one \
             worker with TOPOLOGY=declare",
            self.retry_exchange()
        )
    }

    /// No queue has this name: what is published to it tells only whether the broker confirms.
    pub(super) fn pulse(&self) -> String {
        format!("{}.pulse", self.prefix)
    }

    /// Every exchange there is.
    pub fn exchange_names(&self) -> Vec<String> {
        self.exchanges().into_iter().map(|exchange| exchange.name).collect()
    }

    /// Every queue there is.
    pub fn queue_names(&self) -> Vec<String> {
        self.queues().into_iter().map(|queue| queue.name).collect()
    }

    pub(super) fn exchanges(&self) -> Vec<Exchange> {
        let plain =
            |name, routing| Exchange { name, routing, internal: false, arguments: Vec::new() };
        let mut exchanges = vec![
            plain(self.dead_letter(), Routing::Fanout),
            plain(self.unrouted(), Routing::Fanout),
            plain(self.unknown(), Routing::Fanout),
            Exchange {
                name: self.results_exchange(),
                routing: Routing::Topic,
                internal: false,
                arguments: vec![("alternate-exchange", text(self.unrouted()))],
            },
            Exchange {
                // A key with a typo in it would be dropped, and nobody told.
                arguments: vec![("alternate-exchange", text(self.unknown()))],
                ..plain(self.commands_exchange(), Routing::Topic)
            },
            // What comes by way of it has been in a delay queue.
            Exchange { internal: true, ..plain(self.retry_exchange(), Routing::Topic) },
            Exchange {
                name: self.stray(),
                routing: Routing::Topic,
                internal: true,
                // For what is bound nowhere here: what must leave a delay queue and has no way would
                // be tried again for ever, and 32 of those hold up everything behind them.
                arguments: vec![("alternate-exchange", text(self.dead_letter()))],
            },
        ];
        // In front of each delay queue: a message published through the default exchange would have
        // the queue's name for its routing key, and the key of the command would be lost.
        exchanges.extend(Delay::ALL.map(|delay| plain(self.delay(delay), Routing::Fanout)));
        exchanges
    }

    pub(super) fn queues(&self) -> Vec<Queue> {
        let mut queues = vec![
            // Bounded only by disk: what lies here was promised not to be lost.
            Queue { name: self.dead_letter(), arguments: vec![quorum()] },
            Queue {
                name: self.unrouted(),
                arguments: vec![
                    quorum(),
                    ("x-max-length", Argument::Number(UNROUTED_MAX_MESSAGES)),
                    ("x-max-length-bytes", Argument::Number(UNROUTED_MAX_BYTES)),
                    // reject-publish would refuse results, and so stop all work, where nobody
                    // listens.
                    ("x-overflow", text("drop-head")),
                ],
            },
        ];
        // All have the same: a command is not worth less for having been deferred, and what came under a
        // wrong key may be one whose queue was missing.
        let of_kind = |kind| [self.queue(kind), self.retry_queue(kind)];
        let names = CommandKind::ALL.into_iter().flat_map(of_kind);
        queues.extend(names.chain([self.unknown()]).map(|name| {
            let mut arguments =
                vec![quorum(), ("x-delivery-limit", Argument::Number(DELIVERY_LIMIT))];
            // Without it the broker drops what is past the delivery limit.
            arguments.extend(dead_lettering_to(self.dead_letter()));
            Queue { name, arguments }
        }));
        for delay in Delay::ALL {
            let milliseconds = delay.duration().as_secs() * 1000;
            let mut arguments =
                vec![quorum(), ("x-message-ttl", Argument::Number(milliseconds.cast_signed()))];
            // No x-dead-letter-routing-key: the message keeps its own.
            arguments.extend(dead_lettering_to(self.retry_exchange()));
            queues.push(Queue { name: self.delay(delay), arguments });
        }
        queues.push(Queue {
            name: self.canary(),
            arguments: vec![
                quorum(),
                ("x-message-ttl", Argument::Number(CANARY_STAYS_MILLIS)),
                // One says it all.
                ("x-max-length", Argument::Number(1)),
                ("x-overflow", text("drop-head")),
            ],
        });
        queues
    }

    /// In an order that sorts nothing out before it is known what a command is.
    pub(super) fn bindings(&self) -> Vec<Binding> {
        let to_queue = |exchange, queue, routing_key| {
            let to = Target::Queue(queue);
            Binding { exchange, to, routing_key }
        };
        // A fanout exchange and its one queue have one name.
        let pairs = [self.dead_letter(), self.unrouted(), self.unknown()];
        let mut bindings: Vec<_> = pairs
            .into_iter()
            .chain(Delay::ALL.map(|delay| self.delay(delay)))
            .map(|name| to_queue(name.clone(), name, String::new()))
            .collect();
        let retry = self.retry_exchange();
        for kind in CommandKind::ALL {
            let key = kind.routing_key();
            bindings.push(to_queue(self.commands_exchange(), self.queue(kind), key.clone()));
            bindings.push(to_queue(retry.clone(), self.retry_queue(kind), key));
        }
        // Everything that leaves a delay queue goes there too. A command is led back, where it has been
        // already, and so does not go on to the alternate exchange, also not while its own queue is
        // missing: the delay queue holds it until that one is there again.
        bindings.extend(CommandKind::ALL.map(|kind| {
            let (to, routing_key) = (Target::Exchange(retry.clone()), kind.routing_key());
            Binding { exchange: self.stray(), to, routing_key }
        }));
        bindings.push(to_queue(self.stray(), self.canary(), CANARY.to_owned()));
        let (to, routing_key) = (Target::Exchange(self.stray()), EVERY_KEY.to_owned());
        bindings.push(Binding { exchange: retry, to, routing_key });
        bindings
    }
}

/// Replicated and durable: a classic queue loses what it holds with its node.
fn quorum() -> (&'static str, Argument) {
    ("x-queue-type", text("quorum"))
}

/// The default strategy, at-most-once, loses the message where the target is away; at-least-once
/// needs reject-publish, which does nothing on a queue without a length limit.
fn dead_lettering_to(exchange: String) -> Arguments {
    vec![
        ("x-dead-letter-exchange", text(exchange)),
        ("x-dead-letter-strategy", text("at-least-once")),
        ("x-overflow", text("reject-publish")),
    ]
}

fn text(value: impl Into<String>) -> Argument {
    Argument::Text(value.into())
}
