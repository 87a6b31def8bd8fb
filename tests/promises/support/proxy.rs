//! A TCP proxy that a test can cut, to fail the network between a worker and what it talks to.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;
use url::Url;

use super::amqp_url;

/// Which connections break.
#[derive(Clone, Copy, PartialEq)]
enum Cut {
    All,
    /// The nth that was served, from 1.
    Only(usize),
}

pub struct Proxy {
    pub address: SocketAddr,
    cut: broadcast::Sender<Cut>,
    refusing: Arc<AtomicBool>,
    refused: Arc<AtomicUsize>,
    accepted: Arc<AtomicUsize>,
}

impl Proxy {
    /// In front of the broker, with the `AMQP_URL` that leads through it.
    pub async fn to_broker() -> (Self, Url) {
        let mut url: Url = amqp_url().parse().unwrap();
        let target = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap_or(5672));
        let target = tokio::net::lookup_host(target).await.unwrap().next().unwrap();
        let proxy = Self::to(target).await;
        url.set_host(Some(&proxy.address.ip().to_string())).unwrap();
        url.set_port(Some(proxy.address.port())).unwrap();
        (proxy, url)
    }

    pub async fn to(target: SocketAddr) -> Self {
        Self::at("127.0.0.1:0".parse().unwrap(), target).await
    }

    pub async fn at(address: SocketAddr, target: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let proxy = Self {
            address: listener.local_addr().unwrap(),
            cut: broadcast::Sender::new(1),
            refusing: Arc::default(),
            refused: Arc::default(),
            accepted: Arc::default(),
        };
        let cut = proxy.cut.clone();
        let (refusing, refused) = (Arc::clone(&proxy.refusing), Arc::clone(&proxy.refused));
        let accepted = Arc::clone(&proxy.accepted);
        tokio::spawn(async move {
            while let Ok((mut inbound, _)) = listener.accept().await {
                if refusing.load(Ordering::SeqCst) {
                    refused.fetch_add(1, Ordering::SeqCst);
                    continue;
                }
                let number = accepted.fetch_add(1, Ordering::SeqCst) + 1;
                let mut cut = cut.subscribe();
                tokio::spawn(async move {
                    let mut outbound = TcpStream::connect(target).await.unwrap();
                    let is_cut = async {
                        while let Ok(which) = cut.recv().await {
                            if which == Cut::All || which == Cut::Only(number) {
                                return;
                            }
                        }
                    };
                    tokio::select! {
                        _ = copy_bidirectional(&mut inbound, &mut outbound) => {}
                        () = is_cut => {}
                    }
                });
            }
        });
        proxy
    }

    /// Breaks every connection there is.
    pub fn cut(&self) {
        self.cut.send(Cut::All).ok();
    }

    /// Breaks the nth connection that was served, from 1.
    pub fn cut_only(&self, number: usize) {
        self.cut.send(Cut::Only(number)).ok();
    }

    /// From now on, new connections are closed at once, or served again.
    pub fn refuse(&self, refuse: bool) {
        self.refusing.store(refuse, Ordering::SeqCst);
    }

    /// Connections closed at once so far.
    pub fn refused(&self) -> usize {
        self.refused.load(Ordering::SeqCst)
    }

    /// Connections served so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}
