//! Publishes one command and waits for its result: the client side of the contract.

use std::time::Duration;

use futures_util::StreamExt as _;
use lapin::options::{BasicConsumeOptions, BasicPublishOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Confirmation, Consumer};
use secrecy::ExposeSecret;
use tokio::time::timeout;

use crate::domain::command::CommandKind;
use crate::telemetry::chain;

use super::connection::{address, confirming_channel, connect, parse, within};
use super::returned::Returned;
use super::topology::Topology;
use super::{CALL_LIMIT, CONNECT_LIMIT, Error, PERSISTENT, Settings};

/// What came back.
#[derive(Debug)]
pub struct Reply {
    /// The result's envelope.
    pub body: Vec<u8>,
    /// Whether it is a success.
    pub succeeded: bool,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The broker could not be used.
    #[error(transparent)]
    Broker(#[from] Error),
    /// No queue takes the command.
    #[error(
        "nothing takes {0} at this broker: start call-manager once, or check AMQP_URL and AMQP_PREFIX"
    )]
    NoQueue(String),
    /// The command may have been published, and no result is here. It may still be executed.
    #[error(
        "{reason}; the command may still be executed: ask again with --message-id {id}, which \
         executes nothing twice while the worker runs"
    )]
    InDoubt {
        /// What happened.
        reason: String,
        /// The command's id.
        id: String,
    },
}

impl AskError {
    /// No result, after the command may have been published.
    pub fn in_doubt(reason: impl Into<String>, id: &str) -> Self {
        Self::InDoubt { reason: reason.into(), id: id.to_owned() }
    }
}

/// Publishes one command with the given `message_id` and waits up to `limit` for its result.
pub async fn ask(
    settings: &Settings,
    kind: CommandKind,
    message_id: &str,
    body: &[u8],
    limit: Duration,
) -> Result<Reply, AskError> {
    let uri = parse(settings.url.expose_secret())?;
    let at = address(&uri);
    let topology = Topology::new(&settings.prefix);
    let connection =
        within(CONNECT_LIMIT, &at, connect(uri, &settings.tls, "request", Returned::default()))
            .await?;
    let ready = async {
        let channel = confirming_channel(&connection).await?;
        let (queue, consumer) = reply_queue(&channel).await?;
        Ok((channel, queue, consumer))
    };
    let (channel, queue, mut consumer) = within(CALL_LIMIT, &at, ready).await?;

    let properties = BasicProperties::default()
        .with_delivery_mode(PERSISTENT)
        .with_content_type("application/json".into())
        .with_message_id(message_id.into())
        .with_correlation_id(message_id.into())
        .with_reply_to(queue);
    // Mandatory: a command that no queue takes would otherwise vanish.
    let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let exchange = topology.commands_exchange();
    let publish = async {
        let key = kind.routing_key().into();
        channel.basic_publish(exchange.as_str().into(), key, options, body, properties).await?.await
    };
    let in_doubt = |reason: String| AskError::in_doubt(reason, message_id);
    match within(CALL_LIMIT, &at, publish).await {
        Ok(Confirmation::Ack(None)) => {}
        Ok(Confirmation::Ack(Some(_))) => return Err(AskError::NoQueue(kind.routing_key())),
        Ok(Confirmation::Nack(_) | Confirmation::NotRequested) => {
            return Err(in_doubt("the broker refused the command".to_owned()));
        }
        // 404: there is no such exchange.
        Err(Error::Connection { source, .. }) if source.is_amqp_soft_error() => {
            return Err(AskError::NoQueue(kind.routing_key()));
        }
        // 406: a body over the broker's max_message_size.
        Err(Error::OtherArguments { reason }) => {
            return Err(in_doubt(format!("the broker refused the command: {reason}")));
        }
        Err(error) => return Err(in_doubt(chain(&error))),
    }

    let received = timeout(limit, consumer.next()).await;
    let received = received.map_err(|_| in_doubt(format!("no result within {limit:?}")))?;
    let delivery = match received {
        Some(Ok(delivery)) => delivery,
        Some(Err(error)) => return Err(in_doubt(chain(&Error::of(error, &at)))),
        None => return Err(in_doubt("the broker closed the connection".to_owned())),
    };
    let kind_of_result = delivery.properties.kind().as_ref().map(ToString::to_string);
    let reply = Reply {
        succeeded: kind_of_result.is_some_and(|name| name.ends_with(".succeeded")),
        body: delivery.data,
    };
    within(CALL_LIMIT, &at, connection.close(200, "done".into())).await.ok();
    Ok(reply)
}

/// A queue of its own rather than direct reply-to, which is at-most-once.
async fn reply_queue(channel: &Channel) -> lapin::Result<(lapin::types::ShortString, Consumer)> {
    let options = QueueDeclareOptions {
        exclusive: true,
        auto_delete: true,
        ..QueueDeclareOptions::default()
    };
    let queue = channel.queue_declare("".into(), options, FieldTable::default()).await?;
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let name = queue.name().clone();
    let consumer =
        channel.basic_consume(name.clone(), "".into(), options, FieldTable::default()).await?;
    Ok((name, consumer))
}
