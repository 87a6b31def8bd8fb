//! A message that ends every connection it is delivered over, until the broker gives it up.

use std::time::Duration;

use call_manager::domain::command::CommandKind;
use lapin::BasicProperties;

use crate::lanes::others_are_answered;
use crate::process::Process;
use crate::support::proxy::Proxy;
use crate::support::wait::until_within;
use crate::support::{World, submit_body, with_id};

/// As a message does that the broker itself cannot encode: RabbitMQ 3 and the integer id of AMQP 1.0.
const BREAKS: &[u8] = b"breaks its connection";

/// So often the broker delivers it.
const DELIVERIES: usize = 50;

/// Commands behind it, as many as are delivered along with it.
const BEHIND: usize = 20;

async fn a_message_breaks_the_lane(broken: CommandKind) {
    let mut world = World::without_worker().await;
    let (proxy, url) = Proxy::to_broker().await;
    let settings = [("AMQP_URL", url.as_str())];
    let worker = Process::consuming(&world, &world.ledger_url(), &settings).await;
    let batch_id = world.submitted().await;
    // Not in its hands any more when its connection breaks.
    worker.until_logged("answered").await;
    proxy.breaks_on(BREAKS);
    let key = broken.routing_key();
    let exchange = world.topology.commands_exchange();
    world.publish_to(&exchange, &key, BREAKS, BasicProperties::default()).await;
    let body = match broken {
        CommandKind::Submit => submit_body().to_string(),
        CommandKind::Cancel | CommandKind::Get => format!(r#"{{"batch_id": "{batch_id}"}}"#),
    };
    let is_broken = async || proxy.broken() >= 2;
    until_within(Duration::from_secs(20), "it breaks its connection again", is_broken).await;
    others_are_answered(&mut world, broken, &batch_id).await;

    // Behind it, they are delivered, and taken back, along with it.
    for n in 0..BEHIND {
        world.publish(broken, body.as_bytes(), with_id(&format!("behind-{n}"))).await;
    }
    let dead = world.topology.dead_letter();
    let is_given_up = async || world.queue(&dead).await.0 == 1;
    until_within(Duration::from_secs(150), "the broker gives it up", is_given_up).await;
    assert!(proxy.broken() >= DELIVERIES, "{}", proxy.broken());
    let mut answered = std::collections::HashSet::new();
    while answered.len() < BEHIND {
        let result = world.next_result().await;
        assert_eq!(result.code(), "200", "{}", result.body);
        assert!(result.command_id().starts_with("behind-"));
        answered.insert(result.command_id());
    }
    assert_eq!(world.queue(&dead).await.0, 1, "it alone is given up");
    let log = worker.log();
    let is_loss =
        |line: &&str| line.contains("the lane is lost") || line.contains("was lost as soon");
    let lost: Vec<_> = log.lines().filter(is_loss).collect();
    assert!(lost.len() >= DELIVERIES, "{lost:#?}");
    assert!(lost.iter().all(|line| line.contains(&format!("command=\"{broken}\""))), "{lost:#?}");
    worker.stop().await;
    world.clean_up().await;
}

#[tokio::test]
async fn a_message_that_ends_its_connections_stops_its_own_lane_alone_and_takes_nothing_along() {
    tokio::join!(
        a_message_breaks_the_lane(CommandKind::Submit),
        a_message_breaks_the_lane(CommandKind::Cancel),
        a_message_breaks_the_lane(CommandKind::Get),
    );
}
