//! The phases of a passthrough flow, and how long each may idle.

/// Offsets in the TCP header (RFC 9293 §3.1).
pub mod at {
    /// Sequence number; the acknowledgement follows.
    pub const SEQUENCE: usize = 4;
    /// Acknowledgement number.
    pub const ACKNOWLEDGEMENT: usize = 8;
    /// Header length in the high half of the byte; the flag byte follows.
    pub const LENGTH: usize = 12;
    /// Checksum.
    pub const CHECKSUM: usize = 16;
}

/// A TCP flag byte (RFC 9293 §3.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flags(pub u8);

impl Flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// The receiver need not wait for more.
    pub const PSH: u8 = 0x08;
    /// The acknowledgement field counts.
    pub const ACK: u8 = 0x10;

    /// Is any of these set?
    #[inline(always)]
    pub const fn any(self, mask: u8) -> bool {
        self.0 & mask != 0
    }

    /// The first packet of a connection: SYN without ACK, RST and FIN.
    #[inline(always)]
    pub const fn opens(self) -> bool {
        self.0 & (Self::SYN | Self::ACK | Self::RST | Self::FIN) == Self::SYN
    }
}

/// Which way a packet of a flow travels.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From the client to the member.
    Forward = 0,
    /// From the member to the client.
    Reverse = 1,
}

/// Where a flow is in its life. Stored as `u32`; 0 means that the record is free.
///
/// ```text
///              client's true ACK            one FIN                     other FIN
///   Syn ──────────────────▶ Established ──────────────▶ FinClient/FinMember ─────▶ Closing
///    └──────────────────────────┴──────── RST ───────────────┴────────▶ Reset ──▶ Established, when talk goes on
/// ```
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// The record is free.
    Free = 0,
    /// Half-open: the client has not acknowledged the member's SYN yet.
    Syn = 1,
    /// Data may flow both ways.
    Established = 2,
    /// The client has sent its FIN.
    FinClient = 3,
    /// The member has sent its FIN.
    FinMember = 4,
    /// Both have; only acknowledgements and retransmissions follow.
    Closing = 5,
    /// A reset has passed. The other end may not believe it (RFC 5961 §3): if talk goes on, so does the flow; if not,
    /// whoever still sends gets another reset.
    Reset = 6,
    /// Being filled or taken apart; nobody else may touch it.
    Claimed = 7,
    /// The connection was taken apart since its client has begun another one; its port towards the member rests on.
    Forgotten = 8,
}

impl Phase {
    /// From its stored number; an unknown one counts as claimed, which nobody touches.
    #[inline(always)]
    pub const fn from_u32(number: u32) -> Self {
        match number {
            0 => Self::Free,
            1 => Self::Syn,
            2 => Self::Established,
            3 => Self::FinClient,
            4 => Self::FinMember,
            5 => Self::Closing,
            6 => Self::Reset,
            8 => Self::Forgotten,
            _ => Self::Claimed,
        }
    }

    /// The phase after a packet whose numbers are believed.
    #[inline(always)]
    #[must_use]
    pub const fn after(self, direction: Direction, flags: Flags) -> Self {
        if flags.any(Flags::RST) {
            return match self {
                Self::Free | Self::Claimed | Self::Forgotten | Self::Closing => self,
                _ => Self::Reset,
            };
        }
        let fin = flags.any(Flags::FIN);
        match (self, direction) {
            (Self::Reset, _) if !flags.any(Flags::SYN) => Self::Established,
            (Self::Syn | Self::Established, Direction::Forward) if fin => Self::FinClient,
            (Self::Syn | Self::Established, Direction::Reverse) if fin => Self::FinMember,
            (Self::FinClient, Direction::Reverse) if fin => Self::Closing,
            (Self::FinMember, Direction::Forward) if fin => Self::Closing,
            (Self::Syn, _) if flags.any(Flags::ACK) && !flags.any(Flags::SYN) => Self::Established,
            _ => self,
        }
    }

    /// Does a record with this number carry a connection, be it one that has ended?
    #[inline(always)]
    pub const fn is_live(number: u32) -> bool {
        number.wrapping_sub(Self::Syn as u32) <= Self::Reset as u32 - Self::Syn as u32
    }

    /// Has the connection ended, so that it no longer counts as active?
    #[inline(always)]
    pub const fn ended(self) -> bool {
        matches!(self, Self::Closing | Self::Reset)
    }

    /// The word used in views and logs.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Syn => "syn",
            Self::Established => "established",
            Self::FinClient => "fin-client",
            Self::FinMember => "fin-member",
            Self::Closing => "closing",
            Self::Reset => "reset",
            Self::Claimed => "claimed",
            Self::Forgotten => "forgotten",
        }
    }
}

/// Which configured idle limit; the index into [`crate::service::Config::limits`].
#[repr(usize)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Limit {
    /// Half-open.
    Syn = 0,
    /// Open both ways.
    Established = 1,
    /// One side has finished.
    HalfClosed = 2,
    /// Both have; so long a port rests.
    Closing = 3,
}

/// How many there are.
pub const LIMITS: usize = 4;

/// Ticks that a reset flow waits for an end that does not believe it.
pub const RESET_LIMIT: u32 = 2;

