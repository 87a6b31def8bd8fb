//! The sandbox's life: it listens, serves each connection, and goes with its handle.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::fault::Fault;
use crate::observe::{Batch, Request};
use crate::route::Route;
use crate::service::{Ending, Service};
use crate::state::{Distortion, State};

/// How a sandbox is set up.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it listens; port 0 takes a free one.
    pub addr: SocketAddr,
    /// The key that `xi-api-key` is compared with.
    pub api_key: String,
    /// Further keys of the same workspace: they see the same batches.
    pub rotated_keys: Vec<String>,
    /// Further keys, each of a workspace of its own: it sees its own batches alone.
    pub other_keys: Vec<String>,
    /// Seconds of batch life per second. At 1 a conversation takes 20 s; at 0 nothing moves but by
    /// [`Sandbox::advance`].
    pub speed: f64,
    /// A new batch shows in the workspace list only after this long: the vendor's lists are not
    /// documented to be up to date.
    pub list_lag: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            addr: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            api_key: "sandbox-key".to_owned(),
            rotated_keys: Vec::new(),
            other_keys: Vec::new(),
            speed: 1.0,
            list_lag: Duration::ZERO,
        }
    }
}

/// A running sandbox. Dropping it stops the server and cuts its connections.
#[derive(Debug)]
pub struct Sandbox {
    addr: SocketAddr,
    state: Arc<State>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Sandbox {
    /// Listens, and serves on the current Tokio runtime. The error is that of the listener.
    pub async fn start(options: Options) -> io::Result<Self> {
        let listener = TcpListener::bind(options.addr).await?;
        let sandbox = Self {
            addr: listener.local_addr()?,
            state: Arc::new(State::new(&options)),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        let (state, stop) = (Arc::clone(&sandbox.state), sandbox.stop.clone());
        sandbox.tasks.spawn(accept(listener, state, stop, sandbox.tasks.clone()));
        Ok(sandbox)
    }

    /// `http://127.0.0.1:PORT`, without a slash at its end.
    pub fn base_url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Orders a fault for requests to come.
    ///
    /// # Panics
    /// On a fault that cannot happen (a status that is none, a probability above 1) and when
    /// [`MAX_FAULTS`](crate::MAX_FAULTS) wait already: a test that orders it is wrong.
    pub fn order(&self, fault: Fault) {
        let refused = self.state.faults().order(vec![fault]).err();
        assert_eq!(refused, None, "this fault cannot be ordered");
    }

    /// From now on, every answer to a list or a get that gives one is changed so before it is sent. What
    /// the sandbox itself knows stays right.
    pub fn distort(&self, change: impl Fn(Route, &mut Value) + Send + Sync + 'static) {
        *self.state.distortion() = Some(Distortion(Arc::new(change)));
    }

    /// Answers are right again.
    pub fn clear_distortion(&self) {
        *self.state.distortion() = None;
    }

    /// Forgets every fault that still waits.
    pub fn clear_faults(&self) {
        self.state.faults().clear();
    }

    /// Every batch ever created, in the order of creation, deleted ones included.
    pub fn batches(&self) -> Vec<Batch> {
        self.state.store().batches()
    }

    /// The requests to the vendor's routes, in the order of their arrival: the last 100,000, or
    /// fewer where their bodies exceed 256 MiB.
    pub fn requests(&self) -> Vec<Request> {
        self.state.log().all()
    }

    /// How many TCP connections were accepted so far.
    pub fn connections(&self) -> usize {
        self.state.connections.load(Ordering::Relaxed)
    }

    /// Moves batch life, and the list's lag, forward.
    pub fn advance(&self, by: Duration) {
        self.state.store().advance(by);
    }

    /// Stops, and waits until the port is free and every connection is closed.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn accept(
    listener: TcpListener,
    state: Arc<State>,
    stop: CancellationToken,
    tasks: TaskTracker,
) {
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                state.connections.fetch_add(1, Ordering::Relaxed);
                let connection = serve(stream, Arc::clone(&state), stop.clone(), tasks.clone());
                tasks.spawn(connection);
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                // Out of file descriptors is the usual reason, and a tight loop frees none.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn serve(stream: TcpStream, state: Arc<State>, stop: CancellationToken, tasks: TaskTracker) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "the connection has gone already");
    }
    let (ending, mut endings) = mpsc::channel(1);
    let service = Service { state, tasks, stop: stop.clone(), ending };
    let respond = service_fn(move |request| service.clone().respond(request));
    let mut connection = http1::Builder::new().serve_connection(TokioIo::new(stream), respond);
    let ending = tokio::select! {
        () = stop.cancelled() => return,
        ended = &mut connection => {
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection ended early");
            }
            return;
        }
        ending = endings.recv() => ending,
    };
    // Below hyper: it has no way to end a connection badly.
    let mut stream = connection.into_parts().io.into_inner();
    let ended = match ending {
        Some(Ending::Reset) => stream.set_zero_linger(),
        Some(Ending::Close(last)) => tokio::select! {
            () = stop.cancelled() => Ok(()),
            written = write_last(&mut stream, &last) => written,
        },
        None => Ok(()),
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "the client was faster");
    }
}

async fn write_last(stream: &mut TcpStream, last: &[u8]) -> io::Result<()> {
    stream.write_all(last).await?;
    stream.shutdown().await
}
