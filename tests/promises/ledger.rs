//! What a ledger promises, wherever it keeps its rows: each promise is one test per store.

use std::time::{Duration, Instant};

use call_manager::domain::result::{Ending, ErrorCode, Outcome};
use call_manager::ledger::{
    Attempted, Body, Claim, Ended, Found, Go, Held, Lease, Ledger, Location, Settings,
};
use futures_util::FutureExt as _;
use serde_json::json;
use serde_json::value::RawValue;
use tempfile::TempDir;
use uuid::Uuid;

use super::support::postgres::Database;
use super::support::{LIMIT, World, until};

pub const BODY: Uuid = Uuid::from_u128(1);
const OTHER_BODY: Uuid = Uuid::from_u128(2);
pub const KEY: Uuid = Uuid::from_u128(0xc);
/// Of a ledger that was opened with [`Place::open_brief`].
const LEASE: Duration = Duration::from_secs(1);
pub const MONTH: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Where the ledgers of a test keep their rows.
pub enum Place {
    Sqlite(TempDir),
    Postgres(Database),
    Memory,
}

impl Place {
    pub async fn of(store: &str) -> Self {
        match store {
            "sqlite" => Self::Sqlite(tempfile::tempdir().unwrap()),
            "postgres" => Self::Postgres(Database::create().await),
            "memory" => Self::Memory,
            other => panic!("{other} is no store"),
        }
    }

    pub fn settings(&self) -> Settings {
        let location = match self {
            Self::Sqlite(folder) => Location::Sqlite(folder.path().join("ledger.db")),
            Self::Postgres(database) => Location::Postgres(database.url().into()),
            Self::Memory => Location::Memory,
        };
        Settings {
            location,
            base_url: "http://elevenlabs".to_owned(),
            key: KEY,
            retention: MONTH,
            longest_request: LIMIT,
        }
    }

    /// The `LEDGER_URL` for the workers of `world`, which has its own file.
    pub fn url(&self, world: &World) -> String {
        match self {
            Self::Sqlite(_) => world.ledger_url(),
            Self::Postgres(database) => database.url(),
            Self::Memory => "memory:".to_owned(),
        }
    }

    pub async fn open(&self) -> Ledger {
        Ledger::open(self.settings()).await.unwrap()
    }

    /// With leases that run out while a test waits for it.
    async fn open_brief(&self) -> Ledger {
        let settings = Settings { longest_request: LEASE / 2, ..self.settings() };
        Ledger::open(settings).await.unwrap()
    }

    pub async fn reopen(&self, ledger: Ledger) -> Ledger {
        ledger.close(LIMIT).await;
        self.open().await
    }

    pub async fn clean_up(self) {
        if let Self::Postgres(database) = self {
            database.drop().await;
        }
    }
}

/// Makes a test of a promise for each of the stores that keep it.
macro_rules! kept_by {
    ($($store:ident)+: $promise:ident) => {
        mod $promise {
            $(
                #[tokio::test]
                async fn $store() {
                    let place = super::Place::of(stringify!($store)).await;
                    super::$promise(&place).await;
                    place.clean_up().await;
                }
            )+
        }
    };
}
pub(crate) use kept_by;

pub fn created(batch_id: &str) -> Ending {
    let data = serde_json::value::to_raw_value(&json!({"id": batch_id})).unwrap();
    let outcome = Outcome::Succeeded { data, batch_id: batch_id.to_owned(), warning: None };
    Ending { attempts: 1, outcome }
}

pub fn failed(error: &str) -> Ending {
    let outcome = Outcome::Failed { code: ErrorCode::UpstreamUnavailable, error: error.to_owned() };
    Ending { attempts: 3, outcome }
}

/// As the ledger keeps it.
#[track_caller]
pub fn assert_same(ending: &Ending, expected: &Ending) {
    let [ending, expected] = [ending, expected].map(|end| serde_json::to_string(end).unwrap());
    assert_eq!(ending, expected);
}

pub fn name(claim: &Claim) -> &'static str {
    match claim {
        Claim::Fresh(_) => "fresh",
        Claim::Abandoned(..) => "abandoned",
        Claim::Held(Held::Here { .. }) => "held here",
        Claim::Held(Held::Elsewhere { .. }) => "held elsewhere",
        Claim::Settled(_) => "settled",
        Claim::Conflict => "a conflict",
    }
}

/// A body as a claim tells of it.
pub fn body(fingerprint: Uuid) -> Body {
    Body { fingerprint, hash: fingerprint, origin: "{}".into() }
}

pub async fn claim(ledger: &Ledger, id: &str) -> Claim {
    ledger.claim(id, body(BODY), false).await.unwrap()
}

