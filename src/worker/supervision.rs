//! Watches over one generation of a lane: what its connections say, and what the broker answers when asked.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::broker::{Change, Deferral, Events, PULSE, Pulse};
use crate::domain::command::CommandKind;
use crate::health::Part;

use super::{Link, Worker};

/// Between two looks whether the cancels are through.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// What a worker had in hand whose machine is gone is with nobody until RabbitMQ misses its heartbeats.
/// Queues that are empty before that prove nothing.
const LIMBO: Duration = Duration::from_secs(60);

impl Worker {
    /// Watches over one generation until it is lost; returns why.
    pub(super) async fn supervise(
        &self,
        events: &mut Events,
        pulse: &Pulse,
        link: &Link,
    ) -> String {
        let own = async {
            match link.kind {
                CommandKind::Cancel => tokio::select! {
                    reason = self.let_cancels_through(pulse) => reason,
                    never = self.finish(link) => never,
                },
                CommandKind::Submit | CommandKind::Get => std::future::pending().await,
            }
        };
        tokio::select! {
            reason = self.watch(events, link.kind) => reason,
            reason = self.ask(pulse, link) => reason,
            reason = own => reason,
        }
    }

    /// Asks now and then, since nothing tells of a consumer that is not there any more, and not
    /// always of a connection.
    async fn ask(&self, pulse: &Pulse, link: &Link) -> String {
        let intake = self.shared.intake();
        let began = Instant::now();
        let mut unconsumed = Vec::new();
        let mut may_be_drained = link.kind == CommandKind::Submit;
        let mut is_stuck = false;
        if let Err(reason) = pulse.publish().await {
            return reason;
        }
        link.note_confirm();
        loop {
            tokio::time::sleep(PULSE).await;
            if may_be_drained && began.elapsed() >= LIMBO && self.no_submit_waits(pulse).await {
                self.shared.handler.note_drained().await;
                may_be_drained = false;
            }
            match pulse.check(intake.takes(link.kind)).await {
                Ok(found) => {
                    // Once may be a moment between resting and resuming.
                    if let Some(name) = found.iter().find(|name| unconsumed.contains(*name)) {
                        return format!("the queue {name} has no consumer any more");
                    }
                    unconsumed = found;
                }
                Err(reason) => return reason,
            }
            // The lanes share the delay queues: one watches for all.
            if link.kind == CommandKind::Cancel {
                match pulse.deferral().await {
                    Ok(found) => self.tell_deferral(found, &mut is_stuck),
                    Err(reason) => return reason,
                }
            }
        }
    }

    /// Whether no submit is in this worker's hands or in a queue.
    async fn no_submit_waits(&self, pulse: &Pulse) -> bool {
        // The lane of gets executes those that came by way of the unknown.
        let is_idle = || self.is_idle(CommandKind::Submit) && self.is_idle(CommandKind::Get);
        // Asked twice: one may have been delivered while the broker was asked.
        is_idle() && pulse.waiting_submits().await == Ok(0) && is_idle()
    }

    /// Tells of what is deferred and does not come back; in the log once.
    fn tell_deferral(&self, found: Deferral, is_stuck: &mut bool) {
        let readiness = &self.shared.readiness;
        match found {
            // On its way: nothing is known that was not known before.
            Deferral::Unknown => {}
            Deferral::Works | Deferral::Unwatched => {
                readiness.good(Part::Deferral);
                if std::mem::take(is_stuck) {
                    info!("deferred commands come back again");
                }
            }
            Deferral::Stuck(reason) => {
                if !std::mem::replace(is_stuck, true) {
                    warn!(reason, "deferred commands may stay where they are");
                }
                readiness.wrong(Part::Deferral, reason);
            }
        }
    }

    /// When the vendor is back: closes the breaker once the cancels that waited are through.
    async fn let_cancels_through(&self, pulse: &Pulse) -> String {
        let mut intake = self.shared.intake();
        let mut idle = 0;
        loop {
            intake.half_open().await;
            match pulse.ready().await {
                Ok(0) if self.is_idle(CommandKind::Cancel) => idle += 1,
                Ok(_) => idle = 0,
                Err(reason) => return reason,
            }
            if idle == 2 {
                self.shared.handler.breaker().close();
                idle = 0;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Whether no such command is in hand.
    fn is_idle(&self, kind: CommandKind) -> bool {
        self.shared.in_hand[kind as usize].is_empty()
    }

    /// Follows the connections until one is lost; returns why. During an alarm, what is in hand
    /// waits for its confirm.
    async fn watch(&self, events: &mut Events, kind: CommandKind) -> String {
        let publisher = Part::Publisher(kind);
        loop {
            match events.next().await {
                Change::Blocked(reason) => {
                    let command = kind.name();
                    warn!(
                        command,
                        reason, "the broker takes no messages (memory or disk alarm); waiting"
                    );
                    let reason = format!("the broker takes no messages: {reason}");
                    self.shared.readiness.wrong(publisher, reason);
                }
                Change::Unblocked => {
                    info!(command = kind.name(), "the broker takes messages again");
                    self.shared.readiness.good(publisher);
                }
                Change::Lost(reason) => return reason,
            }
        }
    }
}
