//! Each route answers in the vendor's shapes, when it succeeds and when it does not.

mod support;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use support::{KEY, submit_to, text, vendor};

const NUMBER: &[&str] = &["+14155550100"];

fn code(answer: &(StatusCode, Value)) -> (u16, &str) {
    (answer.0.as_u16(), answer.1["detail"]["code"].as_str().unwrap_or("no code"))
}

#[tokio::test]
async fn a_submit_answers_every_field_the_vendor_requires_in_the_vendors_order() {
    let vendor = vendor().await;
    let sent = json!({
        "call_name": "Recall", "agent_id": "agent_1", "recipients": [],
        "agent_phone_number_id": "phnum_1", "timezone": "Europe/Berlin", "branch_id": "b",
        "environment": "production", "target_concurrency_limit": 3, "unheard_of": true,
        "telephony_call_config": {"ringing_timeout_secs": 30, "unheard_of": 1},
        "scheduled_time_unix": 4_102_444_800_u64,
    });
    let answer = vendor.request(Method::POST, "submit").json(&sent).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let headers = answer.headers().clone();
    assert!(!headers["request-id"].is_empty());
    assert_eq!(headers["current-concurrent-requests"], "1");
    assert_eq!(headers["maximum-concurrent-requests"], "50");
    assert_eq!(headers["content-type"], "application/json");
    let body = answer.text().await.unwrap();
    let batch: Value = serde_json::from_str(&body).unwrap();
    let (id, created) = (text(&batch["id"]), &batch["created_at_unix"]);
    let expected = format!(
        r#"{{"id":"{id}","phone_number_id":"phnum_1","phone_provider":"twilio","whatsapp_params":null,"name":"Recall","agent_id":"agent_1","branch_id":"b","environment":"production","created_at_unix":{created},"scheduled_time_unix":4102444800,"timezone":"Europe/Berlin","total_calls_dispatched":0,"total_calls_scheduled":0,"total_calls_finished":0,"last_updated_at_unix":{created},"status":"completed","retry_count":0,"telephony_call_config":{{"ringing_timeout_secs":30,"twilio_call_recording_enabled":false}},"target_concurrency_limit":3,"agent_name":"Sandbox agent","branch_name":null,"sandbox_extra":{{"zone":"größer","adequacy":1.0,"ordinal":9007199254740993}}}}"#
    );
    assert_eq!(body, expected);
}

