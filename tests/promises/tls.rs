//! TLS to the broker and to PostgreSQL: a private authority, a client certificate, and what a failed handshake says.

use std::net::TcpListener;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair,
};
use tempfile::TempDir;

use crate::process::Process;
use crate::start::{finished, program};
use crate::support::node::Node;
use crate::support::postgres::{Server, client};
use crate::support::{World, amqp_url, until};
use crate::topology::refusal;

/// An authority with a directory that it writes PEM files to.
struct Authority {
    folder: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name = named("Authority of a test");
        let key = KeyPair::generate().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(folder.path().join("ca.pem"), certificate.pem()).unwrap();
        Self { folder, issuer: Issuer::new(params, key) }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn authority(&self) -> PathBuf {
        self.file("ca.pem")
    }

    /// A certificate and its key, for a host or a user.
    fn issue(&self, name: &str, host: Option<&str>) -> (PathBuf, PathBuf) {
        let hosts = host.map(str::to_owned).into_iter().collect::<Vec<_>>();
        let mut params = CertificateParams::new(hosts).unwrap();
        params.distinguished_name = named(name);
        params.extended_key_usages = vec![if host.is_some() {
            ExtendedKeyUsagePurpose::ServerAuth
        } else {
            ExtendedKeyUsagePurpose::ClientAuth
        }];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let files = (self.file(&format!("{name}.pem")), self.file(&format!("{name}.key")));
        std::fs::write(&files.0, certificate.pem()).unwrap();
        std::fs::write(&files.1, key.serialize_pem()).unwrap();
        files
    }
}

fn named(name: &str) -> DistinguishedName {
    let mut all = DistinguishedName::new();
    all.push(DnType::CommonName, name);
    all
}

/// A node with a TLS listener that is certified for `localhost` and demands a client certificate.
struct Place {
    node: Node,
    port: u16,
    authority: Authority,
}

