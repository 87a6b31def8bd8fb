//! What a requester gets to read: every failure's sentence, and the warning of a success.

use crate::domain::command::{COMMAND_ID_VARIABLE, CommandKind, marker};
use crate::domain::result::{Ending, ErrorCode, Outcome};
use crate::domain::{excerpt, printable};
use crate::elevenlabs::{Answer, Class, Error, SearchKey};

use super::Tried;

/// The vendor did it.
pub fn succeeded(answer: Answer, warning: Option<String>) -> Outcome {
    Outcome::Succeeded { data: answer.data, batch_id: answer.batch_id, warning }
}

/// An error that is not going to be retried.
pub fn failure(error: &Error, attempts: u32) -> Outcome {
    let (code, error) = match error {
        Error::Refused { status: 401 | 403, message, .. } => (
            ErrorCode::Unauthorized,
            format!(
                "ElevenLabs refused this command to the worker's API key, which it accepts otherwise: \
                 {message}. Check the ids in the command; the operator of call-manager has to check \
                 the permissions of ELEVENLABS_API_KEY. Then publish the command again with a new \
                 message_id."
            ),
        ),
        Error::Refused { status: 404, message, .. } => (
            ErrorCode::NotFound,
            format!(
                "ElevenLabs does not know it: {message}. Check the ids in the command, and publish it \
                 again with a new message_id."
            ),
        ),
        Error::Refused { message, .. } => (
            ErrorCode::RejectedByElevenlabs,
            format!(
                "ElevenLabs refused the command: {message}. Correct it and publish it again with a new \
                 message_id."
            ),
        ),
        unavailable => {
            return self::unavailable(attempts, &unavailable.to_string());
        }
    };
    Outcome::Failed { code, error }
}

/// A cancel or a get that ended with an error.
pub fn not_done(kind: CommandKind, error: &Error, tried: Tried) -> Outcome {
    match error.class() {
        Class::Refused | Class::Unauthorized => failure(error, tried.attempts),
        _ => given_up(kind, &error.to_string(), tried),
    }
}

/// A cancel or a get whose horizon is over.
pub fn given_up(kind: CommandKind, reason: &str, tried: Tried) -> Outcome {
    if kind == CommandKind::Cancel && tried.in_doubt {
        cancel_unknown(reason)
    } else {
        unavailable(tried.attempts, reason)
    }
}

/// A cancel or a get whose `not_after` has passed.
pub fn too_late(kind: CommandKind, tried: Tried) -> Outcome {
    if kind == CommandKind::Cancel && tried.in_doubt {
        cancel_unknown("it was begun, and had no answer before the time in its not_after passed")
    } else {
        expired(tried.attempts)
    }
}

/// `not_after` has passed, and it was surely not done.
pub fn expired(attempts: u32) -> Outcome {
    let before = match attempts {
        0 => "Nothing was sent to ElevenLabs",
        _ => "ElevenLabs had not done it before",
    };
    Outcome::Failed {
        code: ErrorCode::Expired,
        error: format!(
            "The time in the command's header not_after, or of its property expiration, has passed, so \
             it is not executed any more. {before}, and nobody is called by it. If it is still wanted, \
             publish it again with a new message_id and a later time."
        ),
    }
}

/// Every worker that had the command in hand ended, and nothing of it was sent.
pub fn poison(kind: CommandKind, deliveries: u32) -> Outcome {
    let done = match kind {
        CommandKind::Submit => "Nothing was sent to ElevenLabs.",
        CommandKind::Cancel => {
            "It is not known whether ElevenLabs cancelled the batch: people may still be called. Look \
             at its status in ElevenLabs, or publish the cancel again with a new message_id."
        }
        CommandKind::Get => "Nothing is changed by that.",
    };
    Outcome::Failed {
        code: ErrorCode::PoisonMessage,
        error: format!(
            "The command came back {deliveries} times without an end, as when it ends its worker. It \
             is not executed any more, and lies in the dead-letter queue for the operator of \
             call-manager. {done}"
        ),
    }
}

/// The same of a submit that was begun.
pub fn poison_begun(command_id: &str, deliveries: u32) -> Outcome {
    Outcome::Failed {
        code: ErrorCode::OutcomeUnknown,
        error: format!(
            "It is not known whether ElevenLabs created this batch: the submit came back \
             {deliveries} times without an end, and is not executed any more. {}",
            how_to_look(command_id, None)
        ),
    }
}

/// How a person finds the batch, if there is one.
fn how_to_look(command_id: &str, call_name: Option<&str>) -> String {
    let named = call_name.map(|name| format!(" named \"{}\"", printable(name))).unwrap_or_default();
    let marker = marker(command_id);
    format!(
        "Look in ElevenLabs for a batch{named} whose recipients carry the dynamic variable \
         {COMMAND_ID_VARIABLE} = \"{marker}\"; only if there is none, publish the submit again with a \
         new message_id."
    )
}

/// The horizon is over, and it was surely not done.
pub fn unavailable(attempts: u32, reason: &str) -> Outcome {
    Outcome::Failed {
        code: ErrorCode::UpstreamUnavailable,
        error: format!(
            "ElevenLabs could not do it in {attempts} attempt(s); the last one ended so: \
             {reason}. Publish the command again later, with a new message_id."
        ),
    }
}

/// The last attempts of a cancel gave no answer.
pub fn cancel_unknown(reason: &str) -> Outcome {
    Outcome::Failed {
        code: ErrorCode::OutcomeUnknown,
        error: format!(
            "It is not known whether ElevenLabs cancelled this batch: {reason}. People may still be \
             called: publish the cancel again with a new message_id (repeating it is harmless), or \
             look at the batch's status in ElevenLabs."
        ),
    }
}

