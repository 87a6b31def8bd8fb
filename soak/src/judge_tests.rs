//! What the judge finds in answers and batches, and what it lets pass.

use serde_json::json;

use super::*;
use crate::plan::Expected;

pub fn looks() -> Looks {
    Looks { name: "n".into(), agent: "a".into(), numbers: vec!["+14155550100".into()] }
}

pub fn command(id: &str, asks: Asks) -> Command {
    Command { id: id.into(), asks, body: Vec::new(), not_after: None }
}

pub fn submit(id: &str, expected: Expected) -> Command {
    command(id, Asks::Submit { expected, looks: looks() })
}

pub fn batch(batch_id: &str, command: Option<&str>) -> Created {
    Created {
        batch_id: batch_id.into(),
        command_id: command.map(str::to_owned),
        cancelled: false,
        looks: looks(),
    }
}

pub fn done(batch_id: &str) -> Answer {
    Answer {
        message_id: "m".into(),
        routing_key: "batch-calling.submit.succeeded".into(),
        error_code: None,
        body: json!({"success": true, "data": {"id": batch_id}}).to_string(),
    }
}

pub fn failed(code: &str) -> Answer {
    Answer {
        message_id: "m".into(),
        routing_key: "batch-calling.submit.failed".into(),
        error_code: Some(code.into()),
        body: json!({"success": false, "error": "why"}).to_string(),
    }
}

/// What is found about commands that were all confirmed, and sent before any result was there.
pub fn judged(
    commands: &[Command],
    answers: &HashMap<String, Vec<Answer>>,
    batches: &[Created],
) -> Findings {
    let (confirmed, late) = (vec![true; commands.len()], vec![false; commands.len()]);
    judge(&Evidence { commands, confirmed: &confirmed, late: &late, answers, batches })
}

/// What is found about one command, "c".
fn found_of(expected: Expected, answers: Vec<Answer>, batches: &[Created]) -> Vec<Broken> {
    let answers =
        if answers.is_empty() { HashMap::new() } else { HashMap::from([("c".into(), answers)]) };
    judged(&[submit("c", expected)], &answers, batches).broken.into_keys().collect()
}

fn found(answers: Vec<Answer>, batches: &[Created]) -> Vec<Broken> {
    found_of(Expected::Batch, answers, batches)
}

#[test]
fn what_is_as_promised_is_not_held_against_anybody() {
    let one = [batch("b", Some("c"))];
    assert_eq!(found(vec![done("b")], &one), []);
    assert_eq!(found(vec![done("b"), done("b")], &one), []);
    assert_eq!(found(vec![failed("outcome_unknown")], &one), []);
    assert_eq!(found(vec![failed("outcome_unknown")], &[]), []);
    assert_eq!(found(vec![failed("upstream_unavailable")], &[]), []);
    assert_eq!(found_of(Expected::Invalid, vec![failed("invalid_command")], &[]), []);
    assert_eq!(found_of(Expected::NotFound, vec![failed("not_found")], &[]), []);
    assert_eq!(found_of(Expected::NotFound, vec![failed("outcome_unknown")], &[]), []);
    assert_eq!(found_of(Expected::Expired, vec![failed("expired")], &[]), []);
}

#[test]
fn a_command_without_a_result_is_lost_once_the_broker_had_it() {
    assert_eq!(found(vec![], &[]), [Broken::Lost]);
    assert_eq!(found(vec![], &[batch("b", Some("c"))]), [Broken::Lost]);
    let evidence = Evidence {
        commands: &[submit("c", Expected::Batch)],
        confirmed: &[false],
        late: &[false],
        answers: &HashMap::new(),
        batches: &[],
    };
    assert_eq!(judge(&evidence).count(Broken::Lost), 0);
}

#[test]
fn a_second_batch_is_found_whatever_was_answered() {
    let two = [batch("b", Some("c")), batch("b2", Some("c"))];
    assert_eq!(found(vec![done("b")], &two), [Broken::DuplicateBatches]);
    assert_eq!(found(vec![failed("outcome_unknown")], &two), [Broken::DuplicateBatches]);
    assert_eq!(found(vec![], &two), [Broken::Lost, Broken::DuplicateBatches]);
}

#[test]
fn a_success_without_its_batch_is_false() {
    assert_eq!(found(vec![done("b")], &[]), [Broken::FalseSucceeded]);
    assert_eq!(found(vec![done("x")], &[batch("b", Some("c"))]), [Broken::FalseSucceeded]);
    let says_no = Answer { body: failed("x").body, ..done("b") };
    assert_eq!(found(vec![says_no], &[batch("b", Some("c"))]), [Broken::FalseSucceeded]);
    let with_code = Answer { error_code: Some("not_found".into()), ..done("b") };
    assert_eq!(found(vec![with_code], &[batch("b", Some("c"))]), [Broken::FalseSucceeded]);
    let invalid = found_of(Expected::Invalid, vec![done("b")], &[batch("b", Some("c"))]);
    assert_eq!(invalid, [Broken::FalseSucceeded]);
}

