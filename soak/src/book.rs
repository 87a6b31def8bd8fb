//! What is known while the soak runs: what was sent and confirmed, what was answered, what happened.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::judge::Answer;
use crate::plan::Plan;

/// Shared by everything that runs at the same time.
pub struct Book {
    inner: Mutex<Inner>,
    began: Instant,
}

struct Inner {
    positions: HashMap<String, usize>,
    /// The submit that each command names.
    named: Vec<Option<usize>>,
    /// Of each command that was answered: the batch that its first result tells of.
    batches: HashMap<usize, Option<String>>,
    late: Vec<bool>,
    started: Vec<bool>,
    confirmed: Vec<bool>,
    answers: HashMap<String, Vec<Answer>>,
    numbers: Numbers,
    events: BTreeMap<&'static str, u32>,
    last_news: Instant,
    last_publish: Option<Instant>,
    last_first_answer: Option<Instant>,
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Numbers {
    /// Commands that were published at least once.
    pub started: usize,
    /// Commands of which the broker has confirmed a publication.
    pub confirmed: usize,
    /// Confirmed publications, copies and repetitions included.
    pub publications: usize,
    /// Commands with at least one result.
    pub answered: usize,
    /// Results, repetitions included.
    pub results: usize,
}

/// What is left to judge.
pub struct Record {
    /// Of each command.
    pub confirmed: Vec<bool>,
    /// Of each command, whether the submit that it names had its result before it was sent.
    pub late: Vec<bool>,
    /// By command id.
    pub answers: HashMap<String, Vec<Answer>>,
    /// How far it came.
    pub numbers: Numbers,
    /// How often each thing happened.
    pub events: BTreeMap<&'static str, u32>,
    /// From the last publication to the last first result.
    pub drain: Duration,
}

impl Book {
    pub fn new(plan: &Plan) -> Self {
        let ids = plan.commands.iter().map(|command| command.id.clone());
        let commands = plan.commands.len();
        Self {
            inner: Mutex::new(Inner {
                positions: ids.zip(0..).collect(),
                named: plan.commands.iter().map(|c| c.target()?.submit()).collect(),
                batches: HashMap::new(),
                late: vec![false; commands],
                started: vec![false; commands],
                confirmed: vec![false; commands],
                answers: HashMap::new(),
                numbers: Numbers::default(),
                events: BTreeMap::new(),
                last_news: Instant::now(),
                last_publish: None,
                last_first_answer: None,
            }),
            began: Instant::now(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something happened once more.
    pub fn count(&self, event: &'static str) {
        *self.lock().events.entry(event).or_default() += 1;
    }

    pub fn published(&self, command: usize) {
        let inner = &mut *self.lock();
        let first = !std::mem::replace(&mut inner.started[command], true);
        if first {
            let answered = |submit| inner.batches.contains_key(&submit);
            inner.late[command] = inner.named[command].is_some_and(answered);
        }
        inner.numbers.started += usize::from(first);
        inner.last_publish = Some(Instant::now());
    }

    pub fn confirmed(&self, command: usize) {
        let inner = &mut *self.lock();
        let first = !std::mem::replace(&mut inner.confirmed[command], true);
        inner.numbers.confirmed += usize::from(first);
        inner.numbers.publications += 1;
        if first {
            inner.last_news = Instant::now();
        }
    }

    pub fn answered(&self, command_id: &str, answer: Answer) {
        let inner = &mut *self.lock();
        inner.numbers.results += 1;
        let answers = inner.answers.entry(command_id.to_owned()).or_default();
        let first = answers.is_empty();
        let batch = answer.batch_id();
        answers.push(answer);
        if let Some(position) = inner.positions.get(command_id).filter(|_| first) {
            inner.batches.insert(*position, batch);
            inner.numbers.answered += 1;
            inner.last_news = Instant::now();
            inner.last_first_answer = Some(Instant::now());
        }
    }

    pub fn is_answered(&self, command: usize) -> bool {
        self.lock().batches.contains_key(&command)
    }

    /// The batch of a command that is answered, as far as its first result tells of one.
    pub fn batch_of(&self, command: usize) -> Option<String> {
        self.lock().batches.get(&command)?.clone()
    }

    pub fn numbers(&self) -> Numbers {
        self.lock().numbers
    }

    /// How long nothing was confirmed or answered for the first time.
    pub fn silence(&self) -> Duration {
        self.lock().last_news.elapsed()
    }

    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    pub fn events(&self) -> BTreeMap<&'static str, u32> {
        self.lock().events.clone()
    }

    pub fn record(&self) -> Record {
        let inner = self.lock();
        let (answer, publish) = (inner.last_first_answer, inner.last_publish);
        let drain =
            answer.zip(publish).map(|(answer, publish)| answer.saturating_duration_since(publish));
        Record {
            confirmed: inner.confirmed.clone(),
            late: inner.late.clone(),
            answers: inner.answers.clone(),
            numbers: inner.numbers,
            events: inner.events.clone(),
            drain: drain.unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Asks, Command, Expected, Looks, Target};

    #[test]
    fn a_command_is_late_that_was_first_sent_behind_the_result_of_its_submit() {
        let submit = Asks::Submit { expected: Expected::Batch, looks: Looks::default() };
        let all = [submit, Asks::Get(Target::Submit(0)), Asks::Get(Target::BatchOf(0))];
        let commands = all.into_iter().enumerate().map(|(n, asks)| Command {
            id: n.to_string(),
            asks,
            body: Vec::new(),
            not_after: None,
        });
        let book = Book::new(&Plan { commands: commands.collect(), order: Vec::new() });
        book.published(0);
        book.published(1);
        assert!(!book.is_answered(0));
        let answer = |batch| Answer {
            message_id: "m".into(),
            routing_key: String::new(),
            error_code: None,
            body: format!("{{\"data\": {{\"id\": \"{batch}\"}}}}"),
        };
        book.answered("0", answer("b"));
        book.answered("0", answer("another"));
        assert_eq!(book.batch_of(0).as_deref(), Some("b"));
        book.published(1);
        book.published(2);
        assert_eq!(book.record().late, [false, false, true]);
    }
}
