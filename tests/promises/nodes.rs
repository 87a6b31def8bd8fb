//! A broker that fails under a worker at work costs no command, no result and no second batch.

use std::time::Duration;

use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{Effect, Fault, Route};
use lapin::options::{BasicAckOptions, BasicGetOptions, ExchangeDeleteOptions};

use crate::row::Row;
use crate::support::node::Node;
use crate::support::{World, submit_body, until, with_id};

/// Commands that are confirmed before the fault, and again after it.
const SOME: usize = 50;

#[tokio::test]
async fn a_broker_that_is_killed_and_started_again_under_load() {
    let mut row = Row::start(Node::start().await).await;
    let load = row.load();
    load.until_more(SOME).await;
    row.node.kill().await;
    row.node.start_again().await;
    load.until_more(SOME).await;
    row.settle(load).await;
    row.finish().await;
}

#[tokio::test]
async fn a_broker_that_is_stopped_in_order_and_started_again_under_load() {
    let mut row = Row::start(Node::start().await).await;
    let load = row.load();
    load.until_more(SOME).await;
    row.node.stop().await;
    row.node.start_again().await;
    load.until_more(SOME).await;
    row.settle(load).await;
    row.finish().await;
}

#[tokio::test]
async fn a_broker_whose_application_is_stopped_and_started_under_load() {
    let mut row = Row::start(Node::start().await).await;
    let load = row.load();
    load.until_more(SOME).await;
    row.node.control(&["stop_app"]).await;
    row.node.control(&["start_app"]).await;
    load.until_more(SOME).await;
    row.settle(load).await;
    row.finish().await;
}

#[tokio::test]
async fn all_connections_closed_by_an_operator_under_load() {
    let mut row = Row::start(Node::start().await).await;
    let load = row.load();
    for closed in 1..=3 {
        load.until_more(SOME).await;
        until("the worker is connected", async || row.worker.ready().await.0 == 200).await;
        row.node.control(&["close_all_connections", "maintenance"]).await;
        let told = || row.worker.log().matches("maintenance").count();
        until("the worker was told", async || told() >= closed).await;
    }
    load.until_more(SOME).await;
    row.settle(load).await;
    row.finish().await;
}

#[tokio::test]
async fn a_request_that_takes_longer_than_the_ack_time_out_of_the_broker() {
    let node = Node::prepared().await;
    let short = "[{rabbit, [{consumer_timeout, 2000}, {channel_tick_interval, 500}]}].";
    std::fs::write(node.home().join("advanced.config"), short).unwrap();
    let mut row = Row::start(node.started().await).await;
    row.world.sandbox.order(Fault::on(Route::Submit, Effect::Latency(Duration::from_secs(7))));
    // One alone: 4.3 does not time every delivery out whose neighbours were acknowledged.
    row.world
        .publish(CommandKind::Submit, submit_body().to_string().as_bytes(), with_id("load-0"))
        .await;
    let log = row.node.home().join("broker.log");
    until("the broker has taken the command back", async || {
        // RabbitMQ 3.10 closes the channel and logs it. Since 4.3 it cancels the consumer alone, and
        // only the consumer is told.
        let log = tokio::fs::read_to_string(&log).await.unwrap();
        log.contains("delivery acknowledgement on channel")
            || row.worker.log().contains("the broker stopped delivering from the queue ")
    })
    .await;
    row.answered(1).await;
    row.finish().await;
}

#[tokio::test]
async fn a_results_exchange_that_is_deleted_under_the_worker() {
    let mut row = Row::start(Node::start().await).await;
    let load = row.load();
    load.until_more(SOME).await;
    let exchange = row.world.topology.results_exchange();
    let options = ExchangeDeleteOptions::default();
    row.world.channel.exchange_delete(exchange.into(), options).await.unwrap();
    // From here to the new binding, what is published goes to the queue of unrouted results.
    row.worker.until_logged("NOT_FOUND").await;
    row.world.reconnect().await;
    load.until_more(SOME).await;
    forward_unrouted(&row.world).await;
    row.settle(load).await;
    row.finish().await;
}

/// Publishes once more what nobody was bound for.
async fn forward_unrouted(world: &World) {
    let (from, to) = (world.topology.unrouted(), world.topology.results_exchange());
    loop {
        let options = BasicGetOptions::default();
        let got = world.channel.basic_get(from.as_str().into(), options).await.unwrap();
        let Some(result) = got else {
            return;
        };
        let key = result.routing_key.as_str();
        world.publish_to(&to, key, &result.data, result.properties.clone()).await;
        assert!(result.acker.ack(BasicAckOptions::default()).await.unwrap());
    }
}
