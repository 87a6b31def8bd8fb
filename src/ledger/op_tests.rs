//! What each transition does to a row and answers.

use super::*;

#[path = "op_history_tests.rs"]
mod histories;

const NOW: Millis = 1_800_000_000_000;
const LEASE: Millis = 1_000;
const BODY: Uuid = Uuid::from_u128(1);
const OTHER_BODY: Uuid = Uuid::from_u128(2);
const ANA: Uuid = Uuid::from_u128(0xa);
const BEN: Uuid = Uuid::from_u128(0xb);

fn span(millis: Millis) -> Duration {
    Duration::from_millis(millis.try_into().unwrap())
}

const TAKES: Millis = LEASE / 2;
const KEY: Uuid = Uuid::from_u128(0xc);
const OTHER_KEY: Uuid = Uuid::from_u128(0xd);

fn dispatch(key: Uuid) -> Dispatch {
    Dispatch { takes: span(TAKES), key }
}

fn body_of(fingerprint: Uuid) -> Body {
    Body { fingerprint, hash: fingerprint, origin: "origin".into() }
}

fn claim_with(body: Option<Body>, worker: Uuid, token: u128, doubt: bool) -> Op {
    let (token, lease, send) = (Uuid::from_u128(token), span(LEASE), dispatch(KEY));
    Op::Claim { body, token, worker, lease, send, doubt }
}

fn claim_of(fingerprint: Uuid, worker: Uuid, token: u128) -> Op {
    claim_with(Some(body_of(fingerprint)), worker, token, false)
}

fn claim(worker: Uuid, token: u128) -> Op {
    claim_of(BODY, worker, token)
}

fn renew_for(token: u128, attempts: u32, purpose: Purpose) -> Op {
    Op::Renew { token: Uuid::from_u128(token), lease: span(LEASE), attempts, purpose }
}

fn renew(token: u128, attempts: u32) -> Op {
    renew_for(token, attempts, Purpose::Keep)
}

fn end(ending: &str, succeeded: bool) -> End {
    let batch = succeeded.then(|| Batch { id: format!("batch {ending}").into(), key: KEY });
    End { ending: ending.into(), batch, begins_at: None }
}

fn settle(token: u128, ending: &str, succeeded: bool) -> Op {
    Op::Settle { token: Uuid::from_u128(token), end: end(ending, succeeded) }
}

fn release(token: u128, may_have_left: bool) -> Op {
    Op::Release { token: Uuid::from_u128(token), may_have_left, attempts: 0 }
}

fn strike(lasts: Millis) -> Op {
    Op::Find { strike: Some(span(lasts)) }
}

const LOOK: Op = Op::Find { strike: None };

fn yours(history: Option<History>, attempts: u32, struck: bool) -> Reply {
    Reply::Yours(Yours { history, attempts, struck, origin: Some("origin".into()) })
}

fn fresh(struck: bool) -> Reply {
    yours(None, 0, struck)
}

/// Of attempts that began with the first claim, `age` ago, and are over after [`TAKES`].
fn history(age: Millis) -> History {
    let (quiet, busy) = (span((age - TAKES).max(0)), span((TAKES - age).max(0)));
    History { age: span(age), quiet, busy, keys: vec![KEY] }
}

/// What a renewal is told.
fn kept(age: Millis, attempts: u32, struck: bool) -> Reply {
    yours(Some(history(age)), attempts, struck)
}

fn left(age: Millis, attempts: u32) -> Reply {
    kept(age, attempts, false)
}

/// The ending of a reply.
fn ending(reply: &Reply) -> &str {
    match reply {
        Reply::Settled(finished) => &finished.ending,
        other => panic!("it is not settled: {other:?}"),
    }
}

#[track_caller]
fn is_settled(reply: &Reply, expected: &str) {
    assert_eq!(ending(reply), expected);
}

/// Applies operations to a row, each at its time after [`NOW`], and returns the last reply.
fn after_all(row: &mut Option<Row>, ops: &[(Millis, Op)]) -> Reply {
    ops.iter().map(|(at, op)| op.apply(row, NOW + at)).last().unwrap()
}

