//! The sandbox and a client of the worker's to it, without a worker around them.

use std::time::Duration;

use call_manager::elevenlabs::{Client, Settings};
use elevenlabs_sandbox::{Options, Route, Sandbox};

pub struct Vendor {
    pub sandbox: Sandbox,
    pub client: Client,
}

impl Vendor {
    pub async fn start() -> Self {
        let sandbox = Sandbox::start(Options::default()).await.unwrap();
        let settings = Settings {
            api_key: "sandbox-key".into(),
            base_url: sandbox.base_url().parse().unwrap(),
            connect_timeout: Duration::from_secs(2),
            timeout: Duration::from_secs(3),
        };
        Self { client: Client::new(&settings).unwrap(), sandbox }
    }

    pub fn requests(&self, route: Route) -> usize {
        self.sandbox.requests().iter().filter(|request| request.route == route).count()
    }
}
