//! Typed settings; the only reader of the environment. All faults are reported at once.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use config::{Config, Environment, File, FileFormat, Source};
use jiff::SignedDuration;
use secrecy::{ExposeSecret as _, SecretString};
use url::Url;

use crate::telemetry::LogFormat;

const DEFAULTS: &str = include_str!("config.default.toml");

/// Longer, and the broker's 30 minute ack time-out would take commands back while they are retried.
const LONGEST_HORIZON: Duration = Duration::from_secs(20 * 60);

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
    /// How long a command is retried.
    pub retry_horizon: Duration,
    /// How long a stop may take.
    pub shutdown_grace: Duration,
    /// How to log.
    pub log: LogSettings,
}

/// What every command line that talks to the broker needs.
#[derive(Debug)]
pub struct BrokerSettings {
    /// Has the password in it.
    pub amqp_url: SecretString,
    /// The same without the password.
    pub shown_url: String,
    /// The first word of every exchange and queue name.
    pub amqp_prefix: String,
    /// Commands in hand per queue, 1 to 2000.
    pub prefetch: u16,
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
        read_dotenv(&mut environment, &mut faults);
        for name in names() {
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
        Self::merge(file, &environment, faults)
    }

    fn merge(
        file: Option<&Path>,
        environment: &HashMap<String, String>,
        mut faults: Vec<String>,
    ) -> Self {
        let defaults = || File::from_str(DEFAULTS, FileFormat::Toml);
        let environment =
            || Environment::default().ignore_empty(true).source(Some(environment.clone()));
        let mut builder = Config::builder().add_source(defaults());
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
        let merged = builder.add_source(environment()).build().unwrap_or_else(|error| {
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
                    "an http or https URL without user, query or fragment",
                    "https://api.elevenlabs.io",
                    http_url,
                )
                .unwrap_or_else(unused_url),
            elevenlabs_connect_timeout: self.duration("elevenlabs_connect_timeout", "5s"),
            elevenlabs_timeout: self.duration("elevenlabs_timeout", "60s"),
            broker: self.broker_settings(),
            retry_horizon: self.duration("retry_horizon", "15m"),
            shutdown_grace: self.duration("shutdown_grace", "30s"),
            log: self.log_settings(),
        };
        if settings.elevenlabs_connect_timeout >= settings.elevenlabs_timeout {
            self.fault(
                "ELEVENLABS_CONNECT_TIMEOUT is not shorter than ELEVENLABS_TIMEOUT, so a failed \
                 connection could not be told from a lost answer; set, for example, 5s and 60s",
            );
        }
        if settings.retry_horizon > LONGEST_HORIZON {
            self.fault("RETRY_HORIZON is longer than 20m, and the broker takes a command back after 30; set at most RETRY_HORIZON=20m");
        }
        self.end(settings)
    }

    /// What a request needs.
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

