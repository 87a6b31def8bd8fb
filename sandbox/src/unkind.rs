//! Answers that are right, and unkind: what the vendor's documents leave open, taken at its worst.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash as _, Hasher as _};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::answer::Answer;
use crate::fault::milliseconds;
use crate::state::State;

/// How an answer with batches in it is changed before it is sent. What the sandbox itself knows stays
/// right. As JSON in an effect: `{"unkind": "shuffled"}`, `{"unkind": {"lagging_ms": 500}}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unkind {
    /// A list in another order each time.
    Shuffled,
    /// A list that leaves out about every second batch, others each time.
    Flapping,
    /// A list that shows each batch after a time of its own, so long at most.
    #[serde(rename = "lagging_ms", with = "milliseconds")]
    Lagging(Duration),
    /// Names are cut to so many characters.
    NamesCut(usize),
    /// Names have no blanks at their ends, one in the place of several, and capitals alone.
    NamesNormalised,
    /// Recipients have no dynamic variables.
    MarkersMissing,
    /// Dynamic variables that were strings are numbers: their lengths.
    MarkersRetyped,
    /// Recipients have no dynamic variables until so long after the submit.
    #[serde(rename = "markers_late_ms", with = "milliseconds")]
    MarkersLate(Duration),
    /// The first recipient shows so long after the submit, the second after twice that, and so on.
    #[serde(rename = "recipients_late_ms", with = "milliseconds")]
    RecipientsLate(Duration),
    /// The vendor's clock is so many seconds ahead, or behind.
    ClockAhead(i64),
}

impl Unkind {
    /// Changes an answer of 200 that is JSON. `request_id` decides what is left to chance.
    pub(crate) fn apply(&self, mut answer: Answer, state: &State, request_id: &str) -> Answer {
        let Ok(mut json) = serde_json::from_slice::<Value>(&answer.body) else { return answer };
        if let Some(batches) = json["batch_calls"].as_array_mut() {
            self.change_list(batches, state, request_id);
            for batch in batches {
                self.change(batch, state);
            }
        } else if json["id"].is_string() {
            self.change(&mut json, state);
        }
        answer.body = json.to_string().into();
        answer
    }

    fn change_list(&self, batches: &mut Vec<Value>, state: &State, request_id: &str) {
        let chance = |batch: &Value| hash(&[request_id, id(batch)]);
        match self {
            Self::Shuffled => batches.sort_by_key(chance),
            Self::Flapping => batches.retain(|batch| chance(batch) % 2 == 0),
            Self::Lagging(longest) => batches.retain(|batch| {
                let most = u64::try_from(longest.as_millis()).unwrap_or(u64::MAX).max(1);
                age(batch, state) >= Duration::from_millis(hash(&[id(batch)]) % most)
            }),
            _ => {}
        }
    }

    fn change(&self, batch: &mut Value, state: &State) {
        let age = age(batch, state);
        match self {
            Self::NamesCut(most) => rename(batch, |name| name.chars().take(*most).collect()),
            Self::NamesNormalised => rename(batch, |name| {
                name.split_whitespace().collect::<Vec<_>>().join(" ").to_uppercase()
            }),
            Self::MarkersMissing => each_variables(batch, |variables| *variables = json!({})),
            Self::MarkersLate(late) if age < *late => {
                each_variables(batch, |variables| *variables = json!({}));
            }
            Self::MarkersRetyped => each_variables(batch, |variables| {
                for value in variables.as_object_mut().into_iter().flat_map(|all| all.values_mut())
                {
                    if let Value::String(text) = value {
                        *value = json!(text.len());
                    }
                }
            }),
            Self::RecipientsLate(each) => {
                let shown = age.as_millis().checked_div(each.as_millis());
                let shown = shown.and_then(|shown| usize::try_from(shown).ok());
                if let Some(recipients) = batch["recipients"].as_array_mut() {
                    recipients.truncate(shown.unwrap_or(usize::MAX));
                }
            }
            Self::ClockAhead(seconds) => {
                for (name, value) in batch.as_object_mut().into_iter().flatten() {
                    if let (true, Some(at)) = (name.ends_with("_at_unix"), value.as_i64()) {
                        *value = json!(at.saturating_add(*seconds));
                    }
                }
            }
            _ => {}
        }
    }
}

fn id(batch: &Value) -> &str {
    batch["id"].as_str().unwrap_or_default()
}

fn age(batch: &Value, state: &State) -> Duration {
    state.store().age(id(batch)).unwrap_or(Duration::MAX)
}

fn rename(batch: &mut Value, change: impl Fn(&str) -> String) {
    if let Some(name) = batch["name"].as_str() {
        batch["name"] = change(name).into();
    }
}

fn each_variables(batch: &mut Value, change: impl Fn(&mut Value)) {
    for recipient in batch["recipients"].as_array_mut().into_iter().flatten() {
        let data = &mut recipient["conversation_initiation_client_data"];
        if data.is_object() {
            change(&mut data["dynamic_variables"]);
        }
    }
}

fn hash(words: &[&str]) -> u64 {
    let mut hasher = DefaultHasher::new();
    words.hash(&mut hasher);
    hasher.finish()
}
