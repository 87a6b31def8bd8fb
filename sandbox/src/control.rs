//! The sandbox's own routes below `/sandbox/`, for processes that cannot call the library.

use std::time::Duration;

use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::answer::Answer;
use crate::fault::Fault;
use crate::state::State;

/// Everything below it is for the sandbox itself.
pub(crate) const PREFIX: &str = "/sandbox/";

/// Ten years; a greater step is a slip.
const LARGEST_STEP_SECS: f64 = 315_360_000.0;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Advance {
    seconds: f64,
}

pub(crate) fn answer(state: &State, method: &Method, path: &str, body: &[u8]) -> Answer {
    let done = match (method.as_str(), path.trim_start_matches(PREFIX)) {
        ("GET", "health") => Ok(json!({"status": "ok"})),
        ("GET", "batches") => return Answer::json(StatusCode::OK, &state.store().batches()),
        ("GET", "requests") => return Answer::json(StatusCode::OK, &state.log().all()),
        ("POST", "faults") => order(state, body),
        ("DELETE", "faults") => {
            state.faults().clear();
            Ok(json!({"cleared": true}))
        }
        ("POST", "advance") => advance(state, body),
        _ => {
            return Answer::json(
                StatusCode::NOT_FOUND,
                &json!({"error": "the sandbox has GET health, GET batches, GET requests, \
                    POST faults, DELETE faults and POST advance"}),
            );
        }
    };
    match done {
        Ok(done) => Answer::json(StatusCode::OK, &done),
        Err(error) => Answer::json(StatusCode::BAD_REQUEST, &json!({ "error": error })),
    }
}

fn order(state: &State, body: &[u8]) -> Result<Value, String> {
    let sent: Value = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    // Not an untagged enum: its error would not say what is wrong.
    let faults = match sent {
        Value::Array(all) => all
            .into_iter()
            .enumerate()
            .map(|(index, one)| fault(one).map_err(|error| format!("fault {index}: {error}")))
            .collect::<Result<Vec<_>, _>>()?,
        one => vec![fault(one)?],
    };
    let ordered = faults.len();
    state.faults().order(faults)?;
    Ok(json!({ "ordered": ordered }))
}

fn fault(sent: Value) -> Result<Fault, String> {
    serde_json::from_value(sent).map_err(|error| error.to_string())
}

fn advance(state: &State, body: &[u8]) -> Result<Value, String> {
    let sent: Advance = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    if !(0.0..=LARGEST_STEP_SECS).contains(&sent.seconds) {
        return Err(format!("seconds must be 0 to {LARGEST_STEP_SECS}, not {}", sent.seconds));
    }
    let by = Duration::try_from_secs_f64(sent.seconds).map_err(|error| error.to_string())?;
    state.store().advance(by);
    Ok(json!({ "advanced": sent.seconds }))
}
