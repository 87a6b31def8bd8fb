//! The JSON of the vendor's answers, field by field in the order of its `OpenAPI` document.

use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::body::TelephonyCallConfig;
use crate::life::{BatchStatus, CallStatus};

/// A `BatchCallResponse`; with its recipients a `BatchCallDetailedResponse`.
#[derive(Debug, Serialize)]
pub(crate) struct BatchCall<'a> {
    pub(crate) id: &'a str,
    pub(crate) phone_number_id: Option<&'a str>,
    pub(crate) phone_provider: Option<&'static str>,
    pub(crate) whatsapp_params: Option<&'a RawValue>,
    pub(crate) name: &'a str,
    pub(crate) agent_id: &'a str,
    pub(crate) branch_id: Option<&'a str>,
    pub(crate) environment: Option<&'a str>,
    pub(crate) created_at_unix: i64,
    pub(crate) scheduled_time_unix: i64,
    pub(crate) timezone: Option<&'a str>,
    pub(crate) total_calls_dispatched: u64,
    pub(crate) total_calls_scheduled: u64,
    pub(crate) total_calls_finished: u64,
    pub(crate) last_updated_at_unix: i64,
    pub(crate) status: BatchStatus,
    pub(crate) retry_count: u32,
    pub(crate) telephony_call_config: &'a TelephonyCallConfig,
    pub(crate) target_concurrency_limit: Option<u64>,
    pub(crate) agent_name: &'static str,
    pub(crate) branch_name: Option<&'static str>,
    pub(crate) sandbox_extra: Extra,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) recipients: Option<Vec<CallRecipient<'a>>>,
}

/// A field that no published schema has: what reads the answers has to carry it along unchanged.
#[derive(Debug, Serialize)]
pub(crate) struct Extra {
    zone: &'static str,
    adequacy: f64,
    // Out of alphabetical order and beyond 2^53 on purpose: a detour by a float or a sorted map
    // changes it.
    ordinal: u64,
}

pub(crate) const EXTRA: Extra =
    Extra { zone: "größer", adequacy: 1.0, ordinal: 9_007_199_254_740_993 };

/// An `OutboundCallRecipientResponseModel`.
#[derive(Debug, Serialize)]
pub(crate) struct CallRecipient<'a> {
    pub(crate) id: String,
    pub(crate) phone_number: Option<&'a str>,
    pub(crate) whatsapp_user_id: Option<&'a str>,
    pub(crate) status: CallStatus,
    pub(crate) created_at_unix: i64,
    pub(crate) updated_at_unix: i64,
    pub(crate) conversation_id: Option<String>,
    pub(crate) conversation_initiation_client_data: Option<&'a RawValue>,
}

/// A `WorkspaceBatchCallsResponse`.
#[derive(Debug, Serialize)]
pub(crate) struct Page<'a> {
    pub(crate) batch_calls: Vec<BatchCall<'a>>,
    pub(crate) next_doc: Option<&'a str>,
    pub(crate) has_more: bool,
}

/// A `GetConversationsPageResponseModel`, with the fields that say whose a conversation is.
#[derive(Debug, Serialize)]
#[expect(clippy::struct_field_names, reason = "the vendor's names")]
pub(crate) struct Conversations<'a> {
    pub(crate) conversations: Vec<Conversation<'a>>,
    pub(crate) next_cursor: Option<&'a str>,
    pub(crate) has_more: bool,
}

/// A conversation in that page.
#[derive(Debug, Serialize)]
#[expect(clippy::struct_field_names, reason = "the vendor's names")]
pub(crate) struct Conversation<'a> {
    pub(crate) agent_id: &'a str,
    pub(crate) conversation_id: String,
    pub(crate) status: CallStatus,
}

/// A `GetConversationResponseModel`, with the same.
#[derive(Debug, Serialize)]
pub(crate) struct ConversationDetail<'a> {
    #[serde(flatten)]
    conversation: Conversation<'a>,
    metadata: ConversationMetadata<'a>,
    conversation_initiation_client_data: ConversationData,
}

#[derive(Debug, Serialize)]
struct ConversationMetadata<'a> {
    batch_call: ConversationBatch<'a>,
}

#[derive(Debug, Serialize)]
struct ConversationBatch<'a> {
    batch_call_id: &'a str,
    batch_call_recipient_id: String,
}

#[derive(Debug, Serialize)]
struct ConversationData {
    dynamic_variables: Map<String, Value>,
}

impl<'a> ConversationDetail<'a> {
    pub(crate) fn new(
        conversation: Conversation<'a>,
        batch_call_id: &'a str,
        batch_call_recipient_id: String,
        dynamic_variables: Map<String, Value>,
    ) -> Self {
        let batch_call = ConversationBatch { batch_call_id, batch_call_recipient_id };
        Self {
            conversation,
            metadata: ConversationMetadata { batch_call },
            conversation_initiation_client_data: ConversationData { dynamic_variables },
        }
    }
}

/// A vendor's CSV export. The real columns are not documented.
pub(crate) fn csv(recipients: &[CallRecipient<'_>]) -> String {
    let mut out = String::from("id,phone_number,whatsapp_user_id,status,conversation_id\r\n");
    for recipient in recipients {
        let status = serde_json::to_value(recipient.status).unwrap_or_default();
        let cells = [
            Some(recipient.id.as_str()),
            recipient.phone_number,
            recipient.whatsapp_user_id,
            status.as_str(),
            recipient.conversation_id.as_deref(),
        ];
        let cells = cells.map(|cell| quoted(cell.unwrap_or_default()));
        out.push_str(&cells.join(","));
        out.push_str("\r\n");
    }
    out
}

fn quoted(cell: &str) -> String {
    if cell.contains(['"', ',', '\r', '\n']) {
        format!("\"{}\"", cell.replace('"', "\"\""))
    } else {
        cell.to_owned()
    }
}
