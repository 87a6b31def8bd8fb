//! Waits for a condition, and fails with its name when it does not come true in time.

use std::time::Duration;

use tokio::time::timeout;

use super::LIMIT;

pub async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    until_within(LIMIT, what, condition).await;
}

/// With another limit.
pub async fn until_within(limit: Duration, what: &str, condition: impl AsyncFn() -> bool) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(limit, waiting).await.unwrap_or_else(|_| panic!("not within {limit:?}: {what}"));
}
