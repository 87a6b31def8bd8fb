//! The event that tells a producer how its command ended: envelope, routing key, headers, id.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::command::{CommandKind, CommandMessage};

/// The namespace of result ids, so that they collide with nobody else's version 5 UUIDs.
const RESULT_IDS: Uuid = Uuid::from_u128(0x6f1c_6f0e_58a4_4d0b_9d57_3b0a_9a86_61f2);

/// Why a command failed: the stable value of the `error_code` header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The command breaks the contract.
    InvalidCommand,
    /// The vendor knows no such batch, agent or phone number.
    NotFound,
    /// The vendor refused the request.
    RejectedByElevenlabs,
    /// The vendor refused this command to the worker's API key, which it accepts otherwise.
    Unauthorized,
    /// The vendor could not be reached, or kept refusing for load, until the retry horizon.
    UpstreamUnavailable,
    /// Whether the vendor did it cannot be known.
    OutcomeUnknown,
    /// The id was used before with another body.
    CommandIdReused,
    /// A cancel by the submit's id came first.
    CancelledBeforeSubmit,
    /// It came back to its queue too often.
    PoisonMessage,
    /// Its `not_after` has passed.
    Expired,
}

impl ErrorCode {
    /// Every code there is.
    pub const ALL: [Self; 10] = [
        Self::InvalidCommand,
        Self::NotFound,
        Self::RejectedByElevenlabs,
        Self::Unauthorized,
        Self::UpstreamUnavailable,
        Self::OutcomeUnknown,
        Self::CommandIdReused,
        Self::CancelledBeforeSubmit,
        Self::PoisonMessage,
        Self::Expired,
    ];

    /// The header's value.
    pub const fn name(self) -> &'static str {
        match self {
            Self::InvalidCommand => "invalid_command",
            Self::NotFound => "not_found",
            Self::RejectedByElevenlabs => "rejected_by_elevenlabs",
            Self::Unauthorized => "unauthorized",
            Self::UpstreamUnavailable => "upstream_unavailable",
            Self::OutcomeUnknown => "outcome_unknown",
            Self::CommandIdReused => "command_id_reused",
            Self::CancelledBeforeSubmit => "cancelled_before_submit",
            Self::PoisonMessage => "poison_message",
            Self::Expired => "expired",
        }
    }

    /// The `status_code` header, as the REST service would have answered.
    pub const fn status_code(self) -> u16 {
        match self {
            Self::InvalidCommand
            | Self::RejectedByElevenlabs
            | Self::CommandIdReused
            | Self::CancelledBeforeSubmit => 400,
            Self::NotFound => 404,
            Self::Unauthorized
            | Self::UpstreamUnavailable
            | Self::OutcomeUnknown
            | Self::PoisonMessage
            | Self::Expired => 500,
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a command ended. Its JSON is what the ledger keeps: what later versions read, too.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The vendor did it.
    Succeeded {
        /// What the vendor answered, byte for byte.
        data: Box<RawValue>,
        /// The batch it is about.
        batch_id: String,
        /// What the producer should know although it worked.
        warning: Option<String>,
    },
    /// It was not done, or (`outcome_unknown`) nobody can tell.
    Failed {
        /// The stable reason.
        code: ErrorCode,
        /// A sentence a person can act on.
        error: String,
    },
}

/// Everything of a result that does not depend on who asks: what the ledger keeps of a submit.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ending {
    /// How often the vendor was called for it.
    pub attempts: u32,
    /// How it ended.
    pub outcome: Outcome,
}

impl Ending {
    /// The batch of a success.
    pub fn batch_id(&self) -> Option<&str> {
        match &self.outcome {
            Outcome::Succeeded { batch_id, .. } => Some(batch_id),
            Outcome::Failed { .. } => None,
        }
    }
}

/// Which of the results a command id may have this one is; it decides the event's `message_id`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResultOf {
    /// The command that owns the id: one result, however often it is published.
    Command,
    /// A message that was turned away. Its id may belong to another command, whose result must
    /// not be taken for a repeat of this one.
    Refusal,
}

/// A result, ready to be published.
#[derive(Clone, Debug)]
pub struct ResultEvent {
    /// What was asked; `None` where the routing key names no command.
    pub kind: Option<CommandKind>,
    /// The producer's id of the command; one made up by the worker where it gave none.
    pub command_id: String,
    /// Copied from the command, else the command id.
    pub correlation_id: String,
    /// The same for every publication of the same result, and another one for a result that says
    /// something else.
    pub message_id: Uuid,
    /// What the id is made from, besides what the result says.
    base: Uuid,
    /// How it ended.
    pub ending: Ending,
    /// Copied from the command.
    pub traceparent: Option<String>,
    /// Copied from the command.
    pub tracestate: Option<String>,
}

