//! What a producer writes into headers and properties moves nothing but its own command, and what got
//! into a delay queue comes out.

use std::time::{Duration, SystemTime};

use call_manager::broker::{self, Delay};
use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{Effect, Fault, Reply, Route};
use futures_util::StreamExt as _;
use lapin::options::{
    BasicPublishOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions,
};
use lapin::types::{AMQPValue, FieldArray, FieldTable};
use lapin::{BasicProperties, ExchangeKind};
use serde_json::json;
use tokio::time::timeout;

use crate::process::Process;
use crate::support::{LIMIT, World, consume, submit_body, until, with_id};

const SUBMIT: CommandKind = CommandKind::Submit;

/// More than a delay queue holds of what has no way out, before it lets nothing out at all.
const MANY: usize = 40;

/// Past what a command waits in hand.
fn limited() -> Fault {
    Fault::on(
        Route::Submit,
        Effect::Status(
            Reply::vendor_error(429, "rate_limit_exceeded", "Slow down.").retry_after("11"),
        ),
    )
}

/// Says that the message came back so often that it is poison, and that it was in a delay queue.
fn forged(id: &str, delay: &str) -> BasicProperties {
    let mut death = FieldTable::default();
    for (name, value) in [("queue", delay), ("exchange", delay), ("reason", "expired")] {
        death.insert(name.into(), AMQPValue::LongString(value.into()));
    }
    let deaths = FieldArray::from(vec![AMQPValue::FieldTable(death)]);
    let mut headers = FieldTable::default();
    headers.insert("x-call-manager-deliveries".into(), AMQPValue::LongInt(100));
    headers.insert("x-death".into(), AMQPValue::FieldArray(deaths));
    with_id(id).with_headers(headers)
}

/// Puts the retry exchange of the former version in the place of this one's, and binds it as that did.
async fn make_former(world: &World) {
    let retry = world.topology.retry_exchange();
    let options = ExchangeDeleteOptions::default();
    world.channel.exchange_delete(retry.as_str().into(), options).await.unwrap();
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let (topic, none) = (ExchangeKind::Topic, FieldTable::default());
    let declared = world.channel.exchange_declare(retry.as_str().into(), topic, options, none);
    declared.await.unwrap();
    for kind in CommandKind::ALL {
        let queue = world.topology.retry_queue(kind).into();
        let (key, options) = (kind.routing_key().into(), QueueBindOptions::default());
        let from = retry.as_str().into();
        let bound = world.channel.queue_bind(queue, from, key, options, FieldTable::default());
        bound.await.unwrap();
    }
}

/// Submits what ElevenLabs does not take for eleven seconds: it is deferred, and comes back.
async fn defers(world: &mut World, id: &str) {
    world.sandbox.order(limited());
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id(id)).await;
    let result = world.next_result().await;
    assert_eq!((result.command_id().as_str(), result.code().as_str()), (id, "200"));
    assert_eq!(result.header("attempts").as_deref(), Some("2"), "it was deferred");
}

#[tokio::test]
async fn the_workers_own_headers_on_a_message_of_a_producer_count_for_nothing() {
    let mut world = World::start().await;
    let names = world.topology.clone();
    let (delay, key) = (names.delay(Delay::Short), SUBMIT.routing_key());
    let body = submit_body().to_string();
    for (n, (exchange, key)) in [
        (names.commands_exchange(), key.clone()),
        (String::new(), names.queue(SUBMIT)),
        (String::new(), names.retry_queue(SUBMIT)),
    ]
    .into_iter()
    .enumerate()
    {
        let properties = forged(&format!("m{n}"), &delay);
        world.publish_to(&exchange, &key, body.as_bytes(), properties).await;
        assert_eq!(world.next_result().await.code(), "200", "{exchange} {key}");
    }
    assert_eq!(world.sandbox.batches().len(), 3);

    // Through the retry exchange the broker takes nothing.
    let options = BasicPublishOptions::default();
    let (retry, properties) = (names.retry_exchange(), forged("m", &delay));
    let published =
        world.channel.basic_publish(retry.into(), key.into(), options, body.as_bytes(), properties);
    let refused = published.await.unwrap().await.unwrap_err().to_string();
    assert!(refused.contains("ACCESS_REFUSED"), "{refused}");
    world.stop_worker().await;
    assert_eq!(world.queue(&names.dead_letter()).await.0, 0);
}

