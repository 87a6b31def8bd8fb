//! What looks for lost batches, alone against the sandbox: who looks at the same time shares the
//! readings of the list.

use std::sync::Arc;
use std::time::Duration;

use call_manager::domain::command::{Command, CommandKind};
use call_manager::elevenlabs::{Answer, Finder, Numbers, SearchKey, Seen, SubmitRequest};
use elevenlabs_sandbox::{Effect, Fault, Reply, Route};
use futures_util::future::join_all;
use serde_json::json;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::support::vendor::Vendor;
use crate::support::{LIMIT, submit_body, until};

fn lost(command_id: &str) -> SearchKey {
    let body = submit_body();
    let text = |field: &str| body[field].as_str().unwrap().to_owned();
    let recipients = body["recipients"].as_array().unwrap().iter();
    let numbers = recipients.map(|recipient| recipient["phone_number"].as_str().unwrap());
    SearchKey {
        command_id: command_id.to_owned(),
        agent_id: text("agent_id"),
        name: text("call_name"),
        numbers: Numbers::of(command_id, numbers),
    }
}

/// The batch, or `None` where it is surely not there.
fn batch(seen: Seen) -> Option<String> {
    match seen {
        Seen::Batch(answer) => Some(answer.batch_id),
        Seen::Absent => None,
        Seen::Undecided(candidates) => panic!("{candidates:?}"),
    }
}

async fn submit(vendor: &Vendor, command_id: &str) -> Answer {
    let body = submit_body().to_string();
    let Ok(Command::Submit(submit)) = Command::parse(CommandKind::Submit, body.as_bytes()) else {
        panic!("the body is a valid submit");
    };
    let request = SubmitRequest::encode(&submit, command_id).unwrap();
    vendor.client.submit(&request).await.unwrap()
}

#[tokio::test]
async fn sixty_looks_at_once_share_one_reading_of_the_list_and_find_each_its_own() {
    let vendor = Vendor::start().await;
    let mut batches = Vec::new();
    for n in 0..250 {
        batches.push(submit(&vendor, &format!("m-{n}")).await.batch_id);
    }
    let finder = Arc::new(Finder::new(vendor.client.clone()));
    // Some of the oldest and some of the newest, and some that are not there.
    let looked: Vec<usize> = (0..20).chain(230..270).collect();
    let looks = looked.iter().map(async |n| {
        let found = finder.look(&lost(&format!("m-{n}")), || Duration::from_secs(60)).await;
        batch(found.unwrap())
    });
    let found = timeout(LIMIT, join_all(looks)).await.unwrap();
    for (n, found) in looked.into_iter().zip(found) {
        assert_eq!(found.as_ref(), batches.get(n), "m-{n}");
    }
    assert_eq!(vendor.requests(Route::List), 3, "100 to a page");
    assert!(vendor.requests(Route::Get) <= 300, "{}", vendor.requests(Route::Get));
}

#[tokio::test]
async fn a_list_in_another_order_is_read_to_its_end() {
    let vendor = Vendor::start().await;
    let oldest = submit(&vendor, "m-0").await.batch_id;
    for n in 1..=100 {
        submit(&vendor, &format!("m-{n}")).await;
    }
    vendor.sandbox.distort(|route, page| {
        let is_first = route == Route::List && page["has_more"] == json!(true);
        let batches = page["batch_calls"].as_array_mut().filter(|_| is_first);
        for (n, batch) in batches.into_iter().flatten().enumerate() {
            batch["created_at_unix"] = json!(1_600_000_000 + 100_000 * n);
        }
    });
    let finder = Arc::new(Finder::new(vendor.client.clone()));
    let found = finder.look(&lost("m-0"), || Duration::from_secs(60)).await;
    assert_eq!(batch(found.unwrap()), Some(oldest));
}

#[tokio::test]
async fn a_batch_whose_name_was_changed_is_found_though_the_list_goes_on_to_old_ones() {
    let vendor = Vendor::start().await;
    for n in 0..100 {
        submit(&vendor, &format!("m-{n}")).await;
    }
    let newest = submit(&vendor, "m-100").await.batch_id;
    vendor.sandbox.distort(|route, page| {
        let is_first = page["has_more"] == json!(true);
        let batches = page["batch_calls"].as_array_mut().filter(|_| route == Route::List);
        for batch in batches.into_iter().flatten() {
            if is_first {
                batch["name"] = json!("Another");
            } else {
                batch["created_at_unix"] = json!(1_600_000_000);
            }
        }
    });
    let finder = Arc::new(Finder::new(vendor.client.clone()));
    let found = finder.look(&lost("m-100"), || Duration::from_secs(60)).await;
    assert_eq!(batch(found.unwrap()), Some(newest));
}

#[tokio::test]
async fn more_batches_that_may_be_the_one_than_are_named_prove_nothing() {
    let vendor = Vendor::start().await;
    for n in 0..=100 {
        submit(&vendor, &format!("m-{n}")).await;
    }
    vendor.sandbox.distort(|route, batch| {
        if route == Route::Get {
            batch["recipients"] = json!([]);
        }
    });
    let finder = Arc::new(Finder::new(vendor.client.clone()));
    let looked = finder.look(&lost("nobody"), || Duration::from_secs(60)).await;
    assert!(looked.unwrap_err().to_string().contains("more than 100 batches"));
}

#[tokio::test]
async fn who_stops_looking_does_not_stop_those_who_share_the_reading() {
    let vendor = Vendor::start().await;
    let batch_id = submit(&vendor, "m").await.batch_id;
    let hangs = Effect::Hang { processed: false };
    vendor.sandbox.order(Fault::on(Route::List, hangs).until_cleared());
    let finder = Arc::new(Finder::new(vendor.client.clone()));
    let look = |command_id: &'static str| -> JoinHandle<_> {
        let finder = Arc::clone(&finder);
        tokio::spawn(async move { finder.look(&lost(command_id), || Duration::ZERO).await })
    };
    // They read, each for itself, and hang for as long as the client waits.
    let mut alone = Vec::new();
    for nth in 1..=4 {
        alone.push(look("another"));
        until("another reading", async || vendor.requests(Route::List) == nth).await;
    }
    vendor.sandbox.clear_faults();
    let slow = Effect::Latency(Duration::from_millis(500));
    vendor.sandbox.order(Fault::on(Route::List, slow));
    let (leaves, stays) = (look("another"), look("m"));
    for look in alone {
        assert!(look.await.unwrap().is_err());
    }
    until("one reads for both", async || vendor.requests(Route::List) == 5).await;
    leaves.abort();
    let found = timeout(LIMIT, stays).await.unwrap().unwrap().unwrap();
    assert_eq!(batch(found), Some(batch_id));
    assert_eq!(vendor.requests(Route::List), 5);
}

#[tokio::test]
async fn one_name_that_cannot_be_ruled_out_says_nothing_of_another() {
    let vendor = Vendor::start().await;
    let batch_id = submit(&vendor, "m").await.batch_id;
    let unreadable = Effect::Status(Reply::new(500));
    vendor.sandbox.order(Fault::on(Route::Get, unreadable));
    let finder = Arc::new(Finder::new(vendor.client.clone()));
    let (look, other) = (lost("nobody"), SearchKey { name: "Another".into(), ..lost("nobody") });
    let age = || Duration::from_secs(60);
    let (look, other) = tokio::join!(finder.look(&look, age), finder.look(&other, age));
    assert!(look.is_err(), "{batch_id} was not read");
    assert_eq!(batch(other.unwrap()), None);
}
