//! The world of the model: a broker, a ledger and ElevenLabs around one submit, what can befall them,
//! and what must never be.
//!
//! Time is ticks: a request takes at most one, a batch shows in the list one later, a lease lasts two.

use std::collections::BTreeSet;
use std::time::Duration;

use uuid::Uuid;

use super::work::{Copy, Outcome, Task, Worker};
use crate::ledger::op::{Op, Reply};
use crate::ledger::row::Row;

pub const TICK: Duration = Duration::from_secs(1);

/// What keeps a promise. A run may leave one of them out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    SearchBeforeResend,
    ProofOfAbsence,
    AbsenceBoundToKey,
    BusyUntil,
    /// A late word that a request has ended says nothing about the next one.
    EndedIsOfLast,
    RenewalBeforeSend,
    RecordedBeforePublished,
    Fingerprint,
    StrikeAtClaim,
    /// A cancel whose strike got no answer may have had its effect.
    StrikeInDoubt,
    CancelOfStruck,
    MarkOnDeferred,
    /// A submit is given up only as what it was seen to be.
    SentenceAsSeen,
    Finisher,
    ReleasedRowKept,
    UnpublishedKept,
}

/// How often each fault comes at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Faults {
    pub kills: u8,
    /// With SQLite, what a killed worker had in hand is its own at once.
    pub restarts_as_itself: bool,
    pub stops: u8,
    /// The broker delivers the message again, and the worker goes on: a connection was lost, or the
    /// worker was frozen.
    pub lost_connections: u8,
    /// The broker has a deferred copy, and the worker does not know.
    pub lost_confirms: u8,
    pub condemned: u8,
    /// An operation of the ledger gets no answer; it is done late, or never.
    pub stalls: u8,
    pub lost_answers: u8,
    pub refusals: u8,
    pub purges: u8,
    pub lost_ledgers: u8,
    pub changed_keys: u8,
    pub redactions: u8,
    pub strikes: u8,
}

/// What no worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Befall {
    /// ElevenLabs executes a request.
    Done(usize),
    /// An operation that got no answer.
    Landed(usize),
    LedgerStalls,
    LedgerLost,
    Purge,
    Redaction,
    Strike,
    CancelOfStruck,
    Forgotten,
}

/// A request on its way: done, if at all, by then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sent {
    pub token: Uuid,
    pub key: u8,
    pub by: u8,
    pub is_other: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Created {
    pub key: u8,
    pub at: u8,
    pub token: Uuid,
    pub is_other: bool,
    pub cancelled: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::struct_excessive_bools, reason = "each says one thing that happened")]
pub struct World {
    pub now: u8,
    pub row: Option<Row>,
    /// Operations that got no answer, and may still be done.
    pub late: Vec<Op>,
    /// The next operation gets no answer.
    pub stalls: bool,
    pub copies: Vec<Copy>,
    pub workers: [Worker; 2],
    pub sent: Vec<Sent>,
    pub batches: Vec<Created>,
    pub redacted: bool,
    pub results: BTreeSet<Outcome>,
    /// One was answered with the success of the other.
    pub mixed_up: bool,
    pub claimed: bool,
    pub struck: bool,
    /// A cancel was told that it had no effect.
    pub denied: bool,
    /// The submit ended by a cancel in advance.
    pub ended_by_strike: bool,
    /// A cancel was told that nobody has begun it, so nobody will.
    pub ruled_out: bool,
    pub ledger_lost: bool,
    pub left: Faults,
}

pub struct Rules {
    pub without: Option<Rule>,
    pub faults: Faults,
    pub copies: Vec<Copy>,
}

impl Rules {
    pub fn has(&self, rule: Rule) -> bool {
        self.without != Some(rule)
    }
}

pub fn id(number: u8) -> Uuid {
    Uuid::from_u128(u128::from(number) + 1)
}

impl World {
    pub fn millis(&self) -> i64 {
        i64::from(self.now) * 1_000
    }

    pub fn apply(&mut self, op: &Op) -> Reply {
        let now = self.millis();
        op.apply(&mut self.row, now)
    }

    /// `None`: no answer comes in time.
    pub fn ask(&mut self, op: Op) -> Option<Reply> {
        if std::mem::take(&mut self.stalls) {
            self.late.push(op);
            return None;
        }
        Some(self.apply(&op))
    }

