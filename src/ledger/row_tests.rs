//! What each transition does to a row and answers.

use super::*;

#[path = "row_history_tests.rs"]
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

fn claim_of(fingerprint: Uuid, worker: Uuid, token: u128) -> Op {
    Op::Claim { fingerprint, token: Uuid::from_u128(token), worker, lease: span(LEASE) }
}

fn claim(worker: Uuid, token: u128) -> Op {
    claim_of(BODY, worker, token)
}

fn renew(token: u128, attempts: u32) -> Op {
    Op::Renew { token: Uuid::from_u128(token), lease: span(LEASE), attempts }
}

fn settle(token: u128, ending: &str, succeeded: bool) -> Op {
    let (token, ending) = (Uuid::from_u128(token), ending.into());
    Op::Settle { token, fingerprint: BODY, ending, succeeded }
}

fn release(token: u128, may_have_left: bool) -> Op {
    Op::Release { token: Uuid::from_u128(token), may_have_left }
}

fn strike(lasts: Millis) -> Op {
    Op::Find { strike: Some(span(lasts)) }
}

const LOOK: Op = Op::Find { strike: None };

const FRESH: Reply = Reply::Yours { history: None, struck: false };
const STRUCK: Reply = Reply::Yours { history: None, struck: true };

/// What a renewal is told.
fn kept(age: Millis, attempts: u32, struck: bool) -> Reply {
    Reply::Yours { history: Some(History { age: span(age), attempts }), struck }
}

fn left(age: Millis, attempts: u32) -> Reply {
    Reply::Yours { history: Some(History { age: span(age), attempts }), struck: false }
}

fn settled(ending: &str) -> Reply {
    Reply::Settled(ending.into())
}

/// Applies operations to a row, each at its time after [`NOW`], and returns the last reply.
fn after_all(row: &mut Option<Row>, ops: &[(Millis, Op)]) -> Reply {
    ops.iter().map(|(at, op)| op.apply(row, NOW + at)).last().unwrap()
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
    assert_eq!(claim(ANA, 1).apply(&mut row, NOW), FRESH);
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
    assert_eq!(settle(1, "created", true).apply(&mut row, NOW + LEASE), settled("created"));
    assert_eq!(settle(2, "failed", false).apply(&mut row, NOW + LEASE), settled("created"));
}

