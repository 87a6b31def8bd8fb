//! A row of the fault matrix: a node, a worker process under load, and what has to be true afterwards.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{Effect, Fault, Route};
use futures_util::future::join_all;
use serde_json::Value;

use crate::load::until_memory_is_back;
use crate::process::Process;
use crate::support::load::Load;
use crate::support::node::Node;
use crate::support::{Received, World, submit_body, until, with_id};

/// Submits before the memory is measured: what a worker allocates once is there by then.
const WARM_UP: usize = 200;

/// A machine that is busy with starting nodes must not look like a vendor that does not answer.
pub const PATIENT: (&str, &str) = ("ELEVENLABS_TIMEOUT", "10s");

/// How long the vendor takes under load: so that some commands are in hand whenever a fault comes.
const VENDOR_TAKES: Duration = Duration::from_millis(400);

pub struct Row {
    pub node: Node,
    pub world: World,
    pub worker: Process,
    resident: u64,
    submitted: usize,
}

impl Row {
    /// With a worker that has done some work, and whose ledger has seen the queues empty.
    pub async fn start(node: Node) -> Self {
        let mut world = World::at(node.amqp_url()).await;
        let ledger = world.drained_ledger().await;
        let worker = Process::consuming(&world, &ledger, &[PATIENT]).await;
        let submitted = warm_up(&mut world).await;
        // Otherwise a SIGKILL costs the queues themselves.
        node.flush().await;
        let resident = worker.resident_bytes();
        Self { node, world, worker, resident, submitted }
    }

    pub fn load(&self) -> Load {
        slow_down(&self.world);
        Load::start(&self.world, self.node.amqp_url(), "load")
    }

    /// Ends the load, waits for the results, and asserts that nothing was lost or done twice.
    pub async fn settle(&mut self, load: Load) {
        let published = load.stop().await;
        self.world.reconnect().await;
        self.answered(published).await;
    }

    /// The same, for commands `load-0` to `load-<published - 1>`.
    pub async fn answered(&mut self, published: usize) {
        let repeated = each_answered_once(&mut self.world, &ids("load", published)).await;
        self.submitted += published;
        assert_eq!(self.world.sandbox.batches().len(), self.submitted, "one batch per submit");
        eprintln!("{published} submits answered, {repeated} results repeated, no second batch");
    }

    /// Asserts that nothing is left: no message, none unacknowledged, no memory.
    pub async fn finish(self) {
        until_idle(&self.node).await;
        until_memory_is_back(&self.worker, self.resident).await;
        // A request that was given up for lost has ended by then, too.
        self.worker.stop().await;
        assert_eq!(self.world.sandbox.batches().len(), self.submitted, "one batch per submit");
        self.world.finish().await;
    }
}

/// Does some work.
pub async fn warm_up(world: &mut World) -> usize {
    let (ids, body) = (ids("warm-up", WARM_UP), submit_body().to_string());
    let publish =
        ids.iter().map(|id| world.publish(CommandKind::Submit, body.as_bytes(), with_id(id)));
    join_all(publish).await;
    each_answered_once(world, &ids).await;
    WARM_UP
}

/// From now on there are commands in hand while there is a load.
pub fn slow_down(world: &World) {
    world.sandbox.order(Fault::on(Route::Submit, Effect::Latency(VENDOR_TAKES)).until_cleared());
}

/// As a [`Load`] names its commands.
pub fn ids(name: &str, count: usize) -> HashSet<String> {
    (0..count).map(|number| format!("{name}-{number}")).collect()
}

/// Takes results until each of these commands has one, and then what is left; fails as
/// [`Answers::assert_each_once`] does. How many repeated another.
async fn each_answered_once(world: &mut World, ids: &HashSet<String>) -> usize {
    let mut answers = Answers::default();
    answers.take_all(world, ids.len()).await;
    answers.assert_each_once(ids);
    answers.repeated
}

/// The results of commands, by the command's id.
#[derive(Default)]
pub struct Answers {
    first: HashMap<String, Received>,
    /// Results that repeated another.
    pub repeated: usize,
}

impl Answers {
    /// Takes the next result, and tells whose it is. Fails unless it is a success, and the same as
    /// every other result of its command.
    pub async fn take(&mut self, world: &mut World) -> String {
        let result = world.next_result().await;
        self.insert(result)
    }

    /// Takes results until so many commands have one, and then what is left.
    pub async fn take_all(&mut self, world: &mut World, commands: usize) {
        while self.first.len() < commands {
            self.take(world).await;
        }
        for result in world.remaining_results().await {
            self.insert(result);
        }
    }

    fn insert(&mut self, result: Received) -> String {
        assert_eq!(result.code(), "200", "{}", result.body);
        let id = result.command_id();
        if let Some(first) = self.first.get(&id) {
            first.assert_repeats(&result);
            self.repeated += 1;
        } else {
            self.first.insert(id.clone(), result);
        }
        id
    }

    /// Fails unless these commands, and no others, are answered, each with a batch of its own.
    pub fn assert_each_once(&self, ids: &HashSet<String>) {
        assert_eq!(self.first.keys().cloned().collect::<HashSet<_>>(), *ids);
        let batches: HashSet<_> = self.first.values().map(batch).collect();
        assert_eq!(batches.len(), ids.len(), "each submit has a batch of its own");
    }
}

fn batch(result: &Received) -> &str {
    result.json["data"]["id"].as_str().expect("a submit's result names its batch")
}

/// Waits until no queue has a message, ready or unacknowledged. Results that nobody was bound for
/// may stay, and a canary may be where it is looked for.
pub async fn until_idle(node: &Node) {
    let words = ["-q", "--formatter", "json", "list_queues", "name", "messages_ready"];
    until("every queue is empty", async || {
        let listed = node.control(&[&words[..], &["messages_unacknowledged"]].concat()).await;
        let mut queues: Vec<Value> = serde_json::from_str(&listed).unwrap();
        assert!(queues.len() >= CommandKind::ALL.len(), "{listed}");
        queues.retain(|queue| {
            let name = queue["name"].as_str().unwrap();
            let may_stay = name.ends_with(".unrouted") || name.ends_with(".canary");
            !may_stay && (queue["messages_ready"] != 0 || queue["messages_unacknowledged"] != 0)
        });
        for queue in &queues {
            eprintln!("not empty yet: {queue}");
        }
        queues.is_empty()
    })
    .await;
}
