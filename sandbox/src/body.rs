//! The body of a submit: the fields the vendor's `OpenAPI` document lists, and what they become.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::json::Json;
use crate::schema::{Absent, Field, Kind, Step, Wrong, check};

/// How many recipients one batch may have.
const MAX_RECIPIENTS: usize = 10_000;

const TEXT: Kind = Kind::Text { max: None };
const TEXT_OR_NULL: Kind = Kind::Nullable(&TEXT);
const TEXTS_OR_NULL: Kind = Kind::Nullable(&Kind::List { of: &TEXT, max: usize::MAX });
const WHOLE: Kind = Kind::Whole { min: i64::MIN, max: i64::MAX };
const WHOLE_OR_NULL: Kind = Kind::Nullable(&WHOLE);
const NUMBER_OR_NULL: Kind = Kind::Nullable(&Kind::Number);

const fn required(name: &'static str, kind: Kind) -> Field {
    Field { name, kind, absent: Absent::Error }
}

const fn optional(name: &'static str, kind: Kind) -> Field {
    Field { name, kind, absent: Absent::Null }
}

const fn defaulted(name: &'static str, kind: Kind, absent: Absent) -> Field {
    Field { name, kind, absent }
}

const SUBMIT: &[Field] = &[
    required("call_name", TEXT),
    required("agent_id", TEXT),
    required("recipients", Kind::List { of: &Kind::Model(RECIPIENT), max: MAX_RECIPIENTS }),
    optional("scheduled_time_unix", WHOLE_OR_NULL),
    optional("agent_phone_number_id", TEXT_OR_NULL),
    optional("whatsapp_params", Kind::Nullable(&Kind::Model(WHATSAPP_PARAMS))),
    optional("timezone", TEXT_OR_NULL),
    optional("branch_id", TEXT_OR_NULL),
    optional("environment", TEXT_OR_NULL),
    defaulted("telephony_call_config", Kind::Model(TELEPHONY_CALL_CONFIG), Absent::Empty),
    optional("target_concurrency_limit", Kind::Nullable(&Kind::Whole { min: 1, max: i64::MAX })),
];

const WHATSAPP_PARAMS: &[Field] = &[
    optional("whatsapp_phone_number_id", TEXT_OR_NULL),
    required("whatsapp_call_permission_request_template_name", TEXT),
    required("whatsapp_call_permission_request_template_language_code", TEXT),
];

const TELEPHONY_CALL_CONFIG: &[Field] = &[
    defaulted("ringing_timeout_secs", Kind::Whole { min: 1, max: 999 }, Absent::Whole(60)),
    defaulted("twilio_call_recording_enabled", Kind::Flag, Absent::Flag(false)),
];

const RECIPIENT: &[Field] = &[
    optional("id", TEXT_OR_NULL),
    optional("phone_number", TEXT_OR_NULL),
    optional("whatsapp_user_id", TEXT_OR_NULL),
    optional("conversation_initiation_client_data", Kind::Nullable(&Kind::Model(CLIENT_DATA))),
];

// In the order of the answer's model: what is shaped here is what comes back from a get.
const CLIENT_DATA: &[Field] = &[
    defaulted("conversation_config_override", Kind::Model(CONFIG_OVERRIDE), Absent::Empty),
    defaulted("custom_llm_extra_body", Kind::Free, Absent::Empty),
    optional("user_id", TEXT_OR_NULL),
    defaulted("source_info", Kind::Model(SOURCE_INFO), Absent::Empty),
    optional("branch_id", TEXT_OR_NULL),
    optional("environment", TEXT_OR_NULL),
    optional("starting_workflow_node_id", TEXT_OR_NULL),
    optional("procedure_ids", TEXTS_OR_NULL),
    defaulted("dynamic_variables", Kind::Free, Absent::Empty),
];

// The sources are a list of the vendor's own products that keeps growing, so any word passes.
const SOURCE_INFO: &[Field] = &[
    optional("source", TEXT_OR_NULL),
    optional("version", Kind::Nullable(&Kind::Text { max: Some(50) })),
];

const CONFIG_OVERRIDE: &[Field] = &[
    optional("asr", Kind::Nullable(&Kind::Model(&[optional("keywords", TEXTS_OR_NULL)]))),
    optional("turn", Kind::Nullable(&Kind::Model(TURN_OVERRIDE))),
    optional("tts", Kind::Nullable(&Kind::Model(TTS_OVERRIDE))),
    optional("conversation", Kind::Nullable(&Kind::Model(CONVERSATION_OVERRIDE))),
    optional("agent", Kind::Nullable(&Kind::Model(AGENT_OVERRIDE))),
];

const TURN_OVERRIDE: &[Field] = &[optional(
    "soft_timeout_config",
    Kind::Nullable(&Kind::Model(&[
        optional("message", TEXT_OR_NULL),
        optional("additional_soft_timeout_messages", TEXTS_OR_NULL),
    ])),
)];

