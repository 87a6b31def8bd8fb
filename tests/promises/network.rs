//! A network that is slow, silent, or breaks in the middle of anything costs no command and makes no
//! second batch.

use std::time::Duration;

use call_manager::config::Settings;
use elevenlabs_sandbox::{Effect, Fault, Route};
use futures_util::future::join_all;

use crate::load::{Load, until_within};
use crate::support::proxy::frames::{
    CHANNEL_CLOSE, CONFIRM_SELECT_OK, CONSUME_OK, Method, Mistake,
};
use crate::support::proxy::{Hole, Proxy, Towards};
use crate::support::{World, until};

const BOTH: [Towards; 2] = [Towards::Client, Towards::Server];

/// A world whose worker has few commands in hand at a time and reaches the broker through a proxy,
/// with the beginning of a load. `query` adds to the broker's URL.
pub async fn behind_proxy(query: &str, name: String) -> (World, Proxy, Load) {
    let mut world = World::without_worker().await;
    let (proxy, url) = Proxy::to_broker().await;
    let load = Load::of(&world, name).await;
    world.sandbox.order(
        Fault::on(Route::Submit, Effect::Latency(Duration::from_millis(100))).until_cleared(),
    );
    let change = |settings: &mut Settings| {
        settings.broker.amqp_url = format!("{url}{query}").into();
        settings.broker.prefetch = 16;
    };
    world.start_worker(change).await;
    (world, proxy, load)
}

/// All that passes between worker and broker takes 200 ms each way.
pub async fn slow(name: &str) -> (World, Proxy, Load) {
    let (world, proxy, load) = behind_proxy("", name.to_owned()).await;
    for towards in BOTH {
        proxy.delay(towards, Duration::from_millis(200));
    }
    (world, proxy, load)
}

#[tokio::test]
async fn a_slow_way_to_the_broker_costs_time_only() {
    let (world, proxy, mut load) = slow("broker, 200 ms each way").await;
    load.publish(&world, 150).await;
    load.until_all_answered().await;
    assert_eq!(proxy.accepted(), 2, "slow is not lost");
    proxy.heal();
    world.finish_load(load).await;
}

/// A heartbeat every two seconds.
const OFTEN: &str = "?heartbeat=2";

/// Under load, nothing arrives in one direction until the worker has missed it.
pub async fn silence(towards: Towards, hole: Hole, query: &str) {
    let name = format!("broker, {towards:?} {hole:?}{query}");
    let (world, proxy, mut load) = behind_proxy(query, name).await;
    load.publish(&world, 150).await;
    load.until_answered(20).await;
    proxy.blackhole(towards, hole);
    load.publish(&world, 20).await;
    // It, or the broker, misses two heartbeats; three times as long, where the time is just over.
    let limit = Duration::from_secs(60);
    until_within(limit, "the worker connects again", async || proxy.accepted() > 2).await;
    proxy.heal();
    load.until_all_answered().await;
    world.until_consuming().await;
    world.finish_load(load).await;
}

#[tokio::test]
async fn silence_from_the_broker_is_noticed_and_survived() {
    tokio::join!(
        silence(Towards::Client, Hole::Swallows, OFTEN),
        silence(Towards::Client, Hole::Stalls, OFTEN)
    );
}

#[tokio::test]
async fn silence_towards_the_broker_is_noticed_and_survived() {
    tokio::join!(
        silence(Towards::Server, Hole::Swallows, OFTEN),
        silence(Towards::Server, Hole::Stalls, OFTEN)
    );
}

/// Breaks every connection to the broker after so many bytes, under load, for each of them in turn.
async fn cut_after(towards: Towards, limits: [usize; 2]) {
    let name = format!("broker, {towards:?} cut after {limits:?} bytes");
    let (world, proxy, mut load) = behind_proxy("", name).await;
    for limit in limits {
        load.publish(&world, 30).await;
        load.until_answered(load.answered() + 5).await;
        let broken = proxy.broken();
        proxy.cut_after(towards, limit);
        // More for both connections to carry, and the attempts to connect again.
        load.publish(&world, 10).await;
        until("both connections are cut", async || proxy.broken() >= broken + 2).await;
        proxy.heal();
        load.until_all_answered().await;
    }
    world.until_consuming().await;
    world.finish_load(load).await;
}

