//! The sandbox can be driven over HTTP by another process, and says what is wrong with an order.

mod support;

use reqwest::Method;
use serde_json::{Value, json};
use support::{submit_to, text, vendor};

#[tokio::test]
async fn health_needs_no_key_and_leaves_no_trace() {
    let vendor = vendor().await;
    let (status, answer) = vendor.control(Method::GET, "health", "").await;
    assert_eq!((status.as_u16(), answer), (200, json!({"status": "ok"})));
    assert!(vendor.sandbox.requests().is_empty());
}

#[tokio::test]
async fn faults_are_ordered_and_cleared_over_http() {
    let vendor = vendor().await;
    let one =
        r#"{"route":"list","times":null,"effect":{"status":{"status":503,"retry_after":"2"}}}"#;
    let (status, answer) = vendor.control(Method::POST, "faults", one).await;
    assert_eq!((status.as_u16(), answer), (200, json!({"ordered": 1})));
    let list = r#"[{"effect":"garbage"},{"route":"submit","effect":"reset_before"}]"#;
    let (_, answer) = vendor.control(Method::POST, "faults", list).await;
    assert_eq!(answer, json!({"ordered": 2}));
    assert_eq!(vendor.get("workspace").await.0, 503);
    assert_eq!(
        vendor.get("btcal_none").await,
        (reqwest::StatusCode::OK, json!("{\"id\": \"btcal_"))
    );
    assert_eq!(vendor.get("workspace").await.0, 503);
    let (status, _) = vendor.control(Method::DELETE, "faults", "").await;
    assert_eq!(status, 200);
    assert_eq!(vendor.get("workspace").await.0, 200);
    assert_eq!(vendor.submit(&submit_to(&[])).await.0, 200);
}

#[tokio::test]
async fn a_wrong_order_is_a_400_that_says_what_is_wrong_and_orders_nothing() {
    let vendor = vendor().await;
    for (path, body, says) in [
        ("faults", "{", "EOF"),
        ("faults", "{}", "missing field `effect`"),
        ("faults", r#"{"effect":"explode"}"#, "unknown variant `explode`"),
        ("faults", r#"{"effect":"garbage","rout":"get"}"#, "unknown field `rout`"),
        ("faults", r#"{"route":"call","effect":"garbage"}"#, "unknown variant `call`"),
        ("faults", r#"[{"effect":"garbage"},{"effect":1}]"#, "fault 1: "),
        ("faults", r#"{"effect":{"status":{"status":99}}}"#, "status must be 200 to 599"),
        ("faults", r#"{"effect":"garbage","probability":-1}"#, "probability must be 0 to 1"),
        ("advance", r#"{"seconds":-1}"#, "seconds must be 0 to"),
        ("advance", r#"{"seconds":1e300}"#, "seconds must be 0 to"),
        ("advance", r#"{"seconds":1,"minutes":1}"#, "unknown field `minutes`"),
        ("advance", "5", "invalid type"),
    ] {
        let (status, answer) = vendor.control(Method::POST, path, body).await;
        assert_eq!(status, 400, "{body}");
        assert!(text(&answer["error"]).contains(says), "{answer}");
    }
    assert_eq!(vendor.get("workspace").await.0, 200);
    let (status, answer) = vendor.control(Method::GET, "nothing", "").await;
    assert_eq!(status, 404);
    assert!(text(&answer["error"]).contains("POST faults"), "{answer}");
}

#[tokio::test]
async fn no_more_faults_wait_than_the_limit() {
    let vendor = vendor().await;
    let all = vec![json!({"effect": "garbage"}); elevenlabs_sandbox::MAX_FAULTS];
    let (status, _) = vendor.control(Method::POST, "faults", &json!(all).to_string()).await;
    assert_eq!(status, 200);
    let (status, answer) = vendor.control(Method::POST, "faults", r#"{"effect":"garbage"}"#).await;
    assert_eq!(status, 400);
    assert!(text(&answer["error"]).contains("10000 faults"), "{answer}");
}

#[tokio::test]
async fn time_batches_and_requests_are_there_over_http() {
    let vendor = vendor().await;
    let id = vendor.batch(&["+14155550108"]).await;
    let (status, _) = vendor.control(Method::POST, "advance", r#"{"seconds":60}"#).await;
    assert_eq!(status, 200);
    let (_, batches) = vendor.control(Method::GET, "batches", "").await;
    assert_eq!(batches[0]["id"], id.as_str());
    assert_eq!(batches[0]["status"], "completed");
    assert_eq!(
        batches[0]["recipients"],
        json!([{
            "id": format!("rcpt_{}_0", id.trim_start_matches("btcal_")),
            "phone_number": "+14155550108", "status": "voicemail",
            "dynamic_variables": {"place": 0},
        }])
    );
    let (_, requests) = vendor.control(Method::GET, "requests", "").await;
    assert_eq!(
        requests,
        json!([{
            "method": "POST", "path": "/v1/convai/batch-calling/submit", "route": "submit",
            "status": 200, "fault": Value::Null, "processed": true,
            "body": submit_to(&["+14155550108"]),
        }])
    );
}
