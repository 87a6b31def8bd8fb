//! Commands that come back to their queue without having been settled: which of them may be what ends
//! its workers, how many of those are in hand at a time, and when one is given up.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::domain::command::CommandMessage;

/// A command that came back so often may be what ends its workers.
const SUSPECT: u32 = 3;

/// How many of the least suspicious ones may be in hand at a time.
const AT_ONCE: u32 = 16;

/// One that came back so often is not executed any more; the broker's own limit is above it.
const POISON: u32 = 20;

/// How many commands are remembered that this process has had in hand and not settled.
const REMEMBERED: usize = 10_000;

/// What to do with a command that was just delivered.
pub enum Verdict {
    /// Execute it.
    Innocent,
    /// Execute it, alone with few others.
    Suspect(OwnedSemaphorePermit),
    /// Out of this worker's hands, with this count, so that it is not there when the worker ends.
    SetAside(u32),
    /// It came back so often: do not execute it.
    Poison(u32),
}

/// Shared by all lanes.
pub struct Suspects {
    permits: Arc<Semaphore>,
    outlived: Mutex<Outlived>,
}

/// How often this process has had a command in hand that it did not settle, and lives.
#[derive(Default)]
struct Outlived {
    times: HashMap<String, u32>,
    oldest: VecDeque<String>,
}

impl Default for Suspects {
    fn default() -> Self {
        let permits = Arc::new(Semaphore::new(AT_ONCE as usize));
        Self { permits, outlived: Mutex::default() }
    }
}

impl Suspects {
    /// Judges by how often the command came back. The times that this process has outlived do not
    /// count: it was the connection that ended then.
    pub fn judge(&self, message: &CommandMessage) -> Verdict {
        let came_back = message.came_back();
        let outlived = message.producer_id().map_or(0, |id| self.outlived().of(id));
        let deliveries = came_back.saturating_sub(outlived);
        if deliveries >= POISON {
            return Verdict::Poison(deliveries);
        }
        // The next process would not know: a copy goes on with the count that is right.
        if came_back >= SUSPECT && outlived > 0 {
            self.settled(message);
            return Verdict::SetAside(deliveries);
        }
        let Some(more) = deliveries.checked_sub(SUSPECT) else { return Verdict::Innocent };
        // 1, 2, 4, 8, and then all of them: among so many, the one that ends workers is found by halves.
        let weight = 1_u32.checked_shl(more).unwrap_or(AT_ONCE).min(AT_ONCE);
        match Arc::clone(&self.permits).try_acquire_many_owned(weight) {
            Ok(permit) => Verdict::Suspect(permit),
            Err(_) => Verdict::SetAside(deliveries),
        }
    }

    /// It is executed now.
    pub fn begun(&self, message: &CommandMessage) {
        if let Some(id) = message.producer_id() {
            self.outlived().add(id);
        }
    }

    /// It is in this process's hands no more, in order.
    pub fn settled(&self, message: &CommandMessage) {
        if let Some(id) = message.producer_id() {
            self.outlived().times.remove(id);
        }
    }

    fn outlived(&self) -> MutexGuard<'_, Outlived> {
        // A count that a panic elsewhere left out makes a command more suspicious, no more.
        self.outlived.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outlived {
    fn of(&self, id: &str) -> u32 {
        self.times.get(id).copied().unwrap_or_default()
    }

    fn add(&mut self, id: &str) {
        let times = self.times.entry(id.to_owned()).or_default();
        *times += 1;
        if *times == 1 {
            self.oldest.push_back(id.to_owned());
        }
        while self.oldest.len() > REMEMBERED
            && let Some(oldest) = self.oldest.pop_front()
        {
            self.times.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::command::tests::message;

    fn came_back(times: u32) -> CommandMessage {
        CommandMessage { redeliveries: times, ..message("{}") }
    }

    #[test]
    fn the_oftener_it_came_back_the_fewer_are_in_hand_with_it() {
        let suspects = Suspects::default();
        assert!(matches!(suspects.judge(&came_back(2)), Verdict::Innocent));
        let alone = suspects.judge(&came_back(7));
        assert!(matches!(alone, Verdict::Suspect(_)));
        assert!(matches!(suspects.judge(&came_back(3)), Verdict::SetAside(3)));
        drop(alone);
        let few: Vec<_> = (0..20).map(|_| suspects.judge(&came_back(5))).collect();
        assert_eq!(few.iter().filter(|verdict| matches!(verdict, Verdict::Suspect(_))).count(), 4);
        assert!(matches!(suspects.judge(&came_back(20)), Verdict::Poison(20)));
    }

    #[test]
    fn what_this_process_has_outlived_does_not_count() {
        let suspects = Suspects::default();
        let message = came_back(25);
        for _ in 0..24 {
            suspects.begun(&message);
        }
        assert!(matches!(suspects.judge(&message), Verdict::SetAside(1)));
        // The copy has that count; what came before is told no more.
        assert!(matches!(suspects.judge(&message), Verdict::Poison(25)));
        suspects.begun(&message);
        suspects.settled(&message);
        assert!(matches!(suspects.judge(&message), Verdict::Poison(25)));
    }

    #[test]
    fn what_is_remembered_has_a_bound() {
        let mut outlived = Outlived::default();
        for n in 0..2 * REMEMBERED {
            outlived.add(&n.to_string());
        }
        assert_eq!((outlived.times.len(), outlived.oldest.len()), (REMEMBERED, REMEMBERED));
    }
}