pub async fn fresh(ledger: &Ledger, id: &str) -> Lease {
    match claim(ledger, id).await {
        Claim::Fresh(lease) => lease,
        other => panic!("{id:?} is fresh, not {}", name(&other)),
    }
}

pub async fn abandoned(ledger: &Ledger, id: &str) -> (Lease, Attempted) {
    match claim(ledger, id).await {
        Claim::Abandoned(lease, abandoned) => (lease, abandoned),
        other => panic!("{id:?} is abandoned, not {}", name(&other)),
    }
}

pub async fn settled(ledger: &Ledger, id: &str) -> Ending {
    match claim(ledger, id).await {
        Claim::Settled(ended) => ended.ending,
        other => panic!("{id:?} is settled, not {}", name(&other)),
    }
}

/// By a claim of the other body.
pub async fn is_conflict(ledger: &Ledger, id: &str) -> bool {
    matches!(ledger.claim(id, body(OTHER_BODY), false).await.unwrap(), Claim::Conflict)
}

pub async fn find(ledger: &Ledger, id: &str) -> Found {
    ledger.find(id, false).await.unwrap()
}

pub async fn is_held(ledger: &Ledger, id: &str) -> bool {
    matches!(claim(ledger, id).await, Claim::Held(_))
}

pub async fn settle(lease: &Lease, ending: &Ending) -> Option<Ending> {
    end(lease, ending).await.map(|ended| ended.ending)
}

pub async fn end(lease: &Lease, ending: &Ending) -> Option<Ended> {
    lease.settle(ending, None).await.unwrap()
}

kept_by!(sqlite postgres memory: what_was_settled_is_told_for_ever_byte_by_byte);
async fn what_was_settled_is_told_for_ever_byte_by_byte(place: &Place) {
    let ledger = place.open().await;
    let data = r#"{ "id":"b-1",  "n": [1.50, -0.0, 1e400], "é\u00e9\u0000": "'\"\\", "id": null}"#;
    let data = RawValue::from_string(data.to_owned()).unwrap();
    let warning = Some("it's “another” provider\n".to_owned());
    let outcome = Outcome::Succeeded { data, batch_id: "b-1".to_owned(), warning };
    for (id, ending) in [("c-1", Ending { attempts: 7, outcome }), ("c-2", failed("\0 'no' ☎"))] {
        let lease = fresh(&ledger, id).await;
        assert_same(&settle(&lease, &ending).await.unwrap(), &ending);
        // The first word counts, also from the same claim.
        assert_same(&settle(&lease, &created("b-2")).await.unwrap(), &ending);
        drop(lease);
        for _ in 0..2 {
            assert_same(&settled(&ledger, id).await, &ending);
            let Found::Settled(found) = ledger.find(id, true).await.unwrap() else {
                panic!("{id} is settled");
            };
            assert_same(&found.ending, &ending);
        }
    }
}

kept_by!(sqlite postgres memory: a_second_claim_waits_until_the_first_lets_go);
async fn a_second_claim_waits_until_the_first_lets_go(place: &Place) {
    let ledger = place.open().await;
    for way in ["released", "dropped", "settled"] {
        let lease = fresh(&ledger, way).await;
        let Claim::Held(held) = claim(&ledger.clone(), way).await else {
            panic!("a task of this process has it");
        };
        let mut freed = Box::pin(held.freed(Duration::ZERO));
        assert!((&mut freed).now_or_never().is_none(), "it is in hand");
        match way {
            "released" => lease.release(false, 0).await.unwrap(),
            "dropped" => drop(lease),
            _ => {
                settle(&lease, &created("b-1")).await.unwrap();
                drop(lease);
            }
        }
        tokio::time::timeout(LIMIT, freed).await.expect("it was let go of");
        assert!(!is_held(&ledger, way).await);
    }
}

kept_by!(sqlite postgres memory: another_body_is_a_conflict_in_every_state);
async fn another_body_is_a_conflict_in_every_state(place: &Place) {
    let ledger = place.open().await;
    let lease = fresh(&ledger, "c-1").await;
    // Which of the two bodies is the right one, the row tells; until then the second one waits.
    let waits = ledger.claim("c-1", body(OTHER_BODY), false).await.unwrap();
    assert!(matches!(waits, Claim::Held(_)), "in hand");
    drop(lease);
    assert!(is_conflict(&ledger, "c-1").await, "abandoned");
    let (lease, _) = abandoned(&ledger, "c-1").await;
    lease.release(true, 0).await.unwrap();
    assert!(is_conflict(&ledger, "c-1").await, "let go of in doubt");
    settle(&abandoned(&ledger, "c-1").await.0, &failed("no")).await.unwrap();
    assert!(is_conflict(&ledger, "c-1").await, "settled");
    settled(&ledger, "c-1").await;

    fresh(&ledger, "c-2").await.release(false, 0).await.unwrap();
    assert!(is_conflict(&ledger, "c-2").await, "let go of unsent");
}

