//! Holds submits while ElevenLabs refuses them because of the account. A read says nothing about
//! that, so one submit at a time tries whether they are taken again.

use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{info, warn};

use crate::elevenlabs::Error;
use crate::retry::{Policy, Schedule};
use crate::telemetry::chain;

/// The longest wait between two trials: what a person waits at most who has paid.
const LONGEST_WAIT: Duration = Duration::from_secs(5 * 60);

/// How long submits are held before one tries.
const TRIALS: Policy = Policy { initial: Duration::from_secs(5), max: LONGEST_WAIT, horizon: None };

/// How long submits are held after a trial that said nothing about the account.
const AFTER_NO_WORD: Duration = Duration::from_secs(5);

/// How long a trial is left to the submits that are deferred already. Each is back within a minute.
pub const FOR_DEFERRED: Duration = Duration::from_secs(75);

/// Whether ElevenLabs takes submits of this account. One per process; every submit asks.
#[derive(Debug)]
pub struct Account {
    hold: watch::Sender<Option<Hold>>,
}

#[derive(Clone, Debug)]
struct Hold {
    /// ElevenLabs' words.
    reason: String,
    pace: Schedule,
    next_trial: Instant,
    is_trying: bool,
}

impl Default for Account {
    fn default() -> Self {
        Self { hold: watch::Sender::new(None) }
    }
}

impl Account {
    /// Follows the hold. A trial counts as due `patience` after its time.
    pub fn watch(&self, patience: Duration) -> Watch {
        Watch { hold: self.hold.subscribe(), patience, told: None }
    }

    /// `None` while submits are held, but for one whose trial is due.
    pub fn pass(&self) -> Option<Pass<'_>> {
        let (mut is_held, mut is_due) = (false, false);
        self.hold.send_if_modified(|hold| {
            let Some(hold) = hold else { return false };
            is_held = true;
            is_due = !hold.is_trying && hold.next_trial <= Instant::now();
            hold.is_trying |= is_due;
            is_due
        });
        (is_due || !is_held).then(|| Pass { account: self, is_trial: is_due })
    }
}

impl Hold {
    fn begin() -> Self {
        let (reason, pace) = (String::new(), TRIALS.start());
        Self { reason, pace, next_trial: Instant::now(), is_trying: false }
    }

    fn try_in(&mut self, wait: Duration) {
        self.next_trial = Instant::now() + wait;
        self.is_trying = false;
    }
}

/// A submit may be sent. Dropped without a verdict, it has learned nothing about the account.
#[derive(Debug)]
pub struct Pass<'a> {
    account: &'a Account,
    is_trial: bool,
}

impl Pass<'_> {
    /// ElevenLabs has created the batch. Only a trial ends a hold: what was sent before it began may
    /// be answered late.
    pub fn accepted(self) {
        if self.is_trial {
            self.account.hold.send_replace(None);
            info!("ElevenLabs takes submits of this account again");
        }
    }

    /// ElevenLabs has refused the submit because of the account.
    pub fn refused(self, command_id: &str, error: &Error) {
        let mut is_new = false;
        self.account.hold.send_modify(|hold| {
            is_new = hold.is_none();
            let hold = hold.get_or_insert_with(Hold::begin);
            hold.reason = error.to_string();
            // Those that were under way together count once.
            if is_new || self.is_trial {
                let asked = error.retry_after().map(|wait| wait.min(LONGEST_WAIT));
                let wait = hold.pace.next_wait(asked).unwrap_or(LONGEST_WAIT);
                hold.try_in(wait);
            }
        });
        let (error, request_id) = (chain(error), error.request_id());
        if is_new {
            warn!(
                command_id,
                request_id,
                error,
                "ElevenLabs takes no submits of this account; they wait, and one at a time tries again"
            );
        } else {
            info!(command_id, request_id, error, "the submit waits for the account");
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if !self.is_trial {
            return;
        }
        self.account.hold.send_if_modified(|hold| match hold {
            Some(hold) if hold.is_trying => {
                hold.try_in(AFTER_NO_WORD);
                true
            }
            _ => false,
        });
    }
}

/// Follows the hold.
#[derive(Clone, Debug)]
pub struct Watch {
    hold: watch::Receiver<Option<Hold>>,
    patience: Duration,
    /// The trial of which [`Watch::changed`] has told: of each it tells once.
    told: Option<Instant>,
}

impl Watch {
    /// Submits are not held, or a trial is due.
    pub fn takes(&self) -> bool {
        self.hold.borrow().is_none() || self.due_at().is_some_and(|due| due <= Instant::now())
    }

