//! Rules of the source tree that no compiler knows.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use super::layers;

/// A file longer than this has more than one subject.
const MAX_LINES: usize = 600;

/// All faults, each with file and line.
///
/// # Errors
/// When the tree cannot be read.
pub(super) fn faults(repository: &Path) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    for path in rust_files(repository)? {
        let source =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path
            .strip_prefix(repository)
            .unwrap_or(&path)
            .to_string_lossy();
        let lines = source.lines().count();
        if lines > MAX_LINES {
            faults.push(format!(
                "{name}: {lines} lines; a file has one subject and at most {MAX_LINES}"
            ));
        }
        if let Some(room) = name.strip_prefix("lb-userspace/src/") {
            let found = layers::faults(room, &layers::joined_uses(&source));
            faults.extend(
                found
                    .into_iter()
                    .map(|(line, text)| format!("{name}:{line}: {text}")),
            );
        }
    }
    faults.extend(undocumented_reasons(repository)?);
    faults.extend(undocumented_series(repository)?);
    Ok(faults)
}

fn rust_files(repository: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut files = BTreeSet::new();
    let mut folders = vec![repository.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in
            fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?
        {
            let path = entry?.path();
            let hidden = path
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with('.'));
            if path.is_dir() && !path.is_symlink() && !hidden && path != repository.join("target") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                files.insert(path);
            }
        }
    }
    Ok(files)
}

/// A counter that nobody explains helps nobody: each drop reason stands in `docs/metrics.md`.
fn undocumented_reasons(repository: &Path) -> Result<Vec<String>> {
    let docs = repository.join("docs/metrics.md");
    let Ok(text) = fs::read_to_string(&docs) else {
        return Ok(Vec::new());
    };
    let path = repository.join("lb-common/src/reason.rs");
    let source =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let faults = quoted_words(&source)
        .filter(|word| !text.contains(&format!("`{word}`")))
        .map(|word| {
            format!("lb-common/src/reason.rs: `{word}` is not explained in docs/metrics.md")
        });
    Ok(faults.collect())
}

/// An alert on a series that nobody makes never fires: each one, and each label's value, stands in `docs/metrics.md`.
fn undocumented_series(repository: &Path) -> Result<Vec<String>> {
    let [docs, alerts] = ["docs/metrics.md", "deploy/alerts.yml"].map(|path| repository.join(path));
    let (Ok(docs), Ok(alerts)) = (fs::read_to_string(docs), fs::read_to_string(alerts)) else {
        return Ok(Vec::new());
    };
    let faults = words_of_alerts(&alerts)
        .filter(|word| !docs.contains(&format!("`{word}`")))
        .map(|word| format!("deploy/alerts.yml: `{word}` is not explained in docs/metrics.md"));
    Ok(faults.collect())
}

/// Names of series and values of labels in expressions.
fn words_of_alerts(alerts: &str) -> impl Iterator<Item = &str> {
    let expressions = alerts
        .lines()
        .filter_map(|line| line.trim().strip_prefix("expr: "));
    expressions.flat_map(|expression| {
        let other = |letter: char| !(letter.is_ascii_alphanumeric() || "-_\"".contains(letter));
        let words = expression.split(other);
        words.filter_map(|word| match word.strip_prefix('"') {
            Some(value) => value.strip_suffix('"'),
            None => word.starts_with("smtplb_").then_some(word),
        })
    })
}

/// String literals in kebab or snake case: the names that reasons go by outside.
fn quoted_words(source: &str) -> impl Iterator<Item = &str> {
    source
        .lines()
        .take_while(|line| line.trim() != "#[cfg(test)]")
        .filter(|line| !line.trim_start().starts_with("//"))
        .filter_map(|line| line.split('"').nth(1))
        .filter(|word| {
            let plain = |letter: char| {
                letter.is_ascii_lowercase() || letter.is_ascii_digit() || "-_".contains(letter)
            };
            !word.is_empty() && word.chars().all(plain)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_words_of_alerts() {
        let alerts = "# smtplb_not\n  expr: increase(smtplb_a{reason=\"b-c\"}[5m]) > 0.8 * smtplb_d\n  for: 5m\n";
        let words: Vec<_> = words_of_alerts(alerts).collect();
        assert_eq!(words, ["smtplb_a", "b-c", "smtplb_d"]);
    }

    #[test]
    fn finds_the_names_of_reasons() {
        let source =
            "/// \"not-this\"\nSelf::NoMember => \"no-member\",\nSelf::Text => \"two words\",\n";
        assert_eq!(quoted_words(source).collect::<Vec<_>>(), ["no-member"]);
    }
}
