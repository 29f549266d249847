//! What is different between two generations, object by object.

use std::collections::{BTreeMap, BTreeSet};

use super::{Generation, Name, show};

/// Characters of a value that a report shows.
const LONGEST: usize = 256;

/// What becomes of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Only the new generation has it.
    Added,
    /// Only the old one has it.
    Removed,
    /// Both have it, and it is not the same.
    Changed,
}

impl Change {
    /// The word in reports.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Added => "added",
            Self::Removed => "removed",
            Self::Changed => "changed",
        }
    }
}

/// One object that is different.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// `pool "msa"`, `network`, …
    pub object: String,
    /// How.
    pub change: Change,
    /// For a changed one, what: `port: 25 → 26`.
    pub details: Vec<String>,
}

/// Everything that is different in `new`. `renewed` certificates have the same paths and other content.
pub fn between(old: &Generation, new: &Generation, renewed: &BTreeSet<Name>) -> Vec<Difference> {
    let (before, after) = (show::tables(old), show::tables(new));
    let index = |tables: &[show::Table]| -> BTreeMap<String, show::Table> {
        let named = |table: &show::Table| (table.object.clone(), table.clone());
        tables.iter().map(named).collect()
    };
    let (old_by_name, new_by_name) = (index(&before), index(&after));
    let mut found = Vec::new();
    for table in &after {
        let Some(old) = old_by_name.get(&table.object) else {
            found.push(difference(&table.object, Change::Added, Vec::new()));
            continue;
        };
        let mut details = changed_keys(old, table);
        if renewed
            .iter()
            .any(|name| table.object == format!("certificate {name:?}"))
        {
            details.push("the files have other content".to_owned());
        }
        if !details.is_empty() {
            found.push(difference(&table.object, Change::Changed, details));
        }
    }
    for table in &before {
        if !new_by_name.contains_key(&table.object) {
            found.push(difference(&table.object, Change::Removed, Vec::new()));
        }
    }
    if found.is_empty() && old != new {
        let order = vec!["the order of objects".to_owned()];
        found.push(difference("the file", Change::Changed, order));
    }
    found
}

fn difference(object: &str, change: Change, details: Vec<String>) -> Difference {
    Difference {
        object: object.to_owned(),
        change,
        details,
    }
}

fn changed_keys(old: &show::Table, new: &show::Table) -> Vec<String> {
    let value = |table: &show::Table, key: &str| {
        let mut all = table.keys.iter().chain(&table.notes);
        let found = all.find(|(name, _)| *name == key);
        found.map_or_else(|| "unset".to_owned(), |(_, value)| value.clone())
    };
    let mut keys: Vec<&str> = Vec::new();
    let all = old.keys.iter().chain(&new.keys);
    for (key, _) in all.chain(&old.notes).chain(&new.notes) {
        if !keys.contains(key) {
            keys.push(key);
        }
    }
    keys.into_iter()
        .map(|key| (key, value(old, key), value(new, key)))
        .filter(|(_, old, new)| old != new)
        .map(|(key, old, new)| format!("{key}: {} → {}", brief(&old), brief(&new)))
        .collect()
}

/// A value as a report shows it.
fn brief(value: &str) -> String {
    match value.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}… ({} characters)", &value[..end], value.chars().count()),
        None => value.to_owned(),
    }
}
