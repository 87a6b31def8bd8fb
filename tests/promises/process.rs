//! A worker in a process of its own, which a test can kill, freeze and thaw.

use std::os::unix::process::ExitStatusExt as _;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use call_manager::ledger::{self, Ledger, Location};
use lapin::BasicProperties;
use secrecy::ExposeSecret as _;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;
use uuid::Uuid;

use crate::ledger::MONTH;
use crate::start::program;
use crate::support::{LIMIT, Received, World, until};

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
        Self::through(&[], world, ledger, more)
    }

    /// The same, started by a program that gets the worker's as its last argument, and has to
    /// replace itself with it.
    pub fn through(by: &[&str], world: &World, ledger: &str, more: &[(&str, &str)]) -> Self {
        let (broker, vendor) = (world.settings().broker, world.sandbox.base_url());
        let mut environment = vec![
            ("AMQP_URL", broker.amqp_url.expose_secret()),
            ("AMQP_PREFIX", broker.amqp_prefix.as_str()),
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
        let mut command = program(&environment);
        if let [program, arguments @ ..] = by {
            let worker = command.as_std().get_program().to_owned();
            command = replaced(&command, program);
            command.args(arguments).arg(worker);
        }
        let mut child = command.spawn().unwrap();
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

    pub fn pid(&self) -> u32 {
        self.child.id().expect("it lives")
    }

    /// What it has in memory, in bytes.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
        kibibytes * 1024
    }

    /// The status of `GET /health`; `None` where nothing answers in time.
    pub async fn health(&self) -> Option<u16> {
        let answer = self.get("/health", Duration::from_secs(2)).await?;
        Some(answer.status().as_u16())
    }

    /// The status and body of `GET /health/ready`; `None` where nothing answers in time.
    pub async fn readiness(&self) -> Option<(u16, String)> {
        let answer = self.get("/health/ready", Duration::from_secs(2)).await?;
        Some((answer.status().as_u16(), answer.text().await.ok()?))
    }

    async fn get(&self, path: &str, limit: Duration) -> Option<reqwest::Response> {
        let log = self.log();
        let address = log.split("address=").nth(1)?.split_whitespace().next()?;
        let client = reqwest::Client::builder().no_proxy().timeout(limit).build().unwrap();
        client.get(format!("http://{address}{path}")).send().await.ok()
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

    /// How many connections it has open to a port.
    pub fn connections_to(&self, port: u16) -> usize {
        let own = std::fs::read_dir(format!("/proc/{}/fd", self.pid()));
        // One may be closed while it is looked at.
        let own = own.unwrap().filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
        let own: Vec<_> = own.map(|link| link.to_string_lossy().into_owned()).collect();
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let open = table.lines().skip(1).filter(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            let (remote, inode) = (fields[2], fields[9]);
            remote.ends_with(&format!(":{port:04X}")) && own.contains(&format!("socket:[{inode}]"))
        });
        open.count()
    }

    /// Status and body of `GET /health/ready`.
    pub async fn ready(&self) -> (u16, String) {
        self.until_logged("/health/ready").await;
        let response = self.get("/health/ready", LIMIT).await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }

    /// Returns when it has ended, however that came.
    pub async fn ended(&mut self) {
        self.child.wait().await.unwrap();
    }

    /// Kills it, as the kernel or a power cut does.
    pub async fn kill(mut self) {
        self.child.start_kill().unwrap();
        self.killed().await;
    }

    /// Waits for its end, which has to be a SIGKILL.
    pub async fn killed(self) {
        self.killed_within(LIMIT).await;
    }

    /// The same, within another limit.
    pub async fn killed_within(mut self, limit: Duration) {
        let status = timeout(limit, self.child.wait()).await;
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
        let pid = self.pid().to_string();
        let sent = std::process::Command::new("kill").args(["-s", name, &pid]).status().unwrap();
        assert!(sent.success());
    }
}

/// The same command, of another program.
fn replaced(command: &Command, program: &str) -> Command {
    let like = command.as_std();
    let mut other = Command::new(program);
    let environment = like.get_envs().filter_map(|(name, value)| Some((name, value?)));
    other
        .env_clear()
        .envs(environment)
        .current_dir(like.get_current_dir().unwrap())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    other
}

impl World {
    /// The `LEDGER_URL` of this world's file.
    pub fn ledger_url(&self) -> String {
        format!("sqlite:{}", self.ledger_file().display())
    }

    /// The same, as a worker leaves it that has seen the queues empty: a command that comes back and has
    /// no row there was never begun.
    pub async fn drained_ledger(&self) -> String {
        let settings = ledger::Settings {
            location: Location::Sqlite(self.ledger_file()),
            base_url: self.sandbox.base_url(),
            key: Uuid::nil(),
            retention: MONTH,
            longest_request: LIMIT,
        };
        let ledger = Ledger::open(settings).await.unwrap();
        ledger.note_drained().await.unwrap();
        ledger.close(LIMIT).await;
        self.ledger_url()
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
