//! A producer that speaks AMQP by the byte, to publish what no Rust client lets through.

use lapin::uri::AMQPUri;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{LIMIT, amqp_url};

/// The bits of the property flags.
pub const CONTENT_TYPE: u16 = 1 << 15;
pub const HEADERS: u16 = 1 << 13;
pub const CORRELATION_ID: u16 = 1 << 10;
pub const REPLY_TO: u16 = 1 << 9;
pub const MESSAGE_ID: u16 = 1 << 7;
pub const TYPE: u16 = 1 << 5;

/// A connection with one channel in confirm mode.
pub struct Producer(TcpStream);

impl Producer {
    pub async fn connect() -> Self {
        let uri: AMQPUri = amqp_url().parse().unwrap();
        let address = (uri.authority.host.as_str(), uri.authority.port);
        let mut this = Self(TcpStream::connect(address).await.unwrap());
        this.0.write_all(b"AMQP\0\0\x09\x01").await.unwrap();
        this.expect(10, 10).await;
        let user = uri.authority.userinfo;
        let login = format!("\0{}\0{}", user.username, user.password);
        let start_ok = [&long(b"")[..], &short(b"PLAIN"), &long(login.as_bytes()), &short(b"en")];
        this.method(0, (10, 11), &start_ok.concat()).await;
        let tune = this.expect(10, 30).await;
        // Channels and frame size as the broker has it, no heartbeats.
        this.method(0, (10, 31), &[&tune[..6], &[0, 0]].concat()).await;
        let vhost = if uri.vhost.is_empty() { "/" } else { &uri.vhost };
        this.method(0, (10, 40), &[&short(vhost.as_bytes())[..], &[0, 0]].concat()).await;
        this.expect(10, 41).await;
        this.method(1, (20, 10), &[0]).await;
        this.expect(20, 11).await;
        this.method(1, (85, 10), &[0]).await;
        this.expect(85, 11).await;
        this
    }

    /// Publishes with properties in the order of their bits, the highest first, and waits until a
    /// queue has the message.
    pub async fn publish(
        &mut self,
        exchange: &str,
        key: &[u8],
        properties: &[(u16, Vec<u8>)],
        body: &[u8],
    ) {
        const MANDATORY: u8 = 1;
        let to = [&[0, 0], &short(exchange.as_bytes())[..], &short(key), &[MANDATORY]].concat();
        self.method(1, (60, 40), &to).await;
        let flags: u16 = properties.iter().map(|(bit, _)| bit).sum();
        let mut header = vec![0, 60, 0, 0];
        header.extend((body.len() as u64).to_be_bytes());
        header.extend(flags.to_be_bytes());
        header.extend(properties.iter().flat_map(|(_, value)| value));
        self.frame(2, 1, &header).await;
        self.frame(3, 1, body).await;
        self.expect(60, 80).await;
    }

    async fn method(&mut self, channel: u8, (class, method): (u8, u8), arguments: &[u8]) {
        self.frame(1, channel, &[&[0, class, 0, method], arguments].concat()).await;
    }

    async fn frame(&mut self, kind: u8, channel: u8, payload: &[u8]) {
        let frame = [&[kind, 0, channel], &long(payload)[..], &[0xce]].concat();
        self.0.write_all(&frame).await.unwrap();
    }

    /// The arguments of the next method, which has to be this one.
    async fn expect(&mut self, class: u8, method: u8) -> Vec<u8> {
        let reading = async {
            let mut start = [0; 7];
            self.0.read_exact(&mut start).await.unwrap();
            let [_, _, _, a, b, c, d] = start;
            let length = u32::from_be_bytes([a, b, c, d]) as usize;
            let mut rest = vec![0; length + 1];
            self.0.read_exact(&mut rest).await.unwrap();
            rest.truncate(length);
            rest
        };
        let mut read = timeout(LIMIT, reading).await.expect("the broker answers in time");
        let shown = String::from_utf8_lossy(&read);
        assert_eq!(read[..4], [0, class, 0, method], "the broker says: {shown}");
        read.split_off(4)
    }
}

pub fn short(text: &[u8]) -> Vec<u8> {
    [&[u8::try_from(text.len()).unwrap()], text].concat()
}

pub fn long(content: &[u8]) -> Vec<u8> {
    [&u32::try_from(content.len()).unwrap().to_be_bytes(), content].concat()
}

/// One entry of a table, as a header or within one.
pub fn entry(key: &[u8], kind: u8, value: &[u8]) -> Vec<u8> {
    [short(key), vec![kind], value.to_vec()].concat()
}
