//! From its claim on, a submit is finished from the ledger alone: its message may be gone.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use call_manager::domain::Earlier;
use call_manager::domain::command::{CommandKind, CommandMessage};
use call_manager::domain::result::ResultEvent;
use call_manager::handler::{Handled, Handler, Stopping, Timing, Unpublished};
use call_manager::ledger::{Found, Ledger, Location, Settings};
use call_manager::retry::Policy;
use elevenlabs_sandbox::{BatchStatus, Effect, Fault, Reply, Route};

use crate::handler::submit;
use crate::ledger::MONTH;
use crate::support::vendor::Vendor;
use crate::support::{LIMIT, until};

const QUICK: Duration = Duration::from_millis(200);

pub struct Trial {
    pub vendor: Vendor,
    ledger: Ledger,
    handler: Arc<Handler>,
}

impl Trial {
    async fn start() -> Self {
        Self::retrying(Policy { initial: QUICK, max: QUICK, horizon: Some(LIMIT) }).await
    }

    pub async fn retrying(retry: Policy) -> Self {
        let vendor = Vendor::start().await;
        let settings = Settings {
            location: Location::Memory,
            base_url: vendor.sandbox.base_url(),
            key: vendor.client.key_id(),
            retention: MONTH,
            longest_request: QUICK,
        };
        let ledger = Ledger::open(settings).await.unwrap();
        ledger.note_drained().await.unwrap();
        let timing = Timing { retry, settling_window: QUICK };
        let handler = Arc::new(Handler::new(vendor.client.clone(), ledger.clone(), timing));
        Self { vendor, ledger, handler }
    }

    fn message() -> CommandMessage {
        CommandMessage {
            correlation_id: Some("for m".to_owned()),
            reply_to: Some("replies".to_owned()),
            traceparent: Some("trace".to_owned()),
            ..submit("m")
        }
    }

    /// The worker dies while its request is at ElevenLabs.
    pub async fn dies_at_elevenlabs(&self, effect: Effect) {
        self.vendor.sandbox.order(Fault::on(Route::Submit, effect));
        let handler = Arc::clone(&self.handler);
        let task = tokio::spawn(async move {
            handler.handle(Arc::new(Self::message()), &Stopping::default()).await
        });
        until("it is sent", async || self.vendor.requests(Route::Submit) == 1).await;
        task.abort();
        assert!(task.await.is_err());
    }

    pub async fn finish(&self) -> Option<Unpublished> {
        self.handler.finish("m", &Stopping::default()).await
    }

    /// Finishes it once, and for good.
    async fn finished(&self) -> Arc<ResultEvent> {
        let Unpublished { event, reply_to } = self.finish().await.expect("it was unfinished");
        assert_eq!(event.correlation_id, "for m");
        assert_eq!(event.traceparent.as_deref(), Some("trace"));
        assert_eq!(reply_to.as_deref(), Some("replies"));
        let again = self.finish().await.expect("it is not published yet").event;
        assert_eq!((again.message_id, again.body()), (event.message_id, event.body()));
        self.handler.published("m").await;
        let is_over = async || self.finish().await.is_none();
        until("it is published", is_over).await;
        event
    }

    async fn is_named(&self) -> bool {
        let named = self.handler.unfinished(Duration::ZERO).await.unwrap();
        named.iter().any(|id| &**id == "m")
    }
}

pub fn code(event: &ResultEvent) -> String {
    event.error_code().map_or("succeeded".to_owned(), |code| code.to_string())
}

#[tokio::test]
async fn a_submit_whose_message_is_gone_is_found_and_answered() {
    let trial = Trial::start().await;
    trial.dies_at_elevenlabs(Effect::Hang { processed: true }).await;
    assert!(trial.is_named().await);
    let event = trial.finished().await;
    assert_eq!(code(&event), "succeeded");
    assert_eq!(event.batch_id(), Some(&*trial.vendor.sandbox.batches()[0].id));
    assert!(!trial.is_named().await);
    // A copy that comes all the same gets what was published.
    let copy = trial.handler.handle(Arc::new(Trial::message()), &Stopping::default()).await;
    let Handled::Answered { event: repeated, .. } = copy else { panic!("it has a result") };
    assert_eq!(repeated.message_id, event.message_id);
    assert_eq!(trial.vendor.requests(Route::Submit), 1);
}

