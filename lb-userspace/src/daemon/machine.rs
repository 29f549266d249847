//! What the machine says of itself.

use std::fs;

use rustix::thread::sched_getaffinity;

/// The cores that the daemon may use, one worker for each.
pub(super) fn cpus() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(None) else {
        return vec![0];
    };
    let most = lb_common::layout::MAX_WORKERS as usize;
    (0..rustix::thread::CpuSet::MAX_CPU)
        .filter(|cpu| set.is_set(*cpu))
        .take(most)
        .collect()
}

/// Is this process a daemon of ours?
pub(super) fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "smtplb")
}
