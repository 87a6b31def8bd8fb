//! The settings of the connection to the broker.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use secrecy::{ExposeSecret as _, SecretString};
use url::Url;

use super::Sources;

/// Far more than a bundle of every public authority has.
const LARGEST_PEM_FILE: u64 = 4 * 1024 * 1024;

/// What every command line that talks to the broker needs.
#[derive(Debug)]
pub struct BrokerSettings {
    /// Has the password in it.
    pub amqp_url: SecretString,
    /// The same without the password.
    pub shown_url: String,
    /// The first word of every exchange and queue name.
    pub amqp_prefix: String,
    /// Whether the worker declares its exchanges and queues, or only checks that they are there.
    pub declares_topology: bool,
    /// Authorities to trust beside the system's: a PEM file.
    pub ca_file: Option<PathBuf>,
    /// A PEM file with the client's certificate and those between it and its authority.
    pub cert_file: Option<PathBuf>,
    /// A PEM file with the key of that certificate; given together with it, or neither is.
    pub key_file: Option<PathBuf>,
    /// Commands in hand per queue, 1 to 2000.
    pub prefetch: u16,
}

impl Sources {
    pub(super) fn broker_settings(&mut self) -> BrokerSettings {
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
        let declares = self.parse("topology", "declare or check", "declare", |text| match text {
            "declare" => Some(true),
            "check" => Some(false),
            _ => None,
        });
        let prefetch = self.parse("prefetch", "a number from 1 to 2000", "64", |text| {
            text.parse().ok().filter(|n| (1..=2000).contains(n))
        });
        if shown_url.starts_with("amqp://") {
            for variable in ["AMQP_CA_FILE", "AMQP_CERT_FILE", "AMQP_KEY_FILE"] {
                if self.path(variable).is_some() {
                    self.fault(&format!(
                        "{variable} is for TLS, and AMQP_URL begins with amqp://, so nothing would \
                         be encrypted; begin it with amqps:// (the broker's TLS port, usually \
                         5671), or unset {variable}"
                    ));
                }
            }
        }
        let (cert_file, key_file) = self.identity();
        BrokerSettings {
            amqp_url,
            shown_url,
            amqp_prefix: amqp_prefix.unwrap_or_default(),
            declares_topology: declares.unwrap_or_default(),
            ca_file: self.authorities(),
            cert_file,
            key_file,
            prefetch: prefetch.unwrap_or(1),
        }
    }

    fn path(&mut self, variable: &str) -> Option<PathBuf> {
        let text = self.text(&variable.to_lowercase());
        (!text.is_empty()).then(|| text.into())
    }

    fn authorities(&mut self) -> Option<PathBuf> {
        let path = self.path("AMQP_CA_FILE")?;
        for certificate in self.certificates("AMQP_CA_FILE", &path) {
            if let Err(error) = RootCertStore::empty().add(certificate) {
                self.fault(&format!(
                    "AMQP_CA_FILE: {} has a certificate that cannot be an authority's: {error}; \
                     export it again, as an X.509 certificate of version 3 in PEM form",
                    path.display()
                ));
            }
        }
        Some(path)
    }

    fn identity(&mut self) -> (Option<PathBuf>, Option<PathBuf>) {
        let (cert_file, key_file) = (self.path("AMQP_CERT_FILE"), self.path("AMQP_KEY_FILE"));
        let certificates = match &cert_file {
            Some(path) => self.certificates("AMQP_CERT_FILE", path),
            None => Vec::new(),
        };
        let key = key_file.as_deref().and_then(|path| self.key(path));
        match (&cert_file, &key_file) {
            (Some(cert_file), Some(key_file)) => {
                if let (false, Some(key)) = (certificates.is_empty(), key)
                    && let Err(error) =
                        CertifiedKey::from_der(certificates, key, &aws_lc_rs::default_provider())
                {
                    self.fault(&format!(
                        "AMQP_KEY_FILE: {} is not the key of the first certificate in \
                         AMQP_CERT_FILE, {}: {error}; give the two that were made together",
                        key_file.display(),
                        cert_file.display()
                    ));
                }
            }
            (Some(_), None) => self.fault(
                "AMQP_CERT_FILE is set without AMQP_KEY_FILE; a client certificate needs both",
            ),
            (None, Some(_)) => self.fault(
                "AMQP_KEY_FILE is set without AMQP_CERT_FILE; a client certificate needs both",
            ),
            (None, None) => {}
        }
        (cert_file, key_file)
    }

    /// At least one, or there is a fault.
    fn certificates(&mut self, variable: &str, path: &Path) -> Vec<CertificateDer<'static>> {
        let Some(text) = self.content(variable, path) else { return Vec::new() };
        let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
        let certificates = read.unwrap_or_default();
        if certificates.is_empty() {
            self.fault(&format!(
                "{variable}: {} holds no certificate in PEM form; it has to have \
                 -----BEGIN CERTIFICATE----- and what follows",
                path.display()
            ));
        }
        certificates
    }

    fn key(&mut self, path: &Path) -> Option<PrivateKeyDer<'static>> {
        let text = self.content("AMQP_KEY_FILE", path)?;
        let key = PrivateKeyDer::from_pem_slice(&text).ok();
        if key.is_none() {
            // Without the parser's words, which may quote the file.
            self.fault(&format!(
                "AMQP_KEY_FILE: {} holds no private key in PEM form that is not encrypted; make \
                 one with: openssl pkey -in KEY -out {}",
                path.display(),
                path.display()
            ));
        }
        key
    }

    fn content(&mut self, variable: &str, path: &Path) -> Option<Vec<u8>> {
        let content = read_pem(path);
        if let Err(error) = &content {
            self.fault(&format!(
                "{variable}: {} cannot be read: {error}; check the path and who may read it",
                path.display()
            ));
        }
        content.ok()
    }
}

fn read_pem(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    File::open(path)?.take(LARGEST_PEM_FILE).read_to_end(&mut content)?;
    Ok(content)
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
