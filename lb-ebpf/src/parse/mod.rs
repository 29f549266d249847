//! From bytes to a packet: Ethernet, IPv4 or IPv6, TCP.

mod deep;
mod link;

use lb_common::{
    flow::FlowKey,
    layout::Jump,
    reason::DropReason,
    tcp::{Flags, at},
    vlan::{CUSTOMER, PROVIDER},
};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::{IpProto, Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};

pub(crate) use self::{
    deep::{Deep, Part, QUOTED_TCP, Walk, deep, walk_extensions},
    link::{Link, link},
};
use crate::{
    Frame, Verdict,
    frame::{addresses, word},
};

/// A TCP packet, and where its headers lie.
#[derive(Clone, Copy, Debug, Default)]
pub struct Packet {
    /// Addresses and ports as they arrived.
    pub key: FlowKey,
    /// TCP flags.
    pub flags: Flags,
    /// IPv6?
    pub v6: bool,
    /// Offset of the IP header.
    pub l3: usize,
    /// Offset of the TCP header.
    pub l4: usize,
    /// Length of IP header and payload as the header says, bytes.
    pub length: u32,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
    /// Length of IP and TCP headers, bytes.
    pub headers: u32,
}

impl Packet {
    /// Payload, bytes.
    #[inline(always)]
    pub const fn data(&self) -> u32 {
        self.length.saturating_sub(self.headers)
    }

    /// The sequence number that follows this segment.
    #[inline(always)]
    pub fn next(&self) -> u32 {
        self.sequence
            .wrapping_add(self.data())
            .wrapping_add(u32::from(self.flags.any(Flags::SYN)))
            .wrapping_add(u32::from(self.flags.any(Flags::FIN)))
    }
}

/// The fragment offset and the more-fragments bit (RFC 791 §3.1), network order.
const FRAGMENT: u16 = 0x3fff_u16.to_be();

/// Parses a frame; `None` when it is no TCP packet, and so none of ours.
///
/// # Errors
///
/// [`DropReason::Truncated`] when a TCP packet ends inside its headers.
#[inline(always)]
pub(crate) fn packet<F: Frame>(frame: &mut F) -> Result<Option<Packet>, DropReason> {
    let l3 = EthHdr::LEN;
    if frame.tagged() || frame.reach(l3 + Ipv4Hdr::LEN + TcpHdr::LEN).is_err() {
        return Ok(None);
    }
    let ether: EthHdr = frame.load(0)?;
    match ether.ether_type {
        kind if kind == EtherType::Ipv4 as u16 => v4(frame, l3),
        kind if kind == EtherType::Ipv6 as u16 => v6(frame, l3),
        _ => Ok(None),
    }
}

#[inline(always)]
fn v4<F: Frame>(frame: &mut F, l3: usize) -> Result<Option<Packet>, DropReason> {
    let ip: Ipv4Hdr = frame.load(l3)?;
    let header = usize::from(ip.vihl & 0x0f) * 4;
    if ip.vihl >> 4 != 4 || header < Ipv4Hdr::LEN || ip.proto != IpProto::Tcp as u8 {
        return Ok(None);
    }
    if u16::from_ne_bytes(ip.frags) & FRAGMENT != 0 {
        return Ok(None);
    }
    let mut packet = Packet {
        key: addresses(frame, l3, false)?,
        v6: false,
        l3,
        l4: l3 + header,
        length: u32::from(u16::from_be_bytes(ip.tot_len)),
        ttl: ip.ttl,
        ..Packet::default()
    };
    segment(frame, &mut packet)?;
    Ok(Some(packet))
}

#[inline(always)]
fn v6<F: Frame>(frame: &mut F, l3: usize) -> Result<Option<Packet>, DropReason> {
    if frame.reach(l3 + Ipv6Hdr::LEN + TcpHdr::LEN).is_err() {
        return Ok(None);
    }
    let ip: Ipv6Hdr = frame.load(l3)?;
    if ip.next_hdr != IpProto::Tcp as u8 {
        return Ok(None);
    }
    let key = addresses(frame, l3, true)?;
    // On the wire a mapped address is no address (RFC 4291 §2.5.5.2); in the tables it would be an IPv4 one.
    if key.src.is_v4() || key.dst.is_v4() {
        return Ok(None);
    }
    let mut packet = Packet {
        key,
        v6: true,
        l3,
        l4: l3 + Ipv6Hdr::LEN,
        length: Ipv6Hdr::LEN as u32 + u32::from(u16::from_be_bytes(ip.payload_len)),
        ttl: ip.hop_limit,
        ..Packet::default()
    };
    segment(frame, &mut packet)?;
    Ok(Some(packet))
}

/// Completes a packet of which all but the TCP header is known.
#[inline(always)]
fn segment<F: Frame>(frame: &mut F, packet: &mut Packet) -> Result<(), DropReason> {
    let l4 = packet.l4;
    frame.reach(l4 + TcpHdr::LEN)?;
    [packet.key.sport, packet.key.dport] = frame.load(l4)?;
    let [a, b, c, d]: [u16; 4] = frame.load(l4 + at::SEQUENCE)?;
    packet.sequence = u32::from_be(word([a, b]));
    packet.acknowledgement = u32::from_be(word([c, d]));
    let [offset, flags]: [u8; 2] = frame.load(l4 + at::LENGTH)?;
    packet.flags = Flags(flags);
    packet.headers = (l4 - packet.l3) as u32 + u32::from(offset >> 4) * 4;
    // Bytes behind the IP packet are padding, whatever they look like.
    if packet.headers > packet.length || offset >> 4 < 5 {
        return Err(DropReason::Truncated);
    }
    Ok(())
}

/// Who goes on with a frame that [`packet`] found to be none.
#[inline(always)]
pub(crate) fn other<F: Frame>(frame: &F) -> Verdict {
    if frame.tagged() {
        return Verdict::Jump(Jump::Odd);
    }
    let l3 = EthHdr::LEN;
    let Ok(kind) = frame.load::<u16>(l3 - 2) else {
        return Verdict::Pass;
    };
    let protocol = match kind {
        kind if kind == EtherType::Ipv4 as u16 => frame.load::<u8>(l3 + 9),
        kind if kind == EtherType::Ipv6 as u16 => frame.load::<u8>(l3 + 6),
        CUSTOMER | PROVIDER => return Verdict::Jump(Jump::Odd),
        _ => return Verdict::Pass,
    };
    let v6 = kind == EtherType::Ipv6 as u16;
    match protocol {
        // A TCP packet that is none to `packet` is a fragment.
        Ok(6) if !v6 => Verdict::Jump(Jump::Odd),
        Ok(1) if !v6 => Verdict::Jump(Jump::Icmp),
        Ok(0 | 43 | 44 | 60) if v6 => Verdict::Jump(Jump::Odd),
        Ok(58) if v6 => Verdict::Jump(Jump::Icmp),
        _ => Verdict::Pass,
    }
}
