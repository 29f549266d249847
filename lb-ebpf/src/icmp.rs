//! ICMP errors about packets that we carried: translated with the packet that they quote (RFC 5508 §4.2, RFC 7915 for
//! the care it takes with what is inside).
//!
//! An error travels against the packet that it quotes. The quoted packet says what we made of it; its sender has to read
//! what it sent. So the outer addresses become those of any packet of the flow in the error's direction, and the inner
//! ones what arrived here.

use core::{mem::offset_of, sync::atomic::Ordering::Relaxed};

use lb_common::{
    checksum::Delta,
    flow::{FlowKey, LOOPBACK},
    reason::DropReason,
    tcp::{self, Direction},
};
use network_types::{
    eth::EtherType,
    ip::{IpProto, Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    Egress, Frame, Packet, Tables, Verdict, flow, forward,
    frame::{addresses, halves, word},
    odd::{check_vlan, leave},
    parse::{self, Link, QUOTED_TCP, Walk},
    rewrite,
};

/// Bytes before the quoted packet.
const HEADER: usize = 8;
/// Ports and sequence number: what is quoted of TCP at least (RFC 792).
const QUOTED: usize = 8;
const ICMP: u8 = 1;
const ICMP6: u8 = 58;
/// Offset of the checksum in the ICMP header.
const CHECK: usize = 2;
/// The fragment offset (RFC 791 §3.1), network order.
const OFFSET: u16 = 0x1fff_u16.to_be();
/// "Use another router": true before translation, wrong behind it.
const REDIRECT: u8 = 5;

/// An error and where its parts lie.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quote {
    link: Link,
    /// The outer packet: `l4` is the ICMP header, ports are 0.
    outer: Packet,
    /// Where the quoted packet's headers lie; its key is that of packets which go the other way.
    about: Packet,
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
    let mut room = Quote::default();
    let Some(quote) = frame.error(&mut room)? else {
        return Ok(Verdict::Pass);
    };
    let Some(hit) = flow::find(tables, &quote.about) else {
        return Ok(Verdict::Pass);
    };
    if quote.kind == REDIRECT && !quote.outer.v6 {
        return Err(DropReason::IcmpRedirect);
    }
    let flow = tables.flow(hit.slot()).ok_or(DropReason::Internal)?;
    let (direction, now) = (hit.direction(), tables.now());
    if direction == Direction::Forward {
        check_vlan(tables, quote.link.vlan)?;
    }
    match forward::way(frame, &quote.outer, flow, direction, now, egress) {
        // Nobody answers an error by an error (RFC 1122 §3.2.2, RFC 4443 §2.4).
        Err(DropReason::TtlExceeded | DropReason::TooBig) => return Err(DropReason::NoAnswer),
        found => found?,
    }
    if !egress.known && !F::ASKS {
        return Ok(Verdict::Pass);
    }
    if !F::ASKS && flow.vlan.load(Relaxed) == LOOPBACK {
        return Ok(Verdict::Pass);
    }
    let to = &flow.route.leave[direction as usize & 1];
    let mut change = Delta::NONE;
    inside(frame, quote, to, &mut change)?;
    let other = direction as usize & 1;
    let shifted = [other ^ 1, other].map(|side| flow.shift[side].load(Relaxed));
    if shifted != [0, 0] {
        numbers(frame, quote, &shifted, &mut change)?;
    }
    // Without SNAT the member knows the way to whoever reports the error.
    let keep = direction == Direction::Forward && to.src == flow.route.leave[1].dst;
    outside(frame, &quote.outer, to, keep, change)?;
    leave(frame, &quote.link, flow, direction, egress)
}

/// Makes the quoted packet say what its sender sent, and tells what that adds to the sum of the ICMP message.
///
/// A function of its own, as the next two: each needs stack that the others then have too.
#[inline(never)]
fn inside<F: Frame>(
    frame: &mut F,
    quote: &Quote,
    to: &FlowKey,
    change: &mut Delta,
) -> Result<(), DropReason> {
    let about = &quote.about;
    let from = &about.key;
    // Both keys are of packets that go the other way: the destination there is the source here.
    let mut addresses = Delta::NONE;
    for word in 0..4 {
        addresses = addresses
            .word(from.dst.0[word], to.dst.0[word])
            .word(from.src.0[word], to.src.0[word]);
    }
    *change = addresses;
    if about.v6 {
        let at = about.l3 + offset_of!(Ipv6Hdr, src_addr);
        for word in 0..4 {
            frame.store(at + 4 * word, halves(to.dst.0[word]))?;
            frame.store(at + 16 + 4 * word, halves(to.src.0[word]))?;
        }
    } else {
        let ([a, b], [c, d]) = (halves(to.dst.0[3]), halves(to.src.0[3]));
        frame.store(about.l3 + offset_of!(Ipv4Hdr, src_addr), [a, b, c, d])?;
        let at = about.l3 + offset_of!(Ipv4Hdr, check);
        let old: u16 = frame.load(at)?;
        let new = addresses.apply(old);
        frame.store(at, new)?;
        *change = change.half(old, new);
    }
    let ports = Delta::NONE
        .half(from.dport, to.dport)
        .half(from.sport, to.sport);
    *change = change.and(ports);
    frame.store(about.l4, [to.dport, to.sport])?;
    let end = quote.outer.l3 + quote.outer.length as usize;
    if about.l4 + QUOTED_TCP <= end && frame.reach(about.l4 + QUOTED_TCP).is_ok() {
        let at = about.l4 + tcp::at::CHECKSUM;
        let old: u16 = frame.load(at)?;
        let new = addresses.and(ports).apply(old);
        frame.store(at, new)?;
        *change = change.half(old, new);
    }
    Ok(())
}

