//! The vendor's operations: who may call, what a request means, and what is answered.

use std::borrow::Cow;

use bytes::Bytes;
use hyper::{HeaderMap, StatusCode, header};
use serde::Serialize;

use crate::answer::{Answer, Refusal};
use crate::body;
use crate::route::{Operation, Route};
use crate::schema::{Step, Wrong};
use crate::state::{Distortion, State};
use crate::wire;

const DEFAULT_PAGE: usize = 100;
/// The vendor documents no largest page; a client has to follow `has_more` in any case.
const LARGEST_PAGE: usize = 1000;

/// A request to the vendor, read to its end.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) operation: Operation,
    pub(crate) query: Option<String>,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) request_id: String,
}

/// Does what was asked and answers as the vendor would.
pub(crate) fn process(state: &State, call: &Call) -> Answer {
    match &call.operation {
        Operation::Unknown => return Answer::no_route(StatusCode::NOT_FOUND),
        Operation::WrongMethod => return Answer::no_route(StatusCode::METHOD_NOT_ALLOWED),
        _ => {}
    }
    let answer =
        authorize(state, &call.headers).and_then(|workspace| operate(state, call, workspace));
    let mut answer = answer.unwrap_or_else(|refusal| refusal.answer(&call.request_id));
    if matches!(call.operation, Operation::List | Operation::Get(_)) {
        distort(state, call.operation.route(), &mut answer);
    }
    answer
}

fn operate(state: &State, call: &Call, workspace: usize) -> Result<Answer, Refusal> {
    let query = call.query.as_deref();
    match &call.operation {
        Operation::Submit => submit(state, call, workspace),
        Operation::List => list(state, query, workspace),
        Operation::Get(id) => Ok(shown(&state.store().get(id, workspace)?)),
        Operation::Cancel(id) => Ok(shown(&state.store().cancel(id, workspace)?)),
        Operation::Retry(id) => Ok(shown(&state.store().retry(id, workspace)?)),
        Operation::Delete(id) => {
            state.store().delete(id, workspace)?;
            Ok(Answer::empty(StatusCode::NO_CONTENT))
        }
        Operation::Export(id) => {
            let table = wire::csv(&state.store().export(id, workspace)?);
            Ok(Answer::new(StatusCode::OK, "text/csv; charset=utf-8", table))
        }
        Operation::Conversations => {
            let sent = sent(query, "dynamic_variable_params");
            let filter = sent.as_deref().and_then(|sent| sent.split_once(":eq:"));
            Ok(shown(&state.store().conversations(filter, workspace)))
        }
        Operation::Conversation(id) => Ok(shown(&state.store().conversation(id, workspace)?)),
        Operation::Unknown | Operation::WrongMethod => Ok(Answer::no_route(StatusCode::NOT_FOUND)),
    }
}

/// Changes an answer of 200 as a test wants it.
fn distort(state: &State, route: Route, answer: &mut Answer) {
    let Some(Distortion(change)) = state.distortion().clone() else { return };
    if answer.status == StatusCode::OK
        && let Ok(mut json) = serde_json::from_slice(&answer.body)
    {
        change(route, &mut json);
        answer.body = json.to_string().into();
    }
}

/// Returns the workspace of the key.
fn authorize(state: &State, headers: &HeaderMap) -> Result<usize, Refusal> {
    match headers.get("xi-api-key") {
        Some(key) => state
            .workspace(key.as_bytes())
            .ok_or_else(|| Refusal::unauthorized("invalid_api_key", "Invalid API key")),
        None => Err(Refusal::unauthorized(
            "needs_authorization",
            "Neither authorization header nor xi-api-key received, please provide one.",
        )),
    }
}

fn shown(answer: &impl Serialize) -> Answer {
    Answer::json(StatusCode::OK, answer)
}

fn submit(state: &State, call: &Call, workspace: usize) -> Result<Answer, Refusal> {
    let content_type = call.headers.get(header::CONTENT_TYPE).and_then(|sent| sent.to_str().ok());
    match body::read(content_type, &call.body) {
        Ok(submit) => Ok(shown(&state.store().create(submit, workspace)?)),
        Err(wrong) => Ok(Answer::invalid(&wrong)),
    }
}

/// A parameter of the query.
fn sent<'a>(query: Option<&'a str>, name: &str) -> Option<Cow<'a, str>> {
    let mut pairs = form_urlencoded::parse(query.unwrap_or_default().as_bytes());
    pairs.find(|(key, _)| key == name).map(|(_, value)| value)
}

fn list(state: &State, query: Option<&str>, workspace: usize) -> Result<Answer, Refusal> {
    let sent = |name: &str| sent(query, name);
    let limit = match sent("limit").as_deref().map(str::parse::<i64>) {
        None => DEFAULT_PAGE,
        Some(Ok(limit)) => usize::try_from(limit).unwrap_or(0).clamp(1, LARGEST_PAGE),
        Some(Err(_)) => {
            return Ok(Answer::invalid(&[Wrong::new(
                &[Step::Name("query"), Step::Name("limit")],
                "int_parsing",
                "Input should be a valid integer, unable to parse string as an integer",
            )]));
        }
    };
    let (last_doc, agent_id) = (sent("last_doc"), sent("agent_id"));
    let store = state.store();
    let page = store.list(limit, last_doc.as_deref(), agent_id.as_deref(), workspace)?;
    Ok(shown(&page))
}
