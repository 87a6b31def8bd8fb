//! Turns a message's bytes and properties into a [`Command`], or says everything that is wrong with it.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::canonical::{canonical, write_string};
use super::validation::{self, Rejection};
use super::{Earlier, short};

/// The dynamic variable by which the batch of a command can be recognised at the vendor.
pub const COMMAND_ID_VARIABLE: &str = "call_manager_command_id";

/// The namespace of markers, so that they collide with nobody else's version 5 UUIDs.
const MARKERS: Uuid = Uuid::from_u128(0x0b6e_3c1d_4f0a_4c53_9d2f_7a41_c8e0_5b97);

/// The value of [`COMMAND_ID_VARIABLE`] on every recipient of a submit: `cm_` and 32 hexadecimal
/// digits, the same for one command id. Not the id itself: a layer on the way may take `12345` for
/// a number, or trim blanks.
pub fn marker(command_id: &str) -> String {
    format!("cm_{}", Uuid::new_v5(&MARKERS, command_id.as_bytes()).simple())
}

/// The largest body that is read, in bytes: 10,000 recipients with 1.5 KB of variables each.
pub const MAX_BODY_BYTES: usize = 16 * 1024 * 1024;

/// Stands for each byte of a property that is not UTF-8. ASCII has it for just that; nobody means
/// it, so an id with it in can be told from a good one: two broken ids may have become the same.
pub const SUBSTITUTE: char = '\u{1a}';

/// Seconds from here on lie in the year 5138: such a number can only be milliseconds.
const FIRST_MILLISECONDS: f64 = 1e11;

/// What a command asks for. Each has a routing key and a queue of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CommandKind {
    /// Create a batch.
    Submit,
    /// Stop a batch.
    Cancel,
    /// Read a batch.
    Get,
}

impl CommandKind {
    /// Every kind, in the order in which a worker starts to consume them.
    pub const ALL: [Self; 3] = [Self::Cancel, Self::Get, Self::Submit];

    /// The name used in queue names, routing keys, logs and the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Submit => "submit",
            Self::Cancel => "cancel",
            Self::Get => "get",
        }
    }

    /// The routing key on the commands exchange.
    pub fn routing_key(self) -> String {
        format!("batch-calling.{}", self.name())
    }

    fn of_routing_key(routing_key: &str) -> Option<Self> {
        let name = routing_key.strip_prefix("batch-calling.")?;
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl fmt::Display for CommandKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One message as it came from a command queue, still unchecked.
#[derive(Clone, PartialEq)]
pub struct CommandMessage {
    /// The command whose queue the message lay in.
    pub queue: CommandKind,
    /// `None` where the message was published straight to the queue (default exchange).
    pub routing_key: Option<String>,
    /// AMQP `message_id`; an empty one counts as absent.
    pub message_id: Option<String>,
    /// AMQP `correlation_id`; an empty one counts as absent.
    pub correlation_id: Option<String>,
    /// AMQP `content_type`.
    pub content_type: Option<String>,
    /// AMQP `content_encoding`.
    pub content_encoding: Option<String>,
    /// W3C trace context to copy to the result.
    pub traceparent: Option<String>,
    /// W3C trace state to copy to the result.
    pub tracestate: Option<String>,
    /// The queue that gets a copy of the result.
    pub reply_to: Option<String>,
    /// The header `not_after`: Unix seconds, past which the command is not worth doing.
    pub not_after: Option<String>,
    /// What is wrong with the name of one of its headers.
    pub refused_header: Option<String>,
    /// From the property `expiration`: when the message would have been dropped, had it stayed in its
    /// queue. It is not begun later.
    pub expires_at: Option<SystemTime>,
    /// How often the broker has delivered it before without its having been settled.
    pub redeliveries: u32,
    /// What it brings along from before it was deferred.
    pub earlier: Earlier,
    /// The request body.
    pub body: Vec<u8>,
}

impl fmt::Debug for CommandMessage {
    // Bodies carry phone numbers: they are counted, never shown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CommandMessage")
            .field("queue", &self.queue)
            .field("message_id", &self.message_id)
            .field("body_bytes", &self.body.len())
            .finish_non_exhaustive()
    }
}

