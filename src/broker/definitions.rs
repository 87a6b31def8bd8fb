//! The topology as RabbitMQ's own definitions file, for who creates it without the worker.

use secrecy::ExposeSecret as _;
use serde_json::{Map, Value, json};

use super::connection::parse;
use super::topology::{Argument, Arguments, Routing, Target, Topology};
use super::{Error, Settings};

/// Exchanges, queues and bindings as JSON, for the virtual host in the URL: what `rabbitmqctl
/// import_definitions` and the management page take.
pub fn definitions(settings: &Settings) -> Result<String, Error> {
    let vhost = parse(settings.url.expose_secret())?.vhost;
    let topology = Topology::new(&settings.prefix);
    let exchanges = topology.exchanges().into_iter().map(|exchange| {
        json!({
            "name": exchange.name,
            "vhost": vhost,
            "type": match exchange.routing {
                Routing::Fanout => "fanout",
                Routing::Topic => "topic",
            },
            "durable": true,
            "auto_delete": false,
            "internal": exchange.internal,
            "arguments": object(exchange.arguments),
        })
    });
    let queues = topology.queues().into_iter().map(|queue| {
        json!({
            "name": queue.name,
            "vhost": vhost,
            "durable": true,
            "auto_delete": false,
            "arguments": object(queue.arguments),
        })
    });
    let bindings = topology.bindings().into_iter().map(|binding| {
        let (kind, name) = match binding.to {
            Target::Queue(name) => ("queue", name),
            Target::Exchange(name) => ("exchange", name),
        };
        json!({
            "source": binding.exchange,
            "vhost": vhost,
            "destination": name,
            "destination_type": kind,
            "routing_key": binding.routing_key,
            "arguments": {},
        })
    });
    let all = json!({
        "exchanges": exchanges.collect::<Vec<_>>(),
        "queues": queues.collect::<Vec<_>>(),
        "bindings": bindings.collect::<Vec<_>>(),
    });
    Ok(format!("{all:#}"))
}

fn object(arguments: Arguments) -> Map<String, Value> {
    let value = |value| match value {
        Argument::Text(text) => Value::from(text),
        Argument::Number(number) => Value::from(number),
    };
    arguments.into_iter().map(|(name, given)| (name.to_owned(), value(given))).collect()
}
