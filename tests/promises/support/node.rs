//! Private `RabbitMQ` nodes of one test, which it starts, stops, kills, freezes and clusters.
#![allow(clippy::print_stderr, reason = "a failure shows the end of the node's log")]

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};
use url::Url;

/// Prepares what nodes need, and tidies it up.
const PREPARE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/script/node");

const PREPARE_LIMIT: Duration = Duration::from_secs(60);
/// A start takes seconds; on a machine that is busy with other nodes, much longer.
const START_LIMIT: Duration = Duration::from_secs(120);
const STOP_LIMIT: Duration = Duration::from_secs(60);
const CONTROL_LIMIT: Duration = Duration::from_secs(60);
/// What was killed is gone after so long, and what tidies up is done.
const END_LIMIT: Duration = Duration::from_secs(10);

/// A node with directories, cookie, name, ports and port mapper of its own. Its process ends and
/// its directory goes with it.
pub struct Node {
    home: PathBuf,
    url: String,
    process: Option<Child>,
    keeper: Option<Arc<Keeper>>,
}

/// The process that keeps directories, ports and the port mapper until it is let go.
struct Keeper(Child);

impl Node {
    /// A node that runs.
    pub async fn start() -> Self {
        Self::with("").await
    }

    /// The same, with more lines of `rabbitmq.conf`. Files that they name have to lie in the
    /// temporary directory.
    pub async fn with(lines: &str) -> Self {
        let node = Self::prepared().await;
        node.configure(lines);
        node.started().await
    }

    /// A node that is yet to be started.
    pub async fn prepared() -> Self {
        prepare(1).await.remove(0)
    }

    /// The same node, once it runs.
    pub async fn started(mut self) -> Self {
        self.start_again().await;
        self
    }

    /// So many nodes that run and are one cluster.
    pub async fn cluster(size: usize) -> Vec<Self> {
        let mut nodes = prepare(size).await;
        join_all(nodes.iter_mut().map(Self::start_again)).await;
        let first = nodes[0].name();
        for node in &nodes[1..] {
            node.control(&["stop_app"]).await;
            node.control(&["join_cluster", &first]).await;
            node.control(&["start_app"]).await;
        }
        nodes
    }

    /// Adds lines to `rabbitmq.conf`, for the next start.
    pub fn configure(&self, lines: &str) {
        let mut file =
            OpenOptions::new().append(true).open(self.home.join("rabbitmq.conf")).unwrap();
        writeln!(file, "{lines}").unwrap();
    }

    /// Where it reads `rabbitmq.conf` and `advanced.config`, and writes its data and `broker.log`.
    pub fn home(&self) -> &Path {
        &self.home
    }

    pub fn amqp_url(&self) -> &str {
        &self.url
    }