#[tokio::test]
async fn a_submit_whose_message_is_gone_is_said_not_to_exist_only_when_that_is_proved() {
    let trial = Trial::start().await;
    trial.dies_at_elevenlabs(Effect::Hang { processed: false }).await;
    let event = trial.finished().await;
    assert_eq!(code(&event), "upstream_unavailable");
    let body = String::from_utf8(event.body()).unwrap();
    assert!(body.contains("created no batch") && body.contains("its message is gone"), "{body}");
    assert!(trial.vendor.requests(Route::List) > 0, "it was searched for");
    assert_eq!(trial.vendor.requests(Route::Submit), 1, "nothing is sent without a body");
}

#[tokio::test]
async fn a_result_that_was_recorded_and_not_published_is_published() {
    let trial = Trial::start().await;
    let handled = trial.handler.handle(Arc::new(Trial::message()), &Stopping::default()).await;
    let Handled::Answered { event, is_recorded: true } = handled else { panic!("it has a result") };
    let finished = trial.finished().await;
    assert_eq!((finished.message_id, finished.body()), (event.message_id, event.body()));
    assert_eq!(trial.vendor.requests(Route::Submit), 1);
}

#[tokio::test]
async fn a_submit_that_was_let_go_of_unsent_is_answered_too() {
    for expired in [false, true] {
        let trial = Trial::start().await;
        let limited = Reply::vendor_error(429, "rate_limit_exceeded", "Slow down.");
        let limited = Effect::Status(limited.retry_after("20"));
        trial.vendor.sandbox.order(Fault::on(Route::Submit, limited));
        let soon = SystemTime::now() + Duration::from_secs(1);
        let message = CommandMessage { expires_at: expired.then_some(soon), ..Trial::message() };
        let handled = trial.handler.handle(Arc::new(message), &Stopping::default()).await;
        let Handled::Deferred { earlier, .. } = handled else { panic!("it waits elsewhere") };
        assert!(earlier.met_row, "its copy says that there is a row");
        until("its time is over", async || !expired || soon < SystemTime::now()).await;
        let event = trial.finished().await;
        assert_eq!(code(&event), if expired { "expired" } else { "upstream_unavailable" });
        assert_eq!(trial.vendor.sandbox.batches().len(), 0);
    }
}

#[tokio::test]
async fn whoever_finishes_a_submit_that_was_cancelled_meanwhile_cancels_its_batch() {
    let trial = Trial::start().await;
    trial.dies_at_elevenlabs(Effect::Hang { processed: true }).await;
    assert!(matches!(trial.ledger.find("m", true).await, Ok(Found::InHand)));
    trial.vendor.sandbox.order(Fault::on(Route::Cancel, Effect::ResetBefore));
    assert_eq!(code(&trial.finish().await.unwrap().event), "succeeded");
    assert_ne!(trial.vendor.sandbox.batches()[0].status, BatchStatus::Cancelled);
    trial.handler.published("m").await;
    // It is tried again until it has worked, though the result is published.
    let is_cancelled = async || {
        trial.finish().await;
        trial.vendor.sandbox.batches()[0].status == BatchStatus::Cancelled
    };
    until("it is cancelled", is_cancelled).await;
    until("that is all", async || !trial.is_named().await).await;
}

/// A batch still calls people, whatever one answer to its cancel said.
#[tokio::test]
async fn a_refusal_does_not_end_the_cancel_of_a_batch_that_still_calls() {
    let trial = Trial::start().await;
    trial.dies_at_elevenlabs(Effect::Hang { processed: true }).await;
    assert!(matches!(trial.ledger.find("m", true).await, Ok(Found::InHand)));
    for status in [404, 400] {
        let refused = Effect::vendor_error(status, "refused", "Not yet.");
        trial.vendor.sandbox.order(Fault::on(Route::Cancel, refused));
    }
    let is_cancelled = async || {
        trial.finish().await;
        trial.vendor.sandbox.batches()[0].status == BatchStatus::Cancelled
    };
    until("it is cancelled", is_cancelled).await;
    assert_eq!(trial.vendor.requests(Route::Cancel), 3);
}

