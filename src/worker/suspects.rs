//! Commands that come back to their queue without having been settled: which of them may be what ends
//! its workers, how many of those are in hand at a time, and when one is given up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::domain::command::{CommandKind, CommandMessage};

/// A command that came back so often may be what ends its workers.
const SUSPECT: u32 = 3;

/// How many of the least suspicious ones may be in hand at a time.
const AT_ONCE: u32 = 16;

/// One that came back so often is not executed any more; the broker's own limit is above it.
const POISON: u32 = 20;

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
    /// How often each lane has given back all it had, and this process lives.
    returns: [AtomicU32; CommandKind::ALL.len()],
}

impl Default for Suspects {
    fn default() -> Self {
        let permits = Arc::new(Semaphore::new(AT_ONCE as usize));
        Self { permits, returns: Default::default() }
    }
}

impl Suspects {
    /// Judges by how often the command came back. The times that its lane gave back what it had do not
    /// count: it was the connection that ended then, and the broker counts also what nobody has begun.
    pub fn judge(&self, message: &CommandMessage) -> Verdict {
        let came_back = message.came_back();
        let outlived =
            self.returns(message.queue).load(Ordering::Relaxed).min(message.redeliveries);
        let deliveries = came_back - outlived;
        if deliveries >= POISON {
            return Verdict::Poison(deliveries);
        }
        // The next process would not know: a copy goes on with the count that is right.
        if came_back >= SUSPECT && outlived > 0 {
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

    /// What this lane had been delivered goes back to its queues, and this process lives.
    pub fn returned(&self, kind: CommandKind) {
        self.returns(kind).fetch_add(1, Ordering::Relaxed);
    }

    fn returns(&self, kind: CommandKind) -> &AtomicU32 {
        &self.returns[kind as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Earlier;
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
            suspects.returned(message.queue);
        }
        assert!(matches!(suspects.judge(&message), Verdict::SetAside(1)));
        // The copy has that count, and was never with a lane that ended.
        let earlier = Earlier::default().set_aside(20);
        let copy = CommandMessage { redeliveries: 0, earlier, ..message.clone() };
        assert!(matches!(suspects.judge(&copy), Verdict::Poison(20)));
        let elsewhere = CommandMessage { queue: CommandKind::Get, ..message };
        assert!(matches!(suspects.judge(&elsewhere), Verdict::Poison(25)));
    }
}
