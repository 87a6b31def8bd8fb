//! What all connections share; each part behind its own lock, and no lock held across an await.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;

use crate::clock::Clock;
use crate::fault::FaultQueue;
use crate::observe::RequestLog;
use crate::route::Route;
use crate::server::Options;
use crate::store::Store;

#[derive(Debug)]
pub(crate) struct State {
    /// Each key with its workspace.
    keys: Vec<(String, usize)>,
    pub(crate) connections: AtomicUsize,
    pub(crate) in_flight: AtomicUsize,
    store: Mutex<Store>,
    faults: Mutex<FaultQueue>,
    log: Mutex<RequestLog>,
    distortion: Mutex<Option<Distortion>>,
}

/// Changes the JSON of an answer before it is sent.
#[derive(Clone)]
pub(crate) struct Distortion(pub(crate) Arc<Change>);

pub(crate) type Change = dyn Fn(Route, &mut Value) + Send + Sync;

impl fmt::Debug for Distortion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Distortion")
    }
}

impl State {
    pub(crate) fn new(options: &Options) -> Self {
        Self {
            keys: keys(options),
            connections: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            store: Mutex::new(Store::new(Clock::new(options.speed), options.list_lag)),
            faults: Mutex::default(),
            log: Mutex::default(),
            distortion: Mutex::default(),
        }
    }

    pub(crate) fn store(&self) -> MutexGuard<'_, Store> {
        lock(&self.store)
    }

    pub(crate) fn faults(&self) -> MutexGuard<'_, FaultQueue> {
        lock(&self.faults)
    }

    /// The workspace of a key.
    pub(crate) fn workspace(&self, key: &[u8]) -> Option<usize> {
        let mut keys = self.keys.iter();
        keys.find(|(known, _)| known.as_bytes() == key).map(|(_, workspace)| *workspace)
    }

    pub(crate) fn distortion(&self) -> MutexGuard<'_, Option<Distortion>> {
        lock(&self.distortion)
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

/// The first workspace has the key of the options and those it was rotated with.
fn keys(options: &Options) -> Vec<(String, usize)> {
    let first = std::iter::once(&options.api_key).chain(&options.rotated_keys);
    let first = first.map(|key| (key.clone(), 0));
    let others = options.other_keys.iter().enumerate();
    first.chain(others.map(|(index, key)| (key.clone(), index + 1))).collect()
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
