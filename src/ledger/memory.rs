//! A ledger that lives as long as the process: it makes a redelivery harmless while the worker
//! runs, not across a restart.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use uuid::Uuid;

use crate::domain::result::ResultEvent;

/// How many finished submits are remembered; the oldest is forgotten first.
const REMEMBERED: usize = 10_000;

/// The answer to "may I execute this submit?".
pub enum Claim {
    /// Nobody has it: the caller executes it and settles it.
    Fresh(Fresh),
    /// Another task of this process has it in hand.
    Held(Held),
    /// It is done: this is its result.
    Settled(Arc<ResultEvent>),
    /// A task had it and ended without saying whether its request left.
    Abandoned,
    /// The id belongs to a submit with another body.
    Conflict,
}

/// One row per submit, keyed by command id.
#[derive(Default)]
pub struct Memory {
    rows: Mutex<Rows>,
}

#[derive(Default)]
struct Rows {
    by_id: HashMap<String, Row>,
    finished: VecDeque<String>,
}

struct Row {
    fingerprint: Uuid,
    state: State,
}

enum State {
    Held(watch::Receiver<()>),
    Settled(Arc<ResultEvent>),
    Abandoned,
}

impl Memory {
    /// Claims a submit. A second claim while the first is in hand gets [`Claim::Held`].
    pub fn claim(self: &Arc<Self>, command_id: &str, fingerprint: Uuid) -> Claim {
        let mut rows = self.lock();
        if let Some(row) = rows.by_id.get(command_id) {
            if row.fingerprint != fingerprint {
                return Claim::Conflict;
            }
            return match &row.state {
                State::Held(freed) => Claim::Held(Held(freed.clone())),
                State::Settled(result) => Claim::Settled(Arc::clone(result)),
                State::Abandoned => Claim::Abandoned,
            };
        }
        let (holding, freed) = watch::channel(());
        rows.by_id.insert(command_id.to_owned(), Row { fingerprint, state: State::Held(freed) });
        Claim::Fresh(Fresh {
            ledger: Arc::clone(self),
            command_id: command_id.to_owned(),
            let_go: false,
            _holding: holding,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Rows> {
        // A row is written in one step, so a panic elsewhere leaves none half-written.
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn finish(&self, command_id: &str, state: State) {
        let mut rows = self.lock();
        if let Some(row) = rows.by_id.get_mut(command_id)
            && matches!(row.state, State::Held(_))
        {
            row.state = state;
            rows.finished.push_back(command_id.to_owned());
            if rows.finished.len() > REMEMBERED
                && let Some(oldest) = rows.finished.pop_front()
            {
                rows.by_id.remove(&oldest);
            }
        }
    }
}

/// The right to execute a submit. Dropped without a word, it leaves the submit abandoned: its
/// request may have left.
pub struct Fresh {
    ledger: Arc<Memory>,
    command_id: String,
    /// The row is another claim's from here on: a drop must not touch it.
    let_go: bool,
    _holding: watch::Sender<()>,
}

impl Fresh {
    /// The submit is done, this way or that.
    pub fn settle(mut self, result: Arc<ResultEvent>) {
        self.let_go = true;
        self.ledger.finish(&self.command_id, State::Settled(result));
    }

    /// Nothing was sent: whoever comes next may start anew.
    pub fn release(mut self) {
        self.let_go = true;
        self.ledger.lock().by_id.remove(&self.command_id);
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        if !self.let_go {
            self.ledger.finish(&self.command_id, State::Abandoned);
        }
    }
}

/// Waits for the task that has the submit in hand.
pub struct Held(watch::Receiver<()>);

impl Held {
    /// Returns when the other task has let go, whichever way: claim again.
    pub async fn freed(mut self) {
        // Nothing is ever sent: the only event is that the holder is gone.
        while self.0.changed().await.is_ok() {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::value::RawValue;

    use crate::domain::command::tests::message;
    use crate::domain::result::{Outcome, ResultOf};

    use super::*;

    const BODY: Uuid = Uuid::from_u128(1);

    fn result() -> Arc<ResultEvent> {
        let message = message("");
        let outcome = Outcome::Succeeded {
            data: RawValue::from_string("{}".into()).unwrap(),
            batch_id: "b".into(),
            warning: None,
        };
        Arc::new(ResultEvent::new(&message, "c", ResultOf::Command, outcome, 1))
    }

    fn fresh(ledger: &Arc<Memory>, id: &str) -> Fresh {
        match ledger.claim(id, BODY) {
            Claim::Fresh(fresh) => fresh,
            _ => panic!("{id} is not fresh"),
        }
    }

    #[tokio::test]
    async fn a_second_claim_waits_and_then_gets_the_stored_result() {
        let ledger = Arc::new(Memory::default());
        let first = fresh(&ledger, "c");
        let Claim::Held(held) = ledger.claim("c", BODY) else {
            panic!("the first claim is still in hand");
        };
        first.settle(result());
        held.freed().await;
        assert!(matches!(ledger.claim("c", BODY), Claim::Settled(_)));
    }

    #[test]
    fn another_body_is_a_conflict_in_every_state() {
        let ledger = Arc::new(Memory::default());
        let other = Uuid::from_u128(2);
        let first = fresh(&ledger, "c");
        assert!(matches!(ledger.claim("c", other), Claim::Conflict));
        first.settle(result());
        assert!(matches!(ledger.claim("c", other), Claim::Conflict));
    }

    #[test]
    fn a_released_claim_can_be_taken_again_and_a_dropped_one_is_abandoned() {
        let ledger = Arc::new(Memory::default());
        fresh(&ledger, "c").release();
        let second = fresh(&ledger, "c");
        assert!(matches!(ledger.claim("c", BODY), Claim::Held(_)), "the first has let go of it");
        drop(second);
        assert!(matches!(ledger.claim("c", BODY), Claim::Abandoned));
    }

    #[test]
    fn the_oldest_finished_submits_are_forgotten_and_those_in_hand_never() {
        let ledger = Arc::new(Memory::default());
        let in_hand = fresh(&ledger, "in hand");
        for n in 0..=REMEMBERED {
            fresh(&ledger, &n.to_string()).settle(result());
        }
        assert!(matches!(ledger.claim("1", BODY), Claim::Settled(_)));
        assert!(matches!(ledger.claim("0", BODY), Claim::Fresh(_)));
        assert!(matches!(ledger.claim("in hand", BODY), Claim::Held(_)));
        drop(in_hand);
    }
}
