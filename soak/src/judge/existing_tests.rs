//! What the judge finds in the results of cancels and gets, and what it lets pass.

use serde_json::json;

use super::super::tests::{batch, command, done, failed, judged, submit};
use super::super::{Evidence, judge};
use super::*;
use crate::plan::{Asks, Command, Expected};

/// The submit "c", and what names it under the id "x".
fn commands(asks: Asks) -> [Command; 2] {
    [submit("c", Expected::Batch), command("x", asks)]
}

/// The answer of another kind of command in that of a submit.
fn of(kind: CommandKind, submit: Answer) -> Answer {
    let routing_key = submit.routing_key.replace("submit", kind.name());
    Answer { routing_key, ..submit }
}

fn cancel_failed(code: &str) -> Answer {
    of(CommandKind::Cancel, failed(code))
}

fn get_failed(code: &str) -> Answer {
    of(CommandKind::Get, failed(code))
}

fn got(batch_id: &str) -> Answer {
    of(CommandKind::Get, done(batch_id))
}

fn cancelled(batch_id: &str) -> Answer {
    let data = json!({"id": batch_id, "status": "cancelled"});
    let body = json!({"success": true, "data": data}).to_string();
    Answer { body, ..of(CommandKind::Cancel, done(batch_id)) }
}

/// The batch "b" of the submit "c".
fn of_c(is_cancelled: bool) -> Vec<Created> {
    vec![Created { cancelled: is_cancelled, ..batch("b", Some("c")) }]
}

/// What is found where "c" and "x" are so answered, but for that of two commands no two may not know.
fn found(asks: Asks, c: Answer, x: Answer, batches: &[Created]) -> Vec<Broken> {
    let answers = [("c".into(), vec![c]), ("x".into(), vec![x])].into();
    let broken = judged(&commands(asks), &answers, batches).broken.into_keys();
    broken.filter(|broken| *broken != Broken::KnowsTooLittle).collect()
}

const BY_EITHER_ID: [Target; 2] = [Target::Submit(0), Target::BatchOf(0)];

#[test]
fn a_cancel_that_was_done_leaves_a_cancelled_batch() {
    for target in BY_EITHER_ID {
        let cancel = || Asks::Cancel(target);
        assert_eq!(found(cancel(), done("b"), cancelled("b"), &of_c(true)), []);
        let false_one = [Broken::FalseSucceeded];
        assert_eq!(found(cancel(), done("b"), cancelled("b"), &of_c(false)), false_one);
        // Of another batch, or with another status.
        assert_eq!(found(cancel(), done("b"), cancelled("b2"), &of_c(true)), false_one);
        let pending = of(CommandKind::Cancel, done("b"));
        assert_eq!(found(cancel(), done("b"), pending, &of_c(true)), false_one);
    }
    let nothing = found(Asks::Cancel(Target::Submit(0)), failed(UNAVAILABLE), cancelled("b"), &[]);
    assert_eq!(nothing, [Broken::FalseSucceeded]);
}

#[test]
fn a_cancel_that_found_nothing_leaves_no_batch_for_ever() {
    let cancel = || Asks::Cancel(Target::Submit(0));
    let struck = || failed("cancelled_before_submit");
    assert_eq!(found(cancel(), struck(), cancel_failed(NOT_FOUND), &[]), []);
    assert_eq!(found(cancel(), failed(UNAVAILABLE), cancel_failed(NOT_FOUND), &[]), []);
    let and_a_batch = found(cancel(), done("b"), cancel_failed(NOT_FOUND), &of_c(false));
    assert_eq!(and_a_batch, [Broken::FalseFailed]);
    // It was known that there is none.
    let unknown = found(cancel(), failed(UNKNOWN), cancel_failed(NOT_FOUND), &[]);
    assert_eq!(unknown, [Broken::FalseFailed]);
    let by_batch =
        found(Asks::Cancel(Target::BatchOf(0)), done("b"), cancel_failed(NOT_FOUND), &of_c(false));
    assert_eq!(by_batch, [Broken::FalseFailed]);
}

