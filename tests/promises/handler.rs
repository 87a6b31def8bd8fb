//! What executes commands, without a broker: where what is tried does not last long enough for one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use call_manager::domain::Earlier;
use call_manager::domain::command::{CommandKind, CommandMessage};
use call_manager::domain::result::ErrorCode;
use call_manager::elevenlabs::Error;
use call_manager::handler::{Handled, Handler, Stopping, Timing};
use call_manager::ledger::{Found, Ledger, Location, Settings};
use call_manager::retry::Policy;
use elevenlabs_sandbox::Route;

use crate::ledger::MONTH;
use crate::support::vendor::Vendor;
use crate::support::{LIMIT, submit_body, until};

const TIMING: Timing = Timing {
    retry: Policy { initial: LIMIT, max: LIMIT, horizon: Some(LIMIT) },
    settling_window: LIMIT,
};

fn submit(id: &str) -> Arc<CommandMessage> {
    Arc::new(CommandMessage {
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
        redeliveries: 0,
        earlier: Earlier::default(),
        body: submit_body().to_string().into_bytes(),
    })
}

/// A cancel that comes while a claimed submit waits, in hand, for ElevenLabs to be used again.
#[tokio::test]
async fn a_submit_that_is_cancelled_while_it_waits_for_elevenlabs_is_not_sent() {
    let vendor = Vendor::start().await;
    let breaker = vendor.client.breaker();
    let (message, retry_after, request_id) = ("Later.".into(), None, None);
    breaker.open(&Error::RateLimited { message, retry_after, request_id });
    let settings =
        Settings { location: Location::Memory, retention: MONTH, longest_request: LIMIT };
    let ledger = Ledger::open(settings).await.unwrap();
    let handler = Handler::new(vendor.client.clone(), ledger.clone(), TIMING);

    let stopping = Stopping::default();
    let cancelled = async {
        until("it is claimed", async || matches!(ledger.find("m", false).await, Ok(Found::InHand)))
            .await;
        assert!(matches!(ledger.find("m", true).await, Ok(Found::InHand)), "it waits");
        // What was claimed a moment ago would be sent, and the cancel find its batch.
        let struck = Instant::now();
        until("it has waited", async || struck.elapsed() > Duration::from_secs(2)).await;
        assert_eq!(vendor.requests(Route::Submit), 0, "it waits");
        breaker.half_open();
        breaker.close();
    };
    let (end, ()) = tokio::join!(handler.handle(submit("m"), &stopping), cancelled);
    let Handled::Answered(event) = end else { panic!("it has a result") };
    assert_eq!(event.error_code(), Some(ErrorCode::CancelledBeforeSubmit));
    assert_eq!(vendor.requests(Route::Submit), 0);
}
