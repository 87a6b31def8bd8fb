//! The vendor's JSON: what a submit looks like on the wire, and the few fields read from answers.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;

use crate::domain::command::{COMMAND_ID_VARIABLE, Recipient, Submit, marker};

/// The encoded body of a submit, cheap to send again.
#[derive(Clone)]
pub struct SubmitRequest(pub(super) Bytes);

impl SubmitRequest {
    /// Encodes `submit`, with the marker that lets its batch be recognised on every recipient.
    /// 10,000 recipients take milliseconds: call it off the reactor for large batches.
    pub fn encode(submit: &Submit, command_id: &str) -> Result<Self, serde_json::Error> {
        let marker = marker(command_id);
        let recipients = submit.recipients.iter();
        let body = Body {
            call_name: &submit.call_name,
            agent_id: &submit.agent_id,
            agent_phone_number_id: &submit.agent_phone_number_id,
            recipients: recipients
                .map(|recipient| WireRecipient::new(recipient, &marker))
                .collect(),
            scheduled_time_unix: submit.scheduled_time_unix.as_deref(),
            timezone: submit.timezone.as_deref(),
            branch_id: submit.branch_id.as_deref(),
            environment: submit.environment.as_deref(),
            telephony_call_config: submit.telephony_call_config.as_ref(),
            target_concurrency_limit: submit.target_concurrency_limit.as_deref(),
        };
        Ok(Self(serde_json::to_vec(&body)?.into()))
    }
}

#[derive(Serialize)]
struct Body<'a> {
    call_name: &'a str,
    agent_id: &'a str,
    agent_phone_number_id: &'a str,
    recipients: Vec<WireRecipient<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    scheduled_time_unix: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timezone: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    branch_id: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    environment: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    telephony_call_config: Option<&'a BTreeMap<String, Box<RawValue>>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target_concurrency_limit: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct WireRecipient<'a> {
    phone_number: &'a str,
    conversation_initiation_client_data: ClientData<'a>,
}

#[derive(Serialize)]
struct ClientData<'a> {
    dynamic_variables: Variables<'a>,
}

struct Variables<'a> {
    given: &'a BTreeMap<String, Box<RawValue>>,
    marker: &'a str,
}

impl Serialize for Variables<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.given.len() + 1))?;
        for (name, value) in self.given {
            map.serialize_entry(name, value)?;
        }
        map.serialize_entry(COMMAND_ID_VARIABLE, self.marker)?;
        map.end()
    }
}

impl<'a> WireRecipient<'a> {
    fn new(recipient: &'a Recipient, marker: &'a str) -> Self {
        Self {
            phone_number: &recipient.phone_number,
            conversation_initiation_client_data: ClientData {
                dynamic_variables: Variables { given: &recipient.dynamic_variables, marker },
            },
        }
    }
}

/// The fields of a batch that the worker itself looks at. Everything else only passes through.
#[derive(Deserialize)]
pub(super) struct Batch {
    pub id: String,
    #[serde(default)]
    pub status: Option<String>,
    #[serde(default)]
    pub phone_provider: Option<String>,
}

/// Whether a JSON text is an object. serde reads a struct from an array, too.
pub(super) fn is_object(json: &str) -> bool {
    json.trim_start().starts_with('{')
}

/// A page of the workspace's list of batches, newest first.
#[derive(Deserialize)]
pub(super) struct Page<'a> {
    #[serde(borrow)]
    pub batch_calls: Vec<&'a RawValue>,
    #[serde(default)]
    pub next_doc: Option<String>,
    #[serde(default)]
    pub has_more: bool,
}

#[cfg(test)]
mod tests {
    use crate::domain::command::{Command, CommandKind};

    use super::*;

    fn encoded(body: &str) -> String {
        let Ok(Command::Submit(submit)) = Command::parse(CommandKind::Submit, body.as_bytes())
        else {
            panic!("the body is a valid submit");
        };
        let request = SubmitRequest::encode(&submit, "c-1").unwrap();
        String::from_utf8(request.0.to_vec()).unwrap()
    }

    #[test]
    fn dynamic_variables_move_to_where_the_vendor_wants_them_as_they_were_written() {
        let sent = encoded(
            r#"{"call_name":"n","agent_id":"a","agent_phone_number_id":"p","phone_provider":"twilio",
                "recipients":[{"phone_number":"+14155550100",
                               "dynamic_variables":{"x":1.0,"big":12345678901234567890,"n":null}},
                              {"phone_number":"+14155550101"}]}"#,
        );
        let sent = sent.replace(&marker("c-1"), "<marker>");
        assert_eq!(
            sent,
            concat!(
                r#"{"call_name":"n","agent_id":"a","agent_phone_number_id":"p","recipients":["#,
                r#"{"phone_number":"+14155550100","conversation_initiation_client_data":{"dynamic_variables":"#,
                r#"{"big":12345678901234567890,"n":null,"x":1.0,"call_manager_command_id":"<marker>"}}},"#,
                r#"{"phone_number":"+14155550101","conversation_initiation_client_data":{"dynamic_variables":"#,
                r#"{"call_manager_command_id":"<marker>"}}}]}"#,
            )
        );
    }

    #[test]
    fn the_vendors_own_options_are_passed_on_and_null_is_left_out() {
        let sent = encoded(
            r#"{"call_name":"n","agent_id":"a","agent_phone_number_id":"p",
                "recipients":[{"phone_number":"+14155550100"}],"scheduled_time_unix":1696435200,
                "timezone":"America/Bogota","branch_id":null,"environment":"staging",
                "telephony_call_config":{"ringing_timeout_secs":30},"target_concurrency_limit":5}"#,
        );
        let rest = sent.split_once("}}}],").unwrap().1;
        assert_eq!(
            rest,
            concat!(
                r#""scheduled_time_unix":1696435200,"timezone":"America/Bogota","environment":"staging","#,
                r#""telephony_call_config":{"ringing_timeout_secs":30},"target_concurrency_limit":5}"#
            )
        );
    }
}
