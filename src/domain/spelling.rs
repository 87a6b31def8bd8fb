//! Tells a header that is misspelt from one that is not the worker's business.

use super::validation::excerpt;

/// The headers of a command that are read.
const READ: [&str; 3] = ["not_after", "traceparent", "tracestate"];

/// Where RabbitMQ 3 keeps the application properties of an AMQP 1.0 message, which would be headers.
const APPLICATION_PROPERTIES: &str = "x-amqp-1.0-app-properties";

/// Why a header is refused: it is not read, and can only be meant as one that is.
pub fn misspelt(name: &str) -> Option<String> {
    if name == APPLICATION_PROPERTIES {
        return Some(
            "it was sent by AMQP 1.0 with application properties, which this broker does not pass on as \
             headers: not_after would not be heeded; leave them out, or publish by AMQP 0-9-1"
                .to_owned(),
        );
    }
    let read = READ.into_iter().find(|read| *read != name && bare(read).eq(bare(name)))?;
    Some(format!("the header \"{}\" is not read; name it {read}, or leave it out", excerpt(name)))
}

/// Without what people vary.
fn bare(name: &str) -> impl Iterator<Item = char> {
    let name = name.trim();
    let unprefixed = match name.split_at_checked(2) {
        Some(("x-" | "x_" | "X-" | "X_", rest)) => rest,
        _ => name,
    };
    let letters = unprefixed.chars().filter(|letter| !matches!(letter, '-' | '_'));
    letters.map(|letter| letter.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_that_is_read_but_for_its_spelling_is_refused_and_no_other() {
        for name in
            ["not-after", "notAfter", "NOT_AFTER", "x-not-after", "X-Not-After", " not_after"]
        {
            assert!(
                misspelt(name).unwrap().ends_with("name it not_after, or leave it out"),
                "{name}"
            );
        }
        assert!(misspelt("Trace-Parent").unwrap().contains("name it traceparent"));
        assert!(misspelt(APPLICATION_PROPERTIES).unwrap().contains("AMQP 0-9-1"));
        for name in
            ["not_after", "traceparent", "not_before", "after", "x-death", "tracestates", ""]
        {
            assert_eq!(misspelt(name), None, "{name}");
        }
    }
}