/// Within a heartbeat, a method, the header and the body of a message; within the handshake of the
/// connections that follow, and within what they declare.
const LIMITS: [[usize; 2]; 4] = [[1, 1_900], [19, 540], [150, 2_700], [380, 1_100]];

#[tokio::test]
async fn a_connection_cut_within_anything_the_broker_says_loses_nothing() {
    join_all(LIMITS.map(|limits| cut_after(Towards::Client, limits))).await;
}

#[tokio::test]
async fn a_connection_cut_within_anything_the_worker_says_loses_nothing() {
    join_all(LIMITS.map(|limits| cut_after(Towards::Server, limits))).await;
}

/// The broker closes each channel that the worker has got by this method, one after the other.
async fn closed_channels(opened_with: Method, mistake: Mistake) {
    let name = format!("broker, {mistake:?} on the channels of {opened_with:?}");
    let (world, proxy, mut load) = behind_proxy("", name).await;
    // Of the newest two connections, the one that has them, and each channel once.
    let of_newest = || {
        let newest = [proxy.accepted() - 1, proxy.accepted()];
        let all = newest.map(|number| (number, proxy.channels(number, opened_with)));
        let (number, mut channels) = all.into_iter().find(|(_, all)| !all.is_empty()).unwrap();
        channels.sort_unstable();
        channels.dedup();
        (number, channels)
    };
    for nth in 0..of_newest().1.len() {
        load.publish(&world, 40).await;
        load.until_answered(load.answered() + 10).await;
        let served = proxy.accepted();
        let (number, channels) = of_newest();
        proxy.make(&mistake, number, channels[nth]);
        let closed = async || proxy.channels(number, CHANNEL_CLOSE) == [channels[nth]];
        until("the broker closes the channel", closed).await;
        until("both connections are made again", async || proxy.accepted() >= served + 2).await;
        load.until_all_answered().await;
        world.until_consuming().await;
    }
    world.finish_load(load).await;
}

const MISTAKES: [Mistake; 2] = [Mistake::NotFound, Mistake::PreconditionFailed];

#[tokio::test]
async fn a_lane_whose_channel_the_broker_closes_is_rebuilt() {
    join_all(MISTAKES.map(|mistake| closed_channels(CONSUME_OK, mistake))).await;
}

#[tokio::test]
async fn a_publisher_whose_channel_the_broker_closes_is_rebuilt() {
    join_all(MISTAKES.map(|mistake| closed_channels(CONFIRM_SELECT_OK, mistake))).await;
}

const SHORT: Duration = Duration::from_secs(1);

/// A world whose worker reaches the vendor through a proxy, with a limit on each request and a load to
/// come.
async fn behind_vendor_proxy(name: String, limit: Duration) -> (World, Proxy, Load) {
    let mut world = World::without_worker().await;
    let vendor = world.sandbox.base_url().strip_prefix("http://").unwrap().parse().unwrap();
    let proxy = Proxy::to(vendor).await;
    let load = Load::of(&world, name).await;
    let url = format!("http://{}", proxy.address).parse().unwrap();
    let change = |settings: &mut Settings| {
        settings.elevenlabs_base_url = url;
        settings.elevenlabs_connect_timeout = Duration::from_millis(500);
        settings.elevenlabs_timeout = limit;
        // What was stalled arrives when the hole is gone, and has to show in the list by then.
        settings.settling_window = Duration::from_secs(1);
        settings.broker.prefetch = 16;
    };
    world.start_worker(change).await;
    (world, proxy, load)
}

#[tokio::test]
async fn a_slow_way_to_the_vendor_is_waited_for() {
    let (world, proxy, mut load) =
        behind_vendor_proxy("vendor, 200 ms each way".to_owned(), Duration::from_secs(10)).await;
    for towards in BOTH {
        proxy.delay(towards, Duration::from_millis(200));
    }
    load.publish(&world, 100).await;
    load.until_all_answered().await;
    assert_eq!(world.sandbox.requests().len(), 100, "nothing is asked twice");
    world.finish_load(load).await;
}

