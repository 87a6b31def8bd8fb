//! Logs: where they go, in which form, and how an error is written into one line.

use std::io::IsTerminal as _;

use tracing::{Level, Metadata};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::prelude::*;

/// The form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Sends logs to standard error, because standard output belongs to what a command prints.
/// `filter` is a level or tracing directives, checked by the settings.
pub fn start(filter: &str, format: LogFormat) {
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(EnvFilter::try_new(filter).unwrap_or_default())
        .with(filter_fn(tells_no_secret))
        .with(lines)
        .init();
}

/// Whatever the filter says: libraries log URLs with passwords and whole frames below `warn`, and
/// lapin logs what it also returns, which the worker says in one line of its own.
fn tells_no_secret(line: &Metadata<'_>) -> bool {
    let own = line.target().starts_with("call_manager");
    own || (*line.level() <= Level::WARN && !line.target().starts_with("lapin"))
}

/// An error with everything that caused it, in one line for the log.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some wrappers repeat their source's text in their own.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
