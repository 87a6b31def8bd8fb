//! Deliveries of one command queue, and how each is settled.

use std::sync::Arc;
use std::time::SystemTime;

use futures_util::StreamExt as _;
use lapin::message::Delivery as Received;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
    QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Consumer};
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::domain::command::{CommandKind, CommandMessage};

use super::headers::{
    earlier, expires_at, header, is_of_one_delivery, number, present, refused_headers, shown, text,
};
use super::topology::Topology;
use super::{CALL_LIMIT, PERSISTENT};

/// W3C Trace Context, 3.2: 55 bytes in version 00, and a little more room for later ones.
const TRACEPARENT_BYTES: usize = 128;
/// W3C Trace Context, 3.3.1.5: what has to be propagated.
const TRACESTATE_BYTES: usize = 512;

/// The consumers of one command's queues, on a channel of their own: a channel that the broker
/// closes takes only its own deliveries back.
pub struct Lane {
    /// The queues' command.
    pub kind: CommandKind,
    channel: Channel,
    topology: Topology,
    queue: String,
    retry: String,
    /// Of the command queue; `None` while the lane rests.
    fresh: Option<Consumer>,
    /// Of the retry queue: what was deferred comes back whether or not fresh commands are taken.
    returned: Consumer,
    /// Of what has a routing key that names no command, beside the gets. On a channel of its own, which
    /// the broker closes where the user may not read it.
    unknown: Option<(Channel, Consumer)>,
}

impl Lane {
    /// Starts to consume, fresh commands only where it `takes_fresh`.
    pub(super) async fn open(
        kind: CommandKind,
        channel: Channel,
        unknown: Option<Channel>,
        topology: &Topology,
        takes_fresh: bool,
    ) -> lapin::Result<Self> {
        let (queue, retry) = (topology.queue(kind), topology.retry_queue(kind));
        let returned = consume(&channel, &retry).await?;
        let fresh = if takes_fresh { Some(consume(&channel, &queue).await?) } else { None };
        let unknown = match unknown {
            Some(channel) => consume_unknown(channel, &topology.unknown()).await?,
            None => None,
        };
        let topology = topology.clone();
        Ok(Self { kind, channel, topology, queue, retry, fresh, returned, unknown })
    }

    /// The next delivery; `Err` says why there will be none any more.
    pub async fn next(&mut self) -> Result<Delivery, String> {
        let fresh = async {
            match &mut self.fresh {
                Some(consumer) => consumer.next().await,
                None => std::future::pending().await,
            }
        };
        let unknown = async {
            match &mut self.unknown {
                Some((_, consumer)) => consumer.next().await,
                None => std::future::pending().await,
            }
        };
        let (received, queue) = tokio::select! {
            received = fresh => (received, self.queue.clone()),
            received = self.returned.next() => (received, self.retry.clone()),
            received = unknown => (received, self.topology.unknown()),
        };
        match received {
            Some(Ok(received)) => Ok(Delivery::new(self.kind, received, &self.topology)),
            Some(Err(error)) => Err(error.to_string()),
            // The broker cancelled the consumer: its queue was deleted, or its node went away.
            None => Err(format!("the broker stopped delivering from the queue {queue}")),
        }
    }

    /// Whether it takes what has a routing key that names no command.
    pub(super) fn takes_unknown(&self) -> bool {
        self.unknown.is_some()
    }

    /// Whether fresh commands stay in their queue.
    pub fn is_resting(&self) -> bool {
        self.fresh.is_none()
    }

    /// Leaves fresh commands in their queue; those received but not yet taken go back to it. `Err`
    /// says why that cannot be.
    pub async fn rest(&mut self) -> Result<(), String> {
        match self.fresh.take() {
            Some(consumer) => self.give_up(&self.channel, consumer).await,
            None => Ok(()),
        }
    }

