//! The byte stream below a connection: TCP, TLS where the URL says so, and on top the [`Inbound`].

use std::io::{self, IoSlice, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio};
use futures_io::{AsyncRead, AsyncWrite};
use futures_util::Stream;
use lapin::AsyncTcpStream;
use lapin::tcp::AMQPUriTcpExt as _;
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Connection, ConnectionProperties};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::inbound::Inbound;
use super::returned::Returned;
use super::tls::{self, TlsFiles};

/// Connects as [`Connection::connect_uri`] does, over a filtered stream. Dropped before its end, it
/// closes the stream.
pub async fn connect(
    uri: AMQPUri,
    files: &TlsFiles,
    properties: ConnectionProperties,
    returned: Returned,
) -> lapin::Result<Connection> {
    let config = files.read().await?;
    // lapin goes on without its caller: for each attempt that a frozen broker does not answer, a
    // thread and a socket would be left (there are no heartbeats yet), and once it answers, a
    // connection that nobody has.
    let abandoned = CancellationToken::new();
    let abandon = abandoned.clone().drop_guard();
    let tokio = Tokio::current();
    let runtime = Runtime::new(RuntimeParts::new(tokio.clone(), Filtering(tokio.clone())));
    let connect = async move |uri: AMQPUri, _| {
        // On the plain runtime: with the filtering one, TLS would come on top of the filter.
        let plain = Runtime::new(tokio.clone());
        let stream = tokio::select! {
            stream = uri.connect_with_config_async(config.as_ref(), &plain) => stream?,
            // A TLS handshake that is never answered.
            () = abandoned.cancelled() => return Err(io::Error::from(io::ErrorKind::ConnectionAborted).into()),
        };
        let filter = Inbound::new(returned.clone());
        Ok(AsyncTcpStream::Plain(Filtered::new(stream, filter, abandoned.clone())))
    };
    let encrypted = matches!(uri.scheme, AMQPScheme::AMQPS);
    let connected = Connection::connector(uri, runtime, connect, properties).await;
    if connected.is_ok() {
        abandon.disarm();
    }
    connected.map_err(|error| if encrypted { tls::while_connecting(error) } else { error })
}

type TcpOrTls = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

/// Tokio's reactor; only the type of its streams is another, and lapin takes that from here.
#[derive(Clone, Debug)]
struct Filtering(Tokio);

impl Reactor for Filtering {
    type TcpStream = Filtered;
    type Sleep = <Tokio as Reactor>::Sleep;

    // The trait's own bound, `AsSysFd`, has no public name; on Unix it is these two.
    fn register<H: Read + Write + AsFd + AsRawFd + Send + 'static>(
        &self,
        socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        self.0.register(socket)
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(address);
        async move {
            let stream = AsyncTcpStream::Plain(connecting.await?);
            Ok(Filtered::new(stream, Inbound::default(), CancellationToken::new()))
        }
    }
}

/// A stream that is filtered on its way in, and fails when it is abandoned.
struct Filtered {
    stream: TcpOrTls,
    filter: Inbound,
    abandoned: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Filtered {
    fn new(stream: TcpOrTls, filter: Inbound, abandoned: CancellationToken) -> Self {
        let abandoned = Box::pin(abandoned.cancelled_owned());
        Self { stream, filter, abandoned }
    }

    fn below(self: Pin<&mut Self>) -> Pin<&mut TcpOrTls> {
        Pin::new(&mut self.get_mut().stream)
    }
}

impl AsyncRead for Filtered {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let Self { stream, filter, abandoned } = self.get_mut();
        if abandoned.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        filter.poll_read(buf, |into| Pin::new(&mut *stream).poll_read(cx, into))
    }
}

impl AsyncWrite for Filtered {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.below().poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.below().poll_write_vectored(cx, bufs)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.below().poll_flush(cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.below().poll_close(cx)
    }
}
