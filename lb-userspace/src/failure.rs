//! How a command ends when it does not succeed: the exit code, and the words for the person who typed it.

use std::{fmt, io};

use crate::config::LoadError;

/// Exit codes of every verb but `health`, which follows the monitoring-plugin convention instead.
///
/// 69 and above are those of `sysexits.h`, so that a script can tell "try again" from "fix the file".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Ok = 0,
    /// The command could not do its work.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// No daemon answers on the admin socket.
    Unreachable = 69,
    /// It may work when tried again.
    Temporary = 75,
    /// A privilege is missing; the message names it.
    Privilege = 77,
    /// The configuration, or a file it names, is invalid.
    Config = 78,
}

impl Exit {
    /// What the process returns.
    pub fn code(self) -> u8 {
        self as u8
    }
}

/// Why a command ended, and with which code.
#[derive(Debug)]
pub struct Failure {
    /// What the process returns.
    pub code: Exit,
    /// What is said on standard error.
    pub error: anyhow::Error,
}

impl Failure {
    /// Ends with `code`, saying `error`.
    pub fn new(code: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self {
            code,
            error: error.into(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.error.to_string();
        for cause in self.error.chain().skip(1).map(ToString::to_string) {
            // Errors with a remedy name their cause before it; once is enough.
            if !said.contains(&cause) {
                said = format!("{said}: {cause}");
            }
        }
        f.write_str(&said)
    }
}

impl From<anyhow::Error> for Failure {
    /// An error that nobody classified: [`Exit::Failed`].
    fn from(error: anyhow::Error) -> Self {
        Self::new(Exit::Failed, error)
    }
}

impl From<LoadError> for Failure {
    /// [`Exit::Config`], unless only a privilege to read the file is missing.
    fn from(error: LoadError) -> Self {
        let code = match &error {
            LoadError::Unreadable { source, .. }
                if source.kind() == io::ErrorKind::PermissionDenied =>
            {
                Exit::Privilege
            }
            _ => Exit::Config,
        };
        Self::new(code, error)
    }
}

/// Classifies an error on its way up.
pub trait OrExit<T> {
    /// The same result, its error now a [`Failure`] with `code`.
    ///
    /// # Errors
    /// When `self` is one.
    fn or_exit(self, code: Exit) -> Result<T, Failure>;
}

impl<T, E: Into<anyhow::Error>> OrExit<T> for Result<T, E> {
    fn or_exit(self, code: Exit) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(code, error))
    }
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn codes_are_the_documented_ones() {
        let codes = [
            Exit::Ok,
            Exit::Failed,
            Exit::Usage,
            Exit::Unreachable,
            Exit::Temporary,
            Exit::Privilege,
            Exit::Config,
        ]
        .map(Exit::code);
        assert_eq!(codes, [0, 1, 2, 69, 75, 77, 78]);
    }

    #[test]
    fn the_whole_chain_is_said() {
        let result: anyhow::Result<()> = Err(anyhow!("no such device")).context("interface eth9");
        let failure = result.or_exit(Exit::Config).unwrap_err();
        assert_eq!(failure.code, Exit::Config);
        assert_eq!(failure.to_string(), "interface eth9: no such device");
    }

    #[test]
    fn a_cause_is_said_once() {
        let result: anyhow::Result<()> =
            Err(anyhow!("refused")).context("/x cannot be read: refused\n  Do this.");
        let failure = result.or_exit(Exit::Failed).unwrap_err();
        assert_eq!(
            failure.to_string(),
            "/x cannot be read: refused\n  Do this."
        );
    }

    #[test]
    fn unclassified_errors_end_with_1() {
        assert_eq!(Failure::from(anyhow!("odd")).code, Exit::Failed);
    }
}
