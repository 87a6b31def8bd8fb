//! What the results of a submit promise.

use call_manager::domain::command::CommandKind;

use super::{Answer, Broken, Cases, Findings, NOT_FOUND, UNAVAILABLE, UNKNOWN};
use crate::plan::{Asks, Expected, Looks, Target};

const KIND: CommandKind = CommandKind::Submit;

/// What the cancels by command id say of a submit.
#[derive(Clone, Copy, Default)]
struct Cancels {
    /// There is one that was sent before the submit had its result.
    asked: bool,
    /// «There is no batch of it», which holds from then on.
    denied: bool,
}

pub fn judge(
    findings: &mut Findings,
    cases: &Cases,
    at: usize,
    (expected, looks): (Expected, &Looks),
) {
    let id = cases.evidence.commands[at].id.as_str();
    let batches = &cases.batches[at];
    if batches.len() > 1 {
        findings.add(Broken::DuplicateBatches, id);
    }
    if batches.iter().any(|batch| batch.looks != *looks) {
        findings.add(Broken::Stray, id);
    }
    let cancels = cancels(cases, at);
    for answer in cases.answers(at) {
        if answer.says_done(KIND) {
            let told = answer.batch_id();
            let there = batches.iter().any(|batch| told.as_ref() == Some(&batch.batch_id));
            if expected != Expected::Batch || !answer.is_success() || !there {
                findings.add(Broken::FalseSucceeded, id);
            }
        } else {
            // Any other code says that there is none.
            let denies_nothing = answer.is(UNKNOWN) || batches.is_empty();
            if !answer.is_failure(KIND) || !may_be(answer, expected, cancels) || !denies_nothing {
                findings.add(Broken::FalseFailed, id);
            }
        }
    }
    if cases.answers(at).first().is_some_and(|first| first.is(UNKNOWN)) {
        findings.unknown_without_batch += usize::from(batches.is_empty());
        findings.unknown_with_batch += usize::from(!batches.is_empty());
    }
}

fn cancels(cases: &Cases, at: usize) -> Cancels {
    let mut cancels = Cancels::default();
    for cancel in &cases.cancels[at] {
        if matches!(cases.evidence.commands[*cancel].asks, Asks::Cancel(Target::Submit(_))) {
            cancels.asked |= !cases.evidence.late[*cancel];
            cancels.denied |= cases.answers(*cancel).iter().any(|answer| answer.is(NOT_FOUND));
        }
    }
    cancels
}

/// Whether the reason can be true.
fn may_be(answer: &Answer, expected: Expected, cancels: Cancels) -> bool {
    match (expected, answer.error_code.as_deref().unwrap_or_default()) {
        (Expected::Invalid, code) => code == "invalid_command",
        (_, "cancelled_before_submit") => cancels.asked,
        (Expected::Expired, code) => code == "expired",
        // Somebody knew.
        (_, UNKNOWN) => !cancels.denied,
        (Expected::NotFound, code) => [NOT_FOUND, UNAVAILABLE].contains(&code),
        (Expected::Batch, code) => code == UNAVAILABLE,
    }
}
