//! No order of transitions, by any workers, with any deaths and clocks, breaks a promise.

use std::cell::RefCell;
use std::collections::BTreeSet;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner};

use super::*;

/// What happens next in a history of one submit.
#[derive(Clone, Debug)]
enum Step {
    Wait(Millis),
    PutBack(Millis),
    Claim { worker: usize, other_body: bool },
    Renew { worker: usize, attempts: u32 },
    Settle { worker: usize, succeeded: bool },
    Release { worker: usize, may_have_left: bool },
    Die { worker: usize },
    Find { strike: Option<Millis> },
    Condemn { worker: usize },
}

const WORKERS: usize = 3;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let worker = || 0..WORKERS;
    let strike = prop::option::of(1..3 * LEASE);
    let step = prop_oneof![
        8 => (0..LEASE * 3 / 2).prop_map(Step::Wait),
        1 => (1..5 * LEASE).prop_map(Step::PutBack),
        10 => (worker(), prop::bool::weighted(0.1))
            .prop_map(|(worker, other_body)| Step::Claim { worker, other_body }),
        6 => (worker(), 0_u32..9).prop_map(|(worker, attempts)| Step::Renew { worker, attempts }),
        1 => (worker(), any::<bool>())
            .prop_map(|(worker, succeeded)| Step::Settle { worker, succeeded }),
        2 => (worker(), any::<bool>())
            .prop_map(|(worker, may_have_left)| Step::Release { worker, may_have_left }),
        1 => worker().prop_map(|worker| Step::Die { worker }),
        2 => strike.prop_map(|strike| Step::Find { strike }),
        1 => worker().prop_map(|worker| Step::Condemn { worker }),
    ];
    vec(step, 1..80)
}

/// What a worker remembers of its claim.
#[derive(Clone, Copy)]
struct Claimed {
    token: u128,
    /// It was told that others may have sent, so it can never say that nothing was.
    in_doubt: bool,
    /// By the worker's own clock, which nobody puts back.
    may_send_until: Millis,
}

/// What surely happened, by a clock that nobody puts back; nothing of it is read off the row.
#[derive(Default)]
struct History {
    row: Option<Row>,
    elapsed: Millis,
    put_back: Millis,
    tokens: u128,
    workers: [Option<Claimed>; WORKERS],
    /// The body, when it was claimed first, and how far the clock was put back by then.
    begun: Option<(Uuid, Millis, Millis)>,
    /// The first body that was claimed.
    body: Option<Uuid>,
    /// The newest claim: whose, and until when, by the store's clock, others wait for it.
    holder: Option<(usize, u128, Millis)>,
    attempts: u32,
    struck_until: Option<Millis>,
    /// Somebody had it and let go of it, and nothing of it was done.
    released: bool,
    ending: Option<Arc<str>>,
    /// The cases that came up: a history in which little happens proves little.
    met: BTreeSet<&'static str>,
}

impl History {
    /// By the store's clock.
    fn now(&self) -> Millis {
        NOW + self.elapsed - self.put_back
    }

    fn is_struck(&self) -> bool {
        let is_claimed = self.begun.is_some() || self.released;
        self.struck_until.is_some_and(|until| is_claimed || until > self.now())
    }

    fn holds(&self, token: u128) -> bool {
        self.holder.is_some_and(|(_, newest, _)| newest == token)
    }

    fn go(&mut self, step: &Step) -> Result<(), TestCaseError> {
        let (row, settled) = (self.row.clone(), self.ending.is_some());
        match *step {
            Step::Wait(span) => self.elapsed += span,
            Step::PutBack(span) => self.put_back += span,
            Step::Die { worker } => self.workers[worker] = None,
            Step::Claim { worker, other_body } => self.claim(worker, other_body)?,
            Step::Find { strike } => self.find(strike)?,
            Step::Condemn { worker } => self.condemn(worker)?,
            Step::Renew { worker, attempts } => {
                if let Some(claimed) = self.workers[worker] {
                    self.renew(worker, claimed, attempts)?;
                }
            }
            Step::Settle { worker, succeeded } => {
                if let Some(claimed) = self.workers[worker] {
                    self.settle(worker, claimed, succeeded)?;
                }
            }
            Step::Release { worker, may_have_left } => {
                if let Some(claimed) = self.workers[worker].take() {
                    self.release(claimed, may_have_left || claimed.in_doubt)?;
                }
            }
        }
        prop_assert!(!settled || self.row == row, "what is settled stays as it is");
        let may_send = self.workers.iter().flatten();
        let may_send = may_send.filter(|claimed| claimed.may_send_until > self.elapsed).count();
        prop_assert!(may_send <= 1, "at most one worker may send at any time");
        Ok(())
    }