    /// Takes fresh commands again; `Err` says why it cannot.
    pub async fn resume(&mut self) -> Result<(), String> {
        match timeout(CALL_LIMIT, consume(&self.channel, &self.queue)).await {
            Ok(Ok(consumer)) => {
                self.fresh = Some(consumer);
                Ok(())
            }
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("the broker is silent about the {} queue", self.kind)),
        }
    }

    /// Goes on with more commands in hand at a time: what was received and not yet taken goes back, and
    /// is delivered again. `Err` says why that cannot be.
    pub async fn widen(&mut self, prefetch: u16) -> Result<(), String> {
        let returned = self.consume_more(&self.channel, &self.retry, prefetch).await?;
        let former = std::mem::replace(&mut self.returned, returned);
        self.give_up(&self.channel, former).await?;
        if let Some((channel, former)) = self.unknown.take() {
            let consumer = self.consume_more(&channel, &self.topology.unknown(), prefetch).await?;
            self.give_up(&channel, former).await?;
            self.unknown = Some((channel, consumer));
        }
        if self.is_resting() {
            return Ok(());
        }
        self.rest().await?;
        self.resume().await
    }

    /// Stops receiving and gives back what was received but not yet taken. What was taken can
    /// still be settled as long as the lane lives: its channel closes with it.
    pub async fn stop(&mut self) {
        // What is not given back returns when the channel ends, a moment later.
        self.rest().await.ok();
        let returned = self.returned.clone();
        self.give_up(&self.channel, returned).await.ok();
        if let Some((channel, consumer)) = &self.unknown {
            self.give_up(channel, consumer.clone()).await.ok();
        }
    }

    /// One more consumer of a queue, with this limit.
    async fn consume_more(
        &self,
        channel: &Channel,
        queue: &str,
        prefetch: u16,
    ) -> Result<Consumer, String> {
        let consuming = async {
            channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
            consume(channel, queue).await
        };
        match timeout(CALL_LIMIT, consuming).await {
            Ok(consumer) => consumer.map_err(|error| error.to_string()),
            Err(_) => Err(format!("the broker is silent about the queue {queue}")),
        }
    }

    /// Waits until the broker has all that was acknowledged. A quorum queue that is behind leaves some of
    /// it with the channel, and what is there when the channel closes is lost: delivered again.
    pub(super) async fn flush(&self) -> lapin::Result<()> {
        // When the first answer comes, the queue has caught up and gets the rest; when the second
        // does, it has it.
        let unknown = self.topology.unknown();
        let other = self.unknown.iter().map(|(channel, _)| (channel, &unknown));
        let queues = [(&self.channel, &self.queue), (&self.channel, &self.retry)];
        let queues: Vec<_> = queues.into_iter().chain(other).collect();
        for (channel, queue) in queues.iter().chain(&queues) {
            let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            channel.queue_declare(queue.as_str().into(), passive, FieldTable::default()).await?;
        }
        Ok(())
    }

    async fn give_up(&self, channel: &Channel, mut consumer: Consumer) -> Result<(), String> {
        let cancel = channel.basic_cancel(consumer.tag(), BasicCancelOptions::default());
        match timeout(CALL_LIMIT, cancel).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err(format!("the broker is silent about the {} queue", self.kind)),
        }
        while let Ok(Some(Ok(received))) = timeout(CALL_LIMIT, consumer.next()).await {
            Delivery::new(self.kind, received, &self.topology).give_back().await;
        }
        Ok(())
    }
}

async fn consume(channel: &Channel, queue: &str) -> lapin::Result<Consumer> {
    let options = BasicConsumeOptions::default();
    // The broker makes up a tag: one of a former consumer on the channel may still have unsettled
    // commands to its name.
    channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await
}

