//! What is going to be sent: every command, and the order of its publications, from the seed alone.

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

/// How a command may end.
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

/// One submit.
#[derive(Clone, Debug)]
pub struct Command {
    /// Its `message_id`.
    pub id: String,
    /// What is published.
    pub body: Vec<u8>,
    /// The header of that name, in Unix seconds.
    pub not_after: Option<i64>,
    /// How it may end.
    pub expected: Expected,
    /// What a batch of it looks like.
    pub looks: Looks,
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

/// Everything that is going to be sent.
pub struct Plan {
    /// Each once.
    pub commands: Vec<Command>,
    /// Positions in `commands`, in the order of publication; those of copies appear again.
    pub order: Vec<usize>,
}

impl Plan {
    /// The same for the same seed.
    pub fn new(seed: u64, commands: usize) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let commands: Vec<_> =
            (0..commands).map(|n| command(&mut random, format!("soak-{seed}-{n}"), n)).collect();
        let mut places: Vec<(usize, usize)> = Vec::new();
        for n in 0..commands.len() {
            places.push((n, n));
            if random.random_bool(0.1) {
                for _ in 0..random.random_range(1..=2) {
                    places.push((n + random.random_range(0..COPY_DISTANCE), n));
                }
            }
        }
        // Stable: a copy for the same place comes after what was put there first.
        places.sort_by_key(|(place, _)| *place);
        Self { commands, order: places.into_iter().map(|(_, n)| n).collect() }
    }
}

fn command(random: &mut StdRng, id: String, n: usize) -> Command {
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
    Command { id, body, not_after, expected, looks }
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
            (plan.order, plan.commands.into_iter().map(|c| c.body).collect::<Vec<_>>())
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
        for expected in [Expected::Batch, Expected::Invalid, Expected::NotFound, Expected::Expired]
        {
            assert!(plan.commands.iter().any(|command| command.expected == expected));
        }
    }

    #[test]
    fn what_has_expired_says_so_and_some_others_have_time() {
        let plan = Plan::new(7, 1000);
        for command in &plan.commands {
            let expired = command.not_after == Some(LONG_AGO);
            assert_eq!(expired, command.expected == Expected::Expired);
        }
        let ahead = |command: &&Command| command.not_after == Some(FAR_AHEAD);
        assert!((20..100).contains(&plan.commands.iter().filter(ahead).count()));
    }
}
