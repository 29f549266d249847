//! ICMP errors about packets that we carried: translated with the packet that they quote (RFC 5508 §4.2, RFC 7915 for
//! the care it takes with what is inside).
//!
//! An error travels against the packet that it quotes. The quoted packet says what we made of it; its sender has to read
//! what it sent. So the outer addresses become those of any packet of the flow in the error's direction, and the inner
//! ones what arrived here.

use core::mem::offset_of;

use lb_common::{checksum::Delta, flow::FlowKey, reason::DropReason, tcp::Direction};
use network_types::{
    eth::EtherType,
    ip::{IpProto, Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    Egress, Frame, Packet, Tables, Verdict, flow, forward,
    frame::{addresses, halves},
    odd::leave,
    parse::{self, Link, QUOTED_TCP, Walk},
    rewrite,
};

/// Bytes before the quoted packet.
const HEADER: usize = 8;
/// Ports and sequence number: what is quoted of TCP at least (RFC 792).
const QUOTED: usize = 8;
const ICMP: u8 = 1;
const ICMP6: u8 = 58;
/// Offset of the checksum in ICMP and in TCP headers.
const CHECK: usize = 2;
const TCP_CHECK: usize = 16;
/// The fragment offset (RFC 791 §3.1), network order.
const OFFSET: u16 = 0x1fff_u16.to_be();
/// "Use another router": true before translation, wrong behind it.
const REDIRECT: u8 = 5;

/// An error and where its parts lie.
#[derive(Clone, Copy, Debug, Default)]
struct Quote {
    link: Link,
    /// The outer packet: `l4` is the ICMP header, ports are 0.
    outer: Packet,
    /// The quoted packet as it says it.
    inner: FlowKey,
    /// Offset of its IP header.
    l3: usize,
    /// Offset of its TCP header.
    l4: usize,
    /// Of ICMP.
    kind: u8,
}

/// Translates an error about a packet of ours.
///
/// # Errors
///
/// The reason why it was not carried.
#[inline(always)]
pub fn icmp<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    egress: &mut Egress,
) -> Result<Verdict, DropReason> {
    let mut quote = Quote::default();
    if !parse(frame, &mut quote)? {
        return Ok(Verdict::Pass);
    }
    let about = Packet {
        key: quote.inner.reversed(),
        ..Packet::default()
    };
    let Some(hit) = flow::find(tables, &about) else {
        return Ok(Verdict::Pass);
    };
    if quote.kind == REDIRECT && !quote.outer.v6 {
        return Err(DropReason::IcmpRedirect);
    }
    let flow = tables.flow(hit.slot()).ok_or(DropReason::Internal)?;
    let (direction, now) = (hit.direction(), tables.now());
    forward::way(frame, &quote.outer, flow, direction, now, egress)?;
    if !egress.known && !F::ASKS {
        return Ok(Verdict::Pass);
    }
    let side = direction as usize & 1;
    let inner = flow.route.leave[side].reversed();
    let mut outer = flow.route.leave[side];
    if direction == Direction::Forward && outer.src == flow.route.client().0 {
        // Without SNAT the member knows the way to whoever reports the error.
        outer.src = quote.outer.key.src;
    }
    let change = rewrite_inner(frame, &quote, &inner)?;
    let addresses = rewrite::header(frame, &quote.outer, &outer)?;
    let change = if quote.outer.v6 {
        change.and(addresses)
    } else {
        change
    };
    let at = quote.outer.l4 + CHECK;
    let check: u16 = frame.load(at)?;
    frame.store(at, change.apply(check))?;
    leave(frame, &quote.link, flow, direction, egress)
}

/// Makes the quoted packet say `to`, and returns what that adds to the sum of the ICMP message.
#[inline(always)]
fn rewrite_inner<F: Frame>(
    frame: &mut F,
    quote: &Quote,
    to: &FlowKey,
) -> Result<Delta, DropReason> {
    let from = &quote.inner;
    let mut addresses = Delta::NONE;
    for word in 0..4 {
        addresses = addresses
            .word(from.src.0[word], to.src.0[word])
            .word(from.dst.0[word], to.dst.0[word]);
    }
    let mut change = addresses;
    if quote.outer.v6 {
        for (at, word) in to.src.0.into_iter().chain(to.dst.0).enumerate() {
            let place = quote.l3 + offset_of!(Ipv6Hdr, src_addr) + 4 * at;
            frame.store(place, halves(word))?;
        }
    } else {
        let ([a, b], [c, d]) = (halves(to.src.0[3]), halves(to.dst.0[3]));
        frame.store(quote.l3 + offset_of!(Ipv4Hdr, src_addr), [a, b, c, d])?;
        let at = quote.l3 + offset_of!(Ipv4Hdr, check);
        let old: u16 = frame.load(at)?;
        let new = addresses.apply(old);
        frame.store(at, new)?;
        change = change.half(old, new);
    }
    let ports = Delta::NONE
        .half(from.sport, to.sport)
        .half(from.dport, to.dport);
    change = change.and(ports);
    frame.store(quote.l4, [to.sport, to.dport])?;
    let end = quote.outer.l3 + quote.outer.length as usize;
    if quote.l4 + QUOTED_TCP <= end && frame.reach(quote.l4 + QUOTED_TCP).is_ok() {
        let at = quote.l4 + TCP_CHECK;
        let old: u16 = frame.load(at)?;
        let new = addresses.and(ports).apply(old);
        frame.store(at, new)?;
        change = change.half(old, new);
    }
    Ok(change)
}

