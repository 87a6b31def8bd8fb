//! A network that is slow, silent, or breaks in the middle of anything costs no command and makes no
//! second batch.

use std::time::Duration;

use elevenlabs_sandbox::{Effect, Fault, Route};
use futures_util::future::join_all;

use crate::load::{Load, until_memory_is_back};
use crate::process::Process;
use crate::support::proxy::frames::{
    CHANNEL_CLOSE, CONFIRM, CONFIRM_SELECT_OK, CONSUME_OK, DELIVER, Method, Mistake,
};
use crate::support::proxy::{CONNECTIONS, Hole, Proxy, Towards};
use crate::support::wait::until_within;
use crate::support::{World, until};

/// Submits before the memory is measured: what a worker allocates once is there by then.
const WARM_UP: usize = 200;

/// A worker process with few commands in hand at a time that has worked through a proxy, and what it
/// took for that.
pub struct Trial {
    pub world: World,
    pub proxy: Proxy,
    pub load: Load,
    worker: Process,
    resident: u64,
}

impl Trial {
    /// With a proxy before the broker, and a vendor that takes a while, so that there are always some
    /// in hand. `query` adds to the broker's URL.
    pub async fn of_broker(query: &str, name: &str) -> Self {
        let world = World::without_worker().await;
        let (proxy, url) = Proxy::to_broker().await;
        slow_down(&world);
        let url = format!("{url}{query}");
        let settings = [
            ("AMQP_URL", url.as_str()),
            ("ELEVENLABS_CONNECT_TIMEOUT", "2s"),
            ("ELEVENLABS_TIMEOUT", "10s"),
        ];
        Self::start(name, world, proxy, &settings).await
    }

    /// With a proxy before the vendor, and a limit on each request.
    async fn of_vendor(name: &str, limit: &str) -> Self {
        let world = World::without_worker().await;
        let vendor = world.sandbox.base_url().strip_prefix("http://").unwrap().parse().unwrap();
        let proxy = Proxy::to(vendor).await;
        let url = format!("http://{}", proxy.address);
        let settings = [
            ("ELEVENLABS_BASE_URL", url.as_str()),
            ("ELEVENLABS_TIMEOUT", limit),
            // What was stalled arrives when the hole is gone, and has to show in the list by then.
            ("SETTLING_WINDOW", "1s"),
        ];
        Self::start(name, world, proxy, &settings).await
    }

    async fn start(name: &str, world: World, proxy: Proxy, settings: &[(&str, &str)]) -> Self {
        let settings = [settings, &[("PREFETCH", "16"), ("RETRY_HORIZON", "60s")]].concat();
        let worker = Process::consuming(&world, &world.ledger_url(), &settings).await;
        let mut load = Load::of(&world, name).await;
        load.publish(&world, WARM_UP).await;
        load.until_all_answered().await;
        let resident = worker.resident_bytes();
        // Tells which of several rows at a time the number is of.
        eprintln!("{name}: {} kB", resident >> 10);
        Self { world, proxy, load, worker, resident }
    }

    /// From now on, all that passes takes so much longer each way.
    fn delay(&self, by: Duration) {
        for towards in [Towards::Client, Towards::Server] {
            self.proxy.delay(towards, by);
        }
    }

    pub async fn publish(&mut self, count: usize) {
        self.load.publish(&self.world, count).await;
    }

    /// Publishes, and returns in the middle of work: when so many more have a result.
    pub async fn under_load(&mut self, count: usize, answered: usize) {
        self.publish(count).await;
        self.load.until_answered(self.load.answered() + answered).await;
    }

    /// Submits that the vendor has got since the warm-up, and the batches it has made since.
    fn at_vendor(&self) -> (usize, usize) {
        let (submits, batches) = (self.world.requests(Route::Submit), self.world.sandbox.batches());
        (submits - WARM_UP, batches.len() - WARM_UP)
    }

    /// When all is answered: the memory is back, the worker stops, and nothing is left.
    pub async fn finish(mut self) {
        until_memory_is_back(&self.worker, self.resident).await;
        self.worker.stop().await;
        self.load.verify(&mut self.world).await;
        self.world.finish().await;
    }
}

/// From now on the vendor takes a while for a submit.
fn slow_down(world: &World) {
    let slow = Effect::Latency(Duration::from_millis(100));
    world.sandbox.order(Fault::on(Route::Submit, slow).until_cleared());
}

/// All that passes between worker and broker takes 200 ms each way.
pub async fn slow(name: &str) -> Trial {
    let trial = Trial::of_broker("", name).await;
    trial.delay(Duration::from_millis(200));
    trial
}

