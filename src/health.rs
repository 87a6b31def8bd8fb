//! Liveness and readiness over HTTP: what is wrong, part by part.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;

use crate::domain::command::CommandKind;

/// What has to be right for commands to be taken and answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The process is not stopping.
    Worker,
    /// Connected, and both queues of these commands have their consumer.
    Broker(CommandKind),
    /// Results of these commands are taken and confirmed: no memory or disk alarm, no full queue.
    Publisher(CommandKind),
    /// What is deferred comes back from its delay queue.
    Deferral,
    /// It can be written.
    Ledger,
    /// The vendor answers, and takes the key.
    Elevenlabs,
}

impl Part {
    /// The names of all parts, in the order in which they are told.
    pub const NAMES: [&str; 6] =
        ["worker", "broker", "publisher", "deferral", "ledger", "elevenlabs"];

    const fn name(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Broker(_) => "broker",
            Self::Publisher(_) => "publisher",
            Self::Deferral => "deferral",
            Self::Ledger => "ledger",
            Self::Elevenlabs => "elevenlabs",
        }
    }

    /// Whose commands are concerned, where not all are.
    const fn kind(self) -> Option<CommandKind> {
        match self {
            Self::Broker(kind) | Self::Publisher(kind) => Some(kind),
            Self::Worker | Self::Deferral | Self::Ledger | Self::Elevenlabs => None,
        }
    }
}

/// What is wrong, if anything. Cheap to clone; all clones see the same.
#[derive(Clone, Debug)]
pub struct Readiness {
    wrong: Arc<Mutex<BTreeMap<Part, String>>>,
}

impl Default for Readiness {
    fn default() -> Self {
        let begin =
            CommandKind::ALL.map(|kind| (Part::Broker(kind), "not connected yet".to_owned()));
        Self { wrong: Arc::new(Mutex::new(begin.into())) }
    }
}

impl Readiness {
    /// It works.
    pub fn good(&self, part: Part) {
        self.parts().remove(&part);
    }

    /// It does not, for this reason.
    pub fn wrong(&self, part: Part, reason: impl Into<String>) {
        self.parts().insert(part, reason.into());
    }

    fn parts(&self) -> MutexGuard<'_, BTreeMap<Part, String>> {
        // Each change is one step, so a panic elsewhere leaves none half-done.
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `GET /health` (liveness) and `GET /health/ready`.
pub fn router(readiness: Readiness) -> Router {
    Router::new()
        .route("/health", get(alive))
        .route("/health/ready", get(ready))
        .with_state(readiness)
}

/// In the order in which the REST service answered.
#[derive(Serialize)]
struct Alive {
    status: &'static str,
    timestamp: String,
    service: &'static str,
}

async fn alive() -> Response {
    // The REST service's clients parse JavaScript's form: three digits of seconds, and Z.
    let timestamp = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%3fZ").to_string();
    Json(Alive { status: "ok", timestamp, service: "call-manager" }).into_response()
}

#[derive(Serialize)]
struct Ready {
    status: &'static str,
    /// `part: reason`, for a person.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    missing: Vec<String>,
    /// `ok`, or the reason.
    parts: BTreeMap<&'static str, String>,
}

async fn ready(State(readiness): State<Readiness>) -> Response {
    let wrong = readiness.parts().clone();
    let reasons = Part::NAMES.map(|name| (name, reason(&wrong, name)));
    let told =
        |(name, reason): &(&str, Option<String>)| Some(format!("{name}: {}", reason.as_ref()?));
    let missing: Vec<_> = reasons.iter().filter_map(told).collect();
    let ok = || "ok".to_owned();
    let parts =
        reasons.into_iter().map(|(name, reason)| (name, reason.unwrap_or_else(ok))).collect();
    let (code, status) = if missing.is_empty() {
        (StatusCode::OK, "ready")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not_ready")
    };
    (code, Json(Ready { status, missing, parts })).into_response()
}

/// All kinds of commands.
const EVERY: usize = CommandKind::ALL.len();

/// What is wrong with the part of this name: each reason once, with the commands it concerns where that
/// is not all.
fn reason(wrong: &BTreeMap<Part, String>, name: &str) -> Option<String> {
    let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
    for (part, reason) in wrong.iter().filter(|(part, _)| part.name() == name) {
        let kind = part.kind().map(CommandKind::name);
        match reasons.iter_mut().find(|(other, _)| other == reason) {
            Some((_, kinds)) => kinds.extend(kind),
            None => reasons.push((reason, kind.into_iter().collect())),
        }
    }
    let told = reasons.iter().map(|(reason, kinds)| match kinds.len() {
        0 | EVERY => (*reason).to_owned(),
        _ => format!("{reason} (concerns {} alone)", kinds.join(" and ")),
    });
    (!reasons.is_empty()).then(|| told.collect::<Vec<_>>().join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broker(wrong: &[(CommandKind, &str)]) -> Option<String> {
        let wrong = wrong.iter().map(|(kind, reason)| (Part::Broker(*kind), (*reason).to_owned()));
        reason(&wrong.collect(), "broker")
    }

    #[test]
    fn a_reason_names_the_commands_it_concerns_unless_it_concerns_all_alike() {
        use CommandKind::{Cancel, Get, Submit};
        assert_eq!(broker(&[]), None);
        assert_eq!(broker(&[(Get, "gone")]).as_deref(), Some("gone (concerns get alone)"));
        let all = [(Submit, "away"), (Cancel, "away"), (Get, "away")];
        assert_eq!(broker(&all).as_deref(), Some("away"));
        let two = broker(&[(Submit, "away"), (Cancel, "away"), (Get, "gone")]);
        let told = "away (concerns submit and cancel alone); gone (concerns get alone)";
        assert_eq!(two.as_deref(), Some(told));
    }
}
