//! What is going to be sent: every command, and the order of its publications, from the seed alone.

use call_manager::domain::command::CommandKind;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};

/// Few, so that many commands look alike: name, agent and number of recipients of one fit others.
const CAMPAIGNS: usize = 30;
const AGENTS: usize = 20;
const MAX_RECIPIENTS: usize = 5;
/// A copy is published up to so many places after its original.
const COPY_DISTANCE: usize = 60;

/// Unix seconds of a `not_after` that has passed…
const LONG_AGO: i64 = 1_600_000_000;
/// …and of one that does not pass while anybody soaks.
const FAR_AHEAD: i64 = 4_000_000_000;

/// One in so many commands is a cancel or a get.
const ONE_NAMES_A_SUBMIT_OF: usize = 5;
/// A cancel that shall come first is published up to so many places before its submit.
const HEAD_START: usize = 25;
/// Up to so many places behind its submit, a command finds it in hand, as far as the worker keeps up.
const AT_ONCE: usize = 4;
/// So many places behind its submit and more, a command finds it done, where no fault held it up.
const LATER: std::ops::Range<usize> = 60..200;

/// A batch id that the vendor never gave.
pub const NO_BATCH: &str = "btcal_of_nobody";

/// How a submit may end, where no cancel names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// With a batch, where no fault prevents it.
    Batch,
    /// It breaks the contract.
    Invalid,
    /// The vendor knows no such agent or phone number.
    NotFound,
    /// Its `not_after` had passed before it was sent.
    Expired,
}

/// One command.
#[derive(Clone, Debug)]
pub struct Command {
    /// Its `message_id`.
    pub id: String,
    /// What it is about.
    pub asks: Asks,
    /// What is published; nothing where it takes the id of a batch, which comes with a result.
    pub body: Vec<u8>,
    /// The header of that name, in Unix seconds.
    pub not_after: Option<i64>,
}

/// What a command is about.
#[derive(Clone, Debug)]
pub enum Asks {
    /// A new batch.
    Submit {
        /// How it may end.
        expected: Expected,
        /// What a batch of it looks like.
        looks: Looks,
    },
    /// The end of a batch.
    Cancel(Target),
    /// The state of a batch.
    Get(Target),
}

/// What a cancel or a get names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The command id of the submit at this position in the plan.
    Submit(usize),
    /// The batch of that submit, or `NO_BATCH` where it has none. It waits for the submit's result.
    BatchOf(usize),
    /// A command id or a batch id that nobody has.
    Nobody,
}

/// What a batch has to have in common with its command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Looks {
    /// `call_name`.
    pub name: String,
    /// `agent_id`.
    pub agent: String,
    /// The phone numbers, in order.
    pub numbers: Vec<String>,
}

impl Command {
    pub const fn kind(&self) -> CommandKind {
        match self.asks {
            Asks::Submit { .. } => CommandKind::Submit,
            Asks::Cancel(_) => CommandKind::Cancel,
            Asks::Get(_) => CommandKind::Get,
        }
    }

    /// Whether it breaks the contract.
    pub const fn is_invalid(&self) -> bool {
        matches!(self.asks, Asks::Submit { expected: Expected::Invalid, .. })
    }

    /// What a cancel or a get names.
    pub const fn target(&self) -> Option<Target> {
        match self.asks {
            Asks::Submit { .. } => None,
            Asks::Cancel(target) | Asks::Get(target) => Some(target),
        }
    }

    /// The submit whose result it has to wait for.
    pub const fn waits_for(&self) -> Option<usize> {
        match self.target() {
            Some(Target::BatchOf(submit)) => Some(submit),
            _ => None,
        }
    }
}

impl Target {
    /// The submit that it is about.
    pub const fn submit(self) -> Option<usize> {
        match self {
            Self::Submit(submit) | Self::BatchOf(submit) => Some(submit),
            Self::Nobody => None,
        }
    }
}

/// Everything that is going to be sent.
pub struct Plan {
    /// Each once, the submits first.
    pub commands: Vec<Command>,
    /// Positions in `commands`, in the order of publication; those of copies appear again.
    pub order: Vec<usize>,
}

