//! Publishes results and waits until the broker has confirmed them.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lapin::options::BasicPublishOptions;
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ErrorKind};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::warn;

use crate::crash;
use crate::domain::Earlier;
use crate::domain::result::ResultEvent;
use crate::telemetry::chain;

use super::connection::confirming_channel;
use super::consumer::Delivery;
use super::returned::Returned;
use super::topology::{CANARY, Delay, Topology};
use super::{CONFIRM_LIMIT, PERSISTENT, PULSE};

/// A returned message is credited to the right publish only with one confirm outstanding per
/// channel, so what is mandatory takes turns on so many channels.
const CHANNELS_ALONE: usize = 8;

/// A larger result goes over a channel of its own: one that the broker finds too large closes its
/// channel, and with it would go the confirms of all others.
const SHARED_CHANNEL_BYTES: usize = 64 * 1024;

/// A connection has 2,047 channels at most, and a PREFETCH may ask for more at a time.
const LARGE_AT_ONCE: usize = 8;

/// The broker tells of what no queue takes.
const MANDATORY: BasicPublishOptions = BasicPublishOptions { mandatory: true, immediate: false };

/// A reply is a courtesy: its command waits no longer for it.
const REPLY_LIMIT: Duration = Duration::from_secs(5);

/// Well within the broker's ack time-out of 30 minutes, even after a long retry.
const ALARM_LIMIT: Duration = Duration::from_secs(4 * 60);

/// Why a result is not known to be safe with the broker.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A queue that is bound for it is full and refuses it.
    #[error(
        "the broker refused the message: a queue bound for it is full (x-overflow reject-publish)"
    )]
    Refused,
    /// It is larger than the broker's `max_message_size` (16 MiB by default since 4.0).
    #[error("the broker takes no message of {bytes} bytes")]
    TooLarge {
        /// Of the body.
        bytes: usize,
    },
    /// No queue is behind the exchange.
    #[error("no queue is bound to the exchange {exchange}: bind the queue of that name to it")]
    Unroutable {
        /// Its name.
        exchange: String,
    },
    /// No queue takes the result, and the queue of those is gone.
    #[error(
        "no queue takes the result, and {unrouted}, which keeps such results, is gone or the results exchange \
         has no alternate exchange that leads there: start a worker with TOPOLOGY=declare, or import the \
         topology again"
    )]
    Unheard {
        /// The name of that queue.
        unrouted: String,
    },
    /// No confirm came.
    #[error("the broker did not confirm the message within {} s", limit.as_secs())]
    Silent {
        /// How long it was waited for.
        limit: Duration,
    },
    /// The channel or connection is gone.
    #[error("the message could not be published")]
    Connection(#[from] lapin::Error),
}

impl PublishError {
    /// The channel or connection was gone before the message was sent.
    pub(super) fn is_of_closed_channel(&self) -> bool {
        let Self::Connection(error) = self else { return false };
        matches!(
            error.kind(),
            ErrorKind::InvalidChannelState(..) | ErrorKind::InvalidConnectionState(_)
        )
    }
}

/// Publishes results, many at a time.
pub struct Publisher {
    connection: Connection,
    results: Channel,
    /// On the channel of results.
    returned: Returned,
    exchange: String,
    topology: Topology,
    large_turn: Semaphore,
    turn_alone: Semaphore,
    /// Replies take turns among themselves: one that is not confirmed must hold up no deferral.
    turn_reply: Semaphore,
    idle_channels: Mutex<Vec<Channel>>,
    /// When the last confirm came.
    confirmed: Mutex<Option<Instant>>,
}

impl Publisher {
    pub(super) async fn new(
        connection: Connection,
        topology: &Topology,
        returned: Returned,
    ) -> lapin::Result<Self> {
        let results = confirming_channel(&connection).await?;
        returned.watch(results.id());
        Ok(Self {
            results,
            returned,
            connection,
            exchange: topology.results_exchange(),
            topology: topology.clone(),
            large_turn: Semaphore::new(LARGE_AT_ONCE),
            turn_alone: Semaphore::new(CHANNELS_ALONE),
            turn_reply: Semaphore::new(CHANNELS_ALONE),
            idle_channels: Mutex::default(),
            confirmed: Mutex::default(),
        })
    }

    pub(super) async fn close(&self) -> lapin::Result<()> {
        self.connection.close(200, "stopping".into()).await
    }

    /// Publishes a result and waits until the broker has confirmed it.
    pub async fn publish(&self, event: &ResultEvent) -> Result<(), PublishError> {
        let body = event.body();
        match self.patiently(self.confirmed(event, &body)).await {
            Ok(Routed::Somewhere) => Ok(()),
            Ok(Routed::Nowhere) => {
                Err(PublishError::Unheard { unrouted: self.topology.unrouted() })
            }
            Err(PublishError::Connection(error))
                if body.len() > SHARED_CHANNEL_BYTES && refuses_size(&error) =>
            {
                Err(PublishError::TooLarge { bytes: body.len() })
            }
            Err(error) => Err(error),
        }
    }

