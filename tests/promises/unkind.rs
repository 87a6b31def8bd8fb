//! ElevenLabs' answers are right and unkind: late, out of order, cut. Nothing is called twice, and nothing
//! is said that is not so.

use std::time::Duration;

use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{Effect, Fault, Reply, Route, Unkind};
use serde_json::json;

use crate::support::{Received, World, submit_body, with_id};

const SUBMIT: CommandKind = CommandKind::Submit;

/// Longer than the settling window of a world.
const LATE: Duration = Duration::from_millis(250);

/// The answer or the request of a submit is lost among ten others, while every look finds answers of
/// this kind.
async fn after_a_loss(lost: Effect, unkind: &Unkind) -> (World, Received) {
    let mut world = World::with(|settings| {
        settings.retry_horizon = Duration::from_secs(6);
        settings.settling_window = Duration::from_secs(1);
    })
    .await;
    for _ in 0..10 {
        world.submitted().await;
    }
    world.sandbox.order(Fault::on(Route::Submit, lost));
    for route in [Route::List, Route::Get] {
        let effect = Effect::Unkind(unkind.clone());
        world.sandbox.order(Fault::on(route, effect).until_cleared());
    }
    let mut body = submit_body();
    body["call_name"] = json!("  Cita   del 9 de mayo");
    world.publish(SUBMIT, body.to_string().as_bytes(), with_id("m")).await;
    let result = world.next_result().await;
    (world, result)
}

async fn ends_as(lost: Effect, unkind: Unkind, code: &str, batches: usize) {
    let shown = format!("{lost:?} {unkind:?}");
    let (world, result) = after_a_loss(lost, &unkind).await;
    assert_eq!(result.code(), code, "{shown}: {}", result.body);
    assert_eq!(world.sandbox.batches().len(), 10 + batches, "{shown}");
    world.finish().await;
}

macro_rules! unkind {
    ($($name:ident: $unkind:expr => $done:literal, $not_done:literal $batches:literal;)*) => {
        $(
            #[tokio::test]
            async fn $name() {
                tokio::join!(
                    ends_as(Effect::ResetAfter, $unkind, $done, 1),
                    ends_as(Effect::ResetBefore, $unkind, $not_done, $batches),
                );
            }
        )*
    };
}

unkind! {
    a_list_out_of_order: Unkind::Shuffled => "200", "200" 1;
    a_list_that_lags_unevenly: Unkind::Lagging(LATE) => "200", "200" 1;
    names_that_are_cut: Unkind::NamesCut(5) => "200", "200" 1;
    names_that_are_normalised: Unkind::NamesNormalised => "200", "200" 1;
    markers_that_are_missing: Unkind::MarkersMissing => "500 outcome_unknown", "200" 1;
    markers_that_are_retyped: Unkind::MarkersRetyped => "500 outcome_unknown", "200" 1;
    markers_that_come_late: Unkind::MarkersLate(LATE) => "200", "200" 1;
    recipients_that_appear_over_time: Unkind::RecipientsLate(LATE) => "200", "200" 1;
    a_clock_that_is_ahead: Unkind::ClockAhead(120) => "200", "200" 1;
    a_clock_that_is_behind: Unkind::ClockAhead(-120) => "200", "200" 1;
}

async fn submits(world: &World, count: usize) {
    for n in 0..count {
        let id = with_id(&format!("m-{n}"));
        world.publish(SUBMIT, submit_body().to_string().as_bytes(), id).await;
    }
}

/// So many submits succeed, and are executed once each.
async fn all_are_done(mut world: World, count: usize) {
    for _ in 0..count {
        assert_eq!(world.next_result().await.code(), "200");
    }
    assert_eq!(world.sandbox.batches().len(), count);
    world.finish().await;
}

/// A list that leaves out a batch of which the worker knows proves nothing.
#[tokio::test]
async fn a_list_that_flaps_makes_no_second_batch() {
    let mut world = World::with(|settings| {
        settings.settling_window = Duration::from_secs(1);
    })
    .await;
    for _ in 0..10 {
        world.submitted().await;
    }
    world.sandbox.order(Fault::on(Route::Submit, Effect::ResetAfter).times(30));
    let flaps = Effect::Unkind(Unkind::Flapping);
    world.sandbox.order(Fault::on(Route::List, flaps).until_cleared());
    submits(&world, 30).await;
    for _ in 0..30 {
        assert_eq!(world.next_result().await.code(), "200");
    }
    assert_eq!((world.requests(Route::Submit), world.sandbox.batches().len()), (40, 40));
    world.finish().await;
}

#[tokio::test]
async fn a_limit_on_requests_at_once_fails_none() {
    let world = World::start().await;
    let limit = Effect::Limit { at_once: 3, latency: Duration::from_millis(100) };
    world.sandbox.order(Fault::on(Route::Submit, limit).until_cleared());
    submits(&world, 20).await;
    all_are_done(world, 20).await;
}

#[tokio::test]
async fn connections_that_are_closed_when_idle_cost_nothing() {
    let world = World::start().await;
    world.sandbox.order(Fault::on(Route::Any, Effect::ClosedWhenIdle).until_cleared());
    submits(&world, 20).await;
    all_are_done(world, 20).await;
}

#[tokio::test]
async fn a_refusal_before_the_body_is_read_is_a_refusal() {
    let mut world = World::start().await;
    let mut body = submit_body();
    let recipient = body["recipients"][0].clone();
    let recipients = (0..9_000).map(|n| {
        let mut one = recipient.clone();
        one["phone_number"] = json!(format!("+1415{n:07}"));
        one
    });
    let recipients: Vec<_> = recipients.collect();
    body["recipients"] = json!(recipients);
    let early = Reply::vendor_error(400, "too_many_recipients", "Too many recipients.");
    world.sandbox.order(Fault::on(Route::Submit, Effect::RefusedEarly(early)));
    let result = world.ask(SUBMIT, &body).await;
    assert_eq!(result.code(), "400 rejected_by_elevenlabs", "{}", result.body);
    assert!(world.sandbox.batches().is_empty());
    world.finish().await;
}

/// A gateway sends its own pages for what was done and for what was not.
#[tokio::test]
async fn redirects_and_pages_of_a_gateway_fail_none_and_repeat_none() {
    let world = World::start().await;
    for status in [301, 302, 307, 308, 403, 404, 429, 502] {
        let page = Reply::new(status).text("<html><h1>Gateway</h1></html>");
        world.sandbox.order(Fault::on(Route::Submit, Effect::Status(page.clone())));
        world.sandbox.order(Fault::on(Route::Submit, Effect::Status(page.processed())));
    }
    submits(&world, 16).await;
    all_are_done(world, 16).await;
}
