//! What the daemon may do, checked before it does anything.

use std::fs;

use anyhow::{Context, Result, bail};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::model::Sessions;

/// Capability numbers, linux/capability.h. `CAP_SYS_ADMIN` stands for the newer ones it was split into (Linux 5.8).
const NET_ADMIN: u32 = 12;
const SYS_ADMIN: u32 = 21;
const PERFMON: u32 = 38;
const BPF: u32 = 39;

/// Every capability the daemon needs has to be effective.
///
/// # Errors
///
/// Names those that are missing.
pub(super) fn check() -> Result<()> {
    let status =
        fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|word| u64::from_str_radix(word.trim(), 16).ok())
        .context("/proc/self/status tells no capabilities")?;
    let missing = missing(effective);
    if !missing.is_empty() {
        bail!(
            "missing privilege: {}\n  smtplb loads packet programs and sets addresses. Run it as root, or as the \
             installed service, which grants just these.",
            missing.join(", ")
        );
    }
    Ok(())
}

fn missing(effective: u64) -> Vec<&'static str> {
    let has = |capability: u32| effective & (1 << capability) != 0;
    let mut missing = Vec::new();
    if !has(NET_ADMIN) {
        missing.push("CAP_NET_ADMIN");
    }
    if !has(BPF) && !has(SYS_ADMIN) {
        missing.push("CAP_BPF");
    }
    if !has(PERFMON) && !has(SYS_ADMIN) {
        missing.push("CAP_PERFMON");
    }
    missing
}

/// Allows as many sockets as the system lets us have, and locked memory for maps where that still counts (before 5.11).
pub(super) fn raise_limits() {
    let files = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: files.maximum,
        maximum: files.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        log::warn!("cannot raise the limit of open files: {error}");
    }
    let unlimited = Rlimit {
        current: None,
        maximum: None,
    };
    // Refused without CAP_SYS_RESOURCE, and needless on newer kernels.
    let _ = setrlimit(Resource::Memlock, unlimited);
}

/// Descriptors beside those of sessions: tables, listeners, monitors, pipes, the API.
const FILES_BESIDE: u64 = 1024;

/// No more sessions than the system lets us have descriptors for: who comes then is told so, and not left waiting.
pub(super) fn fit(sessions: Sessions) -> Sessions {
    let Some(files) = getrlimit(Resource::Nofile).maximum else {
        return sessions;
    };
    let most = u32::try_from(files.saturating_sub(FILES_BESIDE) / 2).unwrap_or(u32::MAX);
    if most >= sessions.max {
        return sessions;
    }
    log::warn!(
        "session max_sessions = {}: {most} are the most, since {files} open files are allowed and each session needs \
         two. Raise LimitNOFILE of the service, or lower max_sessions.",
        sessions.max
    );
    Sessions {
        max: most.max(1),
        ..sessions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_what_is_missing() {
        let bits = |capabilities: &[u32]| capabilities.iter().fold(0, |set, bit| set | 1u64 << bit);
        assert_eq!(missing(0), ["CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"]);
        assert_eq!(missing(bits(&[NET_ADMIN, PERFMON])), ["CAP_BPF"]);
        assert!(missing(bits(&[NET_ADMIN, SYS_ADMIN])).is_empty());
        assert!(missing(bits(&[NET_ADMIN, BPF, PERFMON])).is_empty());
    }
}
