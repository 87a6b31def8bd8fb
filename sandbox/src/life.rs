//! How a batch and its calls move: everything follows from how old the batch is (pure).

use std::time::Duration;

use serde::Serialize;

/// How many calls of one batch run at the same time unless its submit says otherwise.
const DEFAULT_CONCURRENCY: u64 = 20;
/// How long a due batch waits before its first call, so that a submit answers `pending`.
const PICK_UP: Duration = Duration::from_secs(1);
const DISPATCH: Duration = Duration::from_secs(1);
const RINGING: Duration = Duration::from_secs(4);
const REFUSAL: Duration = Duration::from_secs(3);
const VOICEMAIL_GREETING: Duration = Duration::from_secs(12);
const TALK: Duration = Duration::from_secs(20);

/// Where a batch stands, in the vendor's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BatchStatus {
    /// Its time has not come, or its first call is about to go out.
    Pending,
    /// Calls go out.
    InProgress,
    /// Every call has ended.
    Completed,
    /// Every call has ended, and every one of them failed.
    Failed,
    /// Somebody cancelled it.
    Cancelled,
}

/// Where one recipient's call stands, in the vendor's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CallStatus {
    /// Not begun.
    Pending,
    /// Handed to the telephony provider.
    Dispatched,
    /// The phone rings.
    Initiated,
    /// Somebody, or a voicemail box, has answered.
    InProgress,
    /// The conversation is over.
    Completed,
    /// The provider refused the call, or nobody answered.
    Failed,
    /// The batch was cancelled before this call ended.
    Cancelled,
    /// A voicemail box answered.
    Voicemail,
}

/// How a call ends. A phone number's last digit decides, so that a test can choose it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Talked,
    Refused,
    Voicemail,
    NoAnswer,
}

impl Outcome {
    /// 7 is refused, 8 has voicemail, 9 does not answer, everybody else talks. A repeated call
    /// succeeds, but for numbers that end in 77 or 99.
    fn of(number: Option<&str>, attempt: u32) -> Self {
        let number = number.unwrap_or_default();
        let never = number.ends_with("77") || number.ends_with("99");
        match number.bytes().last() {
            Some(b'7') if attempt == 0 || never => Self::Refused,
            Some(b'9') if attempt == 0 || never => Self::NoAnswer,
            Some(b'8') => Self::Voicemail,
            _ => Self::Talked,
        }
    }
}

/// One recipient's present call. Times are ages of the batch.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    begins: Duration,
    ends: Duration,
    outcome: Outcome,
    attempt: u32,
}

impl Call {
    /// Where the call stands at an age of the batch, and since when.
    fn at(&self, age: Duration) -> (CallStatus, Duration) {
        let rings = self.begins.saturating_add(DISPATCH);
        let answered = rings.saturating_add(RINGING);
        if age >= self.ends {
            let status = match self.outcome {
                Outcome::Talked => CallStatus::Completed,
                // The published list of statuses has no word of its own for «nobody answered».
                Outcome::Refused | Outcome::NoAnswer => CallStatus::Failed,
                Outcome::Voicemail => CallStatus::Voicemail,
            };
            (status, self.ends)
        } else if age < self.begins {
            (CallStatus::Pending, Duration::ZERO)
        } else if age < rings {
            (CallStatus::Dispatched, self.begins)
        } else if age < answered || matches!(self.outcome, Outcome::Refused | Outcome::NoAnswer) {
            (CallStatus::Initiated, rings)
        } else {
            (CallStatus::InProgress, answered)
        }
    }

    fn is_to_be_repeated(&self) -> bool {
        matches!(self.outcome, Outcome::Refused | Outcome::NoAnswer)
    }
}

/// A recipient as an answer shows it. `since` is an age of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CallNow {
    pub(crate) status: CallStatus,
    pub(crate) since: Duration,
    /// Which conversation it led to, counted from 0; none where nobody answered.
    pub(crate) conversation: Option<u32>,
}

/// A batch as an answer shows it. `since` is the age at which it last changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) status: BatchStatus,
    pub(crate) dispatched: u64,
    pub(crate) scheduled: u64,
    pub(crate) finished: u64,
    pub(crate) since: Duration,
}

