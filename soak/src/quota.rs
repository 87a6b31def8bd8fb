//! The least that has to go wrong: a soak with fewer faults than that proves nothing.

use std::collections::BTreeMap;

use crate::chaos::{
    BROKER_KILLED, BROKER_RESTARTED, CONNECTIONS_CLOSED, POSTGRES_KILLED, POSTGRES_RESTARTED,
    VENDOR_CUT,
};
use crate::crew::{KILLED, PAUSED, STOPPED};
use crate::options::{Faults, Options};
use crate::vendor::{Group, Happened};

/// Of processes, broker and connections. The first hand that is dealt has as many, and the sending of the
/// shortest soak outlasts it. It has one stop more, because a worker that is stopping already cannot be
/// stopped.
pub const OF_PROCESSES: [(&str, u32); 7] = [
    (KILLED, 2),
    (STOPPED, 1),
    (PAUSED, 2),
    (CONNECTIONS_CLOSED, 1),
    (BROKER_RESTARTED, 1),
    (BROKER_KILLED, 1),
    (VENDOR_CUT, 1),
];

/// Of PostgreSQL, where there is one.
pub const OF_POSTGRES: [(&str, u32); 2] = [(POSTGRES_RESTARTED, 1), (POSTGRES_KILLED, 1)];

/// One fault of each group of the vendor's for so many commands: a tenth of what the rarest group comes to,
/// so that it is no matter of luck.
const COMMANDS_PER_FAULT: u32 = 500;
/// And no more of them than this, because the sandbox does not remember every request of a long soak.
const MOST: u32 = 20;

/// What had to happen, and what did.
#[derive(Debug, PartialEq, Eq)]
pub struct Quota {
    pub what: &'static str,
    pub least: u32,
    pub happened: u32,
}

impl Quota {
    pub const fn is_met(&self) -> bool {
        self.happened >= self.least
    }
}

/// Of everything that was to go wrong.
pub fn quotas(
    options: &Options,
    events: &BTreeMap<&'static str, u32>,
    happened: &Happened,
) -> Vec<Quota> {
    let mut quotas = Vec::new();
    if options.faults == Faults::All {
        let of_postgres = OF_POSTGRES.into_iter().filter(|_| options.postgres.is_some());
        quotas.extend(OF_PROCESSES.into_iter().chain(of_postgres).map(|(what, least)| {
            let happened = events.get(what).copied().unwrap_or_default();
            Quota { what, least, happened }
        }));
    }
    if options.faults != Faults::None {
        let least = (options.commands / COMMANDS_PER_FAULT).min(MOST);
        quotas.extend(Group::ALL.map(|group| {
            let happened = happened.groups.get(&group).copied().unwrap_or_default();
            Quota { what: group.name(), least, happened }
        }));
    }
    quotas
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    fn options(faults: &str, commands: u32, ledger: &str) -> Options {
        let given = format!(
            "soak --seed 1 --workers 4 --worker w --broker b --rabbitmqctl r --amqp-url a --logs l \
             --faults {faults} --commands {commands} --{ledger}"
        );
        Options::parse_from(given.split_whitespace())
    }

    #[test]
    fn too_few_faults_of_one_kind_are_found() {
        let mut events: BTreeMap<_, _> = OF_PROCESSES.into_iter().chain(OF_POSTGRES).collect();
        let groups = Group::ALL.map(|group| (group, 2)).into();
        let mut happened = Happened { groups, ..Happened::default() };
        let unmet = |commands, events: &BTreeMap<_, _>, happened: &Happened| -> Vec<_> {
            let quotas = quotas(&options("all", commands, "postgres p"), events, happened);
            quotas.into_iter().filter(|quota| !quota.is_met()).map(|quota| quota.what).collect()
        };
        assert!(unmet(1499, &events, &happened).is_empty());
        assert_eq!(unmet(1500, &events, &happened), Group::ALL.map(Group::name));
        events.insert(KILLED, 1);
        events.remove(POSTGRES_KILLED);
        happened.groups.remove(&Group::Reads);
        assert_eq!(unmet(1499, &events, &happened), [KILLED, POSTGRES_KILLED, Group::Reads.name()]);
    }

    #[test]
    fn only_what_was_to_go_wrong_is_demanded() {
        let quotas = |faults, ledger| {
            let options = options(faults, 1_000_000, ledger);
            quotas(&options, &BTreeMap::new(), &Happened::default())
        };
        assert!(quotas("none", "postgres p").is_empty());
        assert_eq!(quotas("vendor", "postgres p").len(), Group::ALL.len());
        assert!(quotas("vendor", "postgres p").iter().all(|quota| quota.least == MOST));
        let without = quotas("all", "ledger-url sqlite:l");
        assert_eq!(without.len(), Group::ALL.len() + OF_PROCESSES.len());
    }
}
