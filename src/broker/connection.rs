//! One generation of a lane: its connections, channels and consumers, which live and die together.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::{BoxStream, select};
use lapin::options::{BasicQosOptions, ConfirmSelectOptions};
use lapin::uri::AMQPUri;
use lapin::{Channel, Connection, ConnectionProperties, ConnectionStatus, Event};
use secrecy::ExposeSecret;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;
use url::{Host, Url};

use crate::domain::command::CommandKind;

use super::consumer::Lane;
use super::declare::{Place, Seen};
use super::publisher::Publisher;
use super::pulse::Pulse;
use super::returned::Returned;
use super::tls::TlsFiles;
use super::topology::{DELIVERY_LIMIT, Topology};
use super::transport;
use super::{CALL_LIMIT, CONNECT_LIMIT, Error, HEARTBEAT, Settings};

/// How long a connection that is being closed may take to have its reason known.
const REASON_LIMIT: Duration = Duration::from_secs(1);

/// Everything that was built on one pair of connections, for the commands of one kind. Each kind has
/// connections of its own: what ends one of them, a message that the broker cannot encode or a queue
/// that is not as it was, stops no other kind.
pub struct Generation {
    lane: Lane,
    /// What is not as it was declared, and is not the lane's own: it works as far as it can.
    pub flaws: Vec<Error>,
    /// Publishes results.
    pub publisher: Arc<Publisher>,
    events: Events,
    pulse: Pulse,
    // Apart from the publisher's, because a broker that blocks publishers (memory or disk alarm)
    // blocks a whole connection, and acks and deliveries must go on.
    consuming: Connection,
}

/// Connects, declares or checks the topology and starts to consume, fresh commands only where they are
/// taken now: what is received and given back counts as a redelivery. The first time, everything has to
/// be as it is declared. Later on, a fault in what is not the lane's own is a flaw and no more.
/// Up to `prefetch` commands are delivered before one is settled, of each of the lane's two queues.
pub async fn open(
    settings: &Settings,
    kind: CommandKind,
    prefetch: u16,
    is_first: bool,
    takes_fresh: impl Fn() -> bool + Send + Sync + 'static,
) -> Result<Generation, Error> {
    let uri = parse(settings.url.expose_secret())?;
    let at = address(&uri);
    let purpose = Purpose { kind, prefetch, is_first };
    let abandoned = CancellationToken::new();
    let building = build(settings.clone(), uri, purpose, takes_fresh, abandoned.clone());
    let opened = Opening::start(building, abandoned).finish(CONNECT_LIMIT).await;
    opened.unwrap_or(Err(Error::Silent { at, limit: CONNECT_LIMIT }))
}

/// What a generation is for.
#[derive(Clone, Copy)]
struct Purpose {
    kind: CommandKind,
    prefetch: u16,
    is_first: bool,
}

/// A generation that is being built, in a task of its own.
///
/// lapin keeps a connection that is dropped while its consumers begin, and with it what was delivered. So
/// one that nobody waits for any more is closed in order, once it is that far.
struct Opening {
    building: Option<JoinHandle<Result<Generation, Error>>>,
    abandoned: CancellationToken,
}

impl Opening {
    #[expect(clippy::disallowed_methods, reason = "its end is waited for, or sees to itself")]
    fn start(
        building: impl Future<Output = Result<Generation, Error>> + Send + 'static,
        abandoned: CancellationToken,
    ) -> Self {
        Self { building: Some(tokio::spawn(building)), abandoned }
    }

    /// `None` where it came to nothing in time.
    async fn finish(mut self, limit: Duration) -> Option<Result<Generation, Error>> {
        let built = timeout(limit, self.building.as_mut()?).await.ok()?;
        self.building = None;
        built.ok()
    }
}

impl Drop for Opening {
    #[expect(clippy::disallowed_methods, reason = "the end of the process closes it as well")]
    fn drop(&mut self) {
        self.abandoned.cancel();
        let Some(building) = self.building.take() else { return };
        // It ends: a broker answers late, or misses its heartbeats.
        tokio::spawn(async move {
            if let Ok(Ok(generation)) = building.await {
                generation.close().await;
            }
        });
    }
}