impl CommandMessage {
    /// The id the producer gave the command: `message_id`, else `correlation_id`.
    pub fn producer_id(&self) -> Option<&str> {
        self.message_id.as_deref().or(self.correlation_id.as_deref())
    }

    /// How often it came back to its queue without having been settled, before it was set aside too.
    pub fn came_back(&self) -> u32 {
        self.redeliveries.saturating_add(self.earlier.deliveries)
    }

    /// The command that the routing key names; the queue's own where it names none.
    pub fn kind(&self) -> CommandKind {
        self.named().unwrap_or(self.queue)
    }

    /// The command it names: by its routing key, or by the queue that it was published straight to.
    pub fn named(&self) -> Option<CommandKind> {
        match &self.routing_key {
            Some(key) => CommandKind::of_routing_key(key),
            None => Some(self.queue),
        }
    }

    /// Reads the command. Parsing 10,000 recipients takes some 20 ms: call it off the reactor for
    /// large bodies.
    pub fn parse(&self) -> Result<Command, Rejection> {
        if let (None, Some(key)) = (self.named(), &self.routing_key) {
            return Err(Rejection::of(format!(
                "the routing key \"{}\" names no command; use batch-calling.submit, \
                 batch-calling.cancel or batch-calling.get",
                validation::excerpt(key)
            )));
        }
        self.check_ids()?;
        self.check_encoding()?;
        if let Some(wrong) = &self.refused_header {
            return Err(Rejection::of(wrong.clone()));
        }
        self.deadline()?;
        Command::parse(self.kind(), &self.body)
    }

    /// When it is too late to begin it: the earlier of `not_after` and `expires_at`.
    pub fn begin_before(&self) -> Option<SystemTime> {
        let not_after = self.deadline().unwrap_or_default();
        not_after.into_iter().chain(self.expires_at).min()
    }

    /// When it is not worth doing any more, as the header `not_after` says.
    pub fn deadline(&self) -> Result<Option<SystemTime>, Rejection> {
        let Some(text) = &self.not_after else { return Ok(None) };
        let wrong = |what: &str| {
            Rejection::of(format!(
                "the header not_after is \"{}\", {what}; send Unix seconds as a whole number, for \
                 example 1767225600, or leave it out",
                validation::excerpt(text)
            ))
        };
        let text = text.trim();
        let seconds: i64 = text.parse().map_err(|_| wrong("not a time"))?;
        if text.parse::<f64>().is_ok_and(|n| n >= FIRST_MILLISECONDS) {
            return Err(wrong("which can only be milliseconds"));
        }
        // Before 1970 is as much in the past as 1970 is.
        let since = Duration::from_secs(u64::try_from(seconds).unwrap_or_default());
        Ok(SystemTime::UNIX_EPOCH.checked_add(since))
    }

    /// Whether the ids are such that the command can be known by them.
    pub fn check_ids(&self) -> Result<(), Rejection> {
        for (name, id) in
            [("message_id", &self.message_id), ("correlation_id", &self.correlation_id)]
        {
            let Some(id) = id else { continue };
            if id.contains(SUBSTITUTE) {
                return Err(Rejection::of(format!(
                    "the {name} is not UTF-8; send UTF-8 text, such as a UUID"
                )));
            }
            // No text column of a database takes it.
            if id.contains('\0') {
                return Err(Rejection::of(format!(
                    "the {name} has a NUL character in it; send printable text, such as a UUID"
                )));
            }
        }
        if self.kind() == CommandKind::Submit && self.producer_id().is_none() {
            return Err(Rejection::of(
                "a submit needs a message_id (or a correlation_id), unique per command: without \
                 one a redelivery cannot be told from a new campaign; set the AMQP property \
                 message_id, for example to a UUID",
            ));
        }
        Ok(())
    }

