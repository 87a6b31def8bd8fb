//! The promises whose proof takes longer than 20 seconds: `script/test --all` runs them.

mod cluster;
mod drained;
mod expiration;
mod finisher;
mod headers;
mod lanes;
mod network;
mod nodes;
mod outage;
mod poison;
mod processes;
mod purged;
