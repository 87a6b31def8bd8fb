//! What `script/soak` hands over.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Sends many commands through RabbitMQ to worker processes under faults, and judges what came of it.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Options {
    /// Decides every command and the order of every fault.
    #[arg(long)]
    pub seed: u64,
    /// How many commands: four in five are submits, the others cancels and gets of them.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub commands: u32,
    /// How many worker processes.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub workers: u16,
    /// What goes wrong.
    #[arg(long, value_enum, default_value_t = Faults::All)]
    pub faults: Faults,
    /// The worker's binary.
    #[arg(long, value_name = "FILE")]
    pub worker: PathBuf,
    /// A file that becomes the RabbitMQ node when it is executed, the same node every time.
    #[arg(long, value_name = "FILE")]
    pub broker: PathBuf,
    /// A file that is `rabbitmqctl` of that node.
    #[arg(long, value_name = "FILE")]
    pub rabbitmqctl: PathBuf,
    /// Where the node listens.
    #[arg(long, value_name = "URL")]
    pub amqp_url: String,
    /// Where the workers remember their submits.
    #[arg(long, value_name = "URL", required_unless_present = "postgres")]
    pub ledger_url: Option<String>,
    /// `script/private-postgres`: the workers remember their submits in a server of its, which fails too.
    #[arg(long, value_name = "FILE", conflicts_with = "ledger_url")]
    pub postgres: Option<PathBuf>,
    /// An existing directory for the logs of workers, broker and PostgreSQL.
    #[arg(long, value_name = "DIRECTORY")]
    pub logs: PathBuf,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Faults {
    /// Nothing.
    None,
    /// The vendor only.
    Vendor,
    /// Vendor, worker processes, broker and PostgreSQL.
    All,
}