kept_by!(sqlite postgres memory: let_go_of_unsent_it_is_fresh_again);
async fn let_go_of_unsent_it_is_fresh_again(place: &Place) {
    let ledger = place.open().await;
    for _ in 0..3 {
        let mut lease = fresh(&ledger, "c-1").await;
        assert!(lease.renew(2).await.unwrap().is_some());
        lease.release(false, 0).await.unwrap();
        assert!(matches!(find(&ledger, "c-1").await, Found::Nobody));
    }
}

kept_by!(sqlite postgres memory: dropped_or_let_go_of_in_doubt_it_is_abandoned);
async fn dropped_or_let_go_of_in_doubt_it_is_abandoned(place: &Place) {
    let ledger = place.open().await;
    let mut lease = fresh(&ledger, "c-1").await;
    let began = Instant::now();
    assert_eq!(lease.before_request(1).await.unwrap(), Go::Ahead);
    assert_eq!(lease.before_request(2).await.unwrap(), Go::Ahead);
    drop(lease);
    for attempts in 2..5 {
        let lasts = began.elapsed() + Duration::from_millis(20);
        until("some time has passed", async || began.elapsed() > lasts).await;
        let (mut lease, left) = abandoned(&ledger, "c-1").await;
        assert_eq!(lease.attempts(), attempts);
        // Both ends of the age are whole milliseconds.
        assert!(left.age.now() + Duration::from_millis(2) >= lasts, "{left:?} since {lasts:?}");
        assert!(left.age.now() < LIMIT, "{left:?}");
        // Also the first request of who took it over is told to the ledger.
        assert_eq!(lease.before_request(attempts + 1).await.unwrap(), Go::Ahead);
        lease.release(true, 0).await.unwrap();
    }
}

kept_by!(sqlite postgres memory: a_search_says_how_far_a_submit_is);
async fn a_search_says_how_far_a_submit_is(place: &Place) {
    let ledger = place.open().await;
    for strike in [false, true] {
        let id = &format!("c-{strike}");
        for _ in 0..2 {
            assert!(matches!(ledger.find(id, strike).await.unwrap(), Found::Nobody));
        }
        let lease = fresh(&ledger, id).await;
        assert!(matches!(ledger.find(id, strike).await.unwrap(), Found::InHand));
        drop(lease);
        assert!(matches!(ledger.find(id, strike).await.unwrap(), Found::InHand));
        let (lease, _) = abandoned(&ledger, id).await;
        settle(&lease, &created("b-1")).await.unwrap();
        assert!(matches!(ledger.find(id, strike).await.unwrap(), Found::Settled(_)));
        assert!(matches!(find(&ledger, "another").await, Found::Nobody));
    }
}

kept_by!(sqlite postgres memory: a_struck_submit_is_not_sent_again);
async fn a_struck_submit_is_not_sent_again(place: &Place) {
    let ledger = place.open().await;
    // Struck before anybody has begun it, for whoever begins it.
    ledger.find("c-1", true).await.unwrap();
    for _ in 0..2 {
        let mut lease = fresh(&ledger, "c-1").await;
        assert_eq!(lease.before_request(1).await.unwrap(), Go::Struck);
        assert_eq!(lease.before_request(1).await.unwrap(), Go::Struck);
        lease.release(false, 0).await.unwrap();
    }
    // Struck between two requests.
    let mut lease = fresh(&ledger, "c-2").await;
    assert_eq!(lease.before_request(1).await.unwrap(), Go::Ahead);
    ledger.find("c-2", true).await.unwrap();
    assert_eq!(lease.before_request(2).await.unwrap(), Go::Struck);
    drop(lease);
    // And for whoever takes it over.
    let (mut lease, _) = abandoned(&ledger, "c-2").await;
    assert_eq!(lease.before_request(3).await.unwrap(), Go::Struck);
    // A look alone strikes nothing.
    find(&ledger, "c-3").await;
    assert_eq!(fresh(&ledger, "c-3").await.before_request(1).await.unwrap(), Go::Ahead);
}

