//! Batches move from submit to their end, are listed, cancelled and called again.
#![allow(
    clippy::unwrap_used,
    reason = "clippy lets only the test functions themselves panic, not what they share"
)]

mod support;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use elevenlabs_sandbox::{CallStatus, Options};
use reqwest::Method;
use serde_json::{Value, json};
use support::{LIMIT, Vendor, submit_to, text, vendor, vendor_with};

const ALL_ENDS: &[&str] = &["+14155550100", "+14155550107", "+14155550108", "+14155550109"];

async fn state(vendor: &Vendor, id: &str) -> (Value, Vec<Value>) {
    let (status, batch) = vendor.get(id).await;
    assert_eq!(status, 200);
    let each = batch["recipients"].as_array().unwrap().iter();
    (batch["status"].clone(), each.map(|recipient| recipient["status"].clone()).collect())
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

#[tokio::test]
async fn a_batch_runs_from_pending_to_completed_and_its_counters_follow() {
    let vendor = vendor().await;
    let id = vendor.batch(ALL_ENDS).await;
    assert_eq!(state(&vendor, &id).await, (json!("pending"), vec![json!("pending"); 4]));
    vendor.advance(1);
    assert_eq!(state(&vendor, &id).await, (json!("in_progress"), vec![json!("dispatched"); 4]));
    vendor.advance(1);
    assert_eq!(state(&vendor, &id).await.1, vec![json!("initiated"); 4]);
    vendor.advance(8);
    let expected = ["in_progress", "failed", "in_progress", "initiated"].map(Value::from);
    assert_eq!(state(&vendor, &id).await.1, expected);
    let (_, batch) = vendor.get(&id).await;
    assert_eq!(batch["total_calls_scheduled"], 4);
    assert_eq!(batch["total_calls_dispatched"], 4);
    assert_eq!(batch["total_calls_finished"], 1);
    vendor.advance(60);
    let expected = ["completed", "failed", "voicemail", "failed"].map(Value::from);
    assert_eq!(state(&vendor, &id).await, (json!("completed"), expected.to_vec()));
    let (_, batch) = vendor.get(&id).await;
    assert_eq!(batch["total_calls_finished"], 4);
    let created = batch["created_at_unix"].as_u64().unwrap();
    assert_eq!(batch["recipients"][0]["updated_at_unix"], created + 21);
    assert_eq!(batch["last_updated_at_unix"], created + 62);
    assert!(text(&batch["recipients"][0]["conversation_id"]).starts_with("conv_"));
    assert_eq!(batch["recipients"][3]["conversation_id"], Value::Null);
}

#[tokio::test]
async fn at_speed_a_batch_completes_by_itself() {
    let vendor = vendor_with(Options { speed: 1000.0, ..Options::default() }).await;
    let id = vendor.batch(ALL_ENDS).await;
    let completed =
        tokio::time::timeout(LIMIT, async { while state(&vendor, &id).await.0 != "completed" {} });
    completed.await.expect("it never completed");
}

#[tokio::test]
async fn a_batch_in_which_every_call_fails_has_failed() {
    let vendor = vendor().await;
    let id = vendor.batch(&["+14155550107"]).await;
    vendor.advance(10);
    assert_eq!(state(&vendor, &id).await.0, "failed");
}

#[tokio::test]
async fn a_scheduled_batch_waits_and_one_without_a_time_or_with_a_past_one_does_not() {
    let vendor = vendor().await;
    let scheduled_at = async |time: Value| {
        let mut body = submit_to(&["+14155550100"]);
        body["scheduled_time_unix"] = time;
        vendor.submit(&body).await.1
    };
    let in_an_hour = unix_now() + 3600;
    let later = scheduled_at(json!(in_an_hour)).await;
    assert_eq!(later["scheduled_time_unix"], in_an_hour);
    let now = scheduled_at(Value::Null).await;
    assert_eq!(now["scheduled_time_unix"], now["created_at_unix"]);
    assert!(now["created_at_unix"].as_u64().unwrap().abs_diff(unix_now()) < 60);
    let past = scheduled_at(json!(1)).await;
    assert_eq!(past["scheduled_time_unix"], 1);
    let (later, now, past) = (text(&later["id"]), text(&now["id"]), text(&past["id"]));
    vendor.advance(60);
    assert_eq!(state(&vendor, &later).await.0, "pending");
    assert_eq!(state(&vendor, &now).await.0, "completed");
    assert_eq!(state(&vendor, &past).await.0, "completed");
    vendor.advance(3600);
    assert_eq!(state(&vendor, &later).await.0, "completed");
}

#[tokio::test]
async fn a_cancel_ends_every_open_call_and_cannot_be_repeated() {
    let vendor = vendor().await;
    let id = vendor.batch(ALL_ENDS).await;
    vendor.advance(10);
    let (status, batch) = vendor.post(&format!("{id}/cancel")).await;
    assert_eq!((status.as_u16(), &batch["status"]), (200, &json!("cancelled")));
    assert!(batch.get("recipients").is_none());
    vendor.advance(100);
    let expected = ["cancelled", "failed", "cancelled", "cancelled"].map(Value::from);
    assert_eq!(state(&vendor, &id).await, (json!("cancelled"), expected.to_vec()));
    let (status, answer) = vendor.post(&format!("{id}/cancel")).await;
    assert_eq!(status, 400);
    assert!(text(&answer["detail"]["message"]).contains("already cancelled"), "{answer}");
    assert_eq!(answer["detail"]["code"], "already_cancelled");
}

#[tokio::test]
async fn a_batch_that_has_ended_cannot_be_cancelled() {
    let vendor = vendor().await;
    for (number, code) in
        [("+14155550100", "already_completed"), ("+14155550107", "already_failed")]
    {
        let id = vendor.batch(&[number]).await;
        vendor.advance(100);
        let (status, answer) = vendor.post(&format!("{id}/cancel")).await;
        assert_eq!((status.as_u16(), text(&answer["detail"]["code"])), (400, code.to_owned()));
    }
}

#[tokio::test]
async fn a_retry_calls_the_failed_and_the_unanswered_again() {
    let vendor = vendor().await;
    let id = vendor.batch(&["+14155550100", "+14155550107", "+14155550109", "+14155550177"]).await;
    let (status, answer) = vendor.post(&format!("{id}/retry")).await;
    assert_eq!(status, 400, "it still runs");
    assert_eq!(answer["detail"]["code"], "batch_call_not_finished");
    vendor.advance(100);
    let (status, batch) = vendor.post(&format!("{id}/retry")).await;
    assert_eq!(status, 200);
    assert_eq!((&batch["status"], &batch["retry_count"]), (&json!("in_progress"), &json!(1)));
    let expected = ["completed", "pending", "pending", "pending"].map(Value::from);
    assert_eq!(state(&vendor, &id).await.1, expected);
    vendor.advance(100);
    let expected = ["completed", "completed", "completed", "failed"].map(Value::from);
    assert_eq!(state(&vendor, &id).await, (json!("completed"), expected.to_vec()));
    let (_, batch) = vendor.get(&id).await;
    assert_eq!(batch["total_calls_scheduled"], 7);
    assert_eq!(batch["total_calls_finished"], 7);
}

#[tokio::test]
async fn a_retry_with_nobody_to_call_is_refused() {
    let vendor = vendor().await;
    let id = vendor.batch(&["+14155550100"]).await;
    vendor.advance(100);
    let (status, answer) = vendor.post(&format!("{id}/retry")).await;
    assert_eq!((status.as_u16(), &answer["detail"]["code"]), (400, &json!("nothing_to_retry")));
    assert_eq!(vendor.get(&id).await.1["retry_count"], 0);
}

#[tokio::test]
async fn the_list_pages_from_the_newest_to_the_oldest() {
    let vendor = vendor().await;
    let mut expected = Vec::new();
    for _ in 0..5 {
        expected.insert(0, vendor.batch(&["+14155550100"]).await);
    }
    let mut seen = Vec::new();
    let mut pages = Vec::new();
    let mut path = "workspace?limit=2".to_owned();
    loop {
        let (status, page) = vendor.get(&path).await;
        assert_eq!(status, 200);
        let batches = page["batch_calls"].as_array().unwrap();
        seen.extend(batches.iter().map(|batch| text(&batch["id"])));
        pages.push((batches.len(), page["has_more"].as_bool().unwrap()));
        if page["has_more"] == false {
            assert_eq!(page["next_doc"], Value::Null);
            break;
        }
        path = format!("workspace?limit=2&last_doc={}", text(&page["next_doc"]));
    }
    assert_eq!(seen, expected);
    assert_eq!(pages, [(2, true), (2, true), (1, false)]);
}

#[tokio::test]
async fn a_page_has_a_hundred_batches_unless_asked_and_a_cursor_outlives_its_batch() {
    let vendor = vendor().await;
    for _ in 0..101 {
        vendor.batch(&[]).await;
    }
    let (_, page) = vendor.get("workspace").await;
    assert_eq!(page["batch_calls"].as_array().unwrap().len(), 100);
    assert_eq!(page["has_more"], true);
    let cursor = text(&page["next_doc"]);
    assert_eq!(vendor.call(Method::DELETE, &cursor).await.0, 204);
    let (_, page) = vendor.get(&format!("workspace?last_doc={cursor}")).await;
    assert_eq!(page["batch_calls"].as_array().unwrap().len(), 1);
    assert_eq!(vendor.get("workspace?last_doc=none").await.0, 400);
    let (status, answer) = vendor.get("workspace?limit=many").await;
    assert_eq!((status.as_u16(), &answer["detail"][0]["loc"]), (422, &json!(["query", "limit"])));
}

#[tokio::test]
async fn the_list_can_be_limited_to_an_agent() {
    let vendor = vendor().await;
    for agent in ["agent_1", "agent_2", "agent_1"] {
        let mut body = submit_to(&["+14155550100"]);
        body["agent_id"] = json!(agent);
        vendor.submit(&body).await;
    }
    let (_, page) = vendor.get("workspace?agent_id=agent_1&limit=1").await;
    assert_eq!(
        (&page["batch_calls"][0]["agent_id"], &page["has_more"]),
        (&json!("agent_1"), &json!(true))
    );
    let (_, page) = vendor.get("workspace?agent_id=agent_2&limit=1").await;
    assert_eq!(page["has_more"], false);
    assert_eq!(vendor.get("workspace?agent_id=agent_3").await.1["batch_calls"], json!([]));
}

#[tokio::test]
async fn a_new_batch_shows_in_the_list_only_after_the_lag() {
    let list_lag = Duration::from_secs(600);
    let vendor = vendor_with(Options { speed: 0.0, list_lag, ..Options::default() }).await;
    let id = vendor.batch(&["+14155550100"]).await;
    vendor.advance(500);
    assert_eq!(vendor.get("workspace").await.1["batch_calls"], json!([]));
    assert_eq!(vendor.get(&id).await.0, 200, "only the list lags");
    vendor.advance(100);
    assert_eq!(vendor.get("workspace").await.1["batch_calls"][0]["id"], id.as_str());
}

#[tokio::test]
async fn an_export_of_an_ended_batch_is_a_table_of_its_recipients() {
    let vendor = vendor().await;
    let mut body = submit_to(&["+14155550100", "+14155550107"]);
    body["recipients"][0]["id"] = json!("a,\"b\"");
    let id = text(&vendor.submit(&body).await.1["id"]);
    assert_eq!(vendor.get(&format!("{id}/export")).await.0, 400, "it still runs");
    vendor.advance(100);
    let export = vendor.request(Method::GET, &format!("{id}/export")).send().await.unwrap();
    assert_eq!(export.headers()["content-type"], "text/csv; charset=utf-8");
    assert!(export.headers().contains_key("content-disposition"));
    let key = id.trim_start_matches("btcal_");
    assert_eq!(
        export.text().await.unwrap(),
        format!(
            "id,phone_number,whatsapp_user_id,status,conversation_id\r\n\
             \"a,\"\"b\"\"\",+14155550100,,completed,conv_{key}_0_0\r\n\
             rcpt_{key}_1,+14155550107,,failed,\r\n"
        )
    );
    assert_eq!(vendor.sandbox.batches()[0].recipients[1].status, CallStatus::Failed);
}
