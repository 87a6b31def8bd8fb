//! Where a setting comes from, and how a wrong one is told.

use std::io::Write as _;

use super::*;

fn sources(file: Option<&Path>, environment: &[(&str, &str)]) -> Sources {
    let environment = environment.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Sources::merge(file, environment, Vec::new())
}

const KEY: (&str, &str) = ("ELEVENLABS_API_KEY", "sk_secret");

#[test]
fn the_defaults_are_those_of_the_contract() {
    let settings = sources(None, &[KEY]).worker().unwrap();
    assert_eq!(settings.port, 3099);
    assert_eq!(settings.elevenlabs_base_url.as_str(), "https://api.elevenlabs.io/");
    assert_eq!(settings.broker.amqp_url.expose_secret(), "amqp://guest:guest@127.0.0.1:5672/%2f");
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
            ("LEDGER_URL", "host=h password=pass-secret"),
            ("LEDGER_RETENTION", "1h"),
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
        "LEDGER_URL is \"…\", not sqlite:PATH, or postgres://user:password@host:5432/database",
        "LEDGER_RETENTION is \"1h\", not a duration of at least 24h with its unit; example: LEDGER_RETENTION=720h",
    ] {
        assert!(faults.contains(part), "{part} is missing in:\n{faults}");
    }
    assert_eq!(faults.lines().count(), 14, "{faults}");
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
    for (url, shown) in [
        ("postgres://user:pass-secret@db:5433/calls", "postgres://db/calls"),
        ("postgres://db/calls?user=u&password=a@secret", "postgres://db/calls"),
        ("sqlite:///var/lib/ledger.db", "sqlite:/var/lib/ledger.db"),
        ("sqlite:ledger.db", "sqlite:ledger.db"),
        ("memory:", "memory:"),
    ] {
        let settings = sources(None, &[KEY, ("LEDGER_URL", url)]).worker().unwrap();
        assert_eq!(settings.ledger.place.to_string(), shown);
        assert!(!format!("{settings:?}").contains("secret"));
    }
}

#[test]
fn a_submit_that_could_outlast_the_brokers_patience_is_refused() {
    let long = [KEY, ("SETTLING_WINDOW", "3m"), ("ELEVENLABS_TIMEOUT", "2m")];
    let faults = sources(None, &long).worker().unwrap_err().to_string();
    assert!(
        faults.contains("RETRY_HORIZON + 2 x SETTLING_WINDOW + 4 x ELEVENLABS_TIMEOUT"),
        "{faults}"
    );
    for forgetful in ["sqlite:", "sqlite::memory:", "mysql://h/d", ""] {
        assert!(super::ledger_place(forgetful).is_none(), "{forgetful}");
    }
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
