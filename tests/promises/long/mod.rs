//! The promises whose proof takes longer than 20 seconds: `script/test --all` runs them.

#[cfg(feature = "crash-points")]
mod poison;
