//! Bad input gets a clear failed result, is acknowledged, and the worker goes on.

use std::collections::{BTreeMap, HashMap};

use call_manager::domain::command::CommandKind;
use lapin::BasicProperties;
use lapin::options::QueueBindOptions;
use lapin::types::{AMQPValue, ByteArray, DecimalValue, FieldArray, FieldTable};
use serde_json::{Value, json};

use crate::support::proxy::{CONNECTIONS, Proxy};
use crate::support::raw::{self, Producer, entry, long, short};
use crate::support::{Received, World, submit_body, with_id};

const SUBMIT: CommandKind = CommandKind::Submit;

/// Asserts that the refusal says `part`, then that the worker still works.
async fn refused(world: &mut World, result: &Received, part: &str) {
    assert_eq!(result.code(), "400 invalid_command", "{}", result.body);
    assert_eq!(result.header("attempts").as_deref(), Some("0"), "nothing was sent");
    assert!(result.error().contains(part), "{part:?} is missing in: {}", result.error());
    assert!(result.error().starts_with("The command is not valid: "), "{}", result.error());
    assert!(result.error().len() < 5000, "an error stays readable");
    assert!(!world.submitted().await.is_empty());
}

async fn refuses(kind: CommandKind, body: &[u8], part: &str) {
    let mut world = World::start().await;
    let result = world.ask_bytes(kind, body).await;
    refused(&mut world, &result, part).await;
    world.finish().await;
}

async fn refuses_submit(change: impl FnOnce(&mut Value), part: &str) {
    let mut body = submit_body();
    change(&mut body);
    refuses(SUBMIT, body.to_string().as_bytes(), part).await;
}

#[tokio::test]
async fn an_empty_body() {
    refuses(SUBMIT, b"", "the body is empty").await;
}

#[tokio::test]
async fn a_body_that_is_not_utf_8() {
    refuses(SUBMIT, b"{\"call_name\":\"\xff\"}", "the body is not UTF-8 from byte 14 on").await;
}

#[tokio::test]
async fn a_body_that_is_not_json() {
    refuses(SUBMIT, b"call_name=x", "the body is not JSON").await;
}

#[tokio::test]
async fn json_that_is_no_object() {
    for kind in CommandKind::ALL {
        refuses(kind, b"[1,2]", "body: must be an object, not an array").await;
    }
}

#[tokio::test]
async fn a_body_of_40_mb() {
    let body = json!({"call_name": "x".repeat(40_000_000)}).to_string();
    refuses(SUBMIT, body.as_bytes(), "and at most 16777216 are read").await;
}

#[tokio::test]
async fn a_hundred_thousand_levels_of_nesting() {
    let body = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    refuses(SUBMIT, body.as_bytes(), "recursion limit exceeded").await;
    let objects = "{\"a\":".repeat(100_000);
    refuses(SUBMIT, objects.as_bytes(), "recursion limit exceeded").await;
}

#[tokio::test]
async fn an_unknown_field() {
    refuses_submit(|body| body["shedule"] = json!(1), "shedule: is not a known field").await;
}

#[tokio::test]
async fn a_wrong_type_in_recipient_9999() {
    let change = |body: &mut Value| {
        let recipients = (0..10_000).map(|n| match n {
            9_999 => json!({"phone_number": 14_155_550_100_u64}),
            n => json!({"phone_number": format!("+1{n:09}")}),
        });
        body["recipients"] = recipients.collect();
    };
    refuses_submit(change, "recipients[9999].phone_number: must be a string, not a number").await;
}

#[tokio::test]
async fn no_recipient_and_one_too_many() {
    refuses_submit(|body| body["recipients"] = json!([]), "recipients: must not be empty").await;
    let change = |body: &mut Value| {
        body["recipients"] =
            (0..10_001).map(|n| json!({"phone_number": format!("+1{n:09}")})).collect();
    };
    refuses_submit(change, "at most 10000 entries and has 10001").await;
}

