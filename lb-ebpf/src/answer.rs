//! Rejections: the first packet of a connection, turned into the answer and sent back the way it came.

use core::mem::offset_of;

use lb_common::{
    access::Action,
    addr::Addr,
    checksum::{Delta, fold},
    reason::DropReason,
};
use network_types::{
    ip::{IpProto, Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};

use crate::{
    Egress, Frame, Packet,
    frame::{halves, word},
};

/// TTL and hop limit of what we say (RFC 1700).
const TTL: u8 = 64;
/// Offset of the checksum in the TCP header.
const TCP_CHECKSUM: usize = 16;
/// Length of an ICMP header (RFC 792), bytes.
const ICMP: usize = 8;
/// Destination unreachable, communication administratively prohibited (RFC 1812 §5.2.7.1; RFC 4443 §3.1).
const PROHIBITED: [[u8; 2]; 2] = [[3, 13], [1, 1]];
/// Longest packet that is quoted whole: the answer stays below what every host takes (RFC 1812 §4.3.2.3). Only a SYN with
/// data (RFC 7413) is longer; it comes again without.
const QUOTED: u32 = 548;
/// First two bytes of an IPv4 header without options, of the precedence that errors have (RFC 1812 §4.3.2.5).
const VERSION_AND_TOS: u16 = u16::from_ne_bytes([0x45, 0xc0]);

/// Makes an answer of a SYN, and says that it leaves by the interface it came in by.
///
/// # Errors
///
/// When the packet cannot be made one; it is dropped then.
#[inline(always)]
pub(crate) fn reject<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    action: Action,
    egress: &mut Egress,
) -> Result<(), DropReason> {
    egress.interface = frame.interface();
    egress.known = true;
    match action {
        Action::RejectRst => reset(frame, packet),
        _ => prohibit(frame, packet),
    }
}

/// The sum of the addresses of a packet, either way round.
#[inline(always)]
fn addresses(packet: &Packet) -> u64 {
    let sum = |address: &Addr| {
        let words = &address.0;
        match packet.v6 {
            true => words.iter().map(|word| u64::from(*word)).sum(),
            false => u64::from(words[3]),
        }
    };
    sum(&packet.key.src) + sum(&packet.key.dst)
}

/// The sum of the pseudo-header of a segment, unfolded.
#[inline(always)]
fn pseudo(packet: &Packet, protocol: u8, segment: u32) -> u64 {
    addresses(packet) + u64::from(u32::from(protocol).to_be()) + u64::from(segment.to_be())
}

/// RST with the acknowledgement that a SYN gets (RFC 9293 §3.10.7.1).
#[inline(always)]
fn reset<F: Frame>(frame: &mut F, packet: &Packet) -> Result<(), DropReason> {
    let Packet { l3, l4, .. } = *packet;
    let segment = packet.length.saturating_sub((l4 - l3) as u32);
    let sum: u16 = frame.load(l4 + TCP_CHECKSUM)?;
    // As everywhere: a field that equals the pseudo-header sum was left for a device to finish.
    let unfinished = F::DEVICE_FINISHES && sum == fold(pseudo(packet, IpProto::Tcp as u8, segment));
    frame.cut(l4 + TcpHdr::LEN)?;
    let macs: [u16; 6] = frame.load(0)?;
    frame.store(0, swapped(macs))?;
    let length = TcpHdr::LEN as u32;
    if packet.v6 {
        let payload = (l4 - l3 - Ipv6Hdr::LEN) as u32 + length;
        let key = &packet.key;
        frame.store(
            l3 + offset_of!(Ipv6Hdr, payload_len),
            (payload as u16).to_be(),
        )?;
        frame.store(l3 + offset_of!(Ipv6Hdr, hop_limit), TTL)?;
        frame.store(l3 + offset_of!(Ipv6Hdr, src_addr), both(&key.dst, &key.src))?;
    } else {
        let [at_length, at_ttl, at_sum] = [
            offset_of!(Ipv4Hdr, tot_len),
            offset_of!(Ipv4Hdr, ttl),
            offset_of!(Ipv4Hdr, check),
        ]
        .map(|at| l3 + at);
        let (old_length, old_ttl): (u16, u16) = (frame.load(at_length)?, frame.load(at_ttl)?);
        let new_length = (((l4 - l3) as u32 + length) as u16).to_be();
        let new_ttl = u16::from_ne_bytes([TTL, IpProto::Tcp as u8]);
        let delta = Delta::NONE
            .half(old_length, new_length)
            .half(old_ttl, new_ttl);
        let sum: u16 = frame.load(at_sum)?;
        frame.store(at_length, new_length)?;
        frame.store(at_ttl, new_ttl)?;
        frame.store(at_sum, delta.apply(sum))?;
        let [src, dst] = [packet.key.dst, packet.key.src].map(|address| halves(address.0[3]));
        frame.store(l3 + offset_of!(Ipv4Hdr, src_addr), src)?;
        frame.store(l3 + offset_of!(Ipv4Hdr, dst_addr), dst)?;
    }
    let [high, low] = halves(packet.next().to_be());
    let (sport, dport) = (packet.key.dport, packet.key.sport);
    // Header of five words; RST and ACK.
    let offset_and_flags = u16::from_ne_bytes([5 << 4, 0x14]);
    let words = [sport, dport, high, low, offset_and_flags];
    let base = pseudo(packet, IpProto::Tcp as u8, length);
    let sum = match unfinished {
        true => fold(base),
        false => !fold(base + words.iter().map(|word| u64::from(*word)).sum::<u64>()),
    };
    frame.store(l4, [sport, dport, 0, 0, high, low])?;
    frame.store(l4 + 12, [offset_and_flags, 0])?;
    frame.store(l4 + TCP_CHECKSUM, [sum, 0])
}

