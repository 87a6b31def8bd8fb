//! A thousand random mutations of valid messages: every one answered or refused, no panic, nothing
//! left unacknowledged.

use std::collections::HashMap;

use call_manager::domain::command::CommandKind;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Value, json};

use crate::support::{Received, World, submit_body};

const MESSAGES: usize = 1_000;

/// One cut or paste in a body.
#[derive(Clone, Debug)]
enum Edit {
    Flip(prop::sample::Index, u8),
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index, usize),
    Truncate(prop::sample::Index),
    Repeat(prop::sample::Index, usize),
}

fn edit() -> impl Strategy<Value = Edit> {
    let index = any::<prop::sample::Index>;
    let token = prop::sample::select(vec![
        "\"", "{", "}", "[", "]", ",", ":", "null", "1e999", "-0", "\\u0000", "\u{0}",
    ]);
    prop_oneof![
        (index(), any::<u8>()).prop_map(|(at, bits)| Edit::Flip(at, bits | 1)),
        (index(), token).prop_map(|(at, token)| Edit::Insert(at, token.into())),
        (index(), prop::collection::vec(any::<u8>(), 1..8))
            .prop_map(|(at, bytes)| Edit::Insert(at, bytes)),
        (index(), 1_usize..40).prop_map(|(at, length)| Edit::Remove(at, length)),
        index().prop_map(Edit::Truncate),
        (index(), 1_usize..60).prop_map(|(at, length)| Edit::Repeat(at, length)),
    ]
}

fn apply(body: &mut Vec<u8>, edit: &Edit) {
    if body.is_empty() {
        return;
    }
    match edit {
        Edit::Flip(at, bits) => {
            let at = at.index(body.len());
            body[at] ^= bits;
        }
        Edit::Insert(at, bytes) => {
            let at = at.index(body.len());
            body.splice(at..at, bytes.iter().copied());
        }
        Edit::Remove(at, length) => {
            let at = at.index(body.len());
            body.drain(at..(at + length).min(body.len()));
        }
        Edit::Truncate(at) => body.truncate(at.index(body.len())),
        Edit::Repeat(at, length) => {
            let at = at.index(body.len());
            let piece = body[at..(at + length).min(body.len())].to_vec();
            body.splice(at..at, piece);
        }
    }
}

type Properties = (Option<String>, Option<String>, Option<String>, Option<String>, bool);

fn mutation() -> impl Strategy<Value = (CommandKind, Vec<Edit>, Properties)> {
    let text = || prop::option::weighted(0.2, "[ -~]{0,40}");
    let id = prop::option::weighted(
        0.9,
        prop_oneof![9 => "[a-f0-9]{16}", 1 => Just("the-same".to_owned())],
    );
    (
        prop::sample::select(CommandKind::ALL.to_vec()),
        prop::collection::vec(edit(), 0..4),
        (id, text(), text(), text(), any::<bool>()),
    )
}

fn properties((id, correlation, content_type, reply_to, traced): Properties) -> BasicProperties {
    let mut properties = BasicProperties::default();
    if let Some(id) = id {
        properties = properties.with_message_id(id.into());
    }
    if let Some(id) = correlation {
        properties = properties.with_correlation_id(id.into());
    }
    if let Some(content_type) = content_type {
        properties = properties.with_content_type(content_type.into());
    }
    if let Some(queue) = reply_to {
        properties = properties.with_reply_to(queue.into());
    }
    if traced {
        let mut headers = FieldTable::default();
        headers.insert("traceparent".into(), AMQPValue::LongLongInt(1));
        properties = properties.with_headers(headers);
    }
    properties
}

/// A message whose id no other one has.
struct Sent {
    kind: CommandKind,
    body: Vec<u8>,
    is_json: bool,
}

impl Sent {
    /// By the schema alone, which is what a producer has.
    fn judge(&self, result: &Received, world: &World) {
        let (kind, body) = (self.kind, String::from_utf8_lossy(&self.body));
        let read: Option<Value> = serde_json::from_slice(&self.body).ok();
        let schema = schema(kind);
        let is_valid = read.as_ref().is_some_and(|body| jsonschema::is_valid(&schema, body));
        let is_refused = result.code() == "400 invalid_command";
        assert_eq!(is_refused, !(is_valid && self.is_json), "{kind} {body}: {}", result.body);
        if kind == CommandKind::Submit && result.code() == "200" {
            let (read, id) = (read.unwrap(), &result.json["data"]["id"]);
            let batches = world.sandbox.batches();
            let batch = batches.iter().find(|batch| *id == batch.id).expect("there is a batch");
            assert_eq!(read["call_name"], batch.name, "{body}");
            let numbers = batch.recipients.iter().map(|one| one.phone_number.clone());
            let asked = read["recipients"].as_array().unwrap().iter();
            let asked = asked.map(|one| one["phone_number"].as_str().map(str::to_owned));
            assert!(numbers.eq(asked), "{body}");
        }
    }
}

/// Whether a content type is as good as none.
fn names_none(content_type: &str) -> bool {
    content_type.split(';').next().is_none_or(|essence| essence.trim().is_empty())
}

fn schema(kind: CommandKind) -> Value {
    let text = match kind {
        CommandKind::Submit => include_str!("../../schemas/submit.json"),
        CommandKind::Cancel => include_str!("../../schemas/cancel.json"),
        CommandKind::Get => include_str!("../../schemas/get.json"),
    };
    serde_json::from_str(text).unwrap()
}

#[tokio::test]
async fn a_thousand_mutated_messages_are_all_answered_or_refused() {
    let mut world = World::start().await;
    let batch_id = world.submitted().await;
    let seed = [7; 32];
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let strategy = mutation();
    let mut refused = 0;
    let (mut sent, mut published, mut judged) = (HashMap::new(), 0, 0);
    for _ in 0..MESSAGES / 100 {
        for _ in 0..100 {
            let (kind, edits, given) = strategy.new_tree(&mut runner).unwrap().current();
            let mut body = match kind {
                CommandKind::Submit => submit_body(),
                CommandKind::Cancel | CommandKind::Get => json!({"batch_id": batch_id}),
            }
            .to_string()
            .into_bytes();
            for edit in &edits {
                apply(&mut body, edit);
            }
            published += 1;
            if let Some(id) = given.0.clone().filter(|id| id != "the-same") {
                let is_json = given.2.as_deref().is_none_or(names_none);
                sent.insert(id, Sent { kind, body: body.clone(), is_json });
            }
            world.publish(kind, &body, properties(given)).await;
        }
        for _ in 0..100 {
            let result = world.next_result().await;
            if let Some(sent) = sent.get(&result.command_id()) {
                sent.judge(&result, &world);
                judged += 1;
            }
            if result.code() == "400 invalid_command" {
                refused += 1;
            } else {
                assert!(
                    ["200", "400 command_id_reused", "404 not_found", "400 rejected_by_elevenlabs"]
                        .contains(&result.code().as_str()),
                    "{}",
                    result.body
                );
            }
        }
    }
    assert_eq!(published, MESSAGES);
    assert!(judged > MESSAGES / 2, "{judged} were judged");
    // Were it all or nothing, the mutations would be too wild or too tame to find anything.
    assert!((200..900).contains(&refused), "{refused} of {MESSAGES} were refused");
    world.finish().await;
}
