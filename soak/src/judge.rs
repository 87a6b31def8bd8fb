//! The judgement: which promises the answers and batches of a soak break. Pure.

mod existing;
mod submits;

use std::collections::{BTreeMap, HashMap};

use call_manager::domain::command::CommandKind;
use serde_json::Value;

use crate::plan::{Asks, Command, Looks, Target};

/// The code that says: it may or may not have been done.
const UNKNOWN: &str = "outcome_unknown";
/// The code that says: it could not be done, and surely was not.
const UNAVAILABLE: &str = "upstream_unavailable";
/// The code that says: there is no such thing.
const NOT_FOUND: &str = "not_found";

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
    /// Whether it is cancelled in the end.
    pub cancelled: bool,
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
    /// «It was done», and there is no such batch, or it is not cancelled.
    FalseSucceeded,
    /// «It was not done», and there is a batch; or a reason that is not true.
    FalseFailed,
    /// A cancelled batch, and whoever may have cancelled it was told that it was not done.
    CancelledByNobody,
    /// Two results of one submit, or under one `message_id`, that are not the same.
    DifferingResults,
    /// A result or batch of no command, or a batch that is not what its command asked for.
    Stray,
    /// «Nobody knows» or «it could not be done», more often than the faults explain.
    KnowsTooLittle,
}

impl Broken {
    pub const ALL: [Self; 8] = [
        Self::Lost,
        Self::DuplicateBatches,
        Self::FalseSucceeded,
        Self::FalseFailed,
        Self::CancelledByNobody,
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
            Self::CancelledByNobody => "batches cancelled by nobody",
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
    /// Submits answered `outcome_unknown` that have a batch…
    pub unknown_with_batch: usize,
    /// …and that have none.
    pub unknown_without_batch: usize,
    /// Commands by how they were (first) answered: `succeeded` or the error code, behind the kind of those
    /// that are no submits.
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

/// What there is to judge by.
pub struct Evidence<'a> {
    pub commands: &'a [Command],
    /// Of each command, whether the broker has taken it.
    pub confirmed: &'a [bool],
    /// Of each command, whether the submit that it names had its result before it was sent.
    pub late: &'a [bool],
    /// All that were published, by command id.
    pub answers: &'a HashMap<String, Vec<Answer>>,
    /// All that exist.
    pub batches: &'a [Created],
}

/// The same, sorted.
struct Cases<'a> {
    evidence: &'a Evidence<'a>,
    /// Of each command.
    batches: Vec<Vec<&'a Created>>,
    /// Those that name each command, by either id.
    cancels: Vec<Vec<usize>>,
}

impl<'a> Cases<'a> {
    /// What belongs to no command is found on the way.
    fn new(evidence: &'a Evidence<'a>, findings: &mut Findings) -> Self {
        let commands = evidence.commands;
        let ids = commands.iter().map(|command| command.id.as_str());
        let positions: HashMap<_, _> = ids.zip(0..).collect();
        let mut batches = vec![Vec::new(); commands.len()];
        for batch in evidence.batches {
            let id = batch.command_id.as_deref();
            match id.and_then(|id| positions.get(id).copied()) {
                Some(at) if commands[at].kind() == CommandKind::Submit => batches[at].push(batch),
                _ => findings.add(Broken::Stray, &batch.batch_id),
            }
        }
        let mut strangers: Vec<_> =
            evidence.answers.keys().filter(|id| !positions.contains_key(id.as_str())).collect();
        strangers.sort();
        for id in strangers {
            findings.add(Broken::Stray, id);
        }
        let mut cancels = vec![Vec::new(); commands.len()];
        for (at, command) in commands.iter().enumerate() {
            if let Asks::Cancel(Target::Submit(submit) | Target::BatchOf(submit)) = command.asks {
                cancels[submit].push(at);
            }
        }
        Self { evidence, batches, cancels }
    }

    fn answers(&self, command: usize) -> &'a [Answer] {
        let id = &self.evidence.commands[command].id;
        self.evidence.answers.get(id).map(Vec::as_slice).unwrap_or_default()
    }
}

/// Judges everything.
pub fn judge(evidence: &Evidence) -> Findings {
    let mut findings = Findings::default();
    let cases = Cases::new(evidence, &mut findings);
    for (at, command) in evidence.commands.iter().enumerate() {
        judge_results(&mut findings, &cases, at);
        match &command.asks {
            Asks::Submit { expected, looks } => {
                submits::judge(&mut findings, &cases, at, (*expected, looks));
            }
            Asks::Cancel(target) | Asks::Get(target) => {
                existing::judge(&mut findings, &cases, at, *target);
            }
        }
    }
    existing::judge_cancelled(&mut findings, &cases);
    judge_knowledge(&mut findings, &cases);
    findings
}

/// What is to be demanded of the results of any command.
fn judge_results(findings: &mut Findings, cases: &Cases, at: usize) {
    let command = &cases.evidence.commands[at];
    let (kind, answers) = (command.kind(), cases.answers(at));
    let Some(first) = answers.first() else {
        if cases.evidence.confirmed[at] {
            findings.add(Broken::Lost, &command.id);
        }
        return;
    };
    // To cancel or to read again may end in another way: then it is another result.
    let differs = |(n, answer): (usize, &Answer)| {
        let same =
            |other: &&Answer| kind == CommandKind::Submit || other.message_id == answer.message_id;
        answers[..n].iter().find(same).is_some_and(|other| other != answer)
    };
    if answers.iter().enumerate().any(differs) {
        findings.add(Broken::DifferingResults, &command.id);
    }
    let code = first.error_code.as_deref().unwrap_or("succeeded");
    let ending = match kind {
        CommandKind::Submit => code.to_owned(),
        kind => format!("{kind} {code}"),
    };
    *findings.endings.entry(ending).or_default() += 1;
}

/// Of each answer that is always allowed, whether there are too many.
fn judge_knowledge(findings: &mut Findings, cases: &Cases) {
    let commands = cases.evidence.commands;
    let valid: Vec<_> = (0..commands.len()).filter(|at| !commands[*at].is_invalid()).collect();
    for code in [UNKNOWN, UNAVAILABLE] {
        let says_so = |at: &&usize| cases.answers(**at).first().is_some_and(|first| first.is(code));
        let so_answered: Vec<_> = valid.iter().filter(says_so).collect();
        if so_answered.len() > valid.len().div_ceil(ONE_MAY_NOT_KNOW_OF) {
            for at in so_answered {
                findings.add(Broken::KnowsTooLittle, &commands[*at].id);
            }
        }
    }
}

impl Answer {
    /// Whether it says that a command of this kind was done…
    fn says_done(&self, kind: CommandKind) -> bool {
        self.routing_key == format!("{}.succeeded", kind.routing_key())
    }

    /// …and whether everything else in it says so too.
    fn is_success(&self) -> bool {
        self.error_code.is_none() && self.envelope()["success"] == true
    }

    /// Whether everything in it says that a command of this kind was not done.
    fn is_failure(&self, kind: CommandKind) -> bool {
        self.routing_key == format!("{}.failed", kind.routing_key())
            && self.error_code.is_some()
            && self.envelope()["success"] == false
    }

    fn is(&self, code: &str) -> bool {
        self.error_code.as_deref() == Some(code)
    }

    fn envelope(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_default()
    }

    /// The batch that it tells of.
    pub fn batch_id(&self) -> Option<String> {
        Some(self.envelope()["data"]["id"].as_str()?.to_owned())
    }
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
