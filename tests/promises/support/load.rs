//! A steady load of submits from a producer that survives whatever happens to the broker.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use call_manager::domain::command::CommandKind;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{Channel, Confirmation, Connection, ConnectionProperties};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{World, submit_body, until, with_id};

const BETWEEN: Duration = Duration::from_millis(20);
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Longer than any alarm of a test: given up, a command would be published once more.
const CONFIRM_LIMIT: Duration = Duration::from_secs(120);

pub struct Load {
    confirmed: Arc<AtomicUsize>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Load {
    /// Publishes submits with the ids `<name>-0`, `<name>-1` and so on to the world's commands
    /// exchange, through the broker at `url`. One whose confirm is lost is published again.
    pub fn start(world: &World, url: &str, name: &str) -> Self {
        let confirmed = Arc::<AtomicUsize>::default();
        let stop = CancellationToken::new();
        let producer = Producer {
            url: format!("{url}?heartbeat=5"),
            exchange: world.topology.commands_exchange(),
            name: name.to_owned(),
        };
        let task = tokio::spawn(producer.run(Arc::clone(&confirmed), stop.clone()));
        Self { confirmed, stop, task }
    }

    /// Commands that the broker has confirmed.
    pub fn confirmed(&self) -> usize {
        self.confirmed.load(Ordering::SeqCst)
    }

    /// Waits until the broker has confirmed so many more.
    pub async fn until_more(&self, count: usize) {
        let before = self.confirmed();
        until("the broker takes commands", async || self.confirmed() >= before + count).await;
    }

    /// How many there are in the end, each of them confirmed.
    pub async fn stop(self) -> usize {
        self.stop.cancel();
        let ended = timeout(CONFIRM_LIMIT, self.task).await;
        ended.expect("the last command is confirmed in time").unwrap();
        self.confirmed.load(Ordering::SeqCst)
    }
}

struct Producer {
    url: String,
    exchange: String,
    name: String,
}

impl Producer {
    async fn run(self, confirmed: Arc<AtomicUsize>, stop: CancellationToken) {
        let mut connected = None;
        while !stop.is_cancelled() {
            let number = confirmed.load(Ordering::SeqCst);
            if self.publish(&mut connected, number).await {
                confirmed.fetch_add(1, Ordering::SeqCst);
                sleep(BETWEEN).await;
            } else {
                connected = None;
                sleep(Duration::from_millis(100)).await;
            }
        }
        if let Some((connection, _)) = connected {
            timeout(CONNECT_LIMIT, connection.close(200, "done".into())).await.ok();
        }
    }

    async fn publish(&self, at: &mut Option<(Connection, Channel)>, number: usize) -> bool {
        if at.is_none() {
            *at = timeout(CONNECT_LIMIT, self.connect()).await.ok().and_then(Result::ok);
        }
        let Some((_, channel)) = at else {
            return false;
        };
        let (exchange, key) = (self.exchange.as_str(), CommandKind::Submit.routing_key());
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let body = submit_body().to_string();
        let properties = with_id(&format!("{}-{number}", self.name)).with_delivery_mode(2);
        let published = async {
            let confirm = channel.basic_publish(
                exchange.into(),
                key.into(),
                options,
                body.as_bytes(),
                properties,
            );
            confirm.await?.await
        };
        matches!(timeout(CONFIRM_LIMIT, published).await, Ok(Ok(Confirmation::Ack(None))))
    }

    async fn connect(&self) -> lapin::Result<(Connection, Channel)> {
        let connection = Connection::connect(&self.url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok((connection, channel))
    }
}
