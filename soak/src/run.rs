//! One soak from the first start to the judgement.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Context as _;
use call_manager::broker::{Delay, Topology};
use call_manager::domain::command::{CommandKind, marker};
use elevenlabs_sandbox::{Options as SandboxOptions, Sandbox};
use rustix::process::Signal;
use tokio::time::{interval, sleep};
use tokio_util::sync::CancellationToken;

use crate::book::Book;
use crate::chaos::Chaos;
use crate::crew::{self, Crew};
use crate::judge::{self, Created, Evidence};
use crate::listener::Listener;
use crate::node::Node;
use crate::options::{Faults, Options};
use crate::plan::Plan;
use crate::postgres::Postgres;
use crate::producer::Producer;
use crate::report::{self, Leftovers, Soak};
use crate::vendor::{self, Happened};

const API_KEY: &str = "sandbox-key";
const PREFIX: &str = "soak";
/// The listener's queue.
const RESULTS: &str = "soak.collected";

/// When nothing was confirmed or answered for so long, nothing will be.
const SILENCE: Duration = Duration::from_secs(5 * 60);
/// How long copies and leftovers may take when every command has its first result.
const EMPTYING_LIMIT: Duration = Duration::from_secs(2 * 60);
const PROGRESS: Duration = Duration::from_secs(5);

/// The shortest time of sending in which every kind of fault is dealt at least once.
const SHORTEST: Duration = Duration::from_secs(75);
/// Commands per second of a long soak: slow enough for dozens of faults in 10,000 commands.
const RATE: u32 = 40;

/// Whether every promise was kept; prints progress and the table.
pub async fn run(options: &Options) -> anyhow::Result<bool> {
    let plan = Plan::new(options.seed, options.commands.try_into()?);
    let topology = Topology::new(PREFIX);
    let sandbox = stand_in(options).await?;
    let postgres = match &options.postgres {
        Some(script) => Some(Postgres::start(script, &options.logs).await?),
        None => None,
    };
    let ledger_url = postgres.as_ref().map(Postgres::url).or(options.ledger_url.as_deref());
    let node = Node::new(
        options.broker.clone(),
        options.rabbitmqctl.clone(),
        options.logs.clone(),
        options.amqp_url.clone(),
    );
    node.start().await?;
    let book = Book::new(&plan);
    let soak = Parts {
        options,
        plan: &plan,
        book: &book,
        topology: &topology,
        sandbox: &sandbox,
        node: &node,
        postgres: postgres.as_ref(),
        ledger_url: ledger_url.context("there is no ledger")?,
    };
    let leftovers = soak.until_the_end().await?;
    node.end(Signal::KILL).await?;
    if let Some(postgres) = postgres {
        postgres.remove().await?;
    }

    let record = book.record();
    let batches = created(&plan, &sandbox);
    let findings = judge::judge(&Evidence {
        commands: &plan.commands,
        confirmed: &record.confirmed,
        late: &record.late,
        answers: &record.answers,
        batches: &batches,
    });
    let happened = Happened::of(&sandbox.requests());
    sandbox.stop().await;
    let soak =
        Soak { options, plan: &plan, record: &record, batches: &batches, leftovers: &leftovers };
    report::print(&soak, &findings, &happened)
}

async fn stand_in(options: &Options) -> anyhow::Result<Sandbox> {
    let sandbox = Sandbox::start(SandboxOptions {
        api_key: API_KEY.to_owned(),
        // No batch ends by itself: one that is cancelled in the end was cancelled.
        speed: 0.0,
        list_lag: vendor::LIST_LAG,
        ..SandboxOptions::default()
    })
    .await
    .context("the stand-in of ElevenLabs cannot listen")?;
    if options.faults != Faults::None {
        vendor::order(&sandbox, options.seed);
    }
    Ok(sandbox)
}

fn created(plan: &Plan, sandbox: &Sandbox) -> Vec<Created> {
    let ids = plan.commands.iter().map(|command| &command.id);
    let commands: HashMap<_, _> = ids.map(|id| (marker(id), id.clone())).collect();
    let batches = sandbox.batches().into_iter();
    batches.map(|batch| vendor::created(batch, &commands)).collect()
}

/// What the phases of a soak need.
struct Parts<'a> {
    options: &'a Options,
    plan: &'a Plan,
    book: &'a Book,
    topology: &'a Topology,
    sandbox: &'a Sandbox,
    node: &'a Node,
    postgres: Option<&'a Postgres>,
    ledger_url: &'a str,
}

/// What the phases tell each other.
#[derive(Default)]
struct Signs {
    /// Everything is answered: nothing is to go wrong any more…
    calm: CancellationToken,
    /// …and nothing does.
    is_calm: CancellationToken,
    /// No worker is left.
    retired: CancellationToken,
    /// The last result is in.
    done: CancellationToken,
}