/// Asserts that an operation finds it settled so, and leaves the row as it is.
#[track_caller]
fn stays_settled(row: Option<&Row>, at: Millis, op: &Op, expected: &str) {
    let mut after = row.cloned();
    is_settled(&op.apply(&mut after, NOW + at), expected);
    assert_eq!(after.as_ref(), row, "{op:?} leaves the row alone");
}

/// Asserts that an operation gets this reply and leaves the row as it is.
#[track_caller]
fn changes_nothing(row: Option<&Row>, at: Millis, op: &Op, reply: &Reply) {
    let mut after = row.cloned();
    assert_eq!(op.apply(&mut after, NOW + at), *reply, "{op:?}");
    assert_eq!(after.as_ref(), row, "{op:?} leaves the row alone");
}

#[test]
fn a_submit_that_nobody_has_begun_is_fresh() {
    let mut row = None;
    changes_nothing(row.as_ref(), 0, &LOOK, &Reply::Nobody);
    assert_eq!(claim(ANA, 1).apply(&mut row, NOW), fresh(false));
    changes_nothing(row.as_ref(), 0, &LOOK, &Reply::InHand { remaining: span(LEASE) });
}

#[test]
fn another_worker_waits_until_the_lease_has_run_out() {
    let mut row = None;
    claim(ANA, 1).apply(&mut row, NOW);
    changes_nothing(row.as_ref(), LEASE - 1, &claim(BEN, 2), &Reply::InHand { remaining: span(1) });
    assert_eq!(claim(BEN, 2).apply(&mut row, NOW + LEASE), left(LEASE, 1));
    changes_nothing(row.as_ref(), LEASE, &claim(ANA, 3), &Reply::InHand { remaining: span(LEASE) });
}

#[test]
fn a_worker_need_not_wait_for_its_own_former_claim() {
    let mut row = None;
    claim(ANA, 1).apply(&mut row, NOW);
    assert_eq!(claim(ANA, 2).apply(&mut row, NOW + 7), left(7, 1));
    changes_nothing(row.as_ref(), 8, &renew(1, 1), &Reply::Gone);
}

#[test]
fn a_renewal_lasts_from_its_own_time_and_counts_the_attempts() {
    let mut row = None;
    after_all(&mut row, &[(0, claim(ANA, 1)), (900, renew(1, 3)), (950, renew(1, 2))]);
    let held = Reply::InHand { remaining: span(1) };
    changes_nothing(row.as_ref(), 950 + LEASE - 1, &claim(BEN, 2), &held);
    assert_eq!(claim(BEN, 2).apply(&mut row, NOW + 950 + LEASE), left(950 + LEASE, 3));
}

#[test]
fn a_lease_that_has_run_out_is_renewed_as_long_as_nobody_else_has_it() {
    let mut row = None;
    let renewed = after_all(&mut row, &[(0, claim(ANA, 1)), (5 * LEASE, renew(1, 1))]);
    assert_eq!(renewed, kept(5 * LEASE, 1, false));
    let held = Reply::InHand { remaining: span(LEASE) };
    changes_nothing(row.as_ref(), 5 * LEASE, &claim(BEN, 2), &held);
}

#[test]
fn who_was_taken_over_is_told_so_but_its_success_counts() {
    let mut row = None;
    after_all(&mut row, &[(0, claim(ANA, 1)), (LEASE, claim(BEN, 2))]);
    changes_nothing(row.as_ref(), LEASE, &renew(1, 1), &Reply::Gone);
    changes_nothing(row.as_ref(), LEASE, &settle(1, "failed", false), &Reply::Gone);
    changes_nothing(row.as_ref(), LEASE, &release(1, false), &Reply::Nobody);
    changes_nothing(row.as_ref(), LEASE, &release(1, true), &Reply::Nobody);
    is_settled(&settle(1, "created", true).apply(&mut row, NOW + LEASE), "created");
    is_settled(&settle(2, "failed", false).apply(&mut row, NOW + LEASE), "created");
}