impl Plan {
    /// The same for the same seed.
    pub fn new(seed: u64, commands: usize) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let submits = commands - commands / ONE_NAMES_A_SUBMIT_OF;
        let id = |n| format!("soak-{seed}-{n}");
        let mut all: Vec<_> = (0..submits).map(|n| submit(&mut random, id(n), n)).collect();
        let mut places: Vec<usize> = (0..submits).collect();
        for n in submits..commands {
            let (asks, place) = existing(&mut random, submits);
            all.push(Command { body: body_of(&asks, id), asks, id: id(n), not_after: None });
            places.push(place);
        }
        let mut order: Vec<(usize, usize)> = Vec::new();
        for (n, place) in places.into_iter().enumerate() {
            order.push((place, n));
            if random.random_bool(0.1) {
                for _ in 0..random.random_range(1..=2) {
                    order.push((place + random.random_range(0..COPY_DISTANCE), n));
                }
            }
        }
        // Stable: a copy for the same place comes after what was put there first.
        order.sort_by_key(|(place, _)| *place);
        Self { commands: all, order: order.into_iter().map(|(_, n)| n).collect() }
    }
}

/// A cancel or a get, and its place among the submits.
fn existing(random: &mut StdRng, submits: usize) -> (Asks, usize) {
    let submit = random.random_range(0..submits);
    let (target, place) = match random.random_range(0..100) {
        0..10 => (Target::Nobody, submit),
        10..35 => {
            let before = submit.saturating_sub(random.random_range(1..=HEAD_START));
            (Target::Submit(submit), before)
        }
        35..55 => (Target::Submit(submit), submit + random.random_range(0..=AT_ONCE)),
        55..70 => (Target::Submit(submit), submit + random.random_range(LATER)),
        _ => (Target::BatchOf(submit), submit + random.random_range(0..COPY_DISTANCE)),
    };
    let asks = if random.random_bool(0.5) { Asks::Cancel(target) } else { Asks::Get(target) };
    (asks, place)
}

/// Of a cancel or a get, as far as it is known beforehand; `id` names submits.
fn body_of(asks: &Asks, id: impl Fn(usize) -> String) -> Vec<u8> {
    let body = match asks {
        Asks::Cancel(Target::Submit(submit)) | Asks::Get(Target::Submit(submit)) => {
            json!({"command_id": id(*submit)})
        }
        Asks::Cancel(Target::Nobody) => json!({"command_id": "soak-of-nobody"}),
        Asks::Get(Target::Nobody) => json!({"batch_id": NO_BATCH}),
        Asks::Submit { .. } | Asks::Cancel(Target::BatchOf(_)) | Asks::Get(Target::BatchOf(_)) => {
            return Vec::new();
        }
    };
    body.to_string().into_bytes()
}

fn submit(random: &mut StdRng, id: String, n: usize) -> Command {
    let campaign = random.random_range(0..CAMPAIGNS);
    let name = if random.random_bool(0.8) {
        format!("Campaña {campaign}")
    } else {
        format!("Recordatorio {n}")
    };
    let looks = Looks {
        name,
        agent: format!("agent_{}", campaign % AGENTS),
        // The numbers of all commands overlap: a campaign calls the same people again.
        numbers: (0..random.random_range(1..=MAX_RECIPIENTS))
            .map(|at| format!("+1415555{:04}", (campaign * 7 + at) % 10_000))
            .collect(),
    };
    let recipients: Vec<Value> = looks
        .numbers
        .iter()
        .map(|number| json!({"phone_number": number, "dynamic_variables": {"nombre": "Ana"}}))
        .collect();
    let mut body = json!({
        "call_name": looks.name,
        "agent_id": looks.agent,
        "agent_phone_number_id": "phnum_1",
        "recipients": recipients,
    });
    let expected = match random.random_range(0..100) {
        0..5 => Expected::Invalid,
        5..8 => Expected::NotFound,
        8..11 => Expected::Expired,
        _ => Expected::Batch,
    };
    let not_after = match expected {
        Expected::Expired => Some(LONG_AGO),
        _ => random.random_bool(0.05).then_some(FAR_AHEAD),
    };
    let body = match expected {
        Expected::Batch | Expected::Expired => body.to_string().into_bytes(),
        Expected::Invalid => broken(random, body),
        Expected::NotFound => {
            let (field, id) =
                [("agent_id", "agent_missing"), ("agent_phone_number_id", "phnum_missing")]
                    [usize::from(random.random_bool(0.5))];
            body[field] = id.into();
            body.to_string().into_bytes()
        }
    };
    Command { id, asks: Asks::Submit { expected, looks }, body, not_after }
}

