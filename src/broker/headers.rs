//! Reads the properties and headers of a delivery: what the broker vouches for, and what a producer says.

use std::time::{Duration, SystemTime};

use lapin::BasicProperties;
use lapin::message::Delivery as Received;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use crate::domain::command::CommandKind;
use crate::domain::{Earlier, misspelt};

use super::inbound::CUT;
use super::topology::{Delay, Topology};

/// A frame, less the other properties and what is added to a copy: 7 KB.
const MAX_HEADERS_BYTES: usize = 124_000;

/// What earlier times in a worker's hands left in the headers; nothing where a producer may have
/// written them.
pub(super) fn earlier(received: &Received, kind: CommandKind, topology: &Topology) -> Earlier {
    let (exchange, key) = (received.exchange.as_str(), received.routing_key.as_str());
    let death = header(received, "x-death").and_then(last_death);
    if exchange == topology.retry_exchange() && key == kind.routing_key() && waited(death, topology)
    {
        return Earlier::read(|name| header(received, name).and_then(number));
    }
    Earlier::default()
}

/// Whether a message has just left a delay queue that it had come to by its delay exchange.
///
/// The broker's own entry comes first in `x-death`. A producer can write that header too, and
/// `RabbitMQ` 3 keeps it. So two more facts of the delivery count, which only the broker sets:
/// - Its exchange. The retry exchange is internal: nobody can publish to it.
/// - Its routing key. By way of the default exchange, a delay queue is reached with the queue's name.
///
/// Who may publish to a delay exchange, or bind something to the retry exchange, can still forge. The
/// README's rights give that to workers alone. Where operators have left the retry exchange of a former
/// version, which is not internal, so can who may publish to that one.
fn waited(death: Option<&FieldTable>, topology: &Topology) -> bool {
    let says = |name| death?.inner().get(name).and_then(text);
    let (queue, exchange) = (says("queue"), says("exchange"));
    let delays = Delay::ALL.map(|delay| Some(topology.delay(delay)));
    says("reason").as_deref() == Some("expired") && queue == exchange && delays.contains(&queue)
}

/// The broker puts the latest one first.
fn last_death(deaths: &AMQPValue) -> Option<&FieldTable> {
    let AMQPValue::FieldArray(deaths) = deaths else { return None };
    match deaths.as_slice().first()? {
        AMQPValue::FieldTable(death) => Some(death),
        _ => None,
    }
}

/// When the message's `expiration` is over. The broker delivers none that has expired, so a
/// `timestamp` that would have let it expire by now is not that of its publication; it counts as
/// published now, then.
pub(super) fn expires_at(properties: &BasicProperties, now: SystemTime) -> Option<SystemTime> {
    let waits = properties.expiration().as_ref()?.as_str().parse().ok()?;
    let waits = Duration::from_millis(waits);
    let published = properties.timestamp().and_then(|seconds| {
        let from = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))?;
        // The property has whole seconds: it was published until the end of that one.
        let until = from.checked_add(Duration::from_millis(999))?.min(now);
        (from <= now && until.checked_add(waits)? >= now).then_some(until)
    });
    published.unwrap_or(now).checked_add(waits)
}

/// Whether a copy must not have this header: the broker writes it for one delivery, or reads it
/// from one publish (`CC` would multiply a copy), or it is the worker's own.
pub(super) fn is_of_one_delivery(name: &str) -> bool {
    let written = ["x-death", "x-delivery-count", "x-acquired-count", "CC", "BCC"];
    written.contains(&name)
        || name.starts_with("x-first-death-")
        || name.starts_with("x-last-death-")
        || Earlier::is_header(name)
}

/// Why the headers are refused as they are, if they are: they say nothing that the worker could lose.
///
/// A copy of the command that goes to a delay queue comes back with some more, of the broker and of the
/// worker. So a limit on what the producer sends keeps all of it within what can be read.
pub(super) fn refused_headers(headers: &FieldTable) -> Option<String> {
    let cut =
        headers.inner().get(CUT).and_then(number).and_then(|bytes| usize::try_from(bytes).ok());
    let bytes = cut.unwrap_or_else(|| table_bytes(headers));
    if bytes > MAX_HEADERS_BYTES {
        return Some(format!(
            "the headers have {bytes} bytes, and at most {MAX_HEADERS_BYTES} are read; leave out what \
             is none of the contract's"
        ));
    }
    headers.inner().keys().find_map(|name| misspelt(name.as_str()))
}

/// As many as on the wire, at most.
fn table_bytes(table: &FieldTable) -> usize {
    let entry = |(name, value): (&ShortString, &AMQPValue)| {
        1 + name.as_str().len() + 1 + value_bytes(value)
    };
    table.inner().iter().map(entry).sum()
}

fn value_bytes(value: &AMQPValue) -> usize {
    match value {
        AMQPValue::LongString(text) => 4 + text.as_bytes().len(),
        AMQPValue::ByteArray(bytes) => 4 + bytes.as_slice().len(),
        AMQPValue::FieldArray(array) => {
            4 + array.as_slice().iter().map(|value| 1 + value_bytes(value)).sum::<usize>()
        }
        AMQPValue::FieldTable(table) => 4 + table_bytes(table),
        // The longest of the others.
        _ => 8,
    }
}

pub(super) fn header<'a>(received: &'a Received, name: &str) -> Option<&'a AMQPValue> {
    received.properties.headers().as_ref()?.inner().get(name)
}

pub(super) fn text(value: &AMQPValue) -> Option<String> {
    match value {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok().map(str::to_owned),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        _ => None,
    }
}

pub(super) fn number(value: &AMQPValue) -> Option<i64> {
    match *value {
        AMQPValue::ShortShortInt(number) => Some(number.into()),
        AMQPValue::ShortShortUInt(number) => Some(number.into()),
        AMQPValue::ShortInt(number) => Some(number.into()),
        AMQPValue::ShortUInt(number) => Some(number.into()),
        AMQPValue::LongInt(number) => Some(number.into()),
        AMQPValue::LongUInt(number) => Some(number.into()),
        AMQPValue::LongLongInt(number) => Some(number),
        AMQPValue::Timestamp(number) => i64::try_from(number).ok(),
        _ => None,
    }
}

/// A header's value as a person reads it; of what is neither text nor a number, the type.
pub(super) fn shown(value: &AMQPValue) -> Option<String> {
    let number = || number(value).map(|number| number.to_string());
    match value {
        AMQPValue::Void => None,
        AMQPValue::Double(number) => Some(number.to_string()),
        AMQPValue::Float(number) => Some(number.to_string()),
        _ => text(value).or_else(number).or_else(|| Some(format!("{:?}", value.get_type()))),
    }
}

pub(super) fn present(property: Option<&ShortString>) -> Option<String> {
    let text = property?.as_str();
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
#[path = "headers_tests.rs"]
mod tests;
