//! Opening a ledger, and what it holds up to: many submits, strange ids, years, and several workers.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use call_manager::ledger::{Claim, Found, Go, Ledger, Location, OpenError, Settings};
use futures_util::future::join_all;
use rusqlite::Connection;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::ledger::{
    Place, abandoned, assert_same, claim, created, failed, find, fresh, is_conflict, is_held,
    kept_by, name, settle, settled,
};
use super::support::postgres::Database;
use super::support::proxy::Proxy;
use super::support::{LIMIT, until};

kept_by!(sqlite postgres memory: a_thousand_submits_at_once_are_all_recorded);
async fn a_thousand_submits_at_once_are_all_recorded(place: &Place) {
    let mut ledger = place.open().await;
    let ids: Vec<_> = (0..1_000).map(|number| format!("c-{number}")).collect();
    let one = async |id: &String| {
        let mut lease = fresh(&ledger, id).await;
        assert!(lease.renew(1).await.unwrap().is_some());
        let ending = created(&format!("batch of {id}"));
        assert_same(&settle(&lease, &ending).await.unwrap(), &ending);
    };
    join_all(ids.iter().map(one)).await;
    if !matches!(place, Place::Memory) {
        ledger = place.reopen(ledger).await;
    }
    let found = join_all(ids.iter().map(|id| settled(&ledger, id))).await;
    for (id, ending) in ids.iter().zip(found) {
        assert_same(&ending, &created(&format!("batch of {id}")));
    }
}

kept_by!(sqlite postgres memory: no_id_is_too_strange);
async fn no_id_is_too_strange(place: &Place) {
    let ledger = place.open().await;
    let longest = "x".repeat(255);
    let umlauts = "ü".repeat(127);
    let ids = [
        "",
        " ",
        "  ",
        "c",
        "C",
        "c ",
        "NULL",
        "null",
        "'",
        "''",
        "\"",
        "`",
        "\\",
        "\\\\",
        "\\'",
        "{a,b}",
        "{\"a\"}",
        "a,b",
        "$1",
        "?1",
        "%",
        "_",
        "--",
        "'; DROP TABLE call_manager_submits; --",
        "\n",
        "\t",
        "\r\n",
        "\u{7f}",
        "\u{1}",
        "é",
        "e\u{301}",
        "ß",
        "ss",
        "İ",
        "i",
        "\u{feff}",
        "\u{200f}",
        "👩‍👩‍👧",
        "\u{10ffff}",
        "中文",
        "0",
        "00",
        "1e3",
        "1000",
        &longest,
        &longest[1..],
        &umlauts,
    ];
    let leases = join_all(ids.map(|id| fresh(&ledger, id))).await;
    let endings = ids.map(|id| created(&format!("batch of {id}")));
    join_all(leases.iter().zip(&endings).map(|(lease, ending)| settle(lease, ending))).await;
    drop(leases);
    for (id, ending) in ids.iter().zip(&endings) {
        assert_same(&settled(&ledger, id).await, ending);
        let Found::Settled(found) = find(&ledger, id).await else { panic!("{id:?} is settled") };
        assert_same(&found.ending, ending);
    }
}

kept_by!(sqlite postgres memory: what_one_submit_is_told_at_once_comes_in_order);
async fn what_one_submit_is_told_at_once_comes_in_order(place: &Place) {
    let ledger = place.open().await;
    for round in 0..20 {
        let id = &format!("c-{round}");
        let looks = (0..5).map(|_| ledger.find(id, true));
        let (lease, found, looks) =
            tokio::join!(fresh(&ledger, id), ledger.find(id, false), join_all(looks));
        assert!(matches!(found.unwrap(), Found::InHand));
        assert!(looks.into_iter().all(|found| matches!(found, Ok(Found::InHand))));
        let ending = created("b-1");
        let (ended, found) = tokio::join!(settle(&lease, &ending), ledger.find(id, true));
        assert_same(&ended.unwrap(), &ending);
        assert!(matches!(found.unwrap(), Found::Settled(_)));
    }
}

kept_by!(postgres: of_all_who_claim_one_submit_one_has_it);
async fn of_all_who_claim_one_submit_one_has_it(place: &Place) {
    let ledgers = [place.open().await, place.open().await];
    for round in 0..20 {
        let id = &format!("c-{round}");
        let claims = (0..40).map(|number| claim(&ledgers[number % 2], id));
        let claims = join_all(claims).await;
        let names = claims.iter().map(name);
        let fresh = names.clone().filter(|name| *name == "fresh").count();
        let held = names.clone().filter(|name| name.starts_with("held")).count();
        assert_eq!((fresh, held), (1, 39), "{:?}", names.collect::<Vec<_>>());
    }
}