    /// Why submits are held, in ElevenLabs' words.
    pub fn reason(&self) -> Option<String> {
        self.hold.borrow().as_ref().map(|hold| hold.reason.clone())
    }

    /// Returns at the next change, or when a trial becomes due; never where there is none any more.
    pub async fn changed(&mut self) {
        let due = self.due_at().filter(|due| self.told != Some(*due));
        let due_at = tokio::time::Instant::from_std(due.unwrap_or_else(Instant::now));
        let changed = tokio::select! {
            changed = self.hold.changed() => changed,
            () = tokio::time::sleep_until(due_at), if due.is_some() => {
                self.told = due;
                Ok(())
            }
        };
        if changed.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// `None` while none is to be awaited.
    fn due_at(&self) -> Option<Instant> {
        let hold = self.hold.borrow();
        let hold = hold.as_ref().filter(|hold| !hold.is_trying)?;
        Some(hold.next_trial + self.patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(retry_after: Option<u64>) -> Error {
        let retry_after = retry_after.map(Duration::from_secs);
        let message = "No credits.".to_owned();
        Error::Account { status: 402, message, retry_after, request_id: None }
    }

    fn refuse(account: &Account) {
        account.pass().expect("it may be sent").refused("m", &refusal(None));
    }

    /// As if so much time had passed.
    fn pass_time(account: &Account, time: Duration) {
        account.hold.send_modify(|hold| {
            let hold = hold.as_mut().expect("submits are held");
            hold.next_trial =
                hold.next_trial.checked_sub(time).expect("the clock goes back so far");
        });
    }

    fn next_trial_in(account: &Account) -> Duration {
        let hold = account.hold.borrow();
        let hold = hold.as_ref().filter(|hold| !hold.is_trying).expect("none is under way");
        hold.next_trial.saturating_duration_since(Instant::now())
    }

    #[test]
    fn while_submits_are_held_one_at_a_time_tries_and_its_success_ends_that() {
        let account = Account::default();
        let (one, two) = (account.pass().unwrap(), account.pass().unwrap());
        one.refused("m", &refusal(None));
        assert!(account.pass().is_none());
        // It was sent before.
        two.accepted();
        assert!(account.pass().is_none());
        pass_time(&account, Duration::from_secs(8));
        let trial = account.pass().unwrap();
        assert!(account.pass().is_none(), "one is under way");
        trial.accepted();
        assert!(account.pass().is_some() && account.pass().is_some());
    }

    #[test]
    fn each_trial_that_is_refused_makes_the_next_one_wait_longer_up_to_a_limit() {
        let account = Account::default();
        let (one, two) = (account.pass().unwrap(), account.pass().unwrap());
        one.refused("m", &refusal(None));
        let first = next_trial_in(&account);
        two.refused("n", &refusal(None));
        assert!(next_trial_in(&account) <= first, "those that were under way count once");
        assert!(first <= Duration::from_millis(7_500), "{first:?}");
        for _ in 0..20 {
            pass_time(&account, LONGEST_WAIT);
            refuse(&account);
        }
        let last = next_trial_in(&account);
        assert!(last > LONGEST_WAIT / 3 && last <= LONGEST_WAIT, "{last:?}");
        pass_time(&account, LONGEST_WAIT);
        account.pass().unwrap().refused("m", &refusal(Some(86_400)));
        assert!(next_trial_in(&account) <= LONGEST_WAIT, "a wait that is asked for has a limit");
    }

    #[test]
    fn a_trial_that_learns_nothing_is_followed_by_another_one() {
        let account = Account::default();
        refuse(&account);
        pass_time(&account, Duration::from_secs(8));
        drop(account.pass().unwrap());
        assert!(account.pass().is_none(), "not at once");
        pass_time(&account, AFTER_NO_WORD);
        assert!(account.pass().is_some());
    }

    #[test]
    fn fresh_submits_are_taken_where_no_deferred_one_has_tried() {
        let account = Account::default();
        let watch = account.watch(FOR_DEFERRED);
        assert!(watch.takes() && watch.reason().is_none());
        refuse(&account);
        assert!(watch.reason().unwrap().ends_with("(HTTP 402): No credits."));
        pass_time(&account, Duration::from_secs(8));
        assert!(!watch.takes());
        pass_time(&account, FOR_DEFERRED);
        assert!(watch.takes());
        let trial = account.pass().unwrap();
        assert!(!watch.takes(), "it is the only one");
        trial.accepted();
        assert!(watch.takes());
    }
}
