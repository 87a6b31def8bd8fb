//! Makes inbound frames such that no message can break the connection it comes over.
//!
//! AMQP's short strings are UTF-8 (AMQP 0-9-1, 4.2.5.3). `RabbitMQ` does not check those a producer
//! sets, and lapin gives up the connection over one that is not: the message is delivered again
//! after each reconnect, and nothing else of its lane is worked on.
//!
//! A content header is never split over frames (AMQP 0-9-1, 4.2.6.1): `RabbitMQ` sends one that is
//! larger than the frames both sides have agreed on, and lapin gives up the connection over it as well.
//! Its headers are taken out then, and [`CUT`] says so.

use std::io;
use std::mem;
use std::task::{Poll, ready};

use crate::domain::command::SUBSTITUTE;

use super::returned::Returned;

/// Frame types (AMQP 0-9-1, 4.2.3).
const METHOD: u8 = 1;
const HEADER: u8 = 2;
const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;

/// Type, channel and payload size.
const FRAME_HEADER_BYTES: usize = 7;
/// The frame-end octet.
const FRAME_END_BYTES: usize = 1;

/// The `frame_max` of `RabbitMQ`. lapin reads no longer frame where the broker has not set a longer one.
const MAX_FRAME_BYTES: usize = 128 * 1024;

/// More headers than any program means to send; one such frame is in memory at a time.
const MAX_HELD_BYTES: usize = 16 * 1024 * 1024;

/// The only header of a message whose own were too large: their bytes.
pub const CUT: &str = "x-call-manager-cut-headers";

/// lapin parses nested tables by recursion: 2,000 levels, 10 KB, overflow the stack of its thread,
/// which ends the process.
const MAX_DEPTH: usize = 32;

/// Passes an inbound AMQP stream on, frame by frame.
///
/// Bodies pass as they come. Method and content header frames are corrected where they lie in the
/// caller's buffer; one that is cut in two by the end of a read is held back until it is whole.
#[derive(Debug, Default)]
pub struct Inbound {
    /// Bytes that pass untouched before the next frame begins.
    passing: u64,
    /// A frame of which only `filled` bytes are here; as long as it is known that it has to be.
    held: Vec<u8>,
    filled: usize,
    /// How much of a completed `held` has been handed on.
    completed: Option<usize>,
    returned: Returned,
}

/// What the first bytes of a frame say about it.
enum Frame {
    /// Not yet anything.
    Begun,
    /// That so many bytes pass untouched.
    Passes(u64),
    /// That so many bytes have to be looked at together.
    Whole(usize),
}

impl Inbound {
    /// Notes in `returned` what comes on the channel that is watched there.
    pub fn new(returned: Returned) -> Self {
        Self { returned, ..Self::default() }
    }

    /// Fills `into` with what may be handed on, taken from `source`; 0 is the end of the stream.
    pub fn poll_read(
        &mut self,
        into: &mut [u8],
        mut source: impl FnMut(&mut [u8]) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        loop {
            if let Some(given) = self.completed {
                return Poll::Ready(Ok(self.hand_on(given, into)));
            }
            if self.held.is_empty() {
                let read = ready!(source(into))?;
                let passed = self.pass(&mut into[..read])?;
                if passed > 0 || read == 0 {
                    return Poll::Ready(Ok(passed));
                }
            } else {
                // Never past the frame's end, so that what follows is read into `into` again.
                let read = ready!(source(&mut self.held[self.filled..]))?;
                if read == 0 {
                    return Poll::Ready(Ok(0));
                }
                self.filled += read;
                self.complete()?;
            }
        }
    }

    fn hand_on(&mut self, given: usize, into: &mut [u8]) -> usize {
        let rest = &self.held[given..];
        let count = rest.len().min(into.len());
        into[..count].copy_from_slice(&rest[..count]);
        if count == rest.len() {
            self.held.clear();
            self.completed = None;
        } else {
            self.completed = Some(given + count);
        }
        count
    }

