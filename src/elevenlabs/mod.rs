//! ElevenLabs' batch-calling API: requests, answers, and what an error says about a batch.

mod breaker;
mod calls;
mod client;
mod error;
mod evidence;
mod lately;
mod look;
mod names;
mod numbers;
mod reconcile;
mod wire;
mod words;

pub use breaker::{Breaker, Outage, State};
pub use calls::Called;
pub use client::{Answer, Client, Settings, SetupError};
pub use error::{Class, Error};
pub use evidence::SearchKey;
pub use numbers::Numbers;
pub use reconcile::{Candidate, Finder, Looked, Seen};
pub use wire::SubmitRequest;
