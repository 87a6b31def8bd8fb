//! What a submit is finished with when its message does not come back: the ledger keeps it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::domain::Earlier;
use crate::domain::command::{CommandKind, CommandMessage, Submit};
use crate::elevenlabs::{Numbers, SearchKey};

/// What the result needs, and the search for the batch. Its JSON is what later versions read, too.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Origin {
    correlation_id: Option<String>,
    reply_to: Option<String>,
    traceparent: Option<String>,
    tracestate: Option<String>,
    /// Unix milliseconds, past which it is not begun.
    deadline_ms: Option<u64>,
    /// Unix seconds, from which on the batch calls, where the command says so.
    pub begins_at: Option<i64>,
    /// The provider that the command expects.
    pub phone_provider: Option<String>,
    /// What its batch is recognised by.
    pub search: SearchKey,
}

impl Origin {
    /// Of a checked submit.
    pub fn new(message: &CommandMessage, command_id: &str, submit: &Submit) -> Self {
        let numbers = submit.recipients.iter().map(|recipient| recipient.phone_number.as_str());
        let begins_at = submit.scheduled_time_unix.as_ref();
        Self {
            correlation_id: message.correlation_id.clone(),
            reply_to: message.reply_to.clone(),
            traceparent: message.traceparent.clone(),
            tracestate: message.tracestate.clone(),
            deadline_ms: message.begin_before().map(millis),
            begins_at: begins_at.and_then(|raw| seconds(raw.get())),
            phone_provider: submit.phone_provider.clone(),
            search: SearchKey {
                command_id: command_id.to_owned(),
                agent_id: submit.agent_id.clone(),
                name: submit.call_name.clone(),
                numbers: Numbers::of(command_id, numbers),
            },
        }
    }

    /// As the ledger keeps it.
    pub fn to_json(&self) -> Arc<str> {
        // Text, numbers and options written into memory have no way to fail.
        serde_json::to_string(self).unwrap_or_default().into()
    }

    /// `None` where a version wrote it that is not known.
    pub fn read(json: &str) -> Option<Self> {
        serde_json::from_str(json).ok()
    }

    /// Past when the submit is not begun.
    pub fn deadline(&self) -> Option<SystemTime> {
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(self.deadline_ms?))
    }
}

/// Stands for the message of a submit that does not come back: what its result is made of. A submit
/// of whose origin nothing is known is answered under its own id.
pub fn stand_in(command_id: &str, origin: Option<&Origin>) -> CommandMessage {
    let of = |read: fn(&Origin) -> &Option<String>| origin.and_then(|origin| read(origin).clone());
    CommandMessage {
        queue: CommandKind::Submit,
        routing_key: None,
        message_id: Some(command_id.to_owned()),
        correlation_id: of(|origin| &origin.correlation_id),
        content_type: None,
        content_encoding: None,
        traceparent: of(|origin| &origin.traceparent),
        tracestate: of(|origin| &origin.tracestate),
        reply_to: of(|origin| &origin.reply_to),
        not_after: None,
        refused_header: None,
        expires_at: None,
        redeliveries: 0,
        earlier: Earlier::default(),
        body: Vec::new(),
    }
}

/// JSON has many ways to write a whole number: `1900000000.0`, `1.9e9`.
fn seconds(json: &str) -> Option<i64> {
    let seconds: f64 = json.trim().parse().ok()?;
    #[expect(clippy::cast_possible_truncation, reason = "far below the limit of i64")]
    (seconds.abs() < 1e15).then_some(seconds as i64)
}

fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scheduled_time_is_read_however_json_writes_it() {
        for json in ["1900000000", "1900000000.0", "1.9e9", " 19E8 "] {
            assert_eq!(seconds(json), Some(1_900_000_000), "{json}");
        }
        for json in ["null", "\"soon\"", "1e300"] {
            assert_eq!(seconds(json), None, "{json}");
        }
    }
}
