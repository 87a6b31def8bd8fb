//! What a worker of the model does to the submit.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::super::step::{Reading, Reason, Sight, Standing, Step, Verdict, next, verdict};
use super::names::NEW;
use super::world::{Created, Rule, Rules, Sent, TICK, World, id};
use crate::ledger::op::{Body, Dispatch, End, Op, Purpose, Reply, Sentence};
use crate::ledger::row::Batch;

const LEASE: Duration = Duration::from_secs(2);

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

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    Deciding,
    Waiting,
    /// The ledger did not answer that it is recorded.
    Settling(Outcome),
    /// To be given up, as begun or not.
    Condemning(bool),
    /// To be published, and then acknowledged.
    Over(Outcome),
    Published,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Act {
    Take(usize),
    /// It came back too often.
    Condemn(usize),
    Finish,
    Decide,
    LoseAnswer,
    Answer,
    /// The copy goes to a delay queue; without the broker's word, the message comes back besides.
    Refuse {
        loses_confirm: bool,
    },
    SettleAgain,
    GiveUpLedger,
    Sentence,
    Publish,
    /// Its connection is gone: the message that came back gets the recorded result.
    LeaveToCopy,
    Acknowledge,
    LoseConnection,
    Stop,
    Kill {
        changes_key: bool,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(clippy::struct_excessive_bools, reason = "each says one thing of a step")]
pub struct Task {
    /// `None`: it finishes what the ledger knows.
    pub copy: Option<Copy>,
    /// The broker has the message back.
    pub returned: bool,
    pub attempts: u32,
    claimed_at: u8,
    /// The claim covers a request, now.
    fresh: bool,
    pub in_doubt: bool,
    /// It saw its own request end.
    ended: bool,
    struck: bool,
    pub phase: Phase,
    /// Its result is the row's.
    pub of_row: bool,
    pub token: Uuid,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Worker {
    pub id: Uuid,
    pub key: u8,
    pub task: Option<Task>,
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

/// Of a body, and of its raw bytes.
fn body_of(rules: &Rules, copy: Copy) -> Uuid {
    id(u8::from(copy.is_other && rules.has(Rule::Fingerprint)))
}

impl World {
    /// `None`: it does not come to that.
    pub fn work(&mut self, rules: &Rules, worker: usize, act: Act) -> Option<()> {
        match act {
            Act::Take(copy) => {
                let copy = self.copies.remove(copy);
                self.claim(rules, worker, Some(copy))
            }
            Act::Condemn(copy) => {
                let copy = self.copies.remove(copy);
                self.condemn(rules, worker, copy)
            }
            Act::Finish => self.claim(rules, worker, None),
            Act::Decide => self.decide(rules, worker),
            Act::LoseAnswer => self.lose_answer(worker),
            Act::Answer => self.settle(rules, worker, Outcome::Succeeded),
            Act::Refuse { loses_confirm } => self.refuse(rules, worker, loses_confirm),
            Act::SettleAgain => {
                let Phase::Settling(ended) = self.task(worker)?.phase else { return None };
                self.settle(rules, worker, ended)
            }
            Act::GiveUpLedger => self.give_up_ledger(worker),
            Act::Sentence => self.sentence(rules, worker),
            Act::Publish => self.publish(worker),
            Act::LeaveToCopy => self.workers[worker].task.take().map(drop),
            Act::Acknowledge => self.acknowledge(worker),
            Act::LoseConnection => self.lose_connection(worker),
            Act::Stop => self.stop(worker),
            Act::Kill { changes_key } => self.kill(worker, changes_key),
        }
    }

    fn dispatch(&self, worker: usize) -> Dispatch {
        Dispatch { takes: TICK, key: id(self.workers[worker].key) }
    }

    fn begin(&mut self, worker: usize, copy: Option<Copy>) -> &mut Task {
        let claimed_at = self.now;
        self.workers[worker].task.insert(Task {
            copy,
            returned: false,
            attempts: 0,
            claimed_at,
            fresh: false,
            in_doubt: false,
            ended: false,
            struck: false,
            phase: Phase::Deciding,
            of_row: true,
            token: NEW,
        })
    }

    /// The message says that somebody may have begun it.
    fn doubt(&self, rules: &Rules, copy: Copy) -> bool {
        // A ledger that took another one's place was not there when the queues were empty.
        let was_there = !self.ledger_lost;
        let says_so = copy.met_row || copy.came_back && !was_there;
        rules.has(Rule::MarkOnDeferred) && says_so
    }

    fn claim(&mut self, rules: &Rules, worker: usize, copy: Option<Copy>) -> Option<()> {
        let body = |copy| {
            let fingerprint = body_of(rules, copy);
            Body { fingerprint, hash: fingerprint, origin: "{}".into() }
        };
        let op = Op::Claim {
            body: copy.map(body),
            token: NEW,
            worker: self.workers[worker].id,
            lease: LEASE,
            send: self.dispatch(worker),
            doubt: copy.is_some_and(|copy| self.doubt(rules, copy)),
        };
        let Some(reply) = self.ask(op) else {
            if let Some(copy) = copy {
                self.give_back(copy);
            }
            return Some(());
        };
        match reply {
            Reply::Yours(yours) => {
                self.claimed = true;
                let task = self.begin(worker, copy);
                task.in_doubt = yours.history.is_some() && rules.has(Rule::SearchBeforeResend);
                task.fresh = yours.history.is_none();
                task.struck = yours.struck && rules.has(Rule::StrikeAtClaim);
                task.attempts = yours.attempts;
            }
            Reply::Settled(finished) => {
                self.begin(worker, copy).phase = Phase::Over(outcome(&finished.ending));
            }
            Reply::Conflict => self.refuse_reused(worker, copy),
            // It waits in a delay queue, and says that it has met a row.
            Reply::InHand { .. } => self.give_back(Copy { met_row: true, ..copy? }),
            Reply::Gone | Reply::Nobody => return None,
        }
        Some(())
    }

    fn refuse_reused(&mut self, worker: usize, copy: Option<Copy>) {
        let task = self.begin(worker, copy);
        (task.phase, task.of_row) = (Phase::Over(Outcome::NotCreated), false);
    }

    fn condemnation(
        &self,
        rules: &Rules,
        (worker, copy): (usize, Copy),
        sentence: Option<Sentence>,
    ) -> Op {
        let doubt = self.doubt(rules, copy);
        let worker = self.workers[worker].id;
        Op::Condemn { worker, body: body_of(rules, copy), doubt, sentence }
    }

    /// Asks what was done for a message that is given up.
    fn condemn(&mut self, rules: &Rules, worker: usize, copy: Copy) -> Option<()> {
        self.left.condemned -= 1;
        let op = self.condemnation(rules, (worker, copy), None);
        match self.ask(op) {
            None | Some(Reply::InHand { .. }) => self.give_back(copy),
            Some(Reply::Yours(yours)) => {
                self.begin(worker, Some(copy)).phase = Phase::Condemning(yours.history.is_some());
            }
            Some(Reply::Settled(finished)) => {
                self.begin(worker, Some(copy)).phase = Phase::Over(outcome(&finished.ending));
            }
            Some(Reply::Conflict) => self.refuse_reused(worker, Some(copy)),
            Some(Reply::Gone | Reply::Nobody) => return None,
        }
        Some(())
    }

    /// Gives it up as what it was seen to be.
    fn sentence(&mut self, rules: &Rules, worker: usize) -> Option<()> {
        let task = self.task(worker)?.clone();
        let Phase::Condemning(begun) = task.phase else { return None };
        let about = (worker, task.copy?);
        let ending = text(if begun { Outcome::Unknown } else { Outcome::NotCreated });
        let begun = if rules.has(Rule::SentenceAsSeen) {
            begun
        } else {
            let now = self.condemnation(rules, about, None);
            let reply = now.apply(&mut self.row.clone(), self.millis());
            matches!(reply, Reply::Yours(yours) if yours.history.is_some())
        };
        let op = self.condemnation(rules, about, Some(Sentence { begun, ending }));
        match self.ask(op) {
            Some(Reply::Yours(yours)) => {
                let task = self.workers[worker].task.as_mut()?;
                task.phase = Phase::Condemning(yours.history.is_some());
            }
            Some(Reply::Settled(finished)) => {
                let task = self.workers[worker].task.as_mut()?;
                task.phase = Phase::Over(outcome(&finished.ending));
            }
            _ => drop(self.leave(worker, |copy| copy)),
        }
        Some(())
    }

    /// Keeps the submit; returns how long every request has been over, and the keys of all. `None` where
    /// the ledger says nothing, or another has taken it over.
    fn renew(&mut self, worker: usize, purpose: Purpose) -> Option<(Duration, Vec<Uuid>)> {
        let task = self.task(worker)?;
        let attempts = match purpose {
            Purpose::Request(_) => task.attempts + 1,
            Purpose::Keep | Purpose::Ended => task.attempts,
        };
        self.renew_as(worker, attempts, purpose)
    }

    fn renew_as(
        &mut self,
        worker: usize,
        attempts: u32,
        purpose: Purpose,
    ) -> Option<(Duration, Vec<Uuid>)> {
        let token = self.task(worker)?.token;
        let Reply::Yours(yours) = self.ask(Op::Renew { token, lease: LEASE, attempts, purpose })?
        else {
            // The message is claimed anew, or left to the other.
            self.leave(worker, |copy| Copy { met_row: true, ..copy });
            return None;
        };
        let history = yours.history?;
        self.workers[worker].task.as_mut()?.struck |= yours.struck;
        Some((history.quiet, history.keys))
    }

    fn decide(&mut self, rules: &Rules, worker: usize) -> Option<()> {
        let task = self.task(worker)?;
        let standing = Standing {
            in_doubt: task.in_doubt,
            struck: task.struck,
            expired: false,
            has_body: task.copy.is_some(),
            spent: false,
        };
        match next(standing) {
            Step::Search => self.search(rules, worker),
            Step::End(reason) => {
                self.ended_by_strike |= reason == Reason::Struck;
                self.settle(rules, worker, Outcome::NotCreated)
            }
            Step::Send => self.send(rules, worker),
        }
    }

    fn send(&mut self, rules: &Rules, worker: usize) -> Option<()> {
        let now = self.now;
        let task = self.workers[worker].task.as_mut()?;
        let covers = std::mem::take(&mut task.fresh) && task.claimed_at == now;
        if !covers && rules.has(Rule::RenewalBeforeSend) {
            let request = Purpose::Request(self.dispatch(worker));
            if self.renew(worker, request).is_none() {
                return Some(());
            }
            if self.task(worker)?.struck && rules.has(Rule::StrikeAtClaim) {
                return Some(());
            }
        }
        let key = self.workers[worker].key;
        let task = self.workers[worker].task.as_mut()?;
        (task.phase, task.attempts) = (Phase::Waiting, task.attempts + 1);
        let is_other = task.copy?.is_other;
        self.sent.push(Sent { token: task.token, key, by: now + 1, is_other });
        Some(())
    }

    fn search(&mut self, rules: &Rules, worker: usize) -> Option<()> {
        let task = self.task(worker)?;
        let renewed = if !task.ended {
            self.renew(worker, Purpose::Keep)
        } else if rules.has(Rule::EndedIsOfLast) {
            self.renew(worker, Purpose::Ended)
        } else {
            // Whatever it was the end of.
            self.renew_as(worker, 100, Purpose::Ended)
        };
        let Some((quiet, keys)) = renewed else { return Some(()) };
        self.workers[worker].task.as_mut()?.ended = false;
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

    fn settle(&mut self, rules: &Rules, worker: usize, ended: Outcome) -> Option<()> {
        let key = id(self.workers[worker].key);
        let task = self.workers[worker].task.as_mut()?;
        if !rules.has(Rule::RecordedBeforePublished) {
            task.phase = Phase::Over(ended);
            return Some(());
        }
        // Unrecorded, the batch has to be searched for.
        task.in_doubt |= ended == Outcome::Succeeded;
        task.phase = Phase::Settling(ended);
        let token = task.token;
        let batch = (ended == Outcome::Succeeded).then(|| Batch { id: "b".into(), key });
        let end = End { ending: text(ended), batch, begins_at: None };
        match self.ask(Op::Settle { token, end }) {
            None => {}
            Some(Reply::Settled(finished)) => {
                let task = self.workers[worker].task.as_mut()?;
                task.phase = Phase::Over(outcome(&finished.ending));
            }
            Some(_) => drop(self.leave(worker, |copy| Copy { met_row: true, ..copy })),
        }
        Some(())
    }

    /// The ledger was away for too long: the message waits in a delay queue.
    fn give_up_ledger(&mut self, worker: usize) -> Option<()> {
        let task = self.leave(worker, |copy| Copy { met_row: true, ..copy })?;
        self.release(&task, task.in_doubt);
        Some(())
    }

    /// ElevenLabs turned it away, and has done nothing.
    fn refuse(&mut self, rules: &Rules, worker: usize, loses_confirm: bool) -> Option<()> {
        self.left.refusals -= 1;
        let task = self.leave(worker, |copy| Copy { met_row: true, ..copy })?;
        if loses_confirm {
            self.left.lost_confirms -= 1;
            self.give_back(Copy { came_back: true, ..task.copy? });
        }
        self.sent.retain(|sent| sent.token != task.token);
        self.release(&task, false);
        if !rules.has(Rule::ReleasedRowKept) {
            self.row = None;
        }
        Some(())
    }

    fn lose_answer(&mut self, worker: usize) -> Option<()> {
        self.left.lost_answers = self.left.lost_answers.saturating_sub(1);
        let now = self.now;
        let task = self.workers[worker].task.as_mut()?;
        (task.phase, task.in_doubt, task.ended) = (Phase::Deciding, true, true);
        // What was given up is done at once, or never.
        for sent in self.sent.iter_mut().filter(|sent| sent.token == task.token) {
            sent.by = sent.by.min(now);
        }
        Some(())
    }
}
