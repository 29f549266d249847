//! Answers of our own: ICMP errors about a packet that cannot go on because its time is over, because the next link is too
//! small, or because a policy rejects it; and RST, where the policy says so, or where tags hide a packet of no connection
//! from the stack, which would have sent it.
//!
//! The error goes back the way the packet came, and says it is from where the packet was sent to: the client talks to
//! the virtual address and to nobody else, and so does the member to the SNAT address. nftables NAT does the same.

use core::mem::offset_of;

use lb_common::{checksum::fold, layout::Jump, reason::DropReason, tcp};
use network_types::{
    eth::EtherType,
    ip::{IpProto, Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    Egress, Frame, Tables, Verdict,
    frame::{Partial, addresses, halves},
    parse::{self, Link},
    reset::reset,
};

/// What the first program found.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Notice {
    /// A [`DropReason`].
    pub reason: u32,
    /// The largest IP packet that the next link takes, bytes.
    pub mtu: u32,
    /// Tick of the last answer.
    pub tick: u32,
    /// Answers in that tick: of all else, and of too-big.
    pub counts: [u32; 2],
    /// Tags to put on the answer.
    pub vlan: u32,
}

/// Answers of one CPU in a tick (1.07 s), too-big apart from the rest; the kernel's own limit is 1000 a second (`net.ipv4.icmp_msgs_per_sec`).
pub const ANSWERS: u32 = 1000;
/// Lengths of the headers that come before the quoted packet.
const ROOM4: u32 = (Ipv4Hdr::LEN + 8) as u32;
const ROOM6: u32 = (Ipv6Hdr::LEN + 8) as u32;
/// Longest answers: what every host takes (RFC 1812 §4.3.2.3), what every link takes (RFC 4443 §2.4 (c)); bytes.
const LONGEST4: u32 = 576;
const LONGEST6: u32 = 1280;
/// TTL of an answer, as Linux sends it.
const TTL: u8 = 64;
/// Precedence "internetwork control" (RFC 1812 §4.3.2.5); of the packet's own only these bits stay.
const PRECEDENCE: u8 = 0xc0;
const SERVICE: u8 = 0x1e;
/// The fragment offset (RFC 791 §3.1), network order.
const OFFSET: u16 = 0x1fff_u16.to_be();

/// Turns a packet into the error about it.
///
/// # Errors
///
/// The reason why there is no answer.
#[inline(always)]
pub fn answer<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    notice: &Notice,
    egress: &mut Egress,
) -> Result<Verdict, DropReason> {
    let mut link = Link::default();
    if !parse::link(frame, &mut link) {
        return Err(DropReason::Internal);
    }
    if link.inside != 0 || link.outside {
        // The kernel makes room behind a plain Ethernet header only. So once more, without tags.
        frame.retag(&link, 0)?;
        tables.keep_tags(link.vlan);
        return Ok(Verdict::Jump(Jump::Answer));
    }
    back(frame, egress)?;
    let [kind4, kind6] = kinds(notice.reason);
    if by_reset(notice.reason) {
        reset(frame)?;
    } else if link.kind == EtherType::Ipv4 as u16 {
        v4(frame, &link, kind4, notice.mtu, tables.now())?;
    } else {
        v6(frame, &link, kind6, notice.mtu)?;
    }
    frame.address(egress)?;
    if notice.vlan != 0 {
        frame.retag(&link, notice.vlan)?;
    }
    Ok(Verdict::Send)
}

/// The way that a packet came.
#[inline(always)]
pub(crate) fn back<F: Frame>(frame: &F, egress: &mut Egress) -> Result<(), DropReason> {
    let [a, b, c, d, e, f]: [u16; 6] = frame.load(0)?;
    egress.interface = frame.ingress();
    egress.known = true;
    for (to, pair) in egress.macs.iter_mut().zip([[d, e], [f, a], [b, c]]) {
        *to = crate::frame::word(pair);
    }
    Ok(())
}

/// Is the answer a RST?
#[inline(always)]
const fn by_reset(reason: u32) -> bool {
    const POLICY: u32 = DropReason::PolicyReset as u32;
    const MEMBER: u32 = DropReason::NoMember as u32;
    const FLOW: u32 = DropReason::NoFlow as u32;
    matches!(reason, POLICY | MEMBER | FLOW)
}

/// Type and code for IPv4 and IPv6 (RFC 792, RFC 1812 §5.2.7.1, RFC 4443 §3).
#[inline(always)]
const fn kinds(reason: u32) -> [[u8; 2]; 2] {
    const EXPIRED: u32 = DropReason::TtlExceeded as u32;
    const PROHIBITED: u32 = DropReason::PolicyReject as u32;
    match reason {
        EXPIRED => [[11, 0], [3, 0]],
        PROHIBITED => [[3, 13], [1, 1]],
        _ => [[3, 4], [2, 0]],
    }
}