#[tokio::test]
async fn blank_names() {
    for field in ["call_name", "agent_id", "agent_phone_number_id"] {
        refuses_submit(|body| body[field] = json!(" \t "), &format!("{field}: must be")).await;
    }
}

#[tokio::test]
async fn milliseconds_and_identical_recipients() {
    refuses_submit(
        |body| body["scheduled_time_unix"] = json!(1_696_435_200_000_u64),
        "divide it by 1000",
    )
    .await;
    let twice = |body: &mut Value| {
        let first = body["recipients"][0].clone();
        body["recipients"].as_array_mut().unwrap().push(first);
    };
    refuses_submit(twice, "recipients[2]: is identical to recipients[0]").await;
}

#[tokio::test]
async fn hostile_batch_ids_never_reach_the_vendor() {
    let mut world = World::start().await;
    for hostile in ["../../x", "%2e%2e", "\u{1f600}", &"x".repeat(10_000), "a/b", "", "a b"] {
        for kind in [CommandKind::Cancel, CommandKind::Get] {
            let result = world.ask(kind, &json!({"batch_id": hostile})).await;
            assert_eq!(result.code(), "400 invalid_command", "{hostile}");
            assert!(result.error().contains("batch_id: must be a batch id"), "{}", result.error());
        }
    }
    assert_eq!(world.asked(), 0);
    world.finish().await;
}

#[tokio::test]
async fn a_submit_without_any_id() {
    let mut world = World::start().await;
    for properties in [
        BasicProperties::default(),
        BasicProperties::default().with_message_id("".into()).with_correlation_id("".into()),
    ] {
        world.publish(SUBMIT, submit_body().to_string().as_bytes(), properties).await;
        let result = world.next_result().await;
        assert_eq!(world.sandbox.batches().len(), 0);
        assert!(result.error().contains("a submit needs a message_id"), "{}", result.error());
        assert_eq!(result.code(), "400 invalid_command");
    }
    world.finish().await;
}

#[tokio::test]
async fn another_content_type_or_encoding() {
    let mut world = World::start().await;
    let body = submit_body().to_string();
    world
        .publish(SUBMIT, body.as_bytes(), with_id("a").with_content_type("text/plain".into()))
        .await;
    let result = world.next_result().await;
    refused(&mut world, &result, "the content_type is \"text/plain\"").await;
    world.publish(SUBMIT, body.as_bytes(), with_id("b").with_content_encoding("gzip".into())).await;
    let result = world.next_result().await;
    refused(&mut world, &result, "the content_encoding is \"gzip\"").await;
    world.finish().await;
}

#[tokio::test]
async fn headers_of_every_amqp_type_do_no_harm() {
    let mut inner = FieldTable::default();
    inner.insert(
        "deep".into(),
        AMQPValue::FieldTable(FieldTable::from(BTreeMap::from([(
            "deeper".into(),
            AMQPValue::FieldArray(FieldArray::from(vec![
                AMQPValue::Void,
                AMQPValue::Boolean(true),
            ])),
        )]))),
    );
    let values = [
        AMQPValue::Boolean(true),
        AMQPValue::ShortShortInt(-8),
        AMQPValue::ShortShortUInt(200),
        AMQPValue::ShortInt(-3000),
        AMQPValue::ShortUInt(60000),
        AMQPValue::LongInt(-70000),
        AMQPValue::LongUInt(4_000_000_000),
        AMQPValue::LongLongInt(i64::MIN),
        AMQPValue::Float(1.5),
        AMQPValue::Double(-1e300),
        AMQPValue::DecimalValue(DecimalValue { scale: 2, value: 314 }),
        AMQPValue::LongString([0xff, 0xfe, 0x00].as_slice().into()),
        AMQPValue::FieldArray(FieldArray::from(vec![AMQPValue::FieldTable(inner.clone())])),
        AMQPValue::Timestamp(u64::MAX),
        AMQPValue::FieldTable(inner),
        AMQPValue::ByteArray(ByteArray::from(vec![0, 255])),
        AMQPValue::Void,
    ];
    let mut world = World::start().await;
    // Each type once under a name of its own, and once where text is expected.
    for (n, value) in values.into_iter().enumerate() {
        let mut headers = FieldTable::default();
        headers.insert("anything".into(), value.clone());
        headers.insert("traceparent".into(), value.clone());
        headers.insert("x-delivery-count".into(), value);
        let properties = with_id(&format!("h-{n}")).with_headers(headers);
        world.publish(SUBMIT, submit_body().to_string().as_bytes(), properties).await;
        let result = world.next_result().await;
        assert_eq!(result.code(), "200", "{}", result.body);
        assert_eq!(result.header("traceparent"), None);
    }
    world.finish().await;
}

