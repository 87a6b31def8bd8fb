//! Liveness and readiness over HTTP.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use serde_json::json;
use tokio::sync::watch;

/// Whether the worker is consuming, and if not, why. Cheap to clone; all clones see the same.
#[derive(Clone, Debug)]
pub struct Readiness {
    missing: watch::Sender<Option<String>>,
}

impl Default for Readiness {
    fn default() -> Self {
        Self { missing: watch::Sender::new(Some("broker: not connected yet".to_owned())) }
    }
}

impl Readiness {
    /// Every consumer is registered.
    pub fn consuming(&self) {
        self.missing.send_replace(None);
    }

    /// Nothing is consumed, for this reason.
    pub fn lost(&self, reason: impl Into<String>) {
        self.missing.send_replace(Some(reason.into()));
    }

    fn missing(&self) -> Option<String> {
        self.missing.borrow().clone()
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

async fn ready(State(readiness): State<Readiness>) -> Response {
    match readiness.missing() {
        None => Json(json!({"status": "ready"})).into_response(),
        Some(reason) => {
            let body = Json(json!({"status": "not_ready", "missing": [reason]}));
            (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
        }
    }
}
