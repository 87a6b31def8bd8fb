//! The vendor's operations: who may call, what a request means, and what is answered.

use bytes::Bytes;
use hyper::{HeaderMap, StatusCode, header};
use serde::Serialize;

use crate::answer::{Answer, Refusal};
use crate::body;
use crate::route::Operation;
use crate::schema::{Step, Wrong};
use crate::state::State;
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
    let answer = authorize(state, &call.headers).and_then(|()| match &call.operation {
        Operation::Submit => submit(state, call),
        Operation::List => list(state, call.query.as_deref()),
        Operation::Get(id) => Ok(shown(&state.store().get(id)?)),
        Operation::Cancel(id) => Ok(shown(&state.store().cancel(id)?)),
        Operation::Retry(id) => Ok(shown(&state.store().retry(id)?)),
        Operation::Delete(id) => {
            state.store().delete(id)?;
            Ok(Answer::empty(StatusCode::NO_CONTENT))
        }
        Operation::Export(id) => {
            let table = wire::csv(&state.store().export(id)?);
            Ok(Answer::new(StatusCode::OK, "text/csv; charset=utf-8", table))
        }
        Operation::Unknown | Operation::WrongMethod => Ok(Answer::no_route(StatusCode::NOT_FOUND)),
    });
    answer.unwrap_or_else(|refusal| refusal.answer(&call.request_id))
}

fn authorize(state: &State, headers: &HeaderMap) -> Result<(), Refusal> {
    match headers.get("xi-api-key") {
        Some(key) if key.as_bytes() == state.api_key.as_bytes() => Ok(()),
        Some(_) => Err(Refusal::unauthorized("invalid_api_key", "Invalid API key")),
        None => Err(Refusal::unauthorized(
            "needs_authorization",
            "Neither authorization header nor xi-api-key received, please provide one.",
        )),
    }
}

fn shown(answer: &impl Serialize) -> Answer {
    Answer::json(StatusCode::OK, answer)
}

fn submit(state: &State, call: &Call) -> Result<Answer, Refusal> {
    let content_type = call.headers.get(header::CONTENT_TYPE).and_then(|sent| sent.to_str().ok());
    match body::read(content_type, &call.body) {
        Ok(submit) => Ok(shown(&state.store().create(submit)?)),
        Err(wrong) => Ok(Answer::invalid(&wrong)),
    }
}

fn list(state: &State, query: Option<&str>) -> Result<Answer, Refusal> {
    let sent = |name: &str| {
        let mut pairs = form_urlencoded::parse(query.unwrap_or_default().as_bytes());
        pairs.find(|(key, _)| key == name).map(|(_, value)| value)
    };
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
    let page = store.list(limit, last_doc.as_deref(), agent_id.as_deref())?;
    Ok(shown(&page))
}
