//! Whether a name that came back may be the one that was sent: cut, without accents, escaped.

/// How many characters one that is no plain letter or digit may have become: `&` is `&amp;`, `ß` is
/// `ss`, an emoji a word between colons.
const LONGEST_REPLACEMENT: usize = 12;

/// A part of the name that was sent.
#[derive(Clone, Copy)]
enum Part {
    /// A letter or digit of ASCII, in lower case.
    Plain(char),
    /// A blank, which may have become nothing, or an escape.
    Blank,
    /// Anything else, which may have become something else, or nothing.
    Other,
}

/// What a blank becomes in URLs and in HTML, but for the signs.
const ESCAPED_BLANKS: [&str; 2] = ["20", "nbsp"];

/// Whether some normalisation explains `theirs` as a form of `ours`. Only plain letters and digits
/// count. A name that is missing, empty or masked says nothing, so it may be.
pub fn could_be(ours: &str, theirs: Option<&str>) -> bool {
    let Some(theirs) = theirs else { return true };
    let shown: Vec<char> = theirs.chars().filter_map(plain).collect();
    if shown.is_empty() || is_masked(theirs) {
        return true;
    }
    // Which lengths of `shown` the parts seen so far can explain.
    let mut explained = vec![false; shown.len() + 1];
    explained[0] = true;
    for part in parts(ours) {
        // It was cut here: everything that is shown is explained.
        if explained[shown.len()] {
            return true;
        }
        explained = match part {
            Part::Plain(c) => {
                let next = |end: usize| end > 0 && explained[end - 1] && shown[end - 1] == c;
                (0..=shown.len()).map(next).collect()
            }
            Part::Blank => {
                let next = |end: usize| {
                    let is_escaped = |escape: &str| {
                        let begin = end.checked_sub(escape.len());
                        begin.is_some_and(|begin| {
                            explained[begin] && escape.chars().eq(shown[begin..end].iter().copied())
                        })
                    };
                    explained[end] || ESCAPED_BLANKS.iter().any(|escape| is_escaped(escape))
                };
                (0..=shown.len()).map(next).collect()
            }
            Part::Other => {
                let next = |end: usize| {
                    explained[end.saturating_sub(LONGEST_REPLACEMENT)..=end].contains(&true)
                };
                (0..=shown.len()).map(next).collect()
            }
        };
    }
    explained[shown.len()]
}

fn plain(c: char) -> Option<char> {
    c.is_ascii_alphanumeric().then(|| c.to_ascii_lowercase())
}

fn is_masked(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["redact", "hidden", "masked", "***", "xxx"].iter().any(|mask| name.contains(mask))
}

fn parts(ours: &str) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for c in ours.trim().chars() {
        match plain(c) {
            Some(c) => parts.push(Part::Plain(c)),
            None if c.is_whitespace() => parts.push(Part::Blank),
            None => {
                // With its accent, a letter is another one: `e` and U+0301 are `é`.
                if ('\u{300}'..='\u{36f}').contains(&c)
                    && let Some(before) = parts.last_mut()
                {
                    *before = Part::Other;
                }
                parts.push(Part::Other);
            }
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_normalisation_may_be_the_name_and_another_name_is_not() {
        for (ours, theirs, may_be) in [
            ("Recordatorio de cita", "Recordatorio de cita", true),
            ("Recordatorio de cita", "  recordatorio DE cita ", true),
            ("Recordatorio de cita", "recordatorio-de-cita", true),
            ("Recordatorio de cita", "Recordatorio%20de%20cita", true),
            ("Recordatorio de cita", "Recordatorio de", true),
            ("Recordatorio de cita", "Recordator…", true),
            ("Campaña Ñandú & Cía", "Campana Nandu &amp; Cia", true),
            ("Campaña Ñandú & Cía", "Campa?a ?and? & C?a", true),
            ("Campaña Ñandú & Cía", "Campaa and Ca", true),
            ("Campan\u{303}a", "Campaña", true),
            ("Campaña", "Campan\u{303}a", true),
            ("Straße", "Strasse", true),
            ("Caller's list", "Caller&#39;s list", true),
            ("😀", "anything", true),
            ("Batch 12", "Batch 1", true),
            ("Batch 1", "Batch 12", false),
            ("Batch 1", "Batch 2", false),
            ("Recordatorio de cita", "Another campaign", false),
            ("Recordatorio de cita", "Recordatorio de cita (copy)", false),
            ("Recordatorio de cita", "***", true),
            ("Recordatorio de cita", "[REDACTED]", true),
            ("Recordatorio de cita", "", true),
        ] {
            assert_eq!(could_be(ours, Some(theirs)), may_be, "{ours} / {theirs}");
        }
        assert!(could_be("a", None));
    }

    #[test]
    fn a_long_name_costs_little() {
        let ours = "ñ&".repeat(100);
        assert!(!could_be(&ours, Some(&"z".repeat(20_000))));
    }
}
