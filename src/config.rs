//! Typed settings; the only reader of the environment. All faults are reported at once.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use config::{Config, Environment, File, FileFormat, Source};
use jiff::SignedDuration;
use secrecy::SecretString;
use url::Url;

use crate::telemetry::LogFormat;

mod broker;

pub use broker::BrokerSettings;

const DEFAULTS: &str = include_str!("config.default.toml");

/// Longer, and the broker's 30 minute ack time-out would take a submit back whose answer was lost: a
/// request, the search for its batch with the look that is under way, and a while to record and
/// publish its result. What has to wait otherwise waits in a delay queue.
const LONGEST_IN_HAND: Duration = Duration::from_secs(27 * 60);

/// Longer than a worker may be stopped while a redelivery waits in its queue, a long weekend included.
const SHORTEST_RETENTION: Duration = Duration::from_secs(7 * 24 * 60 * 60);
const RETENTION: &str = "a duration of at least 168h (a week) with its unit";

/// What the worker needs.
#[derive(Debug)]
pub struct Settings {
    /// Of the health endpoint.
    pub host: IpAddr,
    /// Of the health endpoint; 0 takes a free one.
    pub port: u16,
    /// Sent to the vendor, shown nowhere.
    pub elevenlabs_api_key: SecretString,
    /// http or https, without credentials or query.
    pub elevenlabs_base_url: Url,
    /// Shorter than `elevenlabs_timeout`.
    pub elevenlabs_connect_timeout: Duration,
    /// Of a whole request.
    pub elevenlabs_timeout: Duration,
    /// Which broker.
    pub broker: BrokerSettings,
    /// What remembers submits.
    pub ledger: LedgerSettings,
    /// How long a command is retried.
    pub retry_horizon: Duration,
    /// How long a new batch can take to show in the vendor's list.
    pub settling_window: Duration,
    /// How long a stop may take.
    pub shutdown_grace: Duration,
    /// How to log.
    pub log: LogSettings,
}

/// What remembers submits.
#[derive(Debug)]
pub struct LedgerSettings {
    /// `LEDGER_URL`.
    pub place: LedgerPlace,
    /// How long submits that are done are remembered.
    pub retention: Duration,
}

/// Where submits are remembered. Its `Display` has no password in it.
#[derive(Debug)]
pub enum LedgerPlace {
    /// A file, for one worker.
    Sqlite(PathBuf),
    /// A server, for a pool of workers.
    Postgres {
        /// Has the password in it.
        url: SecretString,
        /// The same without the password.
        shown: String,
    },
    /// This process, for trials.
    Memory,
}

impl fmt::Display for LedgerPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Postgres { shown, .. } => f.write_str(shown),
            Self::Memory => f.write_str("memory:"),
        }
    }
}

/// How to log.
#[derive(Debug)]
pub struct LogSettings {
    /// A level or tracing directives.
    pub filter: String,
    /// Text or JSON.
    pub format: LogFormat,
}

