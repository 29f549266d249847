//! The rules of flows whose sequence numbers are shifted: a PROXY protocol header that the kernel plane inserted, or a
//! handshake that it answered itself with a SYN cookie.
//!
//! One engine serves both: sequence numbers grow by the shift of their direction, acknowledgements and SACK edges
//! shrink by the shift of the other one. A header shifts what the client sends by its length, a cookie shifts what the
//! member sends by its distance from the member's own initial number.
//!
//! Only the header needs a rule. It is a segment of its own and no packet ever grows: some packet of the client *becomes*
//! the header, and TCP itself repeats what was in that packet. Until the member has acknowledged it,
//!
//! - every client packet without payload becomes the header: it repeats at the pace of the client's TCP, whatever was
//!   lost, and its acknowledgement and window still arrive;
//! - so does payload at the first place of the stream, if no header is under way: the client repeats that payload;
//! - everything else is shifted and waits in the member's buffer for the header before it.

pub mod header;
#[cfg(test)]
mod simulation;

use crate::tcp::Flags;

/// [`crate::flow::Flow::header`]: a plain flow, nothing is shifted.
pub const PLAIN: u32 = 0;
/// The same: a header is to be inserted, none was sent yet.
pub const UNSENT: u32 = 1;
/// The same: the client's handshake was answered with a SYN cookie, the member has not answered its own yet. Until then
/// the reverse shift is the number that the client expects next, one more than the cookie. Bits 3 and 4 say the class of
/// the client's segment size ([`crate::cookie`]).
pub const WAITING: u32 = 4;
/// The same: shifted, with no header to insert, or one that the member has acknowledged.
pub const SETTLED: u32 = 5;

/// [`WAITING`], with the class of a segment size.
#[inline(always)]
pub const fn waiting(class: u32) -> u32 {
    WAITING | (class & 3) << 3
}

/// Is it [`WAITING`]?
#[inline(always)]
pub const fn waits(header: u32) -> bool {
    header & !(3 << 3) == WAITING
}

/// The class of a segment size that [`waiting`] was given.
#[inline(always)]
pub const fn waiting_class(header: u32) -> u32 {
    header >> 3 & 3
}

/// How long a header counts as under way, units of [`instant`], 157 ms. Shorter than the shortest time after which a
/// client repeats lost payload (200 ms in Linux), longer than its own packets of one flight are apart.
pub const PATIENCE: u32 = 150;

/// The instant when a header was sent, for [`crate::flow::Flow::header`], in units of 2^20 ns; never one of its words.
#[inline(always)]
pub const fn instant(now_ns: u64) -> u32 {
    (now_ns >> 20) as u32 | 2
}

/// What becomes of a client's packet.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Act {
    /// Its sequence number is shifted.
    Shift = 0,
    /// It becomes the header segment.
    Header = 1,
    /// Its sequence number stays.
    Keep = 2,
}

/// Decides about a packet from the client. `header`: the word of its flow; `first`: the number of the client's first byte.
#[inline(always)]
pub const fn forward(
    header: u32,
    first: u32,
    seq: u32,
    flags: Flags,
    payload: u32,
    now: u32,
) -> Act {
    if flags.any(Flags::SYN) {
        return Act::Keep;
    }
    if header == SETTLED {
        return Act::Shift;
    }
    // Before the first byte lie only probes for life, some with a byte of rubbish (RFC 1122 §4.2.3.6).
    let place = seq.wrapping_sub(first) as i32;
    let under_way = header != UNSENT && now.wrapping_sub(header) <= PATIENCE;
    if flags.any(Flags::RST) {
        // The member believes only the number that it expects next (RFC 5961 §3): with a header under way that is the
        // one behind it, else most likely the one before.
        return if place == 0 && !under_way {
            Act::Keep
        } else {
            Act::Shift
        };
    }
    if payload == 0 || place < 0 || (place == 0 && !under_way) {
        return Act::Header;
    }
    Act::Shift
}