#[test]
fn what_is_settled_stays_as_it_is_whatever_comes() {
    for succeeded in [true, false] {
        let mut row = None;
        let end = settle(1, "first", succeeded);
        assert_eq!(after_all(&mut row, &[(0, claim(ANA, 1)), (10, end)]), settled("first"));
        for at in [-LEASE, 10, 100 * LEASE] {
            for op in [claim(ANA, 1), claim(BEN, 2), LOOK, strike(LEASE)] {
                changes_nothing(row.as_ref(), at, &op, &settled("first"));
            }
            for succeeded in [true, false] {
                changes_nothing(
                    row.as_ref(),
                    at,
                    &settle(1, "second", succeeded),
                    &settled("first"),
                );
                changes_nothing(
                    row.as_ref(),
                    at,
                    &settle(2, "second", succeeded),
                    &settled("first"),
                );
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
fn what_was_only_struck_or_let_go_of_unsent_belongs_to_any_body() {
    let mut row = None;
    let ops = [(0, strike(LEASE)), (1, claim(ANA, 1)), (2, release(1, false))];
    after_all(&mut row, &ops);
    assert_eq!(claim_of(OTHER_BODY, BEN, 2).apply(&mut row, NOW + 3), STRUCK);
}

#[test]
fn let_go_of_unsent_it_is_as_if_nobody_had_begun() {
    let mut row = None;
    let ops = [(0, claim(ANA, 1)), (1, renew(1, 4)), (2, release(1, false))];
    assert_eq!(after_all(&mut row, &ops), Reply::Nobody);
    assert_eq!(row, None);
}

#[test]
fn let_go_of_unsent_it_keeps_a_strike_for_as_long_as_that_lasts() {
    let mut row = None;
    let ops = [(0, claim(ANA, 1)), (0, strike(LEASE))];
    after_all(&mut row, &ops);
    let mut over = row.clone();
    release(1, false).apply(&mut over, NOW + LEASE);
    assert_eq!(over, None);
    release(1, false).apply(&mut row, NOW + LEASE - 1);
    changes_nothing(row.as_ref(), LEASE - 1, &LOOK, &Reply::Nobody);
    assert_eq!(claim(BEN, 2).apply(&mut row, NOW + LEASE - 1), STRUCK);
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
fn a_strike_meets_whoever_claims_or_renews_while_it_lasts() {
    let mut row = None;
    assert_eq!(strike(LEASE).apply(&mut row, NOW), Reply::Nobody);
    // A shorter one does not end it earlier.
    assert_eq!(strike(1).apply(&mut row, NOW + 1), Reply::Nobody);
    changes_nothing(row.as_ref(), 2, &LOOK, &Reply::Nobody);
    assert_eq!(claim(ANA, 1).apply(&mut row.clone(), NOW + LEASE - 1), STRUCK);
    assert_eq!(claim(ANA, 1).apply(&mut row.clone(), NOW + LEASE), FRESH);

    let mut row = None;
    after_all(&mut row, &[(0, claim(ANA, 1)), (1, strike(LEASE))]);
    assert_eq!(renew(1, 1).apply(&mut row, NOW + LEASE), kept(LEASE, 1, true));
    assert_eq!(renew(1, 1).apply(&mut row, NOW + LEASE + 1), kept(LEASE + 1, 1, false));
}

#[test]
fn where_the_clock_stands_before_the_first_claim_it_was_long_ago() {
    let mut row = None;
    after_all(&mut row, &[(0, claim(ANA, 1)), (0, release(1, true))]);
    let long_ago = left(24 * 60 * 60 * 1_000, 1);
    assert_eq!(claim(ANA, 2).apply(&mut row.clone(), NOW - 1), long_ago);
    assert_eq!(claim(ANA, 2).apply(&mut row, NOW), left(0, 1));
}

#[test]
fn what_was_forgotten_can_still_be_settled() {
    for succeeded in [true, false] {
        let mut row = None;
        assert_eq!(settle(1, "late", succeeded).apply(&mut row, NOW), settled("late"));
        changes_nothing(row.as_ref(), 0, &claim(BEN, 2), &settled("late"));
    }
}

#[test]
fn no_span_and_no_time_is_too_long() {
    for now in [0, NOW, Millis::MAX - 1] {
        let mut row = None;
        let (token, lease) = (Uuid::from_u128(1), Duration::MAX);
        let op = Op::Claim { fingerprint: BODY, token, worker: ANA, lease };
        assert_eq!(op.apply(&mut row, now), FRESH);
        Op::Find { strike: Some(Duration::MAX) }.apply(&mut row, now);
        let op = Op::Renew { token, lease, attempts: u32::MAX };
        assert_eq!(op.apply(&mut row, now), kept(0, u32::MAX, true));
        assert!(matches!(claim(BEN, 2).apply(&mut row, now), Reply::InHand { .. }));
        assert_eq!(before(Millis::MIN, Duration::MAX), Millis::MIN);
    }
}

fn condemn(worker: Uuid, ending: Option<&str>) -> Op {
    Op::Condemn { worker, ending: ending.map(Into::into) }
}

#[test]
fn what_is_condemned_is_executed_by_nobody_whether_or_not_it_was_begun() {
    for begun in [false, true] {
        let mut row = None;
        if begun {
            claim(ANA, 1).apply(&mut row, NOW);
        }
        let asked = if begun { left(LEASE, 1) } else { FRESH };
        changes_nothing(row.as_ref(), LEASE, &condemn(BEN, None), &asked);
        assert_eq!(condemn(BEN, Some("x")).apply(&mut row, NOW + LEASE), settled("x"));
        changes_nothing(row.as_ref(), LEASE, &claim(ANA, 2), &settled("x"));
        changes_nothing(row.as_ref(), LEASE, &condemn(ANA, Some("y")), &settled("x"));
        changes_nothing(row.as_ref(), LEASE, &LOOK, &settled("x"));
    }
}

#[test]
fn what_another_worker_has_in_hand_is_not_condemned() {
    let mut row = None;
    claim(ANA, 1).apply(&mut row, NOW);
    let held = Reply::InHand { remaining: span(1) };
    changes_nothing(row.as_ref(), LEASE - 1, &condemn(BEN, Some("x")), &held);
    // Its own former claim is not.
    assert_eq!(condemn(ANA, Some("x")).apply(&mut row, NOW), settled("x"));
}
