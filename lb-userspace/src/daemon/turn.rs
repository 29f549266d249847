//! Two starts at once would take each other's half-made tables over: one waits for the other.

use std::{
    fs::{self, File},
    io::{Read as _, Seek as _, Write as _},
    path::Path,
    time::Duration,
};

use anyhow::{Result, bail};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use tokio::time::{Instant, sleep};

/// Below the state directory.
const FILE: &str = "start.lock";
/// Between two looks whether the other one has ended.
const BEAT: Duration = Duration::from_millis(50);

/// The turn to start, given back when dropped; the kernel gives it back for a process that dies.
#[derive(Debug)]
pub(super) struct Turn {
    _file: Option<File>,
}

impl Turn {
    /// Waits for it. A state directory that cannot be written gives it at once, with a warning.
    ///
    /// # Errors
    ///
    /// When the other one takes longer than `patience`.
    pub(super) async fn take(state: &Path, patience: Duration) -> Result<Self> {
        let path = state.join(FILE);
        let opened = fs::create_dir_all(state).and_then(|()| {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false);
            options.open(&path)
        });
        let mut file = match opened {
            Ok(file) => file,
            Err(error) => {
                log::warn!(
                    "cannot open {}: {error}; do not start a second smtplb at the same moment",
                    path.display()
                );
                return Ok(Self { _file: None });
            }
        };
        let deadline = Instant::now() + patience;
        let mut told = false;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(Errno::WOULDBLOCK | Errno::INTR) => {}
                Err(error) => {
                    log::warn!("cannot lock {}: {error}", path.display());
                    return Ok(Self { _file: None });
                }
            }
            if Instant::now() >= deadline {
                bail!(
                    "another smtplb{} has been starting for {} s with the same --state {}\n  \
                     Two starts at once would take each other's half-made tables over. Try again when that one serves, \
                     or end it.",
                    owner(&mut file),
                    patience.as_secs(),
                    state.display()
                );
            }
            if !told {
                log::info!(
                    "another smtplb{} is starting; waiting for it",
                    owner(&mut file)
                );
                told = true;
            }
            sleep(BEAT).await;
        }
        // Who waits reads it; nothing depends on it.
        let _ = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| write!(file, "{}", std::process::id()));
        Ok(Self { _file: Some(file) })
    }
}

/// ` (process 4711)`, when it can be told.
fn owner(file: &mut File) -> String {
    let mut text = String::new();
    let read = file
        .rewind()
        .and_then(|()| file.take(20).read_to_string(&mut text));
    match read.map(|_| text.parse::<u32>()) {
        Ok(Ok(pid)) => format!(" (process {pid})"),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_after_the_other() {
        let state = tempfile::tempdir().unwrap();
        let first = Turn::take(state.path(), Duration::ZERO).await.unwrap();
        let refused = Turn::take(state.path(), Duration::from_millis(100)).await;
        let said = refused.unwrap_err().to_string();
        let pid = format!("(process {})", std::process::id());
        assert!(said.contains(&pid), "{said}");
        let path = state.path().to_owned();
        let second = tokio::spawn(async move { Turn::take(&path, Duration::from_secs(20)).await });
        sleep(BEAT).await;
        drop(first);
        second.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn without_a_place_to_lock_it_goes_on() {
        Turn::take(Path::new("/proc/nowhere"), Duration::ZERO)
            .await
            .unwrap();
    }
}
