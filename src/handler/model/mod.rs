//! Explores every order of what two workers do to one submit, with kills, a purge, a cancel and an
//! ElevenLabs that executes late: with the real transitions of the row (`Op::apply`) and the real choice
//! of the next step (`step.rs`). For each rule, a run without it has to break a promise.

mod world;

use std::collections::BTreeSet;

use stateright::{Checker as _, Model, Property};

use crate::ledger::op::Op;
use crate::ledger::row::{Row, State};

use world::{Copy, Created, Faults, Outcome, Phase, Rule, Rules, Sent, Worker, World};

/// Longer than any copy is on its way, in milliseconds.
const UNTOUCHED: i64 = 2_000;

/// Long enough for a death, a lease, a window and the search of the next worker.
const LAST_TICK: u8 = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    Tick,
    Take(usize, usize),
    Finish(usize),
    Decide(usize),
    Do(usize),
    Answer(usize),
    LoseAnswer(usize),
    Refuse(usize),
    Publish(usize),
    Acknowledge(usize),
    Kill(usize, bool),
    Purge,
    LoseLedger,
    Redact,
    Strike,
    CancelStruck,
    Forget,
}

impl Model for Rules {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let worker = |id| Worker { id, key: 0, task: None };
        let mut copies = self.copies.clone();
        copies.sort_unstable();
        vec![World {
            now: 0,
            row: None,
            copies,
            workers: [worker(10), worker(11)],
            sent: Vec::new(),
            batches: Vec::new(),
            redacted: false,
            results: BTreeSet::new(),
            mixed_up: false,
            claimed: false,
            struck: false,
            ruled_out: false,
            ledger_lost: false,
            tokens: 20,
            ids: 11,
            left: self.faults,
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        if world.now < LAST_TICK {
            actions.push(Action::Tick);
        }
        for worker in 0..2 {
            of_worker(self, world, worker, actions);
        }
        actions.extend((0..world.sent.len()).map(Action::Do));
        let settled = world.row.as_ref().is_some_and(|row| matches!(row.state, State::Settled(_)));
        let nobody_works = world.workers.iter().all(|worker| worker.task.is_none());
        let to_cancel = world.row.as_ref().is_some_and(Row::is_to_cancel);
        let all = [
            (world.left.purges > 0 && !world.copies.is_empty(), Action::Purge),
            (world.left.lost_ledgers > 0 && nobody_works, Action::LoseLedger),
            (world.left.redactions > 0 && !world.batches.is_empty(), Action::Redact),
            (world.left.strikes > 0, Action::Strike),
            (to_cancel && self.has(Rule::CancelOfStruck), Action::CancelStruck),
            (settled && world.is_idle(), Action::Forget),
        ];
        actions.extend(all.into_iter().filter(|(may, _)| *may).map(|(_, action)| action));
    }

    fn next_state(&self, before: &World, action: Action) -> Option<World> {
        let mut world = before.clone();
        match action {
            Action::Tick => {
                world.now += 1;
                let now = world.now;
                world.sent.retain(|sent| sent.by >= now);
            }
            Action::Take(worker, copy) => {
                let copy = world.copies.remove(copy);
                world.claim(self, worker, Some(copy))?;
            }
            Action::Finish(worker) => world.claim(self, worker, None)?,
            Action::Decide(worker) => world.decide(self, worker)?,
            Action::Do(sent) => {
                let Sent { key, token, is_other, .. } = world.sent.remove(sent);
                let at = world.now;
                world.batches.push(Created { key, at, token, is_other, cancelled: false });
            }
            Action::Answer(worker) => world.settle(self, worker, Outcome::Succeeded)?,
            Action::LoseAnswer(worker) => {
                world.left.lost_answers = world.left.lost_answers.saturating_sub(1);
                world.lose_answer(worker)?;
            }
            Action::Refuse(worker) => {
                world.left.refusals -= 1;
                world.refuse(self, worker)?;
            }
            Action::Publish(worker) => world.publish(worker)?,
            Action::Acknowledge(worker) => world.acknowledge(worker)?,
            Action::Kill(worker, changes_key) => world.kill(worker, changes_key)?,
            Action::Purge => {
                world.left.purges -= 1;
                world.copies.clear();
            }
            Action::LoseLedger => {
                world.left.lost_ledgers -= 1;
                (world.row, world.ledger_lost) = (None, true);
            }
            Action::Redact => {
                world.left.redactions -= 1;
                world.redacted = true;
            }
            Action::Strike => world.strike(),
            Action::CancelStruck => {
                for batch in &mut world.batches {
                    batch.cancelled = true;
                }
                world.apply(&Op::Cancelled);
            }
            Action::Forget => {
                let row = world.row.as_ref()?;
                let is_kept = row.is_unfinished() && self.has(Rule::UnpublishedKept);
                if is_kept || row.is_to_cancel() {
                    return None;
                }
                world.row = None;
            }
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never twice", |_, world: &World| world.batches.len() <= 1),
            Property::always("never a false answer", |_, world: &World| !world.lies()),
            Property::always("never lost", |rules: &Self, world: &World| !world.is_lost(rules)),
            Property::always("a cancel is never lost", |rules: &Self, world: &World| {
                !world.calls_on(rules)
            }),
            Property::always("a cancel in advance holds", |_, world: &World| {
                !world.ruled_out || world.batches.is_empty() || world.ledger_lost
            }),
        ]
    }
}

fn of_worker(rules: &Rules, world: &World, worker: usize, actions: &mut Vec<Action>) {
    let Some(task) = world.task(worker) else {
        actions.extend((0..world.copies.len()).map(|copy| Action::Take(worker, copy)));
        let touched = world.row.as_ref().map_or(i64::MAX, |row| row.touched_at);
        let is_due = world.is_unfinished() && touched.saturating_add(UNTOUCHED) <= world.millis();
        if is_due && rules.has(Rule::Finisher) {
            actions.push(Action::Finish(worker));
        }
        return;
    };
    match task.phase {
        Phase::Deciding => actions.push(Action::Decide(worker)),
        Phase::Waiting => {
            let sent = world.sent.iter().any(|sent| sent.token == task.token);
            let done = world.batches.iter().any(|batch| batch.token == task.token);
            // Its time is over without an answer, whatever became of it.
            if world.left.lost_answers > 0 || !sent && !done {
                actions.push(Action::LoseAnswer(worker));
            }
            if done {
                actions.push(Action::Answer(worker));
            }
            if sent && world.left.refusals > 0 {
                actions.push(Action::Refuse(worker));
            }
        }
        Phase::Over(_) => actions.push(Action::Publish(worker)),
        Phase::Published => actions.push(Action::Acknowledge(worker)),
    }
    if world.left.kills > 0 {
        actions.push(Action::Kill(worker, false));
        if world.left.changed_keys > 0 {
            actions.push(Action::Kill(worker, true));
        }
    }
}

const SUBMIT: Copy = Copy { met_row: false, came_back: false, is_other: false };
const OTHER: Copy = Copy { is_other: true, ..SUBMIT };

fn run(without: Option<Rule>, faults: Faults, copies: &[Copy]) -> (Vec<&'static str>, usize) {
    let rules = Rules { without, faults, copies: copies.to_vec() };
    let checker = rules.checker().threads(2).spawn_bfs().join();
    let broken = checker.discoveries().into_keys().collect();
    (broken, checker.unique_state_count())
}

/// Each of them alone has to break something, under these faults.
fn faults_for(rule: Rule) -> (Faults, Vec<Copy>) {
    let none = Faults::default();
    match rule {
        Rule::SearchBeforeResend | Rule::RecordedBeforePublished => {
            (Faults { kills: 1, ..none }, vec![SUBMIT])
        }
        Rule::BusyUntil => (Faults { kills: 1, restarts_as_itself: true, ..none }, vec![SUBMIT]),
        Rule::ProofOfAbsence => (Faults { lost_answers: 1, redactions: 1, ..none }, vec![SUBMIT]),
        Rule::AbsenceBoundToKey => (Faults { kills: 1, changed_keys: 1, ..none }, vec![SUBMIT]),
        Rule::RenewalBeforeSend => (none, vec![SUBMIT, SUBMIT]),
        Rule::Fingerprint => (none, vec![SUBMIT, OTHER]),
        Rule::StrikeAtClaim | Rule::CancelOfStruck => (Faults { strikes: 1, ..none }, vec![SUBMIT]),
        Rule::MarkOnDeferred => (Faults { kills: 1, lost_ledgers: 1, ..none }, vec![SUBMIT]),
        Rule::ReleasedRowKept => (Faults { refusals: 1, purges: 1, ..none }, vec![SUBMIT]),
        Rule::Finisher | Rule::UnpublishedKept => {
            (Faults { kills: 1, purges: 1, ..none }, vec![SUBMIT])
        }
    }
}

const RULES: [Rule; 13] = [
    Rule::SearchBeforeResend,
    Rule::ProofOfAbsence,
    Rule::AbsenceBoundToKey,
    Rule::BusyUntil,
    Rule::RenewalBeforeSend,
    Rule::RecordedBeforePublished,
    Rule::Fingerprint,
    Rule::StrikeAtClaim,
    Rule::CancelOfStruck,
    Rule::MarkOnDeferred,
    Rule::Finisher,
    Rule::ReleasedRowKept,
    Rule::UnpublishedKept,
];

#[test]
fn without_any_one_of_its_rules_a_promise_is_broken() {
    for rule in RULES {
        let (faults, copies) = faults_for(rule);
        let (broken, states) = run(None, faults, &copies);
        assert!(broken.is_empty(), "{broken:?} with every rule, {states} states of {faults:?}");
        let (broken, _) = run(Some(rule), faults, &copies);
        assert!(!broken.is_empty(), "nothing breaks without {rule:?}: is it needed?");
    }
}

#[test]
fn with_all_of_its_rules_no_promise_is_broken_under_many_faults() {
    let none = Faults::default();
    for (faults, copies) in [
        (Faults { kills: 2, lost_answers: 1, refusals: 1, ..none }, vec![SUBMIT]),
        (Faults { kills: 1, lost_answers: 1, purges: 1, strikes: 1, ..none }, vec![SUBMIT]),
        (Faults { kills: 1, changed_keys: 1, redactions: 1, purges: 1, ..none }, vec![SUBMIT]),
        (Faults { kills: 1, refusals: 1, lost_ledgers: 1, ..none }, vec![SUBMIT]),
        (Faults { lost_answers: 1, ..none }, vec![SUBMIT, SUBMIT]),
        (Faults { refusals: 1, strikes: 1, ..none }, vec![SUBMIT, OTHER]),
    ] {
        let (broken, states) = run(None, faults, &copies);
        assert!(broken.is_empty(), "{broken:?}, {states} states of {faults:?}");
        assert!(states > 1_000, "{states} states of {faults:?}");
    }
}
