//! The faults that can be ordered, and the queue that hands each of them to the requests it is for.

use std::collections::VecDeque;
use std::time::Duration;

use hyper::header::HeaderValue;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::route::Route;
use crate::unkind::Unkind;

/// How many faults may wait at the same time.
pub const MAX_FAULTS: usize = 10_000;

/// Something that goes wrong, ordered ahead of the requests it happens to.
///
/// A request takes at most one fault: the first ordered one that matches its route. As JSON:
/// `{"route": "submit", "times": 2, "effect": "reset_after"}`; see [`Effect`] for the effects.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// Which requests it happens to. In JSON absent: any.
    #[serde(default)]
    pub route: Route,
    /// How many requests it happens to; `None`, JSON `null`: until the faults are cleared. In JSON
    /// absent: one.
    #[serde(default = "once")]
    pub times: Option<u32>,
    /// With which probability, 0 to 1, a matching request takes it. One that does not may take a
    /// fault ordered later, and does not count. In JSON absent: always.
    #[serde(default = "always")]
    pub probability: f64,
    /// Decides which requests those are: the same seed chooses the same ones.
    #[serde(default)]
    pub seed: u64,
    /// What happens.
    pub effect: Effect,
}

/// What a fault does to a request. «Processed» means that the vendor did what was asked: after a
/// processed submit there is a batch, whatever the client saw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// The request waits so long, then goes on as usual. As JSON `{"latency_ms": 250}`.
    #[serde(rename = "latency_ms", with = "milliseconds")]
    Latency(Duration),
    /// An answer with this status and body. As JSON `{"status": {"status": 503, "retry_after":
    /// "2", "processed": true, "body": {"text": "<html>…"}}}`; all but `status` may be left out.
    Status(Reply),
    /// A TCP reset; not processed. As JSON `"reset_before"`, and so on.
    ResetBefore,
    /// Processed, then a TCP reset.
    ResetAfter,
    /// The connection is closed without an answer; not processed.
    CloseBefore,
    /// Processed, then the connection is closed without an answer.
    CloseAfter,
    /// No answer for ten minutes, then the connection is closed. As JSON `{"hang": {"processed":
    /// true}}`.
    Hang {
        /// Whether the vendor did what was asked before it fell silent.
        #[serde(default)]
        processed: bool,
    },
    /// Processed, then a 200 whose body is no JSON.
    Garbage,
    /// Processed, then a 200 that announces more bytes than it sends before it closes.
    Truncated,
    /// Processed, and the answer is changed so.
    Unkind(Unkind),
    /// Takes a while, and is refused with a 429 where more than so many requests are under way. As JSON
    /// `{"limit": {"at_once": 2, "latency_ms": 250}}`.
    Limit {
        /// So many are done.
        at_once: usize,
        /// How long each of those takes.
        #[serde(rename = "latency_ms", with = "milliseconds")]
        latency: Duration,
    },
    /// This answer, before the body is read; not processed. As JSON `{"refused_early": {"status": 413}}`.
    RefusedEarly(Reply),
    /// Processed and answered; then the connection is closed, which nothing in the answer tells.
    ClosedWhenIdle,
}

/// The answer of an [`Effect::Status`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reply {
    /// The HTTP status, 200 to 599.
    pub status: u16,
    /// The body; none is an empty one.
    #[serde(default)]
    pub body: Option<Body>,
    /// The `Retry-After` header as it is sent: seconds or an HTTP date, or nonsense.
    #[serde(default)]
    pub retry_after: Option<String>,
    /// Whether the vendor did what was asked before it answered this.
    #[serde(default)]
    pub processed: bool,
}

/// A body to answer with. As JSON `{"json": …}` or `{"text": "…"}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Body {
    /// Sent as `application/json`.
    Json(Value),
    /// Sent as it is: as `text/html` if it begins with `<`, else as `text/plain`.
    Text(String),
}

#[expect(clippy::unnecessary_wraps, reason = "serde wants a function of the field's type")]
fn once() -> Option<u32> {
    Some(1)
}

fn always() -> f64 {
    1.0
}

impl Fault {
    /// A fault that happens to the next request on the route.
    pub fn on(route: Route, effect: Effect) -> Self {
        Self { route, times: once(), probability: always(), seed: 0, effect }
    }

    /// The same for the next so many requests.
    #[must_use]
    pub fn times(self, times: u32) -> Self {
        Self { times: Some(times), ..self }
    }

    /// The same for every request until the faults are cleared.
    #[must_use]
    pub fn until_cleared(self) -> Self {
        Self { times: None, ..self }
    }

    /// The same, taken only with a probability of 0 to 1, chosen by the seed.
    #[must_use]
    pub fn with_probability(self, probability: f64, seed: u64) -> Self {
        Self { probability, seed, ..self }
    }