/// Has the member, with this acknowledgement, everything up to the header's end? Asked until it has.
#[inline(always)]
pub const fn acknowledges(first: u32, length: u32, ack: u32) -> bool {
    ack.wrapping_sub(first) as i32 >= length as i32
}

/// What the client is told in place of the member's acknowledgement. SACK edges shrink by the length alone, and until the
/// header is settled the client is told none: they would say that all but nothing has arrived, and the repeat of the
/// first payload, which becomes the header, would wait for a timer.
///
/// Until the header is settled nothing before the first byte of the stream is acknowledged: the client never sent it.
/// Once it is, an acknowledgement from before is merely an old one, and comparing would go wrong after 2 GiB.
#[inline(always)]
pub const fn told(settled: bool, first: u32, length: u32, ack: u32) -> u32 {
    if !settled && !acknowledges(first, length, ack) {
        return first;
    }
    ack.wrapping_sub(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACK: Flags = Flags(Flags::ACK);
    const FIRST: u32 = u32::MAX - 5;

    fn at(place: i32, payload: u32, header: u32, now: u32) -> Act {
        let seq = FIRST.wrapping_add_signed(place);
        forward(header, FIRST, seq, ACK, payload, now)
    }

    #[test]
    fn an_empty_packet_is_the_header_wherever_it_stands() {
        for place in [-1, 0, 1, 5000] {
            assert_eq!(at(place, 0, UNSENT, 1000), Act::Header);
            assert_eq!(at(place, 0, 1000, 1001), Act::Header, "again and again");
            assert_eq!(at(place, 0, SETTLED, 1000), Act::Shift);
        }
    }

    #[test]
    fn first_payload_waits_while_a_header_is_under_way() {
        assert_eq!(at(0, 100, UNSENT, 1000), Act::Header);
        assert_eq!(at(0, 100, 1000, 1000 + PATIENCE), Act::Shift);
        assert_eq!(at(0, 100, 1000, 1001 + PATIENCE), Act::Header);
        assert_eq!(at(1, 100, UNSENT, 1000), Act::Shift);
        assert_eq!(at(-1, 1, 1000, 1000), Act::Header, "a probe for life");
    }

    #[test]
    fn a_reset_says_the_number_that_the_member_most_likely_expects() {
        let rst = Flags(Flags::RST);
        assert_eq!(forward(UNSENT, FIRST, FIRST, rst, 0, 9), Act::Keep);
        assert_eq!(forward(1000, FIRST, FIRST, rst, 0, 1001), Act::Shift);
        assert_eq!(forward(1000, FIRST, FIRST, rst, 0, 2000), Act::Keep);
        assert_eq!(forward(SETTLED, FIRST, FIRST, rst, 0, 2000), Act::Shift);
    }

    #[test]
    fn the_client_never_hears_of_the_header() {
        for place in 0..28 {
            let ack = FIRST.wrapping_add(place);
            assert!(!acknowledges(FIRST, 28, ack));
            assert_eq!(told(false, FIRST, 28, ack), FIRST);
        }
        assert!(acknowledges(FIRST, 28, FIRST.wrapping_add(28)));
        assert_eq!(told(false, FIRST, 28, FIRST.wrapping_add(28)), FIRST);
        assert_eq!(
            told(true, FIRST, 28, FIRST.wrapping_add(3 << 30)),
            FIRST.wrapping_add(3 << 30).wrapping_sub(28),
            "beyond 2 GiB nothing is compared"
        );
    }

    #[test]
    fn instants_are_no_words() {
        for now in [0, 1, 1 << 20, u64::MAX] {
            assert!(![PLAIN, UNSENT, SETTLED].contains(&instant(now)));
            assert!(!waits(instant(now)));
        }
        for class in 0..4 {
            assert!(waits(waiting(class)));
            assert_eq!(waiting_class(waiting(class)), class);
        }
        assert!(![PLAIN, UNSENT, SETTLED].into_iter().any(waits));
    }
}