#[tokio::test]
async fn a_slow_way_to_the_broker_costs_time_only() {
    let mut trial = slow("broker, 200 ms each way").await;
    trial.publish(150).await;
    trial.load.until_all_answered().await;
    assert_eq!(trial.proxy.accepted(), CONNECTIONS, "slow is not lost");
    trial.proxy.heal();
    trial.finish().await;
}

/// A heartbeat every two seconds, and how soon the worker has missed two, on a busy machine.
const OFTEN: (&str, Duration) = ("?heartbeat=2", Duration::from_secs(20));

/// Under load, nothing arrives in one direction until the worker, or the broker, has missed it.
pub async fn silence(towards: Towards, hole: Hole, (query, limit): (&str, Duration)) {
    let name = format!("broker, {towards:?} {hole:?}{query}");
    let mut trial = Trial::of_broker(query, &name).await;
    trial.under_load(150, 20).await;
    trial.proxy.blackhole(towards, hole);
    trial.publish(20).await;
    let again = async || trial.proxy.accepted() > CONNECTIONS;
    until_within(limit, "the worker connects again", again).await;
    trial.proxy.heal();
    trial.load.until_all_answered().await;
    trial.world.until_consuming().await;
    trial.finish().await;
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
    let mut trial = Trial::of_broker("", &name).await;
    for limit in limits {
        trial.under_load(30, 5).await;
        let broken = trial.proxy.broken();
        trial.proxy.cut_after(towards, limit);
        // More for both connections to carry, and the attempts to connect again.
        trial.publish(10).await;
        until("both connections are cut", async || trial.proxy.broken() >= broken + 2).await;
        trial.proxy.heal();
        trial.load.until_all_answered().await;
    }
    trial.world.until_consuming().await;
    trial.finish().await;
}

/// Within a heartbeat, a method, the header and the body of a message.
const IN_A_FRAME: [[usize; 2]; 2] = [[1, 150], [19, 380]];

/// Within the handshake of the connections that follow, and within what they declare.
const IN_A_BEGINNING: [[usize; 2]; 2] = [[540, 2_700], [1_100, 1_900]];

#[tokio::test]
async fn a_connection_cut_within_a_frame_from_the_broker_loses_nothing() {
    join_all(IN_A_FRAME.map(|limits| cut_after(Towards::Client, limits))).await;
}

#[tokio::test]
async fn a_connection_cut_within_a_frame_to_the_broker_loses_nothing() {
    join_all(IN_A_FRAME.map(|limits| cut_after(Towards::Server, limits))).await;
}

#[tokio::test]
async fn a_connection_cut_while_the_broker_answers_its_beginning_loses_nothing() {
    join_all(IN_A_BEGINNING.map(|limits| cut_after(Towards::Client, limits))).await;
}

#[tokio::test]
async fn a_connection_cut_while_the_worker_begins_it_loses_nothing() {
    join_all(IN_A_BEGINNING.map(|limits| cut_after(Towards::Server, limits))).await;
}

/// The broker closes each channel that the worker has got by this method, one after the other.
async fn closed_channels((opened_with, traffic): (Method, Method), mistake: Mistake) {
    let name = format!("broker, {mistake:?} on the channels of {opened_with:?}");
    let mut trial = Trial::of_broker("", &name).await;
    let of = |proxy: &Proxy, number| {
        let mut channels = proxy.channels(number, opened_with);
        channels.sort_unstable();
        channels.dedup();
        channels
    };
    // Of the lane of submits, which has all the load.
    let busiest = (1..=CONNECTIONS).max_by_key(|n| trial.proxy.channels(*n, traffic).len());
    let mut number = busiest.unwrap();
    let channels = of(&trial.proxy, number).len();
    assert!(channels > 0);
    for nth in 0..channels {
        trial.under_load(40, 10).await;
        let proxy = &trial.proxy;
        let served = proxy.accepted();
        // After it was rebuilt, it may have fewer.
        let Some(channel) = of(proxy, number).get(nth).copied() else { break };
        proxy.make(&mistake, number, channel);
        let closed = async || proxy.channels(number, CHANNEL_CLOSE).contains(&channel);
        until("the broker closes the channel", closed).await;
        // The first is the lane's own; one that nothing waits on is replaced when it is needed.
        let is_again = async || nth > 0 || proxy.accepted() >= served + 2;
        until("both connections are made again", is_again).await;
        trial.load.until_all_answered().await;
        trial.world.until_consuming().await;
        if trial.proxy.accepted() == served {
            continue;
        }
        let newest = [trial.proxy.accepted() - 1, trial.proxy.accepted()];
        let of_newest = newest.into_iter().find(|number| !of(&trial.proxy, *number).is_empty());
        number = of_newest.expect("the lane has the newest two connections");
    }
    trial.finish().await;
}