async fn build(
    settings: Settings,
    uri: AMQPUri,
    purpose: Purpose,
    takes_fresh: impl Fn() -> bool + Send + Sync,
    abandoned: CancellationToken,
) -> Result<Generation, Error> {
    let at = address(&uri);
    let Purpose { kind, .. } = purpose;
    let prepared = tokio::select! {
        prepared = prepare(&settings, uri, purpose) => prepared?,
        () = abandoned.cancelled() => return Err(Error::Silent { at, limit: CONNECT_LIMIT }),
    };
    let Prepared { consuming, publisher, events, asking, channel, unknown, seen } = prepared;
    let topology = Topology::new(&settings.prefix);
    // Last: what is delivered may end the connection.
    let lane = Lane::open(kind, channel, unknown, &topology, takes_fresh()).await;
    let lane = lane.map_err(|error| match Error::of(error, &at) {
        Error::Connection { at, source } => {
            Error::Delivering { at, kind, limit: DELIVERY_LIMIT, source }
        }
        error => error,
    })?;
    let publishes = Arc::clone(&publisher);
    let pulse = Pulse::new(kind, asking, publishes, topology, &seen, lane.takes_unknown());
    Ok(Generation { lane, flaws: seen.flaws, publisher, events, pulse, consuming })
}

/// Everything but what delivers.
struct Prepared {
    consuming: Connection,
    publisher: Arc<Publisher>,
    events: Events,
    asking: Channel,
    channel: Channel,
    unknown: Option<Channel>,
    seen: Seen,
}

async fn prepare(
    settings: &Settings,
    uri: AMQPUri,
    Purpose { kind, prefetch, is_first }: Purpose,
) -> Result<Prepared, Error> {
    let at = address(&uri);
    let of = |error| Error::of(error, &at);
    let names = [format!("{kind} consuming"), format!("{kind} publishing")];
    let returned = Returned::default();
    let consuming = connect(uri.clone(), &settings.tls, &names[0], Returned::default());
    let publishing = connect(uri, &settings.tls, &names[1], returned.clone());
    let (consuming, publishing) = tokio::try_join!(consuming, publishing).map_err(of)?;
    let topology = Topology::new(&settings.prefix);
    let place = Place { connection: &consuming, at: &at, kind: Some(kind), is_first };
    let seen = if settings.declares_topology {
        topology.declare_at(&place).await?
    } else {
        topology.check(&place).await?
    };
    let events = Events::of(&consuming, &publishing);
    let publisher = Publisher::new(publishing, &topology, returned).await.map_err(of)?;
    let publisher = Arc::new(publisher);
    let takes_unknown = kind == CommandKind::Get && seen.has(&topology.unknown());
    let unknown = if takes_unknown {
        Some(receiving_channel(&consuming, prefetch).await.map_err(of)?)
    } else {
        None
    };
    let channel = receiving_channel(&consuming, prefetch).await.map_err(of)?;
    let asking = consuming.create_channel().await.map_err(of)?;
    Ok(Prepared { consuming, publisher, events, asking, channel, unknown, seen })
}

/// lapin's buffer has no bound of its own: prefetch is the only one. It counts per consumer.
async fn receiving_channel(connection: &Connection, prefetch: u16) -> lapin::Result<Channel> {
    let channel = connection.create_channel().await?;
    channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
    Ok(channel)
}

impl Generation {
    /// The lane, and beside it what happens to the connections, and what can be asked.
    pub fn parts(&mut self) -> (&mut Lane, &mut Events, &Pulse) {
        (&mut self.lane, &mut self.events, &self.pulse)
    }

    /// Why a connection was lost, in the broker's words where it said any; `None` where both live.
    /// Whoever notices the loss first knows less: a publish that failed, or a consumer that ended.
    pub async fn why_lost(&mut self) -> Option<String> {
        self.events.why_lost().await
    }

    /// Waits, within a limit, until the broker has every acknowledgement.
    pub async fn flush(&mut self) {
        match timeout(CALL_LIMIT, self.lane.flush()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => debug!(%error, "the last acknowledgements may be lost"),
            Err(_) => debug!("the broker is silent about the last acknowledgements"),
        }
    }

    /// Closes both connections, within a limit; what is unacknowledged returns to its queue.
    pub async fn close(self) {
        let both = async {
            tokio::join!(self.publisher.close(), self.consuming.close(200, "stopping".into()))
        };
        match timeout(CALL_LIMIT, both).await {
            Ok((Ok(()), Ok(()))) => {}
            Ok((Err(error), _) | (_, Err(error))) => {
                debug!(%error, "a connection was already gone");
            }
            Err(_) => debug!("the broker did not answer the close in time"),
        }
    }
}

