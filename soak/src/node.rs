//! The RabbitMQ node: started, stopped, killed and started again on the same data.

use std::fs::File;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

use crate::amqp;

const START_LIMIT: Duration = Duration::from_secs(120);
const STOP_LIMIT: Duration = Duration::from_secs(60);
const CONTROL_LIMIT: Duration = Duration::from_secs(60);

pub struct Node {
    start: PathBuf,
    rabbitmqctl: PathBuf,
    logs: PathBuf,
    url: String,
    process: Mutex<Option<Child>>,
}

impl Node {
    pub fn new(start: PathBuf, rabbitmqctl: PathBuf, logs: PathBuf, url: String) -> Self {
        Self { start, rabbitmqctl, logs, url, process: Mutex::default() }
    }

    /// Starts the node and waits until it speaks AMQP.
    pub async fn start(&self) -> anyhow::Result<()> {
        let log = File::options().append(true).create(true).open(self.logs.join("broker.log"))?;
        let child = mortal(&self.start)
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot execute {}", self.start.display()))?;
        let child = self.process.lock().await.insert(child).id();
        let since = Instant::now();
        loop {
            if let Ok(connection) = amqp::connect(&self.url).await {
                amqp::close(connection).await;
                return Ok(());
            }
            let ended = match self.process.lock().await.as_mut() {
                Some(process) => process.try_wait()?,
                None => None,
            };
            if let Some(status) = ended {
                bail!("the broker ended before it was ready ({status}); see broker.log");
            }
            ensure!(since.elapsed() < START_LIMIT, "the broker (pid {child:?}) did not get ready");
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Ends the node with a signal, and waits for its end.
    pub async fn end(&self, by: Signal) -> anyhow::Result<()> {
        let Some(mut child) = self.process.lock().await.take() else {
            return Ok(());
        };
        signal(&child, by);
        if timeout(STOP_LIMIT, child.wait()).await.is_err() {
            child.kill().await.context("the broker cannot be killed")?;
        }
        Ok(())
    }

    /// Has the node close every connection.
    pub async fn close_all_connections(&self) -> anyhow::Result<()> {
        self.control(&["close_all_connections", "--global", "soak"]).await.map(drop)
    }

    /// The messages in each queue, unacknowledged ones included.
    pub async fn queues(&self) -> anyhow::Result<Vec<(String, u64)>> {
        let told = self
            .control(&["--quiet", "--formatter", "json", "list_queues", "name", "messages"])
            .await?;
        let rows: Vec<Value> = serde_json::from_str(&told)
            .with_context(|| format!("rabbitmqctl lists no queues: {told}"))?;
        let queue = |row: &Value| {
            let name = row["name"].as_str()?.to_owned();
            Some((name, row["messages"].as_u64()?))
        };
        rows.iter().map(|row| queue(row).context("a queue without its messages")).collect()
    }

    async fn control(&self, words: &[&str]) -> anyhow::Result<String> {
        let output = mortal(&self.rabbitmqctl).args(words).stderr(Stdio::piped()).output();
        let output = timeout(CONTROL_LIMIT, output)
            .await
            .context("rabbitmqctl does not come to an end")??;
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "rabbitmqctl {}: {}", words.join(" "), complaint.trim());
        Ok(String::from_utf8(output.stdout)?)
    }
}

/// A command whose process does not outlive this one, however this one ends.
pub fn mortal(program: &std::path::Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(program).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Sends a signal to a process that was not waited for yet, so its id is surely its own.
pub fn signal(child: &Child, signal: Signal) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid {
        // It may have ended by itself, which its exit status tells.
        kill_process(pid, signal).ok();
    }
}