#[test]
fn what_is_settled_stays_as_it_is_whatever_comes() {
    for succeeded in [true, false] {
        let mut row = None;
        let end = settle(1, "first", succeeded);
        is_settled(&after_all(&mut row, &[(0, claim(ANA, 1)), (10, end)]), "first");
        for at in [-LEASE, 10, 100 * LEASE] {
            let again = |token, succeeded| settle(token, "second", succeeded);
            for op in [claim(ANA, 1), claim(BEN, 2), LOOK, strike(LEASE)] {
                stays_settled(row.as_ref(), at, &op, "first");
            }
            for op in [again(1, true), again(1, false), again(2, true), again(2, false)] {
                stays_settled(row.as_ref(), at, &op, "first");
            }
            changes_nothing(row.as_ref(), at, &renew(1, 9), &Reply::Gone);
            changes_nothing(row.as_ref(), at, &release(1, false), &Reply::Nobody);
            changes_nothing(row.as_ref(), at, &release(1, true), &Reply::Nobody);
        }
    }
}

#[test]
fn another_body_is_a_conflict_once_a_body_is_known() {
    let mut row = None;
    let other = claim_of(OTHER_BODY, BEN, 9);
    claim(ANA, 1).apply(&mut row, NOW);
    changes_nothing(row.as_ref(), 0, &other, &Reply::Conflict);
    changes_nothing(row.as_ref(), 0, &claim_of(OTHER_BODY, ANA, 9), &Reply::Conflict);
    changes_nothing(row.as_ref(), 5 * LEASE, &other, &Reply::Conflict);
    release(1, true).apply(&mut row, NOW);
    changes_nothing(row.as_ref(), 0, &other, &Reply::Conflict);
    settle(1, "failed", false).apply(&mut row, NOW);
    changes_nothing(row.as_ref(), 0, &other, &Reply::Conflict);
}

#[test]
fn what_was_only_struck_belongs_to_any_body_and_what_was_claimed_to_its_own() {
    let mut row = None;
    strike(LEASE).apply(&mut row, NOW);
    let mut claimed = row.clone();
    assert_eq!(claim_of(OTHER_BODY, BEN, 2).apply(&mut row, NOW + 3), fresh(true));
    after_all(&mut claimed, &[(1, claim(ANA, 1)), (2, release(1, false))]);
    changes_nothing(claimed.as_ref(), 3, &claim_of(OTHER_BODY, BEN, 2), &Reply::Conflict);
}

#[test]
fn let_go_of_unsent_it_stays_and_is_claimed_without_a_search() {
    let mut row = None;
    let attempts = Op::Release { token: Uuid::from_u128(1), may_have_left: false, attempts: 4 };
    let ops = [(0, claim(ANA, 1)), (1, renew(1, 4)), (2, attempts)];
    assert_eq!(after_all(&mut row, &ops), Reply::Nobody);
    changes_nothing(row.as_ref(), 2, &LOOK, &Reply::Nobody);
    assert_eq!(row.as_ref().unwrap().touched_at, NOW + 2);
    assert_eq!(claim(BEN, 2).apply(&mut row.clone(), NOW + 3), yours(None, 4, false));
    // Without its message as well, to finish it.
    let finish = claim_with(None, BEN, 2, false);
    assert_eq!(finish.apply(&mut row, NOW + 3), yours(None, 4, false));
}

#[test]
fn a_strike_on_what_was_claimed_lasts_until_it_is_finished() {
    let mut row = None;
    after_all(&mut row, &[(0, claim(ANA, 1)), (0, strike(LEASE))]);
    let late = 100 * LEASE;
    let Reply::Yours(told) = renew(1, 1).apply(&mut row, NOW + late) else { panic!("it is held") };
    assert!(told.struck);
    release(1, false).apply(&mut row, NOW + late);
    assert_eq!(claim(BEN, 2).apply(&mut row, NOW + 2 * late), fresh(true));
}

