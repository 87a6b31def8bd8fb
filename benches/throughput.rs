//! How fast a full queue is worked off: beside a bare relay, the least that any client can do, and
//! with each ledger beside the one in memory.
//!
//! `AMQP_URL=… [POSTGRES_URL=…] cargo bench --bench throughput [-- COMMANDS ROUNDS]`. All take turns
//! on the same broker, queues and messages; what counts is the ratio, since machines differ.
#![allow(
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    dead_code,
    missing_docs,
    reason = "a benchmark fails loudly, and uses a part of the tests' world"
)]

#[path = "../tests/promises/support/mod.rs"]
mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use call_manager::config::LedgerPlace;
use call_manager::domain::command::CommandKind;
use futures_util::StreamExt as _;
use lapin::BasicProperties;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, QueuePurgeOptions,
};
use lapin::types::FieldTable;
use tokio::task::JoinSet;
use uuid::Uuid;

use support::postgres::Database;
use support::{World, connect, submit_body, with_id};

const PREFETCH: u16 = 64;

/// What the commands make the worker do.
#[derive(Clone, Copy, PartialEq)]
enum Work {
    /// Refused before anything is sent: the broker is the only other party.
    Refused,
    /// A submit of two recipients, with the sandbox as the vendor.
    Submit,
}

/// Who works the queue off.
#[derive(Clone, Copy, PartialEq)]
enum Who {
    Relay,
    /// With the ledger in memory, in a file, in a server.
    Memory,
    Sqlite,
    Postgres,
}

#[tokio::main]
async fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let commands = numbers.first().copied().unwrap_or(5_000);
    let rounds = numbers.get(1).copied().unwrap_or(5);
    println!(
        "{commands} commands on a full queue, prefetch {PREFETCH}, {rounds} rounds; commands per second"
    );
    let mut pairs = vec![
        ("refused commands, worker to bare relay", Work::Refused, Who::Sqlite, Who::Relay),
        ("submits, worker to bare relay", Work::Submit, Who::Sqlite, Who::Relay),
        ("submits, SQLite to memory", Work::Submit, Who::Sqlite, Who::Memory),
    ];
    if std::env::var("POSTGRES_URL").is_ok() {
        pairs.push(("submits, PostgreSQL to memory", Work::Submit, Who::Postgres, Who::Memory));
    }
    for (name, work, one, other) in pairs {
        let mut ratios = Vec::new();
        for round in 1..=rounds {
            let (one, other) = (run(work, commands, one).await, run(work, commands, other).await);
            ratios.push(one / other);
            println!("  {name}, round {round}: {one:.0} to {other:.0}, ratio {:.2}", one / other);
        }
        ratios.sort_by(f64::total_cmp);
        println!("{name}: median ratio {:.2}", ratios[ratios.len() / 2]);
    }
}

/// Fills the queue, works it off, and returns the rate.
async fn run(work: Work, commands: usize, who: Who) -> f64 {
    let mut world = World::without_worker().await;
    let body = match work {
        Work::Refused => b"{}".to_vec(),
        Work::Submit => submit_body().to_string().into_bytes(),
    };
    let (exchange, key) = (world.topology.commands_exchange(), CommandKind::Submit.routing_key());
    // A ledger belongs to one ElevenLabs, and each world has a sandbox of its own.
    let database = match who {
        Who::Postgres => Some(Database::create().await),
        Who::Relay | Who::Memory | Who::Sqlite => None,
    };
    let run = Uuid::now_v7();
    let mut confirms = Vec::new();
    for n in 0..commands {
        let properties = with_id(&format!("{run}-{n}")).with_delivery_mode(2);
        let publish = world.channel.basic_publish(
            exchange.as_str().into(),
            key.as_str().into(),
            BasicPublishOptions::default(),
            &body,
            properties,
        );
        confirms.push(publish.await.unwrap());
    }
    for confirm in confirms {
        assert!(confirm.await.unwrap().is_ack());
    }
    let relaying = if who == Who::Relay {
        Some(tokio::spawn(bare_relay(
            world.topology.queue(CommandKind::Submit),
            world.topology.results_exchange(),
            (work == Work::Submit).then(|| world.sandbox.base_url()),
        )))
    } else {
        let mut settings = world.settings();
        if who == Who::Memory {
            settings.ledger.place = LedgerPlace::Memory;
        } else if let Some(database) = &database {
            let (url, shown) = (database.url().into(), String::new());
            settings.ledger.place = LedgerPlace::Postgres { url, shown };
        }
        world.run_worker(settings);
        None
    };
    // From the first result on: connecting and declaring is not what is compared.
    world.next_raw_result().await;
    let started = Instant::now();
    for _ in 1..commands {
        world.next_raw_result().await;
    }
    let rate = (commands - 1) as f64 / started.elapsed().as_secs_f64();
    match relaying {
        Some(task) => task.abort(),
        None => world.stop_worker().await,
    }
    for kind in CommandKind::ALL {
        let queue = world.topology.queue(kind);
        world.channel.queue_purge(queue.into(), QueuePurgeOptions::default()).await.unwrap();
    }
    world.clean_up().await;
    if let Some(database) = database {
        database.drop().await;
    }
    rate
}

/// One task per delivery: the request, a confirmed publish, an ack. No checks, no ledger, no retry.
async fn bare_relay(queue: String, exchange: String, vendor: Option<String>) {
    let (consuming, publishing) = (connect().await, connect().await);
    let channel = consuming.create_channel().await.unwrap();
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await.unwrap();
    let results = publishing.create_channel().await.unwrap();
    results.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let http =
        reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(60)).build().unwrap();
    let shared = Arc::new((results, http, exchange, vendor));
    let options = BasicConsumeOptions::default();
    let mut consumer = channel
        .basic_consume(queue.into(), "".into(), options, FieldTable::default())
        .await
        .unwrap();
    let mut tasks = JoinSet::new();
    while let Some(delivery) = consumer.next().await {
        let delivery = delivery.unwrap();
        let shared = Arc::clone(&shared);
        tasks.spawn(async move {
            let (results, http, exchange, vendor) = &*shared;
            let mut answer = b"{}".to_vec();
            if let Some(url) = vendor {
                let request = http
                    .post(format!("{url}/v1/convai/batch-calling/submit"))
                    .header("xi-api-key", "sandbox-key")
                    .header("content-type", "application/json")
                    .body(delivery.data.clone());
                answer = request.send().await.unwrap().bytes().await.unwrap().to_vec();
            }
            let published = results.basic_publish(
                exchange.as_str().into(),
                "batch-calling.submit.succeeded".into(),
                BasicPublishOptions::default(),
                &answer,
                BasicProperties::default().with_delivery_mode(2),
            );
            published.await.unwrap().await.unwrap();
            delivery.ack(BasicAckOptions::default()).await.unwrap();
        });
        while tasks.try_join_next().is_some() {}
    }
}
