//! What the operator wants of members, kept across reloads, restarts and reboots.
//!
//! One file in the state directory, replaced as a whole: a crash leaves the old one or the new one. Members are known
//! by pool and name, so that one that moves to another address is still the one that was taken out.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::{model::Generation, pool::Admin};

/// Below the state directory.
const FILE: &str = "members.json";

/// The members that are not simply ready.
#[derive(Debug, Default)]
pub(super) struct Roster {
    path: PathBuf,
    entries: BTreeMap<(String, String), Entry>,
}

/// What is wanted of one member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) admin: Admin,
    /// Seconds since 1970: the clock that also runs while the box is off.
    pub(super) since: u64,
    /// When its connections are ended, in milliseconds since 1970; `None`: never.
    pub(super) deadline: Option<u64>,
    /// They have been.
    pub(super) ended: bool,
    /// So has what was left of them behind `drain_timeout`; of no other process's concern.
    pub(super) cut: bool,
}

impl Entry {
    /// Has it been over for so long?
    pub(super) fn is_over_for(&self, time: Duration) -> bool {
        let time = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.deadline
            .is_some_and(|deadline| deadline.saturating_add(time) <= now_ms())
    }
}

/// An entry as the file has it.
#[derive(Serialize, Deserialize)]
struct Line {
    pool: String,
    member: String,
    state: String,
    since: u64,
    #[serde(
        rename = "deadline_ms",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    deadline: Option<u64>,
    #[serde(default)]
    ended: bool,
}

impl Roster {
    /// Reads the file below `state`; none is as good as an empty one. A damaged one is told of and begun anew.
    pub(super) fn load(state: &Path) -> Self {
        let path = state.join(FILE);
        let lines: Vec<Line> = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                log::error!(
                    "{} is damaged ({error}): members that were drained or in maintenance are ready again",
                    path.display()
                );
                Vec::new()
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                log::error!("cannot read {}: {error}", path.display());
                Vec::new()
            }
        };
        let entry = |line: Line| {
            let entry = Entry {
                admin: Admin::from_word(&line.state)?,
                since: line.since,
                deadline: line.deadline,
                ended: line.ended,
                cut: false,
            };
            Some(((line.pool, line.member), entry))
        };
        Self {
            path,
            entries: lines.into_iter().filter_map(entry).collect(),
        }
    }

    /// What is wanted of a member.
    pub(super) fn get(&self, pool: &str, member: &str) -> Entry {
        let key = (pool.to_owned(), member.to_owned());
        self.entries.get(&key).copied().unwrap_or(Entry {
            admin: Admin::Ready,
            since: 0,
            deadline: None,
            ended: false,
            cut: false,
        })
    }

    /// Writes down what is wanted of a member from now on. `limit`: until its connections are ended.
    ///
    /// # Errors
    ///
    /// When the file cannot be written; then nothing has changed.
    pub(super) fn set(
        &mut self,
        pool: &str,
        member: &str,
        admin: Admin,
        limit: Option<Duration>,
    ) -> io::Result<()> {
        let key = (pool.to_owned(), member.to_owned());
        let since = now();
        let limit = match (admin, limit) {
            (Admin::Ready, _) => None,
            (Admin::Maint, None) => Some(Duration::ZERO),
            (Admin::Drain | Admin::Maint, limit) => limit,
        };
        let mut entries = self.entries.clone();
        match admin {
            Admin::Ready => _ = entries.remove(&key),
            Admin::Drain | Admin::Maint => {
                let entry = Entry {
                    admin,
                    since,
                    deadline: limit.map(|limit| now_ms() + limit.as_millis() as u64),
                    ended: false,
                    cut: false,
                };
                entries.insert(key, entry);
            }
        }
        self.replace(entries)
    }

    /// Members whose time is over and whose connections have not been ended yet. Those that have been are in it again
    /// and again: one may have slipped in meanwhile.
    pub(super) fn due(&self) -> Vec<(String, String, Entry)> {
        self.entries
            .iter()
            .filter(|(_, entry)| entry.is_over_for(Duration::ZERO))
            .map(|((pool, member), entry)| (pool.clone(), member.clone(), *entry))
            .collect()
    }

    /// The connections of a member have been ended.
    pub(super) fn note_ended(&mut self, pool: &str, member: &str) {
        let mut entries = self.entries.clone();
        if let Some(entry) = entries.get_mut(&(pool.to_owned(), member.to_owned())) {
            entry.ended = true;
        }
        if let Err(error) = self.replace(entries) {
            log::error!("cannot write {}: {error}", self.path.display());
        }
    }

    /// What was left of a member's sessions has been cut.
    pub(super) fn note_cut(&mut self, pool: &str, member: &str) {
        let key = (pool.to_owned(), member.to_owned());
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.cut = true;
        }
    }

    /// Forgets members that a generation does not have.
    pub(super) fn forget_others(&mut self, generation: &Generation) {
        let mut entries = self.entries.clone();
        entries.retain(|(pool, member), _| {
            let pool = generation.pools.get(pool.as_str());
            pool.is_some_and(|pool| pool.members.iter().any(|known| *known.name == **member))
        });
        if entries.len() == self.entries.len() {
            return;
        }
        if let Err(error) = self.replace(entries) {
            log::error!("cannot write {}: {error}", self.path.display());
        }
    }

    fn replace(&mut self, entries: BTreeMap<(String, String), Entry>) -> io::Result<()> {
        let line = |((pool, member), entry): (&(String, String), &Entry)| Line {
            pool: pool.clone(),
            member: member.clone(),
            state: entry.admin.word().to_owned(),
            since: entry.since,
            deadline: entry.deadline,
            ended: entry.ended,
        };
        let lines: Vec<_> = entries.iter().map(line).collect();
        let mut text = serde_json::to_vec_pretty(&lines)?;
        text.push(b'\n');
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder)?;
        }
        let aside = self.path.with_extension("new");
        let mut file = File::create(&aside)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&aside, &self.path)?;
        self.entries = entries;
        Ok(())
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    now_ms() / 1000
}

