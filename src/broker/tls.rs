//! Certificates for the connection, and what a failed handshake means to a person.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lapin::ErrorKind;
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use rustls::{AlertDescription, CertificateError};
use tokio::io::AsyncReadExt as _;

/// Far more than a bundle of every public authority has.
const LARGEST_PEM_FILE: u64 = 4 * 1024 * 1024;

/// PEM files. They are read again for each connection, so that a renewed certificate needs no restart.
#[derive(Clone, Debug, Default)]
pub struct TlsFiles {
    /// Authorities to trust beside the system's.
    pub authorities: Option<PathBuf>,
    /// The client's certificate, and behind it those between it and its authority.
    pub certificate: Option<PathBuf>,
    /// Its key, not encrypted. Certificate and key count only together.
    pub key: Option<PathBuf>,
}

impl TlsFiles {
    pub(super) async fn read(&self) -> io::Result<OwnedTLSConfig> {
        let mut config = OwnedTLSConfig::default();
        if let Some(path) = &self.authorities {
            let text = String::from_utf8(read(path).await?);
            config.cert_chain = Some(text.map_err(|_| named(path, "is not text"))?);
        }
        if let (Some(certificate), Some(key)) = (&self.certificate, &self.key) {
            let (pem, key) = (read(certificate).await?, read(key).await?);
            // Despite its name it takes PEM, and any key that rustls reads.
            config.identity = Some(OwnedIdentity::PKCS8 { pem, key });
        }
        Ok(config)
    }
}

async fn read(path: &Path) -> io::Result<Vec<u8>> {
    let reading = async {
        let mut content = Vec::new();
        let file = tokio::fs::File::open(path).await?;
        file.take(LARGEST_PEM_FILE).read_to_end(&mut content).await?;
        Ok(content)
    };
    reading.await.map_err(|error: io::Error| named(path, error))
}

fn named(path: &Path, what: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("{}: {what}", path.display()))
}

/// The end of a connection over TLS before the login was over.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
struct Hung(Arc<io::Error>);

/// Marks an error of connecting over TLS that has no word about TLS in it. With TLS 1.3 a broker
/// looks at the client's certificate when the client already sends, and its alert may be lost.
pub(super) fn while_connecting(error: lapin::Error) -> lapin::Error {
    match error.kind() {
        ErrorKind::IOError(reason)
            if matches!(
                reason.kind(),
                io::ErrorKind::ConnectionReset
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::BrokenPipe
                    | io::ErrorKind::UnexpectedEof
            ) && reason.get_ref().is_none_or(|inner| !inner.is::<rustls::Error>()) =>
        {
            io::Error::other(Hung(Arc::clone(reason))).into()
        }
        _ => error,
    }
}

const CLIENT_CERTIFICATE: &str =
    "it demands a client certificate, or does not accept the one it got";
const GIVE_ONE: &str = "set AMQP_CERT_FILE and AMQP_KEY_FILE to one that is valid and of an \
    authority the broker trusts";

/// What is wrong and what to do, where the error is one of TLS.
pub(super) fn advice(error: &lapin::Error) -> Option<String> {
    let ErrorKind::IOError(error) = error.kind() else { return None };
    let error = error.get_ref()?;
    if let Some(Hung(reason)) = error.downcast_ref() {
        return Some(format!(
            "it closed the connection before the login was over ({reason}), as it does where \
             {CLIENT_CERTIFICATE}; {GIVE_ONE}, and look into the broker's log"
        ));
    }
    let error = error.downcast_ref()?;
    Some(match error {
        rustls::Error::InvalidCertificate(reason) => of_certificate(reason),
        rustls::Error::AlertReceived(
            AlertDescription::CertificateRequired
            | AlertDescription::HandshakeFailure
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied,
        ) => format!("{CLIENT_CERTIFICATE} ({error}); {GIVE_ONE}"),
        rustls::Error::InvalidMessage(_) => format!(
            "what answers there does not speak TLS ({error}); amqps:// needs the broker's TLS \
             port, usually 5671"
        ),
        rustls::Error::InconsistentKeys(_) => format!(
            "the key in AMQP_KEY_FILE is not that of the certificate in AMQP_CERT_FILE ({error}); \
             put two there that were made together"
        ),
        _ => format!("{error}; compare the TLS settings of the broker and its log"),
    })
}

fn of_certificate(reason: &CertificateError) -> String {
    match reason {
        // The second where the authority was made anew under its old name.
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "its certificate is of an authority that is not trusted here; set AMQP_CA_FILE to a \
             PEM file with the certificate of that authority"
                .to_owned()
        }
        CertificateError::NotValidForName => {
            "its certificate is for another host name; write the name it is for in AMQP_URL"
                .to_owned()
        }
        CertificateError::NotValidForNameContext { expected, presented } => format!(
            "its certificate is for {}, not for {}; write a name it is for in AMQP_URL, or give \
             the broker a certificate for this one",
            if presented.is_empty() { "no host at all".to_owned() } else { presented.join(", ") },
            expected.to_str(),
        ),
        reason => format!(
            "its certificate cannot be used: {reason}; renew it, or check the clock of this machine"
        ),
    }
}