    fn check_encoding(&self) -> Result<(), Rejection> {
        if let Some(given) = &self.content_type {
            let essence = given.split(';').next().unwrap_or_default().trim();
            if !essence.is_empty() && !essence.eq_ignore_ascii_case("application/json") {
                return Err(Rejection::of(format!(
                    "the content_type is \"{}\"; set it to application/json or leave it out",
                    validation::excerpt(given)
                )));
            }
        }
        if let Some(given) = &self.content_encoding
            && !["", "utf-8", "utf8", "identity"].contains(&given.to_ascii_lowercase().as_str())
        {
            return Err(Rejection::of(format!(
                "the content_encoding is \"{}\"; send plain UTF-8 JSON and leave it out",
                validation::excerpt(given)
            )));
        }
        Ok(())
    }
}

/// A command that may be executed.
#[derive(Debug)]
pub enum Command {
    /// Create a batch.
    Submit(Box<Submit>),
    /// Stop a batch.
    Cancel(Target),
    /// Read a batch.
    Get(Target),
}

impl Command {
    /// Reads the body of a command of the given kind.
    pub fn parse(kind: CommandKind, body: &[u8]) -> Result<Self, Rejection> {
        let text = validation::json_text(body)?;
        validation::check(kind, text)?;
        match kind {
            CommandKind::Submit => {
                let submit: Submit = validation::typed(text)?;
                submit.check()?;
                Ok(Self::Submit(Box::new(submit)))
            }
            CommandKind::Cancel => Ok(Self::Cancel(validation::typed(text)?)),
            CommandKind::Get => Ok(Self::Get(validation::typed(text)?)),
        }
    }
}

/// Which batch a cancel or a get is about (`schemas/cancel.json`, `schemas/get.json`).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Reference")]
pub enum Target {
    /// By the vendor's id.
    Batch(BatchId),
    /// By the `message_id` of the submit that creates it.
    Submit(String),
}

#[derive(Deserialize)]
struct Reference {
    batch_id: Option<BatchId>,
    command_id: Option<String>,
}

impl TryFrom<Reference> for Target {
    type Error = &'static str;

    fn try_from(reference: Reference) -> Result<Self, Self::Error> {
        match (reference.batch_id, reference.command_id) {
            (Some(id), None) => Ok(Self::Batch(id)),
            (None, Some(id)) => Ok(Self::Submit(id)),
            _ => Err("one of batch_id and command_id"),
        }
    }
}

/// What stands in a batch id's place in the URLs of other operations.
const ROUTES: [&str; 2] = ["submit", "workspace"];

/// A vendor's batch id that cannot leave its path segment in a URL.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct BatchId(String);

impl BatchId {
    /// The id: 1 to 128 of `A-Z a-z 0-9 _ -`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for BatchId {
    type Error = &'static str;

    fn try_from(id: String) -> Result<Self, Self::Error> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
        if ROUTES.contains(&id.as_str()) {
            Err("it is no batch id but the name of another route of ElevenLabs' API")
        } else if (1..=128).contains(&id.len()) && id.bytes().all(allowed) {
            Ok(Self(id))
        } else {
            Err("a batch id is 1 to 128 letters, digits, _ or -")
        }
    }
}

impl fmt::Display for BatchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The body of a submit (`schemas/submit.json`). Values that are only passed on stay as the
/// producer wrote them.
#[derive(Deserialize, Serialize)]
pub struct Submit {
    /// The batch's name.
    pub call_name: String,
    /// The vendor's agent.
    pub agent_id: String,
    /// The imported phone number that calls.
    pub agent_phone_number_id: String,
    /// 1 to 10,000, no two identical.
    pub recipients: Vec<Recipient>,
    /// Unix seconds; absent means now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scheduled_time_unix: Option<Box<RawValue>>,
    /// Compared with the vendor's answer, never sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phone_provider: Option<String>,
    /// Passed on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timezone: Option<Box<RawValue>>,
    /// Passed on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub branch_id: Option<Box<RawValue>>,
    /// Passed on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub environment: Option<Box<RawValue>>,
    /// Passed on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub telephony_call_config: Option<BTreeMap<String, Box<RawValue>>>,
    /// Passed on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_concurrency_limit: Option<Box<RawValue>>,
}

