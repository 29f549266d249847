//! What is wrong in a file, where, what it would mean, and what to do about it.

use std::{fmt, ops::Range};

use serde::Serialize;

/// Does it stop the configuration from being used?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Yes.
    Error,
    /// No, but it is hardly what was meant.
    Warning,
}

/// One finding in a configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// The file, as it was named.
    pub file: String,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// Which object of the configuration, e.g. `pool "msa"`.
    pub object: String,
    /// What is the matter with the object; continues the sentence that the object begins.
    pub message: String,
    /// What it would mean for the box.
    pub consequence: String,
    /// What to do.
    pub remedy: String,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            severity,
            file,
            line,
            column,
            object,
            message,
            consequence,
            remedy,
        } = self;
        let severity = match severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        write!(
            f,
            "{file}:{line}:{column}: {severity}: {object} {message}\n  {consequence}\n  {remedy}"
        )
    }
}

/// Gathers the findings of one file.
pub(super) struct Faults<'t> {
    file: &'t str,
    text: &'t str,
    found: Vec<(usize, Diagnostic)>,
}

impl<'t> Faults<'t> {
    pub(super) fn new(file: &'t str, text: &'t str) -> Self {
        Self {
            file,
            text,
            found: Vec::new(),
        }
    }

    /// A part of the text, empty where the range does not fit it.
    pub(super) fn text(&self, range: Range<usize>) -> &'t str {
        self.text.get(range).unwrap_or_default()
    }

    /// Notes an error at a byte offset of the text.
    pub(super) fn error(
        &mut self,
        at: usize,
        object: impl Into<String>,
        message: impl Into<String>,
        consequence: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.note(
            Severity::Error,
            at,
            object.into(),
            message.into(),
            consequence.into(),
            remedy.into(),
        );
    }

    /// Notes a warning at a byte offset of the text.
    pub(super) fn warning(
        &mut self,
        at: usize,
        object: impl Into<String>,
        message: impl Into<String>,
        consequence: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.note(
            Severity::Warning,
            at,
            object.into(),
            message.into(),
            consequence.into(),
            remedy.into(),
        );
    }

    fn note(
        &mut self,
        severity: Severity,
        at: usize,
        object: String,
        message: String,
        consequence: String,
        remedy: String,
    ) {
        let file = self.file.to_owned();
        let diagnostic = Diagnostic {
            severity,
            file,
            line: 0,
            column: 0,
            object,
            message,
            consequence,
            remedy,
        };
        self.found.push((at, diagnostic));
    }

    /// Is there an error among them?
    pub(super) fn refused(&self) -> bool {
        self.found
            .iter()
            .any(|(_, diagnostic)| diagnostic.severity == Severity::Error)
    }

    /// The findings by position: the errors, or the warnings where there are none.
    ///
    /// Beside errors the warnings are left out, since they may be their mere echo: a pool whose name is misspelt
    /// where it is used would be called unused too.
    pub(super) fn finish(mut self) -> Vec<Diagnostic> {
        if self.refused() {
            self.found
                .retain(|(_, diagnostic)| diagnostic.severity == Severity::Error);
        }
        self.found.sort_by_key(|(at, _)| *at);
        // The TOML parser says the same of a key each time it comes across it.
        self.found.dedup();
        // One walk through the text places all of them, however long its lines are.
        let (mut line, mut column) = (1, 1);
        let mut characters = self.text.char_indices().peekable();
        let mut placed = Vec::with_capacity(self.found.len());
        for (at, mut diagnostic) in self.found {
            while let Some((_, character)) = characters.next_if(|(index, _)| *index < at) {
                (line, column) = if character == '\n' {
                    (line + 1, 1)
                } else {
                    (line, column + 1)
                };
            }
            (diagnostic.line, diagnostic.column) = (line, column);
            placed.push(diagnostic);
        }
        placed
    }
}

/// Text of the file as it may be shown: in quotes, escaped, at most 64 characters.
pub(super) fn quoted(text: &str) -> String {
    match text.char_indices().nth(64) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// `, did you mean "…"?` where one of the names is close, else nothing.
pub(super) fn did_you_mean<'n>(given: &str, names: impl IntoIterator<Item = &'n str>) -> String {
    const LONGEST: usize = 64;
    const MOST: usize = 1024;
    if given.len() > LONGEST {
        return String::new();
    }
    let plain = |name: &str| name.to_ascii_lowercase().replace('-', "_");
    let given = plain(given);
    names
        .into_iter()
        .take(MOST)
        .filter(|name| name.len() <= LONGEST)
        .map(|name| (strsim::osa_distance(&given, &plain(name)), name))
        .filter(|(distance, name)| *distance <= given.len().max(name.len()).div_ceil(3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| format!(", did you mean {name:?}?"))
        .unwrap_or_default()
}
