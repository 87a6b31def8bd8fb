//! Checks a body against its JSON Schema and words every fault as a person would.

use std::fmt;
use std::fmt::Write as _;
use std::sync::LazyLock;

use jsonschema::error::{TypeKind, ValidationErrorKind};
use jsonschema::paths::{Location, LocationSegment};
use jsonschema::{ValidationError, Validator};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::command::{CommandKind, MAX_BODY_BYTES};

/// How many faults are listed; the rest is counted.
const LISTED_FAULTS: usize = 20;

/// Everything that is wrong with a command, each fault with its path. Its `Display` is the
/// sentence the producer reads; it never repeats a value.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Rejection {
    listed: Vec<String>,
    more: usize,
}

impl Rejection {
    /// A rejection for one reason.
    pub fn of(reason: impl Into<String>) -> Self {
        Self { listed: vec![reason.into()], more: 0 }
    }

    pub(super) fn add(&mut self, path: &str, fault: &str) {
        if self.is_full() {
            self.more += 1;
        } else {
            self.listed.push(format!("{path}: {fault}"));
        }
    }

    fn is_full(&self) -> bool {
        self.listed.len() >= LISTED_FAULTS
    }

    fn is_empty(&self) -> bool {
        self.listed.is_empty()
    }

    pub(super) fn into_result(self) -> Result<(), Self> {
        if self.is_empty() { Ok(()) } else { Err(self) }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "The command is not valid: {}", self.listed.join("; "))?;
        if self.more > 0 {
            write!(f, "; and {} more", self.more)?;
        }
        f.write_str(". Nothing was sent to ElevenLabs.")
    }
}

/// The body as text, if it can be JSON at all.
pub(super) fn json_text(body: &[u8]) -> Result<&str, Rejection> {
    if body.is_empty() {
        return Err(Rejection::of("the body is empty; send a JSON object"));
    }
    if body.len() > MAX_BODY_BYTES {
        return Err(Rejection::of(format!(
            "the body has {} bytes, and at most {MAX_BODY_BYTES} are read; split the batch",
            body.len()
        )));
    }
    std::str::from_utf8(body).map_err(|error| {
        Rejection::of(format!(
            "the body is not UTF-8 from byte {} on; send UTF-8 encoded JSON",
            error.valid_up_to()
        ))
    })
}

/// Checks the text against the schema of its kind.
pub(super) fn check(kind: CommandKind, text: &str) -> Result<(), Rejection> {
    let body: Value = serde_json::from_str(text)
        .map_err(|error| Rejection::of(format!("the body is not JSON: {error}")))?;
    let mut rejection = Rejection::default();
    match kind {
        CommandKind::Submit => {
            SUBMIT.check(&body, "", &mut rejection);
            // Of more than there may be, what is wrong with each does not matter.
            if let Some(recipients) = body["recipients"].as_array()
                && recipients.len() <= SUBMIT.limit("/properties/recipients/maxItems")
            {
                check_recipients(recipients, &mut rejection);
            }
        }
        CommandKind::Cancel => CANCEL.check(&body, "", &mut rejection),
        CommandKind::Get => GET.check(&body, "", &mut rejection),
    }
    rejection.into_result()
}

/// One by one: the validator collects every fault of what it is given before the first can be
/// read, and a body of 16 MB has room for millions.
fn check_recipients(recipients: &[Value], rejection: &mut Rejection) {
    let most = RECIPIENT.limit("/properties/dynamic_variables/maxProperties");
    for (index, recipient) in recipients.iter().enumerate() {
        let base = format!("recipients[{index}]");
        let variables = recipient["dynamic_variables"].as_object().map_or(0, serde_json::Map::len);
        if variables > most {
            let fault = format!("must have at most {most} entries and has {variables}");
            rejection.add(&format!("{base}.dynamic_variables"), &fault);
        } else if rejection.is_full() {
            rejection.more += usize::from(!RECIPIENT.validator.is_valid(recipient));
        } else {
            RECIPIENT.check(recipient, &base, rejection);
        }
    }
}

/// The typed form of a text that passed [`check`]. What can still fail is a repeated field.
pub(super) fn typed<T: DeserializeOwned>(text: &str) -> Result<T, Rejection> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let mut rejection = Rejection::default();
        let reason = error.inner().to_string();
        // Other texts of serde may quote the value, which can be a phone number.
        let fault = match reason.strip_prefix("duplicate field") {
            Some(field) => format!("repeats the field{field}; give it once"),
            None => "does not have the form that the schema documents".to_owned(),
        };
        // The whole body is "." there.
        let path = error.path().to_string();
        rejection.add(if path == "." { "body" } else { &path }, &fault);
        rejection
    })
}

/// The whole of it, for what a person has to search for, without control characters and quotes.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || c == '"' { '?' } else { c }).collect()
}

/// The first 64 characters, without control characters: enough to recognise a typo.
pub fn excerpt(text: &str) -> String {
    let mut shown: String = printable(text).chars().take(64).collect();
    if text.chars().nth(64).is_some() {
        shown.push('…');
    }
    shown
}

/// A submit but for what its schema says of each recipient.
static SUBMIT: LazyLock<Schema> = LazyLock::new(|| {
    let mut document = embedded(include_str!("../../schemas/submit.json"));
    document["properties"]["recipients"]["items"] = Value::Bool(true);
    Schema::new(document)
});
/// What the schema of a submit says of each recipient.
static RECIPIENT: LazyLock<Schema> = LazyLock::new(|| {
    let mut document = embedded(include_str!("../../schemas/submit.json"));
    Schema::new(document["properties"]["recipients"]["items"].take())
});
static CANCEL: LazyLock<Schema> =
    LazyLock::new(|| Schema::new(embedded(include_str!("../../schemas/cancel.json"))));
