//! What an error of the vendor's says about the request: never sent, refused, rate limited, unknown.
//!
//! Source of the table: the vendor's OpenAPI document and error reference; where they are silent,
//! the reading that cannot call anybody twice.

use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, RETRY_AFTER};

use super::words::{Said, Words};

/// How far a request got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It did not leave this machine: sending it again is safe.
    NeverSent,
    /// The vendor read it and will not do it.
    Refused,
    /// The vendor will not do it for this key: 401, 403.
    Unauthorized,
    /// The vendor will not do it for this account: no credits, a quota, a missing agreement.
    Account,
    /// The vendor turned it away for load: sending it again later is safe.
    RateLimited,
    /// It may or may not have been done.
    Unknown,
}

impl Class {
    /// The class of an answer of ElevenLabs' own with this HTTP status; `None` for 2xx.
    pub const fn of_status(status: u16) -> Option<Self> {
        match status {
            200..=299 => None,
            401 | 403 => Some(Self::Unauthorized),
            402 => Some(Self::Account),
            429 => Some(Self::RateLimited),
            // A gateway sends these whether or not the application saw the request.
            408 | 409 | 425 => Some(Self::Unknown),
            400..=499 => Some(Self::Refused),
            // A redirect can follow a processed POST; redirects are never followed.
            _ => Some(Self::Unknown),
        }
    }
}

/// A call to the vendor that did not give a batch.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection was made: refused, DNS, TLS handshake, connect time-out.
    #[error("no connection to ElevenLabs could be made, so nothing was sent")]
    NeverSent {
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// 4xx, but for the ones below.
    #[error("ElevenLabs refused the request (HTTP {status}): {message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The vendor's words, without digits that could be a phone number.
        message: String,
        /// Quote it to the vendor's support.
        request_id: Option<String>,
    },
    /// 402, and any other refusal whose code is about the account.
    #[error("ElevenLabs refused the request because of the account (HTTP {status}): {message}")]
    Account {
        /// HTTP status.
        status: u16,
        /// The vendor's words.
        message: String,
        /// How long the vendor asks to wait.
        retry_after: Option<Duration>,
        /// Quote it to the vendor's support.
        request_id: Option<String>,
    },
    /// 429.
    #[error("ElevenLabs is limiting requests (HTTP 429): {message}")]
    RateLimited {
        /// The vendor's words.
        message: String,
        /// How long the vendor asks to wait.
        retry_after: Option<Duration>,
        /// Quote it to the vendor's support.
        request_id: Option<String>,
    },
    /// 408, 409, 425, 3xx, 5xx.
    #[error("ElevenLabs answered HTTP {status}: {message}")]
    Inconclusive {
        /// HTTP status.
        status: u16,
        /// The vendor's words.
        message: String,
        /// How long the vendor asks to wait.
        retry_after: Option<Duration>,
        /// Quote it to the vendor's support.
        request_id: Option<String>,
    },
    /// The connection broke or fell silent after the request may have left.
    #[error("the connection to ElevenLabs broke before an answer came")]
    Broken {
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// A 2xx whose body is cut, too long or not a batch.
    #[error("ElevenLabs answered HTTP {status} with a body that cannot be read: {reason}")]
    Unreadable {
        /// HTTP status.
        status: u16,
        /// What is wrong with the body, without quoting it.
        reason: String,
        /// Quote it to the vendor's support.
        request_id: Option<String>,
    },
}

impl Error {
    /// How far the request got.
    pub fn class(&self) -> Class {
        match self {
            Self::NeverSent { .. } => Class::NeverSent,
            Self::Refused { status: 401 | 403, .. } => Class::Unauthorized,
            Self::Refused { .. } => Class::Refused,
            Self::Account { .. } => Class::Account,
            Self::RateLimited { .. } => Class::RateLimited,
            Self::Inconclusive { .. } | Self::Broken { .. } | Self::Unreadable { .. } => {
                Class::Unknown
            }
        }
    }

