//! An HTTP answer, and the vendor's shapes of an error.

use bytes::Bytes;
use hyper::StatusCode;
use serde::Serialize;
use serde_json::json;

use crate::schema::Wrong;

pub(crate) const JSON: &str = "application/json";

/// A status, a body and its type; the connection adds the headers that every answer has.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) content_type: &'static str,
    pub(crate) body: Bytes,
    pub(crate) retry_after: Option<String>,
}

impl Answer {
    pub(crate) fn new(
        status: StatusCode,
        content_type: &'static str,
        body: impl Into<Bytes>,
    ) -> Self {
        Self { status, content_type, body: body.into(), retry_after: None }
    }

    pub(crate) fn json(status: StatusCode, body: &impl Serialize) -> Self {
        match serde_json::to_vec(body) {
            Ok(body) => Self::new(status, JSON, body),
            Err(broken) => {
                tracing::error!(%broken, "an answer could not be written as JSON");
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, JSON, Bytes::new())
            }
        }
    }

    pub(crate) fn empty(status: StatusCode) -> Self {
        Self::new(status, "", Bytes::new())
    }

    /// `FastAPI`'s answer to a body, a path or a query that breaks the schema.
    pub(crate) fn invalid(wrong: &[Wrong]) -> Self {
        Self::json(StatusCode::UNPROCESSABLE_ENTITY, &json!({ "detail": wrong }))
    }

    /// `FastAPI`'s own answer where there is no such route.
    pub(crate) fn no_route(status: StatusCode) -> Self {
        Self::json(status, &json!({ "detail": status.canonical_reason() }))
    }
}

/// Why the vendor refuses a request that is well formed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: StatusCode,
    kind: &'static str,
    code: &'static str,
    message: String,
}

/// The current error shape, in the order the vendor's documentation lists it.
#[derive(Serialize)]
struct Detail<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    code: &'a str,
    message: &'a str,
    status: &'a str,
    request_id: &'a str,
    param: Option<&'a str>,
}

#[derive(Serialize)]
struct Envelope<'a> {
    detail: Detail<'a>,
}

impl Refusal {
    pub(crate) fn unauthorized(code: &'static str, message: &str) -> Self {
        Self {
            status: StatusCode::UNAUTHORIZED,
            kind: "authentication_error",
            code,
            message: message.to_owned(),
        }
    }

    pub(crate) fn not_found(code: &'static str, message: String) -> Self {
        Self { status: StatusCode::NOT_FOUND, kind: "not_found", code, message }
    }

    pub(crate) fn bad_request(code: &'static str, message: String) -> Self {
        Self { status: StatusCode::BAD_REQUEST, kind: "invalid_request", code, message }
    }

    pub(crate) fn answer(&self, request_id: &str) -> Answer {
        let detail = Detail {
            kind: self.kind,
            code: self.code,
            message: &self.message,
            status: self.code,
            request_id,
            param: None,
        };
        Answer::json(self.status, &Envelope { detail })
    }
}
