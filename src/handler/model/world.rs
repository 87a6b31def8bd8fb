//! The world of the model: two workers, a broker, a ledger and ElevenLabs around one submit, and what
//! each of them can do.
//!
//! Time is ticks: a request takes at most one, a batch shows in the list one later, a lease lasts two.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::super::step::{Reading, Sight, Standing, Step, Verdict, next, verdict};
use crate::ledger::op::{Body, Dispatch, End, Op, Purpose, Reply};
use crate::ledger::row::{Batch, Row};

const TICK: Duration = Duration::from_secs(1);
const LEASE: Duration = Duration::from_secs(2);

/// What keeps a promise. A run may leave one of them out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    SearchBeforeResend,
    ProofOfAbsence,
    AbsenceBoundToKey,
    BusyUntil,
    RenewalBeforeSend,
    RecordedBeforePublished,
    Fingerprint,
    StrikeAtClaim,
    CancelOfStruck,
    MarkOnDeferred,
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
    pub lost_answers: u8,
    pub refusals: u8,
    pub purges: u8,
    pub lost_ledgers: u8,
    pub changed_keys: u8,
    pub redactions: u8,
    pub strikes: u8,
}

/// A message of the submit, or of another one that was given its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Copy {
    pub met_row: bool,
    /// It was delivered before.
    pub came_back: bool,
    pub is_other: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Outcome {
    Succeeded,
    NotCreated,
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    Deciding,
    Waiting,
    /// To be published, and then acknowledged.
    Over(Outcome),
    Published,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::struct_excessive_bools, reason = "each says one thing of a step")]
pub struct Task {
    /// `None`: it finishes what the ledger knows.
    pub copy: Option<Copy>,
    pub token: u8,
    claimed_at: u8,
    /// The claim covers a request, now.
    fresh: bool,
    in_doubt: bool,
    /// It saw its own request end.
    ended: bool,
    pub struck: bool,
    pub phase: Phase,
    /// Its result is the row's.
    of_row: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Worker {
    pub id: u8,
    pub key: u8,
    pub task: Option<Task>,
}

/// A request on its way: done, if at all, by then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sent {
    pub token: u8,
    pub key: u8,
    pub by: u8,
    pub is_other: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Created {
    pub key: u8,
    pub at: u8,
    pub token: u8,
    pub is_other: bool,
    pub cancelled: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::struct_excessive_bools, reason = "each says one thing that happened")]
pub struct World {
    pub now: u8,
    pub row: Option<Row>,
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
    /// A cancel was told that nobody has begun it, so nobody will.
    pub ruled_out: bool,
    pub ledger_lost: bool,
    pub tokens: u8,
    pub ids: u8,
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

fn text(outcome: Outcome) -> Arc<str> {
    format!("{outcome:?}").into()
}

fn outcome(text: &str) -> Outcome {
    match text {
        "Succeeded" => Outcome::Succeeded,
        "NotCreated" => Outcome::NotCreated,
        _ => Outcome::Unknown,
    }
}

impl World {
    pub fn millis(&self) -> i64 {
        i64::from(self.now) * 1_000
    }

    pub fn apply(&mut self, op: &Op) -> Reply {
        let now = self.millis();
        op.apply(&mut self.row, now)
    }

    pub fn task(&self, worker: usize) -> Option<&Task> {
        self.workers[worker].task.as_ref()
    }

    pub fn dispatch(&self, worker: usize) -> Dispatch {
        Dispatch { takes: TICK, key: id(self.workers[worker].key) }
    }