impl Parts<'_> {
    /// Everything that runs at the same time, until the last result is in; what is left then.
    async fn until_the_end(&self) -> anyhow::Result<Leftovers> {
        let Self { options, book, topology, sandbox, node, postgres, .. } = *self;
        let url = options.amqp_url.as_str();
        let listener = Listener { book, topology, url, queue: RESULTS };
        listener.declare().await.context("nothing can be declared at the broker")?;
        let settings = crew::Settings {
            binary: options.worker.clone(),
            environment: self.environment(),
            logs: options.logs.clone(),
            seed: options.seed.rotate_left(32),
        };
        let (crew, working) = Crew::new(options.workers, &settings, book);
        let (seed, workers) = (options.seed.rotate_left(16), options.workers);
        let chaos = Chaos { node, postgres, crew: &crew, sandbox, book, workers, seed };
        let signs = Signs::default();
        let dealing = async {
            if options.faults == Faults::All {
                chaos.deal(&signs.calm).await?;
            }
            signs.is_calm.cancel();
            Ok(())
        };
        let working = async {
            working.await?;
            signs.retired.cancel();
            Ok(())
        };
        let (leftovers, (), (), (), ()) = tokio::try_join!(
            self.direct(&crew, &signs),
            dealing,
            working,
            listener.listen(&signs.done),
            self.tell_progress(&signs.done)
        )?;
        Ok(leftovers)
    }

    /// One phase after the other.
    async fn direct(&self, crew: &Crew, signs: &Signs) -> anyhow::Result<Leftovers> {
        let producer = Producer {
            plan: self.plan,
            book: self.book,
            topology: self.topology,
            url: &self.options.amqp_url,
            duration: SHORTEST.max(Duration::from_secs((self.options.commands / RATE).into())),
            silence: SILENCE,
        };
        producer.publish_all().await?;
        self.until_answered().await;
        signs.calm.cancel();
        signs.is_calm.cancelled().await;
        self.sandbox.clear_faults();
        self.until_empty(&command_queues(self.topology)).await?;
        crew.retire().await;
        signs.retired.cancelled().await;
        // Once more those of commands: a worker's last canary leaves its delay queue by itself.
        let queues = command_queues(self.topology).into_iter().chain([RESULTS.to_owned()]);
        self.until_empty(&queues.collect::<Vec<_>>()).await?;
        let leftovers = self.leftovers().await?;
        signs.done.cancel();
        Ok(leftovers)
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        [
            ("AMQP_URL", self.options.amqp_url.as_str()),
            ("AMQP_PREFIX", PREFIX),
            ("LEDGER_URL", self.ledger_url),
            ("ELEVENLABS_BASE_URL", &self.sandbox.base_url()),
            ("ELEVENLABS_API_KEY", API_KEY),
            // Short, for silence of the vendor to cost a command seconds.
            ("ELEVENLABS_TIMEOUT", "2s"),
            ("ELEVENLABS_CONNECT_TIMEOUT", "1s"),
            ("SETTLING_WINDOW", "2s"),
            ("RETRY_HORIZON", "10m"),
            ("SHUTDOWN_GRACE", "5s"),
            ("HOST", "127.0.0.1"),
            ("PORT", "0"),
            ("LOG_LEVEL", "info"),
            ("LOG_FORMAT", "text"),
        ]
        .map(|(name, value)| (name, value.to_owned()))
        .into()
    }

    /// Until every command has a result, or there is silence.
    async fn until_answered(&self) {
        while self.book.numbers().answered < self.plan.commands.len()
            && self.book.silence() < SILENCE
        {
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Until nothing is in these queues or in the hands of their consumers, or for the limit: what is
    /// left then is found by the judgement.
    async fn until_empty(&self, queues: &[String]) -> anyhow::Result<()> {
        let until = tokio::time::Instant::now() + EMPTYING_LIMIT;
        while tokio::time::Instant::now() < until {
            let full = |(name, messages): &(String, u64)| *messages > 0 && queues.contains(name);
            if !self.node.queues().await?.iter().any(full) {
                break;
            }
            sleep(Duration::from_millis(500)).await;
        }
        Ok(())
    }

    async fn leftovers(&self) -> anyhow::Result<Leftovers> {
        let queues = self.node.queues().await?;
        let messages = |name: &str| {
            queues.iter().filter(|(queue, _)| queue == name).map(|(_, messages)| messages).sum()
        };
        Ok(Leftovers {
            commands: command_queues(self.topology).iter().map(|queue| messages(queue)).sum(),
            dead_letters: messages(&self.topology.dead_letter()),
            unrouted: messages(&self.topology.unrouted()),
        })
    }

    async fn tell_progress(&self, done: &CancellationToken) -> anyhow::Result<()> {
        let mut ticks = interval(PROGRESS);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = done.cancelled() => return Ok(()),
            }
            report::progress(self.book, self.plan, self.sandbox.batches().len())?;
        }
    }
}

/// Every queue in which a command may lie that is not answered yet.
fn command_queues(topology: &Topology) -> Vec<String> {
    let of_kind = |kind| [topology.queue(kind), topology.retry_queue(kind)];
    let mut queues: Vec<_> = CommandKind::ALL.into_iter().flat_map(of_kind).collect();
    queues.extend(Delay::ALL.map(|delay| topology.delay(delay)));
    queues.push(topology.unknown());
    queues
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_queue_is_left_out() {
        let topology = Topology::new(PREFIX);
        let mut looked_at = command_queues(&topology);
        looked_at.extend([topology.dead_letter(), topology.unrouted()]);
        // A canary may stay in its own queue.
        looked_at.push(topology.canary());
        let mut all = topology.queue_names();
        looked_at.sort();
        all.sort();
        assert_eq!(looked_at, all);
    }
}