#[tokio::test]
async fn a_get_brings_back_the_dynamic_variables_of_every_recipient_as_they_were_sent() {
    let vendor = vendor().await;
    let variables =
        r#"{"zebra":"last","apple":1.0,"count":-7,"nothing":null,"nested":{"b":1,"a":2}}"#;
    let body = format!(
        r#"{{"call_name":"c","agent_id":"a","recipients":[
            {{"phone_number":"+1","id":"mine","conversation_initiation_client_data":
                {{"user_id":"u","dynamic_variables":{variables}}}}},
            {{"whatsapp_user_id":"w"}}]}}"#
    );
    let submit = vendor.request(Method::POST, "submit").header("content-type", "application/json");
    let batch: Value = submit.body(body).send().await.unwrap().json().await.unwrap();
    let id = text(&batch["id"]);
    let got = vendor.request(Method::GET, &id).send().await.unwrap().text().await.unwrap();
    assert!(got.contains(&format!(r#""dynamic_variables":{variables}"#)), "{got}");
    let got: Value = serde_json::from_str(&got).unwrap();
    let [first, second] = got["recipients"].as_array().unwrap().as_slice() else {
        panic!("not two recipients: {got}")
    };
    assert_eq!(first["id"], "mine");
    assert_eq!(first["conversation_initiation_client_data"]["user_id"], "u");
    assert_eq!(first["status"], "pending");
    assert_eq!(first["conversation_id"], Value::Null);
    assert_eq!(first["created_at_unix"], got["created_at_unix"]);
    assert_eq!(first["updated_at_unix"], got["created_at_unix"]);
    assert!(text(&second["id"]).starts_with("rcpt_"));
    assert_eq!(second["conversation_initiation_client_data"], Value::Null);
    assert_eq!(second["whatsapp_user_id"], "w");
}

#[tokio::test]
async fn the_numbers_id_decides_the_provider() {
    let vendor = vendor().await;
    for (number, provider) in [
        (json!("phnum_1"), json!("twilio")),
        (json!("phnum_sip_1"), json!("sip_trunk")),
        (json!("phnum_exotel_1"), json!("exotel")),
        (Value::Null, Value::Null),
    ] {
        let mut body = submit_to(NUMBER);
        body["agent_phone_number_id"] = number;
        assert_eq!(vendor.submit(&body).await.1["phone_provider"], provider);
    }
}

#[tokio::test]
async fn a_missing_or_wrong_key_is_refused_on_every_route_and_changes_nothing() {
    let vendor = vendor().await;
    let id = vendor.batch(NUMBER).await;
    for (method, path) in [
        (Method::POST, "submit".to_owned()),
        (Method::GET, "workspace".to_owned()),
        (Method::GET, id.clone()),
        (Method::POST, format!("{id}/cancel")),
        (Method::POST, format!("{id}/retry")),
        (Method::DELETE, id.clone()),
        (Method::GET, format!("{id}/export")),
    ] {
        for (key, code) in [(None, "needs_authorization"), (Some("wrong"), "invalid_api_key")] {
            let mut request = vendor.http.request(method.clone(), vendor.url(&path));
            if let Some(key) = key {
                request = request.header("xi-api-key", key);
            }
            let answer = request.json(&submit_to(NUMBER)).send().await.unwrap();
            assert_eq!(answer.status(), 401, "{method} {path}");
            let request_id = answer.headers()["request-id"].to_str().unwrap().to_owned();
            let detail = answer.json::<Value>().await.unwrap()["detail"].take();
            assert_eq!(detail["type"], "authentication_error");
            assert_eq!(detail["code"], code);
            assert_eq!(detail["status"], code);
            assert!(detail["message"].is_string());
            assert_eq!(detail["request_id"], request_id.as_str());
        }
    }
    let batches = vendor.sandbox.batches();
    assert_eq!(batches.len(), 1);
    assert!(!batches[0].deleted);
}

#[tokio::test]
async fn what_does_not_exist_is_a_404_that_names_it() {
    let vendor = vendor().await;
    for (method, path) in [
        (Method::GET, "btcal_none"),
        (Method::POST, "btcal_none/cancel"),
        (Method::POST, "btcal_none/retry"),
        (Method::DELETE, "btcal_none"),
        (Method::GET, "btcal_none/export"),
    ] {
        let answer = vendor.call(method, path).await;
        assert_eq!(code(&answer), (404, "batch_call_not_found"));
        assert!(text(&answer.1["detail"]["message"]).contains("btcal_none"));
    }
    let mut body = submit_to(NUMBER);
    body["agent_id"] = json!("agent_missing_1");
    assert_eq!(code(&vendor.submit(&body).await), (404, "agent_not_found"));
    let mut body = submit_to(NUMBER);
    body["agent_phone_number_id"] = json!("phnum_missing_1");
    assert_eq!(code(&vendor.submit(&body).await), (404, "phone_number_not_found"));
    assert!(vendor.sandbox.batches().is_empty());
    assert_eq!(
        vendor.post("btcal_none/call").await,
        (StatusCode::NOT_FOUND, json!({"detail": "Not Found"}))
    );
    assert_eq!(vendor.call(Method::PUT, "submit").await.0, 405);
}

#[tokio::test]
async fn a_wrong_body_is_a_422_that_points_at_every_fault() {
    let vendor = vendor().await;
    let body = json!({
        "call_name": 7,
        "recipients": [{"phone_number": 1}, "x", {"conversation_initiation_client_data": {
            "dynamic_variables": [], "source_info": {"version": "v".repeat(51)},
            "conversation_config_override": {"tts": {"model_id": "m"}, "agent": {"prompt":
                {"knowledge_base": [{"type": "file", "name": "n"}]}}}}}],
        "scheduled_time_unix": 1.5,
        "telephony_call_config": {"ringing_timeout_secs": 1000, "twilio_call_recording_enabled": "si"},
        "target_concurrency_limit": 0,
        "whatsapp_params": {},
    });
    let (status, answer) = vendor.submit(&body).await;
    assert_eq!(status, 422);
    let path = |wrong: &Value| {
        let steps = wrong["loc"].as_array().unwrap().iter();
        steps.map(|step| step.to_string().replace('"', "")).collect::<Vec<_>>().join(".")
    };
    let wrong = answer["detail"].as_array().unwrap();
    let wrong: Vec<String> =
        wrong.iter().map(|wrong| format!("{} {}", path(wrong), text(&wrong["type"]))).collect();
    let data = "body.recipients.2.conversation_initiation_client_data";
    let knowledge = "conversation_config_override.agent.prompt.knowledge_base";
    let template = "body.whatsapp_params.whatsapp_call_permission_request_template";
    assert_eq!(
        wrong,
        [
            "body.call_name string_type",
            "body.agent_id missing",
            "body.recipients.0.phone_number string_type",
            "body.recipients.1 model_attributes_type",
            &format!("{data}.conversation_config_override.tts.model_id enum"),
            &format!("{data}.{knowledge}.0.id missing"),
            &format!("{data}.source_info.version string_too_long"),
            &format!("{data}.dynamic_variables dict_type"),
            "body.scheduled_time_unix int_from_float",
            &format!("{template}_name missing"),
            &format!("{template}_language_code missing"),
            "body.telephony_call_config.ringing_timeout_secs less_than_equal",
            "body.telephony_call_config.twilio_call_recording_enabled bool_parsing",
            "body.target_concurrency_limit greater_than_equal",
        ]
    );
    assert_eq!(answer["detail"][2]["loc"], json!(["body", "recipients", 0, "phone_number"]));
    assert_eq!(answer["detail"][1]["msg"], "Field required");
    assert!(vendor.sandbox.batches().is_empty());
}

#[tokio::test]
async fn a_body_that_is_no_json_object_is_a_422() {
    let vendor = vendor().await;
    for (content_type, body, kind) in [
        ("application/json", "{\"call_name\":", "json_invalid"),
        ("application/json", "[]", "model_attributes_type"),
        ("application/json", "", "missing"),
        ("text/plain", "{}", "model_attributes_type"),
    ] {
        let request = vendor.request(Method::POST, "submit").header("content-type", content_type);
        let answer = request.body(body).send().await.unwrap();
        assert_eq!(answer.status(), 422, "{body}");
        let answer: Value = answer.json().await.unwrap();
        assert_eq!(answer["detail"][0]["type"], kind, "{body}");
        assert_eq!(answer["detail"][0]["loc"][0], "body");
    }
}

#[tokio::test]
async fn ten_thousand_recipients_pass_and_one_more_does_not() {
    let vendor = vendor().await;
    let mut numbers = vec!["+14155550100"; 10_000];
    let id = vendor.batch(&numbers).await;
    let (_, batch) = vendor.get(&id).await;
    assert_eq!(batch["recipients"].as_array().unwrap().len(), 10_000);
    assert_eq!(batch["total_calls_scheduled"], 10_000);
    let variables = &batch["recipients"][9_999]["conversation_initiation_client_data"];
    assert_eq!(variables["dynamic_variables"], json!({"place": 9_999}));
    numbers.push("+14155550100");
    let (status, answer) = vendor.submit(&submit_to(&numbers)).await;
    assert_eq!(status, 422);
    assert_eq!(answer["detail"][0]["loc"], json!(["body", "recipients"]));
    assert_eq!(answer["detail"][0]["type"], "too_long");
    assert_eq!(vendor.sandbox.batches().len(), 1);
}

#[tokio::test]
async fn a_deleted_batch_is_gone_for_clients_and_still_counted() {
    let vendor = vendor().await;
    let id = vendor.batch(NUMBER).await;
    let answer = vendor.request(Method::DELETE, &id).send().await.unwrap();
    assert_eq!(answer.status(), 204);
    assert!(!answer.headers()["request-id"].is_empty());
    assert_eq!(answer.text().await.unwrap(), "");
    assert_eq!(vendor.get(&id).await.0, 404);
    assert_eq!(vendor.call(Method::DELETE, &id).await.0, 404);
    assert_eq!(vendor.get("workspace").await.1["batch_calls"], json!([]));
    let batches = vendor.sandbox.batches();
    assert_eq!((batches[0].id.as_str(), batches[0].deleted), (id.as_str(), true));
}

#[tokio::test]
async fn the_request_log_holds_what_was_sent_and_what_was_answered() {
    let vendor = vendor().await;
    let body = submit_to(NUMBER);
    vendor.submit(&body).await;
    vendor.get("workspace?limit=1").await;
    vendor.get("btcal_none").await;
    let requests = vendor.sandbox.requests();
    let seen: Vec<_> = requests
        .iter()
        .map(|request| (request.method.as_str(), request.path.as_str(), request.status))
        .collect();
    let base = "/v1/convai/batch-calling";
    assert_eq!(
        seen,
        [
            ("POST", format!("{base}/submit").as_str(), Some(200)),
            ("GET", format!("{base}/workspace?limit=1").as_str(), Some(200)),
            ("GET", format!("{base}/btcal_none").as_str(), Some(404)),
        ]
    );
    assert_eq!(requests[0].body, body);
    assert_eq!(requests[1].body, Value::Null);
    assert!(requests.iter().all(|request| request.processed && request.fault.is_none()));
    let batch = &vendor.sandbox.batches()[0];
    assert_eq!(batch.recipients[0].phone_number.as_deref(), Some(NUMBER[0]));
    assert_eq!(batch.recipients[0].dynamic_variables["place"], 0);
}

#[tokio::test]
async fn connections_are_counted_so_that_reuse_can_be_proved() {
    let vendor = vendor().await;
    for _ in 0..5 {
        assert_eq!(vendor.get("workspace").await.0, 200);
    }
    assert_eq!(vendor.sandbox.connections(), 1);
    let get = format!(
        "GET /v1/convai/batch-calling/workspace HTTP/1.1\r\nhost: s\r\nxi-api-key: {KEY}\r\n\
         connection: close\r\n\r\n"
    );
    let raw = vendor.raw(&get).await;
    assert!(raw.seen.starts_with("HTTP/1.1 200 OK\r\n") && raw.ended.is_ok(), "{}", raw.seen);
    assert_eq!(vendor.sandbox.connections(), 2);
}