    /// Corrects `bytes` in place; holds an incomplete frame at their end back and returns how many
    /// bytes lie before it.
    fn pass(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let (mut at, mut end) = (0, bytes.len());
        loop {
            let passing = usize::try_from(self.passing).unwrap_or(usize::MAX);
            let passed = passing.min(end - at);
            at += passed;
            self.passing -= passed as u64;
            let here = &mut bytes[at..end];
            if here.is_empty() {
                return Ok(at);
            }
            let whole = match Frame::read(here)? {
                Frame::Passes(count) => {
                    self.passing = count;
                    continue;
                }
                Frame::Whole(length) => length,
                Frame::Begun => FRAME_HEADER_BYTES,
            };
            if here.len() < whole {
                self.held.extend_from_slice(here);
                self.filled = self.held.len();
                self.held.resize(whole, 0);
                return Ok(at);
            }
            let corrected = correct(&mut here[..whole], &self.returned);
            here.copy_within(whole.., corrected);
            end -= whole - corrected;
            at += corrected;
        }
    }

    fn complete(&mut self) -> io::Result<()> {
        if self.filled < self.held.len() {
            return Ok(());
        }
        match Frame::read(&self.held)? {
            Frame::Whole(length) if length > self.filled => {
                self.held.resize(length, 0);
                return Ok(());
            }
            Frame::Whole(_) => {
                let corrected = correct(&mut self.held, &self.returned);
                self.held.truncate(corrected);
            }
            Frame::Passes(count) => self.passing = count - self.filled as u64,
            // Not with a whole frame header.
            Frame::Begun => {}
        }
        self.completed = Some(0);
        Ok(())
    }
}

impl Frame {
    fn read(bytes: &[u8]) -> io::Result<Self> {
        let Some(&kind) = bytes.first() else { return Ok(Self::Begun) };
        if ![METHOD, HEADER, BODY, HEARTBEAT].contains(&kind) {
            // The protocol header of a broker that speaks another version, or no AMQP at all: the
            // parser has the words for it.
            return Ok(Self::Passes(u64::MAX));
        }
        let Some(&[_, _, _, a, b, c, d]) = bytes.first_chunk() else { return Ok(Self::Begun) };
        let payload = u32::from_be_bytes([a, b, c, d]);
        let length = u64::from(payload) + (FRAME_HEADER_BYTES + FRAME_END_BYTES) as u64;
        if [BODY, HEARTBEAT].contains(&kind) {
            return Ok(Self::Passes(length));
        }
        match usize::try_from(length) {
            Ok(length) if length <= MAX_HELD_BYTES => Ok(Self::Whole(length)),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "the broker sent a method or content header frame of {length} bytes, and at \
                     most {MAX_HELD_BYTES} are read"
                ),
            )),
        }
    }
}

/// Corrects a whole method or content header frame; returns how long it is now.
fn correct(frame: &mut [u8], returned: &Returned) -> usize {
    let (kind, channel) = (frame[0], u16::from_be_bytes([frame[1], frame[2]]));
    let end = frame.len() - FRAME_END_BYTES;
    let mut fields = Fields(&mut frame[FRAME_HEADER_BYTES..end]);
    // `None`: it ends too early or has a type nobody knows. The parser will say so.
    if kind == METHOD {
        fields.method();
    } else if let Some(message_id) = fields.content_header() {
        // The channel that is watched only publishes: what comes there comes back.
        returned.note(channel, &String::from_utf8_lossy(message_id));
    }
    if kind == HEADER && frame.len() > MAX_FRAME_BYTES {
        return cut_headers(frame).unwrap_or(frame.len());
    }
    frame.len()
}

/// Puts [`CUT`] in the place of the headers; returns how long the frame is then.
fn cut_headers(frame: &mut [u8]) -> Option<usize> {
    let payload = &mut frame[FRAME_HEADER_BYTES..];
    let (flags, mut at) = (u16::from_be_bytes(*payload.get(12..14)?.first_chunk()?), 14);
    // What comes before them: content-type and content-encoding.
    for bit in [15, 14] {
        if flags & (1 << bit) != 0 {
            at += 1 + usize::from(*payload.get(at)?);
        }
    }
    let length = u32::from_be_bytes(*payload.get(at..)?.first_chunk()?);
    let after = at + 4 + usize::try_from(length).ok()?;
    let mut table = vec![u8::try_from(CUT.len()).ok()?];
    table.extend(CUT.as_bytes());
    table.push(b'l');
    table.extend(i64::from(length).to_be_bytes());
    let before = at + 4 + table.len();
    if flags & (1 << 13) == 0 || after > payload.len() || before > after {
        return None;
    }
    payload[at..at + 4].copy_from_slice(&u32::try_from(table.len()).ok()?.to_be_bytes());
    payload[at + 4..before].copy_from_slice(&table);
    payload.copy_within(after.., before);
    let now = frame.len() - (after - before);
    let payload_bytes = u32::try_from(now - FRAME_HEADER_BYTES - FRAME_END_BYTES).ok()?;
    frame[3..FRAME_HEADER_BYTES].copy_from_slice(&payload_bytes.to_be_bytes());
    Some(now)
}

