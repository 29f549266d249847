//! A frame at the XDP hook, in the driver or behind it.
#![expect(unsafe_code, reason = "packet access and helper calls")]

use aya_ebpf::{
    EbpfContext as _,
    bindings::{xdp_action::XDP_TX, xdp_md},
    helpers,
    programs::XdpContext,
};
use lb_common::{checksum::fold, flow::FlowKey, reason::DropReason};

use super::{Bounds, ChecksumEdit, Frame, Wire, address_halves, fib, read, write};
use crate::{Egress, Packet, maps::SCRATCH, opaque::opaque};

/// Bytes summed at a time; the most that one helper call takes on every kernel.
const CHUNK: u32 = 512;
/// Chunks summed at most: a jumbo frame.
const CHUNKS: u32 = 18;

/// A packet in a driver's buffer.
///
/// `GENERIC` programs run behind the driver on a socket buffer: there a partial checksum is still finished by the
/// device, while in the driver nobody would.
pub struct XdpFrame<'a, const GENERIC: bool> {
    pub(super) context: &'a XdpContext,
}

impl<'a, const GENERIC: bool> XdpFrame<'a, GENERIC> {
    /// The packet of an XDP program.
    #[inline(always)]
    pub fn new(context: &'a XdpContext) -> Self {
        Self { context }
    }

    #[inline(always)]
    fn bounds(&self) -> Bounds {
        (self.context.data(), self.context.data_end())
    }

    /// Sums the whole segment anew, its checksum field taken as zero.
    #[inline(always)]
    fn full_checksum(&mut self, edit: &ChecksumEdit) -> Result<(), DropReason> {
        if edit.segment > CHUNK * CHUNKS {
            return Err(DropReason::TooBig);
        }
        self.store(edit.at, 0u16)?;
        let sum = sum_packet(self.context.ctx, edit.l4 as u32, edit.segment);
        if sum >= UNREADABLE {
            return Err(DropReason::Truncated);
        }
        let sum = sum + edit.pseudo + u64::from(edit.addresses.sum32());
        self.store(edit.at, !fold(sum))
    }
}

/// The sum of the bytes of a packet from an offset on, or [`UNREADABLE`] and more.
///
/// A function of its own for the verifier (Linux 5.6).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn sum_packet(context: *mut xdp_md, at: u32, length: u32) -> u64 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return UNREADABLE;
    };
    let mut sum = 0;
    for place in 0..CHUNKS {
        let done = place * CHUNK;
        if done >= length {
            break;
        }
        sum += chunk(context, scratch, at + done, (length - done).min(CHUNK));
    }
    sum
}

/// Added to the sum when the packet ends early: one look at the end, instead of a way out of every step.
const UNREADABLE: u64 = 1 << 40;

/// The sum of up to [`CHUNK`] bytes of the packet.
#[inline(always)]
fn chunk(context: *mut xdp_md, scratch: *mut [u32; 128], at: u32, length: u32) -> u64 {
    // 1 to `CHUNK` bytes and as many words already, but the verifier has to see it.
    let length = (opaque(u64::from(length) - 1) as u32 & (CHUNK - 1)) + 1;
    let words = (opaque(u64::from(length.div_ceil(4)) - 1) as u32 & (CHUNK / 4 - 1)) + 1;
    // The last word is padded with zero.
    // SAFETY: `words` is 1 to 128.
    unsafe { (*scratch)[(words as usize - 1) & 127] = 0 };
    // SAFETY: the scratch record holds `CHUNK` bytes and is this CPU's own.
    let loaded =
        unsafe { helpers::generated::bpf_xdp_load_bytes(context, at, scratch.cast(), length) };
    // SAFETY: as above; `words * 4` is at most `CHUNK`.
    let sum = unsafe {
        helpers::generated::bpf_csum_diff(core::ptr::null_mut(), 0, scratch.cast(), words * 4, 0)
    };
    // Zero, or a negative error: its sign bit as the mark.
    (sum as u64 & 0xffff_ffff) + ((loaded as u64 >> 63) * UNREADABLE)
}

impl<const GENERIC: bool> Frame for XdpFrame<'_, GENERIC> {
    const ASKS: bool = false;

    #[inline(always)]
    fn tagged(&self) -> bool {
        false
    }

    #[inline(always)]
    fn reach(&mut self, length: usize) -> Result<(), DropReason> {
        if self.context.data() + length > self.context.data_end() {
            return Err(DropReason::Truncated);
        }
        Ok(())
    }

    #[inline(always)]
    fn load<T: Wire>(&self, at: usize) -> Result<T, DropReason> {
        read(self.bounds(), at)
    }

    #[inline(always)]
    fn store<T: Wire>(&mut self, at: usize, value: T) -> Result<(), DropReason> {
        write(self.bounds(), at, value)
    }

    #[inline(always)]
    fn store_summed(&mut self, at: usize, value: u16) -> Result<(), DropReason> {
        self.store(at, value)
    }

    #[inline(always)]
    fn store_addresses(&mut self, at: usize, to: &FlowKey) -> Result<(), DropReason> {
        self.store(at, address_halves(to))
    }

    /// A field that equals the pseudo-header sum was left for a device to finish (veth, virtio, local senders). One
    /// complete packet in 65,536 looks the same by chance; summing it anew is right for both.
    #[inline(always)]
    fn amend_checksum(&mut self, edit: &ChecksumEdit) -> Result<(), DropReason> {
        let field: u16 = self.load(edit.at)?;
        if field != fold(edit.pseudo) {
            return self.store(edit.at, edit.addresses.and(edit.ports).apply(field));
        }
        if GENERIC {
            return self.store(edit.at, edit.addresses.apply_partial(field));
        }
        self.full_checksum(edit)
    }

    #[inline(always)]
    fn size(&self, packet: &Packet) -> u32 {
        packet.length
    }

    #[inline(always)]
    fn route(&self, to: &FlowKey, egress: &mut Egress) -> Result<(), DropReason> {
        let interface = self.context.ingress_ifindex() as u32;
        fib::lookup(self.context.as_ptr(), interface, to, egress)
    }
}

/// Hands a rewritten packet to its interface; the program's return code.
#[inline(always)]
pub fn send(context: &XdpContext, egress: &Egress) -> u32 {
    if egress.interface as usize == context.ingress_ifindex() {
        return XDP_TX;
    }
    // SAFETY: helper call without pointers.
    unsafe { helpers::generated::bpf_redirect(egress.interface, 0) as u32 }
}