/// Idle limits in ticks unless configured, by [`Limit`].
///
/// Established: RFC 5382 §5, REQ-5: at least 2 h 4 min; half-closed: its transitory limit of 4 min. Closing: a member may
/// hold its last connection from that port in TIME-WAIT for a minute. Half-open: longer than the gap between a client's
/// fifth and sixth SYN.
pub const DEFAULT_LIMITS: [u32; LIMITS] = [60, 7440, 240, 56];

/// How far a sender may be from what the other side has acknowledged, bytes: as much as Linux buffers at most unless told
/// otherwise (`net.ipv4.tcp_wmem`).
const NEAR: u32 = 1 << 22;
/// How far an acknowledgement may go beyond the one before, bytes: a hole is filled, and much waited behind it.
const LEAP: u32 = 1 << 25;

/// May a sender be at this sequence number, given what the other side has acknowledged? Who sees neither side has to sweep
/// the numbers, and may then shorten how long a flow may idle (RFC 5961 §1.2), but ends nothing.
#[inline(always)]
pub const fn plausible(sequence: u32, acknowledged: u32) -> bool {
    sequence.wrapping_sub(acknowledged).wrapping_add(NEAR) < 2 * NEAR
}

/// Does an acknowledgement go beyond the one before?
#[inline(always)]
pub const fn advances(acknowledged: u32, before: u32) -> bool {
    acknowledged.wrapping_sub(before).wrapping_sub(1) < LEAP
}

/// A tick is 2^30 ns, 1.07 s: a shift of the monotonic clock instead of a division.
pub const TICK_SHIFT: u32 = 30;

/// The tick of a monotonic instant in nanoseconds.
#[inline(always)]
pub const fn tick(now_ns: u64) -> u32 {
    (now_ns >> TICK_SHIFT) as u32
}

/// The ticks that cover so many milliseconds.
pub const fn ticks(milliseconds: u64) -> u32 {
    (milliseconds * 1_000_000).div_ceil(1 << TICK_SHIFT) as u32
}

#[cfg(test)]
mod tests {
    use super::{Direction::*, Phase::*, *};

    const ACK: u8 = Flags::ACK;
    const SYN: u8 = Flags::SYN;
    const FIN: u8 = Flags::FIN | Flags::ACK;
    const RST: u8 = Flags::RST;

    fn walk(steps: &[(Direction, u8)]) -> Phase {
        steps.iter().fold(Syn, |phase, &(direction, flags)| {
            phase.after(direction, Flags(flags))
        })
    }

    #[test]
    fn life_of_a_connection() {
        assert_eq!(
            walk(&[(Forward, SYN)]),
            Syn,
            "a repeated SYN changes nothing"
        );
        assert_eq!(
            walk(&[(Reverse, SYN | ACK)]),
            Syn,
            "only the client's ACK establishes"
        );
        let open = [(Reverse, SYN | ACK), (Forward, ACK)];
        assert_eq!(walk(&open), Established);
        let close =
            |first, second| walk(&[open[0], open[1], (first, FIN), (first, ACK), (second, FIN)]);
        assert_eq!(close(Forward, Reverse), Closing);
        assert_eq!(close(Reverse, Forward), Closing);
    }

    #[test]
    fn half_close_lasts_until_the_other_side_ends() {
        let half = walk(&[
            (Forward, ACK),
            (Forward, FIN),
            (Forward, ACK),
            (Reverse, ACK),
            (Forward, FIN),
        ]);
        assert_eq!(half, FinClient);
        assert!(!half.ended());
    }

    #[test]
    fn a_reset_ends_every_live_phase() {
        for phase in [Syn, Established, FinClient, FinMember] {
            assert_eq!(phase.after(Reverse, Flags(RST)), Reset);
        }
        assert_eq!(Claimed.after(Forward, Flags(RST)), Claimed);
        assert_eq!(
            Closing.after(Forward, Flags(RST)),
            Closing,
            "its port rests on"
        );
        assert_eq!(
            Reset.after(Forward, Flags(ACK)),
            Established,
            "the reset was not believed"
        );
        assert_eq!(Reset.after(Forward, Flags(SYN)), Reset);
    }

    #[test]
    fn numbers_are_judged_around_the_end_of_their_space() {
        let acknowledged = u32::MAX - 5;
        for (distance, near, further) in [
            (0, true, false),
            (1, true, true),
            (-1, true, false),
            (1 << 23, false, true),
            (1 << 26, false, false),
            (-(1 << 23), false, false),
            (i32::MIN, false, false),
        ] {
            let number = acknowledged.wrapping_add_signed(distance);
            assert_eq!(plausible(number, acknowledged), near, "{distance}");
            assert_eq!(advances(number, acknowledged), further, "{distance}");
        }
    }

    #[test]
    fn only_a_bare_syn_opens() {
        assert!(Flags(SYN).opens());
        assert!(Flags(SYN | 0xc0).opens(), "ECN bits are allowed");
        for flags in [SYN | ACK, SYN | RST, SYN | FIN, ACK, 0] {
            assert!(!Flags(flags).opens());
        }
    }

    #[test]
    fn numbers_round_trip() {
        for number in 0..=8 {
            let phase = Phase::from_u32(number);
            assert_eq!(phase as u32, number);
            let live = !matches!(phase, Free | Claimed | Forgotten);
            assert_eq!(Phase::is_live(number), live, "{phase:?}");
        }
        assert_eq!(Phase::from_u32(99), Claimed);
    }
}
