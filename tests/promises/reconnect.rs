//! A lost broker connection is rebuilt as a whole, and costs no command and no second batch.

use std::time::Duration;

use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{Effect, Fault, Route};
use lapin::options::QueueDeleteOptions;
use secrecy::ExposeSecret as _;
use serde_json::json;

use crate::support::proxy::{CONNECTIONS, Proxy};
use crate::support::{World, submit_body, until, with_id};

const SUBMIT: CommandKind = CommandKind::Submit;

/// A world whose worker reaches the broker through a proxy.
async fn behind_proxy() -> (World, Proxy) {
    let (proxy, url) = Proxy::to_broker().await;
    let world = World::with(|settings| settings.broker.amqp_url = url.to_string().into()).await;
    (world, proxy)
}

#[tokio::test]
async fn a_cut_while_a_submit_is_at_the_vendor_makes_no_second_batch() {
    let (mut world, proxy) = behind_proxy().await;
    let slow = Effect::Latency(Duration::from_secs(2));
    world.sandbox.order(Fault::on(Route::Submit, slow).times(20));
    for n in 0..20 {
        let id = format!("m-{n}");
        world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id(&id)).await;
    }
    until("all are at the vendor", async || world.asked() == 20).await;
    proxy.cut();
    // The redelivered copies are in hand while the first handlers still run.
    let mut answered = std::collections::HashSet::new();
    while answered.len() < 20 {
        let result = world.next_result().await;
        assert_eq!(result.code(), "200", "{}", result.body);
        answered.insert(result.command_id());
    }
    assert_eq!(world.sandbox.batches().len(), 20);
    assert!(proxy.accepted() >= 2 + CONNECTIONS, "those of the submits are made again");
    world.finish().await;
}

#[tokio::test]
async fn any_connection_is_missed_at_once_and_those_of_its_lane_are_rebuilt() {
    for number in 1..=CONNECTIONS {
        let (mut world, proxy) = behind_proxy().await;
        proxy.cut_only(number);
        // Idle: nothing is published or acknowledged that could find the connection gone.
        until("both are made again", async || proxy.accepted() == CONNECTIONS + 2).await;
        world.until_consuming().await;
        assert!(!world.submitted().await.is_empty());
        assert_eq!(proxy.accepted(), CONNECTIONS + 2, "the other lanes keep theirs");
        world.finish().await;
    }
}

#[tokio::test]
async fn repeated_cuts_lose_nothing() {
    let (mut world, proxy) = behind_proxy().await;
    let mut answered = std::collections::HashSet::new();
    for round in 0..5 {
        for n in 0..20 {
            let id = format!("m-{round}-{n}");
            world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id(&id)).await;
        }
        proxy.cut();
        while answered.len() < (round + 1) * 20 {
            answered.insert(world.next_result().await.command_id());
        }
    }
    assert_eq!(world.sandbox.batches().len(), 100);
    world.until_consuming().await;
    world.finish().await;
}

#[tokio::test]
async fn a_broker_that_is_away_at_the_start_is_waited_for() {
    let (proxy, url) = Proxy::to_broker().await;
    proxy.refuse(true);
    let mut world = World::without_worker().await;
    let mut settings = world.settings();
    settings.broker.amqp_url = url.to_string().into();
    assert!(settings.broker.amqp_url.expose_secret().contains(&proxy.address.port().to_string()));
    world.run_worker(settings);
    until("the worker has tried", async || proxy.refused() >= 2).await;
    proxy.refuse(false);
    world.until_consuming().await;
    assert!(!world.submitted().await.is_empty());
    world.finish().await;
}

#[tokio::test]
async fn a_deleted_queue_is_declared_again() {
    let mut world = World::start().await;
    let queue = world.topology.queue(SUBMIT);
    world.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    world.until_declared(SUBMIT).await;
    world.until_consuming().await;
    assert!(!world.submitted().await.is_empty());
    let got = world.ask(CommandKind::Get, &json!({"batch_id": "btcal_nobody"})).await;
    assert_eq!(got.code(), "404 not_found");
    world.finish().await;
}
