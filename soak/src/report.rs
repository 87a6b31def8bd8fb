//! What a person reads: a line of progress, the table at the end, and the cases behind its numbers.

use std::fmt::{Display, Write as _};
use std::io::Write as _;

use crate::book::{Book, Record};
use crate::chaos::{
    BROKER_KILLED, BROKER_RESTARTED, CONNECTIONS_CLOSED, POSTGRES_KILLED, POSTGRES_RESTARTED,
};
use crate::crew::{DIED, KILLED, PAUSED, STOPPED, STOPPED_BADLY};
use crate::judge::{Broken, Created, Findings};
use crate::options::Options;
use crate::plan::{Command, Plan};
use crate::quota::quotas;
use crate::vendor::Happened;

/// How many cases of a broken promise are shown.
const CASES: usize = 3;
/// Bytes of a result's body that are shown.
const BODY_SHOWN: usize = 300;

/// Messages that lie where none should, after everything has stopped.
pub struct Leftovers {
    /// In the queues of commands: fresh ones, those that are to be retried, those that are delayed, and
    /// those under a routing key that names no command.
    pub commands: u64,
    /// Given up on by the broker: commands that are lost.
    pub dead_letters: u64,
    /// Results for which no queue was bound, although one always is.
    pub unrouted: u64,
}

/// What a report is about.
pub struct Soak<'a> {
    pub options: &'a Options,
    pub plan: &'a Plan,
    pub record: &'a Record,
    pub batches: &'a [Created],
    pub leftovers: &'a Leftovers,
}

/// One line.
pub fn progress(book: &Book, plan: &Plan, batches: usize) -> anyhow::Result<()> {
    let (numbers, events) = (book.numbers(), book.events());
    let times = |words: &[&str]| -> u32 {
        let chosen =
            events.iter().filter(|(event, _)| words.iter().any(|word| event.contains(word)));
        chosen.map(|(_, times)| times).sum()
    };
    writeln!(
        std::io::stderr(),
        "{:4}s  sent {} of {}, answered {}, batches {batches}; workers: {} killed, {} stopped, {} \
         paused, {} died; broker: {} restarts, {} times all connections closed; PostgreSQL: {} restarts",
        book.elapsed().as_secs(),
        numbers.confirmed,
        plan.commands.len(),
        numbers.answered,
        times(&[KILLED]),
        times(&[STOPPED]),
        times(&[PAUSED]),
        times(&[DIED]),
        times(&[BROKER_RESTARTED, BROKER_KILLED]),
        times(&[CONNECTIONS_CLOSED]),
        times(&[POSTGRES_RESTARTED, POSTGRES_KILLED]),
    )?;
    Ok(())
}

/// Prints everything; whether every promise was kept, and enough went wrong for that to mean something.
pub fn print(soak: &Soak, findings: &Findings, happened: &Happened) -> anyhow::Result<bool> {
    let mut text = String::new();
    numbers(&mut text, soak, findings)?;
    let broken = promises(&mut text, soak, findings)?;
    let unmet = faults(&mut text, soak, happened)?;
    events(&mut text, soak, happened)?;
    if !findings.broken.is_empty() {
        cases(&mut text, soak, findings)?;
    }
    let verdict = match broken {
        0 if unmet > 0 => "No promise was broken, but the soak dealt too few faults.".to_owned(),
        0 => "Every promise was kept.".to_owned(),
        1 => "1 promise was broken.".to_owned(),
        more => format!("{more} promises were broken."),
    };
    writeln!(text, "\n{verdict}")?;
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(broken == 0 && unmet == 0)
}

fn row(text: &mut String, name: &str, value: impl Display) -> std::fmt::Result {
    writeln!(text, "  {name:46} {value:>9}")
}

/// Writes how far it came.
fn numbers(text: &mut String, soak: &Soak, findings: &Findings) -> anyhow::Result<()> {
    let (options, numbers) = (soak.options, soak.record.numbers);
    let s = if options.workers == 1 { "" } else { "s" };
    writeln!(
        text,
        "\nseed {}, {} commands, {} worker{s}",
        options.seed, options.commands, options.workers
    )?;
    row(text, "sent", numbers.confirmed)?;
    row(text, "  publications of them", numbers.publications)?;
    row(text, "results (commands answered)", numbers.answered)?;
    row(text, "  publications of them", numbers.results)?;
    for (ending, times) in &findings.endings {
        row(text, &format!("  {ending}"), times)?;
    }
    row(text, "  outcome_unknown, and there is a batch", findings.unknown_with_batch)?;
    row(text, "  outcome_unknown, and there is none", findings.unknown_without_batch)?;
    row(text, "batches", soak.batches.len())?;
    row(text, "drain time", format!("{:.1} s", soak.record.drain.as_secs_f64()))?;
    Ok(())
}

