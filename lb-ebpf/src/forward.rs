//! The way out: which interface, which neighbour.

use lb_common::{flow::FlowKey, reason::DropReason};

use crate::{Frame, Packet};

/// Where a rewritten packet leaves.
///
/// A plain record that is always filled: an enum's unused payload makes the compiler spill registers that were never
/// written, which the verifier refuses (`R3 !read_ok`, Linux 6.18).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Egress {
    /// Interface index.
    pub interface: u32,
    /// Is the neighbour's MAC address known? Else the kernel has to ask for it.
    pub known: bool,
    /// Our MAC address there.
    pub source: [u16; 3],
    /// The neighbour's MAC address.
    pub destination: [u16; 3],
}

/// Finds the way for a packet that will say `to`, before anything is changed.
///
/// # Errors
///
/// Why there is none.
#[inline(always)]
pub(crate) fn route<F: Frame>(
    frame: &F,
    packet: &Packet,
    to: &FlowKey,
    egress: &mut Egress,
) -> Result<(), DropReason> {
    if packet.ttl <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    frame.route(packet, to, egress)
}
