//! What a batch says about being the one of a submit in doubt: that it is, that it is not, or nothing.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::domain::command::marker;

use super::names;
use super::numbers::Numbers;
use super::wire::is_object;

/// Seconds.
const DAY: i64 = 24 * 60 * 60;
const HOUR: i64 = 60 * 60;

/// A time that is a multiple of one of these may have been cut to it.
const CUTS: [i64; 2] = [DAY, HOUR];

/// 2020: there were no batches before. A number below is no time of one.
const FIRST_BATCH: f64 = 1_577_836_800.0;

/// What the batch of a submit is recognised by. Its JSON is kept in ledgers.
#[derive(Clone, Serialize, Deserialize)]
pub struct SearchKey {
    /// Whose [`marker`] every recipient carries.
    pub command_id: String,
    /// The list is filtered by it.
    pub agent_id: String,
    /// `call_name`.
    pub name: String,
    /// Whom it calls.
    pub numbers: Numbers,
}

impl std::fmt::Debug for SearchKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SearchKey").field("command_id", &self.command_id).finish_non_exhaustive()
    }
}

/// A batch as the list shows it. Every field but the id may be missing, or of another type.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Listed {
    pub id: String,
    #[serde(default)]
    pub name: Value,
    #[serde(default)]
    pub agent_id: Value,
    #[serde(default)]
    pub created_at_unix: Value,
}

impl Listed {
    /// Unix seconds, where they can be read.
    pub fn created_at(&self) -> Option<i64> {
        let seconds = match &self.created_at_unix {
            Value::Number(number) => number.as_f64(),
            Value::String(text) => text.trim().parse().ok(),
            _ => None,
        }?;
        // From 5138 on, it can only be milliseconds.
        let seconds = if seconds >= 1e11 { seconds / 1e3 } else { seconds };
        #[expect(clippy::cast_possible_truncation, reason = "a year far below that of i64")]
        (FIRST_BATCH..1e11).contains(&seconds).then_some(seconds as i64)
    }

    /// Whether it was surely created before the second `since`. A time may be cut to its hour or day.
    pub fn is_older_than(&self, since: i64) -> bool {
        let latest = |created: i64| {
            let cut = CUTS.into_iter().find(|unit| created % unit == 0);
            created.saturating_add(cut.unwrap_or(0))
        };
        self.created_at().is_some_and(|created| latest(created) < since)
    }

    /// Whether its recipients have to be read before anything else that is shown can rule it out: their
    /// marker says more than a name or a time, which may be masked or shifted by a time zone.
    pub fn is_worth_reading(&self, key: &SearchKey, since: i64) -> bool {
        !self.is_older_than(since)
            || !self.is_older_than(since.saturating_sub(DAY)) && self.has_name_of(key)
    }

    fn has_name_of(&self, key: &SearchKey) -> bool {
        names::could_be(&key.name, self.name.as_str())
    }

    /// Whether what the list shows rules it out, where no marker can be read: another agent, another
    /// name, or too old.
    pub fn is_anothers(&self, key: &SearchKey, since: i64) -> bool {
        let agent = self.agent_id.as_str().map(str::trim).filter(|agent| !agent.is_empty());
        let other_agent = agent.is_some_and(|agent| {
            !names::is_masked(agent) && !agent.eq_ignore_ascii_case(key.agent_id.trim())
        });
        other_agent || self.is_older_than(since) || !self.has_name_of(key)
    }
}

/// What the recipients of a batch show.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Shown {
    /// The values of the marker that could be read, trimmed.
    pub markers: Vec<String>,
    /// Phone numbers, as they are written.
    numbers: Vec<String>,
}

/// What a batch is to a submit.
#[derive(Debug, PartialEq)]
pub(super) enum Judgement {
    Ours,
    Anothers,
    Undecided,
}

