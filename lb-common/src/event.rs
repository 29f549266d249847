//! What the programs tell the daemon when something is over, in the order of a ring buffer.

use crate::{flow::Route, map_record, tcp::Phase};

map_record!(
    /// A passthrough flow that has ended. Wire order inside [`Route`], native order else.
    FlowEnd {
        /// Bytes forward and reverse, IP header included.
        bytes: [u64; 2],
        /// The four ends.
        route: Route,
        /// Packets forward and reverse.
        packets: [u32; 2],
        /// As in the flow's record.
        owners: u32,
        /// Tick of the first packet.
        created: u32,
        /// Tick of the last packet.
        last_seen: u32,
        /// Tick of the end.
        ended: u32,
        /// The [`Phase`] it was in.
        phase: u8,
        /// Why it was taken apart: a [`Cause`].
        cause: u8,
        /// Which side sent the last reset that counted: a [`crate::tcp::Direction`].
        reset_by: u8,
        /// Nothing yet.
        reserved: [u8; 5],
    } size 120 align 8
);

/// Size of the ring buffer, bytes: about 8,000 ends, of which a daemon that lives fetches ten times a second.
pub const FLOW_ENDS_BYTES: u32 = 1 << 20;

/// Why a flow's record was taken apart.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// It had been idle for longer than its phase allows.
    Expired = 0,
    /// The client has begun a new connection with the same port.
    Reused = 1,
    /// Half-open, it made room for a new flow.
    Reclaimed = 2,
    /// Its member was drained, and the time was over.
    Drained = 3,
    /// Its member went into maintenance.
    Maintenance = 4,
    /// Its member was found down, and its pool resets flows then.
    MemberDown = 5,
    /// The kernel plane was taken down.
    Stopped = 6,
}

impl Cause {
    /// From its number; one of a later version counts as expired.
    #[inline(always)]
    pub const fn from_u8(number: u8) -> Self {
        match number {
            1 => Self::Reused,
            2 => Self::Reclaimed,
            3 => Self::Drained,
            4 => Self::Maintenance,
            5 => Self::MemberDown,
            6 => Self::Stopped,
            _ => Self::Expired,
        }
    }
}

impl FlowEnd {
    /// Why the connection ended, in a word for logs; see `docs/metrics.md`.
    pub const fn reason(&self) -> &'static str {
        match Cause::from_u8(self.cause) {
            Cause::Drained => return "drained",
            Cause::Maintenance => return "maint",
            Cause::MemberDown => return "member-down",
            Cause::Stopped => return "stopped",
            Cause::Reclaimed if self.phase == Phase::Syn as u8 => return "reclaimed",
            Cause::Expired | Cause::Reused | Cause::Reclaimed => {}
        }
        match (Phase::from_u32(self.phase as u32), self.reset_by) {
            (Phase::Closing, _) => "closed",
            (Phase::Reset, 0) => "reset-by-client",
            (Phase::Reset, _) => "reset-by-member",
            (Phase::Syn, _) => "half-open-timeout",
            _ => "idle-timeout",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{addr::Addr, flow::FlowKey};

    #[test]
    fn a_reason_for_every_end() {
        let key = FlowKey {
            src: Addr::UNSET,
            dst: Addr::UNSET,
            sport: 0,
            dport: 0,
        };
        let reason = |phase: Phase, cause: Cause, reset_by: u8| {
            let end = FlowEnd {
                bytes: [0; 2],
                route: Route { leave: [key; 2] },
                packets: [0; 2],
                owners: 0,
                created: 0,
                last_seen: 0,
                ended: 0,
                phase: phase as u8,
                cause: cause as u8,
                reset_by,
                reserved: [0; 5],
            };
            end.reason()
        };
        use {Cause::*, Phase::*};
        assert_eq!(reason(Closing, Expired, 0), "closed");
        assert_eq!(reason(Closing, Reused, 0), "closed");
        assert_eq!(reason(Reset, Expired, 0), "reset-by-client");
        assert_eq!(reason(Reset, Reused, 1), "reset-by-member");
        assert_eq!(reason(Syn, Expired, 0), "half-open-timeout");
        assert_eq!(reason(Syn, Reclaimed, 0), "reclaimed");
        assert_eq!(reason(Closing, Reclaimed, 0), "closed");
        for phase in [Established, FinClient, FinMember] {
            assert_eq!(reason(phase, Expired, 1), "idle-timeout");
        }
        assert_eq!(reason(Established, Drained, 0), "drained");
        assert_eq!(reason(Syn, Maintenance, 0), "maint");
        assert_eq!(reason(Established, MemberDown, 0), "member-down");
        assert_eq!(reason(FinClient, Stopped, 0), "stopped");
        for number in 0..=6 {
            assert_eq!(Cause::from_u8(number) as u8, number);
        }
    }
}
