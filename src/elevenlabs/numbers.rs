//! The phone numbers of a submit, kept so that a number can be known to be none of them and nobody can
//! read them back.

use std::fmt::Write as _;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Few enough to be small, many enough to tell: 8 bits a number, 8 KB at most.
const BITS_PER_NUMBER: usize = 8;
const LEAST_BITS: usize = 64;
const MOST_BITS: usize = 65_536;

/// The end of a number that every way of writing it keeps.
const LAST_DIGITS: usize = 7;

/// E.164: so many digits at most, and `00` or `011` before them.
const LONGEST: usize = 15;
const INTERNATIONAL_PREFIX: usize = 3;

/// What some masks write in place of digits.
const ZEROS: &str = "0000";

/// A set that can say of a number that it is surely not in it. One bit a number, at a place that a
/// keyed hash of its last seven digits names; the key is the command id.
#[derive(Clone, PartialEq, Eq)]
pub struct Numbers {
    /// A power of two of bits, least significant first.
    bits: Vec<u8>,
}

impl Numbers {
    /// The numbers of the submit with this command id.
    pub fn of<'a>(command_id: &str, numbers: impl Iterator<Item = &'a str>) -> Self {
        let key = key(command_id);
        let ends: Vec<String> = numbers.filter_map(end_of).collect();
        let bits = (ends.len() * BITS_PER_NUMBER).next_power_of_two().clamp(LEAST_BITS, MOST_BITS);
        let mut set = Self { bits: vec![0; bits / 8] };
        for end in ends {
            let (byte, bit) = set.place(&key, &end);
            if let Some(byte) = set.bits.get_mut(byte) {
                *byte |= bit;
            }
        }
        set
    }

    /// Whether this number is surely none of the submit's, however either is written. A number that is
    /// masked or cut says nothing.
    pub fn excludes(&self, command_id: &str, number: &str) -> bool {
        let Some(end) = end_of(number).filter(|_| shows_all(number)) else { return false };
        let (byte, bit) = self.place(&key(command_id), &end);
        self.bits.get(byte).is_some_and(|byte| byte & bit == 0)
    }

    fn place(&self, key: &[u8; 32], end: &str) -> (usize, u8) {
        let hash = blake3::keyed_hash(key, end.as_bytes());
        let &[a, b, ..] = hash.as_bytes();
        let place = usize::from(u16::from_le_bytes([a, b])) % (self.bits.len() * 8).max(1);
        (place / 8, 1 << (place % 8))
    }
}

fn key(command_id: &str) -> [u8; 32] {
    blake3::derive_key("call-manager 2026 phone numbers of a submit", command_id.as_bytes())
}

/// The last digits; `None` where there are too few.
fn end_of(number: &str) -> Option<String> {
    let digits: String = number.chars().filter(char::is_ascii_digit).collect();
    let begin = digits.len().checked_sub(LAST_DIGITS)?;
    Some(digits[begin..].to_owned())
}

/// Whether a number is written as people write them, with nothing left out: `+1415555----`, a number with
/// a fraction, and one with a row of zeros may hide some of it.
fn shows_all(number: &str) -> bool {
    let number: String = number.trim().chars().filter(|c| !"()".contains(*c)).collect();
    let number = number.strip_prefix('+').unwrap_or(&number);
    let groups: Vec<&str> = number.split([' ', '-', '.', '/', '\u{a0}']).collect();
    let is_digits = |group: &&str| group.bytes().all(|byte| byte.is_ascii_digit());
    let is_cut = groups.iter().any(|group| group.is_empty())
        || groups.last().is_some_and(|last| last.len() < 2);
    let digits = groups.concat();
    let most = LONGEST + INTERNATIONAL_PREFIX;
    !is_cut && groups.iter().all(is_digits) && digits.len() <= most && !digits.contains(ZEROS)
}

impl Serialize for Numbers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut hex = String::with_capacity(self.bits.len() * 2);
        for byte in &self.bits {
            let _infallible = write!(hex, "{byte:02x}");
        }
        serializer.serialize_str(&hex)
    }
}

impl<'de> Deserialize<'de> for Numbers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let hex = String::deserialize(deserializer)?;
        let byte = |at: usize| {
            let digits = hex.get(at..at + 2).ok_or("an odd number of digits");
            digits.and_then(|two| u8::from_str_radix(two, 16).map_err(|_| "no hexadecimal digits"))
        };
        let bits = (0..hex.len()).step_by(2).map(byte).collect::<Result<_, _>>();
        Ok(Self { bits: bits.map_err(de::Error::custom)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("+1415{n:07}")).collect()
    }

    fn set(numbers: &[String]) -> Numbers {
        Numbers::of("c-1", numbers.iter().map(String::as_str))
    }

    #[test]
    fn a_number_of_the_submit_is_never_excluded_however_it_is_written() {
        for count in [1, 10, 10_000] {
            let numbers = numbers(count);
            let set = set(&numbers);
            assert!(numbers.iter().all(|number| !set.excludes("c-1", number)), "{count}");
        }
        let set = set(&["+14155550100".to_owned()]);
        for written in [
            "4155550100",
            "+1 (415) 555-0100",
            "001.415.555.0100",
            "5550100",
            "***0100",
            "+1415XXX0100",
            "",
            "0100",
            "hidden",
            "+1415555----",
            "+1 415 555 ....",
            "+14150000000",
            "14155550100.0",
            "+1415555..00",
            "1415555010012345678",
        ] {
            assert!(!set.excludes("c-1", written), "{written}");
        }
    }

    #[test]
    fn most_other_numbers_are_excluded() {
        for count in [1, 10, 10_000] {
            let set = set(&numbers(count));
            let others = (0..1_000).map(|n| format!("+52559{:07}", 5_123_456 + 13 * n));
            let excluded = others.filter(|other| set.excludes("c-1", other)).count();
            assert!(excluded > 800, "{count}: {excluded} of 1,000");
        }
    }

    #[test]
    fn it_is_kept_as_text_of_at_most_16_kb_without_a_number_in_it() {
        let set = set(&numbers(10_000));
        let text = serde_json::to_string(&set).unwrap();
        assert!(text.len() <= 16_400, "{}", text.len());
        assert!(serde_json::from_str::<Numbers>(&text).unwrap() == set);
        for wrong in ["\"0\"", "\"zz\"", "\"é\"", "7"] {
            assert!(serde_json::from_str::<Numbers>(wrong).is_err(), "{wrong}");
        }
    }
}