#[test]
fn a_failure_that_denies_a_batch_or_names_a_wrong_reason_is_false() {
    let one = [batch("b", Some("c"))];
    assert_eq!(found(vec![failed("upstream_unavailable")], &one), [Broken::FalseFailed]);
    for code in [
        "invalid_command",
        "not_found",
        "rejected_by_elevenlabs",
        "unauthorized",
        "expired",
        "cancelled_before_submit",
        "x",
    ] {
        assert_eq!(found(vec![failed(code)], &[]), [Broken::FalseFailed], "{code}");
    }
    let without_code = Answer { error_code: None, ..failed("x") };
    assert_eq!(found(vec![without_code], &[]), [Broken::FalseFailed]);
    let of_a_get = Answer { routing_key: "batch-calling.get.failed".into(), ..failed(UNKNOWN) };
    assert_eq!(found(vec![of_a_get], &one), [Broken::FalseFailed]);
    let says_yes = Answer { body: done("b").body, ..failed("outcome_unknown") };
    assert_eq!(found(vec![says_yes], &one), [Broken::FalseFailed]);
    for (expected, code) in [
        (Expected::Invalid, "invalid_command"),
        (Expected::NotFound, "not_found"),
        (Expected::Expired, "expired"),
    ] {
        assert_eq!(found_of(expected, vec![failed(code)], &one), [Broken::FalseFailed]);
        assert_eq!(found_of(expected, vec![done("b")], &one), [Broken::FalseSucceeded]);
        let other = vec![failed("rejected_by_elevenlabs")];
        assert_eq!(found_of(expected, other, &[]), [Broken::FalseFailed]);
    }
}

#[test]
fn two_results_that_are_not_the_same_are_found() {
    let one = [batch("b", Some("c"))];
    let unknown_then_done = vec![failed("outcome_unknown"), done("b")];
    assert_eq!(found(unknown_then_done, &one), [Broken::DifferingResults]);
    let other_id = Answer { message_id: "m2".into(), ..done("b") };
    assert_eq!(found(vec![done("b"), other_id], &one), [Broken::DifferingResults]);
    let other_body = Answer { body: format!("{} ", done("b").body), ..done("b") };
    assert_eq!(found(vec![done("b"), other_body], &one), [Broken::DifferingResults]);
}

#[test]
fn what_nobody_asked_for_is_found() {
    let one = batch("b", Some("c"));
    for stranger in [batch("b2", None), batch("b2", Some("other"))] {
        assert_eq!(found(vec![done("b")], &[one.clone(), stranger]), [Broken::Stray]);
    }
    let altered = Created { looks: Looks::default(), ..one };
    assert_eq!(found(vec![done("b")], &[altered]), [Broken::Stray]);
    let answers = HashMap::from([("other".to_owned(), vec![done("b")])]);
    assert_eq!(judged(&[], &answers, &[]).count(Broken::Stray), 1);
}

#[test]
fn unknown_outcomes_are_counted_by_what_they_hide() {
    let commands = ["c", "d"].map(|id| submit(id, Expected::Batch));
    let answers = commands
        .each_ref()
        .map(|command| (command.id.clone(), vec![failed("outcome_unknown")]))
        .into();
    let findings = judged(&commands, &answers, &[batch("b", Some("c"))]);
    assert_eq!((findings.unknown_with_batch, findings.unknown_without_batch), (1, 1));
    assert_eq!(findings.endings["outcome_unknown"], 2);
}

/// What is found about so many commands without a batch, of which the first are answered with `code`
/// and the others are not answered at all.
fn found_among(all: usize, answered: usize, code: &str, expected: Expected) -> usize {
    let commands: Vec<_> = (0..all).map(|n| submit(&n.to_string(), expected)).collect();
    let answers = commands[..answered].iter().map(|c| (c.id.clone(), vec![failed(code)])).collect();
    judged(&commands, &answers, &[]).count(Broken::KnowsTooLittle)
}

#[test]
fn answers_that_are_always_allowed_are_found_where_there_are_too_many() {
    for code in ["outcome_unknown", "upstream_unavailable"] {
        for expected in [Expected::Batch, Expected::NotFound] {
            assert_eq!(found_among(200, 2, code, expected), 0, "{code}");
            assert_eq!(found_among(200, 3, code, expected), 3, "{code}");
            assert_eq!(found_among(201, 3, code, expected), 0, "{code}");
            assert_eq!(found_among(201, 201, code, expected), 201, "{code}");
        }
    }
    assert_eq!(found_among(200, 200, "not_found", Expected::NotFound), 0);
}