    /// How long the vendor asks to wait before the next request.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Account { retry_after, .. }
            | Self::RateLimited { retry_after, .. }
            | Self::Inconclusive { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// The vendor's id of the request.
    pub fn request_id(&self) -> Option<&str> {
        match self {
            Self::Refused { request_id, .. }
            | Self::Account { request_id, .. }
            | Self::RateLimited { request_id, .. }
            | Self::Inconclusive { request_id, .. }
            | Self::Unreadable { request_id, .. } => request_id.as_deref(),
            Self::NeverSent { .. } | Self::Broken { .. } => None,
        }
    }

    /// A 2xx whose body is not what was asked for.
    pub(super) fn unreadable(reason: &str) -> Self {
        Self::Unreadable { status: 200, reason: reason.to_owned(), request_id: None }
    }

    /// A refusal that another answer contradicts: nothing is known.
    #[must_use]
    pub fn contradicted(self) -> Self {
        match self {
            Self::Refused { status, message, request_id } => {
                let message = format!("{message} (but it shows the batch)");
                Self::Inconclusive { status, message, retry_after: None, request_id }
            }
            other => other,
        }
    }

    /// The end of a cancel whose batch has ended: asked again, it would be answered no better.
    #[must_use]
    pub fn of_ended(self, batch_status: &str) -> Self {
        let told = |message| format!("{message} (the batch is {batch_status})");
        match self {
            Self::Refused { status, message, request_id } if !matches!(status, 401 | 403 | 404) => {
                Self::Refused { status, message: told(message), request_id }
            }
            // What was refused for another reason, or not at all, is refused by what the batch is.
            Self::Refused { message, request_id, .. }
            | Self::Account { message, request_id, .. }
            | Self::Inconclusive { message, request_id, .. } => {
                Self::Refused { status: 409, message: told(message), request_id }
            }
            other => other,
        }
    }

    /// A 2xx to a submit that is not about the batch that was sent: who knows who answered.
    pub fn another_batch() -> Self {
        Self::unreadable("it is not about the batch that was sent")
    }

    /// No answer within a limit of the caller's.
    pub fn too_slow() -> Self {
        Self::unreadable("it did not come in time")
    }

    /// A transport error; only a failed connect proves that nothing was sent.
    pub(super) fn of_transport(error: reqwest::Error) -> Self {
        let source = error.without_url();
        if source.is_connect() { Self::NeverSent { source } } else { Self::Broken { source } }
    }

    /// An answer that is not 2xx. A 4xx counts as ElevenLabs' own only in its error form: something in
    /// between may answer anything, whatever became of the request.
    pub(super) fn of_answer(
        class: Class,
        status: u16,
        headers: &HeaderMap,
        body: &[u8],
        words: &Words,
    ) -> Self {
        let Said { message, is_elevenlabs, is_about_account } = words.read(status, body);
        let request_id = request_id(headers, words);
        let retry_after = retry_after(headers, SystemTime::now());
        match class {
            Class::Refused | Class::Unauthorized | Class::Account | Class::RateLimited
                if is_about_account =>
            {
                Self::Account { status, message, retry_after, request_id }
            }
            Class::Refused | Class::Unauthorized if is_elevenlabs => {
                Self::Refused { status, message, request_id }
            }
            Class::RateLimited if is_elevenlabs => {
                Self::RateLimited { message, retry_after, request_id }
            }
            _ => Self::Inconclusive { status, message, retry_after, request_id },
        }
    }
}

pub(super) fn request_id(headers: &HeaderMap, words: &Words) -> Option<String> {
    let id = headers.get("request-id")?.to_str().ok()?;
    Some(words.masked(id).chars().take(128).collect())
}

/// `Retry-After` in both forms: seconds, or an HTTP date (past = now).
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = value.parse::<u32>() {
        return Some(Duration::from_secs(seconds.into()));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    fn answered(status: u16, body: &str) -> Error {
        let mut headers = HeaderMap::new();
        headers.insert("request-id", HeaderValue::from_static("r-1"));
        let class = Class::of_status(status).expect("it is no success");
        let words = Words::new("a key of some length".into());
        Error::of_answer(class, status, &headers, body.as_bytes(), &words)
    }

    #[test]
    fn an_answer_is_classed_by_its_status_its_form_and_its_code() {
        let own = r#"{"detail":{"code":"a_code","message":"Words."}}"#;
        let unpaid = r#"{"detail":{"code":"quota_exceeded","message":"Words."}}"#;
        let page = "<html>";
        for (status, body, class) in [
            (400, own, Class::Refused),
            (404, own, Class::Refused),
            (422, own, Class::Refused),
            (401, own, Class::Unauthorized),
            (403, own, Class::Unauthorized),
            (402, own, Class::Account),
            (400, unpaid, Class::Account),
            (403, unpaid, Class::Account),
            (429, unpaid, Class::Account),
            (429, own, Class::RateLimited),
            (400, page, Class::Unknown),
            (402, page, Class::Unknown),
            (403, page, Class::Unknown),
            (429, page, Class::Unknown),
            (302, own, Class::Unknown),
            (408, own, Class::Unknown),
            (409, unpaid, Class::Unknown),
            (425, own, Class::Unknown),
            (500, unpaid, Class::Unknown),
        ] {
            let error = answered(status, body);
            assert_eq!(error.class(), class, "HTTP {status} {body}");
            assert_eq!(error.request_id(), Some("r-1"), "HTTP {status} {body}");
        }
        assert_eq!(Class::of_status(200), None);
        assert_eq!(Error::too_slow().request_id(), None);
    }

    #[test]
    fn what_has_ended_is_refused_with_its_own_status_where_that_speaks_of_it() {
        let own = r#"{"detail":{"code":"a_code","message":"Words."}}"#;
        let refused =
            [(400, 400), (422, 422), (401, 409), (403, 409), (404, 409), (402, 409), (409, 409)];
        for (status, expected) in refused {
            match answered(status, own).of_ended("completed") {
                Error::Refused { status: told, message, .. } => {
                    assert_eq!(told, expected, "HTTP {status}");
                    assert_eq!(message, "Words (the batch is completed)");
                }
                other => panic!("HTTP {status}: {other:?}"),
            }
        }
        assert_eq!(answered(429, own).of_ended("completed").class(), Class::RateLimited);
    }

    fn after(value: &str, now: SystemTime) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, HeaderValue::from_str(value).unwrap());
        retry_after(&headers, now)
    }

    #[test]
    fn retry_after_is_read_in_both_forms() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        assert_eq!(after("7", now), Some(Duration::from_secs(7)));
        assert_eq!(after("Sun, 06 Nov 1994 08:50:37 GMT", now), Some(Duration::from_secs(60)));
        assert_eq!(after("Sun, 06 Nov 1994 08:40:00 GMT", now), Some(Duration::ZERO));
        for nonsense in ["-1", "soon", "1.5", "", "99999999999999999999"] {
            assert_eq!(after(nonsense, now), None, "{nonsense}");
        }
    }
}