/// Parses an ICMP error that quotes a TCP packet; false for everything else.
#[inline(always)]
fn parse<F: Frame>(frame: &mut F, quote: &mut Quote) -> Result<bool, DropReason> {
    if !parse::link(frame, &mut quote.link) {
        return Ok(false);
    }
    let l3 = quote.link.l3;
    quote.outer.l3 = l3;
    let errors = match quote.link.kind {
        kind if kind == EtherType::Ipv4 as u16 => {
            // The shortest that is of use: 8 bytes of TCP in an IPv4 packet without options.
            if frame.reach(l3 + 2 * Ipv4Hdr::LEN + HEADER + QUOTED).is_err() {
                return Ok(false);
            }
            let ip: Ipv4Hdr = frame.load(l3)?;
            let header = usize::from(ip.vihl & 0x0f) * 4;
            let cut = u16::from_ne_bytes(ip.frags) & 0x3fff_u16.to_be() != 0;
            if header < Ipv4Hdr::LEN || ip.proto != ICMP || cut {
                return Ok(false);
            }
            quote.outer.l4 = l3 + header;
            quote.outer.length = u32::from(u16::from_be_bytes(ip.tot_len));
            quote.outer.ttl = ip.ttl;
            // Unreachable, source quench, redirect, time exceeded, parameter problem (RFC 792).
            1 << 3 | 1 << 4 | 1 << REDIRECT | 1 << 11 | 1 << 12
        }
        kind if kind == EtherType::Ipv6 as u16 => {
            if frame.reach(l3 + 2 * Ipv6Hdr::LEN + HEADER + QUOTED).is_err() {
                return Ok(false);
            }
            let ip: Ipv6Hdr = frame.load(l3)?;
            if ip.next_hdr != ICMP6 {
                return Ok(false);
            }
            quote.outer.v6 = true;
            quote.outer.l4 = l3 + Ipv6Hdr::LEN;
            quote.outer.length =
                Ipv6Hdr::LEN as u32 + u32::from(u16::from_be_bytes(ip.payload_len));
            quote.outer.ttl = ip.hop_limit;
            // Unreachable, too big, time exceeded, parameter problem (RFC 4443 §3).
            1 << 1 | 1 << 2 | 1 << 3 | 1 << 4
        }
        _ => return Ok(false),
    };
    quote.outer.headers = (quote.outer.l4 - l3 + HEADER) as u32;
    quote.outer.key = addresses(frame, l3, quote.outer.v6)?;
    quote.kind = frame.load(quote.outer.l4)?;
    if quote.kind > 31 || errors >> u32::from(quote.kind) & 1 == 0u32 {
        return Ok(false);
    }
    quote.l3 = quote.outer.l4 + HEADER;
    if !transport(frame, quote)? {
        return Ok(false);
    }
    quote.inner = addresses(frame, quote.l3, quote.outer.v6)?;
    let [sport, dport] = frame.load(quote.l4)?;
    (quote.inner.sport, quote.inner.dport) = (sport, dport);
    let mapped = quote.inner.src.is_v4() || quote.inner.dst.is_v4();
    Ok(!(quote.outer.v6 && mapped))
}

/// Finds the TCP header of the quoted packet; false when it is none, or no first part of one.
#[inline(always)]
fn transport<F: Frame>(frame: &mut F, quote: &mut Quote) -> Result<bool, DropReason> {
    let l3 = quote.l3;
    if quote.outer.v6 {
        let mut walk = Walk {
            at: l3 + Ipv6Hdr::LEN,
            next: frame.load(l3 + offset_of!(Ipv6Hdr, next_hdr))?,
            ..Walk::default()
        };
        parse::walk_extensions(frame, &mut walk)?;
        quote.l4 = walk.at;
        if walk.next != IpProto::Tcp as u8 || walk.field & 0xfff8 != 0 {
            return Ok(false);
        }
    } else {
        let [first, _] = frame.load::<[u8; 2]>(l3)?;
        let [_, protocol] = frame.load::<[u8; 2]>(l3 + offset_of!(Ipv4Hdr, ttl))?;
        let field: u16 = frame.load(l3 + offset_of!(Ipv4Hdr, frags))?;
        quote.l4 = l3 + usize::from(first & 0x0f) * 4;
        if first >> 4 != 4 || protocol != IpProto::Tcp as u8 || field & OFFSET != 0 {
            return Ok(false);
        }
    }
    let end = quote.outer.l3 + quote.outer.length as usize;
    Ok(quote.l4 + QUOTED <= end && frame.reach(quote.l4 + QUOTED).is_ok())
}

