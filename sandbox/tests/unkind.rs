//! A vendor that shows less than it knows: other workspaces, answers that are changed on their way,
//! conversations.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails loudly")]

use std::time::Duration;

use elevenlabs_sandbox::{Effect, Fault, Options, Reply, Route, Sandbox, Unkind};
use serde_json::{Value, json};

async fn sandbox() -> Sandbox {
    let options = Options {
        speed: 0.0,
        rotated_keys: vec!["rotated".to_owned()],
        other_keys: vec!["other".to_owned()],
        ..Options::default()
    };
    Sandbox::start(options).await.unwrap()
}

async fn ask(sandbox: &Sandbox, key: &str, method: &str, path: &str, body: Value) -> (u16, Value) {
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(10)).build();
    let url = format!("{}/v1/convai/{path}", sandbox.base_url());
    let request = client.unwrap().request(method.parse().unwrap(), url).header("xi-api-key", key);
    let response = request.json(&body).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

async fn get(sandbox: &Sandbox, key: &str, path: &str) -> (u16, Value) {
    ask(sandbox, key, "GET", path, Value::Null).await
}

async fn submit(sandbox: &Sandbox, key: &str, marker: &str) -> String {
    let data = json!({"dynamic_variables": {"m": marker}});
    let recipient =
        json!({"phone_number": "+14155550100", "conversation_initiation_client_data": data});
    let body = json!({
        "call_name": "n", "agent_id": "a", "agent_phone_number_id": "p", "recipients": [recipient],
    });
    let (status, batch) = ask(sandbox, key, "POST", "batch-calling/submit", body).await;
    assert_eq!(status, 200, "{batch}");
    batch["id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_key_sees_the_batches_of_its_own_workspace() {
    let sandbox = sandbox().await;
    let id = submit(&sandbox, "sandbox-key", "x").await;
    let listed = async |key| {
        let (status, page) = get(&sandbox, key, "batch-calling/workspace").await;
        assert_eq!(status, 200);
        page["batch_calls"].as_array().unwrap().len()
    };
    assert_eq!(
        [listed("sandbox-key").await, listed("rotated").await, listed("other").await],
        [1, 1, 0]
    );
    let path = format!("batch-calling/{id}");
    for (key, status) in [("sandbox-key", 200), ("rotated", 200), ("other", 404), ("nobody's", 401)]
    {
        assert_eq!(get(&sandbox, key, &path).await.0, status, "{key}");
    }
    let cancel = format!("{path}/cancel");
    assert_eq!(ask(&sandbox, "other", "POST", &cancel, Value::Null).await.0, 404);
}

#[tokio::test]
async fn an_answer_is_changed_and_what_the_sandbox_knows_is_not() {
    let sandbox = sandbox().await;
    let id = submit(&sandbox, "sandbox-key", "x").await;
    sandbox.distort(|route, answer| match route {
        Route::List => answer["batch_calls"][0]["name"] = json!("another"),
        _ => answer["recipients"][0]["conversation_initiation_client_data"] = Value::Null,
    });
    let (_, page) = get(&sandbox, "sandbox-key", "batch-calling/workspace").await;
    assert_eq!(page["batch_calls"][0]["name"], "another");
    let (_, batch) = get(&sandbox, "sandbox-key", &format!("batch-calling/{id}")).await;
    assert_eq!(batch["recipients"][0]["conversation_initiation_client_data"], Value::Null);
    assert_eq!(sandbox.batches()[0].name, "n");
    sandbox.clear_distortion();
    let (_, page) = get(&sandbox, "sandbox-key", "batch-calling/workspace").await;
    assert_eq!(page["batch_calls"][0]["name"], "n");
}

#[tokio::test]
async fn a_call_that_was_placed_is_found_by_its_variable_and_names_its_batch() {
    let sandbox = sandbox().await;
    let id = submit(&sandbox, "sandbox-key", "x").await;
    submit(&sandbox, "sandbox-key", "y").await;
    let found = async |key| {
        let path = "conversations?dynamic_variable_params=m:eq:x";
        let (status, page) = get(&sandbox, key, path).await;
        assert_eq!(status, 200);
        page["conversations"].as_array().unwrap().clone()
    };
    assert!(found("sandbox-key").await.is_empty(), "nobody was called yet");
    sandbox.advance(Duration::from_secs(60));
    assert!(found("other").await.is_empty());
    let calls = found("sandbox-key").await;
    assert_eq!(calls.len(), 1, "{calls:?}");
    let call = format!("conversations/{}", calls[0]["conversation_id"].as_str().unwrap());
    let (_, detail) = get(&sandbox, "sandbox-key", &call).await;
    assert_eq!(detail["metadata"]["batch_call"]["batch_call_id"], json!(id));
    assert_eq!(detail["conversation_initiation_client_data"]["dynamic_variables"]["m"], "x");
    assert_eq!(get(&sandbox, "other", &call).await.0, 404);
}

#[tokio::test]
#[should_panic(expected = "this fault cannot be ordered")]
async fn what_was_done_is_not_refused_in_elevenlabs_own_form() {
    let reply = Reply::new(404).text("<html>").processed();
    let sandbox = sandbox().await;
    sandbox.order(Fault::on(Route::Submit, Effect::Status(reply.clone())));
    let reply = reply.json(json!({"detail": {"code": "x", "message": "m"}}));
    sandbox.order(Fault::on(Route::Submit, Effect::Status(reply)));
}

/// What the sandbox answers with these orders for the list and for a batch.
async fn with(sandbox: &Sandbox, unkind: Unkind, path: &str) -> Value {
    sandbox.order(Fault::on(Route::Any, Effect::Unkind(unkind)));
    let (status, answer) = get(sandbox, "sandbox-key", path).await;
    assert_eq!(status, 200, "{answer}");
    answer
}

fn ids(page: &Value) -> Vec<&str> {
    let batches = page["batch_calls"].as_array().unwrap();
    batches.iter().map(|batch| batch["id"].as_str().unwrap()).collect()
}

const LIST: &str = "batch-calling/workspace";
const LONG: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn a_list_is_out_of_order_flaps_or_lags_unevenly() {
    let sandbox = sandbox().await;
    for n in 0..12 {
        submit(&sandbox, "sandbox-key", &n.to_string()).await;
    }
    let right = get(&sandbox, "sandbox-key", LIST).await.1;
    let shuffled = with(&sandbox, Unkind::Shuffled, LIST).await;
    assert_ne!(ids(&shuffled), ids(&right));
    let sorted = |page: &Value| {
        let mut ids: Vec<_> = ids(page).into_iter().map(str::to_owned).collect();
        ids.sort();
        ids
    };
    assert_eq!(sorted(&shuffled), sorted(&right));
    let flapping = with(&sandbox, Unkind::Flapping, LIST).await;
    let again = with(&sandbox, Unkind::Flapping, LIST).await;
    assert_ne!(ids(&flapping), ids(&again));
    assert!((1..12).contains(&ids(&flapping).len()));
    let lagging = with(&sandbox, Unkind::Lagging(LONG), LIST).await;
    assert_eq!(ids(&lagging).len(), 0, "an hour is long");
    sandbox.advance(LONG / 2);
    let lagging = with(&sandbox, Unkind::Lagging(LONG), LIST).await;
    assert!((1..12).contains(&ids(&lagging).len()), "each has a time of its own");
}

#[tokio::test]
async fn names_markers_recipients_and_times_come_back_otherwise() {
    let sandbox = sandbox().await;
    let id = submit(&sandbox, "sandbox-key", "marker").await;
    let path = format!("batch-calling/{id}");
    let right = get(&sandbox, "sandbox-key", &path).await.1;
    let variables = |batch: &Value| {
        let data = &batch["recipients"][0]["conversation_initiation_client_data"];
        data["dynamic_variables"].clone()
    };
    assert_eq!(with(&sandbox, Unkind::NamesCut(0), LIST).await["batch_calls"][0]["name"], "");
    assert_eq!(with(&sandbox, Unkind::NamesNormalised, &path).await["name"], "N");
    assert_eq!(variables(&with(&sandbox, Unkind::MarkersMissing, &path).await), json!({}));
    assert_eq!(variables(&with(&sandbox, Unkind::MarkersRetyped, &path).await), json!({"m": 6}));
    let late = Unkind::MarkersLate(LONG);
    assert_eq!(variables(&with(&sandbox, late.clone(), &path).await), json!({}));
    let recipients = Unkind::RecipientsLate(LONG);
    assert_eq!(with(&sandbox, recipients.clone(), &path).await["recipients"], json!([]));
    let ahead = with(&sandbox, Unkind::ClockAhead(90), &path).await;
    let at = |batch: &Value| batch["created_at_unix"].as_i64().unwrap();
    assert_eq!(at(&ahead), at(&right) + 90);
    sandbox.advance(LONG);
    assert_eq!(variables(&with(&sandbox, late, &path).await), json!({"m": "marker"}));
    let shown = with(&sandbox, recipients, &path).await;
    assert_eq!(shown["recipients"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn more_at_once_than_the_limit_are_refused() {
    let sandbox = sandbox().await;
    let latency = Duration::from_millis(300);
    sandbox.order(Fault::on(Route::List, Effect::Limit { at_once: 2, latency }).until_cleared());
    let list = async || get(&sandbox, "sandbox-key", LIST).await.0;
    let (a, b, c) = tokio::join!(list(), list(), list());
    let mut codes = [a, b, c];
    codes.sort_unstable();
    assert_eq!(codes, [200, 200, 429]);
    assert_eq!(list().await, 200, "nothing is under way any more");
}

#[tokio::test]
async fn a_refusal_comes_before_the_body_and_an_idle_connection_is_closed() {
    let sandbox = sandbox().await;
    sandbox.order(Fault::on(Route::Submit, Effect::RefusedEarly(Reply::new(413).json(json!({})))));
    let (status, _) = ask(&sandbox, "sandbox-key", "POST", "batch-calling/submit", json!({})).await;
    assert_eq!(status, 413);
    assert_eq!(sandbox.requests()[0].body, Value::Null, "it was not read");

    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("{}/v1/convai/{LIST}", sandbox.base_url());
    sandbox.order(Fault::on(Route::List, Effect::ClosedWhenIdle));
    for _ in 0..2 {
        let response = client.get(&url).header("xi-api-key", "sandbox-key").send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert!(response.headers().get("connection").is_none());
        response.bytes().await.unwrap();
    }
    assert_eq!(sandbox.connections(), 3, "one for the submit, and two for the lists");
}
