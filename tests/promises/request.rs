//! `call-manager request`: publishes one command, prints its result, and its exit code says how it went.

use std::time::Duration;

use elevenlabs_sandbox::{Effect, Fault, Route};
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;

use crate::start::{finished, program};
use crate::support::proxy::Proxy;
use crate::support::{World, amqp_url, submit_body, until};

async fn request(world: &World, arguments: &[&str]) -> (i32, String, String) {
    let url = amqp_url();
    let prefix = world.settings().broker.amqp_prefix;
    let mut command = program(&[("AMQP_URL", &url), ("AMQP_PREFIX", &prefix)]);
    command.arg("request").args(arguments);
    finished(command).await
}

#[tokio::test]
async fn submit_get_and_cancel_print_the_result_and_exit_0() {
    let mut world = World::start().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    tokio::fs::write(file.path(), submit_body().to_string()).await.unwrap();
    let (code, out, err) = request(&world, &["submit", file.path().to_str().unwrap()]).await;
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(out.trim_end(), world.next_result().await.body, "what is printed is the result");
    let result: Value = serde_json::from_str(&out).unwrap();
    let id = result["data"]["id"].as_str().unwrap();
    for command in ["get", "cancel"] {
        let (code, out, _) = request(&world, &[command, "--batch-id", id]).await;
        assert_eq!(code, 0, "{out}");
        assert!(out.contains(id));
    }
    let command_id = world.next_result().await.command_id();
    let (code, out, _) = request(&world, &["get", "--command-id", &command_id]).await;
    assert_eq!(code, 1, "{out}");
    assert!(out.contains("No submit with the message_id"), "a get is no submit: {out}");
    let reference = tempfile::NamedTempFile::new().unwrap();
    tokio::fs::write(reference.path(), format!("{{\"batch_id\":\"{id}\"}}")).await.unwrap();
    let (code, out, _) = request(&world, &["get", reference.path().to_str().unwrap()]).await;
    assert_eq!(code, 0, "{out}");
    world.finish().await;
}

#[tokio::test]
async fn a_body_from_standard_input_and_an_id_of_ones_own() {
    let world = World::start().await;
    let url = amqp_url();
    let prefix = world.settings().broker.amqp_prefix;
    let mut printed = Vec::new();
    for _ in 0..2 {
        let mut command = program(&[("AMQP_URL", &url), ("AMQP_PREFIX", &prefix)]);
        command
            .args(["request", "submit", "--message-id", "mine"])
            .stdin(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(submit_body().to_string().as_bytes()).await.unwrap();
        drop(input);
        let output = child.wait_with_output().await.unwrap();
        assert_eq!(output.status.code(), Some(0));
        printed.push(output.stdout);
    }
    assert_eq!(printed[0], printed[1], "asked again, it is the same command");
    assert_eq!(world.sandbox.batches().len(), 1);
    world.finish().await;
}

#[tokio::test]
async fn a_failed_result_is_printed_and_exits_1() {
    let world = World::start().await;
    let (code, out, err) = request(&world, &["cancel", "--batch-id", "../../x"]).await;
    assert_eq!((code, err.as_str()), (1, ""));
    assert!(
        out.starts_with(r#"{"success":false,"error":"The command is not valid: batch_id: "#),
        "{out}"
    );
    world.finish().await;
}

#[tokio::test]
async fn what_could_not_be_asked_exits_2_and_says_why() {
    let world = World::without_worker().await;
    let (code, _, err) = request(&world, &["get", "/no/such/file"]).await;
    assert_eq!(code, 2);
    assert!(err.starts_with("call-manager: /no/such/file cannot be read"), "{err}");

    let mut command = program(&[("AMQP_URL", "amqp://127.0.0.1:1"), ("AMQP_PREFIX", "x")]);
    command.args(["request", "get", "--batch-id", "b"]);
    let (code, _, err) = finished(command).await;
    assert_eq!(code, 2);
    assert!(err.contains("the connection to the broker at 127.0.0.1:1 failed"), "{err}");

    let url = amqp_url();
    let mut command = program(&[("AMQP_URL", &url), ("AMQP_PREFIX", "test-nothing-of-this-name")]);
    command.args(["request", "get", "--batch-id", "b"]);
    let (code, _, err) = finished(command).await;
    assert_eq!(code, 2);
    assert!(err.contains("nothing takes batch-calling.get at this broker"), "{err}");
    assert_eq!(err.lines().count(), 1, "{err}");

    let (code, _, err) = request(&world, &["get"]).await;
    assert_eq!(
        (code, err.as_str()),
        (2, "call-manager: give a FILE, -, --batch-id or --command-id\n")
    );
    world.clean_up().await;
}

#[tokio::test]
async fn a_broker_that_is_lost_meanwhile_does_not_lose_the_id() {
    let mut world = World::start().await;
    let (proxy, url) = Proxy::to_broker().await;
    let prefix = world.settings().broker.amqp_prefix;
    world.sandbox.order(Fault::on(Route::Get, Effect::Latency(Duration::from_secs(2))));
    let mut command = program(&[("AMQP_URL", url.as_str()), ("AMQP_PREFIX", &prefix)]);
    command.args(["request", "get", "--batch-id", "btcal_1", "--message-id", "m-1"]);
    let asking = tokio::spawn(finished(command));
    until("the get is at the vendor", async || world.asked() == 1).await;
    proxy.cut();
    let (code, _, err) = asking.await.unwrap();
    assert_eq!(code, 2);
    assert!(err.contains("may still be executed: ask again with --message-id m-1"), "{err}");
    world.next_result().await;
    world.finish().await;
}

#[tokio::test]
async fn no_result_in_time_exits_2_and_tells_how_to_ask_again() {
    let mut world = World::start().await;
    world.sandbox.order(Fault::on(Route::Get, Effect::Latency(Duration::from_secs(2))));
    let asked = ["get", "--batch-id", "btcal_1", "--timeout", "500ms", "--message-id", "m-1"];
    let (code, _, err) = request(&world, &asked).await;
    assert_eq!(code, 2);
    assert!(err.contains("no result within") && err.contains("--message-id m-1"), "{err}");
    assert_eq!(world.next_result().await.command_id(), "m-1");
    world.finish().await;
}
