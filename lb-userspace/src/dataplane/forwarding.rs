//! Settings of the box that were changed, and what they were: written down in case this daemon ends without setting them
//! back, for this boot alone.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};

use super::unmarked;

/// Below the state directory: the boot, then a setting's path and what it was in each line.
const FILE: &str = "forwarding";
/// Where every setting is that this changes.
const SETTINGS: &str = "/proc/sys/net/ipv";

/// Settings that were changed.
pub(super) struct Forwarding {
    file: PathBuf,
    boot: String,
    /// Path and former value, the first one changed first.
    changed: Vec<(String, String)>,
}

impl Forwarding {
    /// Reads what was changed since the box has booted. What a boot before has left is of no use: the settings are again
    /// what the admin has made of them.
    pub(super) fn load(state: &Path) -> Self {
        let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
        let seconds = uptime.split_whitespace().next();
        let seconds = seconds.and_then(|word| word.parse().ok()).unwrap_or(0.0);
        let up = Duration::try_from_secs_f64(seconds).unwrap_or_default();
        let booted = SystemTime::now().checked_sub(up);
        Self::of_boot(
            state,
            &unmarked::boot(),
            booted.unwrap_or(SystemTime::now()),
        )
    }

    /// `booted`: since when this boot lasts, for the files of versions that did not name theirs.
    fn of_boot(state: &Path, boot: &str, booted: SystemTime) -> Self {
        let file = state.join(FILE);
        let text = fs::read_to_string(&file).unwrap_or_default();
        let known = match text.lines().next() {
            Some(first) if !first.starts_with(SETTINGS) => first == boot,
            _ => fs::metadata(&file)
                .and_then(|file| file.modified())
                .is_ok_and(|written| written >= booted),
        };
        let changed = text
            .lines()
            .filter(|_| known)
            .filter_map(|line| line.split_once(' '))
            .filter(|(path, _)| path.starts_with(SETTINGS))
            .map(|(path, old)| (path.to_owned(), old.to_owned()))
            .collect();
        Self {
            file,
            boot: boot.to_owned(),
            changed,
        }
    }

    /// How many settings were changed until now, for [`Self::restore_since`].
    pub(super) fn count(&self) -> usize {
        self.changed.len()
    }

    /// Changes a setting.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub(super) fn set(&mut self, path: &str, value: &str) -> Result<()> {
        let old = read(path);
        fs::write(path, value).with_context(|| {
            format!("cannot write {value} to {path}; passthrough needs forwarding, switch it on with sysctl")
        })?;
        self.changed.push((path.to_owned(), old));
        self.write();
        Ok(())
    }

    /// Sets back what was changed since there were so many.
    pub(super) fn restore_since(&mut self, count: usize) {
        let count = count.min(self.changed.len());
        if count < self.changed.len() {
            for (path, old) in self.changed.drain(count..).rev() {
                if let Err(error) = fs::write(&path, &old) {
                    log::warn!("cannot set {path} back to {old}: {error}");
                }
            }
            self.write();
        }
    }

    /// Sets everything back.
    pub(super) fn restore(&mut self) {
        self.restore_since(0);
        let _ = fs::remove_file(&self.file);
    }

    fn write(&self) {
        let lines = self.changed.iter();
        let lines = lines.map(|(path, old)| format!("{path} {old}\n"));
        let text: String = [format!("{}\n", self.boot)]
            .into_iter()
            .chain(lines)
            .collect();
        let folder = self.file.parent().unwrap_or(Path::new("/"));
        let written = fs::create_dir_all(folder).and_then(|()| fs::write(&self.file, text));
        if let Err(error) = written {
            log::warn!(
                "cannot remember forwarding in {}: {error}",
                self.file.display()
            );
        }
    }
}

/// A setting's value; empty where there is none.
pub(super) fn read(path: &str) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SWITCH: &str = "/proc/sys/net/ipv4/conf/eth0/forwarding";

    fn written(state: &Path, boot: &str) {
        let mut of_boot = Forwarding::of_boot(state, boot, SystemTime::now());
        of_boot.changed = vec![(SWITCH.to_owned(), "0".to_owned())];
        of_boot.write();
    }

    #[test]
    fn what_was_changed_is_known_until_the_box_boots() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        written(&state, "one");
        let long_ago = SystemTime::UNIX_EPOCH;
        let next = Forwarding::of_boot(&state, "one", long_ago);
        assert_eq!(next.changed, [(SWITCH.to_owned(), "0".to_owned())]);
        let mut after = Forwarding::of_boot(&state, "two", long_ago);
        assert_eq!(after.count(), 0, "switched on by the admin since");
        after.restore();
        assert!(!state.join(FILE).exists());
    }

    #[test]
    fn a_file_that_names_no_boot_is_of_the_one_it_was_written_in() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(
            folder.path().join(FILE),
            format!("{SWITCH} 0\n/etc/passwd x\n"),
        )
        .unwrap();
        let hour = Duration::from_secs(3600);
        let (before, after) = (SystemTime::now() - hour, SystemTime::now() + hour);
        let here = Forwarding::of_boot(folder.path(), "one", before);
        assert_eq!(here.changed, [(SWITCH.to_owned(), "0".to_owned())]);
        assert_eq!(Forwarding::of_boot(folder.path(), "one", after).count(), 0);
    }
}