static GET: LazyLock<Schema> =
    LazyLock::new(|| Schema::new(embedded(include_str!("../../schemas/get.json"))));

#[expect(clippy::expect_used, reason = "a part of the binary, and every test here reads it")]
fn embedded(text: &str) -> Value {
    serde_json::from_str(text).expect("an embedded schema is JSON")
}

struct Schema {
    document: Value,
    validator: Validator,
}

impl Schema {
    #[expect(clippy::expect_used, reason = "a part of the binary, and every test here compiles it")]
    fn new(document: Value) -> Self {
        let validator = jsonschema::options()
            .should_validate_formats(true)
            .build(&document)
            .expect("an embedded schema is a JSON Schema");
        Self { document, validator }
    }

    /// A limit of the schema's, for what has to be asked before the validator is.
    fn limit(&self, pointer: &str) -> usize {
        let limit = self.document.pointer(pointer).and_then(Value::as_u64);
        limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX)
    }

    /// Adds every fault of `value`, which lies at `base` in the body.
    fn check(&self, value: &Value, base: &str, rejection: &mut Rejection) {
        for error in self.validator.iter_errors(value) {
            self.explain(&error, base, rejection);
        }
    }

    fn explain(&self, error: &ValidationError<'_>, base: &str, rejection: &mut Rejection) {
        use ValidationErrorKind as Kind;
        let path = human_path(base, error.instance_path());
        let node = self.node_of(error);
        let described = || {
            let text = node.and_then(|node| node["description"].as_str());
            text.unwrap_or("as the schema documents it").to_owned()
        };
        let fault = match error.kind() {
            Kind::Required { property } => {
                let name = excerpt(property.as_str().unwrap_or_default());
                rejection.add(&child(&path, &name), "is required");
                return;
            }
            Kind::AdditionalProperties { unexpected } => {
                let fault = format!("is not a known field; known are {}", known(node).join(", "));
                for name in unexpected {
                    rejection.add(&child(&path, &excerpt(name)), &fault);
                }
                return;
            }
            Kind::Type { kind } => {
                format!("must be {}, not {}", types(kind), type_of(error.instance()))
            }
            Kind::Enum { options } => format!("must be one of {options}"),
            Kind::Not { .. } => format!("is {}", described()),
            Kind::Pattern { .. } => format!("must be {}", described()),
            Kind::MinProperties { .. } => {
                format!("must have one of the fields {}", known(node).join(", "))
            }
            Kind::MaxProperties { limit: 1 } => {
                format!("must have only one of the fields {}", known(node).join(", "))
            }
            Kind::MinLength { limit: 1 } | Kind::MinItems { limit: 1 } => {
                "must not be empty".to_owned()
            }
            Kind::MaxLength { limit } => format!("must have at most {limit} characters"),
            Kind::MinItems { limit } => format!("must have at least {limit} entries"),
            Kind::MaxItems { limit } => {
                let given = error.instance().as_array().map_or(0, Vec::len);
                format!("must have at most {limit} entries and has {given}; split the batch")
            }
            Kind::Minimum { limit } => format!("must be at least {limit}"),
            Kind::Maximum { limit } => format!("must be at most {limit}"),
            other => format!("breaks the rule \"{}\" of the schema", other.keyword()),
        };
        rejection.add(&path, &fault);
    }

    /// The part of the schema that holds the keyword which failed.
    fn node_of(&self, error: &ValidationError<'_>) -> Option<&Value> {
        let pointer = error.schema_path().as_str();
        let (node, _keyword) = pointer.rsplit_once('/')?;
        self.document.pointer(node)
    }
}

/// The fields that a part of the schema names.
fn known(node: Option<&Value>) -> Vec<&str> {
    let properties = node.and_then(|node| node["properties"].as_object());
    properties.into_iter().flat_map(serde_json::Map::keys).map(String::as_str).collect()
}

fn child(path: &str, name: &str) -> String {
    if path == "body" { name.to_owned() } else { format!("{path}.{name}") }
}

/// `/phone_number` below `recipients[3]` as `recipients[3].phone_number`; the whole body as `body`.
fn human_path(base: &str, location: &Location) -> String {
    let mut path = base.to_owned();
    for segment in location {
        match segment {
            LocationSegment::Index(index) => {
                let _infallible = write!(path, "[{index}]");
            }
            LocationSegment::Property(name) => {
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(&excerpt(&name));
            }
        }
    }
    if path.is_empty() {
        path.push_str("body");
    }
    path
}

fn types(kind: &TypeKind) -> String {
    let mut names: Vec<String> = match kind {
        TypeKind::Single(one) => vec![one.to_string()],
        TypeKind::Multiple(several) => several.iter().map(|one| one.to_string()).collect(),
    };
    // "or null" reads better at the end.
    names.sort_by_key(|name| name == "null");
    names.iter().map(|name| with_article(name)).collect::<Vec<_>>().join(" or ")
}

fn type_of(value: &Value) -> String {
    with_article(match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    })
}

fn with_article(name: &str) -> String {
    match name {
        "null" => "null".to_owned(),
        "array" | "object" | "integer" => format!("an {name}"),
        _ => format!("a {name}"),
    }
}
