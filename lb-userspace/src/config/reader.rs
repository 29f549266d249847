//! Typed access to a TOML tree that keeps positions, and notes every fault instead of stopping at the first.

use std::{ops::RangeInclusive, time::Duration};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{
    diagnostic::{Faults, did_you_mean, quoted},
    phrase::{check_name, not_yet, shown, type_name},
    units::{self, NoDuration},
};

/// A value and the byte offset it was found at.
#[derive(Debug, Clone)]
pub(super) struct At<T> {
    pub(super) value: T,
    pub(super) at: usize,
}

/// What a key gave.
#[derive(Debug, Clone)]
pub(super) enum Field<T> {
    /// The key is not there.
    Absent,
    /// It is there, and a fault has been noted.
    Wrong,
    /// It is there and readable.
    Is(At<T>),
}

impl<T> Field<T> {
    /// The value; nothing where it is absent or wrong.
    pub(super) fn get(&self) -> Option<&T> {
        match self {
            Self::Is(found) => Some(&found.value),
            Self::Absent | Self::Wrong => None,
        }
    }

    /// The value, or the default where the key is absent; nothing where it is wrong.
    pub(super) fn or(self, default: T) -> Option<T> {
        match self {
            Self::Is(found) => Some(found.value),
            Self::Absent => Some(default),
            Self::Wrong => None,
        }
    }

    /// Reads on: `then` notes its own fault and returns nothing where it finds one.
    pub(super) fn and_then<U>(self, then: impl FnOnce(At<T>) -> Option<U>) -> Field<U> {
        match self {
            Self::Absent => Field::Absent,
            Self::Wrong => Field::Wrong,
            Self::Is(found) => {
                let at = found.at;
                then(found).map_or(Field::Wrong, |value| Field::Is(At { value, at }))
            }
        }
    }
}

/// One table of the file. The keys that are asked for are the keys that it knows.
pub(super) struct Section<'d, 'i> {
    /// How messages call it, e.g. `pool "msa"`.
    pub(super) object: String,
    /// Where it begins.
    pub(super) at: usize,
    entries: &'d DeTable<'i>,
    known: Vec<&'static str>,
    to_come: Vec<&'static str>,
}

impl<'d, 'i> Section<'d, 'i> {
    pub(super) fn new(object: String, at: usize, entries: &'d DeTable<'i>) -> Self {
        Self {
            object,
            at,
            entries,
            known: Vec::new(),
            to_come: Vec::new(),
        }
    }