impl ResultEvent {
    /// The result of `message`, whose id is `command_id`. Who publishes a command again gets the
    /// same one, under the correlation id and the trace of the message that asked.
    pub fn new(message: &CommandMessage, command_id: &str, of: ResultOf, ending: Ending) -> Self {
        let kind = message.named();
        let mut name = format!("{}\n{command_id}\n", name(kind)).into_bytes();
        if of == ResultOf::Refusal {
            name.extend_from_slice(blake3::hash(&message.body).as_bytes());
        }
        let base = Uuid::new_v5(&RESULT_IDS, &name);
        let event = Self {
            kind,
            command_id: command_id.to_owned(),
            correlation_id: correlation_id(message, command_id),
            message_id: base,
            base,
            ending,
            traceparent: message.traceparent.clone(),
            tracestate: message.tracestate.clone(),
        };
        event.named()
    }

    /// Results that differ have different ids: whoever drops repeats must not keep the wrong one.
    fn named(self) -> Self {
        let mut name = self.routing_key().into_bytes();
        name.extend_from_slice(blake3::hash(&self.body()).as_bytes());
        Self { message_id: Uuid::new_v5(&self.base, &name), ..self }
    }

    /// What is said in place of a result that the broker finds too large.
    #[must_use]
    pub fn too_large(&self, bytes: usize) -> Self {
        let what = format!(
            "The answer of ElevenLabs has {bytes} bytes, and RabbitMQ takes no message of that size"
        );
        let operator = "The operator of call-manager has to raise max_message_size there";
        let (code, error) = match (self.kind, self.batch_id()) {
            (Some(CommandKind::Submit | CommandKind::Cancel), Some(batch)) => (
                ErrorCode::OutcomeUnknown,
                format!(
                    "{what}; but it was done: do not publish it again. Look at batch {batch} in \
                     ElevenLabs. {operator}."
                ),
            ),
            _ => (ErrorCode::UpstreamUnavailable, format!("{what}. {operator}.")),
        };
        let ending =
            Ending { attempts: self.ending.attempts, outcome: Outcome::Failed { code, error } };
        Self { ending, ..self.clone() }.named()
    }

    /// What was asked, in logs and routing keys: `unknown` where the routing key names no command.
    pub fn command(&self) -> &'static str {
        name(self.kind)
    }

    /// `batch-calling.<command>.succeeded` or `.failed`: routing key and AMQP `type`.
    pub fn routing_key(&self) -> String {
        let end = match self.ending.outcome {
            Outcome::Succeeded { .. } => "succeeded",
            Outcome::Failed { .. } => "failed",
        };
        format!("batch-calling.{}.{end}", self.command())
    }

    /// The `status_code` header.
    pub fn status_code(&self) -> u16 {
        match &self.ending.outcome {
            Outcome::Succeeded { .. } => 200,
            Outcome::Failed { code, .. } => code.status_code(),
        }
    }

    /// The `error_code` header of a failure.
    pub fn error_code(&self) -> Option<ErrorCode> {
        match &self.ending.outcome {
            Outcome::Succeeded { .. } => None,
            Outcome::Failed { code, .. } => Some(*code),
        }
    }

    /// The batch of a success.
    pub fn batch_id(&self) -> Option<&str> {
        self.ending.batch_id()
    }

    /// The `warning` header.
    pub fn warning(&self) -> Option<&str> {
        match &self.ending.outcome {
            Outcome::Succeeded { warning, .. } => warning.as_deref(),
            Outcome::Failed { .. } => None,
        }
    }

    /// The envelope: `{"success":true,"data":…}` or `{"success":false,"error":"…"}`.
    pub fn body(&self) -> Vec<u8> {
        #[derive(Serialize)]
        struct Succeeded<'a> {
            success: bool,
            data: &'a RawValue,
        }
        #[derive(Serialize)]
        struct Failed<'a> {
            success: bool,
            error: &'a str,
        }
        let json = match &self.ending.outcome {
            Outcome::Succeeded { data, .. } => {
                serde_json::to_vec(&Succeeded { success: true, data })
            }
            Outcome::Failed { error, .. } => serde_json::to_vec(&Failed { success: false, error }),
        };
        // Strings and raw JSON written into memory have no way to fail.
        json.unwrap_or_default()
    }
}

fn name(kind: Option<CommandKind>) -> &'static str {
    kind.map_or("unknown", CommandKind::name)
}