#[tokio::test]
async fn what_was_begun_in_a_ledger_that_is_gone_is_searched_for_before_it_is_sent() {
    let met = Earlier { met_row: true, ..Earlier::default() };
    let doubtful = Earlier { in_doubt: true, ..Earlier::default() };
    for (earlier, searches) in [(met, true), (doubtful, true), (Earlier::default(), false)] {
        let trial = Trial::start().await;
        let message = Arc::new(CommandMessage { earlier, ..Trial::message() });
        let handled = trial.handler.handle(message, &Stopping::default()).await;
        assert!(matches!(handled, Handled::Answered { .. }));
        assert_eq!(trial.vendor.requests(Route::List) > 0, searches);
        assert_eq!(trial.vendor.sandbox.batches().len(), 1);
    }
}

#[tokio::test]
async fn what_came_back_is_searched_for_in_a_ledger_that_has_not_seen_the_queues_empty() {
    for drained in [false, true] {
        let mut trial = Trial::start().await;
        if !drained {
            let (base_url, key) = (trial.vendor.sandbox.base_url(), trial.vendor.client.key_id());
            let (location, retention) = (Location::Memory, MONTH);
            let settings = Settings { location, base_url, key, retention, longest_request: QUICK };
            trial.ledger = Ledger::open(settings).await.unwrap();
            let retry = Policy { initial: QUICK, max: QUICK, horizon: Some(LIMIT) };
            let timing = Timing { retry, settling_window: QUICK };
            let (client, ledger) = (trial.vendor.client.clone(), trial.ledger.clone());
            trial.handler = Arc::new(Handler::new(client, ledger, timing));
        }
        let message = Arc::new(CommandMessage { redeliveries: 1, ..Trial::message() });
        trial.handler.handle(message, &Stopping::default()).await;
        assert_eq!(trial.vendor.requests(Route::List) > 0, !drained);
    }
}

#[tokio::test]
async fn what_is_condemned_is_answered_by_what_is_known_of_it() {
    let trial = Trial::start().await;
    let condemned = async |message: &CommandMessage| match trial.handler.condemn(message, 20).await
    {
        Handled::Condemned { event, .. } => event,
        _ => panic!("it is given up"),
    };
    // It has met a row, which this ledger does not have.
    let earlier = Earlier { met_row: true, ..Earlier::default() };
    let event = condemned(&CommandMessage { earlier, ..submit("gone") }).await;
    assert_eq!(code(&event), "outcome_unknown");
    assert_eq!(code(&*condemned(&submit("fresh")).await), "poison_message");
    // The id is another submit's, whose result it does not get.
    let handled = trial.handler.handle(Arc::new(submit("m")), &Stopping::default()).await;
    let Handled::Answered { event: own, .. } = handled else { panic!("it has a result") };
    let other = CommandMessage { body: b"{}".to_vec(), ..submit("m") };
    let event = condemned(&other).await;
    assert_eq!(code(&event), "poison_message");
    assert_ne!(event.message_id, own.message_id);
    let same = condemned(&submit("m")).await;
    assert_eq!(same.message_id, own.message_id);
}

/// A cancel by command id that had its effect is never said not to be executed.
#[tokio::test]
async fn a_cancel_that_was_laid_and_then_expires_is_not_denied() {
    let trial = Trial::start().await;
    trial.vendor.sandbox.order(Fault::on(Route::Submit, Effect::Latency(Duration::from_secs(3))));
    let submitting = tokio::spawn({
        let handler = Arc::clone(&trial.handler);
        async move { handler.handle(Arc::new(submit("m")), &Stopping::default()).await }
    });
    until("it is sent", async || trial.vendor.requests(Route::Submit) == 1).await;
    let until_then = SystemTime::now() + Duration::from_secs(1);
    let seconds = until_then.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let cancel = CommandMessage {
        queue: CommandKind::Cancel,
        routing_key: Some(CommandKind::Cancel.routing_key()),
        message_id: Some("cancel".to_owned()),
        not_after: Some(seconds.to_string()),
        body: br#"{"command_id": "m"}"#.to_vec(),
        ..submit("m")
    };
    let handled = trial.handler.handle(Arc::new(cancel), &Stopping::default()).await;
    let Handled::Answered { event, .. } = handled else { panic!("it has a result") };
    assert!(["outcome_unknown", "succeeded"].contains(&&*code(&event)), "{}", code(&event));
    submitting.abort();
}
