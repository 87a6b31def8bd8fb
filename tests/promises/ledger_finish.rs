//! What a ledger keeps to finish submits without their messages, wherever it keeps its rows.

use std::time::Duration;

use call_manager::ledger::{Body, Claim, Found, Go, Ledger, Settings};
use uuid::Uuid;

use crate::ledger::{
    BODY, KEY, Place, abandoned, assert_same, body, claim, created, end, failed, fresh, kept_by,
    settle, settled,
};
use crate::support::{LIMIT, until};

const NOW: Duration = Duration::ZERO;

async fn named(ledger: &Ledger) -> Vec<String> {
    let ids = ledger.unfinished(NOW, NOW).await.unwrap();
    let mut ids: Vec<String> = ids.iter().map(|id| (**id).to_owned()).collect();
    ids.sort();
    ids
}

kept_by!(sqlite postgres memory: unfinished_submits_are_named_until_their_result_is_published);
async fn unfinished_submits_are_named_until_their_result_is_published(place: &Place) {
    let ledger = place.open().await;
    drop(fresh(&ledger, "in-hand").await);
    fresh(&ledger, "released").await.release(false, 3).await.unwrap();
    settle(&fresh(&ledger, "settled").await, &created("b-1")).await.unwrap();
    settle(&fresh(&ledger, "published").await, &failed("no")).await.unwrap();
    ledger.published("published").await;
    ledger.find("struck", true).await.unwrap();
    let expected = ["in-hand", "released", "settled"];
    until("they are named", async || named(&ledger).await == expected).await;
    assert!(ledger.unfinished(LIMIT, LIMIT).await.unwrap().is_empty(), "they were just touched");
    ledger.published("settled").await;
    until("one is published", async || named(&ledger).await == expected[..2]).await;
}

kept_by!(sqlite postgres memory: what_is_condemned_ends_by_what_was_begun_of_it);
async fn what_is_condemned_ends_by_what_was_begun_of_it(place: &Place) {
    let ledger = place.open().await;
    drop(fresh(&ledger, "begun").await);
    fresh(&ledger, "released").await.release(false, 3).await.unwrap();
    settle(&fresh(&ledger, "settled").await, &created("b-1")).await.unwrap();
    let ending_of = |attempts: u32, begun: bool| failed(&format!("{attempts}, {begun}"));
    let condemn = async |id: &str, body, doubt| ledger.condemn(id, body, doubt, ending_of).await;
    for (id, doubt, ending) in [
        ("nobody", false, failed("0, false")),
        ("in-doubt", true, failed("0, true")),
        ("begun", false, failed("1, true")),
        ("released", false, failed("3, false")),
        ("settled", false, created("b-1")),
    ] {
        for _ in 0..2 {
            let Found::Settled(found) = condemn(id, BODY, doubt).await.unwrap() else {
                panic!("{id} has an ending")
            };
            assert_same(&found.ending, &ending);
            assert_same(&settled(&ledger, id).await, &ending);
        }
    }
    let other = condemn("begun", Uuid::from_u128(9), false).await.unwrap();
    assert!(matches!(other, Found::Conflict));
}

kept_by!(postgres: what_another_worker_has_in_hand_is_not_condemned);
async fn what_another_worker_has_in_hand_is_not_condemned(place: &Place) {
    let (ledger, other) = (place.open().await, place.open().await);
    let lease = fresh(&ledger, "c-1").await;
    let condemned = other.condemn("c-1", BODY, false, |_, _| failed("no")).await.unwrap();
    assert!(matches!(condemned, Found::InHand));
    assert_same(&settle(&lease, &created("b-1")).await.unwrap(), &created("b-1"));
}

async fn is_published(ledger: &Ledger, id: &str) -> bool {
    matches!(ledger.take_over(id).await, Ok(Some(Claim::Settled(ended))) if ended.published)
}

kept_by!(postgres: that_a_result_is_published_is_written_though_nothing_else_is);
async fn that_a_result_is_published_is_written_though_nothing_else_is(place: &Place) {
    let (ledger, other) = (place.open().await, place.open().await);
    settle(&fresh(&ledger, "c-1").await, &created("b-1")).await.unwrap();
    ledger.published("c-1").await;
    until("another worker sees it", async || is_published(&other, "c-1").await).await;
}

