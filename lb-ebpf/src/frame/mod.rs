//! One view of a packet for XDP, TC and tests. Every access is checked here and nowhere else.

#[cfg(target_arch = "bpf")]
mod fib;
mod memory;
mod reshape;
#[cfg(target_arch = "bpf")]
pub mod tc;
#[cfg(target_arch = "bpf")]
pub mod xdp;

use lb_common::{flow::FlowKey, reason::DropReason};
use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

pub use memory::MemoryFrame;
pub use reshape::Reshape;
#[cfg(target_arch = "bpf")]
pub use tc::TcFrame;
#[cfg(target_arch = "bpf")]
pub use xdp::XdpFrame;

#[cfg(target_arch = "bpf")]
use crate::opaque::opaque;
pub use crate::rewrite::ChecksumEdit;
use crate::{Egress, Packet};

/// A type that any bytes are a value of.
///
/// Headers start at even offsets of a packet that starts at an even address, and behind 14 bytes of Ethernet never at a
/// multiple of four: so nothing here is aligned to more than two.
///
/// # Safety
///
/// Every bit pattern is valid, there is no padding, and the alignment is 1 or 2.
#[expect(unsafe_code, reason = "the promise is made once, here")]
pub unsafe trait Wire: Copy {}

macro_rules! wire {
    ($($t:ty),*) => { $(
        // SAFETY: plain integers and byte arrays.
        #[expect(unsafe_code, reason = "see the trait")]
        unsafe impl Wire for $t {}
    )* };
}
wire!(
    u8, [u8; 2], u16, [u16; 2], [u16; 6], [u16; 16], EthHdr, Ipv4Hdr, Ipv6Hdr
);

/// A packet from its Ethernet header on. Offsets count from there.
pub trait Frame {
    /// Can the hook ask for a neighbour's MAC address? A packet at one that cannot is left to the TC hook behind it.
    const ASKS: bool;

    /// Is it VLAN-tagged outside of its bytes? Then it is for the VLAN's own interface.
    fn tagged(&self) -> bool;

    /// Makes the first `length` bytes accessible.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] when the packet is shorter.
    fn reach(&mut self, length: usize) -> Result<(), DropReason>;

    /// Reads a value.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] outside of the accessible bytes.
    fn load<T: Wire>(&self, at: usize) -> Result<T, DropReason>;

    /// Writes a value.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] outside of the accessible bytes.
    fn store<T: Wire>(&mut self, at: usize, value: T) -> Result<(), DropReason>;

    /// Writes a value that no checksum of the packet itself makes up for, so that a sum of the whole packet which the
    /// device delivered has to follow.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] outside of the accessible bytes.
    fn store_summed(&mut self, at: usize, value: u16) -> Result<(), DropReason>;

    /// Writes source and destination of an IPv6 header, under the same condition.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] outside of the accessible bytes.
    fn store_addresses(&mut self, at: usize, to: &FlowKey) -> Result<(), DropReason>;

    /// Brings the TCP checksum in line with an edit that is already stored.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] outside of the accessible bytes.
    fn amend_checksum(&mut self, edit: &ChecksumEdit) -> Result<(), DropReason>;

    /// The largest IP packet that leaves for this one, bytes: a segment of it when the device cuts it.
    fn size(&self, packet: &Packet) -> u32;

    /// Finds the way for a packet that will say `to`.
    ///
    /// # Errors
    ///
    /// Why there is none.
    fn route(&self, to: &FlowKey, egress: &mut Egress) -> Result<(), DropReason>;

    /// Writes the link-layer addresses of the way out, where they are known.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] when there is no Ethernet header.
    #[inline(always)]
    fn address(&mut self, egress: &Egress) -> Result<(), DropReason> {
        if egress.known {
            let [[a, b], [c, d], [e, f]] = egress.macs.map(halves);
            self.store(0, [a, b, c, d, e, f])?;
        }
        Ok(())
    }
}

/// An address word as two halves, in the order of memory.
#[inline(always)]
pub(crate) fn halves(word: u32) -> [u16; 2] {
    let [a, b, c, d] = word.to_ne_bytes();
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])]
}

/// An address word from its halves.
#[inline(always)]
pub(crate) fn word(halves: [u16; 2]) -> u32 {
    let ([a, b], [c, d]) = (halves[0].to_ne_bytes(), halves[1].to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// Both addresses of an IPv6 header, as they lie there.
#[inline(always)]
fn address_halves(to: &FlowKey) -> [u16; 16] {
    let mut out = [0; 16];
    for at in 0..4 {
        [out[2 * at], out[2 * at + 1]] = halves(to.src.0[at]);
        [out[8 + 2 * at], out[9 + 2 * at]] = halves(to.dst.0[at]);
    }
    out
}

/// Start and end of the bytes that a program may touch.
#[cfg(target_arch = "bpf")]
type Bounds = (usize, usize);

/// Reads a value of the packet.
#[cfg(target_arch = "bpf")]
#[inline(always)]
#[expect(unsafe_code, reason = "packet access")]
fn read<T: Wire>(bounds: Bounds, at: usize) -> Result<T, DropReason> {
    let pointer = checked(bounds, at, size_of::<T>())? as *const T;
    // SAFETY: inside the packet, checked just now, and aligned as `Wire` says; any bytes are a `T`.
    Ok(unsafe { pointer.read() })
}

/// Writes a value of the packet.
#[cfg(target_arch = "bpf")]
#[inline(always)]
#[expect(unsafe_code, reason = "packet access")]
fn write<T: Wire>(bounds: Bounds, at: usize, value: T) -> Result<(), DropReason> {
    let pointer = checked(bounds, at, size_of::<T>())? as *mut T;
    // SAFETY: inside the packet, checked just now, and aligned as `Wire` says.
    unsafe { pointer.write(value) };
    Ok(())
}

/// The address of `size` bytes at an offset of the packet, checked against its end.
///
/// The optimiser would compute the checked and the used address in two ways, and the verifier would not see that they
/// are one (`offset is outside of the packet`).
#[cfg(target_arch = "bpf")]
#[inline(always)]
fn checked((start, end): Bounds, at: usize, size: usize) -> Result<usize, DropReason> {
    let address = opaque((start + at) as u64) as usize;
    if address + size > end {
        return Err(DropReason::Truncated);
    }
    Ok(address)
}
