//! The vendor's batch-calling API: requests, answers, and what an error says about a batch.

mod breaker;
mod client;
mod error;
mod reconcile;
mod wire;

pub use breaker::{Breaker, Outage, State};
pub use client::{Answer, Client, Settings, SetupError};
pub use error::{Class, Error};
pub use reconcile::{Finder, Lost};
pub use wire::SubmitRequest;
