//! What ElevenLabs says in an answer: whether it is ElevenLabs at all, in words fit for a requester,
//! without the API key and without phone numbers.

use std::borrow::Cow;
use std::fmt::Write as _;

use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde_json::Value;

/// So much of a text is read. The rest is cut before anything is masked.
const MOST_CHARACTERS: usize = 4_000;

/// A shorter part of the key tells nothing, and may be a word.
const SHORTEST_PART: usize = 8;

/// The names of errors that are about the account: neither the request nor the key is at fault.
const ABOUT_THE_ACCOUNT: [&str; 4] = [
    "payment_required",
    "insufficient_credits",
    "quota_exceeded",
    "batch_calling_agreement_required",
];

/// Reads answers for one API key, which none of them may quote.
#[derive(Clone, Debug)]
pub struct Words {
    key: SecretString,
}

/// What an error answer says.
#[derive(Debug, PartialEq, Eq)]
pub struct Said {
    /// A sentence, or a part of one.
    pub message: String,
    /// It has the form of ElevenLabs' errors.
    pub is_elevenlabs: bool,
    /// It has that form, and is about the account: credits, a quota, an agreement.
    pub is_about_account: bool,
}

/// ElevenLabs' error bodies: current, older, and those of validation. Text alone (`{"detail":"Not
/// Found"}`) is what many frameworks say of an unknown path.
#[derive(Deserialize)]
struct ErrorBody {
    detail: Detail,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Detail {
    Described { message: String, code: Option<Value>, status: Option<Value> },
    Invalid(Vec<InvalidField>),
    Text(String),
}

#[derive(Deserialize)]
struct InvalidField {
    loc: Vec<Value>,
    msg: String,
    #[serde(rename = "type")]
    kind: String,
}

impl Words {
    /// For this API key.
    pub fn new(key: SecretString) -> Self {
        Self { key }
    }

    /// What is wrong, never as a raw dump.
    pub fn read(&self, status: u16, body: &[u8]) -> Said {
        let is_object = body.trim_ascii_start().starts_with(b"{");
        let body = serde_json::from_slice::<ErrorBody>(body).map(|body| body.detail);
        let mut is_about_account = status == 402;
        let (said, is_elevenlabs) = match body {
            Ok(Detail::Described { message, code, status }) => {
                // `code` is the current one; older routes have `status` alone.
                let name = code.as_ref().and_then(Value::as_str);
                let name = name.or(status.as_ref().and_then(Value::as_str));
                is_about_account |= name.is_some_and(|name| ABOUT_THE_ACCOUNT.contains(&name));
                let is_elevenlabs = name.is_some() && !message.trim().is_empty();
                (message, is_elevenlabs)
            }
            Ok(Detail::Invalid(fields)) => {
                let is_whole =
                    !fields.is_empty() && fields.iter().all(|field| !field.kind.is_empty());
                (described(&fields), status == 422 && is_whole)
            }
            Ok(Detail::Text(text)) => (text, false),
            Err(_) => (String::new(), false),
        };
        let is_elevenlabs = is_elevenlabs && is_object;
        let said = without_personal_data(&self.masked(&said));
        let foreign = "this is not the form of ElevenLabs' errors, so something in between may have \
             answered: check ELEVENLABS_BASE_URL and the gateways on the way";
        let message = match (said.is_empty(), is_elevenlabs) {
            (false, true) => said,
            (false, false) => format!("{said} ({foreign})"),
            (true, _) => foreign.to_owned(),
        };
        Said { message, is_elevenlabs, is_about_account: is_about_account && is_elevenlabs }
    }

    /// The text without the API key, and without what looks like one, cut to a length that is fit for
    /// a message.
    pub fn masked(&self, text: &str) -> String {
        let text: Vec<char> = text.chars().take(MOST_CHARACTERS).collect();
        let key: Vec<char> = self.key.expose_secret().chars().collect();
        let mut masked = String::new();
        let mut at = 0;
        while let Some(c) = text.get(at) {
            let length = part_of_key(&text[at..], &key).max(looks_like_a_key(&text[at..]));
            if length == 0 {
                masked.push(*c);
            } else {
                masked.push_str("[key]");
            }
            at += length.max(1);
        }
        masked
    }

    /// A successful answer as it is, but for the API key.
    pub fn without_key<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let key = self.key.expose_secret();
        if key.len() < SHORTEST_PART || !text.contains(key) {
            return Cow::Borrowed(text);
        }
        Cow::Owned(text.replace(key, "[key]"))
    }
}

/// How many characters from the beginning on are a part of the key; 0 where they are few.
fn part_of_key(text: &[char], key: &[char]) -> usize {
    if key.len() < SHORTEST_PART {
        return 0;
    }
    let common = |from: usize| text.iter().zip(&key[from..]).take_while(|(a, b)| a == b).count();
    let longest = (0..=key.len() - SHORTEST_PART).map(common).max().unwrap_or_default();
    if longest < SHORTEST_PART { 0 } else { longest }
}

/// The length of `sk_` and 16 or more letters and digits at the beginning, else 0.
fn looks_like_a_key(text: &[char]) -> usize {
    if !text.starts_with(&['s', 'k', '_']) {
        return 0;
    }
    let rest = text.iter().skip(3).take_while(|c| c.is_ascii_alphanumeric()).count();
    if rest < 16 { 0 } else { rest + 3 }
}

