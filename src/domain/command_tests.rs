//! What a body may and may not say, and in which words a fault is told.

use super::*;

const README_EXAMPLE: &str = r#"{
  "call_name": "Recordatorio de cita",
  "agent_id": "agent_7101k5zvyjhmfg983brhmhkd98n6",
  "agent_phone_number_id": "phnum_1234567890",
  "recipients": [
    {"phone_number": "+1234567890", "dynamic_variables": {"nombre": "Ana", "deuda": 120.50}},
    {"phone_number": "+0987654321"}
  ],
  "scheduled_time_unix": 1696435200,
  "phone_provider": "twilio"
}"#;

fn submit(body: &str) -> Result<Submit, String> {
    match Command::parse(CommandKind::Submit, body.as_bytes()) {
        Ok(Command::Submit(submit)) => Ok(*submit),
        Ok(_) => panic!("a submit is read as a submit"),
        Err(rejection) => Err(rejection.to_string()),
    }
}

/// The example with one top-level field set to `value`.
fn with(field: &str, value: &str) -> String {
    let mut body: serde_json::Value = serde_json::from_str(README_EXAMPLE).unwrap();
    body[field] = serde_json::from_str(value).unwrap();
    body.to_string()
}

fn fault(body: &str) -> String {
    let text = submit(body).unwrap_err();
    let text = text.strip_prefix("The command is not valid: ").unwrap();
    text.strip_suffix(". Nothing was sent to ElevenLabs.").unwrap().to_owned()
}

/// A submit with the id `c-1` and nothing else said.
pub fn message(body: &str) -> CommandMessage {
    CommandMessage {
        queue: CommandKind::Submit,
        routing_key: None,
        message_id: Some("c-1".into()),
        correlation_id: None,
        content_type: None,
        content_encoding: None,
        traceparent: None,
        tracestate: None,
        reply_to: None,
        not_after: None,
        refused_header: None,
        expires_at: None,
        redeliveries: 0,
        earlier: Earlier::default(),
        body: body.into(),
    }
}

#[test]
fn the_rest_services_own_example_goes_through() {
    let submit = submit(README_EXAMPLE).unwrap();
    assert_eq!(submit.recipients[1].phone_number, "+0987654321");
    assert_eq!(submit.scheduled_time_unix.unwrap().get(), "1696435200");
}