impl Shown {
    /// Reads a batch with its recipients, whatever of it is missing; `None` where it is no batch.
    pub fn read(json: &str) -> Option<Self> {
        let batch: Detailed<'_> = serde_json::from_str(json).ok().filter(|_| is_object(json))?;
        let recipients = batch.recipients.map_or("[]", RawValue::get);
        let recipients: Vec<&RawValue> = serde_json::from_str(recipients).unwrap_or_default();
        let mut shown = Self::default();
        for recipient in recipients {
            let Ok(recipient) = serde_json::from_str::<Recipient<'_>>(recipient.get()) else {
                continue;
            };
            match recipient.phone_number {
                Value::String(number) => shown.numbers.push(number),
                // One with a fraction or an exponent was retyped, who knows how.
                Value::Number(number) if number.is_u64() => shown.numbers.push(number.to_string()),
                _ => {}
            }
            let marker = recipient.conversation_initiation_client_data.and_then(marker_in);
            if let Some(marker) = marker.filter(|marker| !shown.markers.contains(marker)) {
                shown.markers.push(marker);
            }
        }
        Some(shown)
    }

    /// The marker of the command that it belongs to.
    pub fn owner(&self) -> Option<&str> {
        let mut markers = self.markers.iter().filter(|marker| is_marker(marker));
        markers.next().map(String::as_str)
    }

    /// Judges it. How many recipients there are proves nothing: they may appear over time.
    pub fn judge(&self, key: &SearchKey) -> Judgement {
        let own = marker(&key.command_id);
        let is_own = |shown: &String| {
            // The former version wrote the id as it was.
            shown.eq_ignore_ascii_case(&own) || *shown == key.command_id
        };
        if self.markers.iter().any(is_own) {
            Judgement::Ours
        } else if self.markers.iter().any(|shown| is_marker(shown)) || self.calls_others(key) {
            Judgement::Anothers
        } else {
            Judgement::Undecided
        }
    }

    fn calls_others(&self, key: &SearchKey) -> bool {
        self.numbers.iter().any(|number| key.numbers.excludes(&key.command_id, number))
    }
}

/// The text of the marker's variable in a recipient's or a conversation's client data, trimmed.
pub(super) fn marker_in(client_data: &RawValue) -> Option<String> {
    let data: ClientData<'_> = serde_json::from_str(client_data.get()).ok()?;
    let variables: Marked = serde_json::from_str(data.dynamic_variables?.get()).ok()?;
    let value = variables.call_manager_command_id.as_str()?.trim().to_owned();
    (!value.is_empty()).then_some(value)
}

#[derive(Deserialize)]
struct Detailed<'a> {
    #[serde(borrow, default)]
    recipients: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Recipient<'a> {
    #[serde(default)]
    phone_number: Value,
    #[serde(borrow, default)]
    conversation_initiation_client_data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct ClientData<'a> {
    #[serde(borrow, default)]
    dynamic_variables: Option<&'a RawValue>,
}

/// [`crate::domain::command::COMMAND_ID_VARIABLE`].
#[derive(Deserialize)]
struct Marked {
    #[serde(default)]
    call_manager_command_id: Value,
}

