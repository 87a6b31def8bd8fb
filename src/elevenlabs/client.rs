//! One method per endpoint of the vendor's batch-calling API.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, Url, redirect, retry};
use secrecy::{ExposeSecret, SecretString};
use serde_json::value::RawValue;
use tracing::warn;
use uuid::Uuid;

use crate::domain::command::{BatchId, COMMAND_ID_VARIABLE};
use crate::domain::short;

use super::breaker::Breaker;
use super::error::{self, Class, Error};
use super::wire::{Batch, Page, SubmitRequest, is_object};
use super::words::Words;

/// The largest answer that is read, in bytes: 10,000 recipients with all their data.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;

/// Batches per page of the list: the vendor's own default.
const PAGE: &str = "100";

/// Shorter than any proxy keeps an idle connection: a reused one that the other side is just
/// closing would make a submit's outcome unknown.
const POOL_IDLE: Duration = Duration::from_secs(5);

/// How to reach the vendor.
pub struct Settings {
    /// Sent as `xi-api-key`.
    pub api_key: SecretString,
    /// `https://api.elevenlabs.io`, or a stand-in.
    pub base_url: Url,
    /// For the connection alone, shorter than `timeout`.
    pub connect_timeout: Duration,
    /// From the first byte out to the last byte in.
    pub timeout: Duration,
}

/// A batch as the vendor answered it.
#[derive(Debug)]
pub struct Answer {
    /// The answer, byte for byte.
    pub data: Box<RawValue>,
    /// `id`.
    pub batch_id: String,
    /// `status`; new values appear over time.
    pub status: Option<String>,
    /// `phone_provider`.
    pub phone_provider: Option<String>,
}