    /// Of its listener at 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.url.parse::<Url>().unwrap().port().unwrap()
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port())
    }

    /// As the other nodes of a cluster call it.
    pub fn name(&self) -> String {
        format!("call-manager-{}@localhost", self.port())
    }

    pub fn runs(&self) -> bool {
        self.process.is_some()
    }

    /// Writes to disk which quorum queues there are. `RabbitMQ` itself does so seconds later, and a
    /// queue that was declared just before a SIGKILL comes back without a leader, for ever.
    pub async fn flush(&self) {
        self.control(&["eval", "[ok = dets:sync(Table) || Table <- dets:all()]."]).await;
    }

    /// Ends it as a power cut does. See [`Node::flush`] for queues that were declared just now.
    pub async fn kill(&mut self) {
        let mut child = self.process.take().expect("the node runs");
        child.kill().await.unwrap();
    }

    /// Stops it in order, and waits for its end.
    pub async fn stop(&mut self) {
        self.signal("TERM");
        let mut child = self.process.take().expect("the node runs");
        let ended = timeout(STOP_LIMIT, child.wait()).await;
        assert!(ended.is_ok(), "the node does not stop:\n{}", self.log_end());
    }

    /// Starts it on the same data and the same ports, and waits until it speaks AMQP.
    pub async fn start_again(&mut self) {
        self.launch();
        self.until_ready().await;
    }

    /// The same, without waiting.
    pub fn launch(&mut self) {
        assert!(self.process.is_none(), "the node runs already");
        let log = OpenOptions::new().append(true).create(true).open(self.log_file()).unwrap();
        let child = mortal(&self.home.join("start-broker"))
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.process = Some(child);
    }

    /// Waits until it speaks AMQP, which it does when everything else is done.
    pub async fn until_ready(&mut self) {
        let since = Instant::now();
        while !speaks_amqp(&self.address()).await {
            let process = self.process.as_mut().expect("the node was started");
            if let Some(status) = process.try_wait().unwrap() {
                panic!("the node ended before it was ready ({status}):\n{}", self.log_end());
            }
            assert!(since.elapsed() < START_LIMIT, "the node starts:\n{}", self.log_end());
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// Stops its processor time (SIGSTOP): its sockets stay open, and nobody answers.
    pub fn freeze(&self) {
        self.signal("STOP");
    }

    pub fn thaw(&self) {
        self.signal("CONT");
    }

    /// What `rabbitmqctl` prints for these words; it has to succeed.
    pub async fn control(&self, words: &[&str]) -> String {
        let output = mortal(&self.home.join("rabbitmqctl"))
            .args(words)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .output();
        let output = timeout(CONTROL_LIMIT, output).await;
        let output = output.unwrap_or_else(|_| panic!("rabbitmqctl {words:?} ends")).unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "rabbitmqctl {words:?}: {complaint}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn signal(&self, name: &str) {
        let child = self.process.as_ref().expect("the node runs");
        let pid = child.id().expect("the node lives").to_string();
        let sent = std::process::Command::new("kill").args(["-s", name, &pid]).status().unwrap();
        assert!(sent.success());
    }

    fn log_file(&self) -> PathBuf {
        self.home.join("broker.log")
    }

    fn log_end(&self) -> String {
        let log = std::fs::read_to_string(self.log_file()).unwrap_or_default();
        let lines: Vec<_> = log.lines().rev().take(40).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the end of the log of {}:\n{}", self.name(), self.log_end());
        }
        if let Some(mut child) = self.process.take() {
            child.start_kill().ok();
            wait_for_end(&mut child);
        }
        // Only now: with the last node of a cluster, it removes the directories.
        self.keeper.take();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        wait_for_end(&mut self.0);
    }
}

fn wait_for_end(child: &mut Child) {
    let since = Instant::now();
    while matches!(child.try_wait(), Ok(None)) && since.elapsed() < END_LIMIT {
        std::thread::sleep(Duration::from_millis(5));
    }
}

async fn prepare(count: usize) -> Vec<Node> {
    let mut script = Command::new(PREPARE)
        .arg(count.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot execute {PREPARE}: {error}"));
    let mut lines = BufReader::new(script.stdout.take().unwrap()).lines();
    let keeper = Arc::new(Keeper(script));
    let mut nodes = Vec::new();
    let reading = async {
        loop {
            let line = lines.next_line().await.unwrap().expect("script/node prepares the nodes");
            let Some((home, url)) = line.split_once(' ') else {
                assert_eq!(line, "ready");
                return;
            };
            let (home, url, keeper) = (home.into(), url.to_owned(), Some(Arc::clone(&keeper)));
            nodes.push(Node { home, url, process: None, keeper });
        }
    };
    timeout(PREPARE_LIMIT, reading).await.expect("script/node is ready in time");
    assert_eq!(nodes.len(), count);
    nodes
}

/// A command whose process does not outlive this one, however this one ends.
fn mortal(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(program).stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn speaks_amqp(address: &str) -> bool {
    let greeting = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(b"AMQP\0\0\x09\x01").await?;
        stream.read_u8().await
    };
    // The first byte of a method frame.
    matches!(timeout(Duration::from_secs(2), greeting).await, Ok(Ok(1)))
}
