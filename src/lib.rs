//! call-manager: a RabbitMQ worker that executes ElevenLabs batch-calling commands.
//!
//! ```text
//!            delivery                      command                 request
//! RabbitMQ ───────────> worker (broker/) ──────────> handler ─────────────────> ElevenLabs
//!          <───────────                  <──────────    │    <─────────────────
//!         result, then ack                result        └── ledger: one row per submit
//! ```
//!
//! Who may import whom (a test holds it, `tests/tidy.rs`): `main -> cli -> app -> worker ->
//! {handler, broker, health} -> domain`; `handler -> {ledger, elevenlabs, retry} -> domain`.
//! `lapin` lives in [`broker`] alone, `reqwest` in [`elevenlabs`], `backoff` in [`retry`], the
//! environment in [`config`]. Adapters never import each other: [`app`] wires them.

pub mod app;
pub mod broker;
pub mod cli;
pub mod config;
pub mod crash;
pub mod domain;
pub mod elevenlabs;
pub mod handler;
pub mod health;
pub mod ledger;
pub mod retry;
pub mod telemetry;
pub mod worker;
