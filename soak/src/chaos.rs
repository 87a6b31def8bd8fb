//! The faults of processes, broker and connections: dealt one after the other from a shuffled deck.

use std::time::Duration;

use elevenlabs_sandbox::Sandbox;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use rustix::process::Signal;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::book::Book;
use crate::crew::{Crew, Order};
use crate::node::Node;
use crate::vendor;

/// Milliseconds between the end of one fault and the next.
const PAUSE_MS: std::ops::Range<u64> = 500..3500;
/// Milliseconds a worker stands still.
const STANDSTILL_MS: std::ops::Range<u64> = 1000..4000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Card {
    KillWorker,
    StopWorker,
    PauseWorker,
    CloseConnections,
    RestartBroker,
    KillBroker,
    CutVendor,
}

impl Card {
    /// A broker that starts takes most of the time of a soak, so it is dealt least.
    const DECK: [Self; 16] = [
        Self::KillWorker,
        Self::KillWorker,
        Self::KillWorker,
        Self::KillWorker,
        Self::StopWorker,
        Self::StopWorker,
        Self::StopWorker,
        Self::PauseWorker,
        Self::PauseWorker,
        Self::PauseWorker,
        Self::CloseConnections,
        Self::CloseConnections,
        Self::RestartBroker,
        Self::KillBroker,
        Self::CutVendor,
        Self::CutVendor,
    ];

    /// What is counted here; a worker's end is counted where it happens.
    const fn event(self) -> Option<&'static str> {
        match self {
            Self::KillWorker | Self::StopWorker | Self::PauseWorker => None,
            Self::CloseConnections => Some("close_all_connections"),
            Self::RestartBroker => Some("SIGTERM and start of the broker"),
            Self::KillBroker => Some("SIGKILL and start of the broker"),
            Self::CutVendor => Some("cuts of the vendor's connections"),
        }
    }
}

pub struct Chaos<'a> {
    pub node: &'a Node,
    pub crew: &'a Crew,
    pub sandbox: &'a Sandbox,
    pub book: &'a Book,
    pub workers: u16,
    pub seed: u64,
}

impl Chaos<'_> {
    /// Deals until it was enough; the broker runs when it returns.
    pub async fn deal(&self, enough: &CancellationToken) -> anyhow::Result<()> {
        let mut random = StdRng::seed_from_u64(self.seed);
        let mut deck = Vec::new();
        loop {
            let pause = Duration::from_millis(random.random_range(PAUSE_MS));
            tokio::select! {
                () = sleep(pause) => {}
                () = enough.cancelled() => return Ok(()),
            }
            if deck.is_empty() {
                deck.extend(Card::DECK);
                deck.shuffle(&mut random);
            }
            if let Some(card) = deck.pop() {
                self.play(card, &mut random).await?;
            }
        }
    }

    async fn play(&self, card: Card, random: &mut StdRng) -> anyhow::Result<()> {
        let worker = random.random_range(0..usize::from(self.workers));
        let standstill = Duration::from_millis(random.random_range(STANDSTILL_MS));
        match card {
            Card::KillWorker => self.crew.order(worker, Order::Kill).await,
            Card::StopWorker => self.crew.order(worker, Order::Terminate).await,
            Card::PauseWorker => self.crew.order(worker, Order::Pause(standstill)).await,
            Card::CloseConnections => self.node.close_all_connections().await?,
            Card::RestartBroker => {
                self.node.end(Signal::TERM).await?;
                self.node.start().await?;
            }
            Card::KillBroker => {
                self.node.end(Signal::KILL).await?;
                self.node.start().await?;
            }
            Card::CutVendor => vendor::cut(self.sandbox, random.random()),
        }
        if let Some(event) = card.event() {
            self.book.count(event);
        }
        Ok(())
    }
}
