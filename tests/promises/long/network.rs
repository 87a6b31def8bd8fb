//! A silent network between worker and broker, with the heartbeats that a worker has by itself and
//! where none can find out, and a slow one over which it connects.

use std::time::Duration;

use futures_util::future::join_all;

use crate::network::{Trial, silence, slow};
use crate::support::proxy::frames::Mistake;
use crate::support::proxy::{CONNECTIONS, Hole, Towards};
use crate::support::wait::until_within;

#[tokio::test]
async fn silence_is_noticed_by_the_usual_heartbeats_and_survived() {
    tokio::join!(
        silence(Towards::Client, Hole::Swallows, USUAL),
        silence(Towards::Client, Hole::Stalls, USUAL),
        silence(Towards::Server, Hole::Swallows, USUAL),
        silence(Towards::Server, Hole::Stalls, USUAL),
    );
}

/// The worker's own heartbeat of ten seconds.
const USUAL: (&str, Duration) = ("", Duration::from_secs(45));

/// Missed only after two minutes: longer than the row waits.
const SELDOM: (&str, Duration) = ("?heartbeat=60", Duration::from_secs(45));

#[tokio::test]
async fn silence_that_no_heartbeat_finds_in_time_is_noticed_by_the_limits_of_the_worker() {
    tokio::join!(
        silence(Towards::Client, Hole::Stalls, SELDOM),
        silence(Towards::Server, Hole::Stalls, SELDOM),
    );
}

#[tokio::test]
async fn a_worker_connects_again_over_a_slow_way_to_the_broker() {
    let mut trial = slow("broker, cut, 200 ms each way").await;
    trial.under_load(150, 50).await;
    trial.proxy.cut();
    // What takes a round trip each, to connect and to declare, has to fit into the limit on it.
    trial.load.until_all_answered().await;
    assert_eq!(
        trial.proxy.accepted(),
        2 * CONNECTIONS,
        "the first attempt to connect again succeeds"
    );
    trial.proxy.heal();
    trial.finish().await;
}

/// The nth consumer ends, and neither the broker nor the client library tells the worker.
async fn consumer_gone(nth: usize) {
    let mut trial = Trial::of_broker("", &format!("broker, consumer {nth} gone")).await;
    trial.publish(40).await;
    // A consumer counts for as long as it has something unacknowledged.
    trial.load.until_all_answered().await;
    let served = trial.proxy.accepted();
    let of = |number| trial.proxy.consumers(number).into_iter().map(move |one| (number, one));
    let mut consumers: Vec<_> = (1..=served).flat_map(of).collect();
    assert_eq!(consumers.len(), CONSUMERS);
    let (number, (channel, tag)) = consumers.swap_remove(nth);
    trial.proxy.make(&Mistake::Cancel(tag), number, channel);
    // It has to be missed by two pulses.
    let limit = Duration::from_secs(40);
    until_within(limit, "the worker connects again", async || trial.proxy.accepted() > served)
        .await;
    trial.world.until_consuming().await;
    trial.publish(20).await;
    trial.load.until_all_answered().await;
    trial.finish().await;
}

/// One for each kind of command, one for those of it that come back, and one for the unknown.
const CONSUMERS: usize = 7;

#[tokio::test]
async fn a_consumer_that_ends_without_a_word_is_missed_whichever_it_is() {
    join_all((0..CONSUMERS).map(consumer_gone)).await;
}
