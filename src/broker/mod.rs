//! Everything that speaks AMQP: connections, topology, consuming, publishing. The one place of `lapin`.

mod canary;
mod connection;
mod consumer;
mod declare;
mod definitions;
mod delay;
mod headers;
mod inbound;
mod publisher;
mod pulse;
mod requester;
mod returned;
mod tls;
mod topology;
mod transport;

use std::time::Duration;

use lapin::ErrorKind;
use lapin::protocol::AMQPErrorKind;
use lapin::protocol::{AMQPHardError, AMQPSoftError};
use secrecy::SecretString;

use crate::domain::command::CommandKind;

pub use canary::Deferral;
pub use connection::{Change, Events, Generation, open};
pub use consumer::{Delivery, Lane, NotSettled};
pub use definitions::definitions;
pub use publisher::{PublishError, Publisher};
pub use pulse::Pulse;
pub use requester::{AskError, Reply, ask};
pub use tls::TlsFiles;
pub use topology::{Delay, Topology};

/// The limit on connecting, with declaring everything. A frozen broker accepts and never answers.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);

/// The limit on a confirm: a broker under a memory or disk alarm never sends it.
const CONFIRM_LIMIT: Duration = Duration::from_secs(30);

/// The limit on every other call to the broker. An ack hangs where the connection is blocked.
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// How often the broker is asked whether everything is still as it was built.
pub const PULSE: Duration = Duration::from_secs(10);

/// AMQP's `delivery_mode` of a message that survives a restart of the broker.
const PERSISTENT: u8 = 2;

/// Seconds. A frozen broker is seen after two of them.
const HEARTBEAT: u16 = 10;

/// Which broker, and what is consumed there.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `amqp://user:password@host:port/vhost`.
    pub url: SecretString,
    /// The first word of every exchange and queue name.
    pub prefix: String,
    /// Whether the exchanges and queues are declared, or only checked.
    pub declares_topology: bool,
    /// Certificates, for `amqps://`.
    pub tls: TlsFiles,
    /// Commands in hand per queue.
    pub prefetch: u16,
}

/// Why there is no connection, or no longer one. `Display` is for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The URL is none.
    #[error("AMQP_URL cannot be used: {0}")]
    Url(String),
    /// Nothing answers in time.
    #[error(
        "the broker at {at} did not answer within {} s; check that it runs and is not overloaded",
        limit.as_secs()
    )]
    Silent {
        /// host:port.
        at: String,
        /// How long it was waited for.
        limit: Duration,
    },
    /// Wrong user or password.
    #[error("the broker at {at} refused the user name or password; check them in AMQP_URL")]
    Credentials {
        /// host:port.
        at: String,
    },
    /// No such virtual host, or not for this user.
    #[error("the broker at {at} refused the virtual host; check the path of AMQP_URL: {reason}")]
    VirtualHost {
        /// host:port.
        at: String,
        /// The broker's words.
        reason: String,
    },
    /// A queue or exchange exists, declared in another way.
    #[error(
        "a queue or exchange exists with other arguments than call-manager declares; delete it \
         (its messages are lost) or set AMQP_PREFIX to other names: {reason}"
    )]
    OtherArguments {
        /// The broker's words: they name the queue and the argument.
        reason: String,
    },
    /// With `TOPOLOGY=check`, a queue or exchange does not exist.
    #[error(
        "the {what} {name} is not there, and with TOPOLOGY=check nothing is created; print all of \
         it with `call-manager topology` and import that with rabbitmqctl import_definitions, or \
         set TOPOLOGY=declare: {reason}"
    )]
    Missing {
        /// `queue` or `exchange`.
        what: &'static str,
        /// Which.
        name: String,
        /// The broker's words.
        reason: String,
    },
    /// The TLS handshake failed. It is tried again: certificates are renewed at either end.
    #[error("there is no TLS with the broker at {at}: {advice}")]
    Tls {
        /// host:port.
        at: String,
        /// What is wrong, and what to do.
        advice: String,
    },
    /// The user may not do that.
    #[error("the broker's user lacks a permission: {reason}")]
    Permission {
        /// The broker's words: they name the resource.
        reason: String,
    },
    /// The connection was lost when the first commands were delivered.
    #[error(
        "the connection to the broker at {at} was lost as soon as {kind} commands were delivered; one of \
         them may end it each time, and goes to the dead-letter queue after {limit} times"
    )]
    Delivering {
        /// host:port.
        at: String,
        /// Of which commands.
        kind: CommandKind,
        /// How often a command is delivered.
        limit: i64,
        /// lapin's error.
        #[source]
        source: lapin::Error,
    },
    /// Anything else.
    #[error("the connection to the broker at {at} failed")]
    Connection {
        /// host:port.
        at: String,
        /// lapin's error.
        #[source]
        source: lapin::Error,
    },
}

impl Error {
    /// Whether only a person can mend it. Asked at start alone: later on, a broker that is being
    /// set up again may answer any of these for a while.
    pub fn needs_a_person(&self) -> bool {
        matches!(
            self,
            Self::Url(_)
                | Self::Credentials { .. }
                | Self::VirtualHost { .. }
                | Self::OtherArguments { .. }
                | Self::Missing { .. }
                | Self::Permission { .. }
        )
    }

    /// Whether the broker was there, and something at it is not right.
    pub fn is_connected(&self) -> bool {
        matches!(
            self,
            Self::OtherArguments { .. }
                | Self::Missing { .. }
                | Self::Permission { .. }
                | Self::Delivering { .. }
        )
    }

    fn of(source: lapin::Error, at: &str) -> Self {
        let ErrorKind::ProtocolError(error) = source.kind() else {
            if let Some(advice) = tls::advice(&source) {
                return Self::Tls { at: at.to_owned(), advice };
            }
            return Self::Connection { at: at.to_owned(), source };
        };
        let reason = error.get_message().to_string();
        let at = at.to_owned();
        match error.kind() {
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED)
                if reason.contains("Login was refused") =>
            {
                Self::Credentials { at }
            }
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => Self::Permission { reason },
            AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) => {
                Self::OtherArguments { reason }
            }
            AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED) => Self::VirtualHost { at, reason },
            _ => Self::Connection { at, source },
        }
    }
}

/// Whether the broker answered with this error.
fn refused(error: &lapin::Error, code: AMQPSoftError) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(said) if *said.kind() == AMQPErrorKind::Soft(code))
}
