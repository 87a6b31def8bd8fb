//! What executes commands, without a broker: where what is tried does not last long enough for one.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use call_manager::domain::Earlier;
use call_manager::domain::command::{CommandKind, CommandMessage};
use call_manager::domain::result::ErrorCode;
use call_manager::elevenlabs::Error;
use call_manager::handler::{Handled, Handler, Stopping, Timing};
use call_manager::ledger::{Found, Ledger, Location, Settings};
use call_manager::retry::Policy;
use elevenlabs_sandbox::{Effect, Fault, Route};

use crate::ledger::MONTH;
use crate::support::vendor::Vendor;
use crate::support::{LIMIT, submit_body, until};

const TIMING: Timing = Timing {
    retry: Policy { initial: LIMIT, max: LIMIT, horizon: Some(LIMIT) },
    settling_window: LIMIT,
};

pub fn submit(id: &str) -> CommandMessage {
    CommandMessage {
        queue: CommandKind::Submit,
        routing_key: Some(CommandKind::Submit.routing_key()),
        message_id: Some(id.to_owned()),
        correlation_id: None,
        content_type: None,
        content_encoding: None,
        traceparent: None,
        tracestate: None,
        reply_to: None,
        not_after: None,
        refused_header: None,
        expires_at: None,
        redeliveries: 0,
        earlier: Earlier::default(),
        body: submit_body().to_string().into_bytes(),
    }
}

struct Trial {
    vendor: Vendor,
    ledger: Ledger,
    handler: Handler,
}

impl Trial {
    async fn start() -> Self {
        let vendor = Vendor::start().await;
        let settings = Settings {
            location: Location::Memory,
            base_url: vendor.sandbox.base_url(),
            key: vendor.client.key_id(),
            retention: MONTH,
            longest_request: LIMIT,
        };
        let ledger = Ledger::open(settings).await.unwrap();
        let handler = Handler::new(vendor.client.clone(), ledger.clone(), TIMING);
        Self { vendor, ledger, handler }
    }

    async fn until_claimed(&self, id: &str) {
        until("it is claimed", async || {
            matches!(self.ledger.find(id, false).await, Ok(Found::InHand))
        })
        .await;
    }
}

/// A copy that another has in hand is not executed, and so not cleared of having come back.
#[tokio::test]
async fn a_copy_that_waits_for_the_other_one_keeps_its_count() {
    let trial = Trial::start().await;
    let slow = Effect::Latency(Duration::from_secs(1));
    trial.vendor.sandbox.order(Fault::on(Route::Submit, slow));
    let first_seen = SystemTime::now().checked_sub(Duration::from_secs(5));
    let earlier = Earlier { first_seen, deliveries: 3, ..Earlier::default() };
    let copy = Arc::new(CommandMessage { redeliveries: 2, earlier, ..submit("m") });
    let stopping = Stopping::default();
    let copied = async {
        trial.until_claimed("m").await;
        trial.handler.handle(copy, &stopping).await
    };
    let first = trial.handler.handle(Arc::new(submit("m")), &stopping);
    let (Handled::Answered { .. }, Handled::Deferred { earlier, .. }) = tokio::join!(first, copied)
    else {
        panic!("the one has a result and the other waits");
    };
    assert_eq!(earlier.deliveries, 5);
    assert!(earlier.age() >= Duration::from_secs(5), "{earlier:?}");
}

/// A cancel that comes while a claimed submit waits, in hand, for ElevenLabs to be used again.
#[tokio::test]
async fn a_submit_that_is_cancelled_while_it_waits_for_elevenlabs_is_not_sent() {
    let trial = Trial::start().await;
    let breaker = trial.vendor.client.breaker();
    let (message, retry_after, request_id) = ("Later.".into(), None, None);
    breaker.open(&Error::RateLimited { message, retry_after, request_id });
    let cancelled = async {
        trial.until_claimed("m").await;
        assert!(matches!(trial.ledger.find("m", true).await, Ok(Found::InHand)), "it waits");
        // What was claimed a moment ago would be sent, and the cancel find its batch.
        let struck = Instant::now();
        until("it has waited", async || struck.elapsed() > Duration::from_secs(2)).await;
        assert_eq!(trial.vendor.requests(Route::Submit), 0, "it waits");
        breaker.half_open();
        breaker.close();
    };
    let stopping = Stopping::default();
    let handling = trial.handler.handle(Arc::new(submit("m")), &stopping);
    let (end, ()) = tokio::join!(handling, cancelled);
    let Handled::Answered { event, .. } = end else { panic!("it has a result") };
    assert_eq!(event.error_code(), Some(ErrorCode::CancelledBeforeSubmit));
    assert_eq!(trial.vendor.requests(Route::Submit), 0);
}
