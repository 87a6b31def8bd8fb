//! Reads the arguments and does what they say.

use std::io::{Write as _, stderr};
use std::process::ExitCode;

use call_manager::cli::Cli;
use clap::Parser as _;
use tokio::runtime::Runtime;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            // A closed standard error leaves nobody to tell.
            writeln!(stderr(), "call-manager: no threads can be started: {error}").ok();
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(cli.run());
    // Nothing is waited for that blocks: a name that is being resolved, a disk that stalls.
    runtime.shutdown_background();
    code
}
