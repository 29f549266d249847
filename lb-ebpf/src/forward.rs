//! The way out: which interface, which neighbour.

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    flow::{Flow, Way},
    reason::DropReason,
    tcp::{Direction, tick},
};

use crate::{Frame, Packet, opaque::opaque};

/// Where a rewritten packet leaves.
///
/// A plain record that is always filled: an enum's unused payload makes the compiler spill registers that were never
/// written, which the verifier refuses (`R3 !read_ok`, Linux 6.18).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Egress {
    /// Interface index.
    pub interface: u32,
    /// Is the neighbour's MAC address known? Else the kernel has to ask for it.
    pub known: bool,
    /// The neighbour's MAC address and ours, as an Ethernet header has them.
    pub macs: [u32; 3],
    /// Largest IP packet that fits, bytes.
    pub mtu: u32,
}

impl Default for Egress {
    /// Nowhere; in stores of their own, since the optimiser would call `memset`.
    #[inline(always)]
    fn default() -> Self {
        let [interface, mtu, a, b, c] = [0; 5].map(|zero| opaque(zero) as u32);
        Self {
            interface,
            known: false,
            macs: [a, b, c],
            mtu,
        }
    }
}

/// Finds the way for a packet of a flow, before anything is changed: the record's own when it is fresh, else the routing
/// table's.
///
/// # Errors
///
/// Why there is none.
#[inline(always)]
pub(crate) fn way<F: Frame>(
    frame: &F,
    packet: &Packet,
    flow: &Flow,
    direction: Direction,
    now: u64,
    egress: &mut Egress,
) -> Result<(), DropReason> {
    if packet.ttl <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    let side = direction as usize & 1;
    let way = &flow.ways[side];
    let fresh = way.resolved.load(Relaxed) == tick(now);
    // No routing table knows the way back to a tagged client.
    if fresh || (direction == Direction::Reverse && flow.vlan.load(Relaxed) != 0) {
        recall(way, egress);
    } else {
        frame.route(&flow.route.leave[side], egress)?;
        if egress.known {
            remember(way, egress, now);
        }
    }
    if frame.size(packet) > egress.mtu {
        if F::ASKS {
            return Err(DropReason::TooBig);
        }
        // Maybe several segments in one, which only the program behind this one can tell.
        egress.known = false;
    }
    Ok(())
}

#[inline(always)]
fn recall(way: &Way, egress: &mut Egress) {
    egress.interface = way.interface.load(Relaxed);
    egress.known = true;
    for (to, from) in egress.macs.iter_mut().zip(&way.macs) {
        *to = from.load(Relaxed);
    }
    egress.mtu = way.mtu.load(Relaxed);
}

/// Another CPU may read meanwhile: both have the same answer, but for the moment a neighbour changes.
#[inline(always)]
fn remember(way: &Way, egress: &Egress, now: u64) {
    way.interface.store(egress.interface, Relaxed);
    for (to, from) in way.macs.iter().zip(egress.macs) {
        to.store(from, Relaxed);
    }
    way.mtu.store(egress.mtu, Relaxed);
    way.resolved.store(tick(now), Relaxed);
}