#[tokio::test]
async fn trace_headers_as_large_as_a_frame_are_not_copied() {
    let mut world = World::start().await;
    let mut headers = FieldTable::default();
    headers.insert("traceparent".into(), AMQPValue::LongString("x".repeat(60_000).into()));
    headers.insert("tracestate".into(), AMQPValue::LongString("x".repeat(60_000).into()));
    let properties = with_id("m").with_headers(headers);
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), properties).await;
    let result = world.next_result().await;
    assert_eq!(result.code(), "200", "{}", result.body);
    assert_eq!((result.header("traceparent"), result.header("tracestate")), (None, None));
    world.finish().await;
}

#[tokio::test]
async fn sixteen_megabytes_of_wrong_entries() {
    let body = format!("{{\"recipients\":[0{}]}}", ",0".repeat(8_000_000));
    refuses(SUBMIT, body.as_bytes(), "at most 10000 entries and has 8000001").await;
    let variables: Vec<_> = (0..1_200_000).map(|n| format!("\"{n}\":{{}}")).collect();
    let body = format!(
        "{{\"call_name\":\"n\",\"agent_id\":\"a\",\"agent_phone_number_id\":\"p\",\"recipients\":\
         [{{\"phone_number\":\"+14155550100\",\"dynamic_variables\":{{{}}}}}]}}",
        variables.join(",")
    );
    assert!(body.len() < 16 * 1024 * 1024);
    refuses(SUBMIT, body.as_bytes(), "dynamic_variables: must have at most 1000 entries").await;
}

#[tokio::test]
async fn a_reply_to_that_does_not_exist_costs_only_the_reply() {
    let mut world = World::start().await;
    for n in 0..20 {
        let properties = with_id(&format!("m-{n}")).with_reply_to("nobody-has-this-queue".into());
        world.publish(SUBMIT, submit_body().to_string().as_bytes(), properties).await;
    }
    for _ in 0..20 {
        assert_eq!(world.next_result().await.code(), "200");
    }
    assert_eq!(world.sandbox.batches().len(), 20);
    world.finish().await;
}