/// The answer to a submit was lost, and nobody can tell whether its batch exists.
pub fn submit_unknown(search: &SearchKey, lost: &str, why: &str) -> Outcome {
    Outcome::Failed {
        code: ErrorCode::OutcomeUnknown,
        error: format!(
            "It is not known whether ElevenLabs created this batch: {lost}; then its batch was \
             searched for, and: {why}. Nothing was sent again. {}",
            how_to_look(&search.command_id, Some(&search.name))
        ),
    }
}

/// Nothing was created, and without its message the submit cannot be sent again.
pub fn message_gone(attempts: u32) -> Outcome {
    Outcome::Failed {
        code: ErrorCode::UpstreamUnavailable,
        error: format!(
            "ElevenLabs created no batch in {attempts} attempt(s), and nobody is called. The submit \
             was to be tried again, but its message is gone: it has expired, or its queue was purged or \
             deleted. Publish it again with a new message_id."
        ),
    }
}

/// ElevenLabs does not know a batch that the ledger knows.
pub fn known_and_gone(kind: CommandKind, batch_id: &str) -> Outcome {
    let then = match kind {
        CommandKind::Cancel => {
            "People may still be called: look at it in ElevenLabs, and publish the cancel again with a \
             new message_id once the key sees it."
        }
        CommandKind::Submit | CommandKind::Get => "Look at it in ElevenLabs.",
    };
    Outcome::Failed {
        code: ErrorCode::OutcomeUnknown,
        error: format!(
            "ElevenLabs answers that it does not know the batch \"{batch_id}\", but a submit created \
             it: it was deleted, or the worker's API key was changed to one that does not see it. {then}"
        ),
    }
}

/// A cancel by its id came before the submit was begun.
pub fn struck(attempts: u32) -> Outcome {
    let done = match attempts {
        0 => "Nothing was sent to ElevenLabs",
        _ => "ElevenLabs created no batch",
    };
    Outcome::Failed {
        code: ErrorCode::CancelledBeforeSubmit,
        error: format!(
            "A cancel that names this submit's message_id as its command_id came before it was \
             executed. {done}, and nobody is called. If it shall be executed after all, publish it again with a new message_id."
        ),
    }
}

/// The id of a submit was used for another one.
pub fn reused(command_id: &str) -> Outcome {
    Outcome::Failed {
        code: ErrorCode::CommandIdReused,
        error: format!(
            "The message_id \"{id}\" belongs to another submit, with another body, and nothing of this \
             message was executed. The other one's result is on the results exchange with the header \
             command_id = \"{id}\", and a get with {{\"command_id\": \"{id}\"}} shows its batch. If this \
             message was meant to be that submit, do not publish it again. Only if it is a campaign of \
             its own, which nobody was called for yet, publish it with a message_id of its own.",
            id = excerpt(command_id)
        ),
    }
}

/// A cancel or a get names a submit that nobody has begun.
pub fn nothing_begun(kind: CommandKind, submit_id: &str) -> Outcome {
    let then = match kind {
        CommandKind::Cancel => {
            "If it comes within 24 hours, it is not executed but answered cancelled_before_submit. \
             Check command_id if you expected a batch."
        }
        _ => "Check command_id, or ask again when its result has come.",
    };
    Outcome::Failed {
        code: ErrorCode::NotFound,
        error: format!(
            "No submit with the message_id \"{}\" has been executed. {then}",
            excerpt(submit_id)
        ),
    }
}

/// A cancel or a get names a submit that ended without a batch that could be named.
pub fn no_batch(submit_id: &str, ending: &Ending) -> Outcome {
    let submit_id = excerpt(submit_id);
    let code = match &ending.outcome {
        Outcome::Failed { code, .. } => *code,
        // Its id has a form that no URL takes.
        Outcome::Succeeded { .. } => ErrorCode::OutcomeUnknown,
    };
    let (code, error) = match code {
        ErrorCode::OutcomeUnknown => (
            ErrorCode::OutcomeUnknown,
            format!(
                "It is not known which batch the submit \"{submit_id}\" created, if any: its own \
                 result says how to look for it in ElevenLabs. Then use batch_id."
            ),
        ),
        code => (
            ErrorCode::NotFound,
            format!(
                "The submit \"{submit_id}\" ended with {code}: there is no batch of it, and nobody \
                 is called."
            ),
        ),
    };
    Outcome::Failed { code, error }
}

/// A cancel or a get names a submit that has been in hand for too long to wait.
pub fn still_in_hand(kind: CommandKind, submit_id: &str) -> Outcome {
    let submit_id = excerpt(submit_id);
    let (code, error) = match kind {
        CommandKind::Cancel => (
            ErrorCode::OutcomeUnknown,
            format!(
                "The submit \"{submit_id}\" is still being executed. It is not sent to ElevenLabs \
                 again, but a request that is under way may create its batch: publish the cancel \
                 again, with a new message_id, until it is answered otherwise."
            ),
        ),
        _ => (
            ErrorCode::UpstreamUnavailable,
            format!(
                "The submit \"{submit_id}\" is still being executed. Ask again later, with a new \
                 message_id."
            ),
        ),
    };
    Outcome::Failed { code, error }
}

/// The batch exists, but the number that calls is not of the provider the command names.
pub fn provider_warning(expected: Option<&str>, answer: &Answer) -> Option<String> {
    let expected = expected?;
    let actual = answer.phone_provider.as_deref().unwrap_or("none");
    (actual != expected).then(|| {
        format!(
            "phone_provider is {expected} in the command, but the agent_phone_number_id belongs to \
             {}; the batch was created with the latter",
            excerpt(actual)
        )
    })
}