    /// A text. `example` is a whole line, as are all examples below.
    pub(super) fn string(
        &mut self,
        key: &'static str,
        example: &str,
        faults: &mut Faults,
    ) -> Field<&'d str> {
        let Some(value) = self.value(key) else {
            return Field::Absent;
        };
        match value.get_ref() {
            DeValue::String(text) => Field::Is(At {
                value: text.as_ref(),
                at: value.span().start,
            }),
            _ => self.mistyped(key, value, "text in quotes", example, faults),
        }
    }

    /// A list of texts.
    pub(super) fn strings(
        &mut self,
        key: &'static str,
        example: &str,
        faults: &mut Faults,
    ) -> Field<Vec<At<&'d str>>> {
        let Some(value) = self.value(key) else {
            return Field::Absent;
        };
        let DeValue::Array(items) = value.get_ref() else {
            return self.mistyped(key, value, "a list", example, faults);
        };
        let mut texts = Vec::with_capacity(items.len());
        for item in items {
            match item.get_ref() {
                DeValue::String(text) => texts.push(At {
                    value: text.as_ref(),
                    at: item.span().start,
                }),
                _ => return self.mistyped(key, item, "a list of texts in quotes", example, faults),
            }
        }
        Field::Is(At {
            value: texts,
            at: value.span().start,
        })
    }

    /// True or false.
    pub(super) fn boolean(
        &mut self,
        key: &'static str,
        example: &str,
        faults: &mut Faults,
    ) -> Field<bool> {
        let Some(value) = self.value(key) else {
            return Field::Absent;
        };
        match value.get_ref() {
            DeValue::Boolean(value_is) => Field::Is(At {
                value: *value_is,
                at: value.span().start,
            }),
            _ => self.mistyped(key, value, "true or false", example, faults),
        }
    }

    /// A whole number within bounds.
    pub(super) fn integer(
        &mut self,
        key: &'static str,
        bounds: RangeInclusive<u32>,
        example: &str,
        faults: &mut Faults,
    ) -> Field<u32> {
        match self.value(key) {
            None => Field::Absent,
            Some(value) => self.number(key, value, &bounds, example, faults),
        }
    }

    /// A list of whole numbers within bounds.
    pub(super) fn integers(
        &mut self,
        key: &'static str,
        bounds: RangeInclusive<u32>,
        example: &str,
        faults: &mut Faults,
    ) -> Field<Vec<At<u32>>> {
        let Some(value) = self.value(key) else {
            return Field::Absent;
        };
        let DeValue::Array(items) = value.get_ref() else {
            return self.mistyped(key, value, "a list", example, faults);
        };
        let mut numbers = Vec::with_capacity(items.len());
        for item in items {
            match self.number(key, item, &bounds, example, faults) {
                Field::Is(number) => numbers.push(number),
                _ => return Field::Wrong,
            }
        }
        Field::Is(At {
            value: numbers,
            at: value.span().start,
        })
    }

    fn number(
        &self,
        key: &'static str,
        value: &Spanned<DeValue<'i>>,
        bounds: &RangeInclusive<u32>,
        example: &str,
        faults: &mut Faults,
    ) -> Field<u32> {
        let DeValue::Integer(number) = value.get_ref() else {
            return self.mistyped(key, value, "a whole number", example, faults);
        };
        let at = value.span().start;
        match i64::from_str_radix(number.as_str(), number.radix()).map(u32::try_from) {
            Ok(Ok(value)) if bounds.contains(&value) => Field::Is(At { value, at }),
            _ => {
                faults.error(
                    at,
                    &self.object,
                    format!("has {key} = {}, which is out of range", shown(value)),
                    format!("{key} goes from {} to {}.", bounds.start(), bounds.end()),
                    format!("Write for example `{example}`."),
                );
                Field::Wrong
            }
        }
    }

    /// True or false.
    pub(super) fn switch(&mut self, key: &'static str, faults: &mut Faults) -> Field<bool> {
        let Some(value) = self.value(key) else {
            return Field::Absent;
        };
        match value.get_ref() {
            DeValue::Boolean(on) => Field::Is(At {
                value: *on,
                at: value.span().start,
            }),
            _ => self.mistyped(
                key,
                value,
                "true or false",
                &format!("{key} = true"),
                faults,
            ),
        }
    }

    /// A table of its own: `key = { ... }`.
    pub(super) fn table(
        &mut self,
        key: &'static str,
        example: &str,
        faults: &mut Faults,
    ) -> Field<Section<'d, 'i>> {
        let Some(value) = self.value(key) else {
            return Field::Absent;
        };
        let DeValue::Table(entries) = value.get_ref() else {
            return self.mistyped(key, value, "a table", example, faults);
        };
        let at = value.span().start;
        let object = format!("{key} of {}", self.object);
        Field::Is(At {
            value: Section::new(object, at, entries),
            at,
        })
    }

    /// A duration with a unit.
    pub(super) fn duration(
        &mut self,
        key: &'static str,
        example: &str,
        faults: &mut Faults,
    ) -> Field<Duration> {
        let Some(value) = self.value(key) else {
            return Field::Absent;
        };
        let at = value.span().start;
        let fault = match value.get_ref() {
            DeValue::String(text) => match units::duration(text) {
                Ok(value) => return Field::Is(At { value, at }),
                Err(fault) => fault,
            },
            DeValue::Integer(_) | DeValue::Float(_) => NoDuration::NoUnit,
            _ => return self.mistyped(key, value, "a duration", example, faults),
        };
        let (what, consequence) = match fault {
            NoDuration::NoUnit => (
                "a duration without a unit",
                "It could mean seconds as well as milliseconds.",
            ),
            NoDuration::Unreadable => (
                "which is no duration",
                "A duration is a whole number and one of ms, s, m, h, with nothing between.",
            ),
            NoDuration::TooShort => ("which is too short", "The shortest duration is \"10ms\"."),
            NoDuration::TooLong => ("which is too long", "The longest duration is \"24h\"."),
        };
        faults.error(
            at,
            &self.object,
            format!("has {key} = {}, {what}", shown(value)),
            consequence,
            format!("Write for example `{example}`."),
        );
        Field::Wrong
    }

    /// One of a few words. `later` are words whose feature is still to come, each with what to do instead.
    pub(super) fn choice<T: Copy>(
        &mut self,
        key: &'static str,
        words: &[(&'static str, T)],
        later: &[(&str, &str)],
        faults: &mut Faults,
    ) -> Field<T> {
        let all = words
            .iter()
            .map(|(word, _)| format!("{word:?}"))
            .collect::<Vec<_>>()
            .join(", ");
        let example = format!("{key} = {:?}", words.first().map_or("", |(word, _)| word));
        self.string(key, &example, faults).and_then(|given| {
            if let Some((_, value)) = words.iter().find(|(word, _)| *word == given.value) {
                return Some(*value);
            }
            if let Some((word, instead)) = later.iter().find(|(word, _)| *word == given.value) {
                not_yet(
                    given.at,
                    &self.object,
                    &format!("{key} = {word:?}"),
                    instead,
                    faults,
                );
                return None;
            }
            let guess = did_you_mean(given.value, words.iter().map(|(word, _)| *word));
            faults.error(
                given.at,
                &self.object,
                format!("has an unknown {key} {}{guess}", quoted(given.value)),
                format!("smtplb would have to guess which {key} is meant."),
                format!("Write one of {all}."),
            );
            None
        })
    }

    /// A key whose feature is still to come.
    pub(super) fn later(&mut self, key: &'static str, instead: &str, faults: &mut Faults) {
        self.to_come.push(key);
        if let Some((key, _)) = self.entries.get_key_value(key) {
            not_yet(
                key.span().start,
                &self.object,
                key.get_ref(),
                instead,
                faults,
            );
        }
    }

    /// The named tables below a key, in the order of the file: `[pool.NAME]`.
    pub(super) fn named(
        &mut self,
        key: &'static str,
        kind: &str,
        faults: &mut Faults,
    ) -> Vec<(At<&'d str>, Section<'d, 'i>)> {
        let example = format!("[{key}.name]");
        let Some(value) = self.value(key) else {
            return Vec::new();
        };
        let DeValue::Table(tables) = value.get_ref() else {
            self.mistyped::<()>(key, value, "named tables", &example, faults);
            return Vec::new();
        };
        let mut sections = Vec::with_capacity(tables.len());
        for (name, value) in tables {
            let at = name.span().start;
            let object = format!("{kind} {}", quoted(name.get_ref()));
            match value.get_ref() {
                DeValue::Table(entries) => {
                    check_name(
                        &At {
                            value: name.get_ref(),
                            at,
                        },
                        &object,
                        faults,
                    );
                    let name = At {
                        value: name.get_ref().as_ref(),
                        at,
                    };
                    sections.push((name, Section::new(object, at, entries)));
                }
                other => faults.error(
                    at,
                    object,
                    format!("is {}, not a table", type_name(other)),
                    "Nothing can be read from it.",
                    format!("Begin it with a line `{example}`."),
                ),
            }
        }
        // The tree is sorted by name; people see the order of their file.
        sections.sort_by_key(|(name, _)| name.at);
        sections
    }

    /// The tables of a list: `[[pool.NAME.member]]`. Each is called by `object` and its number.
    pub(super) fn list(
        &mut self,
        key: &'static str,
        example: &str,
        faults: &mut Faults,
    ) -> Field<Vec<Section<'d, 'i>>> {
        let Some(value) = self.value(key) else {
            return Field::Absent;
        };
        let DeValue::Array(items) = value.get_ref() else {
            return self.mistyped(key, value, "a list of tables", example, faults);
        };
        let mut sections = Vec::with_capacity(items.len());
        for (number, item) in (1..).zip(items) {
            let DeValue::Table(entries) = item.get_ref() else {
                return self.mistyped(key, item, "a list of tables", example, faults);
            };
            let object = format!("{key} {number} of {}", self.object);
            sections.push(Section::new(object, item.span().start, entries));
        }
        Field::Is(At {
            value: sections,
            at: value.span().start,
        })
    }

    /// The value of a key, of whatever type.
    pub(super) fn value(&mut self, key: &'static str) -> Option<&'d Spanned<DeValue<'i>>> {
        if !self.known.contains(&key) {
            self.known.push(key);
        }
        self.entries.get(key)
    }

    /// Notes a missing key, and lets the rest take it as wrong.
    pub(super) fn required<T>(
        &self,
        field: Field<T>,
        key: &str,
        consequence: &str,
        example: &str,
        faults: &mut Faults,
    ) -> Field<T> {
        let Field::Absent = field else { return field };
        faults.error(
            self.at,
            &self.object,
            format!("has no {key}"),
            consequence,
            format!("Add for example `{example}`."),
        );
        Field::Wrong
    }

    /// Notes every key that nobody asked for.
    pub(super) fn finish(self, faults: &mut Faults) {
        for (key, value) in self.entries {
            let name: &str = key.get_ref();
            if self.known.contains(&name) || self.to_come.contains(&name) {
                continue;
            }
            let guess = did_you_mean(name, self.known.iter().copied());
            // `[pool.mx.out]` reads as a table `out` inside the pool `mx`.
            let remedy = if value.get_ref().is_table() && guess.is_empty() {
                "Remove it, or put a name that contains a dot in quotes: `[pool.\"mx.out\"]`."
                    .to_owned()
            } else {
                format!(
                    "Remove it, or write one of the known keys: {}.",
                    self.known.join(", ")
                )
            };
            faults.error(
                key.span().start,
                &self.object,
                format!("has an unknown key {}{guess}", quoted(name)),
                "Its value would have no effect.",
                remedy,
            );
        }
    }

    fn mistyped<T>(
        &self,
        key: &str,
        value: &Spanned<DeValue<'_>>,
        expected: &str,
        example: &str,
        faults: &mut Faults,
    ) -> Field<T> {
        faults.error(
            value.span().start,
            &self.object,
            format!(
                "has {} in {key}, where {expected} belongs",
                type_name(value.get_ref())
            ),
            "smtplb would have to guess what is meant.",
            format!("Write for example `{example}`."),
        );
        Field::Wrong
    }
}