#[tokio::test]
async fn a_routing_key_the_queue_is_bound_for_but_no_command_has() {
    let mut world = World::start().await;
    let bound = world.channel.queue_bind(
        world.topology.queue(SUBMIT).into(),
        world.topology.commands_exchange().into(),
        "batch-calling.#".into(),
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    bound.await.unwrap();
    let exchange = world.topology.commands_exchange();
    let body = submit_body().to_string();
    world.publish_to(&exchange, "batch-calling.retry", body.as_bytes(), with_id("m")).await;
    let result = world.next_result().await;
    assert_eq!(result.routing_key, "batch-calling.unknown.failed");
    refused(&mut world, &result, "the routing key \"batch-calling.retry\" names no command").await;
    world.finish().await;
}

#[tokio::test]
async fn text_that_is_not_utf_8_in_properties_is_refused_and_blocks_nobody() {
    const LATIN_1: &[u8] = b"campa\xf1a";
    let (proxy, url) = Proxy::to_broker().await;
    let mut world = World::with(|settings| settings.broker.amqp_url = url.to_string().into()).await;
    let exchange = world.topology.commands_exchange();
    let bound = world.channel.queue_bind(
        world.topology.queue(SUBMIT).into(),
        exchange.clone().into(),
        "*".into(),
        QueueBindOptions::default(),
        FieldTable::default(),
    );
    bound.await.unwrap();

    let (submit, get) = (b"batch-calling.submit".as_slice(), b"batch-calling.get".as_slice());
    let nested = entry(b"table", b'F', &long(&entry(LATIN_1, b't', &[1])));
    let text = short(LATIN_1);
    // The routing key, the property, what the refusal says.
    let cases = [
        (submit, raw::MESSAGE_ID, text.clone(), Some("the message_id is not UTF-8")),
        (submit, raw::CORRELATION_ID, text.clone(), Some("the correlation_id is not UTF-8")),
        (get, raw::CORRELATION_ID, text.clone(), Some("the correlation_id is not UTF-8")),
        (submit, raw::CONTENT_TYPE, text.clone(), Some("the content_type is \"campa?a\"")),
        (submit, raw::REPLY_TO, text.clone(), None),
        (submit, raw::TYPE, text, None),
        (submit, raw::HEADERS, long(&entry(LATIN_1, b't', &[1])), None),
        (submit, raw::HEADERS, long(&nested), None),
        (LATIN_1, raw::TYPE, short(b"x"), Some("the routing key \"campa?a\" names no command")),
    ];
    let mut producer = Producer::connect().await;
    let mut expected = HashMap::new();
    let body = submit_body().to_string();
    for (n, (key, property, value, refusal)) in cases.into_iter().enumerate() {
        world.publish(SUBMIT, body.as_bytes(), with_id(&format!("good-{n}"))).await;
        expected.insert(format!("good-{n}"), None);

        let mut properties = vec![(property, value)];
        if property == raw::MESSAGE_ID {
            expected.insert("campa\u{1a}a".to_owned(), refusal);
        } else {
            properties.push((raw::MESSAGE_ID, short(format!("bad-{n}").as_bytes())));
            properties.sort_by_key(|(bit, _)| std::cmp::Reverse(*bit));
            expected.insert(format!("bad-{n}"), refusal);
        }
        let asked = if key == get { r#"{"batch_id":"btcal_x"}"# } else { &body };
        producer.publish(&exchange, key, &properties, asked.as_bytes()).await;
    }
    while !expected.is_empty() {
        let result = world.next_result().await;
        let refusal = expected.remove(&result.command_id()).expect("one result per command");
        match refusal {
            None => assert_eq!(result.code(), "200", "{}", result.body),
            Some(part) => {
                assert_eq!(result.code(), "400 invalid_command", "{}", result.body);
                assert!(
                    result.error().contains(part),
                    "{part:?} is missing in: {}",
                    result.error()
                );
            }
        }
    }
    assert!(!world.submitted().await.is_empty(), "the next result is the next command's");
    assert_eq!(proxy.accepted(), CONNECTIONS, "the worker has never connected again");
    world.finish().await;
}

#[tokio::test]
async fn headers_nested_20_000_deep_do_no_harm() {
    let mut world = World::start().await;
    let mut array = vec![];
    for _ in 0..20_000 {
        array = [b"A", &long(&array)[..]].concat();
    }
    let headers = long(&[short(b"deep"), array].concat());
    let properties = [(raw::HEADERS, headers), (raw::MESSAGE_ID, short(b"m"))];
    let (exchange, key) = (world.topology.commands_exchange(), SUBMIT.routing_key());
    let body = submit_body().to_string();
    let mut producer = Producer::connect().await;
    producer.publish(&exchange, key.as_bytes(), &properties, body.as_bytes()).await;
    assert_eq!(world.next_result().await.code(), "200");
    world.finish().await;
}