    /// A memory or disk alarm: what was published before the broker noticed is confirmed all the same.
    pub fn is_blocked(&self) -> bool {
        self.connection.status().blocked()
    }

    /// Waits up to the confirm limit, or [`ALARM_LIMIT`] while the broker says that it is blocked:
    /// to give up would deliver the command again and again, until it is dead-lettered.
    async fn patiently(
        &self,
        confirm: impl Future<Output = Result<Routed, PublishError>>,
    ) -> Result<Routed, PublishError> {
        let mut confirm = std::pin::pin!(confirm);
        let since = Instant::now();
        let mut was_blocked = false;
        loop {
            let ended = timeout(CONFIRM_LIMIT, &mut confirm).await;
            let blocked = self.is_blocked();
            // One more limit after the alarm: what waited for it has only just left.
            if ended.is_ok() || !(blocked || was_blocked) || since.elapsed() >= ALARM_LIMIT {
                return ended.unwrap_or(Err(PublishError::Silent { limit: CONFIRM_LIMIT }));
            }
            was_blocked = blocked;
        }
    }

    async fn confirmed(&self, event: &ResultEvent, body: &[u8]) -> Result<Routed, PublishError> {
        // Never closed, so an error cannot come; the permit is what matters.
        let (_turn, own);
        let is_alone = body.len() > SHARED_CHANNEL_BYTES;
        let channel = if is_alone {
            _turn = self.large_turn.acquire().await;
            own = confirming_channel(&self.connection).await?;
            &own
        } else {
            &self.results
        };
        let (exchange, key) = (self.exchange.as_str().into(), event.routing_key().into());
        let properties = properties(event);
        let publish = channel.basic_publish(exchange, key, MANDATORY, body, properties);
        let confirm = publish.await?;
        crash::point(7);
        let confirmation = confirm.await?;
        self.note_confirm();
        let is_returned = if is_alone {
            is_credited(&confirmation)
        } else {
            self.returned.take(&event.message_id.to_string())
        };
        routed(&confirmation, is_returned)
    }

    /// Sends a copy of a published result to the queue that the command names. One that cannot be
    /// delivered is logged: the result is on the exchange all the same.
    pub async fn reply(&self, event: &ResultEvent, queue: &str) {
        // A result is no command, and would only be in the way of those that are.
        if self.topology.is_own_queue(queue) {
            warn!(
                command_id = event.command_id,
                "reply_to names call-manager's own queue {queue}: nothing is sent there; the result \
                 is on the results exchange"
            );
            return;
        }
        let body = event.body();
        let alone = self.alone(&self.turn_reply, "", queue, &body, properties(event));
        let delivered = timeout(REPLY_LIMIT, self.patiently(alone)).await;
        let reason = match delivered.unwrap_or(Err(PublishError::Silent { limit: REPLY_LIMIT })) {
            Ok(Routed::Somewhere) => return,
            Ok(Routed::Nowhere) => "no queue has the name in reply_to".to_owned(),
            Err(PublishError::Refused) => "the reply_to queue is full and refuses it".to_owned(),
            Err(error) => chain(&error),
        };
        warn!(
            command_id = event.command_id,
            reason, "the reply was not delivered; the result is on the results exchange"
        );
    }

    /// Publishes a copy of a command to a delay queue, from where it comes back, and waits until the
    /// broker has it: the command may then be acknowledged.
    pub async fn defer(
        &self,
        delivery: &Delivery,
        delay: Delay,
        earlier: &Earlier,
    ) -> Result<(), PublishError> {
        // A copy has no `expiration`: it would end the wait too soon, or the command without a word.
        let expires_at = earlier.expires_at.or(delivery.message.expires_at);
        let headers = Earlier { expires_at, ..earlier.clone() }.headers();
        let headers = headers.iter().map(|(name, n)| (*name, AMQPValue::LongLongInt(*n)));
        self.copy(delivery, self.topology.delay(delay), delivery.copied(headers)).await
    }

    /// The same to the dead-letter queue, where a person finds it with the reason.
    pub async fn dead_letter(&self, delivery: &Delivery, reason: &str) -> Result<(), PublishError> {
        let reason = [("x-call-manager-reason", AMQPValue::LongString(reason.into()))];
        self.copy(delivery, self.topology.dead_letter(), delivery.copied(reason)).await
    }

