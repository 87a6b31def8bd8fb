//! What all connections share; each part behind its own lock, and no lock held across an await.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::clock::Clock;
use crate::fault::FaultQueue;
use crate::observe::RequestLog;
use crate::server::Options;
use crate::store::Store;

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) api_key: String,
    pub(crate) connections: AtomicUsize,
    pub(crate) in_flight: AtomicUsize,
    store: Mutex<Store>,
    faults: Mutex<FaultQueue>,
    log: Mutex<RequestLog>,
}

impl State {
    pub(crate) fn new(options: &Options) -> Self {
        Self {
            api_key: options.api_key.clone(),
            connections: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            store: Mutex::new(Store::new(Clock::new(options.speed), options.list_lag)),
            faults: Mutex::default(),
            log: Mutex::default(),
        }
    }

    pub(crate) fn store(&self) -> MutexGuard<'_, Store> {
        lock(&self.store)
    }

    pub(crate) fn faults(&self) -> MutexGuard<'_, FaultQueue> {
        lock(&self.faults)
    }

    pub(crate) fn log(&self) -> MutexGuard<'_, RequestLog> {
        lock(&self.log)
    }

    /// Counts a request in flight until the guard goes.
    pub(crate) fn enter(&self) -> InFlight<'_> {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(&self.in_flight)
    }
}

/// A request in flight.
pub(crate) struct InFlight<'a>(&'a AtomicUsize);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A panic elsewhere must not turn into one in every later request.
fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}