fn correlation_id(message: &CommandMessage, command_id: &str) -> String {
    message.correlation_id.clone().unwrap_or_else(|| command_id.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::command::tests::message;

    fn failed(body: &str, of: ResultOf) -> ResultEvent {
        let outcome =
            Outcome::Failed { code: ErrorCode::InvalidCommand, error: "It is \"wrong\".".into() };
        ResultEvent::new(&message(body), "c-1", of, Ending { attempts: 0, outcome })
    }

    fn succeeded(outcome: Outcome) -> ResultEvent {
        ResultEvent::new(&message("{}"), "c-1", ResultOf::Command, Ending { attempts: 1, outcome })
    }

    #[test]
    fn a_stored_ending_gives_the_same_bytes_again_and_reads_as_documented() {
        let data = "{\"z\": 1.0,\n \"a\":1e2, \"id\":\"b\"}";
        let outcome = Outcome::Succeeded {
            data: RawValue::from_string(data.into()).unwrap(),
            batch_id: "b".into(),
            warning: None,
        };
        let event = succeeded(outcome);
        let stored = serde_json::to_string(&event.ending).unwrap();
        let read: Ending = serde_json::from_str(&stored).unwrap();
        let again = ResultEvent::new(&message("{}"), "c-1", ResultOf::Command, read);
        assert_eq!(again.body(), event.body());
        for code in ErrorCode::ALL {
            let outcome = Outcome::Failed { code, error: "e".into() };
            let stored = serde_json::to_string(&Ending { attempts: 2, outcome }).unwrap();
            let expected = format!(
                r#"{{"attempts":2,"outcome":{{"failed":{{"code":"{code}","error":"e"}}}}}}"#
            );
            assert_eq!(stored, expected, "rows of other versions are read by these names");
        }
    }

    #[test]
    fn the_data_of_a_success_is_the_vendors_bytes() {
        let data = "{\"z\": 1.0,\n \"a\":1e2, \"id\":\"b\", \"big\":12345678901234567890123}";
        let outcome = Outcome::Succeeded {
            data: RawValue::from_string(data.into()).unwrap(),
            batch_id: "b".into(),
            warning: None,
        };
        let event = succeeded(outcome);
        assert_eq!(
            String::from_utf8(event.body()).unwrap(),
            format!("{{\"success\":true,\"data\":{data}}}")
        );
        assert_eq!(event.routing_key(), "batch-calling.submit.succeeded");
        assert_eq!(event.status_code(), 200);
    }

    #[test]
    fn a_failure_says_why_and_falls_back_to_the_command_id_for_correlation() {
        let event = failed("{}", ResultOf::Refusal);
        assert_eq!(event.body(), br#"{"success":false,"error":"It is \"wrong\"."}"#);
        assert_eq!(event.routing_key(), "batch-calling.submit.failed");
        assert_eq!(event.correlation_id, "c-1");
        assert_eq!(event.error_code(), Some(ErrorCode::InvalidCommand));
    }

    #[test]
    fn a_submit_whose_result_is_too_large_for_the_broker_is_never_reported_as_not_done() {
        let outcome = Outcome::Succeeded {
            data: RawValue::from_string("{}".into()).unwrap(),
            batch_id: "btcal_1".into(),
            warning: None,
        };
        let mut event = succeeded(outcome);
        assert_eq!(event.too_large(70_000).error_code(), Some(ErrorCode::OutcomeUnknown));
        let body = String::from_utf8(event.too_large(70_000).body()).unwrap();
        assert!(body.contains("do not publish it again. Look at batch btcal_1"), "{body}");
        event.kind = Some(CommandKind::Get);
        assert_eq!(event.too_large(70_000).error_code(), Some(ErrorCode::UpstreamUnavailable));
    }

    #[test]
    fn the_same_command_always_has_the_same_result_id() {
        let id = |body, of| failed(body, of).message_id;
        assert_eq!(id("{}", ResultOf::Command), id("{ }", ResultOf::Command));
        assert_eq!(id("{}", ResultOf::Refusal), id("{}", ResultOf::Refusal));
    }

    #[test]
    fn results_that_differ_have_different_ids_whatever_the_number_of_attempts() {
        let of = |attempts, outcome| {
            let ending = Ending { attempts, outcome };
            ResultEvent::new(&message("{}"), "c-1", ResultOf::Command, ending).message_id
        };
        let unavailable = || Outcome::Failed {
            code: ErrorCode::UpstreamUnavailable,
            error: "It was unavailable.".into(),
        };
        let succeeded = |data: &str| Outcome::Succeeded {
            data: RawValue::from_string(data.into()).unwrap(),
            batch_id: "b".into(),
            warning: None,
        };
        assert_eq!(of(1, unavailable()), of(2, unavailable()));
        assert_ne!(of(1, unavailable()), of(1, succeeded("{}")));
        assert_ne!(of(1, succeeded("{}")), of(1, succeeded("{\"status\":\"cancelled\"}")));
    }

    #[test]
    fn a_refusal_is_not_taken_for_a_repeat_of_the_result_of_the_command_whose_id_it_uses() {
        let refused = failed("{\"a\":1}", ResultOf::Refusal).message_id;
        assert_ne!(refused, failed("{}", ResultOf::Command).message_id);
        assert_ne!(refused, failed("{\"a\":2}", ResultOf::Refusal).message_id);
    }
}