    pub fn give_back(&mut self, copy: Copy) {
        self.copies.push(copy);
        self.copies.sort_unstable();
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
        !self.ledger_lost && (denies || boasts) || self.mixed_up
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

    /// Claims; `None` leaves the message where it is.
    pub fn claim(&mut self, rules: &Rules, worker: usize, copy: Option<Copy>) -> Option<()> {
        let token = self.tokens + 1;
        let is_other = rules.has(Rule::Fingerprint) && copy.is_some_and(|copy| copy.is_other);
        let fingerprint = id(u8::from(is_other));
        let body = Body { fingerprint, hash: fingerprint, origin: "{}".into() };
        // A ledger that took another one's place was not there when the queues were empty.
        let was_there = !self.ledger_lost;
        let says_so = |copy: Copy| copy.met_row || copy.came_back && !was_there;
        let doubt = rules.has(Rule::MarkOnDeferred) && copy.is_some_and(says_so);
        let op = Op::Claim {
            body: copy.map(|_| body),
            token: id(token),
            worker: id(self.workers[worker].id),
            lease: LEASE,
            send: self.dispatch(worker),
            doubt,
        };
        let mut task = Task {
            copy,
            token,
            claimed_at: self.now,
            fresh: true,
            in_doubt: false,
            ended: false,
            struck: false,
            phase: Phase::Deciding,
            of_row: true,
        };
        match self.apply(&op) {
            Reply::Yours(yours) => {
                (self.claimed, self.tokens) = (true, token);
                task.in_doubt = yours.history.is_some() && rules.has(Rule::SearchBeforeResend);
                task.fresh = yours.history.is_none();
                task.struck = yours.struck && rules.has(Rule::StrikeAtClaim);
            }
            Reply::Settled(finished) => task.phase = Phase::Over(outcome(&finished.ending)),
            Reply::Conflict => {
                (task.phase, task.of_row) = (Phase::Over(Outcome::NotCreated), false);
            }
            Reply::InHand { .. } => {
                // It waits in a delay queue, and says that it has met a row.
                self.give_back(Copy { met_row: true, ..copy? });
                return Some(());
            }
            Reply::Gone | Reply::Nobody => return None,
        }
        self.workers[worker].task = Some(task);
        Some(())
    }

    /// Keeps the submit; returns how long every request has been over, and the keys of all.
    pub fn renew(&mut self, worker: usize, purpose: Purpose) -> Option<(Duration, Vec<Uuid>)> {
        let task = self.task(worker)?.clone();
        let op = Op::Renew { token: id(task.token), lease: LEASE, attempts: 1, purpose };
        let Reply::Yours(yours) = self.apply(&op) else {
            // Another has taken it over: the message is claimed anew, or left to the other.
            if let Some(copy) = task.copy {
                self.give_back(Copy { met_row: true, ..copy });
            }
            self.workers[worker].task = None;
            return None;
        };
        let history = yours.history?;
        self.workers[worker].task.as_mut()?.struck |= yours.struck;
        Some((history.quiet, history.keys))
    }

    pub fn decide(&mut self, rules: &Rules, worker: usize) -> Option<()> {
        let task = self.task(worker)?.clone();
        let standing = Standing {
            in_doubt: task.in_doubt,
            struck: task.struck,
            expired: false,
            has_body: task.copy.is_some(),
            spent: false,
        };
        match next(standing) {
            Step::Search => self.search(rules, worker),
            Step::End(_) => self.settle(rules, worker, Outcome::NotCreated),
            Step::Send => self.send(rules, worker),
        }
    }

    pub fn send(&mut self, rules: &Rules, worker: usize) -> Option<()> {
        let task = self.task(worker)?.clone();
        let covers = task.fresh && task.claimed_at == self.now;
        if !covers && rules.has(Rule::RenewalBeforeSend) {
            let request = Purpose::Request(self.dispatch(worker));
            if self.renew(worker, request).is_none() {
                return Some(());
            }
            if self.task(worker)?.struck && rules.has(Rule::StrikeAtClaim) {
                return Some(());
            }
        }
        let (key, by) = (self.workers[worker].key, self.now + 1);
        let is_other = task.copy?.is_other;
        self.sent.push(Sent { token: task.token, key, by, is_other });
        self.sent.sort_unstable();
        let task = self.workers[worker].task.as_mut()?;
        (task.phase, task.fresh) = (Phase::Waiting, false);
        Some(())
    }

    pub fn search(&mut self, rules: &Rules, worker: usize) -> Option<()> {
        let ended = std::mem::take(&mut self.workers[worker].task.as_mut()?.ended);
        let purpose = if ended { Purpose::Ended } else { Purpose::Keep };
        let Some((quiet, keys)) = self.renew(worker, purpose) else { return Some(()) };
        let own = self.workers[worker].key;
        let visible = |batch: &&Created| batch.key == own && batch.at < self.now;
        let is_there = self.batches.iter().any(|batch| visible(&batch));
        let sight = match (is_there, self.redacted) {
            (true, false) => Sight::Batch,
            (true, true) if rules.has(Rule::ProofOfAbsence) => Sight::Undecided,
            (true, true) | (false, _) => Sight::Absent,
        };
        let reading = Reading {
            sight,
            quiet: if rules.has(Rule::BusyUntil) { quiet } else { Duration::MAX },
            sees_all_keys: !rules.has(Rule::AbsenceBoundToKey)
                || keys.iter().all(|key| *key == id(own)),
            has_time: false,
        };
        match verdict(reading, TICK) {
            Verdict::Found => self.settle(rules, worker, Outcome::Succeeded),
            Verdict::Unknown => self.settle(rules, worker, Outcome::Unknown),
            Verdict::NotCreated => {
                self.workers[worker].task.as_mut()?.in_doubt = false;
                Some(())
            }
            Verdict::ReadAgain => Some(()),
        }
    }

    pub fn settle(&mut self, rules: &Rules, worker: usize, ended: Outcome) -> Option<()> {
        let task = self.task(worker)?.clone();
        if !rules.has(Rule::RecordedBeforePublished) {
            self.workers[worker].task.as_mut()?.phase = Phase::Over(ended);
            return Some(());
        }
        let key = id(self.workers[worker].key);
        let batch = (ended == Outcome::Succeeded).then(|| Batch { id: "b".into(), key });
        let end = End { ending: text(ended), batch, begins_at: None };
        if let Reply::Settled(finished) = self.apply(&Op::Settle { token: id(task.token), end }) {
            let ended = outcome(&finished.ending);
            self.workers[worker].task.as_mut()?.phase = Phase::Over(ended);
        } else {
            if let Some(copy) = task.copy {
                self.give_back(Copy { met_row: true, ..copy });
            }
            self.workers[worker].task = None;
        }
        Some(())
    }

    /// ElevenLabs turned it away, and has done nothing: it waits in a delay queue.
    pub fn refuse(&mut self, rules: &Rules, worker: usize) -> Option<()> {
        let task = self.workers[worker].task.take()?;
        self.sent.retain(|sent| sent.token != task.token);
        let op = Op::Release { token: id(task.token), may_have_left: false, attempts: 1 };
        self.apply(&op);
        if !rules.has(Rule::ReleasedRowKept) {
            self.row = None;
        }
        self.give_back(Copy { met_row: true, ..task.copy? });
        Some(())
    }

    pub fn lose_answer(&mut self, worker: usize) -> Option<()> {
        let now = self.now;
        let task = self.workers[worker].task.as_mut()?;
        (task.phase, task.in_doubt, task.ended) = (Phase::Deciding, true, true);
        // What was given up is done at once, or never.
        for sent in self.sent.iter_mut().filter(|sent| sent.token == task.token) {
            sent.by = sent.by.min(now);
        }
        Some(())
    }

    pub fn publish(&mut self, worker: usize) -> Option<()> {
        let task = self.workers[worker].task.as_mut()?;
        let Phase::Over(outcome) = task.phase else { return None };
        task.phase = Phase::Published;
        if !task.of_row {
            return Some(());
        }
        self.results.insert(outcome);
        let own = |copy: Copy| self.batches.iter().any(|batch| batch.is_other == copy.is_other);
        let is_own = task.copy.is_none_or(own);
        self.mixed_up |= outcome == Outcome::Succeeded && !is_own;
        Some(())
    }

    pub fn acknowledge(&mut self, worker: usize) -> Option<()> {
        let task = self.workers[worker].task.take()?;
        if task.of_row {
            self.apply(&Op::Published);
        }
        Some(())
    }

    pub fn kill(&mut self, worker: usize, changes_key: bool) -> Option<()> {
        self.left.kills -= 1;
        let task = self.workers[worker].task.take()?;
        if let Some(copy) = task.copy {
            self.give_back(Copy { came_back: true, ..copy });
        }
        if !self.left.restarts_as_itself {
            self.ids += 1;
            self.workers[worker].id = self.ids;
        }
        if changes_key {
            self.left.changed_keys -= 1;
            for worker in &mut self.workers {
                worker.key = 1;
            }
        }
        Some(())
    }

    pub fn strike(&mut self) {
        self.left.strikes -= 1;
        let is_forgotten = self.claimed && self.row.is_none();
        let reply = self.apply(&Op::Find { strike: Some(TICK * 100) });
        self.ruled_out = reply == Reply::Nobody && !is_forgotten;
        self.struck = !matches!(reply, Reply::Settled(_)) && !is_forgotten;
    }
}
