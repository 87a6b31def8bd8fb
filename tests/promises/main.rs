//! The promises of the product, each in a file of its own, against a real RabbitMQ and the sandbox.
//!
//! One binary for all of them: every test program links a TLS stack, and that takes seconds.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    clippy::print_stderr,
    missing_docs,
    reason = "a test fails loudly, and its helper tasks end with it"
)]

mod account;
mod bad_input;
mod by_command_id;
mod commands;
mod crash;
mod deferral;
mod documents;
mod evidence;
mod examples;
mod finder;
mod finish;
mod foreign;
mod handler;
mod headers;
mod interrupted;
mod keys;
mod lanes;
mod ledger;
mod ledger_faults;
mod ledger_finish;
mod ledger_open;
mod load;
mod long;
mod mutations;
mod network;
mod nodes;
mod not_after;
mod outages;
mod permissions;
mod process;
mod races;
mod reconcile;
mod reconnect;
mod request;
mod results;
mod retries;
mod routing;
mod row;
mod stalls;
mod start;
mod stop;
mod strikes;
mod support;
mod tls;
mod topology;
mod unkind;
