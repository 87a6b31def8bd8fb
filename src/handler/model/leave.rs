//! How a worker of the model parts with the submit, and with its life.

use super::names::NEW;
use super::work::{Copy, Outcome, Phase, Task};
use super::world::World;
use crate::ledger::op::Op;

impl World {
    /// Ends the task; its message, if the broker does not have it back already, comes again as `copy` says.
    pub fn leave(&mut self, worker: usize, copy: impl FnOnce(Copy) -> Copy) -> Option<Task> {
        let task = self.workers[worker].task.take()?;
        if let Some(of_task) = task.copy.filter(|_| !task.returned) {
            self.give_back(copy(of_task));
        }
        Some(task)
    }

    pub fn release(&mut self, task: &Task, may_have_left: bool) {
        let (token, attempts) = (task.token, task.attempts);
        self.ask(Op::Release { token, may_have_left, attempts });
    }

    pub fn publish(&mut self, worker: usize) -> Option<()> {
        let task = self.workers[worker].task.as_mut()?;
        let Phase::Over(outcome) = task.phase else { return None };
        task.phase = Phase::Published;
        if !task.of_row {
            return Some(());
        }
        self.results.insert(outcome);
        let own = |copy: Copy| self.batches.iter().any(|batch| batch.is_other == copy.is_other);
        let is_own = task.copy.is_none_or(own);
        self.mixed_up |= outcome == Outcome::Succeeded && !is_own;
        Some(())
    }

    pub fn acknowledge(&mut self, worker: usize) -> Option<()> {
        let task = self.workers[worker].task.take()?;
        if task.of_row {
            self.ask(Op::Published);
        }
        Some(())
    }

    pub fn lose_connection(&mut self, worker: usize) -> Option<()> {
        self.left.lost_connections -= 1;
        let task = self.workers[worker].task.as_mut()?;
        task.returned = true;
        let copy = task.copy?;
        self.give_back(Copy { came_back: true, ..copy });
        Some(())
    }

    /// In order: what is in hand goes back. A request that is under way is not waited for.
    pub fn stop(&mut self, worker: usize) -> Option<()> {
        self.left.stops -= 1;
        let task = self.leave(worker, |copy| Copy { came_back: true, ..copy })?;
        self.release(&task, task.in_doubt || task.phase == Phase::Waiting);
        self.restart(worker);
        Some(())
    }

    pub fn kill(&mut self, worker: usize, changes_key: bool) -> Option<()> {
        self.left.kills -= 1;
        self.leave(worker, |copy| Copy { came_back: true, ..copy })?;
        self.restart(worker);
        if changes_key {
            self.left.changed_keys -= 1;
            for worker in &mut self.workers {
                worker.key = 1;
            }
        }
        Some(())
    }

    fn restart(&mut self, worker: usize) {
        if !self.left.restarts_as_itself {
            self.workers[worker].id = NEW;
        }
    }
}
