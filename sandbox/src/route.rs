//! Which operation of the vendor a method and a path mean.

use std::borrow::Cow;

use hyper::Method;
use percent_encoding::percent_decode_str;
use serde::{Deserialize, Serialize};

const BASE: &str = "/v1/convai/batch-calling/";
const CONVERSATIONS: &str = "/v1/convai/conversations";

/// An operation, as faults and the request log name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Route {
    /// In a fault: every request. In the log: one to no operation of the vendor.
    #[default]
    Any,
    /// `POST submit`.
    Submit,
    /// `GET {id}`.
    Get,
    /// `POST {id}/cancel`.
    Cancel,
    /// `POST {id}/retry`.
    Retry,
    /// `DELETE {id}`.
    Delete,
    /// `GET workspace`.
    List,
    /// `GET {id}/export`.
    Export,
    /// `GET /v1/convai/conversations`.
    Conversations,
    /// `GET /v1/convai/conversations/{id}`.
    Conversation,
}

/// An operation with the batch it is about.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Submit,
    List,
    Get(String),
    Cancel(String),
    Retry(String),
    Delete(String),
    Export(String),
    Conversations,
    Conversation(String),
    /// The path exists, with another method.
    WrongMethod,
    Unknown,
}

impl Operation {
    pub(crate) fn of(method: &Method, path: &str) -> Self {
        if let Some(rest) = path.strip_prefix(CONVERSATIONS) {
            return Self::of_conversations(method, rest);
        }
        let Some(rest) = path.strip_prefix(BASE) else {
            return Self::Unknown;
        };
        let parts: Vec<Cow<'_, str>> =
            rest.split('/').map(|part| percent_decode_str(part).decode_utf8_lossy()).collect();
        let parts: Vec<&str> = parts.iter().map(AsRef::as_ref).collect();
        let id = |id: &str| id.to_owned();
        match (method.as_str(), parts.as_slice()) {
            (_, ["" | ".."] | ["" | "..", ..]) => Self::Unknown,
            ("POST", ["submit"]) => Self::Submit,
            ("GET", ["workspace"]) => Self::List,
            ("GET", [batch]) => Self::Get(id(batch)),
            ("DELETE", [batch]) => Self::Delete(id(batch)),
            ("POST", [batch, "cancel"]) => Self::Cancel(id(batch)),
            ("POST", [batch, "retry"]) => Self::Retry(id(batch)),
            ("GET", [batch, "export"]) => Self::Export(id(batch)),
            (_, [_] | [_, "cancel" | "retry" | "export"]) => Self::WrongMethod,
            _ => Self::Unknown,
        }
    }

    fn of_conversations(method: &Method, rest: &str) -> Self {
        let id = rest.strip_prefix('/').map(|id| percent_decode_str(id).decode_utf8_lossy());
        match (method.as_str(), id) {
            ("GET", None) if rest.is_empty() => Self::Conversations,
            ("GET", Some(id)) if !id.is_empty() && !id.contains('/') => {
                Self::Conversation(id.into_owned())
            }
            _ => Self::Unknown,
        }
    }

    pub(crate) fn route(&self) -> Route {
        match self {
            Self::Submit => Route::Submit,
            Self::List => Route::List,
            Self::Get(_) => Route::Get,
            Self::Cancel(_) => Route::Cancel,
            Self::Retry(_) => Route::Retry,
            Self::Delete(_) => Route::Delete,
            Self::Export(_) => Route::Export,
            Self::Conversations => Route::Conversations,
            Self::Conversation(_) => Route::Conversation,
            Self::WrongMethod | Self::Unknown => Route::Any,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_method_and_path_of_the_vendor_means_one_operation() {
        let id = || "btcal_1/2".to_owned();
        for (method, path, operation) in [
            ("POST", "submit", Operation::Submit),
            ("GET", "workspace", Operation::List),
            ("GET", "btcal_1%2F2", Operation::Get(id())),
            ("DELETE", "btcal_1%2F2", Operation::Delete(id())),
            ("POST", "btcal_1%2F2/cancel", Operation::Cancel(id())),
            ("POST", "btcal_1%2F2/retry", Operation::Retry(id())),
            ("GET", "btcal_1%2F2/export", Operation::Export(id())),
            ("PUT", "btcal_1", Operation::WrongMethod),
            ("GET", "btcal_1/cancel", Operation::WrongMethod),
            ("POST", "btcal_1/call", Operation::Unknown),
            ("GET", "", Operation::Unknown),
        ] {
            let method = method.parse().unwrap();
            assert_eq!(Operation::of(&method, &format!("{BASE}{path}")), operation, "{path}");
        }
        for (path, operation) in [
            ("/v1/voices", Operation::Unknown),
            ("/v1/convai/conversations", Operation::Conversations),
            ("/v1/convai/conversations/conv_1", Operation::Conversation("conv_1".to_owned())),
            ("/v1/convai/conversations/conv_1/audio", Operation::Unknown),
            ("/v1/convai/conversationsx", Operation::Unknown),
        ] {
            assert_eq!(Operation::of(&Method::GET, path), operation, "{path}");
        }
    }
}
