//! PostgreSQL for tests: a schema each in the database of this run, or a server of their own to break.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

/// The server of this run.
fn postgres_url() -> String {
    std::env::var("POSTGRES_URL").expect(
        "POSTGRES_URL is not set: run the tests with script/test, which sees to a PostgreSQL",
    )
}

async fn session(url: &str) -> (Client, JoinHandle<()>) {
    let (client, connection) = tokio_postgres::connect(url, NoTls)
        .await
        .expect("a PostgreSQL answers at POSTGRES_URL: run the tests with script/test");
    (client, tokio::spawn(async move { connection.await.unwrap() }))
}

/// A session of the test's own.
pub async fn client(url: &str) -> Client {
    session(url).await.0
}

pub struct Database {
    schema: String,
    client: Client,
    connection: JoinHandle<()>,
}

impl Database {
    pub async fn create() -> Self {
        let (client, connection) = session(&postgres_url()).await;
        let schema = format!("test_{}", Uuid::now_v7().simple());
        client.batch_execute(&format!("CREATE SCHEMA {schema}")).await.unwrap();
        client.batch_execute(&format!("SET search_path = {schema}")).await.unwrap();
        Self { schema, client, connection }
    }

    /// Leads to the schema of this test: whoever connects with it sees no other.
    pub fn url(&self) -> String {
        let url = postgres_url();
        let sign = if url.contains('?') { '&' } else { '?' };
        format!("{url}{sign}options=-c%20search_path%3D{}", self.schema)
    }

    /// Runs statements in the schema.
    pub async fn run(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap();
    }

    /// Waits until a statement of such a connection waits for a lock of another.
    pub async fn until_waiting(&self, application_name: &str) {
        let waiting = "SELECT count(*) FROM pg_stat_activity \
             WHERE application_name = $1 AND wait_event_type = 'Lock'";
        super::until("a statement waits for a lock", async || {
            // In a transaction, it would be told the same again and again.
            self.run("SELECT pg_stat_clear_snapshot()").await;
            let found = self.client.query_one(waiting, &[&application_name]).await.unwrap();
            found.get::<_, i64>(0) > 0
        })
        .await;
    }

    /// Removes the schema, and waits until that is done.
    pub async fn drop(self) {
        self.run(&format!("DROP SCHEMA {} CASCADE", self.schema)).await;
        drop(self.client);
        self.connection.await.unwrap();
    }
}

/// The name that a worker's sessions have.
const WORKER: &str = "application_name = 'call-manager'";

/// A server that no other test uses. It ends with the test, however that ends.
pub struct Server {
    url: String,
    script: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Server {
    /// Installing the package included, where it is missing.
    const START_LIMIT: Duration = Duration::from_secs(120);

    pub async fn start() -> Self {
        let mut script =
            Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/script/private-postgres"))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
        let orders = script.stdin.take().unwrap();
        let answers = BufReader::new(script.stdout.take().unwrap()).lines();
        let mut this = Self { url: String::new(), script, orders, answers };
        this.url = this.answer().await;
        this
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// In order, or by SIGKILL.
    pub async fn stop(&mut self, killed: bool) {
        self.order(if killed { "kill" } else { "stop" }).await;
    }

    /// Again, after a stop: on the same port, with the same data.
    pub async fn start_again(&mut self) {
        self.order("start").await;
    }

    /// Speaks TLS with this certificate and key.
    pub async fn encrypt(&mut self, certificate: &Path, key: &Path) {
        self.stop(false).await;
        self.order(&format!("encrypt {} {}", certificate.display(), key.display())).await;
        self.start_again().await;
    }

    /// Removes the server.
    pub async fn end(mut self) {
        drop(self.orders);
        let ended = timeout(super::LIMIT, self.script.wait()).await.expect("it ends in time");
        assert!(ended.unwrap().success());
    }

    async fn order(&mut self, order: &str) {
        self.orders.write_all(format!("{order}\n").as_bytes()).await.unwrap();
        assert_eq!(self.answer().await, "done", "{order}");
    }

    async fn answer(&mut self) -> String {
        let line = timeout(Self::START_LIMIT, self.answers.next_line()).await;
        let line = line.expect("script/private-postgres answers in time").unwrap();
        line.expect("script/private-postgres says on standard error what is wrong")
    }

    /// From now on, the database lets nobody write, or lets new sessions write again.
    pub async fn read_only(&self, read_only: bool) {
        let admin = client(&self.url).await;
        let value = if read_only { "on" } else { "off" };
        let change = format!(
            "SET default_transaction_read_only = off; \
             ALTER DATABASE \"call-manager\" SET default_transaction_read_only = {value}"
        );
        for statement in change.split(';') {
            admin.batch_execute(statement).await.unwrap();
        }
        if read_only {
            // Sessions keep what they began with.
            terminate_workers(&admin).await;
        }
    }

    /// Takes every connection that there is, those of workers included.
    pub async fn take_all_connections(&self) -> Vec<Client> {
        let admin = client(&self.url).await;
        let few = "ALTER DATABASE \"call-manager\" CONNECTION LIMIT 5";
        admin.batch_execute(few).await.unwrap();
        let count = format!("SELECT count(*) FROM pg_stat_activity WHERE {WORKER}");
        let mut taken = Vec::new();
        loop {
            terminate_workers(&admin).await;
            loop {
                match tokio_postgres::connect(&self.url, NoTls).await {
                    Ok((client, connection)) => {
                        tokio::spawn(connection);
                        taken.push(client);
                    }
                    Err(error) if error.code() == Some(&SqlState::TOO_MANY_CONNECTIONS) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            if admin.query_one(&count, &[]).await.unwrap().get::<_, i64>(0) == 0 {
                taken.push(admin);
                return taken;
            }
        }
    }
}

async fn terminate_workers(admin: &Client) {
    let terminate =
        format!("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {WORKER}");
    admin.batch_execute(&terminate).await.unwrap();
}
