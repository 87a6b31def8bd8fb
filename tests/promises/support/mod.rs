//! A world for one test: queues of its own at a real broker, a sandbox, a worker, and the results.

mod kept;
pub mod load;
pub mod node;
pub mod postgres;
pub mod proxy;
pub mod raw;
pub mod vendor;
pub mod wait;

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use call_manager::app;
use call_manager::broker::{Delay, Topology};
use call_manager::config::{BrokerSettings, LedgerPlace, LedgerSettings, LogSettings, Settings};
use call_manager::domain::command::CommandKind;
use call_manager::telemetry::LogFormat;
use elevenlabs_sandbox::{Options, Request, Route, Sandbox};
use futures_util::StreamExt as _;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions,
    ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use wait::until;

/// How long anything may take before the test says what it waited for.
pub const LIMIT: Duration = Duration::from_secs(30);

/// The broker of this run.
pub fn amqp_url() -> String {
    std::env::var("AMQP_URL")
        .expect("AMQP_URL is not set: run the tests with script/test, which sees to a RabbitMQ")
}

pub async fn connect() -> Connection {
    connect_to(&amqp_url()).await
}

async fn connect_to(url: &str) -> Connection {
    let connecting = Connection::connect(url, ConnectionProperties::default());
    timeout(LIMIT, connecting)
        .await
        .expect("the broker answers in time")
        .expect("a RabbitMQ answers at AMQP_URL: run the tests with script/test, which sees to one")
}

/// How a worker asks whether ElevenLabs can be used.
const QUESTION: &str = "workspace?limit=1";

pub struct World {
    pub sandbox: Sandbox,
    pub topology: Topology,
    pub channel: Channel,
    prefix: String,
    url: String,
    pub connection: Connection,
    results: Consumer,
    /// Of a world with a broker of its own: the queue that keeps the results.
    kept: Option<String>,
    folder: TempDir,
    worker: Option<Running>,
}

struct Running {
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
}

/// A result as a consumer sees it, already checked against the contract.
pub struct Received {
    pub routing_key: String,
    pub body: String,
    pub json: Value,
    pub properties: BasicProperties,
}

impl World {
    /// With a worker that runs in this process.
    pub async fn start() -> Self {
        Self::with(|_| {}).await
    }

    /// The same, with other settings than the usual ones.
    pub async fn with(change: impl FnOnce(&mut Settings)) -> Self {
        let mut world = Self::without_worker().await;
        world.start_worker(change).await;
        world
    }

    /// Broker, sandbox and results only.
    pub async fn without_worker() -> Self {
        Self::before(Options { speed: 0.0, ..Options::default() }).await
    }

    /// The same, before a sandbox that is set up otherwise than usual.
    pub async fn before(options: Options) -> Self {
        Self::built(options, amqp_url(), false).await
    }

    /// Broker, sandbox and results only, with the test's own broker at `url`. Results wait in a
    /// queue that survives the broker's restart, for [`World::reconnect`].
    pub async fn at(url: &str) -> Self {
        Self::built(Options { speed: 0.0, ..Options::default() }, url.to_owned(), true).await
    }

    async fn built(options: Options, url: String, keep: bool) -> Self {
        let sandbox = Sandbox::start(options).await.unwrap();
        let prefix = format!("test-{}", Uuid::now_v7());
        let topology = Topology::new(&prefix);
        let connection = connect_to(&url).await;
        let channel = connection.create_channel().await.unwrap();
        channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        // Declared by the one who knows how: what a worker declares is a part of what is tested.
        topology.declare(&connection).await.unwrap();
        let exchange = topology.results_exchange();
        let kept = keep.then(|| format!("{prefix}.listener"));
        let results = match &kept {
            Some(queue) => kept::listen(&channel, &exchange, queue).await.unwrap(),
            None => listen(&channel, &exchange).await,
        };
        Self {
            sandbox,
            topology,
            channel,
            prefix,
            url,
            connection,
            results,
            kept,
            folder: tempfile::tempdir().unwrap(),
            worker: None,
        }
    }