/// A change of a connection.
pub enum Change {
    /// A memory or disk alarm: the broker takes no message until it is over.
    Blocked(String),
    /// The broker takes messages again.
    Unblocked,
    /// The connection is gone.
    Lost(String),
}

/// What happens to the two connections, as it happens.
pub struct Events {
    stream: BoxStream<'static, Event>,
    of: [ConnectionStatus; 2],
    /// Said once only.
    lost: Option<String>,
}

impl Events {
    fn of(consuming: &Connection, publishing: &Connection) -> Self {
        Self {
            stream: select(consuming.events_listener(), publishing.events_listener()).boxed(),
            of: [consuming.status().clone(), publishing.status().clone()],
            lost: None,
        }
    }

    /// The next change; waits for ever where there is none.
    pub async fn next(&mut self) -> Change {
        let reason = loop {
            match self.stream.next().await {
                // An alarm blocks only what publishes.
                Some(Event::ConnectionBlocked(reason)) => return Change::Blocked(reason),
                Some(Event::ConnectionUnblocked) => return Change::Unblocked,
                // That of a single channel comes here too.
                Some(Event::Error(error)) if !self.both_live() => break error.to_string(),
                Some(_) => {}
                None => break "the connections ended".to_owned(),
            }
        };
        self.lost = Some(reason.clone());
        Change::Lost(reason)
    }

    fn both_live(&self) -> bool {
        self.of.iter().all(ConnectionStatus::connected)
    }

    async fn why_lost(&mut self) -> Option<String> {
        if self.lost.is_none() && !self.both_live() {
            // The reason comes a moment after the first call that fails for it.
            let lost = async { while !matches!(self.next().await, Change::Lost(_)) {} };
            timeout(REASON_LIMIT, lost).await.ok();
        }
        self.lost.take()
    }
}

/// Reads an AMQP URL.
pub(super) fn parse(url: &str) -> Result<AMQPUri, Error> {
    let mut uri: AMQPUri = url.parse().map_err(Error::Url)?;
    // The parser drops an IPv6 host and takes localhost for it.
    if let Some(Host::Ipv6(address)) = Url::parse(url).ok().as_ref().and_then(Url::host) {
        uri.authority.host = address.to_string();
    }
    // "amqp://host/" means the empty virtual host to the letter, and "/" to everybody who writes it.
    if uri.vhost.is_empty() {
        "/".clone_into(&mut uri.vhost);
    }
    uri.query.heartbeat.get_or_insert(HEARTBEAT);
    Ok(uri)
}

/// host:port, for messages: the rest of the URL has the password in it.
pub(super) fn address(uri: &AMQPUri) -> String {
    format!("{}:{}", uri.authority.host, uri.authority.port)
}

/// Recovery stays off (the default): with it, a consumer hangs for ever on a closed channel while
/// the connection reports itself connected.
pub(super) async fn connect(
    uri: AMQPUri,
    tls: &TlsFiles,
    purpose: &str,
    returned: Returned,
) -> lapin::Result<Connection> {
    let name = format!("call-manager {purpose}");
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    transport::connect(uri, tls, properties, returned).await
}

/// A channel on which every publish is confirmed.
pub(super) async fn confirming_channel(connection: &Connection) -> lapin::Result<Channel> {
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    Ok(channel)
}

/// lapin has no time limit that a frozen broker respects.
pub(super) async fn within<T>(
    limit: Duration,
    at: &str,
    call: impl Future<Output = lapin::Result<T>>,
) -> Result<T, Error> {
    match timeout(limit, call).await {
        Ok(result) => result.map_err(|error| Error::of(error, at)),
        Err(_) => Err(Error::Silent { at: at.to_owned(), limit }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_virtual_hosts_are_read_as_people_mean_them() {
        let read = |url: &str| {
            let uri = parse(url).unwrap();
            (address(&uri), uri.vhost)
        };
        assert_eq!(read("amqp://h"), ("h:5672".to_owned(), "/".to_owned()));
        assert_eq!(read("amqp://h/"), ("h:5672".to_owned(), "/".to_owned()));
        assert_eq!(read("amqps://h/%2fa"), ("h:5671".to_owned(), "/a".to_owned()));
        assert_eq!(read("amqp://u:p@[::1]:7/v"), ("::1:7".to_owned(), "v".to_owned()));
    }
}