kept_by!(postgres: workers_at_the_same_submits_neither_fail_nor_join_each_other);
async fn workers_at_the_same_submits_neither_fail_nor_join_each_other(place: &Place) {
    let ledgers = join_all((0..3).map(|_| place.open())).await;
    let submits: Vec<_> =
        (0..20).map(|number| (format!("c-{number}"), AtomicBool::new(false))).collect();
    // Different orders, so that a lock of one would meet a lock of the other.
    let pairs = (0..60).map(|number| (&ledgers[number % 3], &submits[number * 7 % 20]));
    let work = pairs.map(async |(ledger, (id, in_hand))| {
        for _ in 0..20 {
            match claim(ledger, id).await {
                Claim::Fresh(lease) => {
                    assert!(!in_hand.swap(true, Ordering::SeqCst), "{id} is in hand already");
                    find(ledger, id).await;
                    in_hand.store(false, Ordering::SeqCst);
                    lease.release(false, 0).await.unwrap();
                }
                Claim::Held(held) => held.freed(Duration::from_millis(1)).await,
                other => panic!("{id} is {}", name(&other)),
            }
        }
    });
    join_all(work).await;
}

/// The worst moment for a worker to stall: it has asked for a row that is just being removed.
#[tokio::test]
async fn a_worker_that_stalls_while_it_claims_does_not_join_who_was_faster() {
    let place = Place::of("postgres").await;
    let Place::Postgres(database) = &place else { unreachable!() };
    let settings_of = |name: &str| {
        let url = format!("{}&application_name={name}", database.url());
        Settings { location: Location::Postgres(url.into()), ..place.settings() }
    };
    let [stalling, fast] = ["stalling", "fast"].map(|name| format!("{name}-{}", Uuid::now_v7()));
    let other = Ledger::open(settings_of(&fast)).await.unwrap();
    // A runtime of its own, with one thread, which the test can hold up.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let handle = runtime.handle().clone();
    let settings = settings_of(&stalling);
    let (claimed, result) = oneshot::channel();
    let thread = std::thread::spawn(move || {
        runtime.block_on(async {
            let ledger = Ledger::open(settings).await.unwrap();
            let claim = claim(&ledger, "c-1").await;
            claimed.send(name(&claim)).unwrap();
        });
    });

    database.run("INSERT INTO call_manager_submits (command_id) VALUES ('c-1')").await;
    database.run("BEGIN; SELECT FROM call_manager_submits FOR UPDATE").await;
    database.until_waiting(&stalling).await;
    let (stalled, is_stalled) = oneshot::channel();
    let (go_on, going_on) = std::sync::mpsc::channel::<()>();
    handle.spawn(async move {
        stalled.send(()).unwrap();
        going_on.recv().unwrap();
    });
    is_stalled.await.unwrap();
    database.run("DELETE FROM call_manager_submits; COMMIT").await;
    // The other is faster, or has to wait for the one that stalls.
    let mut claiming = Box::pin(claim(&other, "c-1"));
    let first = tokio::select! {
        claim = claiming.as_mut() => Some(claim),
        () = database.until_waiting(&fast) => None,
    };
    go_on.send(()).unwrap();
    let first = match first {
        Some(claim) => claim,
        None => claiming.as_mut().await,
    };
    drop(claiming);
    let mut names = [name(&first), result.await.unwrap()];
    names.sort_unstable();
    assert_eq!(names, ["fresh", "held elsewhere"]);
    thread.join().unwrap();
    drop(first);
    drop(other);
    place.clean_up().await;
}

kept_by!(sqlite postgres: what_is_older_than_the_retention_is_forgotten_unless_it_is_in_hand);
async fn what_is_older_than_the_retention_is_forgotten_unless_it_is_in_hand(place: &Place) {
    let ledger = place.open().await;
    settle(&fresh(&ledger, "settled").await, &created("b-1")).await.unwrap();
    settle(&fresh(&ledger, "failed").await, &failed("no")).await.unwrap();
    settle(&fresh(&ledger, "unpublished").await, &failed("no")).await.unwrap();
    for id in ["settled", "failed"] {
        ledger.published(id).await;
    }
    ledger.find("struck", true).await.unwrap();
    fresh(&ledger, "released").await.release(true, 0).await.unwrap();
    drop(fresh(&ledger, "dropped").await);
    // A month is not over.
    let ledger = place.reopen(ledger).await;
    fresh(&ledger, "later").await.release(false, 0).await.unwrap();
    settled(&ledger, "settled").await;
    ledger.close(LIMIT).await;

    let retention = Duration::ZERO;
    let ledger = Ledger::open(Settings { retention, ..place.settings() }).await.unwrap();
    // A message may still come back until the queues were seen empty.
    settled(&ledger, "settled").await;
    ledger.note_drained().await.unwrap();
    for id in ["settled", "failed"] {
        until("it is forgotten", async || matches!(find(&ledger, id).await, Found::Nobody)).await;
        fresh(&ledger, id).await;
    }
    settled(&ledger, "unpublished").await;
    let mut struck = fresh(&ledger, "struck").await;
    assert_eq!(struck.before_request(1).await.unwrap(), Go::Struck);
    abandoned(&ledger, "released").await;
    if matches!(place, Place::Sqlite(_)) {
        abandoned(&ledger, "dropped").await;
    } else {
        assert!(is_held(&ledger, "dropped").await);
    }
    assert!(is_conflict(&ledger, "dropped").await);
}

