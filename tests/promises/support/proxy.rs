//! A TCP proxy that a test can cut, slow down, silence and speak through, to fail the network between
//! a worker and what it talks to.

pub mod frames;
mod pump;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;
use url::Url;

use super::amqp_url;
use frames::{CONSUME_OK, Method, Mistake};
use pump::{Amqp, Frame, Line, Passed, pump};

/// Which connections break.
#[derive(Clone, Copy, PartialEq)]
enum Cut {
    All,
    /// The nth that was served, from 1.
    Only(usize),
}

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Towards {
    /// Who has connected: the worker.
    Client,
    /// What is behind the proxy.
    Server,
}

/// What becomes of bytes that do not arrive. The connections stay open.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Hole {
    /// They wait with the sender, and arrive when the hole is gone.
    Stalls,
    /// They are thrown away. A connection that has lost some breaks when the hole is gone.
    Swallows,
}

/// What is wrong with one direction.
#[derive(Clone, Copy, Default)]
struct Impairment {
    delay: Duration,
    hole: Option<Hole>,
    cut_after: Option<usize>,
    breaks_on: Option<&'static [u8]>,
}

pub struct Proxy {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

struct Shared {
    target: SocketAddr,
    speaks_amqp: bool,
    cut: broadcast::Sender<Cut>,
    refusing: AtomicBool,
    refused: AtomicUsize,
    accepted: AtomicUsize,
    broken: Arc<AtomicUsize>,
    to_client: watch::Sender<Impairment>,
    to_server: watch::Sender<Impairment>,
    frames: broadcast::Sender<Frame>,
    methods: Arc<Mutex<Vec<Passed>>>,
}

/// How many connections a worker has: two for each kind of command.
pub const CONNECTIONS: usize = 6;

impl Proxy {
    /// In front of the broker, with the `AMQP_URL` that leads through it.
    pub async fn to_broker() -> (Self, Url) {
        let mut url: Url = amqp_url().parse().unwrap();
        let target = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap_or(5672));
        let target = tokio::net::lookup_host(target).await.unwrap().next().unwrap();
        let proxy = Self::listen("127.0.0.1:0".parse().unwrap(), target, true).await;
        url.set_host(Some(&proxy.address.ip().to_string())).unwrap();
        url.set_port(Some(proxy.address.port())).unwrap();
        (proxy, url)
    }

