//! The vendor's database: every batch ever created, and what the operations do to them.

use std::collections::HashMap;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::answer::Refusal;
use crate::body::{NewRecipient, Submit};
use crate::clock::{Clock, unix_now};
use crate::life::{BatchStatus, Life};
use crate::observe::{Batch, Recipient};
use crate::wire::{
    BatchCall, CallRecipient, Conversation, ConversationDetail, Conversations, EXTRA, Page,
};

const AGENT_NAME: &str = "Sandbox agent";

#[derive(Debug)]
pub(crate) struct Store {
    clock: Clock,
    list_lag: Duration,
    records: Vec<Record>,
    by_id: HashMap<String, usize>,
}

#[derive(Debug)]
struct Record {
    id: String,
    submit: Submit,
    life: Life,
    created_at_unix: i64,
    /// The clocks' times when it was created.
    born: Duration,
    entered: Duration,
    deleted: bool,
    workspace: usize,
}

impl Store {
    pub(crate) fn new(clock: Clock, list_lag: Duration) -> Self {
        Self { clock, list_lag, records: Vec::new(), by_id: HashMap::new() }
    }

    /// Since a batch was created.
    pub(crate) fn age(&self, id: &str) -> Option<Duration> {
        let record = &self.records[*self.by_id.get(id)?];
        Some(self.clock.wall().saturating_sub(record.entered))
    }

    pub(crate) fn advance(&mut self, by: Duration) {
        self.clock.advance(by);
    }