/// Everything that is wrong with the settings, one line each.
#[derive(Debug)]
pub struct Faults(Vec<String>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Faults {}

/// Where settings come from, merged.
pub struct Sources {
    merged: Config,
    faults: Vec<String>,
}

impl Sources {
    /// Reads the defaults, `file`, `.env` in the working directory and the environment.
    pub fn read(file: Option<&Path>) -> Self {
        let mut environment = HashMap::new();
        let mut faults = Vec::new();
        let names = names();
        read_dotenv(&names, &mut environment, &mut faults);
        for name in &names {
            let variable = name.to_uppercase();
            match std::env::var(&variable) {
                // An empty variable is how compose files say "not set".
                Ok(value) if !value.is_empty() => {
                    environment.insert(variable, value);
                }
                Ok(_) | Err(std::env::VarError::NotPresent) => {}
                Err(std::env::VarError::NotUnicode(_)) => {
                    faults.push(format!("{variable} is not UTF-8"));
                }
            }
        }
        Self::merge(file, environment, faults)
    }

    fn merge(
        file: Option<&Path>,
        environment: HashMap<String, String>,
        mut faults: Vec<String>,
    ) -> Self {
        let environment = Environment::default().ignore_empty(true).source(Some(environment));
        let defaults = File::from_str(DEFAULTS, FileFormat::Toml);
        let mut builder = Config::builder().add_source(defaults);
        if let Some(path) = file {
            let source = File::from(path).format(FileFormat::Toml);
            match source.collect() {
                Ok(table) => {
                    let known = names();
                    let unknown = table.keys().filter(|key| !known.contains(key));
                    faults.extend(unknown.map(|key| {
                        format!(
                            "{}: \"{key}\" is not a setting; the settings are: {}",
                            path.display(),
                            known.join(", ")
                        )
                    }));
                    builder = builder.add_source(source);
                }
                // The rest of the text quotes the line, which may hold the key.
                Err(error) => faults.push(format!(
                    "{} cannot be read: {}",
                    path.display(),
                    error.to_string().lines().next().unwrap_or_default()
                )),
            }
        }
        let merged = builder.add_source(environment).build().unwrap_or_else(|error| {
            faults.push(format!("the settings cannot be read: {error}"));
            Config::default()
        });
        Self { merged, faults }
    }

    /// Everything the worker needs.
    pub fn worker(mut self) -> Result<Settings, Faults> {
        let api_key = self.text("elevenlabs_api_key");
        if api_key.is_empty() {
            self.fault("ELEVENLABS_API_KEY is missing; create a key in the ElevenLabs dashboard and set ELEVENLABS_API_KEY=sk_…");
        } else if !api_key.bytes().all(|b| b.is_ascii_graphic()) {
            self.fault("ELEVENLABS_API_KEY has a blank or another character that no key has; copy it again, without quotes");
        }
        let settings = Settings {
            host: self.host(),
            port: self.port(),
            elevenlabs_api_key: api_key.into(),
            elevenlabs_base_url: self
                .parse(
                    "elevenlabs_base_url",
                    "an http or https URL without user, query or fragment, and without ElevenLabs' own \
                     path (/v1…), which the worker adds",
                    "https://api.elevenlabs.io",
                    http_url,
                )
                .unwrap_or_else(unused_url),
            elevenlabs_connect_timeout: self.duration("elevenlabs_connect_timeout", "5s"),
            elevenlabs_timeout: self.duration("elevenlabs_timeout", "60s"),
            broker: self.broker_settings(),
            ledger: self.ledger_settings(),
            retry_horizon: self.duration("retry_horizon", "15m"),
            settling_window: self.duration("settling_window", "60s"),
            shutdown_grace: self.duration("shutdown_grace", "30s"),
            log: self.log_settings(),
        };
        if settings.elevenlabs_connect_timeout >= settings.elevenlabs_timeout {
            self.fault(
                "ELEVENLABS_CONNECT_TIMEOUT is not shorter than ELEVENLABS_TIMEOUT, so a failed \
                 connection could not be told from a lost answer; set, for example, 5s and 60s",
            );
        }
        if settings.settling_window * 2 + settings.elevenlabs_timeout * 4 > LONGEST_IN_HAND {
            self.fault(
                "2 x SETTLING_WINDOW + 4 x ELEVENLABS_TIMEOUT, the longest that a submit can be in \
                 hand, is longer than 27m, and the broker takes a command back after 30; shorten \
                 one, for example SETTLING_WINDOW=60s",
            );
        }
        self.end(settings)
    }

    /// What a request, or anything else that concerns the broker alone, needs.
    pub fn request(mut self) -> Result<(BrokerSettings, LogSettings), Faults> {
        let settings = (self.broker_settings(), self.log_settings());
        self.end(settings)
    }

    /// Where the health endpoint of a worker on this machine answers.
    pub fn health_address(mut self) -> Result<SocketAddr, Faults> {
        let (mut host, port) = (self.host(), self.port());
        if host.is_unspecified() {
            host = Ipv4Addr::LOCALHOST.into();
        }
        if port == 0 {
            self.fault("PORT is 0, so the worker took a free one that nobody else knows; set PORT");
        }
        self.end(SocketAddr::new(host, port))
    }

    fn host(&mut self) -> IpAddr {
        let host = self.parse("host", "an IP address", "0.0.0.0", |text| text.parse().ok());
        host.unwrap_or(Ipv4Addr::UNSPECIFIED.into())
    }

    fn port(&mut self) -> u16 {
        let port = self.parse("port", "a port from 0 to 65535", "3099", |text| text.parse().ok());
        port.unwrap_or_default()
    }

    fn ledger_settings(&mut self) -> LedgerSettings {
        let what = "sqlite:PATH, or postgres://user:password@host:5432/database for a pool";
        let place = self.parse("ledger_url", what, "sqlite:call-manager.db", ledger_place);
        let retention = self.parse("ledger_retention", RETENTION, "720h", |text| {
            read_duration(text).filter(|retention| *retention >= SHORTEST_RETENTION)
        });
        LedgerSettings {
            place: place.unwrap_or(LedgerPlace::Memory),
            retention: retention.unwrap_or(SHORTEST_RETENTION),
        }
    }

    fn log_settings(&mut self) -> LogSettings {
        let filter = self.parse("log_level", "a log level or tracing directives", "info", |text| {
            tracing_subscriber::EnvFilter::try_new(text).ok().map(|_| text.to_owned())
        });
        let format = self.parse("log_format", "text or json", "text", |text| match text {
            "text" => Some(LogFormat::Text),
            "json" => Some(LogFormat::Json),
            _ => None,
        });
        LogSettings {
            filter: filter.unwrap_or_default(),
            format: format.unwrap_or(LogFormat::Text),
        }
    }

    fn duration(&mut self, key: &str, example: &str) -> Duration {
        let parsed = self.parse(key, "a duration from 1ms to 24h with its unit", example, |text| {
            let duration = read_duration(text)?;
            let sensible = Duration::from_millis(1)..=Duration::from_secs(24 * 60 * 60);
            sensible.contains(&duration).then_some(duration)
        });
        parsed.unwrap_or(Duration::from_millis(1))
    }

    fn parse<T>(
        &mut self,
        key: &str,
        what: &str,
        example: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let text = self.text(key);
        let parsed = parse(text.trim());
        if parsed.is_none() {
            let variable = key.to_uppercase();
            // A URL with a user in it has a password in it, and so have other ways to name a database.
            let secret = text.contains('@') || key == "ledger_url";
            let shown = if secret { "…" } else { &text };
            self.fault(&format!(
                "{variable} is {shown:?}, not {what}; example: {variable}={example}"
            ));
        }
        parsed
    }

    fn text(&mut self, key: &str) -> String {
        self.merged.get_string(key).unwrap_or_else(|error| {
            self.fault(&format!("{} cannot be read: {error}", key.to_uppercase()));
            String::new()
        })
    }

    fn fault(&mut self, fault: &str) {
        self.faults.push(fault.to_owned());
    }

    fn end<T>(self, settings: T) -> Result<T, Faults> {
        if self.faults.is_empty() { Ok(settings) } else { Err(Faults(self.faults)) }
    }
}

/// A duration with its unit, such as `500ms`, `30s` or `15m`; never negative.
pub fn read_duration(text: &str) -> Option<Duration> {
    Duration::try_from(text.parse::<SignedDuration>().ok()?).ok()
}

/// The settings there are: those that have a default.
fn names() -> Vec<String> {
    let defaults = File::from_str(DEFAULTS, FileFormat::Toml).collect().unwrap_or_default();
    defaults.keys().cloned().collect()
}

fn read_dotenv(
    names: &[String],
    environment: &mut HashMap<String, String>,
    faults: &mut Vec<String>,
) {
    let path = Path::new(".env");
    if !path.exists() {
        return;
    }
    match dotenvy::from_path_iter(path) {
        Ok(lines) => {
            for line in lines {
                match line {
                    Ok((name, value)) if names.contains(&name.to_lowercase()) => {
                        environment.insert(name.to_uppercase(), value);
                    }
                    // Shared with other programs: their variables are none of our business.
                    Ok(_) => {}
                    // Without dotenvy's text, which quotes the line and so perhaps a key.
                    Err(_) => faults.push(
                        ".env has a line that is no NAME=value; put values with blanks or $ in single quotes".to_owned(),
                    ),
                }
            }
        }
        Err(error) => faults.push(format!(".env cannot be read: {error}")),
    }
}

fn http_url(text: &str) -> Option<Url> {
    let url: Url = text.parse().ok()?;
    let plain = url.username().is_empty() && url.password().is_none();
    let bare = url.query().is_none() && url.fragment().is_none();
    let mut path = url.path_segments()?;
    let is_api_path = path.any(|part| matches!(part, "v1" | "convai" | "batch-calling"));
    (matches!(url.scheme(), "http" | "https") && plain && bare && !is_api_path).then_some(url)
}

fn ledger_place(text: &str) -> Option<LedgerPlace> {
    if let Some(path) = text.strip_prefix("sqlite:") {
        // Written like a URL, an absolute path has three slashes.
        let path = path.strip_prefix("//").unwrap_or(path);
        // SQLite's name for a database that is forgotten.
        let lasts = !path.is_empty() && path != ":memory:";
        return lasts.then(|| LedgerPlace::Sqlite(path.into()));
    }
    if text.starts_with("postgres://") || text.starts_with("postgresql://") {
        let url = text.parse::<Url>().ok();
        let host = url.as_ref().and_then(Url::host_str).unwrap_or("…");
        let database = url.as_ref().map_or("/…", Url::path);
        let shown = format!("postgres://{host}{database}");
        return Some(LedgerPlace::Postgres { url: text.to_owned().into(), shown });
    }
    (text == "memory:").then_some(LedgerPlace::Memory)
}

#[expect(clippy::expect_used, reason = "a constant that a test reads")]
fn unused_url() -> Url {
    "http://unused".parse().expect("a constant URL")
}

#[cfg(test)]
mod tests;