/// The calls of one batch.
#[derive(Debug)]
pub(crate) struct Life {
    calls: Vec<Call>,
    lanes: usize,
    ringing_timeout: Duration,
    cancelled: Option<Duration>,
    retried: Option<Duration>,
    pub(crate) retry_count: u32,
    /// Calls of earlier rounds whose recipients were called again since.
    repeated: u64,
}

impl Life {
    /// `due` is the age at which the batch's scheduled time comes.
    pub(crate) fn new<'a>(
        numbers: impl Iterator<Item = Option<&'a str>>,
        due: Duration,
        ringing_timeout: Duration,
        concurrency: Option<u64>,
    ) -> Self {
        let lanes = concurrency.unwrap_or(DEFAULT_CONCURRENCY);
        let mut life = Self {
            calls: numbers
                .map(|number| Call {
                    begins: Duration::ZERO,
                    ends: Duration::ZERO,
                    outcome: Outcome::of(number, 0),
                    attempt: 0,
                })
                .collect(),
            lanes: usize::try_from(lanes).unwrap_or(usize::MAX).max(1),
            ringing_timeout,
            cancelled: None,
            retried: None,
            retry_count: 0,
            repeated: 0,
        };
        let all = (0..life.calls.len()).collect::<Vec<_>>();
        life.plan(&all, due.saturating_add(PICK_UP));
        life
    }

    /// Each lane makes one call after the other.
    fn plan(&mut self, which: &[usize], from: Duration) {
        let mut lanes = vec![from; self.lanes.min(which.len())];
        let lane_count = lanes.len().max(1);
        for (turn, index) in which.iter().enumerate() {
            let call = &mut self.calls[*index];
            let lane = &mut lanes[turn % lane_count];
            call.begins = *lane;
            let takes = match call.outcome {
                Outcome::Talked => TALK,
                Outcome::Refused => REFUSAL,
                Outcome::Voicemail => VOICEMAIL_GREETING,
                Outcome::NoAnswer => DISPATCH.saturating_add(self.ringing_timeout),
            };
            call.ends = call.begins.saturating_add(takes);
            *lane = call.ends;
        }
    }

    pub(crate) fn call(&self, index: usize, age: Duration) -> CallNow {
        let call = &self.calls[index];
        let (status, since) = match self.cancelled {
            Some(at) if call.ends > at => (CallStatus::Cancelled, at),
            Some(at) => call.at(at.min(age)),
            None => call.at(age),
        };
        // A call of a later round waits since that round was asked for.
        let since = match self.retried {
            Some(at) if status == CallStatus::Pending && call.attempt > 0 => at,
            _ => since,
        };
        let answered = matches!(
            status,
            CallStatus::InProgress | CallStatus::Completed | CallStatus::Voicemail
        );
        CallNow { status, since, conversation: answered.then_some(call.attempt) }
    }

    pub(crate) fn progress(&self, age: Duration) -> Progress {
        let shown = self.cancelled.unwrap_or(age);
        let (mut dispatched, mut finished, mut failed) = (0, 0, 0);
        let mut since = self.cancelled.or(self.retried).unwrap_or_default();
        for call in &self.calls {
            let (status, changed) = call.at(shown);
            since = since.max(changed);
            dispatched += u64::from(status != CallStatus::Pending);
            finished += u64::from(shown >= call.ends);
            failed += u64::from(status == CallStatus::Failed);
        }
        let total = count(self.calls.len());
        let status = if self.cancelled.is_some() {
            BatchStatus::Cancelled
        } else if finished == total {
            if failed == total && total > 0 { BatchStatus::Failed } else { BatchStatus::Completed }
        } else if dispatched == 0 && self.retried.is_none() {
            BatchStatus::Pending
        } else {
            BatchStatus::InProgress
        };
        Progress {
            status,
            dispatched: dispatched + self.repeated,
            scheduled: total + self.repeated,
            finished: finished + self.repeated,
            since,
        }
    }

    pub(crate) fn cancel(&mut self, age: Duration) {
        self.cancelled = Some(age);
    }

    /// Calls the failed and the unanswered again. Says whether there was any.
    pub(crate) fn retry<'a>(
        &mut self,
        age: Duration,
        number_of: impl Fn(usize) -> Option<&'a str>,
    ) -> bool {
        let again: Vec<usize> =
            (0..self.calls.len()).filter(|index| self.calls[*index].is_to_be_repeated()).collect();
        if again.is_empty() {
            return false;
        }
        for index in &again {
            let call = &mut self.calls[*index];
            call.attempt += 1;
            call.outcome = Outcome::of(number_of(*index), call.attempt);
        }
        self.repeated += count(again.len());
        self.retried = Some(age);
        self.retry_count += 1;
        self.plan(&again, age.saturating_add(PICK_UP));
        true
    }
}

