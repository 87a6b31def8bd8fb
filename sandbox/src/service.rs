//! One request from its first byte to its answer, or to the fault it takes.

use std::convert::Infallible;
use std::future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::answer::{Answer, JSON};
use crate::api::{self, Call};
use crate::control;
use crate::fault::{Body, Effect, Reply};
use crate::observe::Entry;
use crate::route::{Operation, Route};
use crate::state::State;

/// Room for 10,000 recipients with many variables each.
const MAX_BODY_BYTES: usize = 64 * 1024 * 1024;
/// How long a silent request is kept.
const HANG: Duration = Duration::from_secs(600);
/// What the vendor's header names as the limit; the sandbox does not enforce it.
const MAX_CONCURRENT: HeaderValue = HeaderValue::from_static("50");

/// How a connection ends instead of with an answer.
#[derive(Debug)]
pub(crate) enum Ending {
    /// A TCP reset.
    Reset,
    /// These last bytes, which may be none, and a proper close.
    Close(Bytes),
}

/// What the requests of one connection need.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    pub(crate) state: Arc<State>,
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
    pub(crate) ending: mpsc::Sender<Ending>,
}

type Answered = Response<Full<Bytes>>;

impl Service {
    pub(crate) async fn respond(
        self,
        request: hyper::Request<Incoming>,
    ) -> Result<Answered, Infallible> {
        let (head, body) = request.into_parts();
        let path = head.uri.path();
        let operation = Operation::of(&head.method, path);
        let route = operation.route();
        let is_control = path.starts_with(control::PREFIX);
        let effect = if is_control { None } else { self.state.faults().take(route) };
        if let Some(Effect::RefusedEarly(reply)) = effect {
            let effect = Effect::RefusedEarly(reply.clone());
            let mut seen = Seen::new(&self.state, &head, route, Some(&effect), Bytes::new());
            let response = written(faulty(reply), route, &new_id(), 0);
            seen.answered(response.status());
            return Ok(response);
        }
        let body = match Limited::new(body, MAX_BODY_BYTES).collect().await {
            Ok(read) => read.to_bytes(),
            Err(error) if error.is::<LengthLimitError>() => {
                return Ok(written(too_large(), Route::Any, &new_id(), 0));
            }
            // The client has gone in the middle of its request.
            Err(_) => return self.end(Ending::Close(Bytes::new())).await,
        };
        if is_control {
            let answer = control::answer(&self.state, &head.method, path, &body);
            tracing::debug!(method = %head.method, path, status = answer.status.as_u16(), "control");
            return Ok(written(answer, Route::Any, &new_id(), 0));
        }
        let seen = Seen::new(&self.state, &head, route, effect.as_ref(), body.clone());
        let call = Call {
            operation,
            query: head.uri.query().map(str::to_owned),
            headers: head.headers,
            body,
            request_id: new_id(),
        };
        self.finish(call, route, effect, seen).await
    }

    async fn finish(
        self,
        call: Call,
        route: Route,
        effect: Option<Effect>,
        mut seen: Seen,
    ) -> Result<Answered, Infallible> {
        let request_id = call.request_id.clone();
        let state = Arc::clone(&self.state);
        let in_flight = state.enter();
        let concurrent = self.state.in_flight.load(Ordering::Relaxed);
        let effect = match effect {
            Some(Effect::Limit { at_once, .. }) if concurrent > at_once => {
                Some(Effect::vendor_error(429, "too_many_concurrent_requests", "Too many at once."))
            }
            effect => effect,
        };
        let answer = if effect.as_ref().is_none_or(Effect::processes) {
            self.process(call, effect.as_ref(), &seen).await
        } else {
            None
        };
        if matches!(effect, Some(Effect::Hang { .. })) {
            seen.unanswered();
            sleep(HANG).await;
            return self.end(Ending::Close(Bytes::new())).await;
        }
        if let Some((ending, status)) = ending(effect.as_ref(), answer.as_ref(), &request_id) {
            match status {
                Some(status) => seen.answered(status),
                None => seen.unanswered(),
            }
            return self.end(ending).await;
        }
        let answer = match (effect, answer) {
            (Some(Effect::Status(reply) | Effect::RefusedEarly(reply)), _) => faulty(reply),
            (Some(Effect::Garbage), _) => Answer::new(StatusCode::OK, JSON, r#"{"id": "btcal_"#),
            (Some(Effect::Unkind(unkind)), Some(answer)) if answer.status == StatusCode::OK => {
                unkind.apply(answer, &state, &request_id)
            }
            (_, Some(answer)) => answer,
            // The stop of the sandbox came before the answer.
            (_, None) => return self.end(Ending::Close(Bytes::new())).await,
        };
        let response = written(answer, route, &request_id, concurrent);
        drop(in_flight);
        seen.answered(response.status());
        Ok(response)
    }

    /// Does what was asked; none if the sandbox stops first.
    async fn process(&self, call: Call, effect: Option<&Effect>, seen: &Seen) -> Option<Answer> {
        let (state, number) = (Arc::clone(&self.state), seen.number);
        let process = move || {
            let answer = api::process(&state, &call);
            if let Some(entry) = state.log().entry(number) {
                entry.processed = true;
            }
            answer
        };
        let Some(Effect::Latency(latency) | Effect::Limit { latency, .. }) = effect else {
            return Some(process());
        };
        // In a task of its own: a client that stops waiting takes its connection with it, and the
        // vendor still does what it was asked.
        let (latency, stop) = (*latency, self.stop.clone());
        let slow = self.tasks.spawn(async move {
            tokio::select! {
                () = sleep(latency) => Some(process()),
                () = stop.cancelled() => None,
            }
        });
        slow.await.ok().flatten()
    }

    /// Hands the connection over to its end; there is no answer to wait for.
    async fn end(self, ending: Ending) -> Result<Answered, Infallible> {
        // A full channel means that an ending is on its way already.
        if self.ending.try_send(ending).is_err() {
            tracing::debug!("the connection ends already");
        }
        future::pending().await
    }
}

/// How the connection of a request ends, where it does, and the status that was answered before.
fn ending(
    effect: Option<&Effect>,
    answer: Option<&Answer>,
    request_id: &str,
) -> Option<(Ending, Option<StatusCode>)> {
    match (effect?, answer) {
        (Effect::ResetBefore | Effect::ResetAfter, _) => Some((Ending::Reset, None)),
        (Effect::CloseBefore | Effect::CloseAfter, _) => Some((Ending::Close(Bytes::new()), None)),
        (Effect::Truncated, answer) => {
            let whole = answer.map(|answer| answer.body.clone()).unwrap_or_default();
            Some((Ending::Close(truncated(&whole, request_id)), Some(StatusCode::OK)))
        }
        (Effect::ClosedWhenIdle, Some(answer)) => {
            Some((Ending::Close(raw(answer, request_id)), Some(answer.status)))
        }
        _ => None,
    }
}

/// A request's place in the log, and its one line for people.
struct Seen {
    state: Arc<State>,
    number: usize,
    method: String,
    path: String,
    fault: Option<&'static str>,
    told: bool,
}

impl Seen {
    fn new(
        state: &Arc<State>,
        head: &hyper::http::request::Parts,
        route: Route,
        effect: Option<&Effect>,
        body: Bytes,
    ) -> Self {
        let fault = effect.map(Effect::name);
        let number = state.log().push(Entry {
            method: head.method.to_string(),
            path: head.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
            route,
            status: None,
            fault,
            processed: false,
            at: Instant::now(),
            body,
        });
        Self {
            state: Arc::clone(state),
            number,
            method: head.method.to_string(),
            // Without the query, which could hold anything.
            path: head.uri.path().to_owned(),
            fault,
            told: false,
        }
    }