#[tokio::test]
async fn workers_that_start_at_once_share_one_new_ledger() {
    let place = Place::of("postgres").await;
    let ledgers = join_all((0..8).map(|_| place.open())).await;
    for (number, ledger) in ledgers.iter().enumerate() {
        settle(&fresh(ledger, &format!("c-{number}")).await, &created("b-1")).await.unwrap();
        let other = &ledgers[(number + 1) % ledgers.len()];
        settled(other, &format!("c-{number}")).await;
    }
    drop(ledgers);
    place.clean_up().await;
}

/// What a person reads, with its causes.
fn told(error: &OpenError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

async fn refusal(place: &Place) -> OpenError {
    Ledger::open(place.settings()).await.err().expect("it does not open")
}

#[tokio::test]
async fn a_file_of_a_newer_version_is_left_alone() {
    let place = Place::of("sqlite").await;
    let ledger = place.open().await;
    settle(&fresh(&ledger, "c-1").await, &created("b-1")).await.unwrap();
    ledger.close(LIMIT).await;
    let Location::Sqlite(path) = place.settings().location else { unreachable!() };
    let version = |number: i64| {
        let file = Connection::open(&path).unwrap();
        file.pragma_update(None, "user_version", number).unwrap();
    };
    version(99);
    let expected = format!(
        "{} was made by a newer version of call-manager; use that version (a new ledger only when \
         the queues are empty: it does not know what was sent)",
        path.display()
    );
    assert_eq!(refusal(&place).await.to_string(), expected);
    version(2);
    settled(&place.open().await, "c-1").await;
}

#[tokio::test]
async fn a_database_of_a_newer_version_is_left_alone() {
    let place = Place::of("postgres").await;
    let Place::Postgres(database) = &place else { unreachable!() };
    place.open().await.close(LIMIT).await;
    database.run("INSERT INTO call_manager_migrations VALUES (3)").await;
    assert_eq!(
        refusal(&place).await.to_string(),
        "the PostgreSQL database was made by a newer version of call-manager; use that version (a \
         new ledger only when the queues are empty: it does not know what was sent)"
    );
    database.run("DELETE FROM call_manager_migrations WHERE number = 3").await;
    place.open().await.close(LIMIT).await;
    place.clean_up().await;
}

/// On a thread of its own: it waits for the file there.
fn opening(place: &Place) -> JoinHandle<Result<Ledger, OpenError>> {
    let settings = place.settings();
    spawn_blocking(|| Handle::current().block_on(Ledger::open(settings)))
}

#[tokio::test]
async fn a_second_worker_at_one_file_is_refused() {
    let place = Place::of("sqlite").await;
    let first = place.open().await;
    let error = opening(&place).await.unwrap().err().expect("the file is taken");
    let Location::Sqlite(path) = place.settings().location else { unreachable!() };
    let expected = format!(
        "the ledger {} is in use by another worker; give each worker that has queues of its own a \
         file of its own, and workers that share queues one PostgreSQL (LEDGER_URL=postgres://…)",
        path.display()
    );
    assert_eq!(error.to_string(), expected);
    // The first has not noticed.
    fresh(&first, "c-1").await;
    // A former worker that is just ending is waited for.
    let second = opening(&place);
    let locked = Instant::now();
    until("the second worker waits", async || locked.elapsed().as_millis() > 300).await;
    assert!(!second.is_finished());
    first.close(LIMIT).await;
    abandoned(&second.await.unwrap().expect("the file is free"), "c-1").await;
}

#[tokio::test]
async fn a_file_that_cannot_be_is_refused_with_its_path() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text");
    std::fs::write(&text, "Not a ledger at all. ".repeat(100)).unwrap();
    let open = async |path: &Path, expected: &str| {
        let location = Location::Sqlite(path.to_owned());
        let error = Ledger::open(Settings { location, ..Place::Memory.settings() }).await.err();
        let expected = format!("the ledger {} {expected}", path.display());
        assert_eq!(error.expect("it does not open").to_string(), expected);
    };
    let nowhere = "cannot be opened; set LEDGER_URL=sqlite:PATH to a file in a directory that exists \
                   and that the worker may write to";
    open(&folder.path().join("missing/ledger.db"), nowhere).await;
    open(folder.path(), nowhere).await;
    let damaged = "is damaged, or no ledger; restore it, or empty the queues before you start with a \
                   new one, which does not know what was sent";
    open(&text, damaged).await;
    assert!(std::fs::read_to_string(&text).unwrap().starts_with("Not a ledger at all."));
}