kept_by!(sqlite postgres: everything_known_survives_the_worker);
async fn everything_known_survives_the_worker(place: &Place) {
    let ledger = place.open().await;
    let [first, second] = [created("b-1"), failed("no")];
    settle(&fresh(&ledger, "c-1").await, &first).await.unwrap();
    settle(&fresh(&ledger, "c-2").await, &second).await.unwrap();
    ledger.find("c-3", true).await.unwrap();
    fresh(&ledger, "c-4").await.release(false, 0).await.unwrap();
    fresh(&ledger, "c-5").await.release(true, 0).await.unwrap();

    let ledger = place.reopen(ledger).await;
    assert_same(&settled(&ledger, "c-1").await, &first);
    assert_same(&settled(&ledger, "c-2").await, &second);
    assert!(is_conflict(&ledger, "c-1").await);
    assert_eq!(fresh(&ledger, "c-3").await.before_request(1).await.unwrap(), Go::Struck);
    fresh(&ledger, "c-4").await;
    abandoned(&ledger, "c-5").await;
}

kept_by!(sqlite: what_a_worker_had_in_hand_is_its_own_after_a_restart);
async fn what_a_worker_had_in_hand_is_its_own_after_a_restart(place: &Place) {
    let ledger = place.open().await;
    assert!(fresh(&ledger, "c-1").await.renew(4).await.unwrap().is_some());
    let ledger = place.reopen(ledger).await;
    assert_eq!(abandoned(&ledger, "c-1").await.0.attempts(), 4);
}

kept_by!(postgres: another_worker_takes_over_what_a_dead_one_had_in_hand);
async fn another_worker_takes_over_what_a_dead_one_had_in_hand(place: &Place) {
    let [dead, alive] = [place.open_brief().await, place.open_brief().await];
    assert!(fresh(&dead, "c-1").await.renew(4).await.unwrap().is_some());
    let began = Instant::now();
    let Claim::Held(Held::Elsewhere { remaining }) = claim(&alive, "c-1").await else {
        panic!("nobody can know that the other worker is dead");
    };
    dead.close(LIMIT).await;
    assert!(remaining <= LEASE, "{remaining:?}");
    until("the lease has run out", async || {
        // A claim that has to wait keeps nobody waiting.
        assert!(matches!(find(&alive, "c-1").await, Found::InHand));
        began.elapsed() > LEASE
    })
    .await;
    let (lease, left) = abandoned(&alive, "c-1").await;
    assert_eq!(lease.attempts(), 4);
    assert!(left.age.now() + Duration::from_millis(2) >= LEASE, "{left:?}");
}

kept_by!(postgres: who_waits_for_another_worker_looks_again_in_time);
async fn who_waits_for_another_worker_looks_again_in_time(place: &Place) {
    let [one, other] = [place.open().await, place.open_brief().await];
    let began = Instant::now();
    let _lease = fresh(&one, "c-1").await;
    let _brief = fresh(&other, "c-2").await;
    for (ledger, id, look_again) in
        [(&other, "c-1", Duration::from_millis(10)), (&one, "c-2", MONTH)]
    {
        let Claim::Held(held) = claim(ledger, id).await else { panic!("{id} is held") };
        tokio::time::timeout(LIMIT, held.freed(look_again)).await.expect("it is worth a look");
    }
    assert!(began.elapsed() >= LEASE, "the second wait was for the lease");
    abandoned(&one, "c-2").await;
}

kept_by!(postgres: who_goes_on_renewing_keeps_it);
async fn who_goes_on_renewing_keeps_it(place: &Place) {
    let [slow, other] = [place.open_brief().await, place.open_brief().await];
    let mut lease = fresh(&slow, "c-1").await;
    let began = Instant::now();
    while began.elapsed() < 2 * LEASE {
        let asked = Instant::now();
        assert!(lease.renew(1).await.unwrap().is_some());
        let held = is_held(&other, "c-1").await;
        assert!(held || asked.elapsed() >= LEASE, "{:?}", began.elapsed());
        tokio::time::sleep(LEASE / 20).await;
    }
}

kept_by!(postgres: who_was_taken_over_sends_nothing_more_but_its_success_counts);
async fn who_was_taken_over_sends_nothing_more_but_its_success_counts(place: &Place) {
    let [slow, fast] = [place.open_brief().await, place.open().await];
    let mut lost = fresh(&slow, "c-1").await;
    let began = Instant::now();
    until("the lease has run out", async || began.elapsed() > LEASE).await;
    let (won, _) = abandoned(&fast, "c-1").await;
    assert_eq!(lost.before_request(1).await.unwrap(), Go::Gone);
    assert!(lost.renew(1).await.unwrap().is_none());
    assert!(settle(&lost, &failed("by the slow one")).await.is_none());
    assert!(matches!(find(&fast, "c-1").await, Found::InHand), "nothing was recorded");
    let ending = created("by the slow one");
    assert_same(&settle(&lost, &ending).await.unwrap(), &ending);
    assert_same(&settle(&won, &failed("by the fast one")).await.unwrap(), &ending);
    assert_same(&settle(&won, &created("by the fast one")).await.unwrap(), &ending);
}
