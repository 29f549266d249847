//! What needs more looking at: VLAN tags, fragments, extension headers of IPv6.

use lb_common::{flow::FragmentKey, reason::DropReason};
use network_types::{
    eth::EtherType,
    ip::{IpProto, Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};

use super::{
    Packet,
    link::{self, Link},
    segment,
};
use crate::{
    Frame,
    frame::{addresses, word},
};

/// Extension headers that are walked over; senders use one or two.
const EXTENSIONS: usize = 6;
/// Where the TCP header begins at the latest, bytes.
const DEEPEST: usize = 384;
/// Numbers of the extension headers that are walked over: hop-by-hop options, routing, fragment, destination options
/// (RFC 8200 §4). An authentication header would not survive a change of addresses, so such packets are left alone.
const WALKED: u64 = 1 | 1 << ROUTING | 1 << FRAGMENT_HEADER | 1 << 60;
const ROUTING: u8 = 43;
const FRAGMENT_HEADER: u8 = 44;
/// The fragment offset, IPv4 in the low 13 bits (RFC 791 §3.1), IPv6 in the high 13 (RFC 8200 §4.5); host order.
const OFFSET4: u16 = 0x1fff;
const OFFSET6: u16 = 0xfff8;
const MORE4: u16 = 0x2000;

/// Which part of a packet a frame holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u32)]
pub enum Part {
    /// All of it.
    #[default]
    Whole = 0,
    /// The first fragment, with the ports.
    First = 1,
    /// A later one, without.
    Later = 2,
    /// Something whose TCP header, if it has one, cannot be read: of a first fragment that is cut before its end, or behind
    /// more extension headers than anybody needs. The stack would put it together and read it, past everything that judges.
    Cut = 3,
}

/// A TCP packet or a fragment of one. The ports of a later fragment are 0, and its flags none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Deep {
    /// Tags and where the IP header is.
    pub link: Link,
    /// The rest, as of any packet.
    pub packet: Packet,
    /// How much of the packet it is.
    pub part: Part,
    /// Identification of a fragmented packet, network order; fragments of IPv4 have 16 bits of it.
    pub id: u32,
}

impl Deep {
    /// What all fragments of the packet have in common.
    #[inline(always)]
    pub(crate) const fn fragment(&self) -> FragmentKey {
        FragmentKey {
            src: self.packet.key.src,
            dst: self.packet.key.dst,
            id: self.id,
        }
    }
}

/// Parses a frame; false when it is no part of a TCP packet, and so none of ours.
///
/// # Errors
///
/// [`DropReason::Truncated`] when a TCP packet ends inside its headers.
#[inline(always)]
pub(crate) fn deep<F: Frame>(frame: &mut F, deep: &mut Deep) -> Result<bool, DropReason> {
    if !link::link(frame, &mut deep.link) {
        return Ok(false);
    }
    deep.packet.l3 = deep.link.l3;
    let tcp = match deep.link.kind {
        kind if kind == EtherType::Ipv4 as u16 => v4(frame, deep)?,
        kind if kind == EtherType::Ipv6 as u16 => v6(frame, deep)?,
        _ => false,
    };
    if !tcp || deep.part == Part::Later || deep.part == Part::Cut {
        return Ok(tcp);
    }
    match segment(frame, &mut deep.packet) {
        // RFC 1858 §3; RFC 7112 §5.
        Err(_) if deep.part == Part::First => deep.part = Part::Cut,
        found => found?,
    }
    Ok(true)
}

#[inline(always)]
fn v4<F: Frame>(frame: &mut F, deep: &mut Deep) -> Result<bool, DropReason> {
    let l3 = deep.link.l3;
    frame.reach(l3 + Ipv4Hdr::LEN)?;
    let ip: Ipv4Hdr = frame.load(l3)?;
    let header = usize::from(ip.vihl & 0x0f) * 4;
    if ip.vihl >> 4 != 4 || header < Ipv4Hdr::LEN || ip.proto != IpProto::Tcp as u8 {
        return Ok(false);
    }
    let packet = &mut deep.packet;
    packet.key = addresses(frame, l3, false)?;
    packet.l4 = l3 + header;
    packet.length = u32::from(u16::from_be_bytes(ip.tot_len));
    packet.ttl = ip.ttl;
    let field = u16::from_be_bytes(ip.frags);
    deep.id = u32::from(u16::from_ne_bytes(ip.id));
    deep.part = part(field & OFFSET4 != 0, field & MORE4 != 0);
    Ok(true)
}