impl Place {
    async fn new() -> Self {
        let authority = Authority::new();
        let (certificate, key) = authority.issue("broker", Some("localhost"));
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let mut node = Node::prepared().await;
        node.configure(&format!(
            "listeners.ssl.local = 127.0.0.1:{port}\n\
             ssl_options.cacertfile = {}\n\
             ssl_options.certfile = {}\n\
             ssl_options.keyfile = {}\n\
             ssl_options.verify = verify_peer\n\
             ssl_options.fail_if_no_peer_cert = true\n\
             auth_mechanisms.1 = PLAIN\n\
             auth_mechanisms.2 = EXTERNAL\n\
             ssl_cert_login_from = common_name",
            authority.authority().display(),
            certificate.display(),
            key.display(),
        ));
        enable_plugin(&node, "rabbitmq_auth_mechanism_ssl");
        node.start_again().await;
        // It opens this listener after the other.
        until("it listens for TLS", async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await;
        Self { node, port, authority }
    }

    fn url(&self, user: &str, host: &str, query: &str) -> String {
        format!("amqps://{user}{host}:{}/%2f{query}", self.port)
    }

    /// The complaint of a request that does not get through.
    async fn complaint(&self, url: &str, more: &[(&str, &Path)]) -> String {
        let mut command = program(&[("AMQP_URL", url), ("LOG_LEVEL", "off")]);
        command.envs(more.iter().copied());
        command.args(["request", "get", "--batch-id", "b"]);
        let (code, out, err) = finished(command).await;
        assert_eq!((code, out.as_str(), err.lines().count()), (2, "", 1), "{err}");
        err
    }
}

/// A plugin of the server's package; a private node has none at hand. The server may see other files
/// than this process, so that the place of the plugin is only told, not looked at.
fn enable_plugin(node: &Node, plugin: &str) {
    let own = node.home().join("plugins");
    let server = std::fs::read_dir(&own).unwrap().map(|entry| entry.unwrap()).find_map(|entry| {
        let version = entry.file_name().to_str()?.strip_prefix("rabbit-")?.to_owned();
        Some((std::fs::read_link(entry.path()).ok()?, version))
    });
    let (server, version) = server.expect("a node has the server itself among its plugins");
    let packaged = server.with_file_name(format!("{plugin}-{version}"));
    std::os::unix::fs::symlink(packaged, own.join(format!("{plugin}-{version}"))).unwrap();
    std::fs::write(node.home().join("enabled_plugins"), format!("[{plugin}].")).unwrap();
}

#[tokio::test]
async fn a_private_authority_and_a_client_certificate_are_enough_for_everything() {
    let place = Place::new().await;
    let mut world = World::at(place.node.amqp_url()).await;
    let prefix = world.settings().broker.amqp_prefix;
    let authority = place.authority.authority();
    let (certificate, key) = place.authority.issue("guest", None);
    let files = [
        ("AMQP_CA_FILE", authority.to_str().unwrap()),
        ("AMQP_CERT_FILE", certificate.to_str().unwrap()),
        ("AMQP_KEY_FILE", key.to_str().unwrap()),
    ];
    // With a password, and then with the certificate in its place.
    for (user, query) in [("guest:guest@", ""), ("", "?auth_mechanism=external")] {
        let url = place.url(user, "localhost", query);
        let mut environment = files.to_vec();
        environment.push(("AMQP_URL", &url));
        let worker = Process::consuming(&world, &world.ledger_url(), &environment).await;
        let id = world.submitted().await;

        environment.push(("AMQP_PREFIX", &prefix));
        let mut request = program(&environment);
        request.args(["request", "get", "--batch-id", &id]);
        let (code, out, err) = finished(request).await;
        assert_eq!((code, err.as_str()), (0, ""));
        assert!(out.contains(&id), "{out}");
        assert_eq!(world.next_result().await.code(), "200");
        worker.stop().await;
    }
    world.finish().await;
}

#[tokio::test]
async fn a_failed_handshake_says_what_to_do() {
    let place = Place::new().await;
    let authority = place.authority.authority();
    let (certificate, key) = place.authority.issue("guest", None);
    let ca = ("AMQP_CA_FILE", authority.as_path());
    let identity = [("AMQP_CERT_FILE", certificate.as_path()), ("AMQP_KEY_FILE", key.as_path())];
    let url = place.url("guest:guest@", "localhost", "");

    let said = place.complaint(&url, &identity).await;
    let begins = format!("there is no TLS with the broker at localhost:{}: ", place.port);
    assert!(said.contains(&begins), "{said}");
    assert!(said.contains("an authority that is not trusted here; set AMQP_CA_FILE to"), "{said}");

    let elsewhere = place.url("guest:guest@", "127.0.0.1", "");
    let said = place.complaint(&elsewhere, &[ca, identity[0], identity[1]]).await;
    assert!(said.contains("its certificate is for"), "{said}");
    assert!(said.contains("localhost") && said.contains("not for 127.0.0.1;"), "{said}");

    let said = place.complaint(&url, &[ca]).await;
    assert!(said.contains("it demands a client certificate"), "{said}");
    assert!(said.contains("set AMQP_CERT_FILE and AMQP_KEY_FILE"), "{said}");

    let other = Authority::new();
    let (certificate, key) = other.issue("guest", None);
    let foreign = [("AMQP_CERT_FILE", certificate.as_path()), ("AMQP_KEY_FILE", key.as_path())];
    let said = place.complaint(&url, &[ca, foreign[0], foreign[1]]).await;
    assert!(said.contains("does not accept the one it got"), "{said}");
    assert!(said.contains("set AMQP_CERT_FILE and AMQP_KEY_FILE"), "{said}");

    let plain = place.node.amqp_url().replace("amqp://", "amqps://");
    let said = place.complaint(&plain, &[ca]).await;
    assert!(said.contains("does not speak TLS"), "{said}");
    assert!(said.contains("usually 5671"), "{said}");

    // A worker says the same, and goes on trying: what was wrong may be put right at either end.
    let world = World::at(place.node.amqp_url()).await;
    let renewed = place.authority.file("renewed.pem");
    std::fs::copy(other.authority(), &renewed).unwrap();
    let worker = Process::start(
        &world,
        "memory:",
        &[
            ("AMQP_URL", &url),
            ("AMQP_CA_FILE", renewed.to_str().unwrap()),
            ("AMQP_CERT_FILE", identity[0].1.to_str().unwrap()),
            ("AMQP_KEY_FILE", identity[1].1.to_str().unwrap()),
        ],
    );
    worker.until_logged("no connection to the broker; trying again").await;
    assert!(worker.log().contains("set AMQP_CA_FILE to"), "{}", worker.log());
    std::fs::copy(&authority, &renewed).unwrap();
    worker.until_logged("consuming").await;
    worker.stop().await;
}

#[tokio::test]
async fn a_ledger_with_sslmode_require_is_reached_over_tls_alone() {
    let mut server = Server::start().await;
    let mut world = World::without_worker().await;
    let sign = if server.url().contains('?') { '&' } else { '?' };
    let ledger = format!("{}{sign}sslmode=require", server.url());
    let (amqp, vendor) = (amqp_url(), world.sandbox.base_url());
    let settings = [
        ("AMQP_URL", amqp.as_str()),
        ("AMQP_PREFIX", "test-nothing-of-this-name"),
        ("ELEVENLABS_BASE_URL", &vendor),
        ("LEDGER_URL", &ledger),
    ];
    let said = refusal(&settings).await;
    assert!(said.contains("server does not support TLS"), "{said}");

    let authority = Authority::new();
    let (certificate, key) = authority.issue("postgres", Some("127.0.0.1"));
    server.encrypt(&certificate, &key).await;
    // A certificate is renewed at either end: that may pass.
    let stranger = Process::start(&world, &ledger, &[]);
    stranger.until_logged("no ledger; trying again").await;
    assert!(stranger.log().contains("UnknownIssuer"), "{}", stranger.log());
    stranger.stop().await;

    let ca = authority.authority();
    let trusting = [("SSL_CERT_FILE", ca.to_str().unwrap())];
    let worker = Process::consuming(&world, &ledger, &trusting).await;
    assert!(!world.submitted().await.is_empty());
    let count = "SELECT count(*) FILTER (WHERE ssl), count(*) FROM pg_stat_ssl \
                 JOIN pg_stat_activity USING (pid) WHERE application_name = 'call-manager'";
    let found = client(server.url()).await.query_one(count, &[]).await.unwrap();
    let (encrypted, all) = (found.get::<_, i64>(0), found.get::<_, i64>(1));
    assert!(all > 0 && encrypted == all, "{encrypted} of {all} are encrypted");
    worker.stop().await;
    world.finish().await;
    server.end().await;
}
