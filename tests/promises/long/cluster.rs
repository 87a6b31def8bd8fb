//! A cluster of three nodes loses the leader of a queue twice, under a pool of workers at work.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use call_manager::domain::command::CommandKind;
use serde_json::{Value, json};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};

use crate::load::until_memory_is_back;
use crate::process::Process;
use crate::row::{Answers, PATIENT, ids, slow_down, until_idle, warm_up};
use crate::support::load::Load;
use crate::support::node::Node;
use crate::support::postgres::Database;
use crate::support::{World, until};

const NODES: usize = 3;
const WORKERS: usize = 4;
const SOME: usize = 100;

/// From the death of a leader to the result of a command that was published after it.
const OUTAGE_LIMIT: Duration = Duration::from_secs(10);

/// What operators put before a cluster: leads each connection to the next node that takes it. The
/// `AMQP_URL` that leads through it.
async fn balance(nodes: &[Node]) -> String {
    let addresses: Arc<[String]> = nodes.iter().map(Node::address).collect();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("amqp://guest:guest@{}/%2f", listener.local_addr().unwrap());
    let turn = Arc::<AtomicUsize>::default();
    tokio::spawn(async move {
        while let Ok((mut inbound, _)) = listener.accept().await {
            let (addresses, turn) = (Arc::clone(&addresses), Arc::clone(&turn));
            tokio::spawn(async move {
                for _ in 0..addresses.len() {
                    let next = turn.fetch_add(1, Ordering::SeqCst) % addresses.len();
                    if let Ok(mut outbound) = TcpStream::connect(&addresses[next]).await {
                        copy_bidirectional(&mut inbound, &mut outbound).await.ok();
                        return;
                    }
                }
            });
        }
    });
    url
}

/// What a living node says about the queue.
async fn about(nodes: &[Node], queue: &str) -> Value {
    let node = nodes.iter().find(|node| node.runs()).unwrap();
    let words = ["-q", "--formatter", "json", "list_queues", "name", "leader", "online"];
    let listed = node.control(&words).await;
    let queues: Vec<Value> = serde_json::from_str(&listed).unwrap();
    queues.into_iter().find(|about| about["name"] == queue).expect("the queue is there")
}

#[tokio::test]
async fn the_leader_of_the_queue_is_killed_twice_and_costs_a_pool_neither_a_submit_nor_a_second_batch()
 {
    let mut nodes = Node::cluster(NODES).await;
    let url = balance(&nodes).await;
    let database = Database::create().await;
    let mut world = World::at(&url).await;
    let queue = world.topology.queue(CommandKind::Submit);
    assert_eq!(about(&nodes, &queue).await["online"].as_array().unwrap().len(), NODES);
    let mut workers = Vec::new();
    for _ in 0..WORKERS {
        workers.push(Process::consuming(&world, &database.url(), &[PATIENT]).await);
    }
    let warmed_up = warm_up(&mut world).await;
    for node in &nodes {
        node.flush().await;
    }
    let before: Vec<_> = workers.iter().map(Process::resident_bytes).collect();

    slow_down(&world);
    let load = Load::start(&world, &url, "load");
    let mut answers = Answers::default();
    let mut killed = Vec::new();
    for _ in 0..2 {
        load.until_more(SOME).await;
        let leader = about(&nodes, &queue).await["leader"].clone();
        let leader = nodes.iter().position(|node| json!(node.name()) == leader).unwrap();
        nodes[leader].kill().await;
        let death = Instant::now();
        // That one may have been on its way already; the next one was not.
        let first_after = load.confirmed() + 1;
        world.reconnect().await;
        loop {
            let id = answers.take(&mut world).await;
            if id.trim_start_matches("load-").parse::<usize>().unwrap() >= first_after {
                break;
            }
        }
        let outage = death.elapsed();
        eprintln!("node {leader} killed: the next command was answered after {outage:.1?}");
        assert!(outage < OUTAGE_LIMIT, "{outage:?}");
        load.until_more(SOME).await;
        nodes[leader].start_again().await;
        until("all members are there again", async || {
            about(&nodes, &queue).await["online"].as_array().unwrap().len() == NODES
        })
        .await;
        killed.push(leader);
    }
    assert_ne!(killed[0], killed[1], "the leader moved");
    load.until_more(SOME).await;
    let published = load.stop().await;
    world.reconnect().await;
    answers.take_all(&mut world, published).await;
    answers.assert_each_once(&ids("load", published));
    let batches = world.sandbox.batches().len();
    assert_eq!(batches, warmed_up + published, "one batch per submit");
    eprintln!(
        "{published} submits, {published} answered, {} results repeated, {} batches",
        answers.repeated,
        batches - warmed_up
    );

    until_idle(&nodes[0]).await;
    for (worker, before) in workers.into_iter().zip(before) {
        until_memory_is_back(&worker, before).await;
        worker.stop().await;
    }
    assert_eq!(world.sandbox.batches().len(), batches, "none came late");
    world.finish().await;
    database.drop().await;
}
