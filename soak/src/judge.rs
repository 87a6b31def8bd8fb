//! The judgement: which promises the answers and batches of a soak break. Pure.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::Value;

use crate::plan::{Command, Expected, Looks};

/// The code that says: it may or may not have been done.
const UNKNOWN: &str = "outcome_unknown";
/// The code that says: it could not be done, and surely was not.
const UNAVAILABLE: &str = "upstream_unavailable";

/// One in so many commands may be answered with each of these two, rounded up. A worker that answers
/// nothing else never lies, and is of no use. Every fault of a soak is shorter than the workers'
/// `RETRY_HORIZON`, so that soaks of 10,000 commands had none of either; one in a hundred leaves room for
/// a list that could not be read at the wrong moments. A worker that does not search for lost batches has
/// nine in a hundred.
const ONE_MAY_NOT_KNOW_OF: usize = 100;

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
    /// «Nobody knows» or «it could not be done», more often than the faults explain.
    KnowsTooLittle,
}

impl Broken {
    pub const ALL: [Self; 7] = [
        Self::Lost,
        Self::DuplicateBatches,
        Self::FalseSucceeded,
        Self::FalseFailed,
        Self::DifferingResults,
        Self::Stray,
        Self::KnowsTooLittle,
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
            Self::KnowsTooLittle => "answers that know too little",
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
    judge_knowledge(&mut findings, commands, answers);
    findings
}

/// Of each answer that is always allowed, whether there are too many.
fn judge_knowledge(
    findings: &mut Findings,
    commands: &[Command],
    answers: &HashMap<String, Vec<Answer>>,
) {
    let valid: Vec<_> =
        commands.iter().filter(|command| command.expected != Expected::Invalid).collect();
    for code in [UNKNOWN, UNAVAILABLE] {
        let says_so = |command: &&&Command| {
            let first = answers.get(&command.id).and_then(|answers| answers.first());
            first.is_some_and(|answer| answer.error_code.as_deref() == Some(code))
        };
        let so_answered: Vec<_> = valid.iter().filter(says_so).collect();
        if so_answered.len() > valid.len().div_ceil(ONE_MAY_NOT_KNOW_OF) {
            for command in so_answered {
                findings.add(Broken::KnowsTooLittle, &command.id);
            }
        }
    }
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
        (Expected::NotFound, code) => ["not_found", UNAVAILABLE, UNKNOWN].contains(&code),
        (Expected::Expired, code) => code == "expired",
        (Expected::Batch, code) => [UNAVAILABLE, UNKNOWN].contains(&code),
    };
    // Any other code says that there is none.
    let denies_nothing = code == UNKNOWN || batches.is_empty();
    may_be && body["success"] == false && denies_nothing
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