    pub fn task(&self, worker: usize) -> Option<&Task> {
        self.workers[worker].task.as_ref()
    }

    pub fn give_back(&mut self, copy: Copy) {
        self.copies.push(copy);
    }

    pub fn is_idle(&self) -> bool {
        self.copies.is_empty() && self.workers.iter().all(|worker| worker.task.is_none())
    }

    pub fn is_unfinished(&self) -> bool {
        self.row.as_ref().is_some_and(Row::is_unfinished)
    }

    /// A result says what is not so. Of a submit that was finished in a ledger that is gone, nobody knows
    /// any more.
    pub fn lies(&self) -> bool {
        let has = |outcome| self.results.contains(&outcome);
        let denies = has(Outcome::NotCreated) && !self.batches.is_empty();
        let boasts = has(Outcome::Succeeded) && self.batches.is_empty();
        let belittles = self.denied && self.ended_by_strike;
        !self.ledger_lost && (denies || boasts) || self.mixed_up || belittles
    }

    /// It was claimed, nobody will answer, and nobody has.
    pub fn is_lost(&self, rules: &Rules) -> bool {
        let will_finish = rules.has(Rule::Finisher) && self.is_unfinished();
        let is_over = self.is_idle() && !will_finish;
        self.claimed && is_over && self.results.is_empty() && !self.ledger_lost
    }

    /// A cancel came in time, the batch calls, and nobody will cancel it.
    pub fn calls_on(&self, rules: &Rules) -> bool {
        let calls = self.batches.iter().any(|batch| !batch.cancelled);
        let is_to_cancel = self.row.as_ref().is_some_and(Row::is_to_cancel);
        let will_cancel = is_to_cancel && rules.has(Rule::CancelOfStruck);
        let is_over = self.is_idle() && self.results.contains(&Outcome::Succeeded);
        self.struck && calls && is_over && !will_cancel && !self.ledger_lost
    }

    pub fn tick(&mut self) {
        self.now += 1;
        let now = self.now;
        self.sent.retain(|sent| sent.by >= now);
    }

    /// `None`: it does not come to that.
    pub fn befall(&mut self, rules: &Rules, befall: Befall) -> Option<()> {
        match befall {
            Befall::Done(sent) => {
                let Sent { key, token, is_other, .. } = self.sent.remove(sent);
                let at = self.now;
                self.batches.push(Created { key, at, token, is_other, cancelled: false });
            }
            Befall::Landed(late) => {
                let op = self.late.remove(late);
                self.apply(&op);
            }
            Befall::LedgerStalls => {
                self.left.stalls -= 1;
                self.stalls = true;
            }
            Befall::LedgerLost => {
                self.left.lost_ledgers -= 1;
                (self.row, self.ledger_lost) = (None, true);
                self.late.clear();
            }
            Befall::Purge => {
                self.left.purges -= 1;
                self.copies.clear();
            }
            Befall::Redaction => {
                self.left.redactions -= 1;
                self.redacted = true;
            }
            Befall::Strike => self.strike(rules),
            Befall::CancelOfStruck => {
                self.batches.iter_mut().for_each(|batch| batch.cancelled = true);
                self.apply(&Op::Cancelled);
            }
            Befall::Forgotten => self.forget(rules)?,
        }
        Some(())
    }

    fn strike(&mut self, rules: &Rules) {
        self.left.strikes -= 1;
        let is_forgotten = self.claimed && self.row.is_none();
        let Some(reply) = self.ask(Op::Find { strike: Some(TICK * 100) }) else {
            self.denied = !rules.has(Rule::StrikeInDoubt);
            return;
        };
        self.ruled_out = reply == Reply::Nobody && !is_forgotten;
        self.struck = !matches!(reply, Reply::Settled(_)) && !is_forgotten;
    }

    fn forget(&mut self, rules: &Rules) -> Option<()> {
        let row = self.row.as_ref()?;
        let is_kept = row.is_unfinished() && rules.has(Rule::UnpublishedKept);
        if is_kept || row.is_to_cancel() {
            return None;
        }
        self.row = None;
        Some(())
    }
}
