//! What a person types, and what they get to read.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::{Args, Parser, Subcommand};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use uuid::Uuid;

use crate::app;
use crate::broker::{self, AskError, Reply};
use crate::config::{Sources, read_duration};
use crate::domain::command::{CommandKind, MAX_BODY_BYTES};
use crate::telemetry;

/// The result was a failure, or the worker could not run.
const FAILED: u8 = 1;
/// The question could not be asked.
const NOT_ASKED: u8 = 2;

/// Executes ElevenLabs batch-calling commands from RabbitMQ.
#[derive(Parser)]
#[command(name = "call-manager", version, about)]
pub struct Cli {
    /// A TOML file with settings; the environment and .env beat it.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Action>,
}

#[derive(Subcommand)]
enum Action {
    /// Run the worker until SIGTERM or Ctrl-C (what happens without a subcommand, too).
    Worker,
    /// Publish one command, wait for its result and print it.
    ///
    /// Exit code 0: it succeeded; 1: it failed; 2: it could not be asked, or no result came.
    #[command(subcommand)]
    Request(Request),
    /// Print every exchange, queue and binding as RabbitMQ definitions (JSON).
    ///
    /// For those who create them without the worker (TOPOLOGY=check), with `rabbitmqctl
    /// import_definitions` or on the management page. The virtual host is that of `AMQP_URL`.
    Topology,
    /// Ask the worker on this machine whether it is ready (for container health checks).
    Healthcheck,
}

#[derive(Subcommand)]
enum Request {
    /// Create a batch.
    Submit(SubmitArgs),
    /// Stop a batch.
    Cancel(BatchArgs),
    /// Read a batch and its recipients.
    Get(BatchArgs),
}

#[derive(Args)]
struct SubmitArgs {
    /// The JSON body: a file, or - for standard input.
    #[arg(value_name = "FILE", default_value = "-")]
    body: PathBuf,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Args)]
struct BatchArgs {
    /// The JSON body: a file, or - for standard input.
    #[arg(value_name = "FILE", conflicts_with_all = ["batch_id", "command_id"])]
    body: Option<PathBuf>,
    /// The batch's id, in place of a body.
    #[arg(long, value_name = "ID", conflicts_with = "command_id")]
    batch_id: Option<String>,
    /// The message id of the submit, in place of a body: it works before there is a batch id.
    #[arg(long, value_name = "ID")]
    command_id: Option<String>,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Args)]
struct CommonArgs {
    /// The command's id; a new UUID by default. Repeat an id to ask about the same command again.
    #[arg(long, value_name = "ID")]
    message_id: Option<String>,
    /// How long to wait for the result.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = duration)]
    timeout: Duration,
}

fn duration(text: &str) -> Result<Duration, String> {
    read_duration(text)
        .filter(|d| !d.is_zero())
        .ok_or_else(|| "not a duration with its unit, such as 60s".to_owned())
}

impl Cli {
    /// Does what was asked; errors are written to standard error in one line.
    pub async fn run(self) -> ExitCode {
        let config = self.config.as_deref();
        let (result, code_of_error) = match self.command {
            None | Some(Action::Worker) => (worker(config).await, FAILED),
            Some(Action::Request(request)) => (ask(config, request).await, NOT_ASKED),
            Some(Action::Topology) => (topology(config), FAILED),
            Some(Action::Healthcheck) => (healthcheck(config).await, FAILED),
        };
        result.unwrap_or_else(|error| {
            for line in telemetry::chain(error.as_ref()).lines() {
                writeln!(std::io::stderr(), "call-manager: {line}").ok();
            }
            ExitCode::from(code_of_error)
        })
    }
}

async fn worker(config: Option<&Path>) -> anyhow::Result<ExitCode> {
    let settings = Sources::read(config).worker()?;
    telemetry::start(&settings.log.filter, settings.log.format);
    app::run(settings).await?;
    Ok(ExitCode::SUCCESS)
}

async fn ask(config: Option<&Path>, request: Request) -> anyhow::Result<ExitCode> {
    let (kind, body, common) = match request {
        Request::Submit(args) => (CommandKind::Submit, read_body(&args.body)?, args.common),
        Request::Cancel(args) => (CommandKind::Cancel, args.body()?, args.common),
        Request::Get(args) => (CommandKind::Get, args.body()?, args.common),
    };
    let message_id = common.message_id.unwrap_or_else(|| Uuid::now_v7().to_string());
    ensure!(
        (1..=255).contains(&message_id.len()),
        "--message-id has {} bytes; give it 1 to 255",
        message_id.len()
    );
    let (broker, log) = Sources::read(config).request()?;
    telemetry::start(&log.filter, log.format);
    let broker = app::broker_settings(broker);
    let asking = broker::ask(&broker, kind, &message_id, &body, common.timeout);
    let Reply { body, succeeded } = tokio::select! {
        reply = asking => reply?,
        signal = tokio::signal::ctrl_c() => {
            signal?;
            return Err(AskError::in_doubt("interrupted", &message_id).into());
        }
    };
    let mut out = std::io::stdout().lock();
    out.write_all(&body).and_then(|()| out.write_all(b"\n")).with_context(|| {
        AskError::in_doubt("there is a result, but it cannot be printed", &message_id)
    })?;
    Ok(if succeeded { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

fn topology(config: Option<&Path>) -> anyhow::Result<ExitCode> {
    let (broker, _) = Sources::read(config).request()?;
    let definitions = broker::definitions(&app::broker_settings(broker))?;
    writeln!(std::io::stdout(), "{definitions}").context("it cannot be printed")?;
    Ok(ExitCode::SUCCESS)
}

impl BatchArgs {
    fn body(&self) -> anyhow::Result<Vec<u8>> {
        match (&self.batch_id, &self.command_id, &self.body) {
            (Some(id), _, _) => Ok(serde_json::to_vec(&serde_json::json!({"batch_id": id}))?),
            (None, Some(id), _) => Ok(serde_json::to_vec(&serde_json::json!({"command_id": id}))?),
            (None, None, Some(file)) => read_body(file),
            (None, None, None) => bail!("give a FILE, -, --batch-id or --command-id"),
        }
    }
}

fn read_body(file: &Path) -> anyhow::Result<Vec<u8>> {
    let source: Box<dyn std::io::Read> = if file == Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        let opened = std::fs::File::open(file);
        Box::new(opened.with_context(|| format!("{} cannot be read", file.display()))?)
    };
    let mut body = Vec::new();
    // One byte more than is allowed lets the worker say what is wrong.
    source
        .take(MAX_BODY_BYTES as u64 + 1)
        .read_to_end(&mut body)
        .context("the body cannot be read")?;
    Ok(body)
}

async fn healthcheck(config: Option<&Path>) -> anyhow::Result<ExitCode> {
    let address = Sources::read(config).health_address()?;
    let asking = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(b"GET /health/ready HTTP/1.0\r\nHost: localhost\r\n\r\n").await?;
        let mut answer = String::new();
        stream.take(4096).read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = timeout(Duration::from_secs(3), asking)
        .await
        .context("the worker does not answer")?
        .with_context(|| format!("no worker answers at {address}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    ensure!(head.split(' ').nth(1) == Some("200"), "not ready: {body}");
    Ok(ExitCode::SUCCESS)
}
