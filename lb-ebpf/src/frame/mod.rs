//! One view of a packet for XDP, TC and tests. Every access is checked here and nowhere else.

#[cfg(target_arch = "bpf")]
mod fib;
#[cfg(not(target_arch = "bpf"))]
mod memory;
mod reshape;
#[cfg(target_arch = "bpf")]
pub mod tc;
#[cfg(target_arch = "bpf")]
pub mod xdp;

use core::mem::offset_of;

use lb_common::{addr::Addr, flow::FlowKey, reason::DropReason};
use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

#[cfg(not(target_arch = "bpf"))]
pub use memory::MemoryFrame;
pub use reshape::Reshape;
#[cfg(target_arch = "bpf")]
pub use tc::TcFrame;
#[cfg(target_arch = "bpf")]
pub use xdp::XdpFrame;

#[cfg(target_arch = "bpf")]
use crate::opaque::opaque;
pub use crate::rewrite::ChecksumEdit;
use crate::{
    Egress, Packet,
    icmp::{self, Quote},
    parse::{self, Deep, Link},
};

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
    u8, [u8; 2], u16, [u16; 2], [u16; 4], [u16; 6], [u16; 7], [u16; 16], EthHdr, Ipv4Hdr, Ipv6Hdr
);

/// What a hook knows of a checksum that a device may still have to finish.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Partial {
    /// No device will.
    Never,
    /// One will if the field holds the sum of the pseudo-header, and the segment does not add up as it is.
    Perhaps,
    /// One will.
    Surely,
}

/// A packet from its Ethernet header on. Offsets count from there.
pub trait Frame {
    /// Can the hook ask for a neighbour's MAC address? A packet at one that cannot is left to the TC hook behind it.
    const ASKS: bool;

    /// Is it VLAN-tagged outside of its bytes?
    fn tagged(&self) -> bool;

    /// That tag, as records hold it; 0 for none.
    fn tag(&self) -> u16;

    /// The interface it came in by.
    fn ingress(&self) -> u32;

    /// The largest IP packet that an interface takes, bytes.
    fn link_mtu(&self, interface: u32) -> u32;

    /// Takes all VLAN tags off and puts others on, given as a record holds them. All offsets change.
    ///
    /// # Errors
    ///
    /// [`DropReason::Internal`] when the kernel has no room.
    fn retag(&mut self, link: &Link, vlan: u32) -> Result<(), DropReason>;

    /// Cuts the IP packet of a frame without tags to `keep` bytes and opens `room` bytes before it, the link layer staying in
    /// front.
    ///
    /// # Errors
    ///
    /// [`DropReason::Internal`] when the kernel has no room.
    fn quote(&mut self, link: &Link, length: u32, keep: u32, room: u32) -> Result<(), DropReason>;

    /// Takes bytes off the end, so that this many are left. A packet that is shorter stays as it is.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] when the packet cannot be changed.
    fn cut(&mut self, length: usize) -> Result<(), DropReason>;

    /// The one's complement sum of some bytes, unfolded; at most 1536.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] when there are fewer.
    fn sum(&self, at: u32, length: u32) -> Result<u64, DropReason>;

    /// Will a device still finish the TCP checksum?
    fn may_be_partial(&self) -> Partial;

    /// Parses what needs more looking at: [`parse::deep`], in a program behind a call that the verifier checks once. There
    /// the result lies in a record of this CPU, else in `room`.
    ///
    /// # Errors
    ///
    /// As of [`parse::deep`].
    #[inline(always)]
    fn deep<'a>(&mut self, room: &'a mut Deep) -> Result<Option<&'a Deep>, DropReason>
    where
        Self: Sized,
    {
        Ok(parse::deep(self, room)?.then_some(&*room))
    }

    /// Parses an ICMP error about a TCP packet: [`icmp::parse`], in the same way.
    ///
    /// # Errors
    ///
    /// As of [`icmp::parse`].
    #[inline(always)]
    fn error<'a>(&mut self, room: &'a mut Quote) -> Result<Option<&'a Quote>, DropReason>
    where
        Self: Sized,
    {
        Ok(icmp::parse(self, room)?.then_some(&*room))
    }

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

