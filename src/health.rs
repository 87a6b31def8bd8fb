//! Liveness and readiness over HTTP: what is wrong, part by part.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;

/// What has to be right for commands to be taken and answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The process is not stopping.
    Worker,
    /// Connected, and each queue has its consumer.
    Broker,
    /// Results are taken and confirmed: no memory or disk alarm, no full queue.
    Publisher,
    /// What is deferred comes back from its delay queue.
    Deferral,
    /// It can be written.
    Ledger,
    /// The vendor answers, and takes the key.
    Elevenlabs,
}

impl Part {
    /// Each of them.
    pub const ALL: [Self; 6] = [
        Self::Worker,
        Self::Broker,
        Self::Publisher,
        Self::Deferral,
        Self::Ledger,
        Self::Elevenlabs,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Broker => "broker",
            Self::Publisher => "publisher",
            Self::Deferral => "deferral",
            Self::Ledger => "ledger",
            Self::Elevenlabs => "elevenlabs",
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
        let begin = BTreeMap::from([(Part::Broker, "not connected yet".to_owned())]);
        Self { wrong: Arc::new(Mutex::new(begin)) }
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
    parts: BTreeMap<Part, String>,
}

async fn ready(State(readiness): State<Readiness>) -> Response {
    let wrong = readiness.parts().clone();
    let missing: Vec<_> =
        wrong.iter().map(|(part, reason)| format!("{}: {reason}", part.name())).collect();
    let mut parts = BTreeMap::from(Part::ALL.map(|part| (part, "ok".to_owned())));
    parts.extend(wrong);
    let (code, status) = if missing.is_empty() {
        (StatusCode::OK, "ready")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not_ready")
    };
    (code, Json(Ready { status, missing, parts })).into_response()
}