impl Answer {
    /// A batch as it stands in an answer, or in the list. The error says what is wrong with it.
    pub(super) fn read(data: Box<RawValue>) -> Result<Self, String> {
        let no_batch = || "it is not a batch with an id".to_owned();
        let batch: Batch = serde_json::from_str(data.get()).map_err(|_| no_batch())?;
        if !is_object(data.get()) {
            return Err(no_batch());
        }
        if batch.id.is_empty() {
            return Err("its batch id is empty".to_owned());
        }
        Ok(Self {
            data,
            batch_id: batch.id,
            status: batch.status,
            phone_provider: batch.phone_provider,
        })
    }
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The key cannot be sent as an HTTP header.
    #[error("ELEVENLABS_API_KEY has characters that cannot be sent in an HTTP header")]
    Key(#[from] reqwest::header::InvalidHeaderValue),
    /// No TLS, no resolver.
    #[error("the HTTP client could not be set up")]
    Http(#[from] reqwest::Error),
}

/// A connection pool to the vendor. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    base_url: Url,
    breaker: Arc<Breaker>,
    words: Words,
    key_id: Uuid,
}

impl Client {
    /// A client; fails where TLS cannot be set up or the key cannot be a header.
    pub fn new(settings: &Settings) -> Result<Self, SetupError> {
        let mut key = HeaderValue::from_str(settings.api_key.expose_secret())?;
        key.set_sensitive(true);
        let http = reqwest::Client::builder()
            .default_headers(HeaderMap::from_iter([(
                reqwest::header::HeaderName::from_static("xi-api-key"),
                key,
            )]))
            .user_agent(concat!("call-manager/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(settings.connect_timeout)
            .timeout(settings.timeout)
            .pool_idle_timeout(POOL_IDLE)
            // A redirected or repeated submit calls people twice: neither happens below this line.
            .redirect(redirect::Policy::none())
            .retry(retry::never())
            .http1_only()
            // Where requests go is decided by the settings table alone.
            .no_proxy()
            .build()?;
        Ok(Self {
            http,
            base_url: settings.base_url.clone(),
            breaker: Arc::default(),
            words: Words::new(settings.api_key.clone()),
            key_id: key_id(settings.api_key.expose_secret()),
        })
    }

    /// A hash of the API key: tells two keys apart, and gives none away.
    pub fn key_id(&self) -> Uuid {
        self.key_id
    }

    /// What the outcomes of all calls say about the vendor.
    pub fn breaker(&self) -> &Breaker {
        &self.breaker
    }

    /// The smallest read there is: whether the vendor answers, and takes the key.
    pub async fn probe(&self) -> Result<(), Error> {
        let mut url = self.url(&["workspace"]);
        url.query_pairs_mut().append_pair("limit", "1");
        let page = self.page(url).await;
        // Something in between that answers everything with a page of its own is no vendor.
        page.and_then(|(text, _)| match serde_json::from_str::<Page<'_>>(&text) {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::unreadable("it is not a list of batches")),
        })
    }

    /// `POST …/submit`: creates a batch each time it is called.
    pub async fn submit(&self, request: &SubmitRequest) -> Result<Answer, Error> {
        let url = self.url(&["submit"]);
        let request = self.http.request(Method::POST, url).body(request.0.clone());
        self.call(request.header(CONTENT_TYPE, "application/json"), None).await
    }

    /// `GET …/{batch_id}`.
    pub async fn get(&self, id: &BatchId) -> Result<Answer, Error> {
        let url = self.url(&[id.as_str()]);
        self.call(self.http.request(Method::GET, url), Some(id)).await
    }

    /// `POST …/{batch_id}/cancel`.
    pub async fn cancel(&self, id: &BatchId) -> Result<Answer, Error> {
        let url = self.url(&[id.as_str(), "cancel"]);
        self.call(self.http.request(Method::POST, url), Some(id)).await
    }

    /// `GET …/workspace`: one page of the batches of an agent, newest first; as it was answered.
    pub(super) async fn list(
        &self,
        agent_id: &str,
        cursor: Option<&str>,
    ) -> Result<(String, HeaderMap), Error> {
        let mut url = self.url(&["workspace"]);
        url.query_pairs_mut()
            .append_pair("limit", PAGE)
            .append_pair("agent_id", agent_id)
            .extend_pairs(cursor.map(|cursor| ("last_doc", cursor)));
        self.page(url).await
    }

    /// `GET /v1/convai/conversations`: those whose dynamic variable has this marker. A failure proves
    /// nothing, so the breaker does not hear of it.
    pub(super) async fn conversations(&self, marker: &str) -> Option<String> {
        let mut url = self.url_of(&["conversations"]);
        let filter = format!("{COMMAND_ID_VARIABLE}:eq:{marker}");
        url.query_pairs_mut().append_pair("dynamic_variable_params", &filter);
        self.quietly(url).await
    }

    /// `GET /v1/convai/conversations/{conversation_id}`. A failure proves nothing.
    pub(super) async fn conversation(&self, id: &str) -> Option<String> {
        self.quietly(self.url_of(&["conversations", id])).await
    }

    async fn quietly(&self, url: Url) -> Option<String> {
        let (body, ..) = self.read(self.http.request(Method::GET, url)).await.ok()?;
        String::from_utf8(body).ok()
    }

    async fn page(&self, url: Url) -> Result<(String, HeaderMap), Error> {
        let read = self.read(self.http.request(Method::GET, url)).await;
        self.recorded(read.and_then(|(body, _, headers)| match String::from_utf8(body) {
            // What is found in the list becomes a result.
            Ok(text) => Ok((self.unquoted(text), headers)),
            Err(_) => Err(Error::unreadable("it is not UTF-8")),
        }))
    }

    fn unquoted(&self, text: String) -> String {
        let Cow::Owned(masked) = self.words.without_key(&text) else { return text };
        warn!("ElevenLabs' answer quotes the API key; it is masked");
        masked
    }

    fn recorded<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        self.breaker.record(&result);
        result
    }

    fn url(&self, rest: &[&str]) -> Url {
        let mut url = self.url_of(&["batch-calling"]);
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.extend(rest);
        }
        url
    }