    /// What is needed to delete what a worker has declared under a prefix.
    pub async fn cleaner(prefix: &str, connection: Connection) -> Self {
        let channel = connection.create_channel().await.unwrap();
        let unused = exclusive_queue(&channel).await;
        Self {
            sandbox: Sandbox::start(Options::default()).await.unwrap(),
            topology: Topology::new(prefix),
            results: consume(&channel, unused.as_str()).await,
            channel,
            prefix: prefix.to_owned(),
            url: amqp_url(),
            connection,
            kept: None,
            folder: tempfile::tempdir().unwrap(),
            worker: None,
        }
    }

    pub fn settings(&self) -> Settings {
        Settings {
            host: Ipv4Addr::LOCALHOST.into(),
            port: 0,
            elevenlabs_api_key: "sandbox-key".into(),
            elevenlabs_base_url: self.sandbox.base_url().parse().unwrap(),
            elevenlabs_connect_timeout: Duration::from_secs(2),
            elevenlabs_timeout: Duration::from_secs(10),
            broker: BrokerSettings {
                amqp_url: self.url.as_str().into(),
                shown_url: String::new(),
                amqp_prefix: self.prefix.clone(),
                declares_topology: true,
                ca_file: None,
                cert_file: None,
                key_file: None,
                prefetch: 64,
            },
            ledger: LedgerSettings {
                place: LedgerPlace::Sqlite(self.ledger_file()),
                retention: Duration::from_secs(30 * 24 * 60 * 60),
            },
            retry_horizon: Duration::from_secs(60),
            settling_window: Duration::from_millis(300),
            shutdown_grace: Duration::from_secs(30),
            log: LogSettings { filter: "info".to_owned(), format: LogFormat::Text },
        }
    }

    /// The file that the workers of this world keep their ledger in, one after the other.
    pub fn ledger_file(&self) -> PathBuf {
        self.folder.path().join("ledger.db")
    }

    pub async fn start_worker(&mut self, change: impl FnOnce(&mut Settings)) {
        let mut settings = self.settings();
        change(&mut settings);
        self.run_worker(settings);
        self.until_consuming().await;
    }

    pub fn run_worker(&mut self, settings: Settings) {
        let stop = CancellationToken::new();
        let task = tokio::spawn(app::run_until(settings, stop.clone()));
        self.worker = Some(Running { stop, task });
    }

    /// Waits until a queue that was deleted is there again.
    pub async fn until_declared(&self, kind: CommandKind) {
        until("the queue is declared again", async || {
            let channel = self.connection.create_channel().await.unwrap();
            let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            let name = self.topology.queue(kind);
            channel.queue_declare(name.into(), options, FieldTable::default()).await.is_ok()
        })
        .await;
    }

    pub async fn until_consuming(&self) {
        until("every queue has its consumer", async || {
            for kind in CommandKind::ALL {
                if self.queue(&self.topology.queue(kind)).await.1 == 0 {
                    return false;
                }
            }
            true
        })
        .await;
    }

    /// Waits until no command lies in any queue: also a copy that is there because a worker was killed
    /// between a deferral and its ack has come back by then.
    pub async fn until_nothing_waits(&self) {
        let topology = &self.topology;
        let kept = [topology.unrouted(), topology.dead_letter(), topology.canary()];
        until("no command waits", async || {
            for name in self.topology.queue_names().iter().filter(|name| !kept.contains(name)) {
                if self.queue(name).await.0 > 0 {
                    return false;
                }
            }
            true
        })
        .await;
    }

    pub async fn stop_worker(&mut self) {
        let running = self.worker.take().expect("a worker runs");
        running.stop.cancel();
        timeout(LIMIT, running.task).await.expect("the worker stops in time").unwrap().unwrap();
    }

    /// Ready messages and consumers of a queue.
    pub async fn queue(&self, name: &str) -> (u32, u32) {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let channel = self.connection.create_channel().await.unwrap();
        let queue =
            channel.queue_declare(name.into(), options, FieldTable::default()).await.unwrap();
        (queue.message_count(), queue.consumer_count())
    }

    /// Publishes to the commands exchange, and waits until the broker has it.
    pub async fn publish(&self, kind: CommandKind, body: &[u8], properties: BasicProperties) {
        self.publish_to(&self.topology.commands_exchange(), &kind.routing_key(), body, properties)
            .await;
    }