/// The addresses of an IP header, as a key without ports.
#[inline(always)]
pub(crate) fn addresses<F: Frame>(frame: &F, l3: usize, v6: bool) -> Result<FlowKey, DropReason> {
    let mut key = FlowKey::default();
    if v6 {
        let all: [u16; 16] = frame.load(l3 + offset_of!(Ipv6Hdr, src_addr))?;
        for at in 0..4 {
            key.src.0[at] = word([all[2 * at], all[2 * at + 1]]);
            key.dst.0[at] = word([all[8 + 2 * at], all[9 + 2 * at]]);
        }
    } else {
        key.src = Addr::v4(word(frame.load(l3 + offset_of!(Ipv4Hdr, src_addr))?));
        key.dst = Addr::v4(word(frame.load(l3 + offset_of!(Ipv4Hdr, dst_addr))?));
    }
    Ok(key)
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

/// Bytes summed at a time; the most that one helper call takes on every kernel.
#[cfg(target_arch = "bpf")]
const CHUNK: u32 = 512;
/// Added to the sum when the packet ends early: one look at the end, instead of a way out of every step.
#[cfg(target_arch = "bpf")]
const UNREADABLE: u64 = 1 << 40;

/// The sum of up to [`CHUNK`] bytes that `load` writes to the scratch record.
#[cfg(target_arch = "bpf")]
#[inline(always)]
#[expect(unsafe_code, reason = "helper calls")]
fn chunk(
    scratch: *mut [u32; 128],
    length: u32,
    load: impl FnOnce(*mut core::ffi::c_void, u32) -> i64,
) -> u64 {
    // 1 to `CHUNK` bytes and as many words already, but the verifier has to see it.
    let length = (opaque(u64::from(length) - 1) as u32 & (CHUNK - 1)) + 1;
    let words = (opaque(u64::from(length.div_ceil(4)) - 1) as u32 & (CHUNK / 4 - 1)) + 1;
    // The last word is padded with zero.
    // SAFETY: `words` is 1 to 128.
    unsafe { (*scratch)[(words as usize - 1) & 127] = 0 };
    let loaded = load(scratch.cast(), length);
    // SAFETY: the scratch record holds `CHUNK` bytes and is this CPU's own; `words * 4` is at most that.
    let sum = unsafe {
        aya_ebpf::helpers::generated::bpf_csum_diff(
            core::ptr::null_mut(),
            0,
            scratch.cast(),
            words * 4,
            0,
        )
    };
    // Zero, or a negative error: its sign bit as the mark.
    (sum as u64 & 0xffff_ffff) + ((loaded as u64 >> 63) * UNREADABLE)
}

/// Makes a record all zeros, a word at a time: the target's own `memset` takes a byte at a time.
///
/// # Safety
///
/// The record is the caller's own, and zeros are a value of its type.
#[cfg(target_arch = "bpf")]
#[inline(always)]
#[expect(unsafe_code, reason = "writes words whatever the type")]
unsafe fn clear<T>(record: *mut T) {
    const { assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() >= 8) };
    for word in 0..size_of::<T>() / 8 {
        // SAFETY: inside the record; volatile, so that it stays what it says.
        unsafe { record.cast::<u64>().add(word).write_volatile(0) };
    }
}

/// Start and end of the bytes that a program may touch.
#[cfg(target_arch = "bpf")]
type Bounds = (usize, usize);

/// A packet pointer of a program's context, at an offset of it.
///
/// An instruction of our own: the optimiser knows that the field has 32 bits and may say so once more with a move of 32
/// bits, after which the verifier takes the pointer for a number.
#[cfg(target_arch = "bpf")]
#[inline(always)]
#[expect(unsafe_code, reason = "an instruction")]
fn pointer<C, const AT: usize>(context: *const C) -> usize {
    let value: usize;
    // SAFETY: the caller names a field of the context that every program may read.
    unsafe {
        core::arch::asm!(
            "{value} = *(u32 *)({context} + {at})",
            value = lateout(reg) value,
            context = in(reg) context,
            at = const AT,
            options(pure, readonly, nostack, preserves_flags)
        );
    };
    value
}

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

/// The highest offset that is looked at; parsers end far below. The verifier wants to see a bound.
#[cfg(target_arch = "bpf")]
const DEEPEST: usize = 0x3ff;

/// The most that is made accessible: an answer.
#[cfg(target_arch = "bpf")]
const FARTHEST: usize = 0x7ff;

/// A length to make accessible, with its bound where the verifier sees it: before Linux 6.8 it forgets what was compared
/// with a value on the stack.
#[cfg(target_arch = "bpf")]
#[inline(always)]
fn within_reach(length: usize) -> usize {
    opaque(length as u64) as usize & FARTHEST
}

/// What a parser behind a call says, as one number.
#[cfg(target_arch = "bpf")]
#[inline(always)]
fn coded(found: Result<bool, DropReason>) -> u32 {
    match found {
        Ok(found) => u32::from(found),
        Err(_) => TRUNCATED,
    }
}

/// The only fault that a parser finds.
#[cfg(target_arch = "bpf")]
const TRUNCATED: u32 = 2;

/// What it said.
#[cfg(target_arch = "bpf")]
#[inline(always)]
fn decoded(code: u32) -> Result<bool, DropReason> {
    match code {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(DropReason::Truncated),
    }
}

/// The address of `size` bytes at an offset of the packet, checked against its end.
///
/// The optimiser would compute the checked and the used address in two ways, and the verifier would not see that they
/// are one (`offset is outside of the packet`).
#[cfg(target_arch = "bpf")]
#[inline(always)]
fn checked((start, end): Bounds, at: usize, size: usize) -> Result<usize, DropReason> {
    let address = opaque((start + (at & DEEPEST)) as u64) as usize;
    if address + size > end {
        return Err(DropReason::Truncated);
    }
    Ok(address)
}
