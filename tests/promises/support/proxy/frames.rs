//! AMQP frames in a stream of bytes: where one ends, which method it is, and some that make a broker
//! close a channel.

use crate::support::raw::short;

/// A method, as its class and its number.
pub type Method = (u16, u16);

pub const CHANNEL_CLOSE: Method = (20, 40);
pub const CONSUME_OK: Method = (60, 21);
pub const DELIVER: Method = (60, 60);
/// The broker's acknowledgement of a publish.
pub const CONFIRM: Method = (60, 80);
pub const CONFIRM_SELECT_OK: Method = (85, 11);
const PUBLISH: Method = (60, 40);

/// What a client says before its first frame.
const GREETING: usize = b"AMQP\0\0\x09\x01".len();
/// Type, channel and length; then, of a method, class and number.
const HEAD: usize = 11;
/// What surrounds the payload: the first seven of [`HEAD`], and the end octet.
const AROUND: usize = 8;
const METHOD: u8 = 1;
const BODY: u8 = 3;
const END: u8 = 0xce;

/// Follows a stream of frames.
#[derive(Default)]
pub struct Frames {
    greeting: usize,
    /// Of the frame that has begun; all of it where it is a method.
    head: Vec<u8>,
    seen: usize,
    in_content: bool,
}

impl Frames {
    pub fn of_server() -> Self {
        Self::default()
    }

    pub fn of_client() -> Self {
        Self { greeting: GREETING, ..Self::default() }
    }

    /// Follows the stream through `bytes`, telling of every method that is complete: its channel,
    /// which it is, its arguments. Returns the first place in them where another frame can stand, if
    /// there is one.
    pub fn follow(
        &mut self,
        bytes: &[u8],
        mut told: impl FnMut(u16, Method, &[u8]),
    ) -> Option<usize> {
        let mut first = None;
        for (at, byte) in (1..).zip(bytes) {
            if self.greeting > 0 {
                self.greeting -= 1;
                continue;
            }
            if self.head.len() < HEAD || self.head[0] == METHOD {
                self.head.push(*byte);
            }
            self.seen += 1;
            let Some(length) = self.head.get(3..7) else { continue };
            if self.seen < u32::from_be_bytes(length.try_into().unwrap()) as usize + AROUND {
                continue;
            }
            let word = |at: usize| u16::from_be_bytes(self.head[at..at + 2].try_into().unwrap());
            match self.head[0] {
                METHOD => {
                    let method = (word(7), word(9));
                    self.in_content = method == PUBLISH;
                    told(word(1), method, &self.head[HEAD..self.head.len() - 1]);
                }
                // One has room for all that the tests publish.
                BODY => self.in_content = false,
                _ => {}
            }
            self.head.clear();
            self.seen = 0;
            if self.between() {
                first.get_or_insert(at);
            }
        }
        first
    }

    /// Whether another frame can stand here: not within one, and not within a message.
    pub fn between(&self) -> bool {
        self.greeting == 0 && self.seen == 0 && !self.in_content
    }
}

/// What a client should not do.
#[derive(Clone, Debug)]
pub enum Mistake {
    /// Asks for a queue that is not there, for which the broker closes the channel: 404.
    NotFound,
    /// Acknowledges what was not delivered: 406.
    PreconditionFailed,
    /// Ends the consumer of this tag, without an answer.
    Cancel(Vec<u8>),
}

impl Mistake {
    pub fn frame(&self, channel: u16) -> Vec<u8> {
        let payload = match self {
            // Passive, without arguments.
            Self::NotFound => {
                [&[0, 50, 0, 10, 0, 0], &short(b"nobody")[..], &[1, 0, 0, 0, 0]].concat()
            }
            Self::PreconditionFailed => {
                [&[0, 60, 0, 80], &u64::from(u32::MAX).to_be_bytes()[..], &[0]].concat()
            }
            Self::Cancel(tag) => [&[0, 60, 0, 30], &short(tag)[..], &[1]].concat(),
        };
        let mut frame = vec![METHOD];
        frame.extend(channel.to_be_bytes());
        frame.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
        frame.extend(payload);
        frame.push(END);
        frame
    }
}