    fn answered(&mut self, status: StatusCode) {
        if let Some(entry) = self.state.log().entry(self.number) {
            entry.status = Some(status.as_u16());
        }
        self.tell(Some(status.as_u16()));
    }

    fn unanswered(&mut self) {
        self.tell(None);
    }

    fn tell(&mut self, status: Option<u16>) {
        self.told = true;
        let (method, path, fault) = (&self.method, &self.path, self.fault);
        tracing::info!(method, path, status, fault, "request");
    }
}

impl Drop for Seen {
    fn drop(&mut self) {
        if !self.told {
            self.tell(None);
        }
    }
}

fn new_id() -> String {
    Uuid::new_v4().simple().to_string()
}

fn too_large() -> Answer {
    Answer::json(StatusCode::PAYLOAD_TOO_LARGE, &json!({"detail": "Request Entity Too Large"}))
}

fn faulty(reply: Reply) -> Answer {
    // The status was checked when the fault was ordered.
    let status = StatusCode::from_u16(reply.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let answer = match reply.body {
        None => Answer::empty(status),
        Some(Body::Json(body)) => Answer::json(status, &body),
        Some(Body::Text(text)) if text.starts_with('<') => Answer::new(status, "text/html", text),
        Some(Body::Text(text)) => Answer::new(status, "text/plain", text),
    };
    Answer { retry_after: reply.retry_after, ..answer }
}

/// The first half of an answer, under a length for all of it.
fn truncated(whole: &[u8], request_id: &str) -> Bytes {
    let whole = if whole.is_empty() { b"{}".as_slice() } else { whole };
    let half = &whole[..whole.len() / 2];
    Bytes::from([head_of(StatusCode::OK, whole, request_id).as_bytes(), half].concat())
}

/// All of an answer, for who closes the connection after it.
fn raw(answer: &Answer, request_id: &str) -> Bytes {
    let head = head_of(answer.status, &answer.body, request_id);
    Bytes::from([head.as_bytes(), &answer.body].concat())
}

fn head_of(status: StatusCode, whole: &[u8], request_id: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: {JSON}\r\nrequest-id: {request_id}\r\n\
         content-length: {}\r\n\r\n",
        whole.len()
    )
}

fn written(answer: Answer, route: Route, request_id: &str, concurrent: usize) -> Answered {
    let mut response = Response::new(Full::new(answer.body));
    *response.status_mut() = answer.status;
    let headers = response.headers_mut();
    if !answer.content_type.is_empty() {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(answer.content_type));
    }
    if answer.content_type.starts_with("text/csv") {
        let value = HeaderValue::from_static("attachment; filename=\"batch_call.csv\"");
        headers.insert(header::CONTENT_DISPOSITION, value);
    }
    if let Ok(value) = HeaderValue::from_str(request_id) {
        headers.insert("request-id", value);
    }
    if let Some(Ok(value)) = answer.retry_after.as_deref().map(HeaderValue::from_str) {
        headers.insert(header::RETRY_AFTER, value);
    }
    if route == Route::Submit {
        headers.insert("current-concurrent-requests", HeaderValue::from(concurrent));
        headers.insert("maximum-concurrent-requests", MAX_CONCURRENT);
    }
    response
}
