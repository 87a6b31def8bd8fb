//! The soak's own connections to the broker.

use std::time::Duration;

use anyhow::Context as _;
use lapin::{Connection, ConnectionProperties};
use tokio::time::timeout;

const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// AMQP's `delivery_mode` of a message that survives a restart of the broker.
pub const PERSISTENT: u8 = 2;

/// Connects. A node that is just starting may accept a connection and not answer on it.
pub async fn connect(url: &str) -> anyhow::Result<Connection> {
    let url = format!("{url}?heartbeat=10");
    let connecting = Connection::connect(&url, ConnectionProperties::default());
    Ok(timeout(CONNECT_LIMIT, connecting).await.context("the broker does not answer")??)
}

/// Closes, as far as there is something to close.
pub async fn close(connection: Connection) {
    // It was lost already, or it is lost now: nothing depends on it any more.
    timeout(CLOSE_LIMIT, connection.close(200, "done".into())).await.ok();
}
