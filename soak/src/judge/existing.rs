//! What the results of cancels and gets promise.

use call_manager::domain::command::CommandKind;

use super::{Answer, Broken, Cases, Created, Findings, NOT_FOUND, UNAVAILABLE, UNKNOWN};
use crate::plan::Target;

pub fn judge(findings: &mut Findings, cases: &Cases, at: usize, target: Target) {
    let command = &cases.evidence.commands[at];
    let batches = named(cases, target);
    for answer in cases.answers(at) {
        if answer.says_done(command.kind()) {
            if !is_true_success(answer, command.kind(), &batches) {
                findings.add(Broken::FalseSucceeded, &command.id);
            }
        } else if !answer.is_failure(command.kind()) || !may_be(answer, cases, at, target) {
            findings.add(Broken::FalseFailed, &command.id);
        }
    }
}

/// Every cancelled batch has to have a cancel that owns up to it, or does not know. One without a result
/// may have been it, too.
pub fn judge_cancelled(findings: &mut Findings, cases: &Cases) {
    let owns_up = |cancel: &usize| {
        let answers = cases.answers(*cancel);
        let yes = |answer: &Answer| answer.says_done(CommandKind::Cancel) || answer.is(UNKNOWN);
        answers.is_empty() || answers.iter().any(yes)
    };
    for (batches, cancels) in cases.batches.iter().zip(&cases.cancels) {
        for batch in batches.iter().filter(|batch| batch.cancelled) {
            if !cancels.iter().any(owns_up) {
                findings.add(Broken::CancelledByNobody, &batch.batch_id);
            }
        }
    }
}

/// The batches that it can be about.
fn named<'a>(cases: &Cases<'a>, target: Target) -> Vec<&'a Created> {
    match target {
        Target::Submit(submit) => cases.batches[submit].clone(),
        Target::BatchOf(submit) => {
            // It was sent with this id, or with that of nobody.
            let told = cases.answers(submit).first().and_then(Answer::batch_id);
            let batches = cases.batches[submit].iter().copied();
            batches.filter(|batch| told.as_ref() == Some(&batch.batch_id)).collect()
        }
        Target::Nobody => Vec::new(),
    }
}

fn is_true_success(answer: &Answer, kind: CommandKind, batches: &[&Created]) -> bool {
    let told = answer.batch_id();
    let batch = batches.iter().find(|batch| told.as_ref() == Some(&batch.batch_id));
    let is_cancelled = |batch: &Created| {
        // For ever: nobody takes it back.
        batch.cancelled && answer.envelope()["data"]["status"] == "cancelled"
    };
    answer.is_success() && batch.is_some_and(|b| kind == CommandKind::Get || is_cancelled(b))
}

/// Whether the reason can be true.
fn may_be(answer: &Answer, cases: &Cases, at: usize, target: Target) -> bool {
    let is_get = cases.evidence.commands[at].kind() == CommandKind::Get;
    let is_by_command = matches!(target, Target::Submit(_));
    match answer.error_code.as_deref().unwrap_or_default() {
        // A get changes nothing, so it knows, but for a submit of which nobody does.
        UNKNOWN if is_get => {
            let submit = target.submit().filter(|_| is_by_command);
            let answers = submit.map(|submit| cases.answers(submit)).unwrap_or_default();
            answers.iter().any(|answer| answer.is(UNKNOWN))
        }
        UNAVAILABLE | UNKNOWN => true,
        // A cancel strikes the submit out for good. A get says what is, and the batch may come later.
        NOT_FOUND => {
            let may_come = is_get && is_by_command && !cases.evidence.late[at];
            may_come || named(cases, target).is_empty()
        }
        _ => false,
    }
}

#[cfg(test)]
#[path = "existing_tests.rs"]
mod tests;