const MISTAKES: [Mistake; 2] = [Mistake::NotFound, Mistake::PreconditionFailed];

#[tokio::test]
async fn a_lane_whose_channel_the_broker_closes_is_rebuilt() {
    join_all(MISTAKES.map(|mistake| closed_channels((CONSUME_OK, DELIVER), mistake))).await;
}

#[tokio::test]
async fn a_publisher_whose_channel_the_broker_closes_is_rebuilt() {
    join_all(MISTAKES.map(|mistake| closed_channels((CONFIRM_SELECT_OK, CONFIRM), mistake))).await;
}

const SHORT: &str = "1s";

#[tokio::test]
async fn a_slow_way_to_the_vendor_is_waited_for() {
    let mut trial = Trial::of_vendor("vendor, 200 ms each way", "10s").await;
    trial.delay(Duration::from_millis(200));
    trial.publish(100).await;
    trial.load.until_all_answered().await;
    assert_eq!(trial.world.asked(), WARM_UP + 100, "nothing is asked twice");
    trial.finish().await;
}

#[tokio::test]
async fn batches_of_a_vendor_whose_answers_all_come_too_late_are_found() {
    let mut trial = Trial::of_vendor("vendor, 700 ms each way", SHORT).await;
    trial.delay(Duration::from_millis(700));
    let looks = |world: &World| world.requests(Route::List) + world.probes();
    let before = looks(&trial.world);
    trial.publish(40).await;
    until("some batches are there", async || trial.at_vendor().1 >= 5).await;
    until("the worker looks for them", async || looks(&trial.world) >= before + 5).await;
    let (sent, batches) = trial.at_vendor();
    assert_eq!(sent, batches, "none is sent again");
    trial.proxy.heal();
    trial.load.until_all_answered().await;
    assert_eq!(trial.at_vendor().0, 40, "none was sent again");
    trial.finish().await;
}

async fn silence_of_the_vendor(towards: Towards, hole: Hole) {
    let mut trial = Trial::of_vendor(&format!("vendor, {towards:?} {hole:?}"), SHORT).await;
    slow_down(&trial.world);
    trial.under_load(100, 20).await;
    let connections = trial.proxy.accepted();
    trial.proxy.blackhole(towards, hole);
    let proxy = &trial.proxy;
    until("some are given up, and looked for", async || proxy.accepted() >= connections + 8).await;
    trial.proxy.heal();
    trial.load.until_all_answered().await;
    trial.finish().await;
}

#[tokio::test]
async fn silence_from_the_vendor_makes_no_second_batch() {
    tokio::join!(
        silence_of_the_vendor(Towards::Client, Hole::Swallows),
        silence_of_the_vendor(Towards::Client, Hole::Stalls),
    );
}

#[tokio::test]
async fn silence_towards_the_vendor_makes_no_second_batch() {
    tokio::join!(
        silence_of_the_vendor(Towards::Server, Hole::Swallows),
        silence_of_the_vendor(Towards::Server, Hole::Stalls),
    );
}

#[tokio::test]
async fn cuts_between_worker_and_vendor_make_no_second_batch() {
    let mut trial = Trial::of_vendor("vendor, five cuts", SHORT).await;
    slow_down(&trial.world);
    for _ in 0..5 {
        let (sent, _) = trial.at_vendor();
        trial.publish(30).await;
        until("some are at the vendor", async || trial.at_vendor().0 > sent + 5).await;
        trial.proxy.cut();
    }
    trial.load.until_all_answered().await;
    trial.finish().await;
}

/// Every connection breaks after so many bytes, from the first one on, until some have. How many
/// submits had been sent by then, and how many batches there were.
async fn vendor_cut_after(towards: Towards, limit: usize) -> (usize, usize) {
    let name = format!("vendor, {towards:?} cut after {limit} bytes");
    let mut trial = Trial::of_vendor(&name, SHORT).await;
    // None is left that has carried something.
    trial.proxy.cut();
    let port = trial.proxy.address.port();
    until("none is kept", async || trial.worker.connections_to(port) == 0).await;
    trial.proxy.cut_after(towards, limit);
    trial.publish(10).await;
    until("submits are cut, and searches", async || trial.proxy.broken() >= 15).await;
    let came = trial.at_vendor();
    trial.proxy.heal();
    trial.load.until_all_answered().await;
    trial.finish().await;
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
