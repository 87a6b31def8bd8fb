//! Publishes results and waits until the broker has confirmed them.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lapin::options::BasicPublishOptions;
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ErrorKind};
use tokio::sync::Semaphore;
use tokio::time::error::Elapsed;
use tokio::time::timeout;
use tracing::warn;

use crate::crash;
use crate::domain::result::ResultEvent;

use super::connection::confirming_channel;
use super::topology::Topology;
use super::{CONFIRM_LIMIT, PERSISTENT};

/// A returned message is credited to the right publish only with one confirm outstanding per
/// channel, so replies take turns on so many channels.
const REPLY_CHANNELS: usize = 8;

/// A larger result goes over a channel of its own: one that the broker finds too large closes its
/// channel, and with it would go the confirms of all others.
const SHARED_CHANNEL_BYTES: usize = 64 * 1024;

/// A connection has 2,047 channels at most, and a PREFETCH may ask for more at a time.
const LARGE_AT_ONCE: usize = 8;

/// Well within the broker's ack time-out of 30 minutes, even after a long retry.
const ALARM_LIMIT: Duration = Duration::from_secs(4 * 60);

/// Why a result is not known to be safe with the broker.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A queue that is bound for it is full and refuses it.
    #[error(
        "the broker refused the result: a queue bound for it is full (x-overflow reject-publish)"
    )]
    Refused,
    /// It is larger than the broker's `max_message_size` (16 MiB by default since 4.0).
    #[error("the broker takes no message of {bytes} bytes")]
    TooLarge {
        /// Of the body.
        bytes: usize,
    },
    /// No confirm came.
    #[error("the broker did not confirm the result within {} s", CONFIRM_LIMIT.as_secs())]
    Silent,
    /// The channel or connection is gone.
    #[error("the result could not be published")]
    Connection(#[from] lapin::Error),
}

/// Publishes results, many at a time.
pub struct Publisher {
    connection: Connection,
    results: Channel,
    exchange: String,
    large_turn: Semaphore,
    reply_turn: Semaphore,
    idle_reply_channels: Mutex<Vec<Channel>>,
}

impl Publisher {
    pub(super) async fn new(connection: Connection, topology: &Topology) -> lapin::Result<Self> {
        Ok(Self {
            results: confirming_channel(&connection).await?,
            connection,
            exchange: topology.results_exchange(),
            large_turn: Semaphore::new(LARGE_AT_ONCE),
            reply_turn: Semaphore::new(REPLY_CHANNELS),
            idle_reply_channels: Mutex::default(),
        })
    }

    pub(super) async fn close(&self) -> lapin::Result<()> {
        self.connection.close(200, "stopping".into()).await
    }

    /// Publishes a result and waits until the broker has confirmed it.
    pub async fn publish(&self, event: &ResultEvent) -> Result<(), PublishError> {
        let body = event.body();
        match self.patiently(self.confirmed(event, &body)).await {
            Ok(Ok(Confirmation::Ack(_))) => Ok(()),
            Ok(Ok(Confirmation::Nack(_) | Confirmation::NotRequested)) => {
                Err(PublishError::Refused)
            }
            Ok(Err(error)) if body.len() > SHARED_CHANNEL_BYTES && refuses_size(&error) => {
                Err(PublishError::TooLarge { bytes: body.len() })
            }
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(PublishError::Silent),
        }
    }

    pub(super) fn is_connected(&self) -> bool {
        self.connection.status().connected()
    }

    /// Waits up to the confirm limit, or [`ALARM_LIMIT`] while the broker says that it is blocked:
    /// to give up would deliver the command again and again, until it is dead-lettered.
    async fn patiently<T>(&self, confirm: impl Future<Output = T>) -> Result<T, Elapsed> {
        let mut confirm = std::pin::pin!(confirm);
        let since = Instant::now();
        let mut was_blocked = false;
        loop {
            let ended = timeout(CONFIRM_LIMIT, &mut confirm).await;
            let blocked = self.connection.status().blocked();
            // One more limit after the alarm: what waited for it has only just left.
            if ended.is_ok() || !(blocked || was_blocked) || since.elapsed() >= ALARM_LIMIT {
                return ended;
            }
            was_blocked = blocked;
        }
    }

    async fn confirmed(&self, event: &ResultEvent, body: &[u8]) -> lapin::Result<Confirmation> {
        // Never closed, so an error cannot come; the permit is what matters.
        let (_turn, own);
        let channel = if body.len() > SHARED_CHANNEL_BYTES {
            _turn = self.large_turn.acquire().await;
            own = confirming_channel(&self.connection).await?;
            &own
        } else {
            &self.results
        };
        let (exchange, key) = (self.exchange.as_str().into(), event.routing_key().into());
        let options = BasicPublishOptions::default();
        let publish = channel.basic_publish(exchange, key, options, body, properties(event));
        let confirm = publish.await?;
        crash::point(7);
        confirm.await
    }

    /// Sends a copy of a published result to the queue that the command names. One that cannot be
    /// delivered is logged: the result is on the exchange all the same.
    pub async fn reply(&self, event: &ResultEvent, queue: &str) {
        let delivered = self.patiently(self.try_reply(event, queue)).await;
        let reason = match delivered {
            Ok(Ok(Confirmation::Ack(None))) => return,
            Ok(Ok(Confirmation::Ack(Some(_)))) => "no queue has the name in reply_to".to_owned(),
            Ok(Ok(_)) => "the reply_to queue is full and refuses it".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the broker did not confirm it in time".to_owned(),
        };
        warn!(
            command_id = event.command_id,
            reason, "the reply was not delivered; the result is on the results exchange"
        );
    }

    async fn try_reply(&self, event: &ResultEvent, queue: &str) -> lapin::Result<Confirmation> {
        // Never closed, so an error cannot come; the permit is what matters.
        let _turn = self.reply_turn.acquire().await;
        let idle = self.idle_reply_channels.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let channel = match idle {
            Some(channel) => channel,
            None => confirming_channel(&self.connection).await?,
        };
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let (body, properties) = (event.body(), properties(event));
        let confirm = channel.basic_publish("".into(), queue.into(), options, &body, properties);
        let confirmation = confirm.await?.await?;
        // Only a channel that is still good goes back: a refused permission closes it.
        self.idle_reply_channels.lock().unwrap_or_else(PoisonError::into_inner).push(channel);
        Ok(confirmation)
    }
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