/// `path: what is wrong` for each field.
fn described(fields: &[InvalidField]) -> String {
    let described = fields.iter().take(20).map(|field| {
        let mut path = String::new();
        for part in field.loc.iter().filter(|part| *part != "body") {
            let _infallible = match part {
                Value::Number(index) => write!(path, "[{index}]"),
                name if path.is_empty() => write!(path, "{}", name.as_str().unwrap_or("?")),
                name => write!(path, ".{}", name.as_str().unwrap_or("?")),
            };
        }
        format!("{path}: {}", field.msg)
    });
    described.collect::<Vec<_>>().join("; ")
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
    use super::*;

    const KEY: &str = "sk_4f1c0ffee0ddba11deadbeef";

    fn words() -> Words {
        Words::new(KEY.into())
    }

    #[test]
    fn every_error_shape_of_elevenlabs_reads_as_a_sentence() {
        let says = |body: &str| {
            let Said { message, is_elevenlabs, .. } = words().read(422, body.as_bytes());
            assert!(is_elevenlabs, "{body}");
            message
        };
        assert_eq!(
            says(r#"{"detail":{"type":"x","code":"y","message":"Agent not found","status":"z"}}"#),
            "Agent not found"
        );
        assert_eq!(says(r#"{"detail":{"status":"z","message":"Older shape"}}"#), "Older shape");
        assert_eq!(
            says(
                r#"{"detail":[{"loc":["body","recipients",3,"phone_number"],"msg":"Field required","type":"missing"},
                              {"loc":["body","agent_id"],"msg":"Input should be a string","type":"t"}]}"#
            ),
            "recipients[3].phone_number: Field required; agent_id: Input should be a string"
        );
    }

    #[test]
    fn whatever_has_another_form_may_be_somebody_elses() {
        for (status, body) in [
            (422, ""),
            (404, "<html>Not found</html>"),
            (400, "bad request"),
            (404, "{}"),
            (404, r#"{"detail":null}"#),
            (404, r#"{"detail":"Not Found"}"#),
            (404, r#"{"detail":{"message":"no code"}}"#),
            (404, r#"{"detail":{"message":" ","code":"x"}}"#),
            (404, r#"{"detail":{"code":"x"}}"#),
            (404, r#"{"detail":{"message":"m","code":7}}"#),
            (404, r#"{"error":"not_found","message":"m","code":"x"}"#),
            (404, r#"{"detail":{"message":"cut","code":"x""#),
            (400, r#"{"detail":[{"loc":["body"],"msg":"m","type":"t"}]}"#),
            (404, r#"[{"message":"m","code":"x"}]"#),
            (422, r#"{"detail":[]}"#),
            (422, r#"{"detail":[{"msg":"m"}]}"#),
        ] {
            let said = words().read(status, body.as_bytes());
            assert!(!said.is_elevenlabs, "{body}");
            assert!(!words().read(402, body.as_bytes()).is_about_account, "{body}");
            assert!(said.message.contains("check ELEVENLABS_BASE_URL"), "{}", said.message);
        }
    }

    #[test]
    fn an_error_is_about_the_account_by_its_code_then_by_its_status() {
        let is_about_account = |status, detail: &str| {
            words().read(status, format!(r#"{{"detail":{detail}}}"#).as_bytes()).is_about_account
        };
        for name in ABOUT_THE_ACCOUNT {
            for (status, field) in [(400, "code"), (401, "status"), (429, "code")] {
                let detail = format!(r#"{{"message":"m","{field}":"{name}"}}"#);
                assert!(is_about_account(status, &detail), "{detail}");
            }
        }
        for (status, detail, expected) in [
            (402, r#"{"message":"m","code":"whatever"}"#, true),
            (402, r#"{"message":"m"}"#, false),
            (401, r#"{"message":"m","code":"invalid_api_key"}"#, false),
            (403, r#"{"message":"m","code":"quota_exceeded","status":"other"}"#, true),
            (403, r#"{"message":"m","code":"other","status":"quota_exceeded"}"#, false),
            (403, r#"{"message":"m","code":null,"status":"quota_exceeded"}"#, true),
            (403, r#"{"message":" ","code":"quota_exceeded"}"#, false),
        ] {
            assert_eq!(is_about_account(status, detail), expected, "HTTP {status} {detail}");
        }
    }

    #[test]
    fn the_api_key_is_masked_wherever_it_is_quoted() {
        let words = words();
        for (text, masked) in [
            (format!("Key {KEY} is wrong"), "Key [key] is wrong".to_owned()),
            (format!("key={KEY}{KEY}!"), "key=[key][key]!".to_owned()),
            ("the key sk_4f1c0ffee… is wrong".to_owned(), "the key [key]… is wrong".to_owned()),
            ("…deadbeef is wrong".to_owned(), "…[key] is wrong".to_owned()),
            ("dead beef".to_owned(), "dead beef".to_owned()),
            ("sk_1234567890abcdef0".to_owned(), "[key]".to_owned()),
            ("sk_short".to_owned(), "sk_short".to_owned()),
        ] {
            assert_eq!(words.masked(&text), masked);
        }
        let cut = format!("{}{KEY}", "x".repeat(495));
        let body = format!(r#"{{"detail":{{"message":"{cut}","code":"c"}}}}"#);
        assert!(
            !words.read(401, body.as_bytes()).message.contains("sk_4f"),
            "no part is left by a cut"
        );
        let short = Words::new("k".into());
        assert_eq!(short.masked("kk"), "kk", "a key so short is a letter");
        assert_eq!(words.without_key("{\"a\":1}"), "{\"a\":1}");
        assert_eq!(words.without_key(&format!("{{\"a\":\"{KEY}\"}}")), "{\"a\":\"[key]\"}");
    }

    #[test]
    fn the_api_key_shows_in_no_debug_output() {
        assert!(!format!("{:?}", words()).contains("4f1c"));
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
