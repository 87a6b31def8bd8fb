//! The worker processes: each is ordered about, and started again whenever it ends.

use std::fs::File;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures_util::future::try_join_all;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use rustix::process::Signal;
use tokio::process::Child;
use tokio::sync::mpsc;
use tokio::time::sleep;

use crate::book::Book;
use crate::node::{mortal, signal};

/// A worker that is told to stop before it has come to handle signals just dies of it.
const GROWN_UP: Duration = Duration::from_secs(3);
/// Well above `SHUTDOWN_GRACE` and what follows it.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// The event of a worker that ended without an order.
pub const DIED: &str = "workers that died by themselves";
/// The event of a worker that was told to stop and did not end with exit code 0 in time.
pub const STOPPED_BADLY: &str = "workers that did not stop properly";
/// The event of a kill.
pub const KILLED: &str = "SIGKILL of a worker";
/// The event of an orderly stop that another start follows.
pub const STOPPED: &str = "SIGTERM of a worker";
/// The event of a standstill.
pub const PAUSED: &str = "SIGSTOP and SIGCONT of a worker";

/// What happens to one worker.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    Kill,
    Terminate,
    /// SIGSTOP, and SIGCONT after that time.
    Pause(Duration),
    /// SIGTERM, and no other takes its place.
    Retire,
}

/// How to start a worker.
pub struct Settings {
    pub binary: PathBuf,
    pub environment: Vec<(&'static str, String)>,
    pub logs: PathBuf,
    pub seed: u64,
}

/// Where the orders go.
pub struct Crew {
    orders: Vec<mpsc::Sender<Order>>,
}

impl Crew {
    /// The crew, and what has to be polled for it to live. It ends when every worker has retired.
    pub fn new<'a>(
        workers: u16,
        settings: &'a Settings,
        book: &'a Book,
    ) -> (Self, impl Future<Output = anyhow::Result<()>> + 'a) {
        let (orders, supervisors): (Vec<_>, Vec<_>) = (0..workers)
            .map(|number| {
                let (orders, taken) = mpsc::channel(8);
                (orders, supervise(number, settings, book, taken))
            })
            .unzip();
        (Self { orders }, async move { try_join_all(supervisors).await.map(drop) })
    }

    pub async fn order(&self, worker: usize, order: Order) {
        if let Some(orders) = self.orders.get(worker % self.orders.len()) {
            // A worker that cannot be started ends the soak anyhow.
            orders.send(order).await.ok();
        }
    }

    pub async fn retire(&self) {
        for worker in 0..self.orders.len() {
            self.order(worker, Order::Retire).await;
        }
    }
}

async fn supervise(
    number: u16,
    settings: &Settings,
    book: &Book,
    mut orders: mpsc::Receiver<Order>,
) -> anyhow::Result<()> {
    let mut random = StdRng::seed_from_u64(settings.seed.wrapping_add(u64::from(number)));
    loop {
        let child = start(number, settings)?;
        book.count("starts of a worker");
        if live(child, &mut orders, book).await? {
            return Ok(());
        }
        sleep(Duration::from_millis(random.random_range(100..600))).await;
    }
}

fn start(number: u16, settings: &Settings) -> anyhow::Result<Child> {
    let log = settings.logs.join(format!("worker-{number}.log"));
    let log = File::options().append(true).create(true).open(log)?;
    mortal(&settings.binary)
        .arg("worker")
        .env_clear()
        // For setpriv to be found; the worker itself reads nothing of it.
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .envs(settings.environment.iter().map(|(name, value)| (name, value)))
        // A .env of the working directory is none of the soak's.
        .current_dir(&settings.logs)
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("a worker cannot be started")
}

/// One life of a worker; whether it has retired.
async fn live(
    mut child: Child,
    orders: &mut mpsc::Receiver<Order>,
    book: &Book,
) -> anyhow::Result<bool> {
    let born = Instant::now();
    let (mut retired, mut killed, mut stopping) = (false, false, None);
    loop {
        let order = tokio::select! {
            status = child.wait() => {
                book_end(book, status?, killed, stopping.is_some());
                return Ok(retired);
            }
            () = overdue(stopping) => {
                book.count(STOPPED_BADLY);
                child.kill().await.context("a worker cannot be killed")?;
                return Ok(retired);
            }
            order = orders.recv(), if !killed => order.unwrap_or(Order::Kill),
        };
        match order {
            Order::Kill => {
                signal(&child, Signal::KILL);
                book.count(KILLED);
                killed = true;
            }
            Order::Terminate | Order::Retire => {
                let for_good = matches!(order, Order::Retire);
                retired |= for_good;
                // A second SIGTERM means: leave at once.
                if stopping.is_none() {
                    sleep(GROWN_UP.saturating_sub(born.elapsed())).await;
                    signal(&child, Signal::TERM);
                    if !for_good {
                        book.count(STOPPED);
                    }
                    stopping = Some(Instant::now());
                }
            }
            Order::Pause(time) => {
                signal(&child, Signal::STOP);
                sleep(time).await;
                signal(&child, Signal::CONT);
                book.count(PAUSED);
            }
        }
    }
}

/// Until a worker that is stopping since then should be gone.
async fn overdue(stopping: Option<Instant>) {
    match stopping {
        Some(since) => sleep(STOP_LIMIT.saturating_sub(since.elapsed())).await,
        None => std::future::pending().await,
    }
}

fn book_end(book: &Book, status: ExitStatus, killed: bool, stopping: bool) {
    if killed && status.signal() == Some(Signal::KILL.as_raw()) {
        return;
    }
    if !stopping {
        book.count(DIED);
    } else if !status.success() {
        book.count(STOPPED_BADLY);
    }
}
