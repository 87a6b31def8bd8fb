//! A PostgreSQL schema of its own for each test, in the database of this run.

use tokio::task::JoinHandle;
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