    fn claim(&mut self, worker: usize, other_body: bool) -> Result<(), TestCaseError> {
        self.tokens += 1;
        let (now, token) = (self.now(), self.tokens);
        let fingerprint = if other_body { OTHER_BODY } else { BODY };
        self.workers[worker] = None;
        let before = self.row.clone();
        let op = claim_of(fingerprint, Uuid::from_u128(worker as u128), token);
        let reply = op.apply(&mut self.row, now);

        if self.body.is_some_and(|known| known != fingerprint) {
            self.met.insert("another body");
            prop_assert_eq!(reply, Reply::Conflict, "another body is a conflict");
            prop_assert_eq!(&self.row, &before, "and changes nothing");
            return Ok(());
        }
        if let Some(ending) = &self.ending {
            self.met.insert("claimed when settled");
            prop_assert_eq!(super::ending(&reply), &**ending, "settled for ever");
            return Ok(());
        }
        if let Some((holder, _, until)) = self.holder
            && holder != worker
            && until > now
        {
            self.met.insert("held");
            prop_assert_eq!(reply, Reply::InHand { remaining: span(until - now) });
            prop_assert_eq!(&self.row, &before, "who has to wait changes nothing");
            return Ok(());
        }
        let Reply::Yours(Yours { history, attempts, struck, .. }) = reply else {
            return Err(TestCaseError::fail(format!(
                "nobody holds it, but the reply is {reply:?}"
            )));
        };
        prop_assert_eq!(struck, self.is_struck(), "a strike is reported while it lasts");
        self.met.insert(if struck { "claimed when struck" } else { "claimed" });
        let in_doubt = self.begun.is_some();
        if !struck {
            self.struck_until = None;
        }
        match (self.begun, history) {
            (None, None) => {
                self.begun = Some((fingerprint, self.elapsed, self.put_back));
                prop_assert_eq!(attempts, self.attempts);
                self.attempts += 1;
            }
            (None, Some(_)) => prop_assert!(false, "nobody has begun it, so nothing was left"),
            (Some(_), None) => prop_assert!(false, "what may have been sent is never fresh"),
            (Some((_, at, put_back)), Some(super::super::History { age, .. })) => {
                let age = Millis::try_from(age.as_millis()).unwrap();
                let back = self.put_back - put_back;
                if self.elapsed - at >= back {
                    self.met.insert("abandoned");
                    prop_assert_eq!(age + back, self.elapsed - at, "since the first claim");
                } else {
                    self.met.insert("abandoned before it was begun");
                    prop_assert!(age >= self.elapsed - at, "a clock put back makes nothing young");
                }
                prop_assert_eq!(attempts, self.attempts);
            }
        }
        self.body = Some(fingerprint);
        self.holder = Some((worker, token, now + LEASE));
        let may_send_until = self.elapsed + LEASE;
        self.workers[worker] = Some(Claimed { token, in_doubt, may_send_until });
        Ok(())
    }

    fn renew(
        &mut self,
        worker: usize,
        claimed: Claimed,
        attempts: u32,
    ) -> Result<(), TestCaseError> {
        let now = self.now();
        let before = self.row.clone();
        let reply = renew(claimed.token, attempts).apply(&mut self.row, now);
        if self.ending.is_some() || !self.holds(claimed.token) {
            self.met.insert("renewed when gone");
            prop_assert_eq!(reply, Reply::Gone, "who was taken over is told so");
            prop_assert_eq!(&self.row, &before, "and changes nothing");
            self.workers[worker] = None;
            return Ok(());
        }
        let struck = self.is_struck();
        self.met.insert(if struck { "renewed when struck" } else { "renewed" });
        self.attempts = self.attempts.max(attempts);
        let Reply::Yours(Yours { history: Some(history), struck: told, attempts, .. }) = reply
        else {
            return Err(TestCaseError::fail(format!("it is its own, but the reply is {reply:?}")));
        };
        prop_assert_eq!(told, struck, "a strike is reported while it lasts");
        prop_assert_eq!(attempts, self.attempts);
        if let Some((_, at, put_back)) = self.begun {
            let age = Millis::try_from(history.age.as_millis()).unwrap();
            let back = self.put_back - put_back;
            prop_assert!(age >= self.elapsed - at - back, "since the first claim");
        }
        self.holder = Some((worker, claimed.token, now + LEASE));
        let may_send_until = self.elapsed + LEASE;
        self.workers[worker] = Some(Claimed { may_send_until, ..claimed });
        Ok(())
    }

    fn settle(
        &mut self,
        worker: usize,
        claimed: Claimed,
        succeeded: bool,
    ) -> Result<(), TestCaseError> {
        let ending: Arc<str> = format!("by {}", claimed.token).into();
        let op = super::settle(claimed.token, &ending, succeeded);
        let before = self.row.clone();
        let now = self.now();
        let reply = op.apply(&mut self.row, now);
        if let Some(first) = &self.ending {
            self.met.insert("settled again");
            prop_assert_eq!(super::ending(&reply), &**first, "the first ending counts");
        } else if !succeeded && !self.holds(claimed.token) {
            self.met.insert("failed when taken over");
            prop_assert_eq!(reply, Reply::Gone, "its failure says nothing about the other's");
            prop_assert_eq!(&self.row, &before, "and changes nothing");
            self.workers[worker] = None;
        } else {
            let own = self.holds(claimed.token);
            self.met.insert(if own { "settled" } else { "succeeded when taken over" });
            prop_assert_eq!(super::ending(&reply), &*ending, "it is recorded");
            self.ending = Some(ending);
        }
        Ok(())
    }

