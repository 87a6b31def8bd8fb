//! One spelling for each JSON value: two texts that mean the same become equal.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::value::RawValue;

/// Deeper values keep their spelling. The parser of bodies takes no deeper ones.
const DEEPEST: usize = 128;

/// The text of a JSON value with strings written in one way, numbers as exact decimals, fields in the
/// order of their names, and no white space. `raw` is JSON.
pub fn canonical(raw: &str) -> Cow<'_, str> {
    if is_canonical_scalar(raw) {
        return Cow::Borrowed(raw);
    }
    let mut text = String::with_capacity(raw.len());
    write_value(&mut text, raw, 0);
    Cow::Owned(text)
}

/// Most values: a string without escapes, an integer, a literal.
fn is_canonical_scalar(raw: &str) -> bool {
    match raw.as_bytes() {
        [b'"', ..] => !raw.contains('\\'),
        [b'1'..=b'9', rest @ ..] => {
            rest.iter().all(u8::is_ascii_digit) && !raw.ends_with('0') && raw.len() < 18
        }
        _ => matches!(raw, "true" | "false" | "null"),
    }
}

fn write_value(text: &mut String, raw: &str, depth: usize) {
    let raw = raw.trim();
    match raw.as_bytes().first() {
        Some(b'"') => match serde_json::from_str::<String>(raw) {
            Ok(string) => write_string(text, &string),
            Err(_) => text.push_str(raw),
        },
        Some(b'{') if depth < DEEPEST => match serde_json::from_str::<BTreeMap<_, _>>(raw) {
            Ok(fields) => write_object(text, &fields, depth),
            Err(_) => text.push_str(raw),
        },
        Some(b'[') if depth < DEEPEST => match serde_json::from_str::<Vec<&RawValue>>(raw) {
            Ok(values) => write_array(text, &values, depth),
            Err(_) => text.push_str(raw),
        },
        Some(b'-' | b'0'..=b'9') => write_number(text, raw),
        _ => text.push_str(raw),
    }
}

fn write_object(text: &mut String, fields: &BTreeMap<String, &RawValue>, depth: usize) {
    text.push('{');
    for (index, (name, value)) in fields.iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        write_string(text, name);
        text.push(':');
        write_value(text, value.get(), depth + 1);
    }
    text.push('}');
}

fn write_array(text: &mut String, values: &[&RawValue], depth: usize) {
    text.push('[');
    for (index, value) in values.iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        write_value(text, value.get(), depth + 1);
    }
    text.push(']');
}

/// As `serde_json` writes it: quotes, backslashes and control characters are escaped, nothing else.
pub fn write_string(text: &mut String, string: &str) {
    text.push_str(&serde_json::Value::from(string).to_string());
}

/// The digits without zeros at either end, and the power of ten of the last one: `10`, `10.0` and
/// `1e1` are `1e1`. Never through a float, which would make different long numbers equal.
fn write_number(text: &mut String, raw: &str) {
    let (negative, rest) = raw.strip_prefix('-').map_or((false, raw), |rest| (true, rest));
    let (mantissa, exponent) = rest.split_once(['e', 'E']).unwrap_or((rest, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    let digits = digits.trim_start_matches('0');
    let significant = digits.trim_end_matches('0');
    if significant.is_empty() {
        text.push('0');
        return;
    }
    let shift = i128::try_from(digits.len() - significant.len()).unwrap_or_default()
        - i128::try_from(fraction.len()).unwrap_or_default();
    if negative {
        text.push('-');
    }
    let _infallible = match exponent.parse::<i128>().map(|exponent| exponent.saturating_add(shift))
    {
        Ok(0) => write!(text, "{significant}"),
        Ok(exponent) => write!(text, "{significant}e{exponent}"),
        // Of so many digits that nobody means it: its spelling counts.
        Err(_) => write!(text, "{significant}e{exponent}+{shift}"),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn same(spellings: &[&str]) {
        let mut canonical = spellings.iter().map(|spelling| canonical(spelling));
        let first = canonical.next().unwrap();
        for other in canonical {
            assert_eq!(other, first);
        }
    }

    #[test]
    fn every_spelling_of_a_value_is_one() {
        same(&["10", "10.0", "1e1", "1.0E+1", "100e-1", "0.1e2", " 10 "]);
        same(&["0", "-0", "0.0", "0e99", "-0.00e5"]);
        same(&["-12.5", "-125e-1", "-1.25e1"]);
        same(&["1", "1.0", "1e0", "1e-0"]);
        same(&["20", "2e1", "20.0"]);
        same(&[r#""María""#, r#""Mar\u00eda""#, r#""M\u0061r\u00EDa""#]);
        same(&[r#""a/b""#, r#""a\/b""#]);
        same(&[
            r#"{"a":1,"b":[10,{"c":"x"}]}"#,
            "{ \"b\" : [1e1, {\"\\u0063\":\"x\"}],\n\"a\":1.0}",
        ]);
    }

    #[test]
    fn different_values_stay_different() {
        let different = [
            "1",
            "\"1\"",
            "-1",
            "10",
            "1e400",
            "1e401",
            "12345678901234567890123",
            "12345678901234567890124",
            "0.1",
            "null",
            "\"null\"",
            "true",
            "[]",
            "{}",
            "[1]",
            "\"\"",
            "[1,2]",
            "[2,1]",
            "{\"a\":null}",
            "1e999999999999999999999999999999999999999999",
        ];
        let canonical: std::collections::HashSet<_> =
            different.iter().map(|value| canonical(value)).collect();
        assert_eq!(canonical.len(), different.len());
    }
}
