//! The judgement: which promises the answers and batches of a soak break. Pure.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::Value;

use crate::plan::{Command, Expected, Looks};

/// The code that says: it may or may not have been done.
const UNKNOWN: &str = "outcome_unknown";

/// One publication of a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The same for every publication of one result.
    pub message_id: String,
    /// Ends with `succeeded` or `failed`.
    pub routing_key: String,
    /// The header of a failure.
    pub error_code: Option<String>,
    /// The envelope.
    pub body: String,
}

/// A batch that was created at the vendor.
#[derive(Clone, Debug)]
pub struct Created {
    /// The vendor's id.
    pub batch_id: String,
    /// The command its recipients name; `None` where they name none, or not all the same.
    pub command_id: Option<String>,
    /// What it has in common with its command.
    pub looks: Looks,
}

/// A promise that was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Broken {
    /// A command that the broker has confirmed, without any result.
    Lost,
    /// More than one batch of one command.
    DuplicateBatches,
    /// «It was done», and there is no such batch.
    FalseSucceeded,
    /// «It was not done», and there is a batch; or a reason that is not true.
    FalseFailed,
    /// Two results of one command that are not the same.
    DifferingResults,
    /// A result or batch of no command, or a batch that is not what its command asked for.
    Stray,
}

impl Broken {
    pub const ALL: [Self; 6] = [
        Self::Lost,
        Self::DuplicateBatches,
        Self::FalseSucceeded,
        Self::FalseFailed,
        Self::DifferingResults,
        Self::Stray,
    ];

    /// Its row in the table.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::DuplicateBatches => "duplicate batches",
            Self::FalseSucceeded => "false succeeded",
            Self::FalseFailed => "false failed",
            Self::DifferingResults => "results that differ for one command",
            Self::Stray => "results or batches nobody asked for",
        }
    }
}

/// What was found.
#[derive(Debug, Default)]
pub struct Findings {
    /// The ids concerned, of commands or, where they belong to none, of batches.
    pub broken: BTreeMap<Broken, Vec<String>>,
    /// Commands answered `outcome_unknown` that have a batch…
    pub unknown_with_batch: usize,
    /// …and that have none.
    pub unknown_without_batch: usize,
    /// Commands by how they were (first) answered: `succeeded` or the error code.
    pub endings: BTreeMap<String, usize>,
}

impl Findings {
    pub fn count(&self, broken: Broken) -> usize {
        self.broken.get(&broken).map_or(0, Vec::len)
    }

    fn add(&mut self, broken: Broken, id: &str) {
        let ids = self.broken.entry(broken).or_default();
        if ids.last().is_none_or(|last| last != id) {
            ids.push(id.to_owned());
        }
    }
}

/// Judges the `commands` (`confirmed` says of each whether the broker has taken it) by all the
/// `answers` that were published and all the `batches` that exist.
pub fn judge(
    commands: &[Command],
    confirmed: &[bool],
    answers: &HashMap<String, Vec<Answer>>,
    batches: &[Created],
) -> Findings {
    let mut findings = Findings::default();
    let known: HashSet<&str> = commands.iter().map(|command| command.id.as_str()).collect();
    let mut of_command: HashMap<&str, Vec<&Created>> = HashMap::new();
    for batch in batches {
        match batch.command_id.as_deref().filter(|id| known.contains(id)) {
            Some(id) => of_command.entry(id).or_default().push(batch),
            None => findings.add(Broken::Stray, &batch.batch_id),
        }
    }
    let mut strangers: Vec<_> = answers.keys().filter(|id| !known.contains(id.as_str())).collect();
    strangers.sort();
    for id in strangers {
        findings.add(Broken::Stray, id);
    }

    for (command, confirmed) in commands.iter().zip(confirmed) {
        let batches = of_command.remove(command.id.as_str()).unwrap_or_default();
        let answers = answers.get(&command.id).map(Vec::as_slice).unwrap_or_default();
        judge_one(&mut findings, command, *confirmed, answers, &batches);
    }
    findings
}

fn judge_one(
    findings: &mut Findings,
    command: &Command,
    confirmed: bool,
    answers: &[Answer],
    batches: &[&Created],
) {
    let id = command.id.as_str();
    if batches.len() > 1 {
        findings.add(Broken::DuplicateBatches, id);
    }
    if batches.iter().any(|batch| batch.looks != command.looks) {
        findings.add(Broken::Stray, id);
    }
    let Some(first) = answers.first() else {
        if confirmed {
            findings.add(Broken::Lost, id);
        }
        return;
    };
    if answers.iter().any(|answer| answer != first) {
        findings.add(Broken::DifferingResults, id);
    }
    for answer in answers {
        if answer.says_done() {
            if !is_true_success(answer, command.expected, batches) {
                findings.add(Broken::FalseSucceeded, id);
            }
        } else if !is_true_failure(answer, command.expected, batches) {
            findings.add(Broken::FalseFailed, id);
        }
    }
    let ending = match &first.error_code {
        Some(code) => code.as_str(),
        None => "succeeded",
    };
    *findings.endings.entry(ending.to_owned()).or_default() += 1;
    if ending == UNKNOWN && batches.is_empty() {
        findings.unknown_without_batch += 1;
    } else if ending == UNKNOWN {
        findings.unknown_with_batch += 1;
    }
}