#[tokio::test]
async fn a_server_that_is_not_there_is_refused_without_its_password() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let [silent_at, closed] = [silent.local_addr().unwrap(), closed].map(|address| address.port());
    let refused = async |place: String| {
        let location = Location::Postgres(format!("postgres://ana:hunter2@{place}").into());
        let began = Instant::now();
        let error = Ledger::open(Settings { location, ..Place::Memory.settings() }).await.err();
        let error = error.expect("it does not open");
        let took = began.elapsed();
        assert!(took < Duration::from_secs(10), "{place} took {took:?}");
        let says_what_to_do = error.to_string().contains("LEDGER_URL");
        assert!(says_what_to_do, "{error}");
        let text = told(&error);
        assert!(!text.contains("hunter2") && !text.contains('\n'), "{text}");
        assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
    };
    tokio::join!(
        refused(format!("127.0.0.1:{silent_at}/calls")),
        refused(format!("127.0.0.1:{closed}/calls")),
        refused("no-such-host.invalid/calls".to_owned()),
        refused("127.0.0.1:port/calls".to_owned()),
        refused("127.0.0.1/calls?colour=blue".to_owned()),
    );
}

#[tokio::test]
async fn a_connection_that_has_gone_silent_is_replaced() {
    let database = Database::create().await;
    let config: tokio_postgres::Config = database.url().parse().unwrap();
    let direct = format!("127.0.0.1:{}", config.get_ports()[0]);
    let relay = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = database.url().replace(&direct, &relay.local_addr().unwrap().to_string());
    let silent = CancellationToken::new();
    let is_silent = silent.clone();
    let (falls_silent, has_fallen_silent) = oneshot::channel();
    tokio::spawn(async move {
        let (mut first, _) = relay.accept().await.unwrap();
        let mut server = TcpStream::connect(&direct).await.unwrap();
        tokio::select! {
            _ = copy_bidirectional(&mut first, &mut server) => {}
            () = is_silent.cancelled() => {}
        }
        falls_silent.send(()).unwrap();
        // Open all the while, and nothing comes out of it any more.
        let (mut second, _) = relay.accept().await.unwrap();
        let mut again = TcpStream::connect(&direct).await.unwrap();
        copy_bidirectional(&mut second, &mut again).await.ok();
        drop((first, server));
    });
    let location = Location::Postgres(url.into());
    let settings = Settings { location, ..Place::Memory.settings() };
    let ledger = Ledger::open(settings).await.unwrap();
    settle(&fresh(&ledger, "c-1").await, &created("b-1")).await.unwrap();
    silent.cancel();
    has_fallen_silent.await.unwrap();
    until("there is another", async || ledger.find("c-1", false).await.is_ok()).await;
    drop(ledger);
    database.drop().await;
}

#[tokio::test]
async fn a_lost_connection_to_the_server_is_replaced() {
    let database = Database::create().await;
    let config: tokio_postgres::Config = database.url().parse().unwrap();
    let direct = format!("127.0.0.1:{}", config.get_ports()[0]);
    let proxy = Proxy::to(direct.parse().unwrap()).await;
    let url = database.url().replace(&direct, &proxy.address.to_string());
    let location = Location::Postgres(url.into());
    let settings = Settings { location, ..Place::Memory.settings() };
    let ledger = Ledger::open(settings).await.unwrap();
    let lease = fresh(&ledger, "c-1").await;
    for round in 0..3 {
        proxy.refuse(true);
        proxy.cut();
        until("it says so", async || ledger.find("c-1", false).await.is_err()).await;
        proxy.refuse(false);
        until("it is back", async || ledger.find("c-1", false).await.is_ok()).await;
        assert_eq!(proxy.accepted(), 2 + round);
    }
    settle(&lease, &created("b-1")).await.unwrap();
    drop(lease);
    settled(&ledger, "c-1").await;
    ledger.close(LIMIT).await;
    database.drop().await;
}