/// One person to call.
#[derive(Deserialize, Serialize)]
pub struct Recipient {
    /// E.164.
    pub phone_number: String,
    /// Sorted by name, so that equal sets compare equal.
    #[serde(default)]
    pub dynamic_variables: BTreeMap<String, Box<RawValue>>,
}

impl fmt::Debug for Submit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Submit").field("recipients", &self.recipients.len()).finish_non_exhaustive()
    }
}

impl Submit {
    /// Tells two bodies apart by their values: not by escapes, the form of numbers, white space or the
    /// order of fields. Kept in ledgers: a field that is not given adds nothing, so that new ones change
    /// no old fingerprint.
    pub fn fingerprint(&self) -> Uuid {
        let mut hasher = blake3::Hasher::new();
        let mut field = |name: &str, value: &str| {
            hasher.update(name.as_bytes());
            // The length keeps what two fields say apart.
            hasher.update(&(value.len() as u64).to_le_bytes());
            hasher.update(value.as_bytes());
        };
        field("call_name", &self.call_name);
        field("agent_id", &self.agent_id);
        field("agent_phone_number_id", &self.agent_phone_number_id);
        for recipient in &self.recipients {
            field("phone_number", &recipient.phone_number);
            for (name, value) in &recipient.dynamic_variables {
                field("name", name);
                field("value", &canonical(value.get()));
            }
        }
        for (name, value) in self.given() {
            field(name, &value);
        }
        short(hasher.finalize().into())
    }

    /// The optional fields that are given, in one order.
    fn given(&self) -> impl Iterator<Item = (&'static str, String)> {
        let raw = |value: &Option<Box<RawValue>>| {
            value.as_ref().map(|value| canonical(value.get()).into_owned())
        };
        let config = self.telephony_call_config.as_ref().map(|config| {
            let fields = config.iter().map(|(name, value)| {
                let mut text = String::new();
                write_string(&mut text, name);
                format!("{text}:{}", canonical(value.get()))
            });
            fields.collect::<Vec<_>>().join(",")
        });
        let all = [
            ("scheduled_time_unix", raw(&self.scheduled_time_unix)),
            ("phone_provider", self.phone_provider.clone()),
            ("timezone", raw(&self.timezone)),
            ("branch_id", raw(&self.branch_id)),
            ("environment", raw(&self.environment)),
            ("telephony_call_config", config),
            ("target_concurrency_limit", raw(&self.target_concurrency_limit)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?)))
    }

    /// The fingerprint as version 0.1.0 made it: rows of that version have it.
    pub fn former_fingerprint(&self) -> Uuid {
        // Serializing maps with string keys into memory has no way to fail; an empty fingerprint
        // would only make two broken bodies look alike.
        let canonical = serde_json::to_vec(self).unwrap_or_default();
        Uuid::new_v5(&Uuid::NAMESPACE_OID, &canonical)
    }

    /// What the schema cannot say.
    fn check(&self) -> Result<(), Rejection> {
        let mut rejection = Rejection::default();
        if let Some(raw) = &self.scheduled_time_unix
            && raw.get().parse::<f64>().is_ok_and(|n| n >= FIRST_MILLISECONDS)
        {
            rejection.add(
                "scheduled_time_unix",
                "must be in seconds, and this can only be milliseconds; divide it by 1000",
            );
        }
        let mut first_index = HashMap::with_capacity(self.recipients.len());
        for (index, recipient) in self.recipients.iter().enumerate() {
            if let Some(first) = first_index.insert(recipient.identity(), index) {
                rejection.add(
                    &format!("recipients[{index}]"),
                    &format!(
                        "is identical to recipients[{first}] (same phone_number and \
                         dynamic_variables): the person would be called twice; remove one"
                    ),
                );
            }
        }
        rejection.into_result()
    }
}

impl Recipient {
    fn identity(&self) -> (&str, Vec<(&str, Cow<'_, str>)>) {
        let variables = self.dynamic_variables.iter();
        (
            &self.phone_number,
            variables.map(|(name, value)| (name.as_str(), canonical(value.get()))).collect(),
        )
    }
}

#[cfg(test)]
#[path = "command_tests.rs"]
pub mod tests;