impl Answer {
    fn says_done(&self) -> bool {
        self.routing_key.ends_with(".succeeded")
    }
}

fn is_true_success(answer: &Answer, expected: Expected, batches: &[&Created]) -> bool {
    let body: Value = serde_json::from_str(&answer.body).unwrap_or_default();
    expected == Expected::Batch
        && answer.error_code.is_none()
        && body["success"] == true
        && batches.iter().any(|batch| body["data"]["id"] == batch.batch_id.as_str())
}

fn is_true_failure(answer: &Answer, expected: Expected, batches: &[&Created]) -> bool {
    let body: Value = serde_json::from_str(&answer.body).unwrap_or_default();
    let code = answer.error_code.as_deref().unwrap_or_default();
    let may_be = match (expected, code) {
        (Expected::Invalid, code) => code == "invalid_command",
        (Expected::NotFound, code) => {
            ["not_found", "upstream_unavailable", UNKNOWN].contains(&code)
        }
        (Expected::Batch, code) => ["upstream_unavailable", UNKNOWN].contains(&code),
    };
    // Any other code says that there is none.
    let denies_nothing = code == UNKNOWN || batches.is_empty();
    may_be && body["success"] == false && denies_nothing
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn looks() -> Looks {
        Looks { name: "n".into(), agent: "a".into(), numbers: vec!["+14155550100".into()] }
    }

    fn batch(batch_id: &str, command: Option<&str>) -> Created {
        Created {
            batch_id: batch_id.into(),
            command_id: command.map(str::to_owned),
            looks: looks(),
        }
    }

    fn done(batch_id: &str) -> Answer {
        Answer {
            message_id: "m".into(),
            routing_key: "batch-calling.submit.succeeded".into(),
            error_code: None,
            body: json!({"success": true, "data": {"id": batch_id}}).to_string(),
        }
    }

    fn failed(code: &str) -> Answer {
        Answer {
            message_id: "m".into(),
            routing_key: "batch-calling.submit.failed".into(),
            error_code: Some(code.into()),
            body: json!({"success": false, "error": "why"}).to_string(),
        }
    }

    /// What is found about one command, "c".
    fn found_of(expected: Expected, answers: Vec<Answer>, batches: &[Created]) -> Vec<Broken> {
        let command = Command { id: "c".into(), body: Vec::new(), expected, looks: looks() };
        let answers = if answers.is_empty() {
            HashMap::new()
        } else {
            HashMap::from([("c".into(), answers)])
        };
        judge(&[command], &[true], &answers, batches).broken.into_keys().collect()
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
    }

    #[test]
    fn a_command_without_a_result_is_lost_once_the_broker_had_it() {
        assert_eq!(found(vec![], &[]), [Broken::Lost]);
        assert_eq!(found(vec![], &[batch("b", Some("c"))]), [Broken::Lost]);
        let command =
            Command { id: "c".into(), body: Vec::new(), expected: Expected::Batch, looks: looks() };
        assert_eq!(judge(&[command], &[false], &HashMap::new(), &[]).count(Broken::Lost), 0);
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
        for code in ["invalid_command", "not_found", "rejected_by_elevenlabs", "unauthorized", "x"]
        {
            assert_eq!(found(vec![failed(code)], &[]), [Broken::FalseFailed], "{code}");
        }
        let without_code = Answer { error_code: None, ..failed("x") };
        assert_eq!(found(vec![without_code], &[]), [Broken::FalseFailed]);
        let says_yes = Answer { body: done("b").body, ..failed("outcome_unknown") };
        assert_eq!(found(vec![says_yes], &one), [Broken::FalseFailed]);
        for expected in [Expected::Invalid, Expected::NotFound] {
            let code = if expected == Expected::Invalid { "invalid_command" } else { "not_found" };
            assert_eq!(found_of(expected, vec![failed(code)], &one), [Broken::FalseFailed]);
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
        assert_eq!(judge(&[], &[], &answers, &[]).count(Broken::Stray), 1);
    }

    #[test]
    fn unknown_outcomes_are_counted_by_what_they_hide() {
        let commands = ["c", "d"].map(|id| Command {
            id: id.into(),
            body: Vec::new(),
            expected: Expected::Batch,
            looks: looks(),
        });
        let answers = commands
            .each_ref()
            .map(|command| (command.id.clone(), vec![failed("outcome_unknown")]))
            .into();
        let findings = judge(&commands, &[true, true], &answers, &[batch("b", Some("c"))]);
        assert_eq!((findings.unknown_with_batch, findings.unknown_without_batch), (1, 1));
        assert_eq!(findings.endings["outcome_unknown"], 2);
    }
}