    fn release(&mut self, claimed: Claimed, may_have_left: bool) -> Result<(), TestCaseError> {
        let now = self.now();
        let before = self.row.clone();
        let reply = release(claimed.token, may_have_left).apply(&mut self.row, now);
        prop_assert_eq!(reply, Reply::Nobody);
        if self.ending.is_some() || !self.holds(claimed.token) {
            self.met.insert("let go of when gone");
            prop_assert_eq!(&self.row, &before, "it is not the caller's any more");
        } else if may_have_left {
            self.met.insert("let go of in doubt");
            self.holder = self.holder.map(|(worker, token, _)| (worker, token, now));
        } else {
            self.met.insert("let go of");
            let released = Row {
                touched_at: now,
                state: State::Released { attempts: 0 },
                ..before.unwrap_or_else(|| Row::new(now, State::Waiting))
            };
            prop_assert_eq!(self.row.as_ref(), Some(&released), "all of it stays but the hold");
            (self.released, self.begun, self.holder, self.attempts) = (true, None, None, 0);
        }
        Ok(())
    }

    /// As the ledger does: asks first, and then says what it has seen.
    fn condemn(&mut self, worker: usize) -> Result<(), TestCaseError> {
        let (now, by) = (self.now(), Uuid::from_u128(worker as u128));
        let before = self.row.clone();
        let asked = super::condemn(by, None).apply(&mut self.row, now);
        prop_assert_eq!(&self.row, &before, "to ask changes nothing");
        if self.body.is_some_and(|known| known != BODY) {
            self.met.insert("condemned with another body");
            prop_assert_eq!(asked, Reply::Conflict);
            return Ok(());
        }
        if let Some(ending) = &self.ending {
            prop_assert_eq!(super::ending(&asked), &**ending, "settled for ever");
            return Ok(());
        }
        if let Some((holder, _, until)) = self.holder
            && holder != worker
            && until > now
        {
            self.met.insert("condemned while another holds it");
            prop_assert_eq!(asked, Reply::InHand { remaining: span(until - now) });
            return Ok(());
        }
        let is_begun = self.begun.is_some();
        prop_assert_eq!(super::begun(&asked), is_begun, "whether a request may have left");
        self.met.insert(if is_begun { "condemned when begun" } else { "condemned" });
        let ending = format!("condemned, begun: {is_begun}");
        let reply = super::condemn(by, Some((is_begun, &ending))).apply(&mut self.row, now);
        prop_assert_eq!(super::ending(&reply), &*ending, "it is recorded");
        (self.ending, self.struck_until) = (Some(ending.into()), None);
        Ok(())
    }

    fn find(&mut self, strike: Option<Millis>) -> Result<(), TestCaseError> {
        let now = self.now();
        let reply = Op::Find { strike: strike.map(span) }.apply(&mut self.row, now);
        match (&self.ending, self.holder) {
            (Some(ending), _) => prop_assert_eq!(super::ending(&reply), &**ending),
            (None, None) => prop_assert_eq!(reply, Reply::Nobody),
            (None, Some((_, _, until))) => {
                let remaining = span((until - now).max(0));
                prop_assert_eq!(reply, Reply::InHand { remaining });
            }
        }
        if let Some(lasts) = strike
            && self.ending.is_none()
        {
            self.struck_until = self.struck_until.max(Some(now + lasts));
        }
        Ok(())
    }
}

#[test]
fn no_history_of_claims_crashes_and_clocks_breaks_a_promise() {
    let met = RefCell::new(BTreeSet::new());
    let config = ProptestConfig { cases: 1_000, failure_persistence: None, ..Default::default() };
    let checked = TestRunner::new(config).run(&steps(), |steps| {
        let mut history = History::default();
        for step in &steps {
            history.go(step)?;
        }
        met.borrow_mut().extend(history.met);
        Ok(())
    });
    checked.unwrap_or_else(|broken| panic!("{broken}"));
    let cases = [
        "abandoned",
        "abandoned before it was begun",
        "another body",
        "claimed",
        "claimed when settled",
        "claimed when struck",
        "condemned",
        "condemned when begun",
        "condemned while another holds it",
        "condemned with another body",
        "failed when taken over",
        "held",
        "let go of",
        "let go of in doubt",
        "let go of when gone",
        "renewed",
        "renewed when gone",
        "renewed when struck",
        "settled",
        "settled again",
        "succeeded when taken over",
    ];
    assert_eq!(met.into_inner(), cases.into(), "every case has come up");
}
