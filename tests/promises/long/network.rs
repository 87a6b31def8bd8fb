//! A silent network between worker and broker, with the heartbeats that a worker has by itself, and a
//! slow one over which it connects.

use crate::network::{silence, slow};
use crate::support::proxy::{Hole, Towards};

#[tokio::test]
async fn silence_is_noticed_by_the_usual_heartbeats_and_survived() {
    tokio::join!(
        silence(Towards::Client, Hole::Swallows, ""),
        silence(Towards::Client, Hole::Stalls, ""),
        silence(Towards::Server, Hole::Swallows, ""),
        silence(Towards::Server, Hole::Stalls, ""),
    );
}

#[tokio::test]
async fn a_worker_connects_again_over_a_slow_way_to_the_broker() {
    let (world, proxy, mut load) = slow("broker, cut, 200 ms each way").await;
    load.publish(&world, 150).await;
    load.until_answered(50).await;
    proxy.cut();
    // What takes a round trip each, to connect and to declare, has to fit into the limit on it.
    load.until_all_answered().await;
    assert_eq!(proxy.accepted(), 4, "the first attempt to connect again succeeds");
    proxy.heal();
    world.finish_load(load).await;
}
