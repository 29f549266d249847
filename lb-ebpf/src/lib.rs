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
#[cfg(target_arch = "bpf")]
pub mod maps;
mod opaque;
mod parse;
mod rewrite;
mod select;
mod shift;
mod snat;
#[cfg(target_arch = "bpf")]
pub mod steer;
pub mod tables;
#[cfg(test)]
mod tests;

use lb_common::{reason::DropReason, tcp::Direction};

pub use crate::{expire::sweep, forward::Egress, frame::Frame, parse::Packet, tables::Tables};

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Not ours, or not ours to decide: the stack sees it unchanged.
    Pass,
    /// Rewritten; it leaves this way.
    Send(Egress),
}

/// Carries one packet: finds its flow or makes one, then rewrites and forwards it.
///
/// # Errors
///
/// The reason why a packet that belongs to a virtual server was not carried.
#[inline(always)]
pub fn balance<F: Frame, T: Tables>(frame: &mut F, tables: &T) -> Result<Verdict, DropReason> {
    let Some(packet) = parse::packet(frame)? else {
        return Ok(Verdict::Pass);
    };
    let Some(config) = tables.config() else {
        return Ok(Verdict::Pass);
    };
    let now = tables.now();
    let (slot, direction) = match flow::find(tables, &packet) {
        Some(hit) => (hit.slot(), hit.direction()),
        None => (
            flow::open(tables, config, &packet, now)?,
            Direction::Forward,
        ),
    };
    if slot == 0 {
        return Ok(Verdict::Pass);
    }
    let record = tables.flow(slot).ok_or(DropReason::Internal)?;
    let to = &record.route.leave[direction as usize & 1];
    let mut egress = Egress::default();
    forward::route(frame, &packet, to, &mut egress)?;
    if !egress.known && !F::ASKS {
        return Ok(Verdict::Pass);
    }
    flow::track(tables, record, &packet, direction, now);
    rewrite::apply(frame, &packet, to)?;
    frame.address(&egress)?;
    Ok(Verdict::Send(egress))
}
