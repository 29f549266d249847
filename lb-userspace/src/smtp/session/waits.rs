//! How long the machine waits for whom.

use std::time::{Duration, Instant};

use super::{Border, Client, Expect, Member, Pending, Session};
use crate::smtp::{command::Verb, end::End, reply::Local};

/// The member did not answer in time.
const MEMBER_LATE: Local = Local::new(421, "4.4.2", "Mail server did not answer in time");
/// The client did not go on in time.
const CLIENT_LATE: Local = Local::new(421, "4.4.2", "Timeout exceeded");

impl Session {
    /// Until when the present wait may last; `None` while the shell waits for something of its own.
    pub fn deadline(&self) -> Option<Instant> {
        let wait = self.wait().map(|(limit, _)| self.since + limit);
        wait.into_iter().chain(self.search_deadline()).min()
    }

    /// Until when a member has to be found, while one is sought; whatever else is waited for.
    pub fn search_deadline(&self) -> Option<Instant> {
        let since = self.sought.filter(|_| self.seeks_member())?;
        Some(since + self.timeouts.find_member)
    }

    /// Is it the member that is waited for, not the client?
    pub fn awaits_member(&self) -> bool {
        matches!(self.wait(), Some((_, End::MemberTimeout)))
    }

    /// The shell connects a member: unless it is the next one of a search, that begins now.
    pub fn member_sought(&mut self, now: Instant) {
        self.sought.get_or_insert(now);
    }

    /// A peer that was slow to take our bytes has taken them: the others' wait begins now.
    pub fn unblocked(&mut self, now: Instant) {
        self.rest(now);
    }

    /// The deadline has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.search_deadline().is_some_and(|end| now >= end) {
            // There may be one that would have served.
            self.member_missed();
            return self.no_member();
        }
        let Some((limit, end)) = self.wait() else {
            return;
        };
        if now < self.since + limit {
            return;
        }
        match (end, self.member) {
            (End::MemberTimeout, Member::Greeting { .. } | Member::Preparing) => {
                self.pass_over(None);
            }
            (End::MemberTimeout, _) => self.close_now(Some(MEMBER_LATE), end),
            _ => self.close_now(Some(CLIENT_LATE), end),
        }
    }

    /// The present wait: how long, and what it means when it is over.
    fn wait(&self) -> Option<(Duration, End)> {
        let limits = &self.timeouts;
        let reply = |expect: &Expect| match expect {
            Expect::Command(Verb::Data) => limits.data_reply,
            Expect::EndOfData | Expect::Chunk { .. } => limits.data_end,
            Expect::Command(_) | Expect::Exchange => limits.reply,
        };
        match (&self.client, self.member, self.queue.front()) {
            (Client::Border(Border::Due | Border::Open), ..) | (_, Member::Absent, _) => None,
            _ if self.is_securing() => None,
            (_, Member::Greeting { .. } | Member::Preparing, _) => {
                Some((limits.greeting, End::MemberTimeout))
            }
            (Client::Content(_) | Client::Chunk(_) | Client::DiscardChunk(_), ..) => {
                Some((limits.data_block, End::DataTimeout))
            }
            (_, _, Some(Pending::Member(expect))) => Some((reply(expect), End::MemberTimeout)),
            (Client::Discard(_, Some(_)), ..) => Some((limits.data_block, End::DataTimeout)),
            (Client::Discard(_, None), ..) => Some((limits.discard, End::DataTimeout)),
            (Client::Closed, ..) => None,
            _ => Some((limits.command, End::CommandTimeout)),
        }
    }

    /// A new wait begins.
    pub(super) fn rest(&mut self, now: Instant) {
        self.since = now;
        self.progress = 0;
    }
}
