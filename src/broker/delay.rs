//! How long a command may be deferred for.

use std::fmt;
use std::time::Duration;

/// How long a deferred command rests before it comes back. A ladder of queues, one per length: the
/// broker expires messages only at a queue's head, so different times in one queue would wait for
/// each other.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Delay {
    /// 2 s.
    Short,
    /// 10 s.
    Medium,
    /// 60 s.
    Long,
}

impl Delay {
    /// The ladder, from below.
    pub const ALL: [Self; 3] = [Self::Short, Self::Medium, Self::Long];

    /// The longest that is not longer than `wait`, or the shortest.
    pub fn of(wait: Duration) -> Self {
        let fits = |delay: &Self| delay.duration() <= wait;
        Self::ALL.into_iter().rev().find(fits).unwrap_or(Self::Short)
    }

    /// How long.
    pub const fn duration(self) -> Duration {
        Duration::from_secs(match self {
            Self::Short => 2,
            Self::Medium => 10,
            Self::Long => 60,
        })
    }
}

impl fmt::Display for Delay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s", self.duration().as_secs())
    }
}
