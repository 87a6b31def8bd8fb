//! The faults of the vendor: which are ordered, and how many of each really happened.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use call_manager::domain::command::COMMAND_ID_VARIABLE;
use elevenlabs_sandbox::{
    Batch, BatchStatus, Effect, Fault, Reply, Request, Route, Sandbox, Unkind,
};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use crate::judge::Created;
use crate::plan::Looks;

/// How long a new batch is missing from the vendor's list.
pub const LIST_LAG: Duration = Duration::from_millis(300);

/// What a submit takes that meets no fault: long enough for a kill to find some under way.
const USUAL: Duration = Duration::from_millis(150);

/// Together with `LIST_LAG` well below the workers' `SETTLING_WINDOW`, which is what they allow the
/// vendor for a request whose sender has died to show up as a batch.
const SLOW: Duration = Duration::from_secs(1);

/// A connection of the vendor that breaks takes so many requests with it.
const CUT: u32 = 6;

/// Orders faults for every request until they are cleared: about one submit in eight meets one.
pub fn order(sandbox: &Sandbox, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    for (route, effects) in [
        (Route::Submit, submit_faults()),
        (Route::List, read_faults()),
        (Route::Get, read_faults()),
        (Route::Cancel, cancel_faults()),
    ] {
        for (effect, probability) in effects {
            let fault = Fault::on(route, effect).until_cleared();
            // Each with a seed of its own: with one for all they would meet the same requests.
            sandbox.order(fault.with_probability(probability, random.random()));
        }
    }
    // Last, because a request takes the first fault that is for it.
    sandbox.order(Fault::on(Route::Submit, Effect::Latency(USUAL)).until_cleared());
}

/// The next submits lose their connection, before or after the vendor has done what was asked; then
/// everything is as `order` says again.
pub fn cut(sandbox: &Sandbox, seed: u64) {
    sandbox.clear_faults();
    sandbox.order(Fault::on(Route::Submit, Effect::ResetAfter).times(CUT / 2));
    sandbox.order(Fault::on(Route::Submit, Effect::ResetBefore).times(CUT / 2));
    order(sandbox, seed);
}

fn submit_faults() -> Vec<(Effect, f64)> {
    let mut faults = vec![
        (Effect::ResetBefore, 0.008),
        (Effect::ResetAfter, 0.008),
        (Effect::CloseBefore, 0.006),
        (Effect::CloseAfter, 0.006),
        (Effect::Hang { processed: true }, 0.005),
        (Effect::Hang { processed: false }, 0.005),
        (Effect::Garbage, 0.006),
        (Effect::Truncated, 0.006),
        (Effect::Status(Reply::vendor_error(429, "rate_limit_exceeded", "Slow down.")), 0.007),
        (
            Effect::Status(
                Reply::vendor_error(429, "rate_limit_exceeded", "Slow down.").retry_after("1"),
            ),
            0.007,
        ),
        (Effect::Latency(SLOW), 0.02),
    ];
    for status in [500, 502, 503, 504, 408, 409] {
        faults.push((Effect::Status(Reply::new(status)), 0.003));
        faults.push((Effect::Status(Reply::new(status).processed()), 0.004));
    }
    faults
}

fn read_faults() -> Vec<(Effect, f64)> {
    let mut faults = vec![
        (Effect::ResetBefore, 0.01),
        (Effect::CloseBefore, 0.01),
        (Effect::Hang { processed: false }, 0.01),
        (Effect::Garbage, 0.01),
        (Effect::Truncated, 0.01),
        (Effect::Latency(SLOW), 0.01),
    ];
    for status in [429, 500, 503] {
        faults.push((Effect::Status(Reply::new(status)), 0.01));
    }
    // Right, and unkind.
    let unkind = [
        Unkind::Shuffled,
        Unkind::Lagging(LIST_LAG),
        Unkind::NamesNormalised,
        Unkind::RecipientsLate(LIST_LAG / 5),
        Unkind::ClockAhead(90),
    ];
    faults.extend(unkind.map(|unkind| (Effect::Unkind(unkind), 0.03)));
    faults.push((Effect::ClosedWhenIdle, 0.02));
    faults
}

/// Many, because there are few cancels.
fn cancel_faults() -> Vec<(Effect, f64)> {
    vec![
        (Effect::ResetBefore, 0.04),
        (Effect::ResetAfter, 0.04),
        (Effect::CloseAfter, 0.04),
        (Effect::Hang { processed: true }, 0.02),
        (Effect::Garbage, 0.03),
        (Effect::Truncated, 0.03),
        (Effect::Latency(SLOW), 0.05),
        (Effect::Status(Reply::new(429)), 0.03),
        (Effect::Status(Reply::new(500)), 0.03),
        (Effect::Status(Reply::new(502).processed()), 0.04),
    ]
}

/// The log does not tell a slow answer from a usual one.
const LATENCY: &str = "none (a usual answer, or a slow one)";

/// Faults that put a worker into the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// A submit that never came to anything, and nobody told.
    LostRequests,
    /// A submit that was done, and nobody told.
    LostAnswers,
    /// A submit that was answered with an error, and not done.
    Refused,
    /// The same, and it was done.
    RefusedAndDone,
    /// Whatever went wrong with a cancel.
    Cancels,
    /// Whatever went wrong with another request.
    Reads,
}