/// Takes the shift off the quoted sequence number, and puts it back on the acknowledgement: a sender looks whether it sent
/// what is quoted (RFC 5927 §4.1).
#[inline(never)]
fn numbers<F: Frame>(
    frame: &mut F,
    quote: &Quote,
    [own, other]: &[u32; 2],
    change: &mut Delta,
) -> Result<(), DropReason> {
    let l4 = quote.about.l4;
    let old = word(frame.load(l4 + tcp::at::SEQUENCE)?);
    let new = u32::from_be(old).wrapping_sub(*own).to_be();
    frame.store(l4 + tcp::at::SEQUENCE, halves(new))?;
    let mut moved = Delta::NONE.word(old, new);
    let end = quote.outer.l3 + quote.outer.length as usize;
    if l4 + QUOTED_TCP <= end && frame.reach(l4 + QUOTED_TCP).is_ok() {
        let old = word(frame.load(l4 + tcp::at::ACKNOWLEDGEMENT)?);
        let new = u32::from_be(old).wrapping_add(*other).to_be();
        frame.store(l4 + tcp::at::ACKNOWLEDGEMENT, halves(new))?;
        moved = moved.word(old, new);
        let check: u16 = frame.load(l4 + tcp::at::CHECKSUM)?;
        let amended = moved.apply(check);
        frame.store(l4 + tcp::at::CHECKSUM, amended)?;
        moved = moved.half(check, amended);
    }
    *change = change.and(moved);
    Ok(())
}

/// Makes the error itself say where it goes, `keep` its source, and completes its checksum.
#[inline(never)]
fn outside<F: Frame>(
    frame: &mut F,
    outer: &Packet,
    to: &FlowKey,
    keep: bool,
    change: Delta,
) -> Result<(), DropReason> {
    let addresses = if keep {
        let to = FlowKey {
            src: outer.key.src,
            ..*to
        };
        rewrite::header(frame, outer, &to)?
    } else {
        rewrite::header(frame, outer, to)?
    };
    let at = outer.l4 + CHECK;
    let check: u16 = frame.load(at)?;
    let change = if outer.v6 {
        change.and(addresses)
    } else {
        change
    };
    frame.store(at, change.apply(check))
}

/// Parses an ICMP error that quotes a TCP packet; false for everything else.
#[inline(always)]
pub(crate) fn parse<F: Frame>(frame: &mut F, quote: &mut Quote) -> Result<bool, DropReason> {
    if !parse::link(frame, &mut quote.link) {
        return Ok(false);
    }
    let l3 = quote.link.l3;
    quote.outer.l3 = l3;
    let errors = match quote.link.kind {
        kind if kind == EtherType::Ipv4 as u16 => {
            // The shortest that is of use: 8 bytes of TCP in an IPv4 packet without options.
            if frame
                .reach(l3 + 2 * Ipv4Hdr::LEN + HEADER + QUOTED)
                .is_err()
            {
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
            if frame
                .reach(l3 + 2 * Ipv6Hdr::LEN + HEADER + QUOTED)
                .is_err()
            {
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
    quote.about.v6 = quote.outer.v6;
    quote.about.l3 = quote.outer.l4 + HEADER;
    if !transport(frame, quote)? {
        return Ok(false);
    }
    let inner = addresses(frame, quote.about.l3, quote.about.v6)?;
    let key = &mut quote.about.key;
    (key.src, key.dst) = (inner.dst, inner.src);
    [key.dport, key.sport] = frame.load(quote.about.l4)?;
    let mapped = key.src.is_v4() || key.dst.is_v4();
    Ok(!(quote.about.v6 && mapped))
}

/// Finds the TCP header of the quoted packet; false when it is none, or no first part of one.
#[inline(always)]
fn transport<F: Frame>(frame: &mut F, quote: &mut Quote) -> Result<bool, DropReason> {
    let l3 = quote.about.l3;
    if quote.about.v6 {
        let mut walk = Walk {
            at: l3 + Ipv6Hdr::LEN,
            next: frame.load(l3 + offset_of!(Ipv6Hdr, next_hdr))?,
            ..Walk::default()
        };
        if parse::walk_extensions(frame, &mut walk).is_err() {
            return Ok(false);
        }
        quote.about.l4 = walk.at;
        if walk.next != IpProto::Tcp as u8 || walk.field & 0xfff8 != 0 {
            return Ok(false);
        }
    } else {
        let [first, _] = frame.load::<[u8; 2]>(l3)?;
        let [_, protocol] = frame.load::<[u8; 2]>(l3 + offset_of!(Ipv4Hdr, ttl))?;
        let field: u16 = frame.load(l3 + offset_of!(Ipv4Hdr, frags))?;
        quote.about.l4 = l3 + usize::from(first & 0x0f) * 4;
        if first >> 4 != 4
            || first & 0x0f < 5
            || protocol != IpProto::Tcp as u8
            || field & OFFSET != 0
        {
            return Ok(false);
        }
    }
    let end = quote.outer.l3 + quote.outer.length as usize;
    Ok(quote.about.l4 + QUOTED <= end && frame.reach(quote.about.l4 + QUOTED).is_ok())
}
