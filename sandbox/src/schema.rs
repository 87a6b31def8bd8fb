//! Checks a JSON body against a table of fields the way the vendor's `FastAPI` server does.
//!
//! The check also shapes the value: unknown fields are dropped, absent ones get their default, and
//! what pydantic's lax mode converts (`"60"` for an integer) is converted.

use serde::Serialize;

use crate::json::Json;

/// What a field may hold.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// Text of at most so many characters.
    Text { max: Option<usize> },
    /// One of the listed words.
    Word(&'static [&'static str]),
    /// A whole number within the bounds.
    Whole { min: i64, max: i64 },
    /// Any number.
    Number,
    /// True or false.
    Flag,
    /// An object whose fields nobody checks.
    Free,
    /// An object with these fields.
    Model(&'static [Field]),
    /// A list of at most so many items.
    List { of: &'static Kind, max: usize },
    /// The same, or null.
    Nullable(&'static Kind),
}

/// What stands in for a field that was not sent.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Absent {
    /// Nothing does: the request is wrong.
    Error,
    Null,
    /// An empty object, checked like one that was sent: its own defaults apply.
    Empty,
    Whole(i64),
    Flag(bool),
    Word(&'static str),
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Field {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) absent: Absent,
}

/// One step of the way to a value: a field's name or an item's index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub(crate) enum Step {
    Name(&'static str),
    Index(usize),
}

/// One thing that is wrong with a request, in `FastAPI`'s words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Wrong {
    pub(crate) loc: Vec<Step>,
    pub(crate) msg: String,
    #[serde(rename = "type")]
    pub(crate) kind: &'static str,
}

impl Wrong {
    pub(crate) fn new(loc: &[Step], kind: &'static str, msg: impl Into<String>) -> Self {
        Self { loc: loc.to_vec(), msg: msg.into(), kind }
    }
}

/// The shaped value, or everything that is wrong with it.
pub(crate) fn check(kind: Kind, value: Json, root: Step) -> Result<Json, Vec<Wrong>> {
    let mut checker = Checker { at: vec![root], wrong: Vec::new() };
    let shaped = checker.shape(kind, value);
    if checker.wrong.is_empty() { Ok(shaped) } else { Err(checker.wrong) }
}

struct Checker {
    at: Vec<Step>,
    wrong: Vec<Wrong>,
}

impl Checker {
    fn shape(&mut self, kind: Kind, value: Json) -> Json {
        match (kind, value) {
            (Kind::Nullable(_), Json::Null) => Json::Null,
            (Kind::Nullable(kind), value) => self.shape(*kind, value),
            (Kind::Text { max }, Json::String(text)) => match max {
                Some(max) if text.chars().count() > max => self.refuse(
                    "string_too_long",
                    format!("String should have at most {max} characters"),
                ),
                _ => Json::String(text),
            },
            (Kind::Text { .. }, _) => self.refuse("string_type", "Input should be a valid string"),
            (Kind::Word(words), Json::String(word)) if words.contains(&word.as_str()) => {
                Json::String(word)
            }
            (Kind::Word(words), _) => {
                self.refuse("enum", format!("Input should be '{}'", words.join("', '")))
            }
            (Kind::Whole { min, max }, value) => self.whole(&value, min, max),
            (Kind::Number, value) => self.number(value),
            (Kind::Flag, value) => self.flag(&value),
            (Kind::Free, Json::Object(fields)) => Json::Object(fields),
            (Kind::Free, _) => self.refuse("dict_type", "Input should be a valid dictionary"),
            (Kind::Model(model), Json::Object(fields)) => self.model(model, fields),
            (Kind::Model(_), _) => self.refuse(
                "model_attributes_type",
                "Input should be a valid dictionary or object to extract fields from",
            ),
            (Kind::List { of, max }, Json::Array(items)) => self.list(*of, max, items),
            (Kind::List { .. }, _) => self.refuse("list_type", "Input should be a valid list"),
        }
    }

    fn model(&mut self, model: &[Field], mut sent: Vec<(String, Json)>) -> Json {
        let mut shaped = Vec::with_capacity(model.len());
        for field in model {
            self.at.push(Step::Name(field.name));
            let value = match (Json::take(&mut sent, field.name), field.absent) {
                (Some(value), _) => self.shape(field.kind, value),
                (None, Absent::Error) => self.refuse("missing", "Field required"),
                (None, Absent::Null) => Json::Null,
                (None, Absent::Empty) => self.shape(field.kind, Json::Object(Vec::new())),
                (None, Absent::Whole(value)) => Json::Number(value.into()),
                (None, Absent::Flag(value)) => Json::Bool(value),
                (None, Absent::Word(word)) => Json::String(word.to_owned()),
            };
            self.at.pop();
            shaped.push((field.name.to_owned(), value));
        }
        Json::Object(shaped)
    }

    fn list(&mut self, of: Kind, max: usize, items: Vec<Json>) -> Json {
        if items.len() > max {
            let message = format!(
                "List should have at most {max} items after validation, not {}",
                items.len()
            );
            return self.refuse("too_long", message);
        }
        let mut shaped = Vec::with_capacity(items.len());
        for (index, item) in items.into_iter().enumerate() {
            self.at.push(Step::Index(index));
            shaped.push(self.shape(of, item));
            self.at.pop();
        }
        Json::Array(shaped)
    }

    fn whole(&mut self, value: &Json, min: i64, max: i64) -> Json {
        let read = match value {
            Json::Number(number) => match (number.as_i64(), number.as_f64()) {
                (Some(whole), _) => whole,
                // The float of a whole number counts as one: Python writes 60.0 for a computed 60.
                (None, Some(float)) if float.fract() == 0.0 => {
                    match format!("{float:.0}").parse() {
                        Ok(whole) => whole,
                        Err(_) => {
                            return self.refuse("int_type", "Input should be a valid integer");
                        }
                    }
                }
                _ => {
                    return self.refuse(
                        "int_from_float",
                        "Input should be a valid integer, got a number with a fractional part",
                    );
                }
            },
            Json::Bool(flag) => i64::from(*flag),
            Json::String(text) => match text.trim().parse() {
                Ok(whole) => whole,
                Err(_) => {
                    return self.refuse(
                        "int_parsing",
                        "Input should be a valid integer, unable to parse string as an integer",
                    );
                }
            },
            _ => return self.refuse("int_type", "Input should be a valid integer"),
        };
        if read < min {
            let message = format!("Input should be greater than or equal to {min}");
            return self.refuse("greater_than_equal", message);
        }
        if read > max {
            let message = format!("Input should be less than or equal to {max}");
            return self.refuse("less_than_equal", message);
        }
        Json::Number(read.into())
    }

    fn number(&mut self, value: Json) -> Json {
        match value {
            Json::Number(number) => Json::Number(number),
            _ => self.refuse("float_type", "Input should be a valid number"),
        }
    }

    fn flag(&mut self, value: &Json) -> Json {
        let read = match value {
            Json::Bool(flag) => Some(*flag),
            Json::Number(number) => match number.as_i64() {
                Some(0) => Some(false),
                Some(1) => Some(true),
                _ => None,
            },
            Json::String(word) => match word.to_lowercase().as_str() {
                "true" | "t" | "yes" | "y" | "on" | "1" => Some(true),
                "false" | "f" | "no" | "n" | "off" | "0" => Some(false),
                _ => None,
            },
            _ => return self.refuse("bool_type", "Input should be a valid boolean"),
        };
        match read {
            Some(flag) => Json::Bool(flag),
            None => self.refuse(
                "bool_parsing",
                "Input should be a valid boolean, unable to interpret input",
            ),
        }
    }

    fn refuse(&mut self, kind: &'static str, message: impl Into<String>) -> Json {
        self.wrong.push(Wrong::new(&self.at, kind, message));
        Json::Null
    }
}