impl Group {
    pub const ALL: [Self; 6] = [
        Self::LostRequests,
        Self::LostAnswers,
        Self::Refused,
        Self::RefusedAndDone,
        Self::Cancels,
        Self::Reads,
    ];

    /// Its row in the table.
    pub const fn name(self) -> &'static str {
        match self {
            Self::LostRequests => "submits lost",
            Self::LostAnswers => "submits done, the answer lost",
            Self::Refused => "submits answered with an error",
            Self::RefusedAndDone => "submits done, answered with an error",
            Self::Cancels => "cancels that failed",
            Self::Reads => "reads that failed",
        }
    }

    /// None for a request that was answered as it should be, if slowly.
    fn of(request: &Request) -> Option<Self> {
        let harmless = ["latency_ms", "unkind", "closed_when_idle"];
        let fault = request.fault.as_deref().filter(|fault| !harmless.contains(fault))?;
        Some(match (request.route, fault, request.processed) {
            (Route::Submit, "status", false) => Self::Refused,
            (Route::Submit, "status", true) => Self::RefusedAndDone,
            (Route::Submit, _, false) => Self::LostRequests,
            (Route::Submit, _, true) => Self::LostAnswers,
            (Route::Cancel, _, _) => Self::Cancels,
            _ => Self::Reads,
        })
    }
}

/// What happened on the vendor's side.
#[derive(Debug, Default)]
pub struct Happened {
    /// The faults that were taken.
    pub groups: BTreeMap<Group, u32>,
    /// Every kind of fault, with how many submits and how many other requests took it.
    pub faults: BTreeMap<String, (usize, usize)>,
    /// All submits that arrived…
    pub submits: usize,
    /// …and those of them that were answered as the vendor should, if slowly.
    pub unharmed: usize,
}

impl Happened {
    /// Counts, with a zero for each kind that could have happened. Of a very long soak the sandbox
    /// remembers only the last 100,000 requests.
    pub fn of(requests: &[Request]) -> Self {
        let every = submit_faults().into_iter().chain(read_faults()).chain(cancel_faults());
        let faults = every.map(|(effect, _)| (name_of(&effect), (0, 0))).collect();
        let mut happened = Self { faults, ..Self::default() };
        for request in requests {
            if let Some(group) = Group::of(request) {
                *happened.groups.entry(group).or_default() += 1;
            }
            let is_submit = request.route == Route::Submit;
            happened.submits += usize::from(is_submit);
            let name = match request.fault.as_deref() {
                None => LATENCY.to_owned(),
                Some(fault) => name(fault, request.status, request.processed),
            };
            happened.unharmed += usize::from(is_submit && name == LATENCY);
            let (submits, others) = happened.faults.entry(name).or_default();
            *(if is_submit { submits } else { others }) += 1;
        }
        happened
    }
}

fn name_of(effect: &Effect) -> String {
    let status = match effect {
        Effect::Status(reply) => Some(reply.status),
        _ => None,
    };
    name(effect.name(), status, effect.processes())
}

/// `fault` is the name the sandbox logs.
fn name(fault: &str, status: Option<u16>, processed: bool) -> String {
    let how = if processed { "after it was done" } else { "not done" };
    match (fault, status) {
        ("status", Some(429)) => "429".to_owned(),
        ("status", Some(status)) => format!("{status}, {how}"),
        ("hang", _) => format!("no answer, {how}"),
        ("latency_ms", _) => LATENCY.to_owned(),
        ("garbage", _) => "200 that is no JSON".to_owned(),
        ("truncated", _) => "200 that is cut".to_owned(),
        ("reset_before" | "reset_after", _) => format!("reset, {how}"),
        ("close_before" | "close_after", _) => format!("closed, {how}"),
        (other, _) => other.to_owned(),
    }
}

/// What the judge has to know of a batch; `commands` are named by their markers.
pub fn created(batch: Batch, commands: &HashMap<String, String>) -> Created {
    let id_of = |recipient: &elevenlabs_sandbox::Recipient| {
        Some(recipient.dynamic_variables.get(COMMAND_ID_VARIABLE)?.as_str()?.to_owned())
    };
    let first = batch.recipients.first().and_then(id_of);
    let all_the_same = batch.recipients.iter().all(|recipient| id_of(recipient) == first);
    Created {
        batch_id: batch.id,
        command_id: first
            .filter(|_| all_the_same)
            .and_then(|marker| commands.get(&marker).cloned()),
        cancelled: batch.status == BatchStatus::Cancelled,
        looks: Looks {
            name: batch.name,
            agent: batch.agent_id,
            numbers: batch
                .recipients
                .into_iter()
                .map(|recipient| recipient.phone_number.unwrap_or_default())
                .collect(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn about_one_submit_in_eight_meets_a_fault() {
        let sum: f64 = submit_faults().iter().map(|(_, probability)| probability).sum();
        assert!((0.10..0.13).contains(&sum), "{sum}");
    }
}
