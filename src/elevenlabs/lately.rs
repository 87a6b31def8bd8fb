//! Which batches the list has shown lately: a reading that leaves out one of them proves nothing.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::evidence::Listed;

/// A batch that was not shown for so long may have been deleted.
const KEPT: Duration = Duration::from_secs(5 * 60);

/// How many batches are remembered: some 3 MB. A list with more is believed without the rest.
const REMEMBERED: usize = 20_000;

/// The batches that readings have shown, of every agent.
#[derive(Default)]
pub(super) struct Lately {
    by_batch: HashMap<Arc<str>, Shown>,
}

struct Shown {
    agent_id: Arc<str>,
    /// By the vendor's clock, in seconds.
    created_at: i64,
    first: Instant,
    last: Instant,
}

impl Lately {
    /// A reading shows this batch. One without a time may be older than what is read.
    pub(super) fn note(&mut self, agent_id: &Arc<str>, listed: &Listed) {
        let Some(created_at) = listed.created_at() else { return };
        let now = Instant::now();
        if let Some(shown) = self.by_batch.get_mut(&*listed.id) {
            shown.last = now;
            return;
        }
        if self.by_batch.len() >= REMEMBERED {
            self.by_batch.retain(|_, shown| now.duration_since(shown.last) < KEPT);
        }
        if self.by_batch.len() < REMEMBERED {
            let agent_id = Arc::clone(agent_id);
            let shown = Shown { agent_id, created_at, first: now, last: now };
            self.by_batch.insert(listed.id.as_str().into(), shown);
        }
    }

    /// When the newest batch of the agent was created that is not among these, and was shown before the
    /// reading began.
    pub(super) fn newest_left_out(
        &self,
        agent_id: &str,
        read: &HashSet<String>,
        began: Instant,
    ) -> Option<i64> {
        let now = Instant::now();
        let left_out = self.by_batch.iter().filter(|(batch_id, shown)| {
            *shown.agent_id == *agent_id
                && shown.first < began
                && now.duration_since(shown.last) < KEPT
                && !read.contains(&***batch_id)
        });
        left_out.map(|(_, shown)| shown.created_at).max()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// After the earliest second that a batch can have.
    const BEGIN: i64 = 1_900_000_000;

    fn listed(id: &str, after: i64) -> Listed {
        serde_json::from_value(json!({"id": id, "created_at_unix": BEGIN + after})).unwrap()
    }

    #[test]
    fn what_was_shown_before_a_reading_has_to_be_in_it() {
        let (mut lately, agent) = (Lately::default(), Arc::from("a"));
        lately.note(&agent, &listed("old", 10));
        lately.note(&agent, &listed("b", 100));
        let began = Instant::now();
        lately.note(&agent, &listed("new", 200));
        let read = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<HashSet<_>>();
        let left_out = |agent, ids: &[&str]| lately.newest_left_out(agent, &read(ids), began);
        assert_eq!(left_out("a", &["old"]), Some(BEGIN + 100), "what is new came meanwhile");
        assert_eq!(left_out("a", &["b"]), Some(BEGIN + 10), "older than some looks go back");
        assert_eq!(left_out("a", &["b", "old"]), None);
        assert_eq!(left_out("other", &[]), None);
    }

    #[test]
    fn what_was_not_shown_for_long_may_be_deleted() {
        let (mut lately, agent) = (Lately::default(), Arc::from("a"));
        lately.note(&agent, &listed("b", 100));
        for shown in lately.by_batch.values_mut() {
            shown.last = shown.last.checked_sub(KEPT).expect("the clock goes back so far");
        }
        assert_eq!(lately.newest_left_out("a", &HashSet::new(), Instant::now()), None);
    }
}