#[test]
fn a_submit_is_cancelled_only_by_its_command_id_and_then_has_no_batch() {
    let struck = || failed("cancelled_before_submit");
    let unknown = || cancel_failed(UNKNOWN);
    assert_eq!(found(Asks::Cancel(Target::Submit(0)), struck(), unknown(), &[]), []);
    let and_a_batch = found(Asks::Cancel(Target::Submit(0)), struck(), unknown(), &of_c(false));
    assert_eq!(and_a_batch, [Broken::FalseFailed]);
    for nobody in [Asks::Cancel(Target::BatchOf(0)), Asks::Cancel(Target::Nobody)] {
        assert_eq!(found(nobody, struck(), unknown(), &[]), [Broken::FalseFailed]);
    }
    let get = found(Asks::Get(Target::Submit(0)), struck(), get_failed(NOT_FOUND), &[]);
    assert_eq!(get, [Broken::FalseFailed]);
    // It had its result before anybody asked.
    let not_found = cancel_failed(NOT_FOUND);
    let answers = [("c".into(), vec![struck()]), ("x".into(), vec![not_found])].into();
    let evidence = Evidence {
        commands: &commands(Asks::Cancel(Target::Submit(0))),
        confirmed: &[true; 2],
        late: &[false, true],
        answers: &answers,
        batches: &[],
    };
    assert_eq!(judge(&evidence).broken.into_keys().collect::<Vec<_>>(), [Broken::FalseFailed]);
}

#[test]
fn a_batch_is_not_cancelled_by_nobody() {
    let by_nobody = [Broken::CancelledByNobody];
    for target in BY_EITHER_ID {
        let denied = cancel_failed(UNAVAILABLE);
        assert_eq!(found(Asks::Cancel(target), done("b"), denied, &of_c(true)), by_nobody);
        let unknown = cancel_failed(UNKNOWN);
        assert_eq!(found(Asks::Cancel(target), done("b"), unknown, &of_c(true)), []);
        assert_eq!(found(Asks::Get(target), done("b"), got("b"), &of_c(true)), by_nobody);
    }
    let answers = [("c".into(), vec![done("b")])].into();
    let lost = judged(&commands(Asks::Cancel(Target::Submit(0))), &answers, &of_c(true));
    assert_eq!(lost.broken.into_keys().collect::<Vec<_>>(), [Broken::Lost]);
}

#[test]
fn a_get_tells_of_the_batch_that_it_names() {
    for target in BY_EITHER_ID {
        assert_eq!(found(Asks::Get(target), done("b"), got("b"), &of_c(false)), []);
        let two = [of_c(false), vec![batch("b2", Some("d"))]].concat();
        let answers = [
            ("c".into(), vec![done("b")]),
            ("x".into(), vec![got("b2")]),
            ("d".into(), vec![done("b2")]),
        ];
        let commands = [commands(Asks::Get(target)).to_vec(), vec![submit("d", Expected::Batch)]];
        let other = judged(&commands.concat(), &answers.into(), &two);
        assert_eq!(other.broken.into_keys().collect::<Vec<_>>(), [Broken::FalseSucceeded]);
    }
}

#[test]
fn by_batch_id_it_is_the_batch_that_the_submit_was_answered_with() {
    let two = [of_c(false), vec![batch("b2", Some("c"))]].concat();
    let get = |target, batch_id| found(Asks::Get(target), done("b"), got(batch_id), &two);
    let twice = Broken::DuplicateBatches;
    assert_eq!(get(Target::BatchOf(0), "b"), [twice]);
    assert_eq!(get(Target::BatchOf(0), "b2"), [twice, Broken::FalseSucceeded]);
    assert_eq!(get(Target::Submit(0), "b2"), [twice]);
}

