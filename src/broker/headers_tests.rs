//! What counts as the worker's own header, and how long a message may wait.

use lapin::types::FieldArray;

use super::*;

const KIND: CommandKind = CommandKind::Submit;

fn death(of: [(&str, &str); 3]) -> AMQPValue {
    let mut death = FieldTable::default();
    for (name, value) in of {
        death.insert(name.into(), AMQPValue::LongString(value.into()));
    }
    AMQPValue::FieldTable(death)
}

fn expired(queue: &str, exchange: &str) -> AMQPValue {
    death([("queue", queue), ("exchange", exchange), ("reason", "expired")])
}

/// Of a delivery whose header says 100, by this way.
fn deliveries(exchange: &str, key: &str, deaths: Option<Vec<AMQPValue>>) -> u32 {
    let mut headers = FieldTable::default();
    headers.insert("x-call-manager-deliveries".into(), AMQPValue::LongInt(100));
    if let Some(deaths) = deaths {
        headers.insert("x-death".into(), AMQPValue::FieldArray(FieldArray::from(deaths)));
    }
    let mut received = Received::mock(1, exchange.into(), key.into(), false, Vec::new());
    received.properties = BasicProperties::default().with_headers(headers);
    earlier(&received, KIND, &Topology::new("p")).deliveries
}

#[test]
fn the_workers_own_headers_count_only_on_what_left_a_delay_queue() {
    let key = KIND.routing_key();
    let own = || expired("p.delay.10s", "p.delay.10s");
    assert_eq!(deliveries("p.retry", &key, Some(vec![own()])), 100);
    assert_eq!(deliveries("p.retry", &key, Some(vec![own(), expired("a", "b")])), 100);

    for (exchange, key) in [
        ("p.commands", key.as_str()),
        ("", "p.submit"),
        ("", "p.submit.retry"),
        ("other.retry", &key),
        // It was published by way of the default exchange, with the command's key in `CC`.
        ("p.retry", "p.delay.10s"),
        ("p.retry", "batch-calling.get"),
    ] {
        assert_eq!(deliveries(exchange, key, Some(vec![own()])), 0, "{exchange} {key}");
    }
    for deaths in [
        None,
        Some(vec![]),
        Some(vec![AMQPValue::LongInt(1)]),
        Some(vec![expired("a", "b"), own()]),
        Some(vec![expired("p.delay.10s", "")]),
        Some(vec![expired("p.delay.10s", "p.delay.2s")]),
        Some(vec![expired("p.submit", "p.submit")]),
        Some(vec![expired("other.delay.10s", "other.delay.10s")]),
        Some(vec![death([
            ("queue", "p.delay.2s"),
            ("exchange", "p.delay.2s"),
            ("reason", "maxlen"),
        ])]),
    ] {
        assert_eq!(deliveries("p.retry", &key, deaths.clone()), 0, "{deaths:?}");
    }
}

#[test]
fn an_expiration_counts_from_the_publication_where_the_producer_tells_it() {
    let now = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_100_500);
    let left = |expiration: &str, timestamp: Option<u64>| {
        let mut properties = BasicProperties::default().with_expiration(expiration.into());
        if let Some(timestamp) = timestamp {
            properties = properties.with_timestamp(timestamp);
        }
        expires_at(&properties, now).map(|at| at.duration_since(now).unwrap().as_millis())
    };
    assert_eq!(left("60000", None), Some(60_000));
    assert_eq!(left("60000", Some(1_700_000_080)), Some(40_499));
    assert_eq!(left("60000", Some(1_700_000_100)), Some(60_000), "within this second");
    for nonsense in [0, 1_700_000_000, 1_700_000_101, 1_700_000_100_000, u64::MAX] {
        assert_eq!(left("60000", Some(nonsense)), Some(60_000), "{nonsense}");
    }
    assert_eq!(left("soon", None), None);
    assert_eq!(expires_at(&BasicProperties::default(), now), None);
}