#[inline(always)]
fn v4<F: Frame>(
    frame: &mut F,
    link: &Link,
    kind: [u8; 2],
    mtu: u32,
    now: u64,
) -> Result<(), DropReason> {
    let l3 = link.l3;
    let ip: Ipv4Hdr = frame.load(l3)?;
    if u16::from_ne_bytes(ip.frags) & OFFSET != 0 {
        // Only about the first fragment (RFC 1812 §4.3.2.7).
        return Err(DropReason::NoAnswer);
    }
    let key = addresses(frame, l3, false)?;
    let length = u32::from(u16::from_be_bytes(ip.tot_len));
    let keep = length.min(LONGEST4 - ROOM4);
    let header = u32::from(ip.vihl & 0x0f) * 4;
    let finished = finished(frame, l3, header, length, keep, sum_of(&key, false))?;
    frame.quote(link, length, keep, ROOM4)?;
    let total = (keep + ROOM4) as u16;
    let id = (now >> 12) as u16;
    let first = [0x45, (ip.tos & SERVICE) | PRECEDENCE];
    let ([sa, sb], [da, db]) = (halves(key.dst.0[3]), halves(key.src.0[3]));
    let time = u16::from_ne_bytes([TTL, 1]);
    let first = u16::from_ne_bytes(first);
    let words = [first, total.to_be(), id, 0, time, sa, sb, da, db];
    let check = !fold(words.into_iter().map(u64::from).sum());
    frame.store(l3, [first, total.to_be(), id, 0])?;
    frame.store(l3 + 8, [time, check])?;
    frame.store(l3 + 12, [sa, sb, da, db])?;
    let words = message(kind, if kind[0] == 3 { mtu } else { 0 });
    let sum = finished_sum(frame, l3 as u32 + ROOM4, header, keep, finished)?;
    store_message(frame, l3 + Ipv4Hdr::LEN, words, sum)
}

#[inline(always)]
fn v6<F: Frame>(frame: &mut F, link: &Link, kind: [u8; 2], mtu: u32) -> Result<(), DropReason> {
    let l3 = link.l3;
    let ip: Ipv6Hdr = frame.load(l3)?;
    let key = addresses(frame, l3, true)?;
    let length = Ipv6Hdr::LEN as u32 + u32::from(u16::from_be_bytes(ip.payload_len));
    let keep = length.min(LONGEST6 - ROOM6);
    let header = if ip.next_hdr == IpProto::Tcp as u8 {
        Ipv6Hdr::LEN as u32
    } else {
        0
    };
    let ends = sum_of(&key, true);
    let finished = finished(frame, l3, header, length, keep, ends)?;
    frame.quote(link, length, keep, ROOM6)?;
    let payload = (keep + 8) as u16;
    frame.store(
        l3,
        [
            0x6000_u16.to_be(),
            0,
            payload.to_be(),
            u16::from_ne_bytes([58, TTL]),
        ],
    )?;
    let mut words = [0u16; 16];
    for at in 0..4 {
        [words[2 * at], words[2 * at + 1]] = halves(key.dst.0[at]);
        [words[8 + 2 * at], words[9 + 2 * at]] = halves(key.src.0[at]);
    }
    frame.store(l3 + offset_of!(Ipv6Hdr, src_addr), words)?;
    let words = message(kind, if kind[0] == 2 { mtu } else { 0 });
    let pseudo = ends + u64::from(u32::from(payload).to_be()) + u64::from(58u32.to_be());
    let sum = finished_sum(frame, l3 as u32 + ROOM6, header, keep, finished)?;
    store_message(frame, l3 + Ipv6Hdr::LEN, words, sum + pseudo)
}

/// Type, code, checksum, and the word behind them.
#[inline(always)]
fn message(kind: [u8; 2], word: u32) -> [u16; 4] {
    let [high, low] = halves(word.to_be());
    [u16::from_ne_bytes(kind), 0, high, low]
}

#[inline(always)]
fn store_message<F: Frame>(
    frame: &mut F,
    at: usize,
    mut words: [u16; 4],
    sum: u64,
) -> Result<(), DropReason> {
    let own: u64 = words.into_iter().map(u64::from).sum();
    words[1] = !fold(sum + own);
    frame.store(at, words)
}

/// The sum of both addresses, which is the same in either direction.
#[inline(always)]
fn sum_of(key: &lb_common::flow::FlowKey, v6: bool) -> u64 {
    let mut sum = 0;
    for word in 0..4 {
        if v6 || word == 3 {
            sum += u64::from(key.src.0[word]) + u64::from(key.dst.0[word]);
        }
    }
    sum
}

/// What the TCP segment of a packet will add to a sum once a device has finished its checksum; `u64::MAX` when it is
/// finished already.
///
/// A local sender leaves the sum of the pseudo-header in the field. The packet keeps its note that a device has to finish
/// it, which will make the segment, however short it is cut, sum up to the complement of what the field says now.
#[inline(always)]
fn finished<F: Frame>(
    frame: &mut F,
    l3: usize,
    header: u32,
    length: u32,
    keep: u32,
    ends: u64,
) -> Result<u64, DropReason> {
    let l4 = l3 + header as usize;
    let at = l4 + tcp::at::CHECKSUM;
    let may = frame.may_be_partial();
    let short = header + tcp::at::CHECKSUM as u32 + 2 > keep;
    if may == Partial::Never || header == 0 || short || frame.reach(at + 2).is_err() {
        return Ok(u64::MAX);
    }
    let field: u16 = frame.load(at)?;
    let segment = length.saturating_sub(header);
    let pseudo =
        ends + u64::from(u32::from(IpProto::Tcp as u8).to_be()) + u64::from(segment.to_be());
    if may == Partial::Perhaps {
        // One complete packet in 65,536 looks the same by chance: that one adds up.
        if field != fold(pseudo)
            || segment <= SUMMED && fold(frame.sum(l4 as u32, segment)? + pseudo) == u16::MAX
        {
            return Ok(u64::MAX);
        }
    }
    Ok(u64::from(!field))
}

/// The longest segment that is summed, bytes.
const SUMMED: u32 = 1536;

/// The sum of the quoted packet as it will be when a device has finished it.
#[inline(always)]
fn finished_sum<F: Frame>(
    frame: &F,
    at: u32,
    header: u32,
    keep: u32,
    finished: u64,
) -> Result<u64, DropReason> {
    let (length, more) = match finished {
        u64::MAX => (keep, 0),
        segment => (header, segment),
    };
    Ok(frame.sum(at, length)? + more)
}
