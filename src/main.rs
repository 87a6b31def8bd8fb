//! Reads the arguments and does what they say.

use std::process::ExitCode;

use call_manager::cli::Cli;
use clap::Parser as _;

#[tokio::main]
async fn main() -> ExitCode {
    Cli::parse().run().await
}
