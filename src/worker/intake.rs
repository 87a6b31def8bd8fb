//! Whether fresh commands are taken: not while ElevenLabs or the ledger cannot be used, and submits not
//! while they are held for the account.

use tokio::sync::watch;

use crate::domain::command::CommandKind;
use crate::handler::{AccountWatch, Handler, VendorState as State};

/// Follows what commands need.
#[derive(Clone)]
pub struct Intake {
    vendor: watch::Receiver<State>,
    account: AccountWatch,
    ledger: watch::Receiver<Option<String>>,
}

impl Intake {
    /// Of what this handler calls.
    pub fn new(handler: &Handler) -> Self {
        let vendor = handler.breaker().watch();
        Self { vendor, account: handler.account(), ledger: handler.ledger_trouble() }
    }

    /// Whether fresh commands of this kind are taken.
    pub fn takes(&self, kind: CommandKind) -> bool {
        // Only a submit needs credits, and the ledger.
        let may_submit = || self.account.takes() && self.ledger.borrow().is_none();
        self.vendor.borrow().lets_through(kind) && (kind != CommandKind::Submit || may_submit())
    }

    /// Why ElevenLabs cannot be used, if for submits alone.
    pub fn vendor(&self) -> Option<String> {
        match &*self.vendor.borrow() {
            State::Closed => self.account.reason(),
            State::HalfOpen => Some("answers again; cancels go first".to_owned()),
            State::Open(outage) => Some(outage.reason.clone()),
        }
    }

    /// Why the ledger cannot be written.
    pub fn ledger(&self) -> Option<String> {
        self.ledger.borrow().clone()
    }

    /// Returns at the next change; never where who could change it is gone.
    pub async fn changed(&mut self) {
        let changed = tokio::select! {
            changed = self.vendor.changed() => changed,
            changed = self.ledger.changed() => changed,
            () = self.account.changed() => Ok(()),
        };
        if changed.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Returns when the vendor has just been found to answer again.
    pub async fn half_open(&mut self) {
        let is_half_open = |state: &State| matches!(state, State::HalfOpen);
        if self.vendor.wait_for(is_half_open).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
