//! SYN cookies: when half-open connections have their share, a first packet leaves nothing here but its answer. The
//! client's next packet brings back what is needed, and becomes the first packet to a member.
//!
//! ```text
//! client ──SYN──▶ bake ──SYN+ACK, cookie──▶ client ──ACK──▶ redeem ──▶ shift ──SYN──▶ member
//!                                                                     shift ◀──SYN+ACK── member
//!                                                                       └─────ACK─────▶ member
//! ```
//!
//! A cookie has no room for window scaling, selective acknowledgements and timestamps: such a connection goes without. As
//! with every SYN cookie, a client that waits for the server to speak does not repeat its acknowledgement if it is lost
//! (RFC 4987 §3.6).

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    cookie::{LIFETIME, NONE, class},
    layout::Jump,
    reason::DropReason,
    service::{Config, Service},
    shift::header,
    tcp::{Flags, tick},
};
use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::{
    Egress, Frame, Packet, Tables, Verdict, answer, flow,
    frame::Reshape,
    parse::{Deep, Part},
    reset, service,
    shift::{LONGEST, Spot, Workspace, once, segment},
};

/// Do half-open connections have their share?
#[inline(always)]
pub(crate) fn is_time<T: Tables>(tables: &T, config: &Config) -> bool {
    tables
        .allocation()
        .is_some_and(|allocation| allocation.embryonic.load(Relaxed) >= config.embryonic)
}

/// May a packet of no flow bring a cookie back?
#[inline(always)]
pub(crate) fn may_return<T: Tables>(tables: &T, packet: &Packet) -> bool {
    let Some(allocation) = tables.allocation() else {
        return false;
    };
    let baked = allocation.baked.load(Relaxed);
    packet.flags.0 & (Flags::ACK | Flags::SYN | Flags::RST) == Flags::ACK
        && baked != 0
        && tick(tables.now()).wrapping_sub(baked) <= LIFETIME
}

/// Answers a first packet with a cookie.
///
/// # Errors
///
/// Why there is no answer.
#[inline(always)]
pub fn bake<F: Reshape, T: Tables>(
    frame: &mut F,
    tables: &T,
    workspace: &mut Workspace,
    egress: &mut Egress,
) -> Result<Verdict, DropReason> {
    let mut room = Deep::default();
    let Some(deep) = frame.deep(&mut room)? else {
        return Ok(Verdict::Pass);
    };
    let Some(config) = tables.config() else {
        return Ok(Verdict::Pass);
    };
    let packet = &deep.packet;
    let Some(service) = service::find(tables, config, &packet.key.dst, packet.key.dport) else {
        return Ok(Verdict::Pass);
    };
    // Nobody cuts a first packet into pieces.
    if deep.part as u32 != Part::Whole as u32 || packet.l4 > LONGEST {
        return Err(DropReason::FlowTableFull);
    }
    frame.take(workspace, packet.l4, segment::header_length(packet))?;
    let offered = once::segment_size(workspace, segment::header_length(packet));
    let cookie = tables.bake(packet, class(offered));
    workspace.handshake(
        [packet.key.dport, packet.key.sport],
        [cookie, packet.sequence.wrapping_add(1)],
        advertised(service, packet.v6),
    );
    let reply = packet.key.reversed();
    reset::header(frame, packet, &reply)?;
    let spot = Spot::of(packet, &reply, false);
    frame.replace(workspace, &spot.place(segment::HANDSHAKE))?;
    answer::back(frame, egress)?;
    frame.address(egress)?;
    if let Some(allocation) = tables.allocation() {
        allocation.baked.store(tick(tables.now()), Relaxed);
    }
    tables.count_drop(DropReason::SynCookie);
    Ok(Verdict::Send)
}

/// The segment size that a client is told: Ethernet's, less the room of a PROXY header.
#[inline(always)]
fn advertised(service: &Service, v6: bool) -> u16 {
    let headers = 20 + if v6 { Ipv6Hdr::LEN } else { Ipv4Hdr::LEN };
    let inserted = match service.flags & Service::PROXY_HEADER {
        0 => 0,
        _ => header::length(!v6),
    };
    1500 - headers as u16 - inserted as u16
}

/// Opens a flow for a packet that brings a cookie back; [`crate::shift`] makes it the first packet to a member.
///
/// # Errors
///
/// [`DropReason::NoFlow`] when it does not, else why the connection was refused.
#[inline(always)]
pub fn redeem<F: Frame, T: Tables>(frame: &mut F, tables: &T) -> Result<Verdict, DropReason> {
    let mut room = Deep::default();
    let Some(deep) = frame.deep(&mut room)? else {
        return Ok(Verdict::Pass);
    };
    let Some(config) = tables.config() else {
        return Ok(Verdict::Pass);
    };
    let packet = &deep.packet;
    let class = tables.check_cookie(packet);
    let Some(service) = service::find(tables, config, &packet.key.dst, packet.key.dport) else {
        return Ok(Verdict::Pass);
    };
    if class == NONE || service.forward != Service::PASSTHROUGH {
        return Err(DropReason::NoFlow);
    }
    flow::open(tables, service, packet, class)?;
    Ok(Verdict::Jump(Jump::Shift))
}
