//! Points at which a test kills the worker, as `ARCHITECTURE.md` numbers them. Only a build with the
//! feature `crash-points` has them.

/// Dies as by `kill -9` where the environment says `CRASH_AT=<number>`.
#[cfg(feature = "crash-points")]
pub fn point(number: u8) {
    use rustix::process::{Signal, getpid, kill_process};

    if std::env::var("CRASH_AT").is_ok_and(|chosen| chosen == number.to_string()) {
        kill_process(getpid(), Signal::KILL).ok();
    }
}

/// Nothing.
#[cfg(not(feature = "crash-points"))]
pub const fn point(_number: u8) {}

/// Dies the same way where the environment says `CRASH_ON=<this message_id>`.
#[cfg(feature = "crash-points")]
pub fn on(message_id: Option<&str>) {
    use rustix::process::{Signal, getpid, kill_process};

    if std::env::var("CRASH_ON").ok().as_deref().is_some_and(|id| Some(id) == message_id) {
        kill_process(getpid(), Signal::KILL).ok();
    }
}

/// Nothing.
#[cfg(not(feature = "crash-points"))]
pub const fn on(_message_id: Option<&str>) {}

/// # Panics
///
/// Where the environment says `PANIC_ON=<this message_id>`.
#[cfg(feature = "crash-points")]
pub fn panic_on(message_id: Option<&str>) {
    let chosen = std::env::var("PANIC_ON").is_ok_and(|id| Some(id.as_str()) == message_id);
    assert!(!chosen, "PANIC_ON names this command");
}

/// Nothing.
#[cfg(not(feature = "crash-points"))]
pub const fn panic_on(_message_id: Option<&str>) {}