/// What is left of a frame's payload, or of a table within it.
struct Fields<'a>(&'a mut [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Option<&'a mut [u8]> {
        let (taken, rest) = mem::take(&mut self.0).split_at_mut_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array_of<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.first_chunk().copied()
    }

    fn short(&mut self) -> Option<u16> {
        self.array_of().map(u16::from_be_bytes)
    }

    fn long(&mut self) -> Option<&'a mut [u8]> {
        let length = u32::from_be_bytes(self.array_of()?);
        self.take(usize::try_from(length).ok()?)
    }

    fn short_string(&mut self) -> Option<&'a [u8]> {
        let [length] = self.array_of()?;
        let text = self.take(length.into())?;
        substitute(text);
        Some(text)
    }

    /// Of all methods a broker sends, only `basic.deliver` has text in it that a producer chose.
    fn method(&mut self) -> Option<()> {
        if (self.short()?, self.short()?) == (60, 60) {
            self.short_string()?; // consumer-tag
            self.take(8 + 1)?; // delivery-tag, redelivered
            self.short_string()?; // exchange
            self.short_string()?; // routing-key
        }
        Some(())
    }

    /// Returns the `message_id`, if there is one.
    fn content_header(&mut self) -> Option<&'a [u8]> {
        let mut message_id = None;
        if self.short()? != 60 {
            return None;
        }
        self.take(2 + 8)?; // weight, body size
        let flags = self.short()?;
        // The first property is the highest bit.
        for bit in (2..16).rev().filter(|bit| flags & (1 << bit) != 0) {
            match bit {
                13 => Fields(self.long()?).table(0)?, // headers
                11 | 12 => self.take(1).map(drop)?,   // priority, delivery-mode
                6 => self.take(8).map(drop)?,         // timestamp
                7 => message_id = Some(self.short_string()?),
                _ => self.short_string().map(drop)?,
            }
        }
        message_id
    }

    fn table(&mut self, depth: usize) -> Option<()> {
        while !self.0.is_empty() {
            self.short_string()?;
            self.value(depth)?;
        }
        Some(())
    }

    fn array(&mut self, depth: usize) -> Option<()> {
        while !self.0.is_empty() {
            self.value(depth)?;
        }
        Some(())
    }

    /// As `RabbitMQ` and lapin read them, which is not how the specification has it
    /// (<https://www.rabbitmq.com/amqp-0-9-1-errata#section_3>): there is no short string.
    fn value(&mut self, depth: usize) -> Option<()> {
        let kind = self.take(1)?.first_mut()?;
        match *kind {
            b'V' => {}
            b't' | b'b' | b'B' => self.take(1).map(drop)?,
            b's' | b'U' | b'u' => self.take(2).map(drop)?,
            b'I' | b'i' | b'f' => self.take(4).map(drop)?,
            b'D' => self.take(5).map(drop)?,
            b'L' | b'l' | b'd' | b'T' => self.take(8).map(drop)?,
            b'S' | b'x' => self.long().map(drop)?,
            b'F' | b'A' if depth == MAX_DEPTH => {
                // A byte array looks the same from outside, and nobody looks into it.
                *kind = b'x';
                self.long()?;
            }
            b'F' => Fields(self.long()?).table(depth + 1)?,
            b'A' => Fields(self.long()?).array(depth + 1)?,
            _ => return None,
        }
        Some(())
    }
}

/// Puts [`SUBSTITUTE`] in the place of every byte that is not UTF-8.
fn substitute(mut text: &mut [u8]) {
    while let Err(error) = str::from_utf8(text) {
        let begin = error.valid_up_to();
        let end = error.error_len().map_or(text.len(), |length| begin + length);
        text[begin..end].fill(SUBSTITUTE as u8);
        text = &mut text[end..];
    }
}

#[cfg(test)]
#[path = "inbound_tests.rs"]
mod tests;
