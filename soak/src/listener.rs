//! Collects every publication of every result from a durable queue of its own.

use std::time::Duration;

use anyhow::Context as _;
use call_manager::broker::Topology;
use futures_util::StreamExt as _;
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, Consumer};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::amqp;
use crate::book::Book;
use crate::judge::Answer;

const CALL_LIMIT: Duration = Duration::from_secs(15);
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);
const PREFETCH: u16 = 200;

/// So long without a result, and the listener connects anew.
const SILENT: Duration = Duration::from_secs(15);

pub struct Listener<'a> {
    pub book: &'a Book,
    pub topology: &'a Topology,
    pub url: &'a str,
    pub queue: &'a str,
}

impl Listener<'_> {
    /// Declares everything, so that no result and no command is without a queue from the beginning.
    pub async fn declare(&self) -> anyhow::Result<()> {
        let connection = amqp::connect(self.url).await?;
        let channel = connection.create_channel().await?;
        self.topology.declare(&connection).await?;
        let mut quorum = FieldTable::default();
        quorum.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(self.queue.into(), durable, quorum).await?;
        channel
            .queue_bind(
                self.queue.into(),
                self.topology.results_exchange().into(),
                "#".into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await?;
        amqp::close(connection).await;
        Ok(())
    }

    /// Listens until it was enough; connects again as often as needed.
    pub async fn listen(&self, enough: &CancellationToken) -> anyhow::Result<()> {
        while !enough.is_cancelled() {
            let lost = tokio::select! {
                lost = self.session() => lost,
                () = enough.cancelled() => return Ok(()),
            };
            if let Err(error) = lost {
                // A result that is none is no fault of a connection.
                if error.is::<Unreadable>() {
                    return Err(error);
                }
                self.book.count("connections of the listener, lost or refused");
                sleep(RECONNECT_PAUSE).await;
            }
        }
        Ok(())
    }

    async fn session(&self) -> anyhow::Result<()> {
        let connection = amqp::connect(self.url).await?;
        let ended = self.collect(&connection).await;
        // A consumer that lived on would take results and tell nobody.
        amqp::close(connection).await;
        ended
    }

    async fn collect(&self, connection: &Connection) -> anyhow::Result<()> {
        let opening = async {
            let channel = connection.create_channel().await?;
            self.consume(&channel).await
        };
        let mut consumer = timeout(CALL_LIMIT, opening).await.context("no consumer in time")??;
        loop {
            // A consumer on a connection that broke at the wrong moment can stay silent for ever.
            let next = timeout(SILENT, consumer.next()).await.context("silence")?;
            let delivery = next.context("the consumer ended")??;
            let (command, answer) = read(&delivery).context(Unreadable)?;
            self.book.answered(&command, answer);
            let acked = delivery.ack(BasicAckOptions::default());
            timeout(CALL_LIMIT, acked).await.context("no ack in time")??;
        }
    }

    async fn consume(&self, channel: &Channel) -> lapin::Result<Consumer> {
        channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
        channel.basic_consume(self.queue.into(), "soak".into(), options, arguments).await
    }
}

/// A message on the results exchange that is no result.
#[derive(Debug)]
struct Unreadable;

impl std::fmt::Display for Unreadable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a message on the results exchange is no result")
    }
}

fn read(delivery: &Delivery) -> anyhow::Result<(String, Answer)> {
    let properties = &delivery.properties;
    let header = |name: &str| match properties.headers().as_ref()?.inner().get(name)? {
        AMQPValue::LongString(text) => Some(text.to_string()),
        _ => None,
    };
    let message_id = properties.message_id().as_ref().context("no message_id")?;
    let answer = Answer {
        message_id: message_id.to_string(),
        routing_key: delivery.routing_key.to_string(),
        error_code: header("error_code"),
        body: String::from_utf8(delivery.data.clone())?,
    };
    Ok((header("command_id").context("no command_id")?, answer))
}