    pub(crate) fn create(
        &mut self,
        submit: Submit,
        workspace: usize,
    ) -> Result<BatchCall<'_>, Refusal> {
        if submit.agent_id.starts_with("agent_missing") {
            let message = format!("Agent {} was not found.", submit.agent_id);
            return Err(Refusal::not_found("agent_not_found", message));
        }
        if let Some(number) = &submit.agent_phone_number_id
            && number.starts_with("phnum_missing")
        {
            let message = format!("Phone number {number} was not found.");
            return Err(Refusal::not_found("phone_number_not_found", message));
        }
        let created_at_unix = unix_now();
        // A time that is past, like none, is due at once.
        let due = submit.scheduled_time_unix.map_or(0, |at| at.saturating_sub(created_at_unix));
        let life = Life::new(
            submit.recipients.iter().map(NewRecipient::number),
            Duration::from_secs(u64::try_from(due).unwrap_or(0)),
            Duration::from_secs(submit.telephony_call_config.ringing_timeout_secs),
            submit.target_concurrency_limit,
        );
        let id = format!("btcal_{}", Uuid::new_v4().simple());
        let at = self.records.len();
        self.by_id.insert(id.clone(), at);
        self.records.push(Record {
            id,
            submit,
            life,
            created_at_unix,
            born: self.clock.life(),
            entered: self.clock.wall(),
            deleted: false,
            workspace,
        });
        Ok(self.records[at].summary(&self.clock))
    }

    pub(crate) fn get(&self, id: &str, workspace: usize) -> Result<BatchCall<'_>, Refusal> {
        let record = &self.records[self.find(id, workspace)?];
        let recipients = Some(record.recipients(&self.clock));
        Ok(BatchCall { recipients, ..record.summary(&self.clock) })
    }

    // What the vendor answers to a cancel of a batch that has ended is not documented: a refusal
    // that names the state is the strictest thing a client may have to live with.
    pub(crate) fn cancel(&mut self, id: &str, workspace: usize) -> Result<BatchCall<'_>, Refusal> {
        let at = self.find(id, workspace)?;
        let age = self.records[at].age(&self.clock);
        let ended = match self.records[at].life.progress(age).status {
            BatchStatus::Pending | BatchStatus::InProgress => None,
            BatchStatus::Cancelled => Some(("already_cancelled", "is already cancelled")),
            BatchStatus::Completed => Some(("already_completed", "is already completed")),
            BatchStatus::Failed => Some(("already_failed", "has already failed")),
        };
        if let Some((code, what)) = ended {
            return Err(Refusal::bad_request(code, format!("Batch call {id} {what}.")));
        }
        self.records[at].life.cancel(age);
        Ok(self.records[at].summary(&self.clock))
    }

    // Not documented either: when a batch may be retried, and what happens when nobody is left to
    // call. The sandbox wants an ended batch with somebody to call.
    pub(crate) fn retry(&mut self, id: &str, workspace: usize) -> Result<BatchCall<'_>, Refusal> {
        let at = self.find(id, workspace)?;
        let record = &mut self.records[at];
        let age = record.age(&self.clock);
        if !matches!(record.life.progress(age).status, BatchStatus::Completed | BatchStatus::Failed)
        {
            let message = format!("Batch call {id} has not run to its end, so it has no retry.");
            return Err(Refusal::bad_request("batch_call_not_finished", message));
        }
        let recipients = &record.submit.recipients;
        if !record.life.retry(age, |index| recipients[index].number()) {
            let message = format!("Batch call {id} has nobody left to call again.");
            return Err(Refusal::bad_request("nothing_to_retry", message));
        }
        Ok(self.records[at].summary(&self.clock))
    }

    pub(crate) fn delete(&mut self, id: &str, workspace: usize) -> Result<(), Refusal> {
        let at = self.find(id, workspace)?;
        self.records[at].deleted = true;
        Ok(())
    }

    /// The recipients of a batch that has ended.
    pub(crate) fn export(
        &self,
        id: &str,
        workspace: usize,
    ) -> Result<Vec<CallRecipient<'_>>, Refusal> {
        let record = &self.records[self.find(id, workspace)?];
        let status = record.life.progress(record.age(&self.clock)).status;
        if matches!(status, BatchStatus::Pending | BatchStatus::InProgress) {
            let message = format!("Batch call {id} has not ended, so it has no export yet.");
            return Err(Refusal::bad_request("batch_call_not_finished", message));
        }
        Ok(record.recipients(&self.clock))
    }

    /// A page of the batches, newest first, from behind the one that `last_doc` names.
    pub(crate) fn list(
        &self,
        limit: usize,
        last_doc: Option<&str>,
        agent_id: Option<&str>,
        workspace: usize,
    ) -> Result<Page<'_>, Refusal> {
        let end = match last_doc {
            None => self.records.len(),
            // A cursor outlives its batch, so deleted ones are found too.
            Some(id) => *self.by_id.get(id).ok_or_else(|| {
                Refusal::bad_request("invalid_cursor", format!("last_doc {id} is no cursor."))
            })?,
        };
        let now = self.clock.wall();
        let mut shown = self.records[..end].iter().rev().filter(|record| {
            record.is_seen_by(workspace)
                && now.saturating_sub(record.entered) >= self.list_lag
                && agent_id.is_none_or(|agent| agent == record.submit.agent_id)
        });
        let batches: Vec<&Record> = shown.by_ref().take(limit).collect();
        let has_more = shown.next().is_some();
        Ok(Page {
            next_doc: batches.last().filter(|_| has_more).map(|record| record.id.as_str()),
            batch_calls: batches.iter().map(|record| record.summary(&self.clock)).collect(),
            has_more,
        })
    }

    /// The calls that were placed, of everybody whose dynamic variable has this value.
    pub(crate) fn conversations(
        &self,
        filter: Option<(&str, &str)>,
        workspace: usize,
    ) -> Conversations<'_> {
        let placed = self.placed(workspace).filter(|placed| {
            filter.is_none_or(|(name, value)| {
                placed.variables.get(name).and_then(Value::as_str) == Some(value)
            })
        });
        let conversations = placed.map(|placed| placed.conversation).collect();
        Conversations { conversations, next_cursor: None, has_more: false }
    }

    pub(crate) fn conversation(
        &self,
        id: &str,
        workspace: usize,
    ) -> Result<ConversationDetail<'_>, Refusal> {
        let placed =
            self.placed(workspace).find(|placed| placed.conversation.conversation_id == id);
        let Some(Placed { conversation, batch_id, recipient_id, variables }) = placed else {
            let message = format!("Conversation {id} was not found.");
            return Err(Refusal::not_found("conversation_not_found", message));
        };
        Ok(ConversationDetail::new(conversation, batch_id, recipient_id, variables))
    }

    fn placed(&self, workspace: usize) -> impl Iterator<Item = Placed<'_>> {
        let records = self.records.iter().filter(move |record| record.workspace == workspace);
        records.flat_map(|record| {
            let recipients = record.recipients(&self.clock).into_iter();
            recipients.zip(&record.submit.recipients).filter_map(|(shown, submitted)| {
                let conversation = Conversation {
                    agent_id: &record.submit.agent_id,
                    conversation_id: shown.conversation_id?,
                    status: shown.status,
                };
                let variables = submitted.dynamic_variables();
                let recipient_id = shown.id;
                Some(Placed { conversation, batch_id: &record.id, recipient_id, variables })
            })
        })
    }

    pub(crate) fn batches(&self) -> Vec<Batch> {
        self.records.iter().map(|record| record.seen(&self.clock)).collect()
    }

    fn find(&self, id: &str, workspace: usize) -> Result<usize, Refusal> {
        self.by_id.get(id).copied().filter(|at| self.records[*at].is_seen_by(workspace)).ok_or_else(
            || {
                Refusal::not_found(
                    "batch_call_not_found",
                    format!("Batch call {id} was not found."),
                )
            },
        )
    }
}

