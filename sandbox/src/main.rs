//! The sandbox as a program: arguments, log, server, until somebody stops it.

use std::io::{self, IsTerminal, Write};
use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use elevenlabs_sandbox::{Options, Sandbox};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// What a person can set, each also by its environment variable.
#[derive(Debug, Parser)]
#[command(version, about = ABOUT, long_about = LONG_ABOUT, after_long_help = CONTROL)]
struct Arguments {
    /// Where to listen; port 0 takes a free one.
    #[arg(
        long,
        env = "SANDBOX_LISTEN",
        default_value = "127.0.0.1:8400",
        value_name = "ADDR:PORT"
    )]
    listen: SocketAddr,

    /// The key that clients must send as xi-api-key.
    #[arg(long, env = "SANDBOX_API_KEY", default_value = "sandbox-key", hide_env_values = true)]
    api_key: String,

    /// How fast batches move: 1 is lifelike (a conversation takes 20 s), 60 turns a minute into a
    /// second, 0 stands still.
    #[arg(long, env = "SANDBOX_SPEED", default_value = "1", value_parser = not_negative)]
    speed: f64,

    /// Seconds until a new batch shows in the workspace list.
    #[arg(
        long,
        env = "SANDBOX_LIST_LAG",
        default_value = "0",
        value_name = "SECONDS",
        value_parser = seconds
    )]
    list_lag: Duration,
}

const ABOUT: &str = "A stand-in for the ElevenLabs batch-calling API: no phone rings";

const LONG_ABOUT: &str = "\
A stand-in for the ElevenLabs batch-calling API: no phone rings.

It serves the vendor's routes below /v1/convai/batch-calling, so a client needs no more than another
base URL. Batches run through their states by themselves; a phone number's last digit decides how
its call ends (7 refused, 8 voicemail, 9 no answer, all others a conversation). Everything is in
memory and is gone when it stops.";

const CONTROL: &str = "\
Control, without a key:
  GET    /sandbox/health     200 while it runs
  GET    /sandbox/batches    every batch ever created
  GET    /sandbox/requests   the requests it got
  POST   /sandbox/advance    {\"seconds\": 60} moves the batches forward
  POST   /sandbox/faults     orders a fault, or a list of them
  DELETE /sandbox/faults     forgets those that still wait

A fault: {\"route\": \"submit\", \"times\": 1, \"effect\": \"reset_after\"}
  route        submit, get, cancel, retry, delete, list, export, any (default)
  times        how many requests; null: until cleared; default 1
  probability  0 to 1 (default), and seed, a number that makes it repeatable
  effect       {\"latency_ms\": 500}, \"reset_before\", \"reset_after\", \"close_before\",
               \"close_after\", {\"hang\": {\"processed\": true}}, \"garbage\", \"truncated\",
               {\"status\": {\"status\": 503, \"retry_after\": \"2\", \"processed\": true,
                           \"body\": {\"json\": {}} or {\"text\": \"<html>\"}}}
«before» and «after» mean the moment in which the vendor does what was asked.";

fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(number),
        _ => Err("a number of at least 0 is needed".to_owned()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    Duration::try_from_secs_f64(not_negative(text)?).map_err(|error| error.to_string())
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    match run(arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            // A closed stderr leaves nobody to tell.
            writeln!(io::stderr(), "elevenlabs-sandbox: {problem}").ok();
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<(), String> {
    let no_signals = |error: io::Error| format!("cannot wait for signals: {error}");
    let mut terminate = signal(SignalKind::terminate()).map_err(no_signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signals)?;
    let addr = arguments.listen;
    let options = Options {
        addr,
        api_key: arguments.api_key,
        rotated_keys: Vec::new(),
        other_keys: Vec::new(),
        speed: arguments.speed,
        list_lag: arguments.list_lag,
    };
    let sandbox = Sandbox::start(options).await.map_err(|error| {
        format!(
            "cannot listen on {addr}: {error}; choose another address with --listen or \
             SANDBOX_LISTEN"
        )
    })?;
    // For a script that waits for it; the log goes to stderr.
    let mut out = io::stdout();
    writeln!(out, "listening on {}", sandbox.base_url())
        .and_then(|()| out.flush())
        .map_err(|error| format!("cannot write to stdout: {error}"))?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    sandbox.stop().await;
    Ok(())
}