    fn url_of(&self, rest: &[&str]) -> Url {
        let mut url = self.base_url.clone();
        // An http URL always has path segments; each one pushed is percent-encoded.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(["v1", "convai"]).extend(rest);
        }
        url
    }

    async fn call(
        &self,
        request: reqwest::RequestBuilder,
        asked_for: Option<&BatchId>,
    ) -> Result<Answer, Error> {
        let read = self.read(request).await;
        self.recorded(read.and_then(|(body, status, headers)| {
            self.answer(body, asked_for).map_err(|reason| Error::Unreadable {
                status,
                reason,
                request_id: error::request_id(&headers, &self.words),
            })
        }))
    }

    fn answer(&self, body: Vec<u8>, asked_for: Option<&BatchId>) -> Result<Answer, String> {
        let text = String::from_utf8(body).map_err(|_| "it is not UTF-8".to_owned())?;
        let data = RawValue::from_string(self.unquoted(text));
        let answer = Answer::read(data.map_err(|_| "it is not JSON".to_owned())?)?;
        if asked_for.is_some_and(|asked| asked.as_str() != answer.batch_id) {
            return Err("it is about another batch than the one asked for".to_owned());
        }
        Ok(answer)
    }

    /// The whole body of a 2xx answer, its status and its headers.
    async fn read(
        &self,
        request: reqwest::RequestBuilder,
    ) -> Result<(Vec<u8>, u16, HeaderMap), Error> {
        let mut response = request.send().await.map_err(Error::of_transport)?;
        let status = response.status().as_u16();
        let headers = std::mem::take(response.headers_mut());
        match (read(&mut response).await, Class::of_status(status)) {
            (Ok(body), None) => Ok((body, status, headers)),
            (Err(reason), None) => {
                let request_id = error::request_id(&headers, &self.words);
                Err(Error::Unreadable { status, reason, request_id })
            }
            (body, Some(class)) => {
                let body = body.unwrap_or_default();
                Err(Error::of_answer(class, status, &headers, &body, &self.words))
            }
        }
    }
}

async fn read(response: &mut reqwest::Response) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) if body.len() + chunk.len() > MAX_ANSWER_BYTES => {
                return Err(format!("it is longer than {MAX_ANSWER_BYTES} bytes"));
            }
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Ok(None) => return Ok(body),
            Err(error) if error.is_timeout() => return Err("it did not end in time".to_owned()),
            Err(_) => return Err("it is cut short".to_owned()),
        }
    }
}

fn key_id(key: &str) -> Uuid {
    short(blake3::derive_key("call-manager 2026 API key", key.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client() -> Client {
        Client::new(&Settings {
            api_key: "secret-key".into(),
            base_url: "http://127.0.0.1:9/base/".parse().unwrap(),
            connect_timeout: Duration::from_secs(1),
            timeout: Duration::from_secs(2),
        })
        .unwrap()
    }

    #[test]
    fn a_batch_id_stays_in_its_path_segment() {
        for hostile in [
            "workspace",
            "submit",
            "../../x",
            "a/b",
            "%2e%2e",
            "a?b=c",
            "a#b",
            "..",
            ".",
            "",
            "ñ",
            "😀",
        ] {
            assert!(BatchId::try_from(hostile.to_owned()).is_err(), "{hostile}");
        }
        let url = client().url(&["btcal_1-a", "cancel"]);
        assert_eq!(url.path(), "/base/v1/convai/batch-calling/btcal_1-a/cancel");
    }

    #[test]
    fn the_api_key_shows_in_no_debug_output() {
        assert!(!format!("{:?}", client()).contains("secret-key"));
    }

    #[test]
    fn an_answer_about_another_batch_is_not_taken() {
        let id = BatchId::try_from("btcal_1".to_owned()).unwrap();
        let answer = |body: &[u8]| client().answer(body.to_vec(), Some(&id));
        assert!(answer(br#"{"id":"btcal_2"}"#).is_err());
        assert!(answer(br#"{"id":"btcal_1"}"#).is_ok());
    }

    #[test]
    fn a_2xx_without_a_batch_is_unreadable() {
        for body in [
            "",
            "null",
            "[]",
            r#"["btcal_1"]"#,
            "{}",
            r#"{"id":7}"#,
            r#"{"id":""}"#,
            r#"{"id":"b""#,
        ] {
            assert!(client().answer(body.into(), None).is_err(), "{body}");
        }
    }

    #[test]
    fn two_keys_have_two_hashes_and_neither_gives_its_key_away() {
        assert_eq!(key_id("sk_1"), key_id("sk_1"));
        assert_ne!(key_id("sk_1"), key_id("sk_2"));
        assert!(!key_id("sk_1").to_string().contains("sk_1"));
    }
}