    async fn copy(
        &self,
        delivery: &Delivery,
        exchange: String,
        properties: BasicProperties,
    ) -> Result<(), PublishError> {
        let message = &delivery.message;
        let key = message.kind().routing_key();
        let publish = self.alone(&self.turn_alone, &exchange, &key, &message.body, properties);
        match self.patiently(publish).await? {
            Routed::Somewhere => Ok(()),
            // Where operators own the topology, an exchange may be there without its queue.
            Routed::Nowhere => Err(PublishError::Unroutable { exchange }),
        }
    }

    /// Proves that the broker takes and confirms messages: with one that no queue gets.
    pub(super) async fn pulse(&self) -> Result<(), PublishError> {
        let lately = *self.confirmed.lock().unwrap_or_else(PoisonError::into_inner);
        if lately.is_some_and(|lately| lately.elapsed() < PULSE) {
            return Ok(());
        }
        let name = self.topology.pulse();
        let publish = self.alone(&self.turn_alone, "", &name, b"", BasicProperties::default());
        self.patiently(publish).await.map(drop)
    }

    /// Sends a canary through the shortest delay queue.
    pub(super) async fn canary(&self) -> Result<(), PublishError> {
        let exchange = self.topology.delay(Delay::Short);
        let properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
        let publish = self.alone(&self.turn_alone, &exchange, CANARY, b"", properties);
        match self.patiently(publish).await? {
            Routed::Somewhere => Ok(()),
            Routed::Nowhere => Err(PublishError::Unroutable { exchange }),
        }
    }

    /// Publishes with no other confirm outstanding on the channel, so that a return is its own.
    async fn alone(
        &self,
        turn: &Semaphore,
        exchange: &str,
        key: &str,
        body: &[u8],
        properties: BasicProperties,
    ) -> Result<Routed, PublishError> {
        // Never closed, so an error cannot come; the permit is what matters.
        let _turn = turn.acquire().await;
        let channel = match self.idle_channel() {
            Some(channel) => channel,
            None => confirming_channel(&self.connection).await?,
        };
        let (exchange, key) = (exchange.into(), key.into());
        let confirm = channel.basic_publish(exchange, key, MANDATORY, body, properties);
        let confirmation = confirm.await?.await?;
        self.note_confirm();
        // Only a channel that is still good goes back: a refused permission closes it.
        self.idle_channels.lock().unwrap_or_else(PoisonError::into_inner).push(channel);
        routed(&confirmation, is_credited(&confirmation))
    }

    /// One that the broker has not closed meanwhile.
    fn idle_channel(&self) -> Option<Channel> {
        let mut idle = self.idle_channels.lock().unwrap_or_else(PoisonError::into_inner);
        std::iter::from_fn(|| idle.pop()).find(|channel| channel.status().connected())
    }

    fn note_confirm(&self) {
        *self.confirmed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }
}

/// Where a message that the broker has taken went.
enum Routed {
    Somewhere,
    Nowhere,
}

fn routed(confirmation: &Confirmation, is_returned: bool) -> Result<Routed, PublishError> {
    match confirmation {
        Confirmation::Ack(_) if is_returned => Ok(Routed::Nowhere),
        Confirmation::Ack(_) => Ok(Routed::Somewhere),
        Confirmation::Nack(_) | Confirmation::NotRequested => Err(PublishError::Refused),
    }
}

/// Whether lapin credits it with a return, which is right where nothing else is in flight.
fn is_credited(confirmation: &Confirmation) -> bool {
    matches!(confirmation, Confirmation::Ack(Some(_)))
}

fn refuses_size(error: &lapin::Error) -> bool {
    let precondition = AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED);
    matches!(error.kind(), ErrorKind::ProtocolError(error) if *error.kind() == precondition)
}

fn properties(event: &ResultEvent) -> BasicProperties {
    let mut headers = FieldTable::default();
    let mut text = |name: &str, value: &str| {
        headers.insert(name.into(), AMQPValue::LongString(value.into()));
    };
    text("command_id", &event.command_id);
    if let Some(code) = event.error_code() {
        text("error_code", code.name());
    }
    if let Some(warning) = event.warning() {
        text("warning", warning);
    }
    if let Some(traceparent) = &event.traceparent {
        text("traceparent", traceparent);
    }
    if let Some(tracestate) = &event.tracestate {
        text("tracestate", tracestate);
    }
    headers.insert("status_code".into(), AMQPValue::LongInt(event.status_code().into()));
    headers.insert("attempts".into(), AMQPValue::LongLongInt(event.ending.attempts.into()));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_content_type("application/json".into())
        .with_correlation_id(event.correlation_id.as_str().into())
        .with_message_id(event.message_id.to_string().into())
        .with_type(event.routing_key().into())
        .with_app_id("call-manager".into())
        .with_timestamp(now.as_secs())
        .with_headers(headers)
}
