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

mod atomic;
mod expire;
mod flow;
pub mod forward;
pub mod frame;
mod index;
#[cfg(target_arch = "bpf")]
pub mod maps;
mod marks;
mod opaque;
mod parse;
mod ports;
mod rewrite;
mod select;
mod service;
#[cfg(target_arch = "bpf")]
pub mod steer;
pub mod tables;
#[cfg(test)]
mod tests;

use lb_common::{flow::Hit, layout::Jump, reason::DropReason, service::Service, tcp::Direction};

use crate::flow::Note;
pub use crate::{expire::sweep, forward::Egress, frame::Frame, parse::Packet, tables::Tables};

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Not ours, or not ours to decide: the stack sees it unchanged.
    Pass,
    /// Rewritten; it leaves by the egress that was found.
    Send,
    /// Another program goes on with it, unchanged.
    Jump(Jump),
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
        return Ok(Verdict::Pass);
    };
    let Some(config) = tables.config() else {
        return Ok(Verdict::Pass);
    };
    let found = flow::find(tables, config, &packet.key);
    if found.hit != Hit::NONE {
        let flow = tables.flow(found.hit.slot()).ok_or(DropReason::Internal)?;
        if flow::reopens(flow, found.hit, packet.flags) {
            return Ok(Verdict::Jump(Jump::Open));
        }
        return carry::<F, T, false>(frame, tables, &packet, found.hit, egress);
    }
    match found.service {
        Some(service) if service.forward == Service::PASSTHROUGH => {}
        _ => return Ok(Verdict::Pass),
    }
    if !packet.flags.opens() {
        return Err(DropReason::NoFlow);
    }
    Ok(Verdict::Jump(Jump::Open))
}

/// Opens a flow for the first packet of a connection, and carries it.
///
/// # Errors
///
/// The reason why the connection was refused.
#[inline(always)]
pub fn open<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    egress: &mut Egress,
) -> Result<Verdict, DropReason> {
    let Some(packet) = parse::packet(frame)? else {
        return Ok(Verdict::Pass);
    };
    let Some(config) = tables.config() else {
        return Ok(Verdict::Pass);
    };
    let Some(service) = service::find(tables, config, &packet.key.dst, packet.key.dport)
        .filter(|service| service.forward == Service::PASSTHROUGH)
    else {
        return Ok(Verdict::Pass);
    };
    // Who else sent it here has found an ended flow, or none.
    let ended = index::find(tables, config, &packet.key, Direction::Forward);
    if ended != 0 {
        tables.forget(ended);
    }
    let slot = flow::open(tables, config, service, &packet)?;
    let hit = Hit::new(slot, Direction::Forward);
    carry::<F, T, true>(frame, tables, &packet, hit, egress)
}

/// Rewrites a packet of a flow and finds its way out.
#[inline(always)]
fn carry<F: Frame, T: Tables, const FIRST: bool>(
    frame: &mut F,
    tables: &T,
    packet: &Packet,
    hit: Hit,
    egress: &mut Egress,
) -> Result<Verdict, DropReason> {
    let flow = tables.flow(hit.slot()).ok_or(DropReason::Internal)?;
    let (direction, now) = (hit.direction(), tables.now());
    forward::way(frame, packet, flow, direction, now, egress)?;
    if !egress.known && !F::ASKS {
        return Ok(Verdict::Pass);
    }
    let note = Note::of(packet, direction);
    if FIRST || !flow::touch(flow, &note, now) {
        tables.track(hit.slot(), &note);
    }
    rewrite::apply(frame, packet, &flow.route.leave[direction as usize & 1])?;
    frame.address(egress)?;
    Ok(Verdict::Send)
}
