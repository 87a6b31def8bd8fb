//! Each fault is on the wire what its name says, and the vendor did or did not do what was asked.

mod support;

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use elevenlabs_sandbox::{Effect, Fault, Reply, Route};
use reqwest::Method;
use serde_json::{Value, json};
use support::{LIMIT, Raw, Vendor, submit_to, until, vendor};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const NUMBER: &[&str] = &["+14155550100"];

async fn submit_with(effect: Effect) -> (Vendor, Raw) {
    let vendor = vendor().await;
    vendor.sandbox.order(Fault::on(Route::Submit, effect));
    let raw = vendor.raw_submit().await;
    (vendor, raw)
}

/// How many batches there are, and what the log says of the one request.
fn trace(vendor: &Vendor) -> (usize, bool, Option<u16>, String) {
    let request = vendor.sandbox.requests().remove(0);
    let fault = request.fault.unwrap_or_default();
    (vendor.sandbox.batches().len(), request.processed, request.status, fault)
}

fn is_reset(raw: &Raw) -> bool {
    raw.ended.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

#[tokio::test]
async fn a_reset_before_is_a_tcp_reset_and_creates_nothing() {
    let (vendor, raw) = submit_with(Effect::ResetBefore).await;
    assert!(is_reset(&raw) && raw.seen.is_empty(), "{:?} {}", raw.ended, raw.seen);
    assert_eq!(trace(&vendor), (0, false, None, "reset_before".to_owned()));
}

#[tokio::test]
async fn a_reset_after_is_a_tcp_reset_and_creates_the_batch() {
    let (vendor, raw) = submit_with(Effect::ResetAfter).await;
    assert!(is_reset(&raw) && raw.seen.is_empty(), "{:?} {}", raw.ended, raw.seen);
    assert_eq!(trace(&vendor), (1, true, None, "reset_after".to_owned()));
}

#[tokio::test]
async fn a_close_before_ends_the_connection_properly_without_an_answer_or_a_batch() {
    let (vendor, raw) = submit_with(Effect::CloseBefore).await;
    assert!(raw.ended.is_ok() && raw.seen.is_empty(), "{:?} {}", raw.ended, raw.seen);
    assert_eq!(trace(&vendor), (0, false, None, "close_before".to_owned()));
}

#[tokio::test]
async fn a_close_after_ends_the_connection_properly_without_an_answer_but_with_a_batch() {
    let (vendor, raw) = submit_with(Effect::CloseAfter).await;
    assert!(raw.ended.is_ok() && raw.seen.is_empty(), "{:?} {}", raw.ended, raw.seen);
    assert_eq!(trace(&vendor), (1, true, None, "close_after".to_owned()));
}

#[tokio::test]
async fn a_truncated_answer_announces_more_than_it_sends() {
    let (vendor, raw) = submit_with(Effect::Truncated).await;
    assert!(raw.ended.is_ok(), "{:?}", raw.ended);
    let (head, body) = raw.seen.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    let announced = head.split("content-length: ").nth(1).unwrap();
    let announced: usize = announced.lines().next().unwrap().parse().unwrap();
    assert!(body.starts_with(r#"{"id":"btcal_"#), "{body}");
    assert!(!body.is_empty() && body.len() < announced, "{} of {announced}", body.len());
    assert_eq!(trace(&vendor), (1, true, Some(200), "truncated".to_owned()));
}

#[tokio::test]
async fn a_client_library_sees_a_truncated_answer_as_an_error_of_the_body() {
    let vendor = vendor().await;
    vendor.sandbox.order(Fault::on(Route::Delete, Effect::Truncated));
    let id = vendor.batch(NUMBER).await;
    let answer = vendor.request(Method::DELETE, &id).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert!(answer.text().await.is_err());
    assert!(vendor.sandbox.batches()[0].deleted);
}

#[tokio::test]
async fn garbage_is_a_complete_200_that_does_not_parse() {
    let vendor = vendor().await;
    vendor.sandbox.order(Fault::on(Route::Submit, Effect::Garbage));
    let request = vendor.request(Method::POST, "submit").json(&submit_to(NUMBER));
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let body = answer.text().await.unwrap();
    assert!(serde_json::from_str::<Value>(&body).is_err(), "{body}");
    assert_eq!(trace(&vendor), (1, true, Some(200), "garbage".to_owned()));
}

#[tokio::test]
async fn a_hanging_request_gets_no_answer_until_the_sandbox_stops() {
    for processed in [false, true] {
        let vendor = vendor().await;
        vendor.sandbox.order(Fault::on(Route::Submit, Effect::Hang { processed }));
        let request = vendor.request(Method::POST, "submit").json(&submit_to(NUMBER));
        let waiting = tokio::task::JoinSet::from_iter([async move { request.send().await }]);
        until("the request is in the log", || {
            vendor.sandbox.requests().first().is_some_and(|request| request.processed == processed)
        })
        .await;
        let quick = Duration::from_millis(100);
        let mut waiting = waiting;
        assert!(tokio::time::timeout(quick, waiting.join_next()).await.is_err(), "an answer came");
        assert_eq!(trace(&vendor), (usize::from(processed), processed, None, "hang".to_owned()));
        tokio::time::timeout(LIMIT, vendor.sandbox.stop()).await.expect("it did not stop");
        assert!(waiting.join_next().await.unwrap().unwrap().is_err());
    }
}

#[tokio::test]
async fn a_status_is_sent_with_its_body_and_its_retry_after_as_they_are() {
    let vendor = vendor().await;
    let date = "Wed, 21 Oct 2037 07:28:00 GMT";
    let replies = [
        Reply::new(503).text("<html>Bad gateway</html>").retry_after(date),
        Reply::new(429).json(json!({"detail": {"code": "system_busy"}})).retry_after("7"),
        Reply::new(500),
        Reply::new(502).text("upstream"),
    ];
    for reply in &replies {
        vendor.sandbox.order(Fault::on(Route::Submit, Effect::Status(reply.clone())));
    }
    let mut seen = Vec::new();
    for _ in &replies {
        let request = vendor.request(Method::POST, "submit").json(&submit_to(NUMBER));
        let answer = request.send().await.unwrap();
        let header =
            |name: &str| answer.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        assert!(header("request-id").is_some());
        let (content_type, retry_after) = (header("content-type"), header("retry-after"));
        let status = answer.status().as_u16();
        seen.push((status, content_type, retry_after, answer.text().await.unwrap()));
    }
    let some = |text: &str| Some(text.to_owned());
    let json = r#"{"detail":{"code":"system_busy"}}"#.to_owned();
    assert_eq!(
        seen,
        [
            (503, some("text/html"), some(date), "<html>Bad gateway</html>".to_owned()),
            (429, some("application/json"), some("7"), json),
            (500, None, None, String::new()),
            (502, some("text/plain"), None, "upstream".to_owned()),
        ]
    );
    assert!(vendor.sandbox.batches().is_empty());
    assert!(vendor.sandbox.requests().iter().all(|request| !request.processed));
}

#[tokio::test]
async fn a_processed_status_comes_after_the_batch_was_created() {
    let vendor = vendor().await;
    let effect = Effect::Status(Reply::new(504).processed());
    vendor.sandbox.order(Fault::on(Route::Submit, effect));
    assert_eq!(vendor.submit(&submit_to(NUMBER)).await.0, 504);
    assert_eq!(trace(&vendor), (1, true, Some(504), "status".to_owned()));
}

#[tokio::test]
async fn a_vendor_error_has_the_vendors_shape() {
    let vendor = vendor().await;
    let effect = Effect::vendor_error(429, "rate_limit_exceeded", "Slow down.");
    vendor.sandbox.order(Fault::on(Route::Any, effect));
    let (status, answer) = vendor.get("workspace").await;
    assert_eq!(status, 429);
    assert_eq!(answer["detail"]["code"], "rate_limit_exceeded");
    assert_eq!(answer["detail"]["message"], "Slow down.");
}

#[tokio::test]
async fn latency_delays_the_answer_and_nothing_else() {
    let vendor = vendor().await;
    let latency = Duration::from_millis(300);
    vendor.sandbox.order(Fault::on(Route::Submit, Effect::Latency(latency)));
    let begun = Instant::now();
    assert_eq!(vendor.submit(&submit_to(NUMBER)).await.0, 200);
    assert!(begun.elapsed() >= latency, "{:?}", begun.elapsed());
    assert_eq!(trace(&vendor), (1, true, Some(200), "latency_ms".to_owned()));
}

#[tokio::test]
async fn a_client_that_stops_waiting_for_a_slow_submit_has_a_batch_all_the_same() {
    let vendor = vendor().await;
    vendor.sandbox.order(Fault::on(Route::Submit, Effect::Latency(Duration::from_millis(1500))));
    let request = vendor.request(Method::POST, "submit").json(&submit_to(NUMBER));
    let gone = request.timeout(Duration::from_millis(50)).send().await.unwrap_err();
    assert!(gone.is_timeout());
    assert!(vendor.sandbox.batches().is_empty(), "the client was not faster");
    until("the batch is there", || vendor.sandbox.batches().len() == 1).await;
    assert_eq!(trace(&vendor), (1, true, None, "latency_ms".to_owned()));
}

#[tokio::test]
async fn a_fault_happens_on_its_route_and_as_often_as_ordered() {
    let vendor = vendor().await;
    let error = |status| Effect::Status(Reply::new(status));
    let id = vendor.batch(NUMBER).await;
    for (route, status) in [
        (Route::Export, 507),
        (Route::Delete, 506),
        (Route::Retry, 505),
        (Route::Cancel, 504),
        (Route::List, 503),
        (Route::Get, 502),
        (Route::Submit, 501),
    ] {
        vendor.sandbox.order(Fault::on(route, error(status)).times(2));
    }
    for _ in 0..2 {
        assert_eq!(vendor.submit(&submit_to(NUMBER)).await.0, 501);
        assert_eq!(vendor.get(&id).await.0, 502);
        assert_eq!(vendor.get("workspace").await.0, 503);
        assert_eq!(vendor.post(&format!("{id}/cancel")).await.0, 504);
        assert_eq!(vendor.post(&format!("{id}/retry")).await.0, 505);
        assert_eq!(vendor.call(Method::DELETE, &id).await.0, 506);
        assert_eq!(vendor.get(&format!("{id}/export")).await.0, 507);
    }
    assert_eq!(vendor.get(&id).await.0, 200);
    vendor.sandbox.order(Fault::on(Route::Any, error(500)).until_cleared());
    for _ in 0..5 {
        assert_eq!(vendor.get(&id).await.0, 500);
    }
    vendor.sandbox.clear_faults();
    assert_eq!(vendor.get(&id).await.0, 200);
}

#[tokio::test]
async fn after_a_reset_the_next_connection_works() {
    let (vendor, _) = submit_with(Effect::ResetBefore).await;
    assert_eq!(vendor.submit(&submit_to(NUMBER)).await.0, 200);
}

#[tokio::test]
#[should_panic(expected = "status must be 200 to 599, not 42")]
async fn an_impossible_order_panics_in_the_test_that_makes_it() {
    let vendor = vendor().await;
    vendor.sandbox.order(Fault::on(Route::Any, Effect::Status(Reply::new(42))));
}

#[tokio::test]
async fn dropping_the_handle_stops_the_server() {
    let vendor = vendor().await;
    let addr = vendor.sandbox.base_url().replace("http://", "");
    let mut open = TcpStream::connect(&addr).await.unwrap();
    open.write_all(b"GET /sandbox/health HTTP/1.1\r\nhost: s\r\n\r\n").await.unwrap();
    let mut first = [0; 12];
    open.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    drop(vendor.sandbox);
    let mut rest = Vec::new();
    tokio::time::timeout(LIMIT, open.read_to_end(&mut rest)).await.expect("still open").ok();
    let refused = tokio::time::timeout(LIMIT, async {
        while TcpStream::connect(&addr).await.is_ok() {
            tokio::task::yield_now().await;
        }
    });
    refused.await.expect("it still accepts");
}
