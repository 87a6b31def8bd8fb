//! The contract in types: what a command is, why one is refused, what a result says. Pure: no I/O.

mod canonical;
pub mod command;
mod earlier;
pub mod result;
mod spelling;
mod validation;

use uuid::Uuid;

pub use earlier::Earlier;
pub use spelling::misspelt;
pub use validation::{Rejection, excerpt, printable};

/// The first half of a hash, as the id that ledgers keep.
pub fn short(hash: [u8; 32]) -> Uuid {
    let (first, _) = hash.split_at(16);
    Uuid::from_slice(first).unwrap_or_default()
}
