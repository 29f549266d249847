//! The running system: its service manager and its mounts.

use std::{fs, path::Path, process::Command};

use anyhow::{Context, Result};

use super::layout::UNITS;
use crate::command::{self, say};

/// Whether systemd is what runs this machine (sd_booted(3)).
fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Makes systemd read the units again.
///
/// # Errors
/// When systemctl fails.
pub(super) fn reload() -> Result<()> {
    if !has_systemd() {
        say("systemd", "does not run here, nothing to reload");
        return Ok(());
    }
    command::run(Command::new("systemctl").arg("daemon-reload"))
}

/// Stops and disables what is installed.
///
/// # Errors
/// When systemctl fails.
pub(super) fn stop() -> Result<()> {
    if !has_systemd() {
        return Ok(());
    }
    for unit in UNITS {
        let known = Command::new("systemctl")
            .args(["cat", "--quiet", unit])
            .output();
        if known.is_ok_and(|output| output.status.success()) {
            // A mount unit cannot be disabled, so that is left to the removal of its file.
            command::run(Command::new("systemctl").args(["stop", unit]))?;
        }
    }
    let wanted = Path::new("/etc/systemd/system/multi-user.target.wants").join(UNITS[0]);
    if wanted.symlink_metadata().is_ok() {
        command::run(Command::new("systemctl").args(["disable", UNITS[0]]))?;
    }
    Ok(())
}

/// Unmounts what the daemon or its unit mounted; this also lets go of whatever is still pinned in it.
///
/// # Errors
/// When umount fails.
pub(super) fn unmount(dir: &Path) -> Result<()> {
    let mounts =
        fs::read_to_string("/proc/self/mounts").context("cannot read the list of mounts")?;
    for _ in mounts
        .lines()
        .filter(|line| line.split(' ').nth(1).map(Path::new) == Some(dir))
    {
        command::run(Command::new("umount").arg(dir))?;
    }
    Ok(())
}
