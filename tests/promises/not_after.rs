//! A command past its `not_after` is not executed, and never reported as not done when it was.

use std::time::{Duration, SystemTime};

use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{Effect, Fault, Reply, Route};
use lapin::BasicProperties;
use lapin::types::AMQPValue;
use serde_json::json;

use crate::support::{World, submit_body, with_header, with_id};

const SUBMIT: CommandKind = CommandKind::Submit;

fn seconds_from_now(seconds: i64) -> i64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    i64::try_from(now).unwrap() + seconds
}

fn not_after(value: AMQPValue) -> BasicProperties {
    with_header("m", "not_after", value)
}

fn in_seconds(seconds: i64) -> BasicProperties {
    not_after(AMQPValue::LongLongInt(seconds_from_now(seconds)))
}

async fn submit(world: &World, properties: BasicProperties) {
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), properties).await;
}

#[tokio::test]
async fn past_its_time_no_command_is_executed() {
    let mut world = World::start().await;
    let id = world.submitted().await;
    let before = world.asked();
    for kind in CommandKind::ALL {
        let body = if kind == SUBMIT { submit_body() } else { json!({"batch_id": id}) };
        world.publish(kind, body.to_string().as_bytes(), in_seconds(-2)).await;
        let result = world.next_result().await;
        assert_eq!(result.code(), "500 expired", "{kind}");
        assert_eq!(result.header("attempts").as_deref(), Some("0"));
        assert!(result.error().contains("Nothing was sent"), "{}", result.error());
    }
    assert_eq!(world.asked(), before, "ElevenLabs was not called");
    // The same id again, in time: the first result stands.
    submit(&world, in_seconds(60)).await;
    assert_eq!(world.next_result().await.code(), "500 expired");
    world.finish().await;
}

#[tokio::test]
async fn in_time_it_is_executed_whatever_integer_type_the_header_has() {
    let soon = seconds_from_now(60);
    for value in [
        AMQPValue::LongLongInt(soon),
        AMQPValue::LongInt(i32::try_from(soon).unwrap()),
        AMQPValue::LongUInt(u32::try_from(soon).unwrap()),
        AMQPValue::Timestamp(u64::try_from(soon).unwrap()),
        AMQPValue::LongString(soon.to_string().into()),
        AMQPValue::Double(f64::from(u32::try_from(soon).unwrap())),
    ] {
        let mut world = World::start().await;
        let shown = format!("{value:?}");
        submit(&world, not_after(value)).await;
        assert_eq!(world.next_result().await.code(), "200", "{shown}");
        world.finish().await;
    }
}

#[tokio::test]
async fn a_header_that_is_no_time_is_refused_with_a_sentence() {
    let mut world = World::start().await;
    for (value, said) in [
        (AMQPValue::LongString("tomorrow".into()), "\"tomorrow\", not a time"),
        (AMQPValue::LongLongInt(seconds_from_now(60) * 1000), "only be milliseconds"),
        (AMQPValue::Boolean(true), "\"Boolean\", not a time"),
    ] {
        submit(&world, not_after(value)).await;
        let result = world.next_result().await;
        assert_eq!(result.code(), "400 invalid_command");
        assert!(result.error().contains(said), "{}", result.error());
    }
    world.finish().await;
}

#[tokio::test]
async fn a_header_that_is_misspelt_is_refused_and_not_overlooked() {
    let mut world = World::start().await;
    for (name, said) in [
        ("not-after", "name it not_after"),
        ("X-NOT-AFTER", "name it not_after"),
        ("trace_state", "name it tracestate"),
        ("x-amqp-1.0-app-properties", "publish by AMQP 0-9-1"),
    ] {
        let past = AMQPValue::LongLongInt(seconds_from_now(-60));
        submit(&world, with_header("m", name, past)).await;
        let result = world.next_result().await;
        assert_eq!(result.code(), "400 invalid_command", "{name}");
        assert!(result.error().contains(said), "{}", result.error());
    }
    world.finish().await;
}

#[tokio::test]
async fn the_time_is_looked_at_before_each_attempt() {
    let mut world = World::start().await;
    let limited = Effect::Status(
        Reply::vendor_error(429, "rate_limit_exceeded", "Slow down.").retry_after("6"),
    );
    world.sandbox.order(Fault::on(Route::Submit, limited));
    submit(&world, in_seconds(4)).await;
    let result = world.next_result().await;
    assert_eq!(result.code(), "500 expired");
    assert_eq!((world.requests(Route::Submit), world.sandbox.batches().len()), (1, 0));
    world.finish().await;
}

#[tokio::test]
async fn a_batch_that_an_earlier_attempt_created_is_not_called_expired() {
    for (lost, code) in [(Effect::ResetAfter, "200"), (Effect::ResetBefore, "500 expired")] {
        let mut world =
            World::with(|settings| settings.settling_window = Duration::from_secs(5)).await;
        world.sandbox.order(Fault::on(Route::Submit, lost));
        // The first look sees nothing; by the next one the time has passed.
        world.sandbox.order(Fault::on(Route::List, Effect::Status(Reply::new(503))).times(3));
        submit(&world, in_seconds(2)).await;
        let result = world.next_result().await;
        assert_eq!(result.code(), code, "{}", result.body);
        assert_eq!(world.requests(Route::Submit), 1);
        world.finish().await;
    }
}

#[tokio::test]
async fn a_cancel_that_may_have_been_done_is_not_called_undone_because_it_is_late() {
    let mut world = World::start().await;
    submit(&world, with_id("s")).await;
    assert_eq!(world.next_result().await.code(), "200");
    let done = Reply::new(503).retry_after("11").processed();
    world.sandbox.order(Fault::on(Route::Cancel, Effect::Status(done)));
    let by_id = json!({"command_id": "s"}).to_string();
    world.publish(CommandKind::Cancel, by_id.as_bytes(), in_seconds(5)).await;
    let result = world.next_result().await;
    assert_eq!(result.code(), "500 outcome_unknown", "{}", result.body);
    assert!(result.error().contains("People may still be called"), "{}", result.error());
    world.finish().await;
}
