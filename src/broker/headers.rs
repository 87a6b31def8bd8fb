//! Reads the headers and properties of a delivery, and whether they are the worker's own.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lapin::BasicProperties;
use lapin::message::Delivery as Received;
use lapin::types::{AMQPValue, ShortString};

use crate::domain::Earlier;

use super::topology::{Delay, Topology};

/// Whether a delivery comes from one of the worker's own delay queues: the retry exchange delivers it,
/// and the broker's `x-death` says that it was there until its time was over. A producer who writes
/// `x-death` itself needs the right to publish to the retry exchange too, which only workers have.
pub(super) fn was_deferred(received: &Received, topology: &Topology) -> bool {
    if received.exchange.as_str() != topology.retry_exchange() {
        return false;
    }
    let headers = received.properties.headers().as_ref();
    let newest = headers.and_then(|headers| match headers.inner().get("x-death") {
        Some(AMQPValue::FieldArray(deaths)) => match deaths.as_slice().first() {
            Some(AMQPValue::FieldTable(death)) => Some(death),
            _ => None,
        },
        _ => None,
    });
    newest.is_some_and(|death| {
        let says = |name: &str| death.inner().get(name).and_then(text);
        // An exchange and its delay queue have one name.
        let (queue, exchange) = (says("queue"), says("exchange"));
        let is_delay =
            |name: &String| Delay::ALL.iter().any(|delay| topology.delay(*delay) == *name);
        says("reason").as_deref() == Some("expired")
            && queue == exchange
            && queue.as_ref().is_some_and(is_delay)
    })
}

/// When a message with the property `expiration` would have been dropped. The broker counts from its
/// publication, which only the property `timestamp` tells: it counts where the broker would have
/// delivered the message, else the time of delivery does.
pub(super) fn expires_at(properties: &BasicProperties, now: SystemTime) -> Option<SystemTime> {
    let expiration = properties.expiration().as_ref()?.as_str().trim();
    let lasts = Duration::from_millis(expiration.parse().ok()?);
    let published = properties.timestamp().map(Duration::from_secs);
    let published = published.and_then(|since| UNIX_EPOCH.checked_add(since));
    let is_plausible =
        |published: &SystemTime| now.duration_since(*published).is_ok_and(|age| age <= lasts);
    published.filter(is_plausible).unwrap_or(now).checked_add(lasts)
}

/// What the broker writes for one delivery, or reads from one publish: `CC` would multiply a copy.
pub(super) fn is_of_one_delivery(name: &str) -> bool {
    let written = ["x-death", "x-delivery-count", "x-acquired-count", "CC", "BCC"];
    written.contains(&name)
        || name.starts_with("x-first-death-")
        || name.starts_with("x-last-death-")
        || Earlier::is_header(name)
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
mod tests {
    use super::*;

    #[test]
    fn a_message_expires_by_its_timestamp_where_that_can_be_right_else_by_its_delivery() {
        let second = |n| UNIX_EPOCH + Duration::from_secs(n);
        let at = |timestamp: Option<u64>, expiration: &str| {
            let properties = BasicProperties::default().with_expiration(expiration.into());
            let properties = match timestamp {
                Some(timestamp) => properties.with_timestamp(timestamp),
                None => properties,
            };
            expires_at(&properties, second(1_000))
        };
        assert_eq!(at(None, "60000"), Some(second(1_060)));
        assert_eq!(at(Some(970), "60000"), Some(second(1_030)));
        for wrong in [900, 1_001, 970_000, u64::MAX] {
            assert_eq!(at(Some(wrong), "60000"), Some(second(1_060)), "{wrong}");
        }
        assert_eq!(at(None, "soon"), None);
        assert_eq!(expires_at(&BasicProperties::default(), second(1_000)), None);
    }
}
