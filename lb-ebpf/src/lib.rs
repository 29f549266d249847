//! The kernel plane: what happens to a packet, on one page.
//!
//! The pipeline is generic over a [`Frame`] (XDP, TC, or a byte buffer) and over the [`Tables`] it reads, so the same
//! code runs as packet programs and as plain unit tests. The programs in `main.rs` only turn a verdict into a return
//! code.
#![cfg_attr(not(test), no_std)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch, core_intrinsics))]
#![cfg_attr(
    target_arch = "bpf",
    expect(
        internal_features,
        reason = "no stable atomic read-modify-write on BPF"
    )
)]

#[cfg(not(target_arch = "bpf"))]
extern crate alloc;

mod access;
pub mod answer;
mod atomic;
mod cookie;
mod expire;
pub mod explain;
mod flow;
pub mod forward;
pub mod frame;
mod icmp;
mod index;
#[cfg(target_arch = "bpf")]
pub mod maps;
mod marks;
mod odd;
mod opaque;
mod parse;
mod ports;
mod report;
mod reset;
mod rewrite;
mod select;
mod service;
mod shift;
#[cfg(target_arch = "bpf")]
pub mod steer;
pub mod tables;
#[cfg(test)]
mod tests;

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    flow::Hit,
    layout::Jump,
    reason::DropReason,
    service::{Config, Service},
};

pub use crate::{
    cookie::{bake, redeem},
    expire::sweep,
    flow::end,
    forward::Egress,
    frame::Frame,
    icmp::icmp,
    odd::{odd, refuse},
    parse::Packet,
    shift::{Workspace, shift},
    tables::Tables,
};
use crate::{flow::Note, parse::Deep};

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Not ours, or not ours to decide: the stack sees it unchanged.
    Pass,
    /// Rewritten; it leaves by the egress that was found.
    Send,
    /// Another program goes on with it, unchanged.
    Jump(Jump),
    /// Not carried, and answered with RST by us, since the stack does not see it.
    Reset(DropReason),
}

/// Carries a packet of a connection that is there, and says who goes on with others.
///
/// # Errors
///
/// The reason why a packet that belongs to a virtual server was not carried.
#[inline(always)]
pub fn balance<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    egress: &mut Egress,
) -> Result<Verdict, DropReason> {
    let Some(packet) = parse::packet(frame)? else {
        return Ok(parse::other(frame));
    };
    let Some(config) = tables.config() else {
        return Ok(Verdict::Pass);
    };
    if !config.concerns(&packet.key.dst) {
        return Ok(Verdict::Pass);
    }
    let found = flow::Found(tables.look_up(&packet.key));
    if found.hit() != Hit::NONE {
        let flow = tables
            .flow(found.hit().slot())
            .ok_or(DropReason::Internal)?;
        if flow::reopens(flow, found.hit(), packet.flags) {
            return Ok(Verdict::Jump(Jump::Open));
        }
        return carry(frame, tables, &packet, found.hit(), egress);
    }
    if !found.served() {
        return Ok(Verdict::Pass);
    }
    match service::find(tables, config, &packet.key.dst, packet.key.dport) {
        Some(service) => first::<F, T>(tables, config, service, &packet),
        None => Ok(Verdict::Pass),
    }
}

/// Says who goes on with a packet for a virtual server that belongs to no flow.
#[inline(always)]
fn first<F: Frame, T: Tables>(
    tables: &T,
    config: &Config,
    service: &Service,
    packet: &Packet,
) -> Result<Verdict, DropReason> {
    if service.forward == Service::PASSTHROUGH {
        return match packet.flags.opens() {
            true => Ok(Verdict::Jump(Jump::Open)),
            false if cookie::may_return(tables, packet) => Ok(Verdict::Jump(Jump::Redeem)),
            false => Err(DropReason::NoFlow),
        };
    }
    // What XDP passes is met again by the TC program behind it, and shall be judged once.
    let guarded = || access::guard(tables, config, service.virtual_server).is_some();
    if F::ASKS && packet.flags.opens() && guarded() {
        return Ok(Verdict::Jump(Jump::Open));
    }
    Ok(Verdict::Pass)
}

/// Opens a flow for the first packet of a connection that may be made; [`odd`] carries it, whatever it looks like.
///
/// # Errors
///
/// The reason why the connection was refused.
#[inline(always)]
pub fn open<F: Frame, T: Tables>(frame: &mut F, tables: &T) -> Result<Verdict, DropReason> {
    let mut room = Deep::default();
    let Some(deep) = frame.deep(&mut room)? else {
        return Ok(Verdict::Pass);
    };
    let Some(config) = tables.config() else {
        return Ok(Verdict::Pass);
    };
    let key = &deep.packet.key;
    let Some(service) = service::find(tables, config, &key.dst, key.dport) else {
        return Ok(Verdict::Pass);
    };
    access::admit(frame, tables, config, deep, service.virtual_server)?;
    if service.forward != Service::PASSTHROUGH {
        return Ok(Verdict::Pass);
    }
    if !cookie::is_time(tables, config) {
        match flow::open(tables, service, &deep.packet, lb_common::cookie::NONE) {
            Err(DropReason::SynCookie) => {}
            opened => return opened.map(|()| Verdict::Jump(Jump::Odd)),
        }
    } else if tables.peek(service.pool) == 0 {
        return Err(DropReason::NoMember);
    }
    // What the client comes back with must not be led to its last connection.
    tables.forget_last(&deep.packet);
    Ok(Verdict::Jump(Jump::Bake))
}

/// Rewrites a packet of a flow and finds its way out.
#[inline(always)]
fn carry<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    packet: &Packet,
    hit: Hit,
    egress: &mut Egress,
) -> Result<Verdict, DropReason> {
    let flow = tables.flow(hit.slot()).ok_or(DropReason::Internal)?;
    if shift::concerns(flow) {
        return Ok(Verdict::Jump(Jump::Shift));
    }
    let (direction, now) = (hit.direction(), tables.now());
    // Replies go back behind the client's tags. A client without them may have lost those that its record knows.
    if flow.vlan.load(Relaxed) != 0 {
        return Ok(Verdict::Jump(Jump::Odd));
    }
    forward::way(frame, packet, flow, direction, now, egress)?;
    if !egress.known && !F::ASKS {
        return Ok(Verdict::Pass);
    }
    let note = Note::of(packet, direction);
    if !flow::touch(flow, &note, now) {
        tables.track(hit.slot(), &note);
    }
    rewrite::apply(
        frame,
        packet,
        &flow.route.leave[direction as usize & 1],
        false,
    )
    .map_err(|_| DropReason::Internal)?;
    frame.address(egress)?;
    Ok(Verdict::Send)
}
