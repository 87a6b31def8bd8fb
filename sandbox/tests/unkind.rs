//! A vendor that shows less than it knows: other workspaces, answers that are changed on their way,
//! conversations.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails loudly")]

use std::time::Duration;

use elevenlabs_sandbox::{Effect, Fault, Options, Reply, Route, Sandbox};
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
