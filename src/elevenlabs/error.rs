//! What an error of the vendor's says about the request: never sent, refused, rate limited, unknown.
//!
//! Source of the table: the vendor's OpenAPI document and error reference; where they are silent,
//! the reading that cannot call anybody twice.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, RETRY_AFTER};

use super::wire::{Detail, ErrorBody};

/// How far a request got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It did not leave this machine: sending it again is safe.
    NeverSent,
    /// The vendor read it and will not do it.
    Refused,
    /// The vendor will not do it for this key: 401, 403.
    Unauthorized,
    /// The vendor turned it away for load: sending it again later is safe.
    RateLimited,
    /// It may or may not have been done.
    Unknown,
}

impl Class {
    /// The class of an HTTP status; `None` for 2xx.
    pub const fn of_status(status: u16) -> Option<Self> {
        match status {
            200..=299 => None,
            401 | 403 => Some(Self::Unauthorized),
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
            Self::RateLimited { .. } => Class::RateLimited,
            Self::Inconclusive { .. } | Self::Broken { .. } | Self::Unreadable { .. } => {
                Class::Unknown
            }
        }
    }

    /// How long the vendor asks to wait before the next request.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after, .. } | Self::Inconclusive { retry_after, .. } => {
                *retry_after
            }
            _ => None,
        }
    }

    /// The vendor's id of the request.
    pub fn request_id(&self) -> Option<&str> {
        match self {
            Self::Refused { request_id, .. }
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

    /// A transport error; only a failed connect proves that nothing was sent.
    pub(super) fn of_transport(error: reqwest::Error) -> Self {
        let source = error.without_url();
        if source.is_connect() { Self::NeverSent { source } } else { Self::Broken { source } }
    }

    /// An answer that is not 2xx.
    pub(super) fn of_answer(class: Class, status: u16, headers: &HeaderMap, body: &[u8]) -> Self {
        let message = message_of(status, body);
        let request_id = request_id(headers);
        let retry_after = retry_after(headers, SystemTime::now());
        match class {
            Class::Refused | Class::Unauthorized => Self::Refused { status, message, request_id },
            Class::RateLimited => Self::RateLimited { message, retry_after, request_id },
            Class::NeverSent | Class::Unknown => {
                Self::Inconclusive { status, message, retry_after, request_id }
            }
        }
    }
}

pub(super) fn request_id(headers: &HeaderMap) -> Option<String> {
    let id = headers.get("request-id")?.to_str().ok()?;
    Some(id.chars().take(128).collect())
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

/// What the vendor says is wrong, fit for a requester: never a raw dump.
fn message_of(status: u16, body: &[u8]) -> String {
    let said = match serde_json::from_slice::<ErrorBody>(body).map(|body| body.detail) {
        Ok(Detail::Described { message } | Detail::Text(message)) => message,
        Ok(Detail::Invalid(fields)) => {
            let described = fields.iter().take(20).map(|field| {
                let mut path = String::new();
                for part in field.loc.iter().filter(|part| *part != "body") {
                    let _infallible = match part {
                        serde_json::Value::Number(index) => write!(path, "[{index}]"),
                        name if path.is_empty() => write!(path, "{}", name.as_str().unwrap_or("?")),
                        name => write!(path, ".{}", name.as_str().unwrap_or("?")),
                    };
                }
                format!("{path}: {}", field.msg)
            });
            described.collect::<Vec<_>>().join("; ")
        }
        Err(_) => String::new(),
    };
    let said = without_personal_data(&said);
    if said.is_empty() {
        format!("no reason given (HTTP {status} without an ElevenLabs error body)")
    } else {
        said
    }
}

/// At most 500 characters, one line, and every run of seven or more digits masked: a vendor's
/// message may quote the number it did not like. Digits of an id (next to a letter or `_`) stay.
fn without_personal_data(text: &str) -> String {
    let mut clean = String::new();
    let mut run = String::new();
    for c in text.chars().take(500).chain(std::iter::once('\n')) {
        // Separators inside a number do not end it.
        if c.is_ascii_digit() || (!run.is_empty() && matches!(c, ' ' | '-' | '(' | ')' | '.')) {
            run.push(c);
            continue;
        }
        push_masked(&mut clean, &run, c);
        run.clear();
        clean.push(if c.is_control() { ' ' } else { c });
    }
    // The message becomes a part of a sentence that has its own full stop.
    clean.trim().trim_end_matches('.').to_owned()
}

/// Appends a run of digits and separators that `next` ends.
fn push_masked(clean: &mut String, run: &str, next: char) {
    let in_word = |c: char| c.is_alphanumeric() || c == '_';
    let digit = |c: char| c.is_ascii_digit();
    let after_id =
        if clean.chars().last().is_some_and(in_word) { run.trim_start_matches(digit) } else { run };
    let number = if in_word(next) { after_id.trim_end_matches(digit) } else { after_id };
    let (id, rest) = run.split_at(run.len() - after_id.len());
    clean.push_str(id);
    if number.chars().filter(char::is_ascii_digit).count() < 7 {
        clean.push_str(rest);
        return;
    }
    let inner = number.trim_matches(|c: char| !c.is_ascii_digit());
    let begin = number.find(inner).unwrap_or_default();
    clean.push_str(&rest[..begin]);
    clean.push_str("[number]");
    clean.push_str(&rest[begin + inner.len()..]);
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

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

    #[test]
    fn every_error_shape_of_the_vendor_reads_as_a_sentence() {
        let says = |body: &str| message_of(422, body.as_bytes());
        assert_eq!(
            says(r#"{"detail":{"type":"x","code":"y","message":"Agent not found","status":"z"}}"#),
            "Agent not found"
        );
        assert_eq!(says(r#"{"detail":{"status":"z","message":"Older shape"}}"#), "Older shape");
        assert_eq!(says(r#"{"detail":"Not Found"}"#), "Not Found");
        assert_eq!(
            says(
                r#"{"detail":[{"loc":["body","recipients",3,"phone_number"],"msg":"Field required","type":"missing"},
                              {"loc":["body","agent_id"],"msg":"Input should be a string","type":"t"}]}"#
            ),
            "recipients[3].phone_number: Field required; agent_id: Input should be a string"
        );
        for nothing in ["", "<html>Bad gateway</html>", "{}", r#"{"detail":null}"#] {
            assert_eq!(
                says(nothing),
                "no reason given (HTTP 422 without an ElevenLabs error body)"
            );
        }
    }

    #[test]
    fn a_phone_number_in_the_vendors_words_is_masked() {
        assert_eq!(
            without_personal_data("Invalid number +1 (415) 555-0100, retry 3 times\nin 2026"),
            "Invalid number +[number], retry 3 times in 2026"
        );
        assert_eq!(without_personal_data("call 4155550100. Bye"), "call [number]. Bye");
        let id = "Batch call btcal_8a8249317acb4bd0 and 8249317abc were not found";
        assert_eq!(without_personal_data(id), id);
        assert_eq!(
            without_personal_data("agent_12 4155550100 and 12 4155550100 9x"),
            "agent_12 [number] and [number] 9x"
        );
        assert_eq!(without_personal_data(&"x".repeat(600)).len(), 500);
    }
}