/// Milliseconds since 1970.
pub(super) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_survive_the_daemon() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let mut roster = Roster::load(&state);
        assert_eq!(roster.get("p", "m").admin, Admin::Ready);
        let minute = Some(Duration::from_secs(60));
        roster.set("p", "m", Admin::Drain, minute).unwrap();
        roster.set("p", "n", Admin::Maint, None).unwrap();
        roster.set("p", "o", Admin::Drain, None).unwrap();
        let mut roster = Roster::load(&state);
        let drained = roster.get("p", "m");
        assert_eq!(drained.admin, Admin::Drain);
        let deadline = drained.deadline.unwrap() / 1000;
        assert!((60..=61).contains(&(deadline - drained.since)));
        assert_eq!(roster.get("p", "o").deadline, None);
        let due = roster.due();
        assert_eq!(due.len(), 1, "{due:?}");
        assert_eq!((due[0].1.as_str(), due[0].2.ended), ("n", false));
        roster.note_ended("p", "n");
        assert!(Roster::load(&state).get("p", "n").ended);
        roster.set("p", "n", Admin::Ready, None).unwrap();
        assert!(Roster::load(&state).due().is_empty());
        assert!(!state.join("members.new").exists());
    }

    #[test]
    fn a_damaged_file_is_no_reason_to_stand_still() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FILE), "[{").unwrap();
        let mut roster = Roster::load(folder.path());
        assert!(roster.due().is_empty());
        roster.set("p", "m", Admin::Maint, None).unwrap();
        assert_eq!(
            Roster::load(folder.path()).get("p", "m").admin,
            Admin::Maint
        );
    }

    #[test]
    fn what_cannot_be_written_down_has_not_changed() {
        let mut roster = Roster::load(Path::new("/proc/nowhere"));
        assert!(roster.set("p", "m", Admin::Drain, None).is_err());
        assert_eq!(roster.get("p", "m").admin, Admin::Ready);
    }
}
