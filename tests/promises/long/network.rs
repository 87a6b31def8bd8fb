//! A silent network between worker and broker, with the heartbeats that a worker has by itself, and a
//! slow one over which it connects.

use std::time::Duration;

use futures_util::future::join_all;

use crate::load::until_within;
use crate::network::{behind_proxy, silence, slow};
use crate::support::proxy::frames::Mistake;
use crate::support::proxy::{Hole, Towards};

#[tokio::test]
async fn silence_is_noticed_by_the_usual_heartbeats_and_survived() {
    tokio::join!(
        silence(Towards::Client, Hole::Swallows, ""),
        silence(Towards::Client, Hole::Stalls, ""),
        silence(Towards::Server, Hole::Swallows, ""),
        silence(Towards::Server, Hole::Stalls, ""),
    );
}

#[tokio::test]
async fn a_worker_connects_again_over_a_slow_way_to_the_broker() {
    let (world, proxy, mut load) = slow("broker, cut, 200 ms each way").await;
    load.publish(&world, 150).await;
    load.until_answered(50).await;
    proxy.cut();
    // What takes a round trip each, to connect and to declare, has to fit into the limit on it.
    load.until_all_answered().await;
    assert_eq!(proxy.accepted(), 4, "the first attempt to connect again succeeds");
    proxy.heal();
    world.finish_load(load).await;
}

/// The nth consumer ends, and neither the broker nor the client library tells the worker.
async fn consumer_gone(nth: usize) {
    let (world, proxy, mut load) = behind_proxy("", format!("broker, consumer {nth} gone")).await;
    load.publish(&world, 40).await;
    // A consumer counts for as long as it has something unacknowledged.
    load.until_all_answered().await;
    let served = proxy.accepted();
    let all = (1..=served).map(|number| (number, proxy.consumers(number)));
    let (number, consumers) = all.into_iter().find(|(_, all)| !all.is_empty()).unwrap();
    assert_eq!(consumers.len(), CONSUMERS);
    let (channel, tag) = consumers[nth].clone();
    proxy.make(&Mistake::Cancel(tag), number, channel);
    // It has to be missed by two pulses.
    let limit = Duration::from_secs(60);
    until_within(limit, "the worker connects again", async || proxy.accepted() > served).await;
    world.until_consuming().await;
    load.publish(&world, 20).await;
    load.until_all_answered().await;
    world.finish_load(load).await;
}

/// One for each kind of command, and one for those that come back.
const CONSUMERS: usize = 6;

#[tokio::test]
async fn a_consumer_that_ends_without_a_word_is_missed_whichever_it_is() {
    join_all((0..CONSUMERS).map(consumer_gone)).await;
}
