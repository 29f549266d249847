//! Names that say who owns a lab, so that what a crashed run left can be told from what is in use.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use super::namespace;

/// Where each lab has a folder of its own.
const RUN: &str = "/run";
/// In the folder of a lab that is to stay when its owner ends.
const KEEP: &str = "keep";

/// A new name for a lab of this process: `smtplb-<pid>x<start>-<number>`.
pub(crate) fn new() -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let pid = std::process::id();
    let start = start_of(pid).unwrap_or_default();
    format!("smtplb-{pid}x{start:x}-{}", NUMBER.fetch_add(1, Relaxed))
}

/// The folder of a lab.
pub(crate) fn folder(prefix: &str) -> PathBuf {
    Path::new(RUN).join(prefix)
}

/// Marks a lab as to be kept.
pub(crate) fn mark_kept(prefix: &str) -> std::io::Result<()> {
    fs::write(folder(prefix).join(KEEP), "")
}

/// Removes the labs whose owner is gone; kept ones only when `kept` says so. Returns how many.
pub fn remove_leftovers(kept: bool) -> usize {
    let mut prefixes: Vec<String> = [namespace::NAMES, RUN]
        .iter()
        .filter_map(|dir| fs::read_dir(dir).ok())
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| Some(owner(&name)?.0.to_owned()))
        .collect();
    prefixes.sort_unstable();
    prefixes.dedup();
    prefixes.retain(|prefix| owner(prefix).is_some_and(|(_, alive)| !alive));
    prefixes.retain(|prefix| kept || !folder(prefix).join(KEEP).exists());
    for prefix in &prefixes {
        remove_lab(prefix);
    }
    prefixes.len()
}

fn remove_lab(prefix: &str) {
    let names = fs::read_dir(namespace::NAMES).into_iter().flatten();
    for name in names.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
        if name
            .strip_prefix(prefix)
            .is_some_and(|rest| rest.starts_with('-'))
        {
            namespace::remove(&name);
        }
    }
    remove_folder(&folder(prefix));
}

/// Removes a lab's folder, after whatever the daemon mounted in it.
pub(crate) fn remove_folder(folder: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for mounted in mounts.lines().filter_map(|line| line.split(' ').nth(1)) {
        if Path::new(mounted).starts_with(folder) {
            let _ = Command::new("umount").arg(mounted).output();
        }
    }
    let _ = fs::remove_dir_all(folder);
}

/// The prefix in a name, and whether the process that made it still lives.
fn owner(name: &str) -> Option<(&str, bool)> {
    let rest = name.strip_prefix("smtplb-")?;
    let (pid, rest) = rest.split_once('x')?;
    let (start, rest) = rest.split_once('-')?;
    let digits = rest
        .find(|letter: char| !letter.is_ascii_digit())
        .unwrap_or(rest.len());
    let (pid, start) = (pid.parse().ok()?, u64::from_str_radix(start, 16).ok()?);
    let prefix = &name[..name.len() - rest.len() + digits];
    Some((prefix, start_of(pid) == Some(start)))
}

/// When a process started, in clock ticks since boot: tells it from a later one with the same id.
fn start_of(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; the start is field 22, the 20th behind it (proc_pid_stat(5)).
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_of_a_new_lab_lives() {
        let prefix = new();
        assert_eq!(
            owner(&format!("{prefix}-box")),
            Some((prefix.as_str(), true))
        );
    }

    #[test]
    fn a_reused_process_id_is_somebody_else() {
        let name = format!("smtplb-{}x1-0-box", std::process::id());
        assert!(owner(&name).is_some_and(|(_, alive)| !alive));
    }

    #[test]
    fn other_names_have_no_owner() {
        for name in ["smtplb", "smtplb-box", "cni-1x1-0", "smtplb-1-0"] {
            assert_eq!(owner(name), None, "{name}");
        }
    }
}
