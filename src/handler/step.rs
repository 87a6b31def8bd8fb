//! What a submit does next. Pure: the model of the rules runs it too.

use std::time::Duration;

/// What is known of a submit that this task has claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(clippy::struct_excessive_bools, reason = "five questions, each with its own answer")]
pub struct Standing {
    /// A request may have been done although its outcome is not known.
    pub in_doubt: bool,
    /// A cancel by its command id came.
    pub struck: bool,
    /// It is not to be begun any more: `not_after` or `expiration` has passed.
    pub expired: bool,
    /// Its body is there. Without its message, a submit can only be finished.
    pub has_body: bool,
    /// The horizon is over, and this task has had its attempt.
    pub spent: bool,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// Search for the batch that an earlier request may have created.
    Search,
    /// Send it.
    Send,
    /// Record that nothing was created.
    End(Reason),
}

/// Why a submit ends without a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// It was cancelled in advance.
    Struck,
    /// Its time has passed.
    Expired,
    /// Its message does not come back.
    MessageGone,
    /// ElevenLabs was unavailable until the horizon.
    Unavailable,
}

/// Nothing is decided while a request is in doubt.
pub const fn next(standing: Standing) -> Step {
    if standing.in_doubt {
        Step::Search
    } else if standing.struck {
        Step::End(Reason::Struck)
    } else if standing.expired {
        Step::End(Reason::Expired)
    } else if !standing.has_body {
        Step::End(Reason::MessageGone)
    } else if standing.spent {
        Step::End(Reason::Unavailable)
    } else {
        Step::Send
    }
}

/// What one reading of ElevenLabs' list has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sight {
    /// The batch.
    Batch,
    /// Every batch that it could be was ruled out by evidence.
    Absent,
    /// A batch that it could be, without evidence for it or against it.
    Undecided,
    /// Not enough to tell.
    Unreadable,
}

/// What is known besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Reading {
    /// What it has shown.
    pub sight: Sight,
    /// How long every request had been over when the reading began; zero while one may run.
    pub quiet: Duration,
    /// The API key sees the batches of every key that an attempt was made with.
    pub sees_all_keys: bool,
    /// There is time for another reading of a list that cannot be read, or of a batch that may show more
    /// of itself.
    pub has_time: bool,
}

/// What a reading decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The batch exists.
    Found,
    /// Too early to tell, or not readable: read again.
    ReadAgain,
    /// It was not created.
    NotCreated,
    /// Nobody can tell; it is never sent again.
    Unknown,
}

/// Absence needs proof: a reading that began when every request had been over for `window`, that saw
/// everything, and was made with a key that sees what it has to.
pub fn verdict(reading: Reading, window: Duration) -> Verdict {
    let is_late_enough = reading.quiet >= window;
    match reading.sight {
        Sight::Batch => Verdict::Found,
        Sight::Absent | Sight::Undecided if !is_late_enough => Verdict::ReadAgain,
        Sight::Absent if reading.sees_all_keys => Verdict::NotCreated,
        Sight::Undecided | Sight::Unreadable if reading.has_time => Verdict::ReadAgain,
        Sight::Absent | Sight::Undecided | Sight::Unreadable => Verdict::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_secs(60);

    fn standing(change: impl FnOnce(&mut Standing)) -> Step {
        let mut standing = Standing {
            in_doubt: false,
            struck: false,
            expired: false,
            has_body: true,
            spent: false,
        };
        change(&mut standing);
        next(standing)
    }

    #[test]
    fn nothing_is_sent_or_ended_while_a_request_is_in_doubt() {
        assert_eq!(standing(|_| {}), Step::Send);
        let all = |s: &mut Standing| {
            (s.struck, s.expired, s.has_body, s.spent) = (true, true, false, true);
        };
        assert_eq!(standing(|s| (all(s), s.in_doubt = true).0), Step::Search);
        assert_eq!(standing(all), Step::End(Reason::Struck));
        assert_eq!(standing(|s| s.expired = true), Step::End(Reason::Expired));
        assert_eq!(standing(|s| s.has_body = false), Step::End(Reason::MessageGone));
        assert_eq!(standing(|s| s.spent = true), Step::End(Reason::Unavailable));
    }

    fn read(sight: Sight, quiet: Duration, sees_all_keys: bool, has_time: bool) -> Verdict {
        verdict(Reading { sight, quiet, sees_all_keys, has_time }, WINDOW)
    }

    #[test]
    fn only_a_late_reading_with_the_right_key_proves_absence() {
        let early = Duration::from_millis(59_999);
        assert_eq!(read(Sight::Absent, WINDOW, true, true), Verdict::NotCreated);
        assert_eq!(read(Sight::Absent, early, true, true), Verdict::ReadAgain);
        assert_eq!(read(Sight::Absent, WINDOW, false, true), Verdict::Unknown);
        for has_time in [true, false] {
            assert_eq!(read(Sight::Undecided, early, true, has_time), Verdict::ReadAgain);
            assert_eq!(read(Sight::Batch, Duration::ZERO, false, has_time), Verdict::Found);
        }
        for sight in [Sight::Undecided, Sight::Unreadable] {
            assert_eq!(read(sight, WINDOW, true, true), Verdict::ReadAgain);
            assert_eq!(read(sight, WINDOW, true, false), Verdict::Unknown);
        }
    }
}
