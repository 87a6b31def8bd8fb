//! A worker in a process of its own, which a test can kill, freeze and thaw.

use std::os::unix::process::ExitStatusExt as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lapin::BasicProperties;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Child;
use tokio::time::timeout;

use crate::start::program;
use crate::support::{LIMIT, Received, World, amqp_url, until};

/// A request may take so long, as [`Process::start`] sets it; a lease lasts twice as long.
pub const LONGEST_REQUEST: Duration = Duration::from_secs(1);

/// Of the message that [`World::remaining_results`] marks the end with.
const END: &str = "the.end";

pub struct Process {
    child: Child,
    log: Arc<Mutex<Log>>,
}

#[derive(Default)]
struct Log {
    text: String,
    ended: bool,
}

impl Process {
    /// One that takes the commands of `world`, with short limits. `more` adds to its environment,
    /// and takes precedence.
    pub fn start(world: &World, ledger: &str, more: &[(&str, &str)]) -> Self {
        let (url, vendor) = (amqp_url(), world.sandbox.base_url());
        let prefix = world.settings().broker.amqp_prefix;
        let mut environment = vec![
            ("AMQP_URL", url.as_str()),
            ("AMQP_PREFIX", prefix.as_str()),
            ("ELEVENLABS_BASE_URL", vendor.as_str()),
            ("ELEVENLABS_API_KEY", "sandbox-key"),
            ("ELEVENLABS_CONNECT_TIMEOUT", "500ms"),
            ("ELEVENLABS_TIMEOUT", "1s"),
            ("SETTLING_WINDOW", "300ms"),
            ("LEDGER_URL", ledger),
            ("HOST", "127.0.0.1"),
            ("PORT", "0"),
        ];
        environment.extend(more);
        let mut child = program(&environment).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let log = Arc::<Mutex<Log>>::default();
        let kept = Arc::clone(&log);
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                let mut log = kept.lock().unwrap();
                log.text.push_str(&line);
                log.text.push('\n');
            }
            kept.lock().unwrap().ended = true;
        });
        Self { child, log }
    }

    /// The same, once it consumes from every queue.
    pub async fn consuming(world: &World, ledger: &str, more: &[(&str, &str)]) -> Self {
        let process = Self::start(world, ledger, more);
        process.until_logged("consuming").await;
        process
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().text.clone()
    }

    pub async fn until_logged(&self, text: &str) {
        let logged = until(text, async || {
            let log = self.log.lock().unwrap();
            assert!(log.text.contains(text) || !log.ended, "no {text:?} in:\n{}", log.text);
            log.text.contains(text)
        });
        // A little less than the limit there, so that what it logged instead can be told.
        let logged = timeout(LIMIT * 9 / 10, logged).await;
        assert!(logged.is_ok(), "no {text:?} in:\n{}", self.log());
    }

    /// Kills it, as the kernel or a power cut does.
    pub async fn kill(mut self) {
        self.child.start_kill().unwrap();
        self.killed().await;
    }

    /// Waits for its end, which has to be a SIGKILL.
    pub async fn killed(mut self) {
        let status = timeout(LIMIT, self.child.wait()).await;
        let status = status.unwrap_or_else(|_| panic!("it lives:\n{}", self.log())).unwrap();
        assert_eq!(status.signal(), Some(9), "{status}:\n{}", self.log());
    }

    /// Stops it in order.
    pub async fn stop(mut self) {
        self.signal("TERM");
        let status = timeout(LIMIT, self.child.wait()).await;
        let status = status.unwrap_or_else(|_| panic!("it lives:\n{}", self.log())).unwrap();
        assert!(status.success(), "{status}:\n{}", self.log());
    }

    /// Returns when none of its threads runs any more.
    pub async fn freeze(&self) {
        self.signal("STOP");
        let stat = format!("/proc/{}/stat", self.child.id().unwrap());
        until("it is frozen", async || {
            let stat = tokio::fs::read_to_string(&stat).await.unwrap();
            // Behind the name, which is in brackets.
            stat.rsplit(')').next().unwrap().trim_start().starts_with('T')
        })
        .await;
    }

    pub fn thaw(&self) {
        self.signal("CONT");
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().expect("it lives").to_string();
        let sent = std::process::Command::new("kill").args(["-s", name, &pid]).status().unwrap();
        assert!(sent.success());
    }
}

impl World {
    /// The `LEDGER_URL` of this world's file.
    pub fn ledger_url(&self) -> String {
        format!("sqlite:{}", self.ledger_file().display())
    }

    /// Every result that the broker has had by now and that was not taken yet.
    pub async fn remaining_results(&mut self) -> Vec<Received> {
        let exchange = self.topology.results_exchange();
        self.publish_to(&exchange, END, b"", BasicProperties::default()).await;
        let mut results = Vec::new();
        loop {
            let delivery = self.next_raw_result().await;
            if delivery.routing_key.as_str() == END {
                return results;
            }
            results.push(Received::checked(&delivery));
        }
    }
}

impl Received {
    /// Fails unless the other one is the same result, published once more.
    pub fn assert_repeats(&self, other: &Self) {
        let lasting = |of: &Self| of.properties.clone().with_timestamp(0);
        assert_eq!(self.body, other.body);
        assert_eq!(self.routing_key, other.routing_key);
        assert_eq!(lasting(self), lasting(other), "all but the time is the same");
    }
}
