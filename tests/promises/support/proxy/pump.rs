//! One direction of a proxied connection.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::frames::{Frames, Method};
use super::{Hole, Impairment};

/// Reads that may be on their way: with what the kernel keeps, more than any delay here fills.
const ON_THE_WAY: usize = 1024;

/// Bytes to be put between two frames of the nth connection.
#[derive(Clone, Debug)]
pub struct Frame {
    pub number: usize,
    pub bytes: Vec<u8>,
}

pub struct Line {
    pub number: usize,
    pub impairment: watch::Receiver<Impairment>,
    /// Counts what `cut_after` and `breaks_on` have broken.
    pub broken: Arc<AtomicUsize>,
    pub amqp: Option<Amqp>,
}

/// What else there is to do for a connection that speaks AMQP.
pub enum Amqp {
    /// Frames to put in.
    ToServer(broadcast::Receiver<Frame>),
    /// Keeps what has passed.
    ToClient(Arc<Mutex<Vec<Passed>>>),
}

/// A method that has passed.
pub struct Passed {
    /// The connection, as the nth that was served.
    pub number: usize,
    pub channel: u16,
    pub method: Method,
    pub arguments: Vec<u8>,
}

enum Step {
    Bytes(Instant, Vec<u8>),
    Break,
}

/// Passes bytes on until the sender ends the stream. An error ends the other direction too.
pub async fn pump(from: OwnedReadHalf, to: OwnedWriteHalf, line: Line) -> io::Result<()> {
    let (steps, coming) = mpsc::channel(ON_THE_WAY);
    let broken = Arc::clone(&line.broken);
    tokio::try_join!(take(from, steps, line), give(to, coming, broken)).map(|_| ())
}

async fn take(mut from: OwnedReadHalf, to: mpsc::Sender<Step>, line: Line) -> io::Result<()> {
    let Line { number, mut impairment, mut amqp, .. } = line;
    let mut frames = match amqp {
        Some(Amqp::ToServer(_)) => Frames::of_client(),
        _ => Frames::of_server(),
    };
    let mut waiting = Vec::new();
    let mut buffer = vec![0; 16 * 1024];
    let (mut passed, mut lossy) = (0, false);
    loop {
        let Impairment { delay, hole, cut_after, breaks_on } = *impairment.borrow_and_update();
        if lossy && hole != Some(Hole::Swallows) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let read = tokio::select! {
            biased;
            changed = impairment.changed() => {
                changed.map_err(|_| io::ErrorKind::BrokenPipe)?;
                passed = 0;
                continue;
            }
            bytes = ordered(&mut amqp, number) => {
                waiting.extend(bytes);
                if frames.between() {
                    send(&to, Instant::now() + delay, std::mem::take(&mut waiting)).await?;
                }
                continue;
            }
            // The sender, when it closes, has to be heard once the hole is gone, not before.
            read = from.read(&mut buffer), if hole != Some(Hole::Stalls) => read?,
        };
        if hole == Some(Hole::Swallows) {
            lossy = true;
            if read == 0 {
                impairment.changed().await.map_err(|_| io::ErrorKind::BrokenPipe)?;
            }
            continue;
        }
        if read == 0 {
            return Ok(());
        }
        let mut bytes = buffer[..read].to_vec();
        if let Some(limit) = cut_after.filter(|limit| passed + read >= *limit) {
            bytes.truncate(limit - passed);
            send(&to, Instant::now() + delay, bytes).await?;
            to.send(Step::Break).await.map_err(|_| io::ErrorKind::BrokenPipe)?;
            return std::future::pending().await;
        }
        passed += read;
        if breaks_on.is_some_and(|some| bytes.windows(some.len()).any(|window| window == some)) {
            to.send(Step::Break).await.map_err(|_| io::ErrorKind::BrokenPipe)?;
            return std::future::pending().await;
        }
        if let Some(amqp) = &amqp {
            let end = frames.follow(&bytes, |channel, method, arguments| {
                if let Amqp::ToClient(methods) = amqp {
                    let arguments = arguments.to_vec();
                    methods.lock().unwrap().push(Passed { number, channel, method, arguments });
                }
            });
            if let Some(end) = end {
                bytes.splice(end..end, std::mem::take(&mut waiting));
            }
        }
        send(&to, Instant::now() + delay, bytes).await?;
    }
}

async fn send(to: &mpsc::Sender<Step>, due: Instant, bytes: Vec<u8>) -> io::Result<()> {
    Ok(to.send(Step::Bytes(due, bytes)).await.map_err(|_| io::ErrorKind::BrokenPipe)?)
}

/// The next bytes for this connection; waits for ever where none can come.
async fn ordered(amqp: &mut Option<Amqp>, number: usize) -> Vec<u8> {
    if let Some(Amqp::ToServer(orders)) = amqp {
        while let Ok(frame) = orders.recv().await {
            if frame.number == number {
                return frame.bytes;
            }
        }
    }
    std::future::pending().await
}

async fn give(
    mut to: OwnedWriteHalf,
    mut coming: mpsc::Receiver<Step>,
    broken: Arc<AtomicUsize>,
) -> io::Result<()> {
    while let Some(step) = coming.recv().await {
        match step {
            Step::Bytes(due, bytes) => {
                sleep_until(due).await;
                to.write_all(&bytes).await?;
            }
            Step::Break => {
                broken.fetch_add(1, Ordering::SeqCst);
                // In order: what is to arrive arrives, and nothing else does.
                to.shutdown().await?;
                return Err(io::ErrorKind::ConnectionReset.into());
            }
        }
    }
    to.shutdown().await
}