/// `None` where it is not to be had, for want of a right or of the queue: it can be done without.
async fn consume_unknown(
    channel: Channel,
    queue: &str,
) -> lapin::Result<Option<(Channel, Consumer)>> {
    match consume(&channel, queue).await {
        Ok(consumer) => Ok(Some((channel, consumer))),
        Err(error) if error.is_amqp_soft_error() => {
            warn!(reason = error.to_string(), "what lies in {queue} is not answered");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// The broker did not take an ack: the command will be delivered again.
#[derive(Debug, thiserror::Error)]
#[error("the broker did not take the acknowledgement; the command will be delivered again")]
pub struct NotSettled;

/// One command in hand. Dropped unsettled, it returns to its queue when its channel ends.
pub struct Delivery {
    /// The command.
    pub message: Arc<CommandMessage>,
    received: Received,
}

impl Delivery {
    fn new(queue: CommandKind, mut received: Received, topology: &Topology) -> Self {
        let body = std::mem::take(&mut received.data);
        let properties = &received.properties;
        let header = |name: &str| header(&received, name);
        // Of another type or longer, it is no trace context; copied, it could make the result's
        // headers larger than a frame.
        let trace = |name: &str, longest: usize| {
            header(name).and_then(text).filter(|text| text.len() <= longest)
        };
        // The first time, it is the producer's, if there is one.
        let count = header("x-delivery-count").filter(|_| received.redelivered);
        let redeliveries = count.and_then(number).unwrap_or_default();
        let earlier = earlier(&received, queue, topology);
        // What comes back was taken the first time.
        let is_new = earlier.first_seen.is_none();
        let refused_header =
            properties.headers().as_ref().filter(|_| is_new).and_then(refused_headers);
        let message = CommandMessage {
            queue,
            // Through the default exchange the routing key is the queue's name.
            routing_key: (!received.exchange.as_str().is_empty())
                .then(|| received.routing_key.to_string()),
            message_id: present(properties.message_id().as_ref()),
            correlation_id: present(properties.correlation_id().as_ref()),
            content_type: present(properties.content_type().as_ref()),
            content_encoding: present(properties.content_encoding().as_ref()),
            traceparent: trace("traceparent", TRACEPARENT_BYTES),
            tracestate: trace("tracestate", TRACESTATE_BYTES),
            reply_to: present(properties.reply_to().as_ref()),
            not_after: header("not_after").and_then(shown),
            refused_header,
            redeliveries: u32::try_from(redeliveries.max(0)).unwrap_or(u32::MAX),
            // A copy has no `expiration` of its own.
            expires_at: earlier.expires_at.or_else(|| expires_at(properties, SystemTime::now())),
            earlier,
            body,
        };
        Self { message: Arc::new(message), received }
    }

    /// The properties with which a copy of it goes to another queue, with these headers more.
    pub(super) fn copied<'a>(
        &self,
        more: impl IntoIterator<Item = (&'a str, AMQPValue)>,
    ) -> BasicProperties {
        let from = &self.received.properties;
        let mut headers = FieldTable::default();
        for (name, value) in from.headers().iter().flat_map(FieldTable::inner) {
            if !is_of_one_delivery(name.as_str()) {
                headers.insert(name.clone(), value.clone());
            }
        }
        for (name, value) in more {
            headers.insert(name.into(), value);
        }
        let mut to =
            BasicProperties::default().with_delivery_mode(PERSISTENT).with_headers(headers);
        // Neither `expiration`, which was for the wait in the queue it has left, nor `user_id`, which
        // the broker compares with the user who publishes.
        for (value, set) in [
            (from.content_type(), BasicProperties::with_content_type as Setter),
            (from.content_encoding(), BasicProperties::with_content_encoding),
            (from.correlation_id(), BasicProperties::with_correlation_id),
            (from.reply_to(), BasicProperties::with_reply_to),
            (from.message_id(), BasicProperties::with_message_id),
            (from.kind(), BasicProperties::with_type),
            (from.app_id(), BasicProperties::with_app_id),
        ] {
            if let Some(value) = value {
                to = set(to, value.clone());
            }
        }
        if let Some(priority) = from.priority() {
            to = to.with_priority(*priority);
        }
        if let Some(timestamp) = from.timestamp() {
            to = to.with_timestamp(*timestamp);
        }
        to
    }

    /// The command is done and its result confirmed, or a copy of it is in another queue.
    pub async fn ack(&self) -> Result<(), NotSettled> {
        match timeout(CALL_LIMIT, self.received.acker.ack(BasicAckOptions::default())).await {
            Ok(Ok(true)) => Ok(()),
            // `false`: the channel that delivered it is gone, and no other may acknowledge it.
            Ok(Ok(false) | Err(_)) | Err(_) => Err(NotSettled),
        }
    }

    /// Back to the queue, for another worker or a later start.
    pub async fn give_back(&self) {
        let options = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
        let nack = timeout(CALL_LIMIT, self.received.acker.nack(options)).await;
        if !matches!(nack, Ok(Ok(true))) {
            debug!("the channel is gone, and with it the command is back in its queue");
        }
    }
}

type Setter = fn(BasicProperties, ShortString) -> BasicProperties;