    pub async fn publish_to(
        &self,
        exchange: &str,
        key: &str,
        body: &[u8],
        properties: BasicProperties,
    ) {
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        let publish = self
            .channel
            .basic_publish(exchange.into(), key.into(), options, body, properties)
            .await
            .unwrap();
        let confirmed = timeout(LIMIT, publish).await.expect("the broker confirms in time");
        assert_eq!(confirmed.unwrap(), Confirmation::Ack(None), "a queue takes the command");
    }

    /// Publishes a JSON command with a new id and waits for its result.
    pub async fn ask(&mut self, kind: CommandKind, body: &Value) -> Received {
        self.ask_bytes(kind, body.to_string().as_bytes()).await
    }

    pub async fn ask_bytes(&mut self, kind: CommandKind, body: &[u8]) -> Received {
        let id = Uuid::now_v7().to_string();
        self.publish(kind, body, with_id(&id)).await;
        let result = self.next_result().await;
        assert_eq!(result.command_id(), id, "the next result is this command's");
        result
    }

    /// Submits the usual batch and returns its id.
    pub async fn submitted(&mut self) -> String {
        let result = self.ask(CommandKind::Submit, &submit_body()).await;
        result.json["data"]["id"].as_str().expect("the submit succeeds").to_owned()
    }

    /// How many requests of this kind the vendor has got, but for the question whether it can be used.
    pub fn requests(&self, route: Route) -> usize {
        self.log().iter().filter(|request| request.route == route).count()
    }

    /// The same of any kind.
    pub fn asked(&self) -> usize {
        self.log().len()
    }

    /// How often it was asked whether it can be used.
    pub fn probes(&self) -> usize {
        self.sandbox.requests().len() - self.asked()
    }

    fn log(&self) -> Vec<Request> {
        let log = self.sandbox.requests().into_iter();
        log.filter(|request| !request.path.ends_with(QUESTION)).collect()
    }

    pub async fn next_result(&mut self) -> Received {
        Received::checked(&self.next_raw_result().await)
    }

    pub async fn result_within(&mut self, limit: Duration) -> Received {
        Received::checked(&self.raw_result_within(limit).await)
    }

    pub async fn next_raw_result(&mut self) -> lapin::message::Delivery {
        self.raw_result_within(LIMIT).await
    }

    async fn raw_result_within(&mut self, limit: Duration) -> lapin::message::Delivery {
        let delivery = timeout(limit, self.results.next()).await.expect("a result comes in time");
        let mut delivery = delivery.expect("the results queue stays").unwrap();
        if self.kept.is_some() {
            assert!(delivery.acker.ack(BasicAckOptions::default()).await.unwrap());
            delivery.properties = kept::as_published(delivery.properties);
        }
        delivery
    }

    /// Stops the worker and asserts that nothing is left: no command in its queue or unacknowledged
    /// (it would have returned), none given up on.
    pub async fn finish(mut self) {
        if self.worker.is_some() {
            self.stop_worker().await;
        }
        let kept = [self.topology.unrouted(), self.topology.canary()];
        let delay = self.topology.delay(Delay::Short);
        until("no canary is on its way", async || self.queue(&delay).await.0 == 0).await;
        for name in self.topology.queue_names().iter().filter(|name| !kept.contains(name)) {
            // What a consumer leaves unsettled returns in the step that removes the consumer.
            let is_left = async || self.queue(name).await.1 == 0;
            until(&format!("{name} has no consumer"), is_left).await;
            assert_eq!(self.queue(name).await.0, 0, "{name} is empty");
        }
        self.clean_up().await;
    }

    pub async fn clean_up(self) {
        for queue in self.topology.queue_names().into_iter().chain(self.kept) {
            self.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
        }
        for exchange in self.topology.exchange_names() {
            let options = ExchangeDeleteOptions::default();
            self.channel.exchange_delete(exchange.into(), options).await.unwrap();
        }
        self.connection.close(200, "done".into()).await.unwrap();
        self.sandbox.stop().await;
    }
}