/// A call that was placed.
struct Placed<'a> {
    conversation: Conversation<'a>,
    batch_id: &'a str,
    recipient_id: String,
    variables: Map<String, Value>,
}

impl Record {
    fn is_seen_by(&self, workspace: usize) -> bool {
        !self.deleted && self.workspace == workspace
    }

    fn age(&self, clock: &Clock) -> Duration {
        clock.life().saturating_sub(self.born)
    }

    fn unix_at(&self, age: Duration) -> i64 {
        self.created_at_unix.saturating_add_unsigned(age.as_secs())
    }

    fn summary(&self, clock: &Clock) -> BatchCall<'_> {
        let progress = self.life.progress(self.age(clock));
        let submit = &self.submit;
        BatchCall {
            id: &self.id,
            phone_number_id: submit.agent_phone_number_id.as_deref(),
            phone_provider: submit.agent_phone_number_id.as_deref().map(provider),
            whatsapp_params: submit.whatsapp_params.as_deref(),
            name: &submit.call_name,
            agent_id: &submit.agent_id,
            branch_id: submit.branch_id.as_deref(),
            environment: submit.environment.as_deref(),
            created_at_unix: self.created_at_unix,
            scheduled_time_unix: submit.scheduled_time_unix.unwrap_or(self.created_at_unix),
            timezone: submit.timezone.as_deref(),
            total_calls_dispatched: progress.dispatched,
            total_calls_scheduled: progress.scheduled,
            total_calls_finished: progress.finished,
            last_updated_at_unix: self.unix_at(progress.since),
            status: progress.status,
            retry_count: self.life.retry_count,
            telephony_call_config: &submit.telephony_call_config,
            target_concurrency_limit: submit.target_concurrency_limit,
            agent_name: AGENT_NAME,
            branch_name: None,
            sandbox_extra: EXTRA,
            recipients: None,
        }
    }

    fn recipients(&self, clock: &Clock) -> Vec<CallRecipient<'_>> {
        let age = self.age(clock);
        let each = self.submit.recipients.iter().enumerate();
        each.map(|(index, recipient)| {
            let now = self.life.call(index, age);
            CallRecipient {
                id: self.recipient_id(index),
                phone_number: recipient.phone_number.as_deref(),
                whatsapp_user_id: recipient.whatsapp_user_id.as_deref(),
                status: now.status,
                created_at_unix: self.created_at_unix,
                updated_at_unix: self.unix_at(now.since),
                conversation_id: now
                    .conversation
                    .map(|attempt| format!("conv_{}_{index}_{attempt}", self.key())),
                conversation_initiation_client_data: recipient
                    .conversation_initiation_client_data
                    .as_deref(),
            }
        })
        .collect()
    }

    /// The id that was sent, or one made from the batch's, which needs no place to be kept.
    fn recipient_id(&self, index: usize) -> String {
        match &self.submit.recipients[index].id {
            Some(id) => id.to_string(),
            None => format!("rcpt_{}_{index}", self.key()),
        }
    }

    fn key(&self) -> &str {
        self.id.trim_start_matches("btcal_")
    }

    fn seen(&self, clock: &Clock) -> Batch {
        let age = self.age(clock);
        let each = self.submit.recipients.iter().enumerate();
        Batch {
            id: self.id.clone(),
            name: self.submit.call_name.clone(),
            agent_id: self.submit.agent_id.clone(),
            phone_number_id: self.submit.agent_phone_number_id.clone(),
            status: self.life.progress(age).status,
            retry_count: self.life.retry_count,
            deleted: self.deleted,
            created_at_unix: self.created_at_unix,
            scheduled_time_unix: self.submit.scheduled_time_unix.unwrap_or(self.created_at_unix),
            recipients: each
                .map(|(index, recipient)| Recipient {
                    id: self.recipient_id(index),
                    phone_number: recipient.phone_number.as_deref().map(str::to_owned),
                    status: self.life.call(index, age).status,
                    dynamic_variables: recipient.dynamic_variables(),
                })
                .collect(),
        }
    }
}

impl NewRecipient {
    fn number(&self) -> Option<&str> {
        self.phone_number.as_deref()
    }

    fn dynamic_variables(&self) -> Map<String, Value> {
        #[derive(Deserialize)]
        struct ClientData {
            dynamic_variables: Map<String, Value>,
        }
        let data = self.conversation_initiation_client_data.as_deref();
        data.and_then(|data| serde_json::from_str::<ClientData>(data.get()).ok())
            .map(|data| data.dynamic_variables)
            .unwrap_or_default()
    }
}

/// The vendor knows a number's provider from its import; here the number's id says it.
fn provider(number_id: &str) -> &'static str {
    if number_id.contains("sip") {
        "sip_trunk"
    } else if number_id.contains("exotel") {
        "exotel"
    } else {
        "twilio"
    }
}
