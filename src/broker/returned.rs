//! Which messages the broker has returned because no queue takes them, by their `message_id`.
//!
//! lapin credits a return to whichever confirm it handles next. With many in flight that is another
//! message's, and the one that was lost counts as taken. The broker sends a return before the confirm of
//! its message, so what the inbound filter notes is there when that confirm is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The returns on one channel of a connection. All clones see the same.
#[derive(Clone, Debug, Default)]
pub struct Returned(Arc<Mutex<Noted>>);

#[derive(Debug, Default)]
struct Noted {
    /// 0, the connection's own, has no messages.
    channel: u16,
    /// How often each was returned and not asked for.
    times: HashMap<String, u32>,
}

impl Returned {
    /// Notes what is returned on this channel.
    pub fn watch(&self, channel: u16) {
        self.noted().channel = channel;
    }

    /// A message was returned.
    pub fn note(&self, channel: u16, message_id: &str) {
        let mut noted = self.noted();
        if noted.channel == channel {
            *noted.times.entry(message_id.to_owned()).or_default() += 1;
        }
    }

    /// Whether a message that is confirmed was returned before; to be asked once for each.
    pub fn take(&self, message_id: &str) -> bool {
        let mut noted = self.noted();
        let Some(times) = noted.times.get_mut(message_id) else { return false };
        *times -= 1;
        if *times == 0 {
            noted.times.remove(message_id);
        }
        true
    }

    fn noted(&self) -> MutexGuard<'_, Noted> {
        // Each change is one step, so a panic elsewhere leaves none half-done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_return_on_the_channel_is_told_once() {
        let returned = Returned::default();
        returned.watch(2);
        for (channel, id) in [(2, "a"), (2, "a"), (3, "b")] {
            returned.note(channel, id);
        }
        let told = ["a", "a", "a", "b"].map(|id| returned.take(id));
        assert_eq!(told, [true, true, false, false]);
    }
}