    pub async fn to(target: SocketAddr) -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), target).await
    }

    pub async fn at(address: SocketAddr, target: SocketAddr) -> Self {
        Self::listen(address, target, false).await
    }

    async fn listen(address: SocketAddr, target: SocketAddr, speaks_amqp: bool) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            target,
            speaks_amqp,
            cut: broadcast::Sender::new(16),
            refusing: AtomicBool::default(),
            refused: AtomicUsize::default(),
            accepted: AtomicUsize::default(),
            broken: Arc::default(),
            to_client: watch::Sender::default(),
            to_server: watch::Sender::default(),
            frames: broadcast::Sender::new(16),
            methods: Arc::default(),
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Self { address, shared, accepting }
    }

    /// Nothing listens at its address any more, and every connection is broken.
    pub async fn stop(self) {
        self.cut();
        self.accepting.abort();
        let address = self.address;
        super::until("its port is free", async || TcpListener::bind(address).await.is_ok()).await;
    }

    /// Breaks every connection there is.
    pub fn cut(&self) {
        self.shared.cut.send(Cut::All).ok();
    }

    /// Breaks the nth connection that was served, from 1.
    pub fn cut_only(&self, number: usize) {
        self.shared.cut.send(Cut::Only(number)).ok();
    }

    /// From now on, new connections are closed at once, or served again.
    pub fn refuse(&self, refuse: bool) {
        self.shared.refusing.store(refuse, Ordering::SeqCst);
    }

    /// Connections closed at once so far.
    pub fn refused(&self) -> usize {
        self.shared.refused.load(Ordering::SeqCst)
    }

    /// Connections served so far.
    pub fn accepted(&self) -> usize {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// From now on, each byte arrives so much later.
    pub fn delay(&self, towards: Towards, by: Duration) {
        self.impair(towards, |line| line.delay = by);
    }

    /// From now on, nothing arrives.
    pub fn blackhole(&self, towards: Towards, hole: Hole) {
        self.impair(towards, |line| line.hole = Some(hole));
    }

    /// From now on, each connection breaks after so many bytes more in this direction.
    pub fn cut_after(&self, towards: Towards, bytes: usize) {
        self.impair(towards, |line| line.cut_after = Some(bytes));
    }

    /// From now on, a connection breaks that would pass these bytes on to the client.
    pub fn breaks_on(&self, bytes: &'static [u8]) {
        self.impair(Towards::Client, |line| line.breaks_on = Some(bytes));
    }

    /// Connections that broke after so many bytes, or on some.
    pub fn broken(&self) -> usize {
        self.shared.broken.load(Ordering::SeqCst)
    }

    /// Ends delays, holes and cuts to come, in both directions.
    pub fn heal(&self) {
        for towards in [Towards::Client, Towards::Server] {
            self.impair(towards, |line| *line = Impairment::default());
        }
    }

    fn impair(&self, towards: Towards, change: impl FnOnce(&mut Impairment)) {
        match towards {
            Towards::Client => self.shared.to_client.send_modify(change),
            Towards::Server => self.shared.to_server.send_modify(change),
        }
    }

    /// The channels of the nth connection that the broker has sent this method on, in that order.
    pub fn channels(&self, number: usize, method: Method) -> Vec<u16> {
        self.passed(number, method, |passed| passed.channel)
    }

    /// The channel and the tag of each consumer that the nth connection has got.
    pub fn consumers(&self, number: usize) -> Vec<(u16, Vec<u8>)> {
        // The tag is the only argument, behind the octet of its length.
        self.passed(number, CONSUME_OK, |passed| (passed.channel, passed.arguments[1..].to_vec()))
    }

    fn passed<T>(&self, number: usize, method: Method, of: impl Fn(&Passed) -> T) -> Vec<T> {
        let methods = self.shared.methods.lock().unwrap();
        let these =
            methods.iter().filter(|passed| (passed.number, passed.method) == (number, method));
        these.map(of).collect()
    }

    /// Makes a mistake in the worker's name on a channel of the nth connection.
    pub fn make(&self, mistake: &Mistake, number: usize, channel: u16) {
        let bytes = mistake.frame(channel);
        self.shared.frames.send(Frame { number, bytes }).unwrap();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((inbound, _)) = listener.accept().await {
        if shared.refusing.load(Ordering::SeqCst) {
            shared.refused.fetch_add(1, Ordering::SeqCst);
            continue;
        }
        let number = shared.accepted.fetch_add(1, Ordering::SeqCst) + 1;
        // Here, not in the task: a cut that is ordered from now on is about this one too.
        let mut cut = shared.cut.subscribe();
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let is_cut = async {
                while let Ok(which) = cut.recv().await {
                    if which == Cut::All || which == Cut::Only(number) {
                        return;
                    }
                }
            };
            tokio::select! {
                () = serve(inbound, &shared, number) => {}
                () = is_cut => {}
            }
        });
    }
}

async fn serve(inbound: TcpStream, shared: &Shared, number: usize) {
    let line = |impairment: &watch::Sender<Impairment>, amqp| Line {
        number,
        impairment: impairment.subscribe(),
        broken: Arc::clone(&shared.broken),
        amqp: shared.speaks_amqp.then_some(amqp),
    };
    let orders = shared.frames.subscribe();
    let to_server = line(&shared.to_server, Amqp::ToServer(orders));
    let to_client = line(&shared.to_client, Amqp::ToClient(Arc::clone(&shared.methods)));
    // What is behind the proxy may be away.
    let Ok(outbound) = TcpStream::connect(shared.target).await else { return };
    for stream in [&inbound, &outbound] {
        stream.set_nodelay(true).unwrap();
    }
    let (from_client, client) = inbound.into_split();
    let (from_server, server) = outbound.into_split();
    // One direction may end before the other; one that breaks takes the other with it.
    tokio::try_join!(pump(from_client, server, to_server), pump(from_server, client, to_client))
        .ok();
}
