//! The PostgreSQL of several workers: stopped or killed, and started again on the same data.
//!
//! `script/private-postgres` owns the server. It takes orders line by line, and ends with its standard
//! input, which is closed when this process ends, however it does.

use std::fs::File;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::Mutex;
use tokio::time::{sleep, timeout};

/// Installing the package included, where it is missing.
const START_LIMIT: Duration = Duration::from_secs(300);
const ORDER_LIMIT: Duration = Duration::from_secs(90);

pub struct Postgres {
    url: String,
    talk: Mutex<Talk>,
}

struct Talk {
    script: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

/// How it ends.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// Clients are shown out.
    Stop,
    /// As in a power cut.
    Kill,
}

impl Postgres {
    /// A server of the soak's own; the script's messages go to a file among the logs.
    pub async fn start(script: &Path, logs: &Path) -> anyhow::Result<Self> {
        let log = File::options().append(true).create(true).open(logs.join("postgres.log"))?;
        // Killed, the script could not remove what it made: it is left to end by itself.
        let mut script = Command::new(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot execute {}", script.display()))?;
        let orders = script.stdin.take().context("no way to give orders")?;
        let answers = script.stdout.take().context("no way to hear answers")?;
        let mut talk = Talk { script, orders, answers: BufReader::new(answers).lines() };
        let url = talk.answer(START_LIMIT).await?;
        Ok(Self { url, talk: Mutex::new(talk) })
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// Away for so long, then there again.
    pub async fn restart(&self, end: End, away: Duration) -> anyhow::Result<()> {
        let mut talk = self.talk.lock().await;
        talk.order(match end {
            End::Stop => "stop",
            End::Kill => "kill",
        })
        .await?;
        sleep(away).await;
        talk.order("start").await
    }

    /// Removes the server.
    pub async fn remove(self) -> anyhow::Result<()> {
        let Talk { mut script, orders, .. } = self.talk.into_inner();
        drop(orders);
        let status = timeout(ORDER_LIMIT, script.wait()).await;
        let status = status.context("PostgreSQL does not come to an end")??;
        ensure!(status.success(), "PostgreSQL ended badly: {status}");
        Ok(())
    }
}

impl Talk {
    async fn order(&mut self, order: &str) -> anyhow::Result<()> {
        self.orders.write_all(format!("{order}\n").as_bytes()).await?;
        let answer = self.answer(ORDER_LIMIT).await?;
        ensure!(answer == "done", "PostgreSQL was told to {order}, and its answer is {answer}");
        Ok(())
    }

    async fn answer(&mut self, limit: Duration) -> anyhow::Result<String> {
        let line = timeout(limit, self.answers.next_line()).await;
        let line = line.context("PostgreSQL does not get ready")??;
        line.context("PostgreSQL could not be started; see postgres.log")
    }
}
