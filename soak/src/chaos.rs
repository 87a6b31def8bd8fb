//! The faults of processes, broker, ledger and connections: dealt one after the other from a shuffled deck.

use std::time::Duration;

use elevenlabs_sandbox::Sandbox;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use rustix::process::Signal;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::book::Book;
use crate::crew::{self, Crew, Order};
use crate::node::Node;
use crate::postgres::{End, Postgres};
use crate::vendor;

/// Milliseconds between the end of one fault and the next.
const PAUSE_MS: std::ops::Range<u64> = 500..3500;
/// Milliseconds a worker stands still.
const STANDSTILL_MS: std::ops::Range<u64> = 1000..4000;
/// Milliseconds that PostgreSQL is away.
const AWAY_MS: std::ops::Range<u64> = 200..3000;

/// The event of an orderly restart of the broker.
pub const BROKER_RESTARTED: &str = "SIGTERM and start of the broker";
/// The event of a restart after a kill.
pub const BROKER_KILLED: &str = "SIGKILL and start of the broker";
/// The event of an orderly restart of PostgreSQL.
pub const POSTGRES_RESTARTED: &str = "SIGINT and start of PostgreSQL";
/// The event of a restart after a kill.
pub const POSTGRES_KILLED: &str = "SIGKILL and start of PostgreSQL";
/// The event of the broker's closing every connection.
pub const CONNECTIONS_CLOSED: &str = "close_all_connections";
/// The event of the vendor's losing several requests in a row.
pub const VENDOR_CUT: &str = "cuts of the vendor's connections";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Card {
    KillWorker,
    StopWorker,
    PauseWorker,
    CloseConnections,
    RestartBroker,
    KillBroker,
    RestartPostgres,
    KillPostgres,
    CutVendor,
}

impl Card {
    /// A broker that starts takes most of the time of a soak, so it is dealt least.
    const DECK: [Self; 18] = [
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
        Self::RestartPostgres,
        Self::KillPostgres,
        Self::CutVendor,
        Self::CutVendor,
    ];

    /// Dealt before any deck, in an order of its own: a short soak has every kind of fault, whatever its
    /// seed.
    const FIRST: [Self; 12] = [
        Self::KillWorker,
        Self::KillWorker,
        Self::StopWorker,
        Self::StopWorker,
        Self::PauseWorker,
        Self::PauseWorker,
        Self::CloseConnections,
        Self::RestartBroker,
        Self::KillBroker,
        Self::RestartPostgres,
        Self::KillPostgres,
        Self::CutVendor,
    ];

    /// What it is counted as.
    const fn event(self) -> &'static str {
        match self {
            Self::KillWorker => crew::KILLED,
            Self::StopWorker => crew::STOPPED,
            Self::PauseWorker => crew::PAUSED,
            Self::CloseConnections => CONNECTIONS_CLOSED,
            Self::RestartBroker => BROKER_RESTARTED,
            Self::KillBroker => BROKER_KILLED,
            Self::RestartPostgres => POSTGRES_RESTARTED,
            Self::KillPostgres => POSTGRES_KILLED,
            Self::CutVendor => VENDOR_CUT,
        }
    }

    /// What happens to a worker is counted where it happens.
    const fn is_of_a_worker(self) -> bool {
        matches!(self, Self::KillWorker | Self::StopWorker | Self::PauseWorker)
    }

    /// These cards in a random order, without those for which there is no PostgreSQL.
    fn shuffled(cards: &[Self], has_postgres: bool, random: &mut StdRng) -> Vec<Self> {
        let of_postgres = [Self::RestartPostgres, Self::KillPostgres];
        let cards = cards.iter().filter(|card| has_postgres || !of_postgres.contains(card));
        let mut cards: Vec<_> = cards.copied().collect();
        cards.shuffle(random);
        cards
    }
}

pub struct Chaos<'a> {
    pub node: &'a Node,
    /// Of several workers.
    pub postgres: Option<&'a Postgres>,
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
        let has_postgres = self.postgres.is_some();
        let mut deck = Card::shuffled(&Card::FIRST, has_postgres, &mut random);
        loop {
            let pause = Duration::from_millis(random.random_range(PAUSE_MS));
            tokio::select! {
                () = sleep(pause) => {}
                () = enough.cancelled() => return Ok(()),
            }
            if deck.is_empty() {
                deck = Card::shuffled(&Card::DECK, has_postgres, &mut random);
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
            Card::RestartPostgres => self.restart_postgres(End::Stop, random).await?,
            Card::KillPostgres => self.restart_postgres(End::Kill, random).await?,
            Card::CutVendor => vendor::cut(self.sandbox, random.random()),
        }
        if !card.is_of_a_worker() {
            self.book.count(card.event());
        }
        Ok(())
    }

    async fn restart_postgres(&self, end: End, random: &mut StdRng) -> anyhow::Result<()> {
        let away = Duration::from_millis(random.random_range(AWAY_MS));
        let Some(postgres) = self.postgres else { return Ok(()) };
        postgres.restart(end, away).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::{OF_POSTGRES, OF_PROCESSES};

    #[test]
    fn the_first_hand_has_all_that_is_demanded() {
        let demanded = || OF_PROCESSES.into_iter().chain(OF_POSTGRES);
        for (event, least) in demanded() {
            let dealt = Card::FIRST.iter().filter(|card| card.event() == event).count();
            assert!(dealt >= usize::try_from(least).unwrap(), "{event}");
            assert!(Card::DECK.iter().any(|card| card.event() == event), "{event}");
        }
        for card in Card::DECK {
            assert!(demanded().any(|(event, _)| event == card.event()), "{card:?}");
        }
    }

    #[test]
    fn where_there_is_no_postgres_no_card_is_of_it() {
        let mut random = StdRng::seed_from_u64(7);
        let mut events = |has_postgres| {
            let cards = Card::shuffled(&Card::DECK, has_postgres, &mut random);
            cards.into_iter().map(Card::event).collect::<Vec<_>>()
        };
        let (with, without) = (events(true), events(false));
        for (event, _) in OF_POSTGRES {
            assert!(with.contains(&event) && !without.contains(&event));
        }
        assert_eq!(with.len(), without.len() + OF_POSTGRES.len());
    }
}
