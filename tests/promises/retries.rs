//! What is tried again, and when: a submit only where it surely created nothing.

use std::fmt::Write as _;
use std::time::{Duration, Instant, SystemTime};

use call_manager::config::Settings;
use call_manager::domain::command::CommandKind;
use call_manager::elevenlabs::Class;
use call_manager::handler::{Then, then};
use elevenlabs_sandbox::{Effect, Fault, Reply, Route};
use serde_json::json;

use crate::support::proxy::Proxy;
use crate::support::{World, submit_body, until};

const SUBMIT: CommandKind = CommandKind::Submit;

/// Every HTTP status a response can have: its class, and which commands are sent again after it,
/// or only after a look into the vendor's list.
#[test]
fn the_retry_class_of_every_http_status() {
    let row = |status: u16| {
        Class::of_status(status).map_or("done                              ".to_owned(), |class| {
            let again = |kind| match then(kind, class) {
                Then::Fail => "-",
                Then::Again => "again",
                Then::Look => "look",
                Then::AskAboutKey => "key?",
                Then::Hold => "hold",
            };
            format!(
                "{:<11} submit {:<5}  cancel {:<5}  get {:<5}",
                format!("{class:?}"),
                again(CommandKind::Submit),
                again(CommandKind::Cancel),
                again(CommandKind::Get),
            )
        })
    };
    let mut table = String::new();
    let mut first = 200;
    for status in 200..600 {
        if status == 599 || row(status + 1) != row(status) {
            writeln!(table, "{first}..={status}  {}", row(status).trim_end()).unwrap();
            first = status + 1;
        }
    }
    insta::assert_snapshot!(table);
}

fn status(status: u16) -> Effect {
    Effect::vendor_error(status, "a_code", "The vendor's words.")
}

/// What came of a submit: result code, error text, how often it was sent, batches.
struct Came {
    code: String,
    error: String,
    sent: usize,
    batches: usize,
}

/// Submits once while the vendor does `effect` to the first request.
async fn submit_after(effect: Effect) -> Came {
    let mut world =
        World::with(|settings| settings.elevenlabs_timeout = Duration::from_secs(3)).await;
    world.sandbox.order(Fault::on(Route::Submit, effect));
    let result = world.ask(SUBMIT, &submit_body()).await;
    let came = Came {
        code: result.code(),
        error: result.json["error"].as_str().unwrap_or_default().to_owned(),
        sent: world.requests(Route::Submit),
        batches: world.sandbox.batches().len(),
    };
    assert_eq!(result.header("attempts"), Some(came.sent.to_string()));
    if let Some(id) = result.json["data"]["id"].as_str() {
        assert_eq!(world.sandbox.batches()[0].id, id, "the result names the one batch");
        let seen = world.ask(CommandKind::Get, &json!({"batch_id": id})).await;
        let (mut seen, mut told) = (seen.json["data"].clone(), result.json["data"].clone());
        seen.as_object_mut().unwrap().remove("recipients");
        for data in [&mut seen, &mut told] {
            // The one field that moves while the sandbox's clock stands still.
            data.as_object_mut().unwrap().remove("last_updated_at_unix");
        }
        assert_eq!(told, seen, "an adopted batch is told like any other");
    }
    world.finish().await;
    came
}

#[tokio::test]
async fn a_refused_submit_is_not_sent_again_and_says_why() {
    for (http, code) in [
        (400, "400 rejected_by_elevenlabs"),
        (401, "500 unauthorized"),
        (403, "500 unauthorized"),
        (404, "404 not_found"),
        (422, "400 rejected_by_elevenlabs"),
    ] {
        let came = submit_after(status(http)).await;
        assert_eq!((came.code.as_str(), came.sent, came.batches), (code, 1, 0), "HTTP {http}");
        assert!(came.error.contains("The vendor's words"), "{}", came.error);
    }
}

#[tokio::test]
async fn a_submit_whose_batch_was_not_created_is_sent_again_after_a_look() {
    for effect in [
        status(500),
        status(502),
        status(503),
        status(504),
        status(408),
        status(409),
        status(302),
        Effect::Status(Reply::new(503).retry_after("0")),
        Effect::ResetBefore,
        Effect::CloseBefore,
        Effect::Hang { processed: false },
    ] {
        let shown = format!("{effect:?}");
        let came = submit_after(effect).await;
        assert_eq!((came.code.as_str(), came.sent, came.batches), ("200", 2, 1), "{shown}");
    }
}

#[tokio::test]
async fn a_submit_whose_answer_was_lost_is_found_and_never_sent_again() {
    for effect in [
        Effect::Status(Reply::new(500).processed()),
        Effect::Status(Reply::new(409).processed()),
        Effect::Status(Reply::new(302).processed()),
        Effect::ResetAfter,
        Effect::CloseAfter,
        Effect::Hang { processed: true },
        Effect::Garbage,
        Effect::Truncated,
    ] {
        let shown = format!("{effect:?}");
        let came = submit_after(effect).await;
        assert_eq!((came.code.as_str(), came.sent, came.batches), ("200", 1, 1), "{shown}");
    }
}

#[tokio::test]
async fn a_rate_limited_submit_is_sent_again_and_creates_one_batch() {
    let came = submit_after(status(429)).await;
    assert_eq!((came.code.as_str(), came.sent, came.batches), ("200", 2, 1));
}