    fn broker_settings(&mut self) -> BrokerSettings {
        let amqp_url = SecretString::from(self.text("amqp_url"));
        let shown_url = match shown_amqp_url(amqp_url.expose_secret()) {
            Ok(shown) => shown,
            Err(reason) => {
                // Without the value: it has the password in it.
                self.fault(&format!(
                    "AMQP_URL {reason}; example: AMQP_URL=amqp://user:password@127.0.0.1:5672/%2f"
                ));
                String::new()
            }
        };
        let amqp_prefix = self.parse(
            "amqp_prefix",
            "1 to 100 letters, digits, _, - or .",
            "call-manager",
            |text| {
                let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.');
                let good = (1..=100).contains(&text.len()) && text.bytes().all(allowed);
                // The broker keeps names that begin with amq. for itself.
                (good && !text.starts_with("amq.")).then(|| text.to_owned())
            },
        );
        let prefetch = self.parse("prefetch", "a number from 1 to 2000", "64", |text| {
            text.parse().ok().filter(|n| (1..=2000).contains(n))
        });
        BrokerSettings {
            amqp_url,
            shown_url,
            amqp_prefix: amqp_prefix.unwrap_or_default(),
            prefetch: prefetch.unwrap_or(1),
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
            let duration = Duration::try_from(text.parse::<SignedDuration>().ok()?).ok()?;
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
            // A URL with a user in it has a password in it.
            let shown = if text.contains('@') { "…" } else { &text };
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

/// The settings there are: those that have a default.
fn names() -> Vec<String> {
    let defaults = File::from_str(DEFAULTS, FileFormat::Toml).collect().unwrap_or_default();
    defaults.keys().cloned().collect()
}

fn read_dotenv(environment: &mut HashMap<String, String>, faults: &mut Vec<String>) {
    let path = Path::new(".env");
    if !path.exists() {
        return;
    }
    match dotenvy::from_path_iter(path) {
        Ok(lines) => {
            for line in lines {
                match line {
                    Ok((name, value)) if names().contains(&name.to_lowercase()) => {
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
    (matches!(url.scheme(), "http" | "https") && plain && bare).then_some(url)
}

/// The URL without its password, or what is wrong with it.
fn shown_amqp_url(text: &str) -> Result<String, &'static str> {
    let mut url: Url = text.parse().map_err(|_| "is not a URL")?;
    if !matches!(url.scheme(), "amqp" | "amqps") {
        return Err("does not begin with amqp:// or amqps://");
    }
    if url.host().is_none() {
        return Err("names no host");
    }
    // "amqp://u:12#rest@h" reads as a port and a fragment: the rest of a password.
    let no_user = url.username().is_empty() && url.password().is_none();
    if url.fragment().is_some() || (no_user && url.path().contains('@')) {
        return Err("has a # or / in its password; write them %23 and %2f");
    }
    if url.password().is_some() {
        url.set_password(Some("***")).map_err(|()| "cannot have a password")?;
    }
    url.set_query(None);
    Ok(url.to_string())
}

#[expect(clippy::expect_used, reason = "a constant that a test reads")]
fn unused_url() -> Url {
    "http://unused".parse().expect("a constant URL")
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn sources(file: Option<&Path>, environment: &[(&str, &str)]) -> Sources {
        let environment =
            environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Sources::merge(file, &environment, Vec::new())
    }

    const KEY: (&str, &str) = ("ELEVENLABS_API_KEY", "sk_secret");

    #[test]
    fn the_defaults_are_those_of_the_contract() {
        let settings = sources(None, &[KEY]).worker().unwrap();
        assert_eq!(settings.port, 3099);
        assert_eq!(settings.elevenlabs_base_url.as_str(), "https://api.elevenlabs.io/");
        assert_eq!(
            settings.broker.amqp_url.expose_secret(),
            "amqp://guest:guest@127.0.0.1:5672/%2f"
        );
        assert_eq!(settings.broker.prefetch, 64);
        assert_eq!(settings.retry_horizon, Duration::from_secs(900));
        assert_eq!(settings.shutdown_grace, Duration::from_secs(30));
    }

    #[test]
    fn a_file_beats_the_defaults_and_the_environment_beats_the_file() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "prefetch = 7\nport = 4000").unwrap();
        let settings = sources(Some(file.path()), &[KEY, ("PORT", "5000")]).worker().unwrap();
        assert_eq!((settings.broker.prefetch, settings.port), (7, 5000));
    }

    #[test]
    fn all_faults_are_told_at_once_each_with_an_example_and_no_secret() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "prefech = 7").unwrap();
        let faults = sources(
            Some(file.path()),
            &[
                ("ELEVENLABS_API_KEY", "two words-secret"),
                ("PORT", "99999"),
                ("AMQP_URL", "http://u:pass-secret@h/"),
                ("PREFETCH", "0"),
                ("RETRY_HORIZON", "2h"),
                ("ELEVENLABS_CONNECT_TIMEOUT", "2m"),
                ("SHUTDOWN_GRACE", "30"),
                ("LOG_FORMAT", "xml"),
                ("ELEVENLABS_BASE_URL", "https://user:pass-secret@x"),
                ("AMQP_PREFIX", "amq.x"),
                ("HOST", "localhost"),
            ],
        )
        .worker()
        .unwrap_err()
        .to_string();
        for part in [
            "\"prefech\" is not a setting",
            "ELEVENLABS_API_KEY has a blank",
            "PORT is \"99999\", not a port from 0 to 65535; example: PORT=3099",
            "AMQP_URL does not begin with amqp:// or amqps://; example: AMQP_URL=amqp://",
            "PREFETCH is \"0\", not a number from 1 to 2000; example: PREFETCH=64",
            "RETRY_HORIZON is longer than 20m",
            "ELEVENLABS_CONNECT_TIMEOUT is not shorter",
            "SHUTDOWN_GRACE is \"30\", not a duration from 1ms to 24h with its unit; example: SHUTDOWN_GRACE=30s",
            "LOG_FORMAT is \"xml\", not text or json",
            "ELEVENLABS_BASE_URL is \"…\", not an http or https URL without user",
            "AMQP_PREFIX is \"amq.x\"",
            "HOST is \"localhost\"",
        ] {
            assert!(faults.contains(part), "{part} is missing in:\n{faults}");
        }
        assert_eq!(faults.lines().count(), 12, "{faults}");
        assert!(!faults.contains("secret"), "{faults}");
    }

    #[test]
    fn a_missing_key_is_said_with_what_to_do() {
        let faults = sources(None, &[]).worker().unwrap_err().to_string();
        assert!(faults.starts_with("ELEVENLABS_API_KEY is missing; create a key"), "{faults}");
        assert!(sources(None, &[]).request().is_ok(), "a request needs no key");
    }

    #[test]
    fn secrets_are_redacted_wherever_settings_are_printed() {
        let broker = ("AMQP_URL", "amqp://user:pass-secret@broker:5672/%2f");
        let settings = sources(None, &[KEY, broker]).worker().unwrap();
        let printed = format!("{settings:?}");
        assert!(!printed.contains("secret"), "{printed}");
        assert_eq!(settings.broker.shown_url, "amqp://user:***@broker:5672/%2f");
    }

    #[test]
    fn a_broken_file_is_told_by_its_line_and_not_by_what_stands_there() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "port = 4000\nelevenlabs_api_key = sk_secret").unwrap();
        let faults = sources(Some(file.path()), &[KEY]).worker().unwrap_err().to_string();
        assert!(faults.contains("line 2, column 22"), "{faults}");
        assert!(!faults.contains("secret") && faults.lines().count() == 1, "{faults}");
    }

    #[test]
    fn a_password_that_breaks_the_url_is_not_taken_for_a_part_of_it() {
        for url in ["amqp://u:12#secret@h", "amqp://u:12/secret@h"] {
            let faults = sources(None, &[KEY, ("AMQP_URL", url)]).worker().unwrap_err().to_string();
            assert!(faults.starts_with("AMQP_URL has a # or / in its password"), "{faults}");
            assert!(!faults.contains("secret"), "{faults}");
        }
    }

    #[test]
    fn a_virtual_host_may_have_an_at_sign() {
        let url = ("AMQP_URL", "amqp://u:p@h/tenant@prod");
        let settings = sources(None, &[KEY, url]).worker().unwrap();
        assert_eq!(settings.broker.shown_url, "amqp://u:***@h/tenant@prod");
    }

    #[test]
    fn an_empty_variable_counts_as_unset() {
        assert_eq!(sources(None, &[KEY, ("PORT", "")]).worker().unwrap().port, 3099);
        assert!(unused_url().has_host());
    }
}
