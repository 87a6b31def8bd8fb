//! Where a setting comes from, and how a wrong one is told.

use std::io::Write as _;

use secrecy::ExposeSecret as _;

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
            ("RETRY_HORIZON", "25h"),
            ("ELEVENLABS_CONNECT_TIMEOUT", "2m"),
            ("SHUTDOWN_GRACE", "30"),
            ("LOG_FORMAT", "xml"),
            ("ELEVENLABS_BASE_URL", "https://user:pass-secret@x"),
            ("AMQP_PREFIX", "amq.x"),
            ("TOPOLOGY", "checks"),
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
        "RETRY_HORIZON is \"25h\", not a duration from 1ms to 24h with its unit; example: RETRY_HORIZON=15m",
        "ELEVENLABS_CONNECT_TIMEOUT is not shorter",
        "SHUTDOWN_GRACE is \"30\", not a duration from 1ms to 24h with its unit; example: SHUTDOWN_GRACE=30s",
        "LOG_FORMAT is \"xml\", not text or json",
        "ELEVENLABS_BASE_URL is \"…\", not an http or https URL without user",
        "AMQP_PREFIX is \"amq.x\"",
        "TOPOLOGY is \"checks\", not declare or check; example: TOPOLOGY=declare",
        "HOST is \"localhost\"",
        "LEDGER_URL is \"…\", not sqlite:PATH, or postgres://user:password@host:5432/database",
        "LEDGER_RETENTION is \"1h\", not a duration of at least 168h (a week) with its unit; example: LEDGER_RETENTION=720h",
    ] {
        assert!(faults.contains(part), "{part} is missing in:\n{faults}");
    }
    assert_eq!(faults.lines().count(), 15, "{faults}");
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
    let long = [KEY, ("SETTLING_WINDOW", "10m"), ("ELEVENLABS_TIMEOUT", "2m")];
    let faults = sources(None, &long).worker().unwrap_err().to_string();
    assert!(faults.contains("2 x SETTLING_WINDOW + 4 x ELEVENLABS_TIMEOUT"), "{faults}");
    assert!(sources(None, &[KEY, ("RETRY_HORIZON", "24h")]).worker().is_ok(), "it waits elsewhere");
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

/// The faults of these settings beside `amqps://`.
fn tls_faults(more: &[(&str, &Path)]) -> String {
    let mut all = vec![KEY, ("AMQP_URL", "amqps://u:p@h/")];
    all.extend(more.iter().map(|(name, path)| (*name, path.to_str().unwrap())));
    sources(None, &all).worker().unwrap_err().to_string()
}

#[test]
fn a_certificate_that_cannot_be_used_is_told_with_its_variable_and_its_path() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let pair = || rcgen::generate_simple_self_signed(["h".to_owned()]).unwrap();
    let (one, other) = (pair(), pair());
    let certificate = write("one.pem", &one.cert.pem());
    let key = write("one.key", &one.signing_key.serialize_pem());
    let other_key = write("other.key", &other.signing_key.serialize_pem());
    let broken = one.cert.pem().replacen("MII", "AAA", 1);
    let broken = write("broken.pem", &broken);
    let encrypted =
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nc2VjcmV0\n-----END ENCRYPTED PRIVATE KEY-----\n";
    let encrypted = write("encrypted.key", encrypted);
    let away = folder.path().join("away.pem");

    for (settings, fault) in [
        (vec![("AMQP_CA_FILE", &away)], "AMQP_CA_FILE: {} cannot be read: No such file"),
        (vec![("AMQP_CA_FILE", &key)], "AMQP_CA_FILE: {} holds no certificate in PEM form"),
        (vec![("AMQP_CA_FILE", &broken)], "AMQP_CA_FILE: {} has a certificate that cannot be an"),
        (vec![("AMQP_CERT_FILE", &certificate)], "AMQP_CERT_FILE is set without AMQP_KEY_FILE"),
        (vec![("AMQP_KEY_FILE", &key)], "AMQP_KEY_FILE is set without AMQP_CERT_FILE"),
        (
            vec![("AMQP_KEY_FILE", &encrypted), ("AMQP_CERT_FILE", &certificate)],
            "AMQP_KEY_FILE: {} holds no private key in PEM form that is not encrypted",
        ),
        (
            vec![("AMQP_KEY_FILE", &other_key), ("AMQP_CERT_FILE", &certificate)],
            "AMQP_KEY_FILE: {} is not the key of the first certificate in AMQP_CERT_FILE, ",
        ),
    ] {
        let fault = fault.replace("{}", settings[0].1.to_str().unwrap());
        let settings: Vec<_> =
            settings.iter().map(|(name, path)| (*name, path.as_path())).collect();
        let faults = tls_faults(&settings);
        assert!(faults.starts_with(&fault), "{fault} is missing in:\n{faults}");
        assert_eq!(faults.lines().count(), 1, "{faults}");
        assert!(!faults.contains("c2VjcmV0"), "{faults}");
    }

    let certificate = certificate.to_str().unwrap();
    let all = [("AMQP_CA_FILE", certificate), ("AMQP_CERT_FILE", certificate)];
    let mut all = [KEY, all[0], all[1], ("AMQP_KEY_FILE", key.to_str().unwrap())].to_vec();
    let faults = sources(None, &all).worker().unwrap_err().to_string();
    assert_eq!(
        faults.matches("is for TLS, and AMQP_URL begins with amqp://").count(),
        3,
        "{faults}"
    );
    all.push(("AMQP_URL", "amqps://h/"));
    let settings = sources(None, &all).worker().unwrap();
    assert_eq!(settings.broker.ca_file.as_deref(), Some(Path::new(certificate)));
    assert_eq!(settings.broker.key_file.as_deref(), Some(key.as_path()));
}
