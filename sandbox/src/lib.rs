//! A stand-in for the `ElevenLabs` batch-calling API: real sockets, real state, and every fault that
//! an honest test of a client needs.
//!
//! [`Sandbox::start`] serves the vendor's routes below `/v1/convai/batch-calling`; batches move
//! through their states by a clock that a test can set; [`Sandbox::order`] makes requests fail in
//! the ways networks and vendors do, before or after the vendor has done what was asked. The same
//! is there over HTTP below `/sandbox/`, and as a program, `elevenlabs-sandbox`.
//!
//! ```
//! use elevenlabs_sandbox::{Effect, Fault, Options, Route, Sandbox};
//!
//! # async fn example() -> std::io::Result<()> {
//! let sandbox = Sandbox::start(Options { speed: 0.0, ..Options::default() }).await?;
//! sandbox.order(Fault::on(Route::Submit, Effect::ResetAfter).times(2));
//! // … submit a batch at sandbox.base_url() …
//! assert_eq!(sandbox.batches().len(), 0);
//! # Ok(())
//! # }
//! ```
//!
//! What is made up here because the vendor does not document it:
//! - A phone number's last digit decides how its call ends: 7 is refused, 8 has voicemail, 9 does
//!   not answer, all others talk. A call that is repeated succeeds, but for numbers that end in 77
//!   or 99.
//! - An agent whose id begins with `agent_missing` does not exist, nor does a phone number whose id
//!   begins with `phnum_missing`. A number's id that contains `sip` or `exotel` is of that provider,
//!   any other one Twilio's.
//! - A cancel of a batch that has ended, a retry of one that has not or that has nobody to call
//!   again, and an export of one that still runs are refused with a 400.
//! - A call that talks or had voicemail is a conversation, which can be found by its dynamic variables.
//! - Every batch has a field `sandbox_extra` that no published schema knows.

mod answer;
mod api;
mod body;
mod clock;
mod control;
mod fault;
mod json;
mod life;
mod observe;
mod route;
mod schema;
mod server;
mod service;
mod state;
mod store;
mod unkind;
mod wire;

pub use fault::{Body, Effect, Fault, MAX_FAULTS, Reply};
pub use life::{BatchStatus, CallStatus};
pub use observe::{Batch, Recipient, Request};
pub use route::Route;
pub use server::{Options, Sandbox};
pub use unkind::Unkind;