#[tokio::test]
async fn a_retry_exchange_of_the_former_version_stops_no_checking_worker_and_is_replaced() {
    let mut world = World::without_worker().await;
    make_former(&world).await;
    let checks = [("TOPOLOGY", "check")];
    let checking = Process::consuming(&world, &world.ledger_url(), &checks).await;
    let retry = world.topology.retry_exchange();
    assert!(checking.log().contains(&format!("delete the exchange {retry}")), "{}", checking.log());
    // By way of it, the headers count only with what the broker writes.
    let (key, body) = (SUBMIT.routing_key(), submit_body().to_string());
    world.publish_to(&retry, &key, body.as_bytes(), forged("m1", "elsewhere")).await;
    assert_eq!(world.next_result().await.code(), "200");
    // It works as before.
    let delay = world.topology.delay(Delay::Short);
    world.publish_to(&delay, &key, body.as_bytes(), with_id("m2")).await;
    assert_eq!(world.next_result().await.command_id(), "m2");
    checking.stop().await;

    // What lies in a delay queue meanwhile comes back all the same.
    world.publish_to(&delay, &key, body.as_bytes(), with_id("m3")).await;
    world.start_worker(|_| {}).await;
    assert_eq!(world.next_result().await.command_id(), "m3");
    world.publish_to(&delay, &key, body.as_bytes(), with_id("m4")).await;
    assert_eq!(world.next_result().await.command_id(), "m4");
    world.publish_to("", &delay, b"stray", BasicProperties::default()).await;
    let dead = world.topology.dead_letter();
    until("it is let out", async || world.queue(&dead).await.0 == 1).await;
    world.stop_worker().await;
    world.clean_up().await;
}

#[tokio::test]
async fn no_reply_goes_to_a_queue_of_the_workers_own() {
    let mut world = World::start().await;
    let own = world.topology.queue_names();
    let names: Vec<_> = own.iter().cycle().take(MANY).collect();
    for (n, name) in names.into_iter().enumerate() {
        let properties = with_id(&format!("m{n}")).with_reply_to(name.as_str().into());
        let body = json!({"batch_id": "btcal_1"}).to_string();
        world.publish(CommandKind::Get, body.as_bytes(), properties).await;
    }
    for _ in 0..MANY {
        assert_eq!(world.next_result().await.code(), "404 not_found");
    }
    defers(&mut world, "m").await;
    assert_eq!(world.queue(&world.topology.unrouted()).await.0, 0);
    world.finish().await;
}

#[tokio::test]
async fn what_is_no_command_leaves_the_delay_queue_for_a_person_and_holds_nothing_up() {
    let mut world = World::start().await;
    let delay = world.topology.delay(Delay::Medium);
    for n in 0..MANY {
        // By way of the default exchange its routing key is the queue's name.
        let (exchange, key) = if n % 2 == 0 { ("", &*delay) } else { (&*delay, "two.words") };
        world.publish_to(exchange, key, b"stray", BasicProperties::default()).await;
    }
    defers(&mut world, "m").await;
    let dead = world.topology.dead_letter();
    assert_eq!(world.queue(&dead).await.0, u32::try_from(MANY).unwrap());
    assert_eq!(world.queue(&delay).await.0, 0);
    let mut dead = consume(&world.channel, &dead).await;
    for _ in 0..MANY {
        let one = timeout(LIMIT, dead.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(one.data, b"stray");
    }
    world.stop_worker().await;
    world.clean_up().await;
}

#[tokio::test]
async fn an_expiration_is_known_after_a_deferral_too() {
    let mut world = World::start().await;
    world.sandbox.order(limited());
    let properties = with_id("m").with_expiration("60000".into());
    let before = SystemTime::now();
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), properties).await;
    let delay = world.topology.delay(Delay::Medium);
    until("it is deferred", async || world.queue(&delay).await.0 == 1).await;
    let after = SystemTime::now();
    world.stop_worker().await;
    let mut back = consume(&world.channel, &world.topology.retry_queue(SUBMIT)).await;
    let copy = timeout(LIMIT, back.next()).await.expect("it comes back in time").unwrap().unwrap();
    let headers = copy.properties.headers().as_ref().unwrap();
    let at = match headers.inner().get("x-call-manager-expires-at") {
        Some(AMQPValue::LongLongInt(at)) => Duration::from_millis(at.cast_unsigned()),
        other => panic!("{other:?}"),
    };
    let minute = Duration::from_secs(60);
    let millis =
        |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis();
    let range = millis(before + minute)..=millis(after + minute);
    assert!(range.contains(&at.as_millis()), "{at:?} {range:?}");
    assert_eq!(*copy.properties.expiration(), None, "it does not end in the delay queue");
    world.clean_up().await;
}

#[tokio::test]
async fn the_submits_that_wait_are_counted_in_queues_and_delay_queues() {
    let world = World::without_worker().await;
    let (names, key) = (&world.topology, SUBMIT.routing_key());
    let usual = BasicProperties::default;
    world.publish(SUBMIT, b"{}", usual()).await;
    world.publish_to("", &names.retry_queue(SUBMIT), b"{}", usual()).await;
    world.publish_to(&names.delay(Delay::Long), &key, b"{}", usual()).await;
    world.publish(CommandKind::Get, b"{}", usual()).await;
    let settings = call_manager::app::broker_settings(world.settings().broker);
    let mut generation = broker::open(&settings, SUBMIT, 9, true, || false).await.unwrap();
    // What is received from the retry queue is in the worker's hands.
    until("it is received", async || world.queue(&names.retry_queue(SUBMIT)).await.0 == 0).await;
    assert_eq!(generation.parts().2.waiting_submits().await, Ok(2));
    generation.close().await;
    world.clean_up().await;
}
