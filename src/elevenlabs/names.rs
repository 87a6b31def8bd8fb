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
const ESCAPED_BLANKS: [&str; 6] = ["20", "nbsp", "32", "x20", "160", "xa0"];

/// What stands for something that is not shown, but for the ellipsis at a cut end.
const MASKS: [&str; 9] =
    ["redact", "hidden", "masked", "xxx", "*", "\u{2022}", "\u{2588}", "##", "__"];

/// Whether some normalisation explains `theirs` as a form of `ours`. Only plain letters and digits
/// count, and what stands in brackets counts for nothing: a label, or a mask. A name that is missing,
/// empty or masked says nothing, so it may be.
pub fn could_be(ours: &str, theirs: Option<&str>) -> bool {
    let Some(theirs) = theirs else { return true };
    is_masked(theirs)
        || is_same_number(ours, theirs)
        || explains(ours, theirs)
        || explains(ours, &without_brackets(theirs))
}

/// `007` that became 7.
fn is_same_number(ours: &str, theirs: &str) -> bool {
    let number = |text: &str| text.trim().parse::<f64>().ok();
    number(ours).is_some_and(|ours| number(theirs) == Some(ours))
}

fn without_brackets(name: &str) -> String {
    let mut open = 0_usize;
    let mut kept = String::new();
    for c in name.chars() {
        match c {
            '(' | '[' | '{' | '<' => open += 1,
            ')' | ']' | '}' | '>' => open = open.saturating_sub(1),
            _ if open == 0 => kept.push(c),
            _ => {}
        }
    }
    kept
}

fn explains(ours: &str, theirs: &str) -> bool {
    let shown: Vec<char> = theirs.chars().filter_map(plain).collect();
    if shown.is_empty() {
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

/// Whether a part of it is not shown.
pub fn is_masked(name: &str) -> bool {
    let name = name.trim().to_ascii_lowercase();
    let whole = name.trim_end_matches(['.', '\u{2026}']);
    let is_cut_within = whole.contains('\u{2026}') || whole.contains("...");
    is_cut_within || MASKS.iter().any(|mask| name.contains(mask))
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
            ("Recordatorio de cita", "Another campaign (1)", false),
            ("Recordatorio de cita", "Recordatorio de cita (copy)", true),
            ("Recordatorio de cita", "[Batch] Recordatorio de cita", true),
            ("Recordatorio de cita", "Record…cita", true),
            ("Recordatorio de cita", "Record...cita", true),
            ("Cita 12 de mayo", "Cita ## de mayo", true),
            ("Cita 12 de mayo", "Cita 13 de mayo", false),
            ("Cita de Maria Lopez", "Cita de [PERSON]", true),
            ("Cita de Maria Lopez", "Cita de <name>", true),
            ("Llamada 4155550100 hoy", "Llamada ••••••0100 hoy", true),
            ("007", "7", true),
            ("a b", "a&#32;b", true),
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
