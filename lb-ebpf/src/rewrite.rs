//! One edit of a packet: addresses, ports, TTL and both checksums.

use core::mem::offset_of;

use lb_common::{checksum::Delta, flow::FlowKey, reason::DropReason, tcp::at};
use network_types::ip::{IpProto, Ipv4Hdr, Ipv6Hdr};

use crate::{Frame, Packet, frame::halves};

/// Offset of the next-header byte in the IPv6 header; the hop limit follows (RFC 8200 §3).
const NEXT_HEADER: usize = offset_of!(Ipv6Hdr, next_hdr);

/// What a packet's TCP checksum has to follow.
#[derive(Clone, Copy, Debug)]
pub struct ChecksumEdit {
    /// Offset of the checksum field.
    pub at: usize,
    /// Change of the addresses, part of the pseudo-header.
    pub addresses: Delta,
    /// Change of the ports, part of the segment.
    pub ports: Delta,
    /// Sum of the pseudo-header before the change, unfolded.
    pub pseudo: u64,
    /// Offset of the TCP header.
    pub l4: usize,
    /// Length of the segment as the IP header says, bytes.
    pub segment: u32,
    /// Is the checksum complete for sure? Nobody cuts a packet before that.
    pub complete: bool,
}

/// Makes a packet say `to` instead of what it said.
#[inline(always)]
pub(crate) fn apply<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    to: &FlowKey,
    complete: bool,
) -> Result<(), DropReason> {
    let from = &packet.key;
    let mut pseudo = 0;
    for word in 0..4 {
        if packet.v6 || word == 3 {
            pseudo += u64::from(from.src.0[word]) + u64::from(from.dst.0[word]);
        }
    }
    let segment = packet.length.saturating_sub((packet.l4 - packet.l3) as u32);
    pseudo += u64::from(u32::from(IpProto::Tcp as u8).to_be()) + u64::from(segment.to_be());
    let addresses = header(frame, packet, to)?;
    frame.store(packet.l4, [to.sport, to.dport])?;
    frame.amend_checksum(&ChecksumEdit {
        at: packet.l4 + at::CHECKSUM,
        addresses,
        ports: Delta::NONE
            .half(from.sport, to.sport)
            .half(from.dport, to.dport),
        pseudo,
        l4: packet.l4,
        segment,
        complete,
    })
}

/// Makes an IP header say the addresses of `to`, takes one off its TTL, and returns what that adds to the sum of the
/// addresses.
#[inline(always)]
pub(crate) fn header<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    to: &FlowKey,
) -> Result<Delta, DropReason> {
    let from = &packet.key;
    let mut addresses = Delta::NONE
        .word(from.src.0[3], to.src.0[3])
        .word(from.dst.0[3], to.dst.0[3]);
    if packet.v6 {
        for word in 0..3 {
            addresses = addresses
                .word(from.src.0[word], to.src.0[word])
                .word(from.dst.0[word], to.dst.0[word]);
        }
        let at = packet.l3 + NEXT_HEADER;
        let [next, _] = frame.load::<u16>(at)?.to_ne_bytes();
        let hop = u16::from_ne_bytes([next, packet.ttl.wrapping_sub(1)]);
        frame.store_summed(at, hop)?;
        frame.store_addresses(packet.l3 + offset_of!(Ipv6Hdr, src_addr), to)?;
    } else {
        let [ttl, check] =
            [offset_of!(Ipv4Hdr, ttl), offset_of!(Ipv4Hdr, check)].map(|at| packet.l3 + at);
        let old: u16 = frame.load(ttl)?;
        let [_, protocol] = old.to_ne_bytes();
        let new = u16::from_ne_bytes([packet.ttl.wrapping_sub(1), protocol]);
        let sum: u16 = frame.load(check)?;
        frame.store(ttl, new)?;
        frame.store(check, addresses.half(old, new).apply(sum))?;
        let ([a, b], [c, d]) = (halves(to.src.0[3]), halves(to.dst.0[3]));
        frame.store(packet.l3 + offset_of!(Ipv4Hdr, src_addr), [a, b, c, d])?;
    }
    Ok(addresses)
}
