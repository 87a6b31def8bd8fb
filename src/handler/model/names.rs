//! Worlds that differ only in who is called what, or in an order that means nothing, are one.

use uuid::Uuid;

use super::world::World;
use crate::ledger::op::Op;
use crate::ledger::row::State;

/// A name that nobody has yet.
pub const NEW: Uuid = Uuid::max();

/// Names by the order in which they are met.
#[derive(Default)]
struct Names(Vec<Uuid>);

impl Names {
    fn rename(&mut self, name: &mut Uuid) {
        let known = self.0.iter().position(|known| known == name);
        let number = known.unwrap_or_else(|| {
            self.0.push(*name);
            self.0.len() - 1
        });
        *name = Uuid::from_u128(number as u128 + 1);
    }
}

impl World {
    /// Gives the world its one form.
    pub fn rename(&mut self) {
        self.sort_workers();
        let (mut workers, mut tokens) = (Names::default(), Names::default());
        for worker in &mut self.workers {
            workers.rename(&mut worker.id);
            worker.task.iter_mut().for_each(|task| tokens.rename(&mut task.token));
        }
        if let Some(State::InHand(hold)) = self.row.as_mut().map(|row| &mut row.state) {
            workers.rename(&mut hold.worker);
            tokens.rename(&mut hold.token);
        }
        self.batches.iter_mut().for_each(|batch| tokens.rename(&mut batch.token));
        self.sent.iter_mut().for_each(|sent| tokens.rename(&mut sent.token));
        for op in &mut self.late {
            match op {
                Op::Claim { token, worker, .. } => {
                    tokens.rename(token);
                    workers.rename(worker);
                }
                Op::Condemn { worker, .. } => workers.rename(worker),
                Op::Renew { token, .. } | Op::Settle { token, .. } | Op::Release { token, .. } => {
                    tokens.rename(token);
                }
                Op::Find { .. } | Op::Published | Op::Cancelled => {}
            }
        }
        self.copies.sort_unstable();
        self.sent.sort_unstable();
    }

    fn sort_workers(&mut self) {
        let holder = match self.row.as_ref().map(|row| &row.state) {
            Some(State::InHand(hold)) => hold.worker,
            _ => NEW,
        };
        self.workers
            .sort_by_cached_key(|worker| (worker.task.clone(), worker.key, worker.id != holder));
    }
}
