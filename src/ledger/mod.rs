//! What this worker knows about each submit: claimed, settled, or abandoned half-way.

mod memory;

pub use memory::{Claim, Fresh, Held, Memory};