/// One of several ways to break the contract.
fn broken(random: &mut StdRng, mut body: Value) -> Vec<u8> {
    let wrong: Option<(&str, Value)> = [
        None,
        Some(("call_name", json!(" "))),
        Some(("recipients", json!([]))),
        Some(("recipients", json!([{"phone_number": "0987654321"}]))),
        Some(("scheduled_time", json!(1_696_435_200))),
    ]
    .choose(random)
    .cloned()
    .flatten();
    match wrong {
        Some((field, value)) => {
            body[field] = value;
            body.to_string().into_bytes()
        }
        None => b"{\"call_name\": \"cut in the mi".to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_plan_and_another_one_another() {
        let shape = |seed| {
            let plan = Plan::new(seed, 500);
            let told = |c: Command| (c.kind(), c.target(), c.body, c.not_after);
            (plan.order, plan.commands.into_iter().map(told).collect::<Vec<_>>())
        };
        assert_eq!(shape(1), shape(1));
        assert_ne!(shape(1), shape(2));
    }

    #[test]
    fn every_command_is_published_and_some_more_often() {
        let plan = Plan::new(7, 1000);
        let once: HashSet<_> = plan.order.iter().collect();
        assert_eq!(once.len(), 1000);
        assert!((1080..1250).contains(&plan.order.len()), "{}", plan.order.len());
        let ends_so = |expected| {
            let ends_so = |c: &Command| matches!(c.asks, Asks::Submit { expected: this, .. } if this == expected);
            plan.commands.iter().any(ends_so)
        };
        assert!(ends_so(Expected::Batch) && ends_so(Expected::Invalid));
        assert!(ends_so(Expected::NotFound) && ends_so(Expected::Expired));
    }

    #[test]
    fn what_has_expired_says_so_and_some_others_have_time() {
        let plan = Plan::new(7, 1000);
        for command in &plan.commands {
            let expired = command.not_after == Some(LONG_AGO);
            let expects = matches!(command.asks, Asks::Submit { expected: Expected::Expired, .. });
            assert_eq!(expired, expects);
        }
        let ahead = |command: &&Command| command.not_after == Some(FAR_AHEAD);
        assert!((20..100).contains(&plan.commands.iter().filter(ahead).count()));
    }

    #[test]
    fn a_fifth_cancels_and_gets_before_during_and_after_the_submit_by_either_id() {
        let plan = Plan::new(7, 600);
        let first = |n: usize| plan.order.iter().position(|at| *at == n).unwrap();
        for kind in [CommandKind::Cancel, CommandKind::Get] {
            let [mut before, mut behind, mut by_batch, mut nobody] = [0; 4];
            for (n, command) in plan.commands.iter().enumerate().filter(|(_, c)| c.kind() == kind) {
                match command.target().unwrap() {
                    Target::Submit(submit) if first(n) < first(submit) => before += 1,
                    Target::Submit(_) => behind += 1,
                    Target::BatchOf(_) => by_batch += 1,
                    Target::Nobody => nobody += 1,
                }
            }
            assert!(before >= 5 && behind >= 5 && by_batch >= 5 && nobody >= 1, "{kind}");
            assert!((40..=80).contains(&(before + behind + by_batch + nobody)), "{kind}");
        }
    }

    #[test]
    fn a_soak_of_one_command_is_a_submit() {
        assert_eq!(Plan::new(7, 1).commands[0].kind(), CommandKind::Submit);
    }
}
