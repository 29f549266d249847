//! Configuration: TOML text in, a checked [`Generation`] or a list of faults out.
//!
//! Pure but for [`load`], which reads the one file. The way of a file:
//! `reader` (TOML with positions) → `raw` (each object by itself) → `check` (objects against each other).
//! Every key, with type, unit and default: `docs/configuration.md`.

mod check;
mod diagnostic;
mod phrase;
mod raw;
mod reader;
#[cfg(test)]
mod tests;
mod units;

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

pub use diagnostic::{Diagnostic, Severity};
use toml::de::DeTable;

use crate::model::Generation;

/// Longest accepted file, bytes. Every table the file describes fits in far less.
pub const MAX_FILE: usize = 1 << 20;

/// The name that monitors say in EHLO unless `helo` is set.
pub const DEFAULT_HELO: &str = "localhost";

/// An accepted file: the generation and what to think about.
pub type Accepted = (Generation, Vec<Diagnostic>);

/// Reads a configuration from its text.
///
/// `source_name` is the path the text came from: it is shown in diagnostics, and relative certificate paths
/// start from its directory.
///
/// # Errors
///
/// Every fault of the text, in the order of their positions.
pub fn parse(source_name: &str, text: &str) -> Result<Accepted, Vec<Diagnostic>> {
    let directory = Path::new(source_name).parent().unwrap_or(Path::new(""));
    parse_in(directory, source_name, text)
}

/// Reads a configuration file.
///
/// # Errors
///
/// The file cannot be read, is no text, is too long, or has faults.
pub fn load(path: &Path) -> Result<Accepted, LoadError> {
    let unreadable = |source| LoadError::Unreadable {
        path: path.to_owned(),
        source,
    };
    // One byte beyond the limit is enough to know that the file is too long, even if it never ends.
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE as u64 + 1).read_to_end(&mut bytes))
        .map_err(unreadable)?;
    if bytes.len() > MAX_FILE {
        return Err(LoadError::TooLong {
            path: path.to_owned(),
        });
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        LoadError::NotText {
            path: path.to_owned(),
            line: 1 + before.iter().filter(|&&byte| byte == b'\n').count(),
        }
    })?;
    let directory = path.parent().unwrap_or(Path::new(""));
    parse_in(directory, &path.display().to_string(), &text).map_err(LoadError::Invalid)
}

/// Why a file gave no configuration.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Missing, no permission, a directory, a failing disk.
    #[error("{}: cannot be read: {}\n  No configuration is loaded.\n  {}", path.display(), source, advice(source))]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// More than [`MAX_FILE`].
    #[error("{}: is longer than {} KiB\n  No configuration is loaded.\n  Name the right file.", path.display(), MAX_FILE / 1024)]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// Not UTF-8.
    #[error("{}:{line}: is not UTF-8 text\n  No configuration is loaded.\n  Save the file as UTF-8, or name the right file.", path.display())]
    NotText {
        /// The file.
        path: PathBuf,
        /// The first line that is not.
        line: usize,
    },
    /// Read, but faulty: never empty, in the order of their positions.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Invalid(Vec<Diagnostic>),
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "Check the path; `smtplb init` writes a first configuration.",
        io::ErrorKind::PermissionDenied => {
            "Run as the user that owns the file, or let this one read it."
        }
        io::ErrorKind::IsADirectory => "Name a file inside this directory.",
        _ => "Check the path and the file system.",
    }
}

fn parse_in(directory: &Path, source_name: &str, text: &str) -> Result<Accepted, Vec<Diagnostic>> {
    let mut faults = diagnostic::Faults::new(source_name, text);
    if text.len() > MAX_FILE {
        faults.error(
            0,
            "the file",
            format!("is longer than {} KiB", MAX_FILE / 1024),
            "Nothing of it is read.",
            "Name the right file.",
        );
        return Err(faults.finish());
    }
    let (document, errors) = DeTable::parse_recoverable(text);
    let mut whole = true;
    for error in errors {
        whole &= phrase::syntax_fault(&error, &mut faults);
    }
    // After a slip of syntax the rest of the tree is guesswork; faults found in it would mislead.
    if !whole {
        return Err(faults.finish());
    }
    let raw = raw::read(document.get_ref(), &mut faults);
    let generation = check::generation(raw, directory, &mut faults);
    match (generation, faults.refused()) {
        (Some(generation), false) => Ok((generation, faults.finish())),
        _ => Err(faults.finish()),
    }
}