#[test]
fn a_result_that_contradicts_itself_is_false() {
    let get = || Asks::Get(Target::Submit(0));
    let with_code = Answer { error_code: Some(NOT_FOUND.into()), ..got("b") };
    assert_eq!(found(get(), done("b"), with_code, &of_c(false)), [Broken::FalseSucceeded]);
    let says_yes = Answer { body: got("b").body, ..get_failed(NOT_FOUND) };
    assert_eq!(found(get(), done("b"), says_yes, &of_c(false)), [Broken::FalseFailed]);
}

#[test]
fn a_get_finds_nothing_only_before_the_result_or_without_a_batch() {
    let found = |target, c: Answer, late: bool, batches: &[Created]| -> Vec<Broken> {
        let answers = [("c".into(), vec![c]), ("x".into(), vec![get_failed(NOT_FOUND)])].into();
        let evidence = Evidence {
            commands: &commands(Asks::Get(target)),
            confirmed: &[true; 2],
            late: &[false, late],
            answers: &answers,
            batches,
        };
        judge(&evidence).broken.into_keys().collect()
    };
    assert_eq!(found(Target::Submit(0), done("b"), false, &of_c(false)), []);
    assert_eq!(found(Target::Submit(0), done("b"), true, &of_c(false)), [Broken::FalseFailed]);
    for late in [false, true] {
        let by_batch = found(Target::BatchOf(0), done("b"), late, &of_c(false));
        assert_eq!(by_batch, [Broken::FalseFailed]);
    }
    for target in BY_EITHER_ID {
        assert_eq!(found(target, failed(UNAVAILABLE), true, &[]), []);
    }
}

#[test]
fn a_get_does_not_know_only_where_nobody_does() {
    let get = |target, c, batches: &[_]| found(Asks::Get(target), c, get_failed(UNKNOWN), batches);
    assert_eq!(get(Target::Submit(0), failed(UNKNOWN), &[]), []);
    assert_eq!(get(Target::Submit(0), done("b"), &of_c(false)), [Broken::FalseFailed]);
    assert_eq!(get(Target::BatchOf(0), done("b"), &of_c(false)), [Broken::FalseFailed]);
    assert_eq!(get(Target::BatchOf(0), failed(UNKNOWN), &[]), [Broken::FalseFailed]);
}

#[test]
fn nobody_is_not_found() {
    let nobody = Target::Nobody;
    let find = |asks, x| found(asks, done("b"), x, &of_c(false));
    assert_eq!(find(Asks::Cancel(nobody), cancel_failed(NOT_FOUND)), []);
    assert_eq!(find(Asks::Get(nobody), get_failed(NOT_FOUND)), []);
    assert_eq!(find(Asks::Get(nobody), got("b")), [Broken::FalseSucceeded]);
    for code in ["rejected_by_elevenlabs", "unauthorized", "expired", "x"] {
        assert_eq!(find(Asks::Cancel(nobody), cancel_failed(code)), [Broken::FalseFailed]);
        assert_eq!(find(Asks::Get(nobody), get_failed(code)), [Broken::FalseFailed]);
    }
}

#[test]
fn another_result_has_another_id() {
    let commands = commands(Asks::Get(Target::Submit(0)));
    let differing = |x: Vec<Answer>| {
        let answers = [("c".into(), vec![done("b")]), ("x".into(), x)].into();
        judged(&commands, &answers, &of_c(false)).count(Broken::DifferingResults)
    };
    let later = Answer { message_id: "m2".into(), ..got("b") };
    assert_eq!(differing(vec![get_failed(NOT_FOUND), later.clone(), later]), 0);
    assert_eq!(differing(vec![get_failed(NOT_FOUND), got("b")]), 1);
}

#[test]
fn a_result_under_the_key_of_another_kind_is_false() {
    let get = Asks::Get(Target::Submit(0));
    assert_eq!(found(get.clone(), done("b"), done("b"), &of_c(false)), [Broken::FalseFailed]);
    assert_eq!(found(get, done("b"), failed(NOT_FOUND), &of_c(false)), [Broken::FalseFailed]);
}
