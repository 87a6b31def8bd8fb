//! The contract in types: what a command is, why one is refused, what a result says. Pure: no I/O.

pub mod command;
mod earlier;
pub mod result;
mod validation;

pub use earlier::Earlier;
pub use validation::{Rejection, excerpt, printable};
