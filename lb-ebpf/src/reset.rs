//! A packet turned into the RST that says that there is no such connection.

use core::mem::offset_of;

use lb_common::{
    checksum::{Delta, fold},
    flow::FlowKey,
    reason::DropReason,
    tcp::{Flags, at},
};
use network_types::{
    ip::{IpProto, Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};

use crate::{
    Frame, Packet,
    frame::{Partial, halves},
    parse,
    shift::segment,
};

/// TTL and hop limit of what we say, as Linux sends it.
const TTL: u8 = 64;
/// Five words of header, as they lie in memory: RST, and RST with ACK.
const RST: u16 = u16::from_ne_bytes([5 << 4, 0x04]);
const RST_ACK: u16 = u16::from_ne_bytes([5 << 4, 0x14]);

/// Turns a packet without tags or extension headers into its RST: with the number that it acknowledges, or else as an
/// acknowledgement of itself (RFC 9293 §3.10.7.1).
///
/// # Errors
///
/// [`DropReason::NoAnswer`] for other packets.
#[inline(always)]
pub(crate) fn reset<F: Frame>(frame: &mut F) -> Result<(), DropReason> {
    let Some(packet) = parse::packet(frame)? else {
        return Err(DropReason::NoAnswer);
    };
    let (l3, l4) = (packet.l3, packet.l4);
    let reply = packet.key.reversed();
    let segment = packet.length.saturating_sub((l4 - l3) as u32);
    let ends = segment::pseudo(&reply, packet.v6);
    let field: u16 = frame.load(l4 + at::CHECKSUM)?;
    // A field with the sum of the pseudo-header was left to a device, which will finish what is written here as well.
    // One complete packet in 65,536 looks the same; its client asks again with another timestamp.
    let unfinished = match frame.may_be_partial() {
        Partial::Never => false,
        Partial::Perhaps => field == fold(ends + word_of(segment)),
        Partial::Surely => true,
    };
    frame.cut(l4 + TcpHdr::LEN)?;
    header(frame, &packet, &reply)?;
    let number = halves(packet.acknowledgement.to_be());
    let next = halves(packet.next().to_be());
    let ([sh, sl], [ah, al], flags) = match packet.flags.any(Flags::ACK) {
        true => (number, [0; 2], RST),
        false => ([0; 2], next, RST_ACK),
    };
    let (sport, dport) = (reply.sport, reply.dport);
    let ends = ends + word_of(TcpHdr::LEN as u32);
    let words = [sport, dport, sh, sl, ah, al, flags];
    let all = ends + words.iter().map(|word| u64::from(*word)).sum::<u64>();
    let field = if unfinished { fold(ends) } else { !fold(all) };
    frame.store(l4, [sport, dport, sh, sl, ah, al])?;
    frame.store(l4 + 12, [flags, 0])?;
    frame.store(l4 + at::CHECKSUM, [field, 0])
}

/// The IP header of an answer with no more than a TCP header.
#[inline(always)]
pub(crate) fn header<F: Frame>(
    frame: &mut F,
    packet: &Packet,
    reply: &FlowKey,
) -> Result<(), DropReason> {
    let (src, dst) = (&reply.src, &reply.dst);
    let (l3, length) = (packet.l3, TcpHdr::LEN as u16);
    if packet.v6 {
        frame.store(l3 + offset_of!(Ipv6Hdr, payload_len), length.to_be())?;
        frame.store(l3 + offset_of!(Ipv6Hdr, hop_limit), TTL)?;
        let mut both = [0u16; 16];
        for at in 0..4 {
            [both[2 * at], both[2 * at + 1]] = halves(src.0[at]);
            [both[8 + 2 * at], both[9 + 2 * at]] = halves(dst.0[at]);
        }
        return frame.store(l3 + offset_of!(Ipv6Hdr, src_addr), both);
    }
    let at = |offset: usize| l3 + offset;
    let (length_at, ttl_at) = (
        at(offset_of!(Ipv4Hdr, tot_len)),
        at(offset_of!(Ipv4Hdr, ttl)),
    );
    let check_at = at(offset_of!(Ipv4Hdr, check));
    let (old_length, old_life): (u16, u16) = (frame.load(length_at)?, frame.load(ttl_at)?);
    let length = ((packet.l4 - l3) as u16 + length).to_be();
    let life = u16::from_ne_bytes([TTL, IpProto::Tcp as u8]);
    // The addresses change places, which changes no sum.
    let delta = Delta::NONE.half(old_length, length).half(old_life, life);
    let check: u16 = frame.load(check_at)?;
    frame.store(length_at, length)?;
    frame.store(ttl_at, life)?;
    frame.store(check_at, delta.apply(check))?;
    frame.store(at(offset_of!(Ipv4Hdr, src_addr)), halves(src.0[3]))?;
    frame.store(at(offset_of!(Ipv4Hdr, dst_addr)), halves(dst.0[3]))
}

/// A number as a word in network order.
#[inline(always)]
fn word_of(number: u32) -> u64 {
    u64::from(number.to_be())
}