#[tokio::test]
async fn retry_after_is_waited_for_in_both_forms() {
    let in_three_seconds = || httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(3));
    for value in [|| "2".to_owned(), in_three_seconds] {
        let mut world = World::start().await;
        let value = value();
        let limited = Effect::Status(
            Reply::vendor_error(429, "rate_limit_exceeded", "Slow down.").retry_after(&value),
        );
        world.sandbox.order(Fault::on(Route::Submit, limited));
        assert_eq!(world.ask(SUBMIT, &submit_body()).await.code(), "200");
        let requests = world.sandbox.requests();
        let sent = requests.iter().filter(|request| request.route == Route::Submit);
        let sent: Vec<_> = sent.map(|request| request.at).collect();
        let [first, second] = sent[..] else { panic!("sent {} times", sent.len()) };
        // An HTTP date has whole seconds. Without the header, the second comes within 0.75 s.
        let waited = second - first;
        assert!((1_700..4_500).contains(&waited.as_millis()), "{value}: {waited:?}");
        world.finish().await;
    }
}

#[tokio::test]
async fn a_retry_after_past_the_horizon_ends_the_waiting_at_once() {
    let mut world = World::with(|settings| settings.retry_horizon = Duration::from_secs(5)).await;
    let limited = Effect::Status(
        Reply::vendor_error(429, "rate_limit_exceeded", "Slow down.").retry_after("3600"),
    );
    world.sandbox.order(Fault::on(Route::Submit, limited));
    let began = Instant::now();
    let result = world.ask(SUBMIT, &submit_body()).await;
    assert!(began.elapsed() < Duration::from_secs(3), "before the horizon: {:?}", began.elapsed());
    assert_eq!(result.code(), "500 upstream_unavailable");
    assert_eq!(world.asked(), 1);
    world.finish().await;
}

#[tokio::test]
async fn get_and_cancel_are_sent_again_after_every_passing_failure() {
    let mut world =
        World::with(|settings| settings.elevenlabs_timeout = Duration::from_secs(3)).await;
    let id = world.submitted().await;
    for (kind, route) in [(CommandKind::Get, Route::Get), (CommandKind::Cancel, Route::Cancel)] {
        for effect in [
            status(429),
            status(500),
            status(503),
            status(408),
            Effect::ResetBefore,
            Effect::ResetAfter,
            Effect::Hang { processed: false },
            Effect::Garbage,
            Effect::Truncated,
        ] {
            let shown = format!("{kind} {effect:?}");
            world.sandbox.order(Fault::on(route, effect));
            let result = world.ask(kind, &json!({"batch_id": id})).await;
            assert_eq!(result.code(), "200", "{shown}: {}", result.body);
            assert_eq!(result.header("attempts").as_deref(), Some("2"), "{shown}");
        }
    }
    world.finish().await;
}

fn short(settings: &mut Settings) {
    settings.retry_horizon = Duration::from_secs(1);
}

#[tokio::test]
async fn past_the_horizon_a_get_is_unavailable_and_a_cancel_in_doubt_says_so() {
    for (kind, http, code) in [
        (CommandKind::Get, 503, "500 upstream_unavailable"),
        (CommandKind::Cancel, 503, "500 outcome_unknown"),
        // A 429 did surely nothing.
        (CommandKind::Cancel, 429, "500 upstream_unavailable"),
    ] {
        let mut world = World::with(short).await;
        let id = world.submitted().await;
        world.sandbox.order(Fault::on(Route::Any, status(http)).until_cleared());
        let result = world.ask(kind, &json!({"batch_id": id})).await;
        assert_eq!(result.code(), code, "{kind}, HTTP {http}: {}", result.body);
        let in_doubt = code.ends_with("unknown");
        assert_eq!(result.error().contains("People may still be called"), in_doubt);
        world.finish().await;
    }
}

#[tokio::test]
async fn a_submit_that_never_left_is_sent_when_the_vendor_is_back() {
    let mut world = World::without_worker().await;
    let vendor = world.sandbox.base_url().strip_prefix("http://").unwrap().parse().unwrap();
    let reserved = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = reserved.local_addr().unwrap();
    drop(reserved);
    let url = format!("http://{address}").parse().unwrap();
    // It works at first, or no submit would be taken.
    let proxy = Proxy::at(address, vendor).await;
    world.start_worker(|settings| settings.elevenlabs_base_url = url).await;
    proxy.stop().await;
    let body = submit_body().to_string();
    world.publish(SUBMIT, body.as_bytes(), crate::support::with_id("m")).await;
    // In hand: the queue has nothing ready any more.
    let queue = world.topology.queue(SUBMIT);
    until("the submit is in hand", async || world.queue(&queue).await.0 == 0).await;
    let _proxy = Proxy::at(address, vendor).await;
    let result = world.next_result().await;
    assert_eq!(result.code(), "200", "{}", result.body);
    assert_eq!(world.sandbox.batches().len(), 1);
    world.finish().await;
}

#[tokio::test]
async fn connections_to_the_vendor_are_reused() {
    let mut world = World::start().await;
    let id = world.submitted().await;
    for _ in 0..20 {
        world.ask(CommandKind::Get, &json!({"batch_id": id})).await;
    }
    assert_eq!(world.sandbox.connections(), 1);
    world.finish().await;
}