#[inline(always)]
fn v6<F: Frame>(frame: &mut F, deep: &mut Deep) -> Result<bool, DropReason> {
    let l3 = deep.link.l3;
    frame.reach(l3 + Ipv6Hdr::LEN)?;
    let ip: Ipv6Hdr = frame.load(l3)?;
    let packet = &mut deep.packet;
    packet.v6 = true;
    packet.key = addresses(frame, l3, true)?;
    // On the wire a mapped address is no address (RFC 4291 §2.5.5.2); in the tables it would be an IPv4 one.
    if packet.key.src.is_v4() || packet.key.dst.is_v4() {
        return Ok(false);
    }
    packet.length = Ipv6Hdr::LEN as u32 + u32::from(u16::from_be_bytes(ip.payload_len));
    packet.ttl = ip.hop_limit;
    let mut walk = Walk {
        at: l3 + Ipv6Hdr::LEN,
        next: ip.next_hdr,
        ..Walk::default()
    };
    if walk_extensions(frame, &mut walk).is_err() || walked(walk.next) && walk.field & OFFSET6 == 0
    {
        deep.part = Part::Cut;
        return Ok(true);
    }
    packet.l4 = walk.at;
    deep.id = walk.id;
    deep.part = part(walk.field & OFFSET6 != 0, walk.field & 1 != 0);
    // A later fragment says what its packet's first one begins with: TCP, or options before it.
    let known = walk.next == IpProto::Tcp as u8 || deep.part == Part::Later;
    // Segments left: the packet goes elsewhere first (RFC 8200 §4.4).
    Ok(known && walk.left == 0)
}

#[inline(always)]
const fn part(offset: bool, more: bool) -> Part {
    match (offset, more) {
        (true, _) => Part::Later,
        (false, true) => Part::First,
        (false, false) => Part::Whole,
    }
}

/// A walk over extension headers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Walk {
    /// Where the next header begins.
    pub(crate) at: usize,
    /// What it is.
    pub(crate) next: u8,
    /// Offset and flags of a fragment header, host order.
    pub(crate) field: u16,
    /// Its identification, network order.
    pub(crate) id: u32,
    /// Segments left of routing headers.
    pub(crate) left: u8,
}

/// Walks to the first header that is none of these, or to the payload of a later fragment.
///
/// A step has no branches but its ends: the verifier follows every combination of a loop's branches.
#[inline(always)]
pub(crate) fn walk_extensions<F: Frame>(frame: &mut F, walk: &mut Walk) -> Result<(), DropReason> {
    for _ in 0..EXTENSIONS {
        if !walked(walk.next) || walk.field & OFFSET6 != 0 {
            break;
        }
        let at = place(walk.at)?;
        frame.reach(at + 8)?;
        let [head, field, high, low]: [u16; 4] = frame.load(at)?;
        let [next, length] = head.to_ne_bytes();
        let fragment = mask(walk.next, FRAGMENT_HEADER);
        let routing = mask(walk.next, ROUTING);
        walk.field |= u16::from_be(field) & fragment;
        walk.id |= word([high & fragment, low & fragment]);
        walk.left |= field.to_ne_bytes()[1] & routing as u8;
        walk.at = at + (usize::from(length & !(fragment as u8)) + 1) * 8;
        walk.next = next;
    }
    walk.at = place(walk.at)?;
    Ok(())
}

#[inline(always)]
const fn walked(number: u8) -> bool {
    number < 64 && WALKED >> number & 1 != 0
}

/// A place that headers may begin at, with its bound where the verifier sees it: before Linux 6.8 it forgets what was
/// compared with a value on the stack.
#[inline(always)]
fn place(at: usize) -> Result<usize, DropReason> {
    match at > DEEPEST {
        true => Err(DropReason::Truncated),
        false => Ok(crate::opaque::opaque(at as u64) as usize & (DEEPEST.next_power_of_two() - 1)),
    }
}

/// All ones when both are the same, else zero.
#[inline(always)]
fn mask(one: u8, other: u8) -> u16 {
    // 0 when the same, else at least 1: less one, only the first has its high half set.
    let difference = crate::opaque::opaque(u64::from(one ^ other));
    (difference.wrapping_sub(1) >> 32) as u16
}

/// How much of a TCP header has to be quoted for its checksum to be there.
pub(crate) const QUOTED_TCP: usize = TcpHdr::LEN;