#[tokio::test]
async fn batches_of_a_vendor_whose_answers_all_come_too_late_are_found() {
    let (world, proxy, mut load) =
        behind_vendor_proxy("vendor, 700 ms each way".to_owned(), SHORT).await;
    for towards in BOTH {
        proxy.delay(towards, Duration::from_millis(700));
    }
    load.publish(&world, 40).await;
    until("some batches are there", async || world.sandbox.batches().len() >= 5).await;
    until("the worker looks for them", async || world.requests(Route::List) >= 5).await;
    assert_eq!(world.requests(Route::Submit), world.sandbox.batches().len(), "none is sent again");
    proxy.heal();
    load.until_all_answered().await;
    assert_eq!(world.requests(Route::Submit), 40, "none was sent again");
    world.finish_load(load).await;
}

async fn silence_of_the_vendor(towards: Towards, hole: Hole) {
    let (world, proxy, mut load) =
        behind_vendor_proxy(format!("vendor, {towards:?} {hole:?}"), SHORT).await;
    let slow = Effect::Latency(Duration::from_millis(100));
    world.sandbox.order(Fault::on(Route::Submit, slow).until_cleared());
    load.publish(&world, 100).await;
    load.until_answered(20).await;
    let connections = proxy.accepted();
    proxy.blackhole(towards, hole);
    until("some are given up, and looked for", async || proxy.accepted() >= connections + 8).await;
    proxy.heal();
    load.until_all_answered().await;
    world.finish_load(load).await;
}

#[tokio::test]
async fn silence_between_worker_and_vendor_makes_no_second_batch() {
    tokio::join!(
        silence_of_the_vendor(Towards::Client, Hole::Swallows),
        silence_of_the_vendor(Towards::Client, Hole::Stalls),
        silence_of_the_vendor(Towards::Server, Hole::Swallows),
        silence_of_the_vendor(Towards::Server, Hole::Stalls),
    );
}

#[tokio::test]
async fn cuts_between_worker_and_vendor_make_no_second_batch() {
    let (world, proxy, mut load) = behind_vendor_proxy("vendor, five cuts".to_owned(), SHORT).await;
    let slow = Effect::Latency(Duration::from_millis(100));
    world.sandbox.order(Fault::on(Route::Submit, slow).until_cleared());
    for _ in 0..5 {
        let sent = world.requests(Route::Submit);
        load.publish(&world, 30).await;
        until("some are at the vendor", async || world.requests(Route::Submit) > sent + 5).await;
        proxy.cut();
    }
    load.until_all_answered().await;
    world.finish_load(load).await;
}

/// Every connection breaks after so many bytes, from the first one on, until some have. How many
/// submits had been sent by then, and how many batches there were.
async fn vendor_cut_after(towards: Towards, limit: usize) -> (usize, usize) {
    let name = format!("vendor, {towards:?} cut after {limit} bytes");
    let (world, proxy, mut load) = behind_vendor_proxy(name, SHORT).await;
    proxy.cut_after(towards, limit);
    load.publish(&world, 10).await;
    until("submits are cut, and searches", async || proxy.broken() >= 15).await;
    let came = (world.requests(Route::Submit), world.sandbox.batches().len());
    proxy.heal();
    load.until_all_answered().await;
    world.finish_load(load).await;
    came
}

/// The last one is in the middle of the body.
const BYTES: [usize; 5] = [0, 1, 100, 300, 500];

#[tokio::test]
async fn a_request_cut_at_any_byte_is_sent_again() {
    let came = join_all(BYTES.map(|limit| vendor_cut_after(Towards::Server, limit))).await;
    for (_, batches) in came {
        assert_eq!(batches, 0, "the vendor executes none that it has not got whole");
    }
}

#[tokio::test]
async fn an_answer_cut_at_any_byte_makes_no_second_batch() {
    let came = join_all(BYTES.map(|limit| vendor_cut_after(Towards::Client, limit))).await;
    for (sent, batches) in came {
        assert!(sent > 0);
        assert_eq!(batches, sent, "the vendor has executed each, and none was sent twice");
    }
}