kept_by!(sqlite postgres: that_a_result_is_published_is_written_before_the_end);
async fn that_a_result_is_published_is_written_before_the_end(place: &Place) {
    let ledger = place.open().await;
    settle(&fresh(&ledger, "c-1").await, &created("b-1")).await.unwrap();
    ledger.published("c-1").await;
    let ledger = place.reopen(ledger).await;
    assert!(is_published(&ledger, "c-1").await);
}

kept_by!(sqlite postgres memory: what_is_taken_over_has_all_that_its_claim_kept);
async fn what_is_taken_over_has_all_that_its_claim_kept(place: &Place) {
    let ledger = place.open().await;
    let origin = r#"{"é":"\u0000 'x'"}"#;
    let kept = Body { origin: origin.into(), ..body(BODY) };
    let Claim::Fresh(lease) = ledger.claim("c-1", kept, false).await.unwrap() else {
        panic!("nobody has begun it");
    };
    lease.release(false, 3).await.unwrap();
    let Some(Claim::Fresh(mut lease)) = ledger.take_over("c-1").await.unwrap() else {
        panic!("it was let go of unsent");
    };
    assert_eq!((lease.origin().map(|kept| &**kept), lease.attempts()), (Some(origin), 3));
    assert_eq!(lease.before_request(4).await.unwrap(), Go::Ahead);
    drop(lease);
    let Some(Claim::Abandoned(lease, attempted)) = ledger.take_over("c-1").await.unwrap() else {
        panic!("a request may have left");
    };
    assert_eq!(attempted.keys, [KEY]);
    assert!(attempted.busy > Duration::ZERO && attempted.quiet == Duration::ZERO, "{attempted:?}");
    let ended = end(&lease, &created("b-1")).await.unwrap();
    assert!(!ended.published && ended.origin.as_deref() == Some(origin));
    drop(lease);
    ledger.published("c-1").await;
    until("it is published", async || is_published(&ledger, "c-1").await).await;
    assert!(ledger.take_over("nobody").await.unwrap().is_none());
}

kept_by!(sqlite postgres memory: the_end_of_a_request_is_told_by_who_saw_it);
async fn the_end_of_a_request_is_told_by_who_saw_it(place: &Place) {
    let ledger = place.open().await;
    let mut lease = fresh(&ledger, "c-1").await;
    assert_eq!(lease.before_request(1).await.unwrap(), Go::Ahead);
    let kept = lease.renew(1).await.unwrap().unwrap();
    assert!(kept.busy > LIMIT / 2, "{kept:?}");
    let ended = lease.renew_after_request(1).await.unwrap().unwrap();
    assert_eq!(ended.busy, Duration::ZERO, "{ended:?}");
    drop(lease);
    let (_, attempted) = abandoned(&ledger, "c-1").await;
    assert_eq!(attempted.busy, Duration::ZERO, "{attempted:?}");
}

kept_by!(sqlite postgres memory: it_is_known_whose_a_batch_is_and_which_key_sees_it);
async fn it_is_known_whose_a_batch_is_and_which_key_sees_it(place: &Place) {
    let ledger = place.open().await;
    settle(&fresh(&ledger, "c-1").await, &created("b-1")).await.unwrap();
    settle(&fresh(&ledger, "c-2").await, &created("b-'2'")).await.unwrap();
    settle(&fresh(&ledger, "c-3").await, &failed("no")).await.unwrap();
    let asked = ["b-1", "b-'2'", "b-3"].map(str::to_owned).to_vec();
    let owners = ledger.owners(asked).await.unwrap();
    assert_eq!(owners.len(), 2);
    assert_eq!((&*owners["b-1"], &*owners["b-'2'"]), ("c-1", "c-2"));
    assert!(ledger.owners(Vec::new()).await.unwrap().is_empty());
    let batch = ledger.batch_of_key(KEY).await.unwrap().unwrap();
    assert!(["b-1", "b-'2'"].contains(&&*batch), "{batch}");
    assert_eq!(ledger.batch_of_key(Uuid::from_u128(9)).await.unwrap(), None);
}