const TTS_OVERRIDE: &[Field] = &[
    optional(
        "model_id",
        Kind::Nullable(&Kind::Word(&[
            "eleven_turbo_v2",
            "eleven_turbo_v2_5",
            "eleven_flash_v2",
            "eleven_flash_v2_5",
            "eleven_multilingual_v2",
            "eleven_v3_conversational",
        ])),
    ),
    optional("voice_id", TEXT_OR_NULL),
    optional("stability", NUMBER_OR_NULL),
    optional("speed", NUMBER_OR_NULL),
    optional("similarity_boost", NUMBER_OR_NULL),
    optional(
        "pronunciation_dictionary_locators",
        Kind::Nullable(&Kind::List { of: &Kind::Model(DICTIONARY), max: usize::MAX }),
    ),
];

const DICTIONARY: &[Field] =
    &[required("pronunciation_dictionary_id", TEXT), required("version_id", TEXT_OR_NULL)];

const CONVERSATION_OVERRIDE: &[Field] = &[
    optional("text_only", Kind::Nullable(&Kind::Flag)),
    optional("max_duration_seconds", WHOLE_OR_NULL),
];

const AGENT_OVERRIDE: &[Field] = &[
    optional("first_message", TEXT_OR_NULL),
    optional("language", TEXT_OR_NULL),
    optional("max_conversation_duration_message", TEXT_OR_NULL),
    optional("prompt", Kind::Nullable(&Kind::Model(PROMPT_OVERRIDE))),
];

// The language models are left unchecked for the same reason as the sources.
const PROMPT_OVERRIDE: &[Field] = &[
    optional("prompt", TEXT_OR_NULL),
    optional("llm", TEXT_OR_NULL),
    optional("tool_ids", TEXTS_OR_NULL),
    optional("native_mcp_server_ids", TEXTS_OR_NULL),
    optional(
        "knowledge_base",
        Kind::Nullable(&Kind::List { of: &Kind::Model(KNOWLEDGE_BASE), max: usize::MAX }),
    ),
];

const KNOWLEDGE_BASE: &[Field] = &[
    required("type", Kind::Word(&["file", "url", "text", "folder"])),
    required("name", TEXT),
    required("id", TEXT),
    defaulted("usage_mode", Kind::Word(&["prompt", "auto"]), Absent::Word("auto")),
];

/// A submit that passed the check, with every default filled in.
#[derive(Debug, Deserialize)]
pub(crate) struct Submit {
    pub(crate) call_name: String,
    pub(crate) agent_id: String,
    pub(crate) recipients: Vec<NewRecipient>,
    pub(crate) scheduled_time_unix: Option<i64>,
    pub(crate) agent_phone_number_id: Option<String>,
    pub(crate) whatsapp_params: Option<Box<RawValue>>,
    pub(crate) timezone: Option<String>,
    pub(crate) branch_id: Option<String>,
    pub(crate) environment: Option<String>,
    pub(crate) telephony_call_config: TelephonyCallConfig,
    pub(crate) target_concurrency_limit: Option<u64>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct NewRecipient {
    pub(crate) id: Option<Box<str>>,
    pub(crate) phone_number: Option<Box<str>>,
    pub(crate) whatsapp_user_id: Option<Box<str>>,
    /// Kept as text, like the parameters above: it goes out as it is.
    pub(crate) conversation_initiation_client_data: Option<Box<RawValue>>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct TelephonyCallConfig {
    pub(crate) ringing_timeout_secs: u64,
    twilio_call_recording_enabled: bool,
}

const BODY: Step = Step::Name("body");

/// Reads a submit, or says everything that is wrong with it.
///
/// Without a JSON content type `FastAPI` does not parse a body at all, and complains about its type.
pub(crate) fn read(content_type: Option<&str>, body: &[u8]) -> Result<Submit, Vec<Wrong>> {
    if body.is_empty() {
        return Err(vec![Wrong::new(&[BODY], "missing", "Field required")]);
    }
    let is_json = content_type.is_none_or(|sent| {
        let media_type = sent.split(';').next().unwrap_or_default().trim().to_lowercase();
        media_type == "application/json"
            || (media_type.starts_with("application/") && media_type.ends_with("+json"))
    });
    let sent = if is_json {
        serde_json::from_slice(body).map_err(|broken| vec![not_json(&broken)])?
    } else {
        Json::String(String::from_utf8_lossy(body).into_owned())
    };
    let shaped = check(Kind::Model(SUBMIT), sent, BODY)?;
    // A detour by text: `RawValue` reads only from text, and the client data is kept as text.
    let text = serde_json::to_string(&shaped).map_err(|broken| vec![not_json(&broken)])?;
    serde_json::from_str(&text).map_err(|broken| vec![not_json(&broken)])
}

fn not_json(broken: &serde_json::Error) -> Wrong {
    Wrong::new(&[BODY, Step::Index(broken.column())], "json_invalid", "JSON decode error")
}
