//! Submits in number, and the proof that each of them made one batch and has its true result.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use call_manager::domain::command::{CommandKind, marker};
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use lapin::Consumer;
use serde_json::json;
use tokio::time::timeout;

use crate::process::Process;
use crate::support::{Received, World, listen, submit_body, with_id};

/// Longer than the longest wait that a command is sent into.
const ALL_ANSWERED: Duration = Duration::from_secs(100);

/// An allocator need not give back at once what is free.
const MEMORY_IS_BACK: Duration = Duration::from_secs(30);

pub struct Load {
    /// What is being tried, for the summary.
    name: String,
    ids: Vec<String>,
    results: Consumer,
    answered: HashSet<String>,
    began: Instant,
}

impl Load {
    pub async fn of(world: &World, name: impl Into<String>) -> Self {
        let results = listen(&world.channel, &world.topology.results_exchange()).await;
        let (ids, answered) = (Vec::new(), HashSet::new());
        Self { name: name.into(), ids, results, answered, began: Instant::now() }
    }

    /// Publishes so many submits more, and returns when the broker has them.
    pub async fn publish(&mut self, world: &World, count: usize) {
        let body = submit_body().to_string();
        let had = self.ids.len();
        self.ids.extend((had..had + count).map(|n| format!("m-{n}")));
        let publish =
            |id: &String| world.publish(CommandKind::Submit, body.as_bytes(), with_id(id));
        join_all(self.ids[had..].iter().map(publish)).await;
    }

    /// Returns when so many of the submits have a result.
    pub async fn until_answered(&mut self, count: usize) {
        let waiting = async {
            while self.answered.len() < count {
                let delivery = self.results.next().await.expect("the results queue stays");
                self.answered.insert(Received::checked(&delivery.unwrap()).command_id());
            }
        };
        let in_time = timeout(ALL_ANSWERED, waiting).await.is_ok();
        assert!(in_time, "{}: {} of {count} are answered", self.name, self.answered.len());
    }

    /// Returns when every submit has a result.
    pub async fn until_all_answered(&mut self) {
        self.until_answered(self.ids.len()).await;
    }

    /// How many submits were seen to have a result.
    pub fn answered(&self) -> usize {
        self.answered.len()
    }

    /// When the worker has stopped: each submit has one batch, and all of its results name it.
    pub async fn verify(self, world: &mut World) {
        let mut results = HashMap::<String, Vec<Received>>::new();
        for result in world.remaining_results().await {
            results.entry(result.command_id()).or_default().push(result);
        }
        assert_eq!(results.len(), self.ids.len(), "{}: answered commands", self.name);
        let mut batches = HashMap::<String, Vec<String>>::new();
        for batch in world.sandbox.batches() {
            let marker = &batch.recipients[0].dynamic_variables["call_manager_command_id"];
            batches.entry(marker.as_str().unwrap().to_owned()).or_default().push(batch.id);
        }
        assert_eq!(batches.len(), self.ids.len(), "{}: batches", self.name);
        for id in &self.ids {
            let of = format!("{}: {id}", self.name);
            let own = &batches[&marker(id)];
            let [batch] = own.as_slice() else { panic!("{of} has the batches {own:?}") };
            let first = &results[id][0];
            assert_eq!(first.code(), "200", "{of}: {}", first.body);
            assert_eq!(first.json["data"]["id"], json!(batch), "{of}");
            for other in &results[id][1..] {
                first.assert_repeats(other);
            }
        }
        eprintln!(
            "{}: {} commands, {} batches, {} results, {:.1} s",
            self.name,
            self.ids.len(),
            world.sandbox.batches().len(),
            results.values().map(Vec::len).sum::<usize>(),
            self.began.elapsed().as_secs_f64(),
        );
    }
}

/// Waits until a worker has no more in memory than a fifth above what it had before, in bytes.
pub async fn until_memory_is_back(worker: &Process, before: u64) {
    let most = before / 5 * 6;
    let back = async {
        while worker.resident_bytes() > most {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let in_time = timeout(MEMORY_IS_BACK, back).await.is_ok();
    let (before, after) = (before >> 10, worker.resident_bytes() >> 10);
    assert!(in_time, "{before} kB before, and {after} kB {MEMORY_IS_BACK:?} after");
    eprintln!("{before} kB before, {after} kB after");
}