/// A consumer of everything that is published to an exchange.
pub async fn listen(channel: &Channel, exchange: &str) -> Consumer {
    let queue = exclusive_queue(channel).await;
    let bound = channel.queue_bind(
        queue.clone(),
        exchange.into(),
        "#".into(),
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    bound.await.unwrap();
    consume(channel, queue.as_str()).await
}

pub async fn exclusive_queue(channel: &Channel) -> ShortString {
    let options = QueueDeclareOptions {
        exclusive: true,
        auto_delete: true,
        ..QueueDeclareOptions::default()
    };
    let queue = channel.queue_declare("".into(), options, FieldTable::default()).await.unwrap();
    queue.name().clone()
}

pub async fn consume(channel: &Channel, queue: &str) -> Consumer {
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await.unwrap()
}

impl Received {
    /// Every result, of every test, has to be as the contract says.
    pub fn checked(delivery: &lapin::message::Delivery) -> Self {
        let body = String::from_utf8(delivery.data.clone()).expect("a result is UTF-8");
        let received = Self {
            routing_key: delivery.routing_key.to_string(),
            json: serde_json::from_str(&body).expect("a result is JSON"),
            body,
            properties: delivery.properties.clone(),
        };
        let succeeded = received.json["success"] == json!(true);
        let schema = if succeeded {
            include_str!("../../../schemas/result-succeeded.json")
        } else {
            include_str!("../../../schemas/result-failed.json")
        };
        let schema = serde_json::from_str(schema).unwrap();
        jsonschema::validate(&schema, &received.json).expect("a result is as its schema says");

        let properties = &received.properties;
        assert_eq!(*properties.delivery_mode(), Some(2), "a result is persistent");
        assert_eq!(properties.content_type().as_ref().unwrap().as_str(), "application/json");
        assert_eq!(properties.app_id().as_ref().unwrap().as_str(), "call-manager");
        assert!(properties.timestamp().is_some());
        assert!(properties.correlation_id().is_some());
        Uuid::parse_str(properties.message_id().as_ref().unwrap().as_str()).unwrap();
        let event = properties.kind().as_ref().unwrap().to_string();
        let end = if succeeded { "succeeded" } else { "failed" };
        assert!(event.ends_with(end), "{event} of {}", received.body);
        assert_eq!(received.header("error_code").is_some(), !succeeded);
        assert!(
            ["200", "400", "404", "500"]
                .contains(&received.header("status_code").unwrap().as_str())
        );
        assert!(received.header("attempts").is_some() && received.header("command_id").is_some());
        received
    }

    pub fn header(&self, name: &str) -> Option<String> {
        match self.properties.headers().as_ref()?.inner().get(name)? {
            AMQPValue::LongString(text) => Some(text.to_string()),
            AMQPValue::LongInt(number) => Some(number.to_string()),
            AMQPValue::LongLongInt(number) => Some(number.to_string()),
            other => panic!("header {name} is a {:?}", other.get_type()),
        }
    }

    pub fn command_id(&self) -> String {
        self.header("command_id").unwrap()
    }

    /// `<status_code> <error_code>`, or the status code of a success.
    pub fn code(&self) -> String {
        let status = self.header("status_code").unwrap();
        match self.header("error_code") {
            Some(code) => format!("{status} {code}"),
            None => status,
        }
    }

    pub fn error(&self) -> &str {
        self.json["error"].as_str().expect("the result is a failure")
    }

    pub fn message_id(&self) -> &str {
        self.properties.message_id().as_ref().unwrap().as_str()
    }
}

pub fn with_id(id: &str) -> BasicProperties {
    BasicProperties::default().with_message_id(id.into())
}

pub fn with_header(id: &str, name: &str, value: AMQPValue) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert(name.into(), value);
    with_id(id).with_headers(headers)
}

/// A small valid submit.
pub fn submit_body() -> Value {
    json!({
        "call_name": "Recordatorio de cita",
        "agent_id": "agent_1",
        "agent_phone_number_id": "phnum_1",
        "recipients": [
            {"phone_number": "+14155550100", "dynamic_variables": {"nombre": "Ana", "monto": 12.5}},
            {"phone_number": "+14155550101"}
        ]
    })
}