kept_by!(sqlite postgres memory: a_batch_that_a_cancel_came_for_is_named_until_it_is_cancelled);
async fn a_batch_that_a_cancel_came_for_is_named_until_it_is_cancelled(place: &Place) {
    let ledger = place.open().await;
    let lease = fresh(&ledger, "c-1").await;
    assert!(matches!(ledger.find("c-1", true).await.unwrap(), Found::InHand));
    let ended = end(&lease, &created("b-1")).await.unwrap();
    assert_eq!(ended.cancel, Some(("b-1".to_owned(), KEY)));
    drop(lease);
    ledger.published("c-1").await;
    until("only the cancel is left", async || {
        let named = ledger.unfinished(LIMIT, NOW).await.unwrap();
        named.len() == 1 && ledger.unfinished(NOW, LIMIT).await.unwrap().is_empty()
    })
    .await;
    ledger.cancelled("c-1").await.unwrap();
    assert!(named(&ledger).await.is_empty());
}

kept_by!(sqlite postgres: what_is_needed_to_finish_survives_the_worker);
async fn what_is_needed_to_finish_survives_the_worker(place: &Place) {
    let ledger = place.open().await;
    assert!(!ledger.was_drained());
    let mut lease = fresh(&ledger, "c-1").await;
    assert_eq!(lease.before_request(1).await.unwrap(), Go::Ahead);
    lease.release(true, 1).await.unwrap();
    fresh(&ledger, "c-2").await.release(false, 2).await.unwrap();
    settle(&fresh(&ledger, "c-3").await, &created("b-1")).await.unwrap();
    ledger.note_drained().await.unwrap();
    assert!(ledger.was_drained());

    let ledger = place.reopen(ledger).await;
    assert!(ledger.was_drained());
    assert_eq!(named(&ledger).await, ["c-1", "c-2", "c-3"]);
    let (_, attempted) = abandoned(&ledger, "c-1").await;
    assert_eq!(attempted.keys, [KEY]);
    assert_eq!(fresh(&ledger, "c-2").await.attempts(), 2);
    assert_same(&settled(&ledger, "c-3").await, &created("b-1"));
    assert_eq!(ledger.owners(vec!["b-1".to_owned()]).await.unwrap()["b-1"], "c-3");
}

kept_by!(sqlite postgres: a_ledger_is_of_one_elevenlabs);
async fn a_ledger_is_of_one_elevenlabs(place: &Place) {
    place.open().await.close(LIMIT).await;
    let other = Settings { base_url: "http://another".to_owned(), ..place.settings() };
    let Err(refused) = Ledger::open(other).await else { panic!("it knows nothing of that one") };
    let said = refused.to_string();
    assert!(said.contains("about the submits to http://elevenlabs,"), "{said}");
    assert!(!refused.is_away(), "nothing mends it by itself");
    place.open().await.close(LIMIT).await;
}

kept_by!(sqlite postgres memory: what_is_condemned_is_compared_with_the_row);
async fn what_is_condemned_is_compared_with_the_row(place: &Place) {
    let ledger = place.open().await;
    let ending_of = |attempts, begun| failed(&format!("{attempts} {begun}"));
    let condemned = async |id: &str, body: Uuid, doubt: bool| match ledger
        .condemn(id, body, doubt, ending_of)
        .await
        .unwrap()
    {
        Found::Settled(ended) => serde_json::to_string(&ended.ending).unwrap(),
        Found::Conflict => "a conflict".to_owned(),
        other => panic!("{other:?}"),
    };
    fresh(&ledger, "c-1").await.release(true, 1).await.unwrap();
    assert_eq!(condemned("c-1", Uuid::from_u128(2), false).await, "a conflict");
    assert!(condemned("c-1", BODY, false).await.contains("1 true"));
    assert!(condemned("c-2", BODY, true).await.contains("0 true"));
    assert!(condemned("c-3", BODY, false).await.contains("0 false"));
    assert!(matches!(claim(&ledger, "c-3").await, Claim::Settled(_)), "for good");
}