#[test]
fn every_rule_of_the_contract_has_a_sentence_with_a_path() {
    let cases = [
        (
            with("call_name", r#"" ""#),
            "call_name: must be text of 1 to 200 characters that is not blank",
        ),
        (with("call_name", "null"), "call_name: must be a string, not null"),
        (
            with("call_name", &format!("{:?}", "é".repeat(201))),
            "call_name: must have at most 200 characters",
        ),
        (with("agent_id", r#""""#), "agent_id: must be the ElevenLabs agent's id, not blank"),
        (with("recipients", "[]"), "recipients: must not be empty"),
        (with("recipients", "{}"), "recipients: must be an array, not an object"),
        (with("recipients", "[7]"), "recipients[0]: must be an object, not a number"),
        (with("recipients", "[{}]"), "recipients[0].phone_number: is required"),
        (
            with("recipients", r#"[{"phone_number":"+123456"}]"#),
            "recipients[0].phone_number: must be a phone number in E.164 form: + and 7 to 15 digits, for example +14155550100",
        ),
        (
            with("recipients", r#"[{"phone_number":"+14155550100","name":"x"}]"#),
            "recipients[0].name: is not a known field; known are dynamic_variables, phone_number",
        ),
        (
            with(
                "recipients",
                r#"[{"phone_number":"+14155550100","dynamic_variables":{"a":[1]}}]"#,
            ),
            "recipients[0].dynamic_variables.a: must be a boolean or a number or a string or null, not an array",
        ),
        (
            with(
                "recipients",
                r#"[{"phone_number":"+14155550100","dynamic_variables":{"call_manager_command_id":"x"}}]"#,
            ),
            "recipients[0].dynamic_variables.call_manager_command_id: is reserved: the worker sets it itself to find the batch of a command again",
        ),
        (
            with("scheduled_time_unix", r#""tomorrow""#),
            "scheduled_time_unix: must be an integer or null, not a string",
        ),
        (
            with("scheduled_time_unix", "1.5"),
            "scheduled_time_unix: must be an integer or null, not a number",
        ),
        (with("scheduled_time_unix", "-1"), "scheduled_time_unix: must be at least 0"),
        (
            with("scheduled_time_unix", "1696435200000"),
            "scheduled_time_unix: must be in seconds, and this can only be milliseconds; divide it by 1000",
        ),
        (
            with("phone_provider", r#""vonage""#),
            r#"phone_provider: must be one of ["twilio","sip_trunk","exotel",null]"#,
        ),
        (
            with("telephony_call_config", r#"{"ringing_timeout_secs":1000}"#),
            "telephony_call_config.ringing_timeout_secs: must be at most 999",
        ),
        (with("target_concurrency_limit", "0"), "target_concurrency_limit: must be at least 1"),
        ("[]".to_owned(), "body: must be an object, not an array"),
    ];
    for (body, expected) in cases {
        assert_eq!(fault(&body), expected);
    }
}

#[test]
fn faults_of_the_body_and_of_its_recipients_are_told_together() {
    let told = fault(r#"{"call_name":"n","agent_id":"a","recipients":[{"phone_number":7}]}"#);
    assert_eq!(
        told,
        "agent_phone_number_id: is required; \
         recipients[0].phone_number: must be a string, not a number"
    );
}

#[test]
fn an_unknown_field_is_named_together_with_the_known_ones() {
    let fault = fault(&with("shedule", "1"));
    assert!(fault.starts_with("shedule: is not a known field; known are agent_id, "), "{fault}");
}

#[test]
fn the_first_twenty_faults_are_listed_and_the_rest_is_counted() {
    let recipients = vec!["{}"; 30].join(",");
    let fault = fault(&with("recipients", &format!("[{recipients}]")));
    assert_eq!(fault.matches("is required").count(), 20);
    assert!(fault.ends_with("recipients[19].phone_number: is required; and 10 more"), "{fault}");
}

#[test]
fn an_error_never_repeats_a_value() {
    let body = with(
        "recipients",
        r#"[{"phone_number":"415-555-0100-secret"},{"phone_number":4155550100}]"#,
    );
    let fault = fault(&body);
    assert!(!fault.contains("secret") && !fault.contains("555-0100"), "{fault}");
}

#[test]
fn identical_recipients_are_refused_with_both_indexes() {
    let twice = r#"[{"phone_number":"+14155550100","dynamic_variables":{"a":"x","b":1}},
                    {"phone_number":"+14155550101"},
                    {"phone_number":"+14155550100","dynamic_variables":{"b":1,"a":"\u0078"}}]"#;
    let told = fault(&with("recipients", twice));
    assert!(told.starts_with("recipients[2]: is identical to recipients[0]"), "{told}");
    let same_number = r#"[{"phone_number":"+14155550100","dynamic_variables":{"a":"1"}},
                          {"phone_number":"+14155550100","dynamic_variables":{"a":1}},
                          {"phone_number":"+14155550100"}]"#;
    assert!(submit(&with("recipients", same_number)).is_ok());
    let absent_and_empty = r#"[{"phone_number":"+14155550100"},{"phone_number":"+14155550100","dynamic_variables":{}}]"#;
    assert!(submit(&with("recipients", absent_and_empty)).is_err());
}

#[test]
fn ten_thousand_recipients_are_allowed_and_one_more_is_not() {
    let recipients = |n: u64| {
        let list: Vec<_> = (0..n).map(|i| format!(r#"{{"phone_number":"+1{i:09}"}}"#)).collect();
        with("recipients", &format!("[{}]", list.join(",")))
    };
    assert_eq!(submit(&recipients(10_000)).unwrap().recipients.len(), 10_000);
    assert_eq!(
        fault(&recipients(10_001)),
        "recipients: must have at most 10000 entries and has 10001; split the batch"
    );
}

#[test]
fn what_is_no_json_object_is_told_from_what_is() {
    for (body, expected) in [
        (&b""[..], "the body is empty; send a JSON object"),
        (b"\xff\xfe", "the body is not UTF-8 from byte 0 on; send UTF-8 encoded JSON"),
        (b"{\"call_name\":", "the body is not JSON: EOF while parsing a value at line 1 column 13"),
        (b"nonsense", "the body is not JSON: expected ident at line 1 column 2"),
    ] {
        let rejection = Command::parse(CommandKind::Submit, body).unwrap_err().to_string();
        assert!(rejection.contains(expected), "{rejection}");
    }
    let deep = "[".repeat(100_000);
    assert!(fault(&deep).contains("recursion limit exceeded"), "{}", fault(&deep));
    let large = vec![b' '; MAX_BODY_BYTES + 1];
    let rejection = Command::parse(CommandKind::Submit, &large).unwrap_err().to_string();
    assert!(rejection.contains("at most 16777216 are read"), "{rejection}");
}

#[test]
fn a_field_given_twice_is_an_error_and_not_the_last_one() {
    let twice = README_EXAMPLE.replacen('{', r#"{"call_name":"other","#, 1);
    assert_eq!(
        fault(&twice),
        "body: repeats the field `call_name` at line 2 column 13; give it once"
    );
    let nested = README_EXAMPLE.replacen(
        r#"{"phone_number": "+0987654321"}"#,
        r#"{"phone_number": "+0987654321", "phone_number": "+0987654322"}"#,
        1,
    );
    assert_eq!(
        fault(&nested),
        "recipients[1]: repeats the field `phone_number` at line 7 column 50; give it once"
    );
}

#[test]
fn a_batch_id_has_the_shape_of_one() {
    let long = "x".repeat(129);
    for hostile in ["../../x", "%2e%2e", "a b", "😀", "", ".", long.as_str()] {
        let body = serde_json::json!({"batch_id": hostile}).to_string();
        for kind in [CommandKind::Cancel, CommandKind::Get] {
            let rejection = Command::parse(kind, body.as_bytes()).unwrap_err().to_string();
            assert!(
                rejection.contains("batch_id: must be a batch id as a submit's result gave it"),
                "{rejection}"
            );
        }
    }
    assert!(Command::parse(CommandKind::Get, br#"{"batch_id":"btcal_01k-A"}"#).is_ok());
}

#[test]
fn a_submit_needs_an_id_and_takes_the_correlation_id_where_there_is_no_message_id() {
    let mut message = message(README_EXAMPLE);
    message.message_id = None;
    assert!(message.parse().unwrap_err().to_string().contains("a submit needs a message_id"));
    message.correlation_id = Some("c-2".into());
    assert_eq!(message.producer_id(), Some("c-2"));
    assert!(message.parse().is_ok());
}

#[test]
fn an_id_that_was_not_utf_8_is_refused_because_another_may_have_become_the_same() {
    let mut message = message(README_EXAMPLE);
    message.message_id = Some("campa\u{1a}a".into());
    let rejection = message.parse().unwrap_err().to_string();
    assert!(
        rejection.contains("the message_id is not UTF-8; send UTF-8 text, such as a UUID"),
        "{rejection}"
    );
    message.message_id = Some("campaña".into());
    message.correlation_id = Some("\u{1a}".into());
    let rejection = message.parse().unwrap_err().to_string();
    assert!(rejection.contains("the correlation_id is not UTF-8"), "{rejection}");
    message.correlation_id = None;
    assert!(message.parse().is_ok());
}

#[test]
fn the_routing_key_names_the_command_and_an_unknown_one_is_refused() {
    let mut message = message(r#"{"batch_id":"b"}"#);
    message.routing_key = Some("batch-calling.get".into());
    assert_eq!(message.kind(), CommandKind::Get);
    assert!(matches!(message.parse(), Ok(Command::Get(_))));
    message.routing_key = Some("batch-calling.delete".into());
    let rejection = message.parse().unwrap_err().to_string();
    assert!(
        rejection.contains("the routing key \"batch-calling.delete\" names no command"),
        "{rejection}"
    );
}

#[test]
fn only_plain_json_is_read() {
    let mut message = message(README_EXAMPLE);
    for good in ["application/json", "application/json; charset=utf-8", "Application/JSON", ""] {
        message.content_type = Some(good.into());
        assert!(message.parse().is_ok(), "{good}");
    }
    message.content_type = Some("text/xml".into());
    assert!(message.parse().unwrap_err().to_string().contains("the content_type is \"text/xml\""));
    message.content_type = None;
    message.content_encoding = Some("gzip".into());
    assert!(message.parse().unwrap_err().to_string().contains("the content_encoding is \"gzip\""));
}

#[test]
fn the_fingerprint_ignores_white_space_and_order_but_no_value() {
    let compact = serde_json::from_str::<serde_json::Value>(README_EXAMPLE).unwrap();
    // serde_json's map sorts by name, and 120.50 becomes 120.5: give it back as it was.
    let compact = compact.to_string().replace("120.5", "120.50");
    let id = |body: &str| submit(body).unwrap().fingerprint();
    assert_eq!(id(README_EXAMPLE), id(&compact));
    assert_ne!(id(README_EXAMPLE), id(&with("call_name", r#""other""#)));
    assert_ne!(id(README_EXAMPLE), id(&README_EXAMPLE.replace("Ana", "Eva")));
    let config =
        |text| README_EXAMPLE.replacen('{', &format!("{{\"telephony_call_config\":{text},"), 1);
    assert_eq!(
        id(&config(r#"{"ringing_timeout_secs":30,"twilio_call_recording_enabled":true}"#)),
        id(&config(r#"{ "twilio_call_recording_enabled": true, "ringing_timeout_secs": 30 }"#)),
    );
}

#[test]
fn neither_a_message_nor_a_submit_shows_a_phone_number_in_debug_output() {
    let message = message(README_EXAMPLE);
    let printed = format!("{message:?} {:?}", message.parse().unwrap());
    assert!(!printed.contains("1234567890") && !printed.contains("Ana"), "{printed}");
}

#[test]
fn not_after_is_unix_seconds_and_nothing_else() {
    let deadline =
        |text: &str| CommandMessage { not_after: Some(text.into()), ..message("{}") }.deadline();
    let at = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
    assert_eq!(deadline("1767225600").unwrap(), at(1_767_225_600));
    assert_eq!(deadline(" -1 ").unwrap(), at(0));
    assert_eq!(message("{}").deadline().unwrap(), None);
    for wrong in ["", "soon", "1e9", "2026-01-01T00:00:00Z", "99999999999999999999"] {
        let said = deadline(wrong).unwrap_err().to_string();
        assert!(said.contains("not a time; send Unix seconds"), "{said}");
    }
    let said = deadline("1767225600000").unwrap_err().to_string();
    assert!(said.contains("not_after") && said.contains("only be milliseconds"), "{said}");
}
