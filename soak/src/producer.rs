//! Publishes the plan at a steady rate: persistent, mandatory, confirmed, and again what was not.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use call_manager::broker::Topology;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, PublisherConfirm};
use serde_json::json;
use tokio::time::{interval, sleep, timeout};

use crate::amqp::{self, PERSISTENT};
use crate::book::Book;
use crate::plan::{Command, NO_BATCH, Plan};

/// Commands without a result at any time: enough to keep every worker busy, few enough for faults
/// to meet commands in every stage.
const WINDOW: usize = 500;

const CALL_LIMIT: Duration = Duration::from_secs(10);
const CONFIRM_LIMIT: Duration = Duration::from_secs(30);
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);

pub struct Producer<'a> {
    pub plan: &'a Plan,
    pub book: &'a Book,
    pub topology: &'a Topology,
    pub url: &'a str,
    /// How long all of it should take, where nothing holds it up.
    pub duration: Duration,
    /// After so much silence there is nothing to wait for.
    pub silence: Duration,
}

/// How a connection ended.
enum End {
    /// There is nothing more to publish.
    Finished,
    Lost,
    /// No queue took a command: nothing that a soak does explains that.
    Returned,
}

impl Producer<'_> {
    /// Returns when the broker has confirmed everything, or when there is silence.
    pub async fn publish_all(&self) -> anyhow::Result<()> {
        let began = Instant::now();
        let mut waiting: VecDeque<usize> = self.plan.order.iter().copied().collect();
        while !waiting.is_empty() && self.book.silence() < self.silence {
            match self.session(&mut waiting, began).await {
                End::Finished => {}
                End::Returned => bail!("the broker returned a command: its queue is gone"),
                End::Lost => {
                    self.book.count("connections of the producer, lost or refused");
                    sleep(RECONNECT_PAUSE).await;
                }
            }
        }
        Ok(())
    }

    async fn session(&self, waiting: &mut VecDeque<usize>, began: Instant) -> End {
        let Ok((connection, channel)) = self.open().await else {
            return End::Lost;
        };
        let mut unconfirmed = BTreeMap::new();
        let end = self.publish(&channel, waiting, &mut unconfirmed, began).await;
        // What is not known to be with the broker is published again, in its order.
        for (_, command) in unconfirmed.into_iter().rev() {
            waiting.push_front(command);
        }
        amqp::close(connection).await;
        end
    }

    async fn open(&self) -> anyhow::Result<(lapin::Connection, Channel)> {
        let connection = amqp::connect(self.url).await?;
        let opening = async {
            let channel = connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            lapin::Result::Ok(channel)
        };
        let channel = timeout(CALL_LIMIT, opening).await.context("no channel in time")??;
        Ok((connection, channel))
    }

    async fn publish(
        &self,
        channel: &Channel,
        waiting: &mut VecDeque<usize>,
        unconfirmed: &mut BTreeMap<u64, usize>,
        began: Instant,
    ) -> End {
        let mut confirms = FuturesUnordered::new();
        let mut ticks = interval(Duration::from_millis(20));
        let mut serial = 0;
        let mut last_confirm = Instant::now();
        while !(waiting.is_empty() && unconfirmed.is_empty()) {
            tokio::select! {
                Some((serial, confirmed)) = confirms.next() => match confirmed {
                    Ok(Confirmation::Ack(None)) => {
                        last_confirm = Instant::now();
                        if let Some(command) = unconfirmed.remove(&serial) {
                            self.book.confirmed(command);
                        }
                    }
                    Ok(Confirmation::Ack(Some(_))) => return End::Returned,
                    Ok(_) | Err(_) => return End::Lost,
                },
                _ = ticks.tick() => {
                    if self.book.silence() >= self.silence {
                        waiting.clear();
                        return End::Finished;
                    }
                    if unconfirmed.is_empty() {
                        last_confirm = Instant::now();
                    } else if last_confirm.elapsed() >= CONFIRM_LIMIT {
                        return End::Lost;
                    }
                    while self.may_publish(waiting.len(), began) {
                        let Some(command) = self.next(waiting) else { break };
                        serial += 1;
                        let this = serial;
                        unconfirmed.insert(this, command);
                        self.book.published(command);
                        match self.send(channel, &self.plan.commands[command]).await {
                            Ok(confirm) => confirms.push(async move { (this, confirm.await) }),
                            Err(_) => return End::Lost,
                        }
                    }
                }
            }
        }
        End::Finished
    }

    /// The first one that has not to wait for a result.
    fn next(&self, waiting: &mut VecDeque<usize>) -> Option<usize> {
        let is_ready = |command: &usize| {
            let waits_for = self.plan.commands[*command].waits_for();
            waits_for.is_none_or(|submit| self.book.is_answered(submit))
        };
        let at = waiting.iter().position(is_ready)?;
        waiting.remove(at)
    }

    /// Whether the next one is due, `left` publications before the end. After a lost connection what
    /// was due meanwhile comes at once.
    fn may_publish(&self, left: usize, began: Instant) -> bool {
        let numbers = self.book.numbers();
        let all = self.plan.order.len();
        let millis = |time: Duration| usize::try_from(time.as_millis()).unwrap_or(usize::MAX);
        let share = all.saturating_mul(millis(began.elapsed())) / millis(self.duration).max(1);
        all - left < share && numbers.started - numbers.answered.min(numbers.started) < WINDOW
    }

    /// The same for every publication: it is the first result that tells the batch.
    fn body<'c>(&self, command: &'c Command) -> Cow<'c, [u8]> {
        let Some(submit) = command.waits_for() else { return Cow::Borrowed(&command.body) };
        let batch = self.book.batch_of(submit);
        let batch = batch.as_deref().unwrap_or(NO_BATCH);
        Cow::Owned(json!({"batch_id": batch}).to_string().into_bytes())
    }

    async fn send(&self, channel: &Channel, command: &Command) -> anyhow::Result<PublisherConfirm> {
        let mut headers = FieldTable::default();
        if let Some(seconds) = command.not_after {
            headers.insert("not_after".into(), AMQPValue::LongLongInt(seconds));
        }
        let properties = BasicProperties::default()
            .with_message_id(command.id.as_str().into())
            .with_content_type("application/json".into())
            .with_delivery_mode(PERSISTENT)
            .with_headers(headers);
        let body = self.body(command);
        let publish = channel.basic_publish(
            self.topology.commands_exchange().into(),
            command.kind().routing_key().into(),
            BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() },
            &body,
            properties,
        );
        Ok(timeout(CALL_LIMIT, publish).await.context("the broker takes no command")??)
    }
}
