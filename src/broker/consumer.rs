//! Deliveries of one command queue, and how each is settled.

use std::sync::Arc;

use futures_util::StreamExt as _;
use lapin::message::Delivery as Received;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicNackOptions};
use lapin::types::{AMQPValue, ShortString};
use lapin::{Channel, Consumer};
use tokio::time::timeout;
use tracing::debug;

use crate::domain::command::{CommandKind, CommandMessage};

use super::CALL_LIMIT;

/// W3C Trace Context, 3.2: 55 bytes in version 00, and a little more room for later ones.
const TRACEPARENT_BYTES: usize = 128;
/// W3C Trace Context, 3.3.1.5: what has to be propagated.
const TRACESTATE_BYTES: usize = 512;

/// The consumer of one command queue, on a channel of its own: a channel that the broker closes
/// takes only its own deliveries back.
pub struct Lane {
    /// The queue's command.
    pub kind: CommandKind,
    channel: Channel,
    consumer: Consumer,
}

impl Lane {
    pub(super) fn new(kind: CommandKind, channel: Channel, consumer: Consumer) -> Self {
        Self { kind, channel, consumer }
    }

    /// The next delivery; `Err` says why there will be none any more.
    pub async fn next(&mut self) -> Result<Delivery, String> {
        match self.consumer.next().await {
            Some(Ok(received)) => Ok(Delivery::new(self.kind, received)),
            Some(Err(error)) => Err(error.to_string()),
            // The broker cancelled the consumer: its queue was deleted, or its node went away.
            None => Err(format!("the broker stopped delivering from the {} queue", self.kind)),
        }
    }

    /// Stops receiving and gives back what was received but not yet taken. What was taken can
    /// still be settled as long as the lane lives: its channel closes with it.
    pub async fn stop(&mut self) {
        let tag = self.consumer.tag();
        let cancel = self.channel.basic_cancel(tag, BasicCancelOptions::default());
        match timeout(CALL_LIMIT, cancel).await {
            Ok(Ok(())) => {}
            _ => return,
        }
        while let Ok(Some(Ok(received))) = timeout(CALL_LIMIT, self.consumer.next()).await {
            Delivery::new(self.kind, received).give_back().await;
        }
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
    fn new(queue: CommandKind, mut received: Received) -> Self {
        let body = std::mem::take(&mut received.data);
        let properties = &received.properties;
        // Of another type or longer, it is no trace context; copied, it could make the result's
        // headers larger than a frame.
        let header = |name: &str, longest: usize| {
            let headers = properties.headers().as_ref()?;
            let text = match headers.inner().get(name)? {
                AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok()?,
                AMQPValue::ShortString(text) => text.as_str(),
                _ => return None,
            };
            (text.len() <= longest).then(|| text.to_owned())
        };
        let message = CommandMessage {
            queue,
            // Through the default exchange the routing key is the queue's name.
            routing_key: (!received.exchange.as_str().is_empty())
                .then(|| received.routing_key.to_string()),
            message_id: present(properties.message_id().as_ref()),
            correlation_id: present(properties.correlation_id().as_ref()),
            content_type: present(properties.content_type().as_ref()),
            content_encoding: present(properties.content_encoding().as_ref()),
            traceparent: header("traceparent", TRACEPARENT_BYTES),
            tracestate: header("tracestate", TRACESTATE_BYTES),
            reply_to: present(properties.reply_to().as_ref()),
            body,
        };
        Self { message: Arc::new(message), received }
    }

    /// The command is done and its result confirmed.
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

fn present(property: Option<&ShortString>) -> Option<String> {
    let text = property?.as_str();
    (!text.is_empty()).then(|| text.to_owned())
}