fn count(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use CallStatus::{
        Cancelled, Completed, Dispatched, Failed, InProgress, Initiated, Pending, Voicemail,
    };

    const NUMBERS: [&str; 4] = ["+14155550100", "+14155550107", "+14155550108", "+14155550109"];

    fn life() -> Life {
        Life::new(NUMBERS.iter().map(|n| Some(*n)), Duration::ZERO, Duration::from_secs(30), None)
    }

    fn statuses(life: &Life, second: u64) -> Vec<CallStatus> {
        let age = Duration::from_secs(second);
        (0..life.calls.len()).map(|index| life.call(index, age).status).collect()
    }

    #[test]
    fn a_call_goes_through_every_stage_and_ends_as_its_number_says() {
        let life = life();
        assert_eq!(statuses(&life, 0), [Pending; 4]);
        assert_eq!(statuses(&life, 1), [Dispatched; 4]);
        assert_eq!(statuses(&life, 3), [Initiated; 4]);
        assert_eq!(statuses(&life, 7), [InProgress, Failed, InProgress, Initiated]);
        assert_eq!(statuses(&life, 21), [Completed, Failed, Voicemail, Initiated]);
        assert_eq!(statuses(&life, 32), [Completed, Failed, Voicemail, Failed]);
    }

    #[test]
    fn the_counters_follow_the_calls() {
        let life = life();
        let at = |second| {
            let now = life.progress(Duration::from_secs(second));
            (now.status, now.dispatched, now.scheduled, now.finished)
        };
        assert_eq!(at(0), (BatchStatus::Pending, 0, 4, 0));
        assert_eq!(at(1), (BatchStatus::InProgress, 4, 4, 0));
        assert_eq!(at(21), (BatchStatus::InProgress, 4, 4, 3));
        assert_eq!(at(32), (BatchStatus::Completed, 4, 4, 4));
    }

    #[test]
    fn a_limit_of_one_makes_one_call_after_the_other() {
        let numbers = [Some("+14155550100"); 3].into_iter();
        let life = Life::new(numbers, Duration::ZERO, Duration::from_secs(30), Some(1));
        let dispatched = |second| life.progress(Duration::from_secs(second)).dispatched;
        assert_eq!([dispatched(1), dispatched(20), dispatched(21), dispatched(41)], [1, 1, 2, 3]);
    }

    #[test]
    fn a_retry_calls_only_the_failed_and_the_unanswered_again() {
        let mut life = life();
        let age = Duration::from_secs(100);
        assert!(life.retry(age, |index| Some(NUMBERS[index])));
        assert_eq!(life.retry_count, 1);
        let now = life.progress(age);
        assert_eq!((now.status, now.scheduled, now.finished), (BatchStatus::InProgress, 6, 4));
        assert_eq!(statuses(&life, 100), [Completed, Pending, Voicemail, Pending]);
        assert_eq!(statuses(&life, 121), [Completed, Completed, Voicemail, Completed]);
        assert!(!life.retry(Duration::from_secs(200), |index| Some(NUMBERS[index])));
    }

    #[test]
    fn a_cancel_stops_what_has_not_ended() {
        let mut life = life();
        life.cancel(Duration::from_secs(7));
        assert_eq!(statuses(&life, 500), [Cancelled, Failed, Cancelled, Cancelled]);
        let now = life.progress(Duration::from_secs(500));
        assert_eq!((now.status, now.since), (BatchStatus::Cancelled, Duration::from_secs(7)));
    }
}
