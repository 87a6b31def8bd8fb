//! What looks for lost batches, alone against the sandbox: who looks at the same time shares the
//! readings of the list.

use std::sync::Arc;
use std::time::Duration;

use call_manager::domain::command::{Command, CommandKind};
use call_manager::elevenlabs::{Answer, Finder, Lost, SubmitRequest};
use elevenlabs_sandbox::{Effect, Fault, Route};
use futures_util::future::join_all;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::support::vendor::Vendor;
use crate::support::{LIMIT, submit_body, until};

fn lost(command_id: &str) -> Lost {
    let body = submit_body();
    let text = |field: &str| body[field].as_str().unwrap().to_owned();
    Lost { command_id: command_id.into(), agent_id: text("agent_id"), name: text("call_name") }
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
async fn sixty_looks_at_once_share_three_readings_of_the_list_and_find_each_its_own() {
    let vendor = Vendor::start().await;
    let mut batches = Vec::new();
    for n in 0..250 {
        batches.push(submit(&vendor, &format!("m-{n}")).await.batch_id);
    }
    let finder = Finder::new(vendor.client.clone());
    // Some of the oldest and some of the newest, and some that are not there.
    let looked: Vec<usize> = (0..20).chain(230..270).collect();
    let looks = looked.iter().map(async |n| {
        let found = finder.look(&lost(&format!("m-{n}")), || Duration::from_secs(60)).await;
        found.unwrap().map(|answer| answer.batch_id)
    });
    let found = timeout(LIMIT, join_all(looks)).await.unwrap();
    for (n, found) in looked.into_iter().zip(found) {
        assert_eq!(found.as_ref(), batches.get(n), "m-{n}");
    }
    // The first two have nobody to share with yet.
    assert_eq!(vendor.requests(Route::List), 3 * 3, "100 to a page");
    assert!(vendor.requests(Route::Get) < 500, "{}", vendor.requests(Route::Get));
}

#[tokio::test]
async fn looks_whose_reading_is_given_up_are_taken_over_by_the_next() {
    let vendor = Vendor::start().await;
    let batch_id = submit(&vendor, "m").await.batch_id;
    let hangs = Effect::Hang { processed: false };
    vendor.sandbox.order(Fault::on(Route::List, hangs).until_cleared());
    let finder = Arc::new(Finder::new(vendor.client.clone()));
    let look = |command_id: &'static str| -> JoinHandle<_> {
        let finder = Arc::clone(&finder);
        tokio::spawn(async move { finder.look(&lost(command_id), || Duration::ZERO).await })
    };
    // They read, each for itself, and hang.
    let mut alone: Vec<_> = (0..2).map(|_| look("another")).collect();
    until("two read", async || vendor.requests(Route::List) == 2).await;
    let (leads, waits) = (look("another"), look("m"));
    // On this runtime of one thread both have begun to wait before the turn is free.
    tokio::task::yield_now().await;
    alone.pop().unwrap().abort();
    until("one reads for both", async || vendor.requests(Route::List) == 3).await;
    assert!(!waits.is_finished());
    vendor.sandbox.clear_faults();
    leads.abort();
    let found = timeout(LIMIT, waits).await.unwrap().unwrap().unwrap();
    assert_eq!(found.map(|answer| answer.batch_id), Some(batch_id));
    assert_eq!(vendor.requests(Route::List), 4);
    for look in alone {
        look.abort();
    }
}
