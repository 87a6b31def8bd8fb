//! A delay queue that lets nothing out, for as long as it takes to be noticed.

use std::time::{Duration, Instant};

use call_manager::broker::Delay;
use lapin::options::ExchangeDeleteOptions;

use crate::process::Process;
use crate::support::node::Node;
use crate::support::{LIMIT, World, until};

#[tokio::test]
async fn readiness_tells_when_what_is_deferred_does_not_come_back() {
    let node = Node::start().await;
    // The broker tries again after three minutes what it could not let out of a delay queue.
    let sooner = "application:set_env(rabbit, dead_letter_worker_publisher_confirm_timeout, 2000).";
    node.control(&["eval", sooner]).await;
    let world = World::at(node.amqp_url()).await;
    let worker = Process::consuming(&world, &world.ledger_url(), &[]).await;
    let (canary, delay) = (world.topology.canary(), world.topology.delay(Delay::Short));
    until("a canary came back", async || world.queue(&canary).await.0 == 1).await;
    assert_eq!(worker.readiness().await.unwrap().0, 200);

    let options = ExchangeDeleteOptions::default();
    let retry = world.topology.retry_exchange();
    world.channel.exchange_delete(retry.into(), options).await.unwrap();
    let patiently = Instant::now();
    let says = async |code: u16| worker.readiness().await.is_some_and(|said| said.0 == code);
    while !says(503).await && patiently.elapsed() < LIMIT * 3 {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let (_, body) = worker.readiness().await.unwrap();
    let reason = format!("deferral: deferred commands do not come back from {delay}");
    assert!(body.contains(&reason), "{body}");
    assert_eq!(worker.log().matches("deferred commands may stay where they are").count(), 1);

    let connection = crate::topology::connect(node.amqp_url()).await;
    world.topology.declare(&connection).await.unwrap();
    until("it is ready again", async || says(200).await).await;
    worker.stop().await;
    assert_eq!(world.queue(&world.topology.dead_letter()).await.0, 0);
}