/// ICMP destination unreachable around the whole packet.
///
/// No byte of it has to be summed: a complete TCP segment sums to the complement of its pseudo-header, and so does one
/// that a device still finishes, once it has; an IPv4 header sums to zero.
#[inline(always)]
fn prohibit<F: Frame>(frame: &mut F, packet: &Packet) -> Result<(), DropReason> {
    let l3 = packet.l3;
    let plain = packet.l4 - l3 == Ipv6Hdr::LEN;
    if packet.length > QUOTED || (packet.v6 && !plain) {
        return Err(DropReason::PolicyReject);
    }
    let segment = packet.length.saturating_sub((packet.l4 - l3) as u32);
    let quoted = u64::from(!fold(pseudo(packet, IpProto::Tcp as u8, segment)));
    let kind = u16::from_ne_bytes(PROHIBITED[usize::from(packet.v6)]);
    let macs: [u16; 6] = frame.load(0)?;
    // Tags and Ethernet type, of which there are two to ten bytes; what follows is written over.
    let types: [u16; 6] = frame.load(12)?;
    let mut sum = u64::from(kind) + quoted;
    if packet.v6 {
        for at in [l3, l3 + 4] {
            sum += u64::from(word(frame.load(at)?));
        }
        sum += addresses(packet);
        let length = ICMP as u32 + packet.length;
        sum += pseudo(packet, IpProto::Ipv6Icmp as u8, length);
        frame.grow((Ipv6Hdr::LEN + ICMP) as u32)?;
        frame.reach(l3 + Ipv6Hdr::LEN + ICMP)?;
        frame.store(0, swapped(macs))?;
        frame.store(12, types)?;
        frame.store(l3, [0x60u8, 0])?;
        frame.store(l3 + 2, 0u16)?;
        frame.store(
            l3 + offset_of!(Ipv6Hdr, payload_len),
            (length as u16).to_be(),
        )?;
        frame.store(
            l3 + offset_of!(Ipv6Hdr, next_hdr),
            [IpProto::Ipv6Icmp as u8, TTL],
        )?;
        frame.store(
            l3 + offset_of!(Ipv6Hdr, src_addr),
            both(&packet.key.dst, &packet.key.src),
        )?;
        return icmp(frame, l3 + Ipv6Hdr::LEN, kind, !fold(sum));
    }
    let length = ((Ipv4Hdr::LEN + ICMP) as u32 + packet.length) as u16;
    let dont_fragment = 0x4000u16.to_be();
    let life = u16::from_ne_bytes([TTL, IpProto::Icmp as u8]);
    let header = [VERSION_AND_TOS, length.to_be(), dont_fragment, life];
    let check = !fold(header.iter().map(|half| u64::from(*half)).sum::<u64>() + addresses(packet));
    frame.grow((Ipv4Hdr::LEN + ICMP) as u32)?;
    frame.reach(l3 + Ipv4Hdr::LEN + ICMP)?;
    frame.store(0, swapped(macs))?;
    frame.store(12, types)?;
    frame.store(
        l3,
        [
            VERSION_AND_TOS,
            length.to_be(),
            0,
            dont_fragment,
            life,
            check,
        ],
    )?;
    let [src, dst] = [packet.key.dst, packet.key.src].map(|address| halves(address.0[3]));
    frame.store(l3 + offset_of!(Ipv4Hdr, src_addr), src)?;
    frame.store(l3 + offset_of!(Ipv4Hdr, dst_addr), dst)?;
    icmp(frame, l3 + Ipv4Hdr::LEN, kind, !fold(sum))
}

#[inline(always)]
fn icmp<F: Frame>(frame: &mut F, at: usize, kind: u16, sum: u16) -> Result<(), DropReason> {
    frame.store(at, [kind, sum])?;
    frame.store(at + 4, [0u16, 0])
}

/// Back to where it came from.
#[inline(always)]
const fn swapped(macs: [u16; 6]) -> [u16; 6] {
    let [a, b, c, d, e, f] = macs;
    [d, e, f, a, b, c]
}

/// Source and destination of an IPv6 header.
#[inline(always)]
fn both(src: &Addr, dst: &Addr) -> [u16; 16] {
    let mut out = [0; 16];
    for at in 0..4 {
        [out[2 * at], out[2 * at + 1]] = halves(src.0[at]);
        [out[8 + 2 * at], out[9 + 2 * at]] = halves(dst.0[at]);
    }
    out
}
