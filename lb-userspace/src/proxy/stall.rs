//! Who does not take what there is for it, and since when.
//!
//! Each direction has a clock of its own: it runs while something is held for the peer, begins anew with every byte that
//! this peer takes and none that the other does, and ends the session after `send_timeout`. The member's rests while its
//! replies are not read because the client has too many unread: it may be stuck in saying one.
//!
//! The machine's own deadline stands still only while the peer that it waits for is kept from going on, and then begins
//! anew. A client is, while it lacks bytes of ours, and while nothing of it is read because the member does not take
//! it; a member is, while it lacks bytes, and while its replies are not read.

use std::time::{Duration, Instant};

/// The clocks of a session.
#[derive(Debug, Default)]
pub(super) struct Stalls {
    client: Option<Instant>,
    member: Option<Instant>,
    excused: bool,
}

/// What is held now.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Held {
    /// Bytes for the client.
    pub(super) for_client: bool,
    /// Bytes for the member.
    pub(super) for_member: bool,
    /// So many for the client that the member is not read.
    pub(super) unread: bool,
}

/// Who has not taken anything for too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stuck {
    Client,
    Member,
}

impl Stalls {
    /// The client has taken something.
    pub(super) fn client_took(&mut self) {
        self.client = None;
    }

    /// The member has.
    pub(super) fn member_took(&mut self) {
        self.member = None;
    }

    /// Looks at what is held, when all was offered; true when the machine's wait begins anew.
    pub(super) fn note(&mut self, held: Held, awaits_member: bool) -> bool {
        let run = |clock: &mut Option<Instant>, runs: bool| match runs {
            true => _ = clock.get_or_insert_with(Instant::now),
            false => *clock = None,
        };
        run(&mut self.client, held.for_client);
        run(&mut self.member, held.for_member && !held.unread);
        let excused = held.for_member
            || match awaits_member {
                true => held.unread,
                false => held.for_client,
            };
        std::mem::replace(&mut self.excused, excused) && !excused
    }

    /// Has whom the machine waits for a reason not to go on?
    pub(super) fn excuse(&self) -> bool {
        self.excused
    }

    /// When which of the two is stuck, if nothing changes.
    pub(super) fn due(&self, send: Duration) -> Option<(Instant, Stuck)> {
        let client = self.client.map(|since| (since + send, Stuck::Client));
        let member = self.member.map(|since| (since + send, Stuck::Member));
        client.into_iter().chain(member).min_by_key(|(due, _)| *due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEND: Duration = Duration::from_secs(1);
    const NOTHING: Held = Held {
        for_client: false,
        for_member: false,
        unread: false,
    };
    const FOR_CLIENT: Held = Held {
        for_client: true,
        ..NOTHING
    };
    const FOR_MEMBER: Held = Held {
        for_member: true,
        ..NOTHING
    };
    const BOTH: Held = Held {
        for_client: true,
        ..FOR_MEMBER
    };
    const UNREAD: Held = Held {
        unread: true,
        ..BOTH
    };

    fn stuck(stalls: &Stalls) -> Option<Stuck> {
        stalls.due(SEND).map(|(_, stuck)| stuck)
    }

    #[test]
    fn what_one_takes_is_nothing_to_the_other() {
        let mut stalls = Stalls::default();
        stalls.note(FOR_CLIENT, true);
        let (due, _) = stalls.due(SEND).unwrap();
        for _ in 0..3 {
            stalls.note(BOTH, true);
            stalls.member_took();
            stalls.note(BOTH, true);
            assert_eq!(stalls.due(SEND), Some((due, Stuck::Client)));
        }
        let member = stalls.member;
        stalls.client_took();
        stalls.note(BOTH, true);
        assert_eq!(stalls.member, member);
        assert_eq!(stuck(&stalls), Some(Stuck::Member));
        stalls.note(NOTHING, true);
        assert_eq!(stalls.due(SEND), None);
    }

    #[test]
    fn a_member_is_not_blamed_while_it_is_not_heard() {
        let mut stalls = Stalls::default();
        stalls.note(FOR_MEMBER, true);
        assert_eq!(stuck(&stalls), Some(Stuck::Member));
        stalls.note(UNREAD, true);
        assert_eq!((stuck(&stalls), stalls.member), (Some(Stuck::Client), None));
    }

    #[test]
    fn a_wait_stands_still_for_whom_it_is_for() {
        for (held, awaits_member, excused) in [
            (NOTHING, true, false),
            (NOTHING, false, false),
            (FOR_CLIENT, false, true),
            (FOR_CLIENT, true, false),
            (FOR_MEMBER, false, true),
            (FOR_MEMBER, true, true),
            (UNREAD, true, true),
            (
                Held {
                    unread: true,
                    ..FOR_CLIENT
                },
                true,
                true,
            ),
        ] {
            let mut stalls = Stalls::default();
            assert!(!stalls.note(held, awaits_member));
            assert_eq!(stalls.excuse(), excused, "{held:?} {awaits_member}");
            assert_eq!(stalls.note(NOTHING, awaits_member), excused);
            assert!(!stalls.note(NOTHING, awaits_member));
        }
    }
}