    /// What is wrong with the order, as a sentence.
    pub(crate) fn check(&self) -> Result<(), String> {
        if !(0.0..=1.0).contains(&self.probability) {
            return Err(format!("probability must be 0 to 1, not {}", self.probability));
        }
        if let Effect::Status(reply) | Effect::RefusedEarly(reply) = &self.effect {
            if !(200..=599).contains(&reply.status) {
                return Err(format!("status must be 200 to 599, not {}", reply.status));
            }
            if reply.is_refusal_of_what_was_done() {
                return Err(format!(
                    "a {} in ElevenLabs' own error form says that nothing was done, so it cannot be \
                     processed; give it a gateway's body, or another status",
                    reply.status
                ));
            }
            if let Some(value) = &reply.retry_after
                && HeaderValue::from_str(value).is_err()
            {
                return Err(format!("retry_after {value:?} cannot be sent in a header"));
            }
        }
        Ok(())
    }
}

impl Effect {
    /// An answer in the vendor's error shape, for example `(429, "rate_limit_exceeded", "Slow
    /// down.")`; not processed.
    pub fn vendor_error(status: u16, code: &str, message: &str) -> Self {
        Self::Status(Reply::vendor_error(status, code, message))
    }

    /// Its name in JSON and in the log.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Latency(_) => "latency_ms",
            Self::Status(_) => "status",
            Self::ResetBefore => "reset_before",
            Self::ResetAfter => "reset_after",
            Self::CloseBefore => "close_before",
            Self::CloseAfter => "close_after",
            Self::Hang { .. } => "hang",
            Self::Garbage => "garbage",
            Self::Truncated => "truncated",
            Self::Unkind(_) => "unkind",
            Self::Limit { .. } => "limit",
            Self::RefusedEarly(_) => "refused_early",
            Self::ClosedWhenIdle => "closed_when_idle",
        }
    }

    /// Whether the vendor does what was asked.
    pub fn processes(&self) -> bool {
        match self {
            Self::ResetBefore | Self::CloseBefore | Self::RefusedEarly(_) => false,
            Self::Status(reply) => reply.processed,
            Self::Hang { processed } => *processed,
            Self::Latency(_)
            | Self::ResetAfter
            | Self::CloseAfter
            | Self::Garbage
            | Self::Truncated
            | Self::Unkind(_)
            | Self::Limit { .. }
            | Self::ClosedWhenIdle => true,
        }
    }
}

impl Reply {
    /// A 4xx in the vendor's error form, of a request that was done: only something in between says so.
    fn is_refusal_of_what_was_done(&self) -> bool {
        let is_form = |body: &Body| match body {
            Body::Json(json) => json["detail"].is_object() || json["detail"].is_array(),
            Body::Text(_) => false,
        };
        self.processed
            && (400..500).contains(&self.status)
            && self.body.as_ref().is_some_and(is_form)
    }

    /// An empty answer; not processed.
    pub fn new(status: u16) -> Self {
        Self { status, body: None, retry_after: None, processed: false }
    }

    /// An answer in the vendor's error shape; not processed.
    pub fn vendor_error(status: u16, code: &str, message: &str) -> Self {
        Self::new(status).json(json!({"detail": {
            "type": code, "code": code, "message": message, "status": code,
        }}))
    }

    /// The same with a JSON body.
    #[must_use]
    pub fn json(self, body: Value) -> Self {
        Self { body: Some(Body::Json(body)), ..self }
    }

    /// The same with a body of text or HTML.
    #[must_use]
    pub fn text(self, body: &str) -> Self {
        Self { body: Some(Body::Text(body.to_owned())), ..self }
    }

    /// The same with a `Retry-After` header, sent as it is.
    #[must_use]
    pub fn retry_after(self, value: &str) -> Self {
        Self { retry_after: Some(value.to_owned()), ..self }
    }

    /// The same after the vendor did what was asked.
    #[must_use]
    pub fn processed(self) -> Self {
        Self { processed: true, ..self }
    }
}

pub(crate) mod milliseconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(u64::try_from(value.as_millis()).unwrap_or(u64::MAX))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_millis)
    }
}

/// The ordered faults, first in, first out.
#[derive(Debug, Default)]
pub(crate) struct FaultQueue {
    waiting: VecDeque<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    fault: Fault,
    random: u64,
}

impl FaultQueue {
    /// Takes all of the orders or, with a sentence on why, none.
    pub(crate) fn order(&mut self, faults: Vec<Fault>) -> Result<(), String> {
        for fault in &faults {
            fault.check()?;
        }
        if self.waiting.len() + faults.len() > MAX_FAULTS {
            return Err(format!("at most {MAX_FAULTS} faults may wait; clear them first"));
        }
        self.waiting.extend(faults.into_iter().map(|fault| Waiting { random: fault.seed, fault }));
        Ok(())
    }

    pub(crate) fn clear(&mut self) {
        self.waiting.clear();
    }

