//! The vendor's health as the handler sees it: waits for it, asks about the key, probes it.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::domain::command::CommandKind;
use crate::elevenlabs::{Class, Error, State};
use crate::retry::Policy;
use crate::telemetry::chain;

use super::Handler;
use super::turn::{Clearance, Turn};

/// How often to ask a vendor that cannot be used whether it can, unless it has said when.
const PROBING: Policy =
    Policy { initial: Duration::from_millis(500), max: Duration::from_secs(2), horizon: None };

/// How long the first question may take: what answers later is found out by the next one.
const FIRST_LIMIT: Duration = Duration::from_secs(3);

/// What has worked so long was no flicker: the next outage is probed quickly again.
const STABLE_AFTER: Duration = Duration::from_secs(30);

/// What the vendor thinks of the worker's key.
pub enum Key {
    /// It was this one request that the key is not good for.
    Accepted,
    Refused,
    /// It could not be asked.
    Unknown,
}

impl Handler {
    /// Waits until the command may call the vendor, or for as long as it may wait in hand.
    pub(super) async fn clearance(
        &self,
        kind: CommandKind,
        turn: &Turn,
        stop: &CancellationToken,
    ) -> Clearance {
        let mut vendor = self.vendor.breaker().watch();
        loop {
            if stop.is_cancelled() {
                return Clearance::Stopped;
            }
            let limit = match turn.may_call(kind, &vendor.borrow_and_update()) {
                ControlFlow::Break(clearance) => return clearance,
                ControlFlow::Continue(limit) => limit,
            };
            tokio::select! {
                changed = vendor.changed() => if changed.is_err() { return Clearance::Stopped },
                () = tokio::time::sleep(limit) => {}
                () = stop.cancelled() => {}
            }
        }
    }

    /// After a 401 or a 403: whether it is the key as such. Then the breaker opens.
    pub(super) async fn key(&self) -> Key {
        match self.vendor.probe().await {
            Ok(()) => Key::Accepted,
            Err(error) => match error.class() {
                Class::Unauthorized => {
                    self.vendor.breaker().open(&error);
                    Key::Refused
                }
                Class::Refused | Class::Account => Key::Accepted,
                Class::NeverSent | Class::RateLimited | Class::Unknown => Key::Unknown,
            },
        }
    }

    /// Asks ElevenLabs once, before the first command is taken. Where it does not answer as ElevenLabs
    /// does, the breaker opens, and says why.
    pub async fn ask_first(&self, stop: &CancellationToken) {
        let asked = tokio::select! {
            asked = timeout(FIRST_LIMIT, self.vendor.probe()) => asked,
            () = stop.cancelled() => return,
        };
        match asked {
            // A refusal for another reason than the key is an answer of ElevenLabs.
            Ok(Err(error)) if !matches!(error.class(), Class::Refused | Class::Account) => {
                warn!(
                    error = chain(&error),
                    "ElevenLabs cannot be used; no commands are taken yet"
                );
                self.vendor.breaker().open(&error);
            }
            Ok(Ok(()) | Err(_)) => {}
            Err(_) => {
                let error = Error::too_slow();
                warn!(
                    error = chain(&error),
                    "ElevenLabs cannot be used; no commands are taken yet"
                );
                self.vendor.breaker().open(&error);
            }
        }
    }

    /// Probes the vendor, with a read, whenever the breaker is open; does not end. Somebody else
    /// closes it, when the cancels that waited are through.
    pub async fn probe(&self) {
        let breaker = self.vendor.breaker();
        let mut state = breaker.watch();
        let mut pace = PROBING.start();
        let mut worked_since: Option<Instant> = None;
        loop {
            let asked = match &*state.borrow_and_update() {
                State::Open(outage) => Some(outage.asks_for()),
                State::HalfOpen | State::Closed => None,
            };
            let Some(asked) = asked else {
                if state.changed().await.is_err() {
                    return;
                }
                continue;
            };
            if worked_since.take().is_some_and(|since| since.elapsed() > STABLE_AFTER) {
                pace = PROBING.start();
            }
            tokio::time::sleep(pace.next_wait(Some(asked)).unwrap_or(asked)).await;
            // Another answer may have asked for more meanwhile.
            if matches!(&*state.borrow(), State::Open(outage) if !outage.asks_for().is_zero()) {
                continue;
            }
            match self.vendor.probe().await {
                // A refusal for another reason than the key is an answer.
                Err(error) if !matches!(error.class(), Class::Refused | Class::Account) => {
                    breaker.open(&error);
                    info!(error = chain(&error), "ElevenLabs cannot be used yet");
                }
                Ok(()) | Err(_) => {
                    warn!("ElevenLabs can be used again");
                    worked_since = Some(Instant::now());
                    breaker.half_open();
                }
            }
        }
    }
}