/// Writes how often each promise was broken; how many were.
fn promises(text: &mut String, soak: &Soak, findings: &Findings) -> anyhow::Result<usize> {
    let (record, leftovers) = (soak.record, soak.leftovers);
    let event = |name: &str| u64::from(record.events.get(name).copied().unwrap_or_default());
    let mut promises: Vec<(&str, u64)> = Vec::new();
    for broken in Broken::ALL {
        promises.push((broken.name(), u64::try_from(findings.count(broken))?));
    }
    promises.extend([
        ("commands the broker gave up on", leftovers.dead_letters),
        ("commands left in their queues", leftovers.commands),
        ("results without a queue", leftovers.unrouted),
        (DIED, event(DIED)),
        (STOPPED_BADLY, event(STOPPED_BADLY)),
        // Without this row a broker that takes nothing would look like a clean soak.
        (
            "commands that could not be sent",
            u64::try_from(soak.plan.commands.len() - record.numbers.confirmed)?,
        ),
    ]);
    writeln!(text, "promises, and how often each was broken")?;
    for (name, times) in &promises {
        let mark = if *times > 0 { "  BROKEN" } else { "" };
        writeln!(text, "  {name:46} {times:>9}{mark}")?;
    }
    Ok(promises.iter().filter(|(_, times)| *times > 0).count())
}

/// Writes how often what was to go wrong went wrong; of how many kinds it was too little.
fn faults(text: &mut String, soak: &Soak, happened: &Happened) -> anyhow::Result<usize> {
    let quotas = quotas(soak.options, &soak.record.events, happened);
    if !quotas.is_empty() {
        writeln!(text, "faults dealt{:36} {:>9} {:>9}", "", "times", "at least")?;
    }
    for quota in &quotas {
        let mark = if quota.is_met() { "" } else { "  TOO FEW" };
        writeln!(text, "  {:46} {:>9} {:>9}{mark}", quota.what, quota.happened, quota.least)?;
    }
    Ok(quotas.iter().filter(|quota| !quota.is_met()).count())
}

/// Writes everything else that happened.
fn events(text: &mut String, soak: &Soak, happened: &Happened) -> anyhow::Result<()> {
    writeln!(text, "what happened to processes and connections")?;
    for (name, times) in &soak.record.events {
        if ![DIED, STOPPED_BADLY].contains(name) {
            row(text, name, times)?;
        }
    }
    let met = happened.submits - happened.unharmed;
    writeln!(
        text,
        "what happened to requests: {met} of {} submits met a fault\n  {:46} {:>9} {:>9}",
        happened.submits, "", "submit", "others"
    )?;
    for (name, (submits, others)) in &happened.faults {
        writeln!(text, "  {name:46} {submits:>9} {others:>9}")?;
    }
    Ok(())
}

/// The first few commands behind each number, with everything that is known of them.
fn cases(text: &mut String, soak: &Soak, findings: &Findings) -> anyhow::Result<()> {
    for (broken, ids) in &findings.broken {
        writeln!(text, "\n{}, {} of {}:", broken.name(), ids.len().min(CASES), ids.len())?;
        for id in ids.iter().take(CASES) {
            case(text, soak, id)?;
            // Behind a cancel or a get, the submit that it names.
            let command = soak.plan.commands.iter().find(|command| command.id == *id);
            if let Some(target) = command.and_then(Command::target) {
                writeln!(text, "    it names {target:?}")?;
                if let Some(submit) = target.submit() {
                    case(text, soak, &soak.plan.commands[submit].id)?;
                }
            }
        }
    }
    Ok(())
}

/// A command, or a batch that belongs to none.
fn case(text: &mut String, soak: &Soak, id: &str) -> anyhow::Result<()> {
    writeln!(text, "  {id}")?;
    for answer in soak.record.answers.get(id).into_iter().flatten() {
        let code = answer.error_code.as_deref().unwrap_or("succeeded");
        let body: String = answer.body.chars().take(BODY_SHOWN).collect();
        writeln!(text, "    result {code}, message_id {}: {body}", answer.message_id)?;
    }
    let theirs =
        |batch: &&Created| batch.command_id.as_deref() == Some(id) || batch.batch_id == *id;
    for batch in soak.batches.iter().filter(theirs) {
        let cancelled = if batch.cancelled { "cancelled, " } else { "" };
        writeln!(text, "    batch {}: {cancelled}{:?}", batch.batch_id, batch.looks)?;
    }
    Ok(())
}
