//! A broker that is away, out of memory or frozen for minutes is waited for, and costs nothing.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::process::Process;
use crate::row::Row;
use crate::support::node::Node;
use crate::support::proxy::CONNECTIONS;
use crate::support::{World, until};

const A_MINUTE: Duration = Duration::from_secs(60);

/// Commands that are confirmed before the fault, and again after it.
const SOME: usize = 50;

/// Waits until the worker says that it is not ready, for a reason with this text in it.
async fn until_missing(worker: &Process, reason: &str) {
    until("it says what is missing", async || {
        let (status, body) = worker.ready().await;
        assert!(status == 503 || status == 200, "{status}: {body}");
        status == 503 && body.contains("not_ready") && body.contains(reason)
    })
    .await;
}

async fn until_ready(worker: &Process) {
    until("it is ready", async || worker.ready().await.0 == 200).await;
}

#[tokio::test]
async fn a_broker_that_is_away_for_five_minutes_at_the_start_is_consumed_from_when_it_is_there() {
    let mut node = Node::start().await;
    let mut world = World::at(node.amqp_url()).await;
    node.flush().await;
    node.stop().await;
    let worker = Process::start(&world, &world.ledger_url(), &[]);
    let away = Instant::now();
    while away.elapsed() < 5 * A_MINUTE {
        until_missing(&worker, "broker: ").await;
        sleep(Duration::from_secs(10)).await;
    }
    node.start_again().await;
    let back = Instant::now();
    until_ready(&worker).await;
    let took = back.elapsed();
    eprintln!("consuming {took:.1?} after the broker's return");
    assert!(took < Duration::from_secs(10), "{took:?}");
    world.reconnect().await;
    world.until_consuming().await;
    assert!(!world.submitted().await.is_empty());
    worker.stop().await;
    world.finish().await;
}

#[tokio::test]
async fn a_memory_alarm_of_a_minute_under_load_stops_the_work_and_loses_none() {
    let mut row = Row::start(Node::start().await).await;
    let load = row.load();
    load.until_more(SOME).await;
    row.node.control(&["set_vm_memory_high_watermark", "0.00001"]).await;
    until_missing(&row.worker, "publisher: ").await;
    let (alarm, before) = (Instant::now(), load.confirmed());
    let (mut closed, told) = (false, || row.worker.log().contains("maintenance"));
    while alarm.elapsed() < A_MINUTE {
        assert_eq!(row.worker.ready().await.0, 503, "as long as the alarm lasts");
        // Connected anew, it is not told of the alarm before it publishes.
        if alarm.elapsed() > A_MINUTE / 2 && !closed {
            row.node.control(&["close_all_connections", "maintenance"]).await;
            closed = true;
        }
        sleep(Duration::from_millis(100)).await;
    }
    assert!(told(), "its connections were closed meanwhile");
    assert!(load.confirmed() <= before + 1, "nothing is taken meanwhile");
    row.node.control(&["set_vm_memory_high_watermark", "0.4"]).await;
    until_ready(&row.worker).await;
    load.until_more(SOME).await;
    row.settle(load).await;
    row.finish().await;
}

#[tokio::test]
async fn a_broker_that_is_frozen_for_a_minute_under_load() {
    let mut row = Row::start(Node::start().await).await;
    let load = row.load();
    load.until_more(SOME).await;
    row.node.freeze();
    let frozen = Instant::now();
    until_missing(&row.worker, "broker: ").await;
    let missed = frozen.elapsed();
    eprintln!("missed after {missed:.1?}");
    assert!(missed < Duration::from_secs(30), "{missed:?}");
    // In the midst of what the worker tries meanwhile.
    sleep(A_MINUTE.saturating_sub(frozen.elapsed())).await;
    assert_eq!(row.worker.ready().await.0, 503, "as long as it is frozen");
    // Those of the third attempt of each lane, and of the second as long as its threads take to end.
    let open = row.worker.connections_to(row.node.port());
    assert!(
        open <= 2 * CONNECTIONS,
        "{open} connections are open: those that were given up are kept"
    );
    row.node.thaw();
    let thawed = Instant::now();
    until_ready(&row.worker).await;
    let took = thawed.elapsed();
    eprintln!("consuming {took:.1?} after the thaw");
    assert!(took < Duration::from_secs(10), "{took:?}");
    load.until_more(SOME).await;
    row.settle(load).await;
    row.finish().await;
}