/// Whether a text has the form that [`marker`] gives.
fn is_marker(text: &str) -> bool {
    let form = marker("");
    let (prefix, digits) = form.split_at(3);
    let Some(given) = text.get(..3).filter(|given| given.eq_ignore_ascii_case(prefix)) else {
        return false;
    };
    let rest = &text[given.len()..];
    rest.len() == digits.len() && rest.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
#[expect(clippy::needless_pass_by_value, reason = "json! reads better without references")]
mod tests {
    use serde_json::json;

    use super::*;

    /// No whole hour.
    const SINCE: i64 = 1_800_000_777;

    fn key(command_id: &str) -> SearchKey {
        let numbers = ["+14155550100", "+14155550101"];
        SearchKey {
            command_id: command_id.to_owned(),
            agent_id: "agent_1".to_owned(),
            name: "Cita".to_owned(),
            numbers: Numbers::of(command_id, numbers.into_iter()),
        }
    }

    fn listed(change: Value) -> Listed {
        let mut all =
            json!({"id": "b", "name": "Cita", "agent_id": "agent_1", "created_at_unix": SINCE});
        for (name, value) in change.as_object().unwrap() {
            all[name] = value.clone();
        }
        serde_json::from_value(all).unwrap()
    }

    #[test]
    fn the_list_rules_out_by_evidence_alone() {
        for (change, is_anothers) in [
            (json!({}), false),
            (json!({"created_at_unix": SINCE - 1}), true),
            (json!({"created_at_unix": (SINCE - 1).to_string()}), true),
            (json!({"created_at_unix": (SINCE - 1) * 1000}), true),
            (json!({"created_at_unix": SINCE * 1000}), false),
            (json!({"created_at_unix": null}), false),
            (json!({"created_at_unix": 0}), false),
            (json!({"created_at_unix": -1}), false),
            (json!({"created_at_unix": "2026"}), false),
            (json!({"created_at_unix": "20261122"}), false),
            (json!({"created_at_unix": SINCE - SINCE % DAY}), false),
            (json!({"created_at_unix": SINCE - SINCE % DAY - DAY}), true),
            (json!({"created_at_unix": "yesterday"}), false),
            (json!({"agent_id": "agent_2"}), true),
            (json!({"agent_id": " AGENT_1 "}), false),
            (json!({"agent_id": "agent_***"}), false),
            (json!({"agent_id": null}), false),
            (json!({"name": "Another"}), true),
            (json!({"name": " CITA "}), false),
            (json!({"name": null}), false),
            (json!({"name": 7}), false),
        ] {
            assert_eq!(
                listed(change.clone()).is_anothers(&key("c"), SINCE),
                is_anothers,
                "{change}"
            );
        }
        let bare: Listed = serde_json::from_str(r#"{"id":"b"}"#).unwrap();
        assert!(!bare.is_anothers(&key("c"), SINCE));
        assert!(serde_json::from_str::<Listed>(r#"{"id":7}"#).is_err());
    }

    #[test]
    fn a_marker_is_read_before_a_name_or_a_time_rules_out() {
        for (change, is_worth_it) in [
            (json!({"name": "Another"}), true),
            (json!({"agent_id": "agent_***"}), true),
            (json!({"created_at_unix": SINCE - 5 * HOUR - 1}), true),
            (json!({"created_at_unix": SINCE - 5 * HOUR - 1, "name": "Another"}), false),
            (json!({"created_at_unix": SINCE - DAY - 1}), false),
        ] {
            let listed = listed(change.clone());
            assert_eq!(listed.is_worth_reading(&key("c"), SINCE), is_worth_it, "{change}");
        }
    }

    fn judge(command_id: &str, recipients: Value) -> Judgement {
        let batch = json!({"id": "b", "recipients": recipients});
        Shown::read(&batch.to_string()).unwrap().judge(&key(command_id))
    }

    fn recipient(number: Value, marker: Value) -> Value {
        let variables = json!({"x": 1, "call_manager_command_id": marker});
        let data = json!({"dynamic_variables": variables});
        json!({"phone_number": number, "conversation_initiation_client_data": data})
    }

    #[test]
    fn a_marker_proves_and_its_absence_does_not() {
        use Judgement::{Anothers, Ours, Undecided};
        let own = marker("12345");
        let number = || json!("+14155550100");
        for (recipients, judgement) in [
            (json!([recipient(number(), json!(own))]), Ours),
            (json!([{"id": "r"}, recipient(number(), json!(own))]), Ours),
            (json!([recipient(number(), json!(format!("  {} ", own.to_uppercase())))]), Ours),
            (json!([recipient(number(), json!("12345"))]), Ours),
            (json!([recipient(number(), json!(marker("c-2")))]), Anothers),
            (json!([recipient(number(), json!(12345))]), Undecided),
            (json!([recipient(number(), json!("***"))]), Undecided),
            (json!([recipient(number(), Value::Null)]), Undecided),
            (
                json!([{"phone_number": "+14155550100", "conversation_initiation_client_data": null}]),
                Undecided,
            ),
            (json!([{"phone_number": "(415) 555-0100"}, {"phone_number": "***0101"}]), Undecided),
            (
                json!([{"phone_number": "+14155550100"}, {"phone_number": "+525590012345"}]),
                Anothers,
            ),
            (json!([{"phone_number": 14_155_550_100_u64}]), Undecided),
            (json!([]), Undecided),
            (Value::Null, Undecided),
            (json!("none"), Undecided),
        ] {
            assert_eq!(judge("12345", recipients.clone()), judgement, "{recipients}");
        }
        assert!(Shown::read("[]").is_none() && Shown::read("{").is_none());
    }

    #[test]
    fn only_a_well_formed_marker_names_an_owner() {
        for (value, is_one) in [
            (marker("c"), true),
            (marker("c").to_uppercase(), true),
            ("cm_".to_owned(), false),
            ("c-1".to_owned(), false),
            (format!("{}0", marker("c")), false),
            ("cmé".to_owned(), false),
        ] {
            assert_eq!(is_marker(&value), is_one, "{value}");
        }
    }
}
