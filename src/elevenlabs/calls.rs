//! Searches the calls that were made for one of a submit in doubt: it proves that the batch exists.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::domain::command::{BatchId, marker};

use super::client::{Answer, Client};
use super::evidence::{SearchKey, marker_in};
use super::reconcile::Finder;

/// How many conversations are read. The filter leaves those of one submit; an API that does not know
/// it gives everybody's.
const READ: usize = 5;

/// What the calls say of a submit's batch.
#[derive(Debug)]
pub enum Called {
    /// A call of it was made, and names it. `data` is the batch as a get gives it.
    Batch(Answer),
    /// A call of it was made, and its batch cannot be read.
    Somewhere,
    /// Nothing: calls may not have been placed yet.
    Nothing,
}

#[derive(Deserialize)]
struct Conversations {
    conversations: Vec<Conversation>,
}

#[derive(Deserialize)]
struct Conversation {
    conversation_id: String,
}

#[derive(Deserialize)]
struct Detail<'a> {
    #[serde(borrow, default)]
    conversation_initiation_client_data: Option<&'a RawValue>,
    #[serde(default)]
    metadata: Option<Metadata>,
}

#[derive(Deserialize)]
struct Metadata {
    #[serde(default)]
    batch_call: Option<BatchCall>,
}

#[derive(Deserialize)]
struct BatchCall {
    #[serde(default)]
    batch_call_id: Option<String>,
}

impl Finder {
    /// Searches the calls. Whatever fails there proves nothing.
    pub async fn conversation(&self, key: &SearchKey) -> Called {
        let marker = marker(&key.command_id);
        let Some(listed) = self.vendor.conversations(&marker).await else { return Called::Nothing };
        let Ok(listed) = serde_json::from_str::<Conversations>(&listed) else {
            return Called::Nothing;
        };
        for Conversation { conversation_id } in listed.conversations.iter().take(READ) {
            if let Some(batch) = batch_of(&self.vendor, conversation_id, &marker).await {
                return self.read_batch(batch).await;
            }
        }
        Called::Nothing
    }

    async fn read_batch(&self, batch: Option<String>) -> Called {
        let Some(id) = batch.and_then(|id| BatchId::try_from(id).ok()) else {
            return Called::Somewhere;
        };
        self.vendor.get(&id).await.map_or(Called::Somewhere, Called::Batch)
    }
}

/// Of a conversation that carries the marker, the batch that it names, if it does.
async fn batch_of(vendor: &Client, conversation: &str, marker: &str) -> Option<Option<String>> {
    let text = vendor.conversation(conversation).await?;
    let detail: Detail<'_> = serde_json::from_str(&text).ok()?;
    let shown = detail.conversation_initiation_client_data.and_then(marker_in)?;
    shown
        .eq_ignore_ascii_case(marker)
        .then(|| detail.metadata.and_then(|metadata| metadata.batch_call?.batch_call_id))
}
