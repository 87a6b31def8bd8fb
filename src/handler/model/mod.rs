//! Explores every order of what two workers do to one submit, with the real transitions of the row
//! (`Op::apply`) and the real choice of the next step (`step.rs`). The faults are kills, stops, lost
//! connections, purges, cancels, a ledger that answers late or never, and an ElevenLabs that executes
//! late. For each rule, a run without it has to break a promise.
//!
//! A frozen worker needs no fault of its own: between any two of its steps, the time can run on.

mod leave;
mod names;
mod work;
mod world;

use std::collections::BTreeSet;

use stateright::{Checker as _, Model, Property};

use crate::ledger::row::{Row, State};

use work::{Act, Copy, Phase, Worker};
use world::{Befall, Faults, Rule, Rules, World, id};

/// Longer than any copy is on its way, in milliseconds.
const UNTOUCHED: i64 = 2_000;

/// Long enough for a death, a lease, a window and the search of the next worker.
const LAST_TICK: u8 = 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    Tick,
    By(usize, Act),
    Outside(Befall),
}

impl Model for Rules {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let worker = |id| Worker { id, key: 0, task: None };
        let mut world = World {
            now: 0,
            row: None,
            late: Vec::new(),
            stalls: false,
            copies: self.copies.clone(),
            workers: [worker(id(0)), worker(id(1))],
            sent: Vec::new(),
            batches: Vec::new(),
            redacted: false,
            results: BTreeSet::new(),
            mixed_up: false,
            claimed: false,
            struck: false,
            denied: false,
            ended_by_strike: false,
            ruled_out: false,
            ledger_lost: false,
            left: self.faults,
        };
        world.rename();
        vec![world]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        if world.now < LAST_TICK {
            actions.push(Action::Tick);
        }
        for worker in 0..2 {
            let mut acts = Vec::new();
            of_worker(self, world, worker, &mut acts);
            actions.extend(acts.into_iter().map(|act| Action::By(worker, act)));
        }
        from_outside(self, world, actions);
    }

    fn next_state(&self, before: &World, action: Action) -> Option<World> {
        let mut world = before.clone();
        match action {
            Action::Tick => world.tick(),
            Action::By(worker, act) => world.work(self, worker, act)?,
            Action::Outside(befall) => world.befall(self, befall)?,
        }
        world.rename();
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

fn from_outside(rules: &Rules, world: &World, actions: &mut Vec<Action>) {
    actions.extend((0..world.sent.len()).map(|sent| Action::Outside(Befall::Done(sent))));
    actions.extend((0..world.late.len()).map(|op| Action::Outside(Befall::Landed(op))));
    let settled = world.row.as_ref().is_some_and(|row| matches!(row.state, State::Settled(_)));
    let nobody_works = world.workers.iter().all(|worker| worker.task.is_none());
    let to_cancel = world.row.as_ref().is_some_and(Row::is_to_cancel);
    let left = world.left;
    // What comes late comes within the retention.
    let is_old = settled && world.is_idle() && world.late.is_empty();
    let all = [
        (left.stalls > 0 && !world.stalls, Befall::LedgerStalls),
        (left.purges > 0 && !world.copies.is_empty(), Befall::Purge),
        (left.lost_ledgers > 0 && nobody_works, Befall::LedgerLost),
        (left.redactions > 0 && !world.batches.is_empty(), Befall::Redaction),
        (left.strikes > 0, Befall::Strike),
        (to_cancel && rules.has(Rule::CancelOfStruck), Befall::CancelOfStruck),
        (is_old, Befall::Forgotten),
    ];
    let may = all.into_iter().filter(|(may, _)| *may);
    actions.extend(may.map(|(_, befall)| Action::Outside(befall)));
}

fn of_worker(rules: &Rules, world: &World, worker: usize, acts: &mut Vec<Act>) {
    let left = world.left;
    let Some(task) = world.task(worker) else {
        acts.extend((0..world.copies.len()).map(Act::Take));
        let is_poison = |copy: &usize| left.condemned > 0 && world.copies[*copy].came_back;
        acts.extend((0..world.copies.len()).filter(is_poison).map(Act::Condemn));
        let touched = world.row.as_ref().map_or(i64::MAX, |row| row.touched_at);
        let is_due = world.is_unfinished() && touched.saturating_add(UNTOUCHED) <= world.millis();
        if is_due && rules.has(Rule::Finisher) {
            acts.push(Act::Finish);
        }
        return;
    };
    let sent = world.sent.iter().any(|sent| sent.token == task.token);
    let done = world.batches.iter().any(|batch| batch.token == task.token);
    let waiting = task.phase == Phase::Waiting;
    let before_end = matches!(task.phase, Phase::Deciding | Phase::Waiting | Phase::Settling(_));
    // Its time is over without an answer, whatever became of it.
    let may_miss_answer = left.lost_answers > 0 || !sent && !done;
    let has_waited_for_ledger = match task.phase {
        Phase::Settling(_) => true,
        Phase::Deciding => rules.faults.stalls > left.stalls,
        _ => false,
    };
    let has_copy = task.copy.is_some() && !task.returned;
    let all = [
        (task.phase == Phase::Deciding, Act::Decide),
        (waiting && may_miss_answer, Act::LoseAnswer),
        (waiting && done, Act::Answer),
        (waiting && sent && left.refusals > 0, Act::Refuse { loses_confirm: false }),
        (
            waiting && sent && left.refusals > 0 && left.lost_confirms > 0 && has_copy,
            Act::Refuse { loses_confirm: true },
        ),
        (matches!(task.phase, Phase::Settling(_)), Act::SettleAgain),
        (has_waited_for_ledger, Act::GiveUpLedger),
        (matches!(task.phase, Phase::Condemning(_)), Act::Sentence),
        (matches!(task.phase, Phase::Over(_)), Act::Publish),
        (matches!(task.phase, Phase::Over(_)) && task.returned, Act::LeaveToCopy),
        (task.phase == Phase::Published, Act::Acknowledge),
        (left.lost_connections > 0 && has_copy, Act::LoseConnection),
        (left.stops > 0 && before_end, Act::Stop),
        (left.kills > 0, Act::Kill { changes_key: false }),
        (left.kills > 0 && left.changed_keys > 0, Act::Kill { changes_key: true }),
    ];
    acts.extend(all.into_iter().filter(|(may, _)| *may).map(|(_, act)| act));
}

const SUBMIT: Copy = Copy { met_row: false, came_back: false, is_other: false };
const OTHER: Copy = Copy { is_other: true, ..SUBMIT };
const REDELIVERED: Copy = Copy { came_back: true, ..SUBMIT };

/// A broken promise, and how it came to that.
type Broken = Vec<(&'static str, Vec<Action>)>;

fn run(without: Option<Rule>, faults: Faults, copies: &[Copy]) -> (Broken, usize) {
    let rules = Rules { without, faults, copies: copies.to_vec() };
    let checker = rules.checker().threads(2).spawn_bfs().join();
    let found = checker.discoveries().into_iter();
    let broken = found.map(|(promise, path)| (promise, path.into_actions())).collect();
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
        Rule::EndedIsOfLast => {
            let late = Faults { lost_answers: 1, stalls: 1, kills: 1, ..none };
            (Faults { restarts_as_itself: true, ..late }, vec![SUBMIT])
        }
        Rule::ProofOfAbsence => (Faults { lost_answers: 1, redactions: 1, ..none }, vec![SUBMIT]),
        Rule::AbsenceBoundToKey => (Faults { kills: 1, changed_keys: 1, ..none }, vec![SUBMIT]),
        Rule::RenewalBeforeSend => (none, vec![SUBMIT, SUBMIT]),
        Rule::Fingerprint => (none, vec![SUBMIT, OTHER]),
        Rule::StrikeAtClaim | Rule::CancelOfStruck => (Faults { strikes: 1, ..none }, vec![SUBMIT]),
        Rule::StrikeInDoubt => (Faults { strikes: 1, stalls: 1, ..none }, vec![SUBMIT]),
        Rule::MarkOnDeferred => (Faults { kills: 1, lost_ledgers: 1, ..none }, vec![SUBMIT]),
        Rule::SentenceAsSeen => {
            (Faults { condemned: 1, stops: 1, ..none }, vec![SUBMIT, REDELIVERED])
        }
        Rule::ReleasedRowKept => (Faults { refusals: 1, purges: 1, ..none }, vec![SUBMIT]),
        Rule::Finisher | Rule::UnpublishedKept => {
            (Faults { kills: 1, purges: 1, ..none }, vec![SUBMIT])
        }
    }
}

const RULES: [Rule; 16] = [
    Rule::SearchBeforeResend,
    Rule::ProofOfAbsence,
    Rule::AbsenceBoundToKey,
    Rule::BusyUntil,
    Rule::EndedIsOfLast,
    Rule::RenewalBeforeSend,
    Rule::RecordedBeforePublished,
    Rule::Fingerprint,
    Rule::StrikeAtClaim,
    Rule::StrikeInDoubt,
    Rule::CancelOfStruck,
    Rule::MarkOnDeferred,
    Rule::SentenceAsSeen,
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

fn holds_under(all: &[(Faults, &[Copy])]) {
    for (faults, copies) in all {
        let (broken, states) = run(None, *faults, copies);
        assert!(broken.is_empty(), "{broken:?}, {states} states of {faults:?}");
        assert!(states > 1_000, "{states} states of {faults:?}");
    }
}

#[test]
fn with_all_of_its_rules_no_promise_is_broken_under_many_faults() {
    let none = Faults::default();
    holds_under(&[
        (Faults { kills: 2, lost_answers: 1, refusals: 1, ..none }, &[SUBMIT]),
        (Faults { kills: 1, lost_answers: 1, purges: 1, strikes: 1, ..none }, &[SUBMIT]),
        (Faults { kills: 1, changed_keys: 1, redactions: 1, purges: 1, ..none }, &[SUBMIT]),
        (Faults { kills: 1, refusals: 1, lost_ledgers: 1, ..none }, &[SUBMIT]),
        (Faults { lost_answers: 1, ..none }, &[SUBMIT, SUBMIT]),
        (Faults { refusals: 1, strikes: 1, ..none }, &[SUBMIT, OTHER]),
        (Faults { kills: 1, ..none }, &[SUBMIT, SUBMIT, SUBMIT]),
    ]);
}

#[test]
fn nor_by_stops_lost_connections_and_lost_confirms() {
    let none = Faults::default();
    holds_under(&[
        (Faults { stops: 1, kills: 1, lost_answers: 1, ..none }, &[SUBMIT]),
        (Faults { stops: 1, strikes: 1, purges: 1, ..none }, &[SUBMIT]),
        (Faults { lost_connections: 1, kills: 1, ..none }, &[SUBMIT]),
        (Faults { lost_connections: 1, strikes: 1, purges: 1, ..none }, &[SUBMIT]),
        (Faults { lost_connections: 2, lost_answers: 1, ..none }, &[SUBMIT]),
        (Faults { refusals: 1, lost_confirms: 1, kills: 1, ..none }, &[SUBMIT]),
    ]);
}

#[test]
fn nor_by_a_ledger_that_answers_late_or_never() {
    let none = Faults::default();
    holds_under(&[
        (Faults { stalls: 1, kills: 1, ..none }, &[SUBMIT]),
        (Faults { stalls: 2, ..none }, &[SUBMIT]),
        (Faults { stalls: 1, stops: 1, purges: 1, ..none }, &[SUBMIT]),
        (Faults { stalls: 1, strikes: 1, ..none }, &[SUBMIT]),
        (Faults { stalls: 1, lost_answers: 1, refusals: 1, ..none }, &[SUBMIT]),
        (Faults { stalls: 1, lost_connections: 1, ..none }, &[SUBMIT]),
    ]);
}

#[test]
fn nor_by_giving_up_what_comes_back_too_often() {
    let none = Faults::default();
    holds_under(&[
        (Faults { condemned: 1, kills: 2, strikes: 1, ..none }, &[SUBMIT]),
        (Faults { condemned: 1, kills: 1, lost_ledgers: 1, ..none }, &[SUBMIT]),
        (Faults { condemned: 1, stalls: 1, kills: 1, ..none }, &[SUBMIT]),
    ]);
}