#[test]
fn who_settles_a_struck_submit_as_succeeded_has_to_cancel_its_batch() {
    let mut row = None;
    after_all(&mut row, &[(0, claim(ANA, 1)), (0, strike(LEASE))]);
    let mut failed = row.clone();
    let reply = settle(1, "created", true).apply(&mut row, NOW + 1);
    let Reply::Settled(Finished { cancel: Some(batch), .. }) = reply else { panic!("{reply:?}") };
    assert_eq!(&*batch.id, "batch created");
    assert!(row.as_ref().unwrap().is_to_cancel());
    // Whoever has tried to cancel it leaves the turn to others.
    assert!(matches!(claim_with(None, BEN, 2, false).apply(&mut row, NOW + 9), Reply::Settled(_)));
    assert_eq!(row.as_ref().unwrap().touched_at, NOW + 9);
    Op::Cancelled.apply(&mut row, NOW + 2);
    assert!(!row.as_ref().unwrap().is_to_cancel());
    settle(1, "failed", false).apply(&mut failed, NOW + 1);
    assert!(!failed.unwrap().is_to_cancel());
}

#[test]
fn a_result_is_unfinished_until_it_is_published() {
    let mut row = None;
    let is_unfinished = |row: &Option<Row>| row.as_ref().unwrap().is_unfinished();
    claim(ANA, 1).apply(&mut row, NOW);
    assert!(is_unfinished(&row));
    let reply = settle(1, "created", true).apply(&mut row, NOW + 1);
    let Reply::Settled(Finished { published: false, origin: Some(_), .. }) = reply else {
        panic!("{reply:?}")
    };
    assert!(is_unfinished(&row));
    Op::Published.apply(&mut row, NOW + 2);
    assert!(!is_unfinished(&row));
    assert_eq!(row.unwrap().origin, None, "it is not needed any more");
    // Of what nobody has claimed there is nothing to finish.
    let mut struck = None;
    strike(LEASE).apply(&mut struck, NOW);
    changes_nothing(struck.as_ref(), 1, &claim_with(None, ANA, 1, false), &Reply::Nobody);
    changes_nothing(None, 1, &claim_with(None, ANA, 1, false), &Reply::Nobody);
}

#[test]
fn what_its_message_says_was_begun_elsewhere_is_in_doubt_where_no_row_is_found() {
    for struck in [false, true] {
        let mut row = None;
        if struck {
            strike(LEASE).apply(&mut row, NOW);
        }
        let reply = claim_with(Some(body_of(BODY)), ANA, 1, true).apply(&mut row, NOW);
        let Reply::Yours(Yours { history: Some(history), .. }) = reply else { panic!("{reply:?}") };
        assert_eq!((history.age, history.busy), (LONG_AGO, span(TAKES)));
    }
    // A row knows better.
    let mut row = None;
    after_all(&mut row, &[(0, claim(ANA, 1)), (1, release(1, false))]);
    let reply = claim_with(Some(body_of(BODY)), BEN, 2, true).apply(&mut row, NOW + 2);
    assert_eq!(reply, fresh(false));
}

#[test]
fn every_request_is_over_after_the_longest_time_or_when_its_sender_has_seen_it_end() {
    let quiet = |row: &mut Option<Row>, at| match claim(BEN, 9).apply(row, NOW + at) {
        Reply::Yours(Yours { history: Some(history), .. }) => history.quiet,
        other => panic!("{other:?}"),
    };
    let mut row = None;
    after_all(
        &mut row,
        &[(0, claim(ANA, 1)), (300, renew_for(1, 2, Purpose::Request(dispatch(KEY))))],
    );
    let at = 300 + LEASE;
    assert_eq!(quiet(&mut row.clone(), at), span(LEASE - TAKES), "the last one counts");
    renew(1, 2).apply(&mut row, NOW + 400);
    assert_eq!(
        quiet(&mut row.clone(), 400 + LEASE),
        span(100 + LEASE - TAKES),
        "keeping is no request"
    );
    renew_for(1, 1, Purpose::Ended).apply(&mut row, NOW + 425);
    assert_eq!(
        quiet(&mut row.clone(), 425 + LEASE),
        span(125 + LEASE - TAKES),
        "a late word about the one before"
    );
    renew_for(1, 2, Purpose::Ended).apply(&mut row, NOW + 450);
    assert_eq!(quiet(&mut row, 450 + LEASE), span(LEASE));
}

