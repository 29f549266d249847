//! From bytes to a packet: Ethernet, IPv4 or IPv6, TCP.

use core::mem::offset_of;

use lb_common::{addr::Addr, flow::FlowKey, reason::DropReason, tcp::Flags};
use network_types::{
    eth::{EthHdr, EtherType},
    ip::{IpProto, Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};

use crate::{Frame, frame::word};

/// A TCP packet, and where its headers lie.
#[derive(Clone, Copy, Debug)]
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

/// Offset of the sequence number in the TCP header (RFC 9293 §3.1).
const SEQUENCE: usize = 4;
/// Offset of the header length in the TCP header; the flag byte follows.
const OFFSET: usize = 12;
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
    let source = Addr::v4(word(frame.load(l3 + offset_of!(Ipv4Hdr, src_addr))?));
    let destination = Addr::v4(word(frame.load(l3 + offset_of!(Ipv4Hdr, dst_addr))?));
    let length = u32::from(u16::from_be_bytes(ip.tot_len));
    tcp(
        frame,
        l3,
        l3 + header,
        false,
        source,
        destination,
        length,
        ip.ttl,
    )
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
    let all: [u16; 16] = frame.load(l3 + offset_of!(Ipv6Hdr, src_addr))?;
    let (source, destination) = (
        Addr([
            word([all[0], all[1]]),
            word([all[2], all[3]]),
            word([all[4], all[5]]),
            word([all[6], all[7]]),
        ]),
        Addr([
            word([all[8], all[9]]),
            word([all[10], all[11]]),
            word([all[12], all[13]]),
            word([all[14], all[15]]),
        ]),
    );
    // On the wire a mapped address is no address (RFC 4291 §2.5.5.2); in the tables it would be an IPv4 one.
    if source.is_v4() || destination.is_v4() {
        return Ok(None);
    }
    let length = Ipv6Hdr::LEN as u32 + u32::from(u16::from_be_bytes(ip.payload_len));
    tcp(
        frame,
        l3,
        l3 + Ipv6Hdr::LEN,
        true,
        source,
        destination,
        length,
        ip.hop_limit,
    )
}

#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "the two callers' only common tail"
)]
fn tcp<F: Frame>(
    frame: &mut F,
    l3: usize,
    l4: usize,
    v6: bool,
    src: Addr,
    dst: Addr,
    length: u32,
    ttl: u8,
) -> Result<Option<Packet>, DropReason> {
    frame.reach(l4 + TcpHdr::LEN)?;
    let sport: u16 = frame.load(l4)?;
    let dport: u16 = frame.load(l4 + 2)?;
    let sequence = u32::from_be(word(frame.load(l4 + SEQUENCE)?));
    let [offset, flags]: [u8; 2] = frame.load(l4 + OFFSET)?;
    Ok(Some(Packet {
        key: FlowKey {
            src,
            dst,
            sport,
            dport,
        },
        flags: Flags(flags),
        v6,
        l3,
        l4,
        length,
        ttl,
        sequence,
        headers: (l4 - l3) as u32 + u32::from(offset >> 4) * 4,
    }))
}
