//! What happened in the proxy plane, counted by name for `smtplb stats` and the metrics.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use crate::{pool::LiveMember, smtp::end::End};

/// A member that fails may fail a thousand times a second.
const COMPLAIN_EVERY: Duration = Duration::from_secs(1);

/// A connection to an address that no virtual server has; it was closed at once.
pub const NO_VIRTUAL_SERVER: &str = "no-virtual-server";
/// Accepting paused because the process or the machine was short of something, mostly descriptors.
pub const ACCEPT_PAUSED: &str = "accept-paused";
/// A member refused a connection or did not answer in time; the next one was tried.
pub const MEMBER_CONNECT_FAILED: &str = "member-connect-failed";
/// A member was passed over for its greeting, or its silence; the next one was tried.
pub const MEMBER_PASSED_OVER: &str = "member-passed-over";

/// A client talked before it was greeted, whatever became of it.
pub const EARLY_TALKER: &str = "early-talker";
/// A member failed at TLS or its preparation by another rule of the virtual server; the next one was tried.
pub const MEMBER_UNFIT: &str = "member-unfit";
/// A message of a client whose line ends had to be mended; its session is over.
pub const MESSAGE_NORMALIZED: &str = "message-normalized";

/// Counters; every [`End`] counts under its own word.
#[derive(Debug, Default)]
pub(super) struct Events {
    ends: [AtomicU64; End::ALL.len()],
    pub(super) no_virtual_server: AtomicU64,
    pub(super) accept_paused: AtomicU64,
    pub(super) member_connect_failed: AtomicU64,
    pub(super) member_passed_over: AtomicU64,
    pub(super) early_talker: AtomicU64,
    pub(super) member_unfit: AtomicU64,
    pub(super) message_normalized: AtomicU64,
    /// When the last complaint about a member was logged.
    complained: Mutex<Option<Instant>>,
}

impl Events {
    /// A session ended.
    pub(super) fn count_end(&self, end: End) {
        self.ends[end as usize].fetch_add(1, Relaxed);
    }

    /// A member cannot be spoken to as its virtual server demands; the log says why, once a second at most.
    pub(super) fn member_is_unfit(&self, member: &LiveMember, why: &dyn fmt::Display) {
        self.member_unfit.fetch_add(1, Relaxed);
        let mut complained = self
            .complained
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if complained.is_none_or(|last| last.elapsed() >= COMPLAIN_EVERY) {
            *complained = Some(Instant::now());
            log::warn!(
                "member \"{}\" ({}) gets no session: {why}",
                member.name,
                member.address
            );
        }
    }

    /// Every name, those that never happened included.
    pub(super) fn snapshot(&self) -> BTreeMap<String, u64> {
        let ends = End::ALL.map(|end| (end.as_str(), &self.ends[end as usize]));
        let others = [
            (NO_VIRTUAL_SERVER, &self.no_virtual_server),
            (ACCEPT_PAUSED, &self.accept_paused),
            (MEMBER_CONNECT_FAILED, &self.member_connect_failed),
            (MEMBER_PASSED_OVER, &self.member_passed_over),
            (EARLY_TALKER, &self.early_talker),
            (MEMBER_UNFIT, &self.member_unfit),
            (MESSAGE_NORMALIZED, &self.message_normalized),
        ];
        let all = ends.into_iter().chain(others);
        all.map(|(name, count)| (name.to_owned(), count.load(Relaxed)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_has_its_own_counter() {
        let events = Events::default();
        for (times, end) in End::ALL.into_iter().enumerate() {
            assert_eq!(end as usize, times);
            (0..times).for_each(|_| events.count_end(end));
        }
        let counts = events.snapshot();
        for (times, end) in End::ALL.into_iter().enumerate() {
            assert_eq!(counts[end.as_str()], times as u64);
        }
        assert_eq!(counts.len(), End::ALL.len() + 7);
    }
}