#[test]
fn a_row_keeps_the_key_of_every_request() {
    let keys = |row: &mut Option<Row>, token| match renew(token, 1).apply(row, NOW) {
        Reply::Yours(Yours { history: Some(history), .. }) => history.keys,
        other => panic!("{other:?}"),
    };
    let mut row = None;
    after_all(&mut row, &[(0, claim(ANA, 1)), (0, release(1, true)), (0, claim(ANA, 2))]);
    assert_eq!(keys(&mut row, 2), [KEY]);
    for key in [OTHER_KEY, KEY] {
        renew_for(2, 1, Purpose::Request(dispatch(key))).apply(&mut row, NOW);
        assert_eq!(keys(&mut row, 2), [KEY, OTHER_KEY]);
    }
    for n in 0..100 {
        renew_for(2, 1, Purpose::Request(dispatch(Uuid::from_u128(1000 + n)))).apply(&mut row, NOW);
    }
    let many = keys(&mut row, 2);
    assert!(many.len() < 20 && many.contains(&Uuid::nil()), "nobody has all of them: {many:?}");
}

#[test]
fn retention_counts_from_the_time_at_which_the_calls_begin() {
    let at = |begins_at| {
        let mut row = None;
        claim(ANA, 1).apply(&mut row, NOW);
        let end = End { begins_at, ..end("x", true) };
        Op::Settle { token: Uuid::from_u128(1), end }.apply(&mut row, NOW + 5);
        match row.unwrap().state {
            State::Settled(settled) => settled.at,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!([at(None), at(Some(1)), at(Some(NOW + 99))], [NOW + 5, NOW + 5, NOW + 99]);
}

#[test]
fn let_go_of_in_doubt_it_is_abandoned_to_everybody_at_once() {
    for next in [ANA, BEN] {
        let mut row = None;
        let ops =
            [(0, claim(ANA, 1)), (1, renew(1, 2)), (5, release(1, true)), (5, claim(next, 2))];
        assert_eq!(after_all(&mut row, &ops), left(5, 2));
        // And the age goes on growing.
        assert_eq!(after_all(&mut row, &[(6, release(2, true)), (9, claim(BEN, 3))]), left(9, 2));
    }
}

#[test]
fn a_strike_on_nothing_meets_whoever_claims_while_it_lasts() {
    let mut row = None;
    assert_eq!(strike(LEASE).apply(&mut row, NOW), Reply::Nobody);
    // A shorter one does not end it earlier.
    assert_eq!(strike(1).apply(&mut row, NOW + 1), Reply::Nobody);
    changes_nothing(row.as_ref(), 2, &LOOK, &Reply::Nobody);
    assert_eq!(claim(ANA, 1).apply(&mut row.clone(), NOW + LEASE - 1), fresh(true));
    assert_eq!(claim(ANA, 1).apply(&mut row.clone(), NOW + LEASE), fresh(false));
}

#[test]
fn where_the_clock_stands_before_the_first_claim_it_was_long_ago() {
    let mut row = None;
    after_all(&mut row, &[(0, claim(ANA, 1)), (0, release(1, true))]);
    let Reply::Yours(told) = claim(ANA, 2).apply(&mut row.clone(), NOW - 1) else { panic!() };
    let told = told.history.unwrap();
    assert_eq!((told.age, told.busy), (LONG_AGO, span(TAKES)), "no request takes longer");
    assert_eq!(claim(ANA, 2).apply(&mut row, NOW), left(0, 1));
}

#[test]
fn what_was_forgotten_can_still_be_settled() {
    for succeeded in [true, false] {
        let mut row = None;
        is_settled(&settle(1, "late", succeeded).apply(&mut row, NOW), "late");
        stays_settled(row.as_ref(), 0, &claim(BEN, 2), "late");
    }
}

#[test]
fn no_span_and_no_time_is_too_long() {
    for now in [0, NOW, Millis::MAX - 1] {
        let mut row = None;
        let (token, lease) = (Uuid::from_u128(1), Duration::MAX);
        let send = Dispatch { takes: Duration::MAX, key: KEY };
        let body = Some(body_of(BODY));
        let op = Op::Claim { body, token, worker: ANA, lease, send, doubt: false };
        assert_eq!(op.apply(&mut row, now), fresh(false));
        Op::Find { strike: Some(Duration::MAX) }.apply(&mut row, now);
        let op = Op::Renew { token, lease, attempts: u32::MAX, purpose: Purpose::Request(send) };
        let Reply::Yours(told) = op.apply(&mut row, now) else { panic!("it is held") };
        assert_eq!((told.attempts, told.struck), (u32::MAX, true));
        assert!(matches!(claim(BEN, 2).apply(&mut row, now), Reply::InHand { .. }));
        assert_eq!(before(Millis::MIN, Duration::MAX), Millis::MIN);
    }
}

/// `as_seen`: whether it was begun, and how it then ends.
fn condemn_of(body: Uuid, worker: Uuid, doubt: bool, as_seen: Option<(bool, &str)>) -> Op {
    let sentence = as_seen.map(|(begun, ending)| Sentence { begun, ending: ending.into() });
    Op::Condemn { worker, body, doubt, sentence }
}

fn condemn(worker: Uuid, as_seen: Option<(bool, &str)>) -> Op {
    condemn_of(BODY, worker, false, as_seen)
}

fn begun(reply: &Reply) -> bool {
    match reply {
        Reply::Yours(yours) => yours.history.is_some(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_condemned_is_executed_by_nobody_whether_or_not_it_was_begun() {
    for was_begun in [false, true] {
        let mut row = None;
        if was_begun {
            claim(ANA, 1).apply(&mut row, NOW);
        }
        let mut asked = row.clone();
        assert_eq!(begun(&condemn(BEN, None).apply(&mut asked, NOW + LEASE)), was_begun);
        let otherwise = condemn(BEN, Some((!was_begun, "y")));
        assert_eq!(begun(&otherwise.apply(&mut asked, NOW + LEASE)), was_begun);
        assert_eq!(asked, row, "to ask, or to be wrong, changes nothing");
        is_settled(&condemn(BEN, Some((was_begun, "x"))).apply(&mut row, NOW + LEASE), "x");
        stays_settled(row.as_ref(), LEASE, &claim(ANA, 2), "x");
        stays_settled(row.as_ref(), LEASE, &condemn(ANA, Some((was_begun, "y"))), "x");
        stays_settled(row.as_ref(), LEASE, &LOOK, "x");
    }
}

#[test]
fn a_condemned_message_with_another_body_gets_neither_the_row_nor_its_result() {
    let other = condemn_of(OTHER_BODY, BEN, false, Some((true, "x")));
    let mut row = None;
    claim(ANA, 1).apply(&mut row, NOW);
    changes_nothing(row.as_ref(), LEASE, &other, &Reply::Conflict);
    settle(1, "created", true).apply(&mut row, NOW);
    changes_nothing(row.as_ref(), LEASE, &other, &Reply::Conflict);
    changes_nothing(
        row.as_ref(),
        LEASE,
        &condemn_of(OTHER_BODY, BEN, true, None),
        &Reply::Conflict,
    );
}

#[test]
fn condemned_without_a_row_it_was_begun_where_its_message_says_so() {
    assert!(!begun(&condemn_of(BODY, ANA, false, None).apply(&mut None, NOW)));
    assert!(begun(&condemn_of(BODY, ANA, true, None).apply(&mut None, NOW)));
}

#[test]
fn what_another_worker_has_in_hand_is_not_condemned() {
    let mut row = None;
    claim(ANA, 1).apply(&mut row, NOW);
    let held = Reply::InHand { remaining: span(1) };
    changes_nothing(row.as_ref(), LEASE - 1, &condemn(BEN, Some((true, "x"))), &held);
    // Its own former claim is not.
    is_settled(&condemn(ANA, Some((true, "x"))).apply(&mut row, NOW), "x");
}
