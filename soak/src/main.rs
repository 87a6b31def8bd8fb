//! A soak of the worker: many submits, cancels and gets, real processes, random faults, and a judgement at
//! the end.
//!
//! `script/soak` starts it with a private RabbitMQ node in its hands. Exit code 0: every promise was
//! kept; 1: one was broken; 2: the soak itself could not be run.

mod amqp;
mod book;
mod chaos;
mod crew;
mod judge;
mod listener;
mod node;
mod options;
mod plan;
mod postgres;
mod producer;
mod quota;
mod report;
mod run;
mod vendor;

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::bail;
use clap::Parser as _;
use tokio::signal::unix::{SignalKind, signal};

use crate::options::Options;

const BROKEN: u8 = 1;
const COULD_NOT_RUN: u8 = 2;

#[tokio::main]
async fn main() -> ExitCode {
    match until_a_signal(&Options::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(BROKEN),
        Err(error) => {
            // A closed stderr leaves nobody to tell.
            writeln!(std::io::stderr(), "\nerror: the soak could not be run: {error:#}").ok();
            ExitCode::from(COULD_NOT_RUN)
        }
    }
}

/// Whether every promise was kept. What was started is killed when its handle is dropped.
async fn until_a_signal(options: &Options) -> anyhow::Result<bool> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        kept = run::run(options) => kept,
        _ = terminate.recv() => bail!("it was stopped"),
        _ = interrupt.recv() => bail!("it was stopped"),
    }
}