    /// What happens to a request on this route.
    pub(crate) fn take(&mut self, route: Route) -> Option<Effect> {
        // A fault ordered for no request at all would otherwise wait for ever.
        self.waiting.retain(|waiting| waiting.fault.times != Some(0));
        let at = self.waiting.iter_mut().position(|waiting| {
            let fault = &waiting.fault;
            let matches = fault.route == Route::Any || fault.route == route;
            matches && (fault.probability >= 1.0 || chance(&mut waiting.random) < fault.probability)
        })?;
        let waiting = self.waiting.get_mut(at)?;
        let effect = waiting.fault.effect.clone();
        if let Some(times) = &mut waiting.fault.times {
            *times -= 1;
            if *times == 0 {
                self.waiting.remove(at);
            }
        }
        Some(effect)
    }
}

/// The next number of at least 0 and less than 1 of the `SplitMix64` sequence.
fn chance(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^= mixed >> 31;
    // 32 bits are chance enough, and every one of them fits into a float.
    f64::from(u32::try_from(mixed >> 32).unwrap_or_default()) / (f64::from(u32::MAX) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(faults: Vec<Fault>) -> FaultQueue {
        let mut queue = FaultQueue::default();
        queue.order(faults).unwrap();
        queue
    }

    #[test]
    fn faults_are_taken_in_the_order_they_were_ordered_by_the_route_they_are_for() {
        let mut queue = queue(vec![
            Fault::on(Route::Submit, Effect::ResetBefore).times(2),
            Fault::on(Route::Get, Effect::Garbage),
            Fault::on(Route::Any, Effect::Truncated),
        ]);
        assert_eq!(queue.take(Route::Get), Some(Effect::Garbage));
        assert_eq!(queue.take(Route::Submit), Some(Effect::ResetBefore));
        assert_eq!(queue.take(Route::Submit), Some(Effect::ResetBefore));
        assert_eq!(queue.take(Route::Submit), Some(Effect::Truncated));
        assert_eq!(queue.take(Route::Submit), None);
    }

    #[test]
    fn a_probability_chooses_about_its_share_and_the_same_seed_the_same_requests() {
        let chosen = |seed| {
            let fault = Fault::on(Route::Any, Effect::Garbage).until_cleared();
            let mut queue = queue(vec![fault.with_probability(0.25, seed)]);
            (0..1000).map(|_| queue.take(Route::List).is_some()).collect::<Vec<_>>()
        };
        let hits = chosen(7).iter().filter(|hit| **hit).count();
        assert!((200..300).contains(&hits), "{hits} of 1000");
        assert_eq!(chosen(7), chosen(7));
        assert_ne!(chosen(7), chosen(8));
    }

    #[test]
    fn the_json_of_every_effect_is_what_its_documentation_says() {
        for (text, effect) in [
            (r#"{"latency_ms":250}"#, Effect::Latency(Duration::from_millis(250))),
            (r#""reset_before""#, Effect::ResetBefore),
            (r#""reset_after""#, Effect::ResetAfter),
            (r#""close_before""#, Effect::CloseBefore),
            (r#""close_after""#, Effect::CloseAfter),
            (r#"{"hang":{"processed":true}}"#, Effect::Hang { processed: true }),
            (r#""garbage""#, Effect::Garbage),
            (r#""truncated""#, Effect::Truncated),
            (r#"{"unkind":"shuffled"}"#, Effect::Unkind(Unkind::Shuffled)),
            (
                r#"{"unkind":{"lagging_ms":500}}"#,
                Effect::Unkind(Unkind::Lagging(Duration::from_millis(500))),
            ),
            (
                r#"{"limit":{"at_once":2,"latency_ms":250}}"#,
                Effect::Limit { at_once: 2, latency: Duration::from_millis(250) },
            ),
            (r#""closed_when_idle""#, Effect::ClosedWhenIdle),
        ] {
            assert_eq!(serde_json::from_str::<Effect>(text).unwrap(), effect);
            assert_eq!(serde_json::to_string(&effect).unwrap(), text);
        }
        let read: Fault = serde_json::from_str(
            r#"{"route":"submit","times":null,"effect":{"status":{"status":429,"retry_after":"2"}}}"#,
        )
        .unwrap();
        let reply = Reply::new(429).retry_after("2");
        assert_eq!(read, Fault::on(Route::Submit, Effect::Status(reply)).until_cleared());
    }

    #[test]
    fn an_impossible_order_is_refused_with_a_sentence() {
        let refused = |fault: Fault| FaultQueue::default().order(vec![fault]).unwrap_err();
        let status = |status| Fault::on(Route::Any, Effect::Status(Reply::new(status)));
        assert_eq!(refused(status(42)), "status must be 200 to 599, not 42");
        assert_eq!(
            refused(Fault::on(Route::Any, Effect::Garbage).with_probability(1.5, 0)),
            "probability must be 0 to 1, not 1.5"
        );
        let header = Effect::Status(Reply::new(503).retry_after("a\nb"));
        assert!(refused(Fault::on(Route::Any, header)).contains("cannot be sent"));
    }
}
