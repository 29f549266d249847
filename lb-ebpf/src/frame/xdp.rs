//! A frame at the XDP hook, in the driver or behind it.
#![expect(unsafe_code, reason = "packet access and helper calls")]

use core::mem::offset_of;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{xdp_action::XDP_TX, xdp_md},
    helpers,
    programs::XdpContext,
};
use lb_common::{checksum::fold, flow::FlowKey, reason::DropReason, vlan::untag};

use super::{
    Bounds, CHUNK, ChecksumEdit, Frame, Partial, TRUNCATED, UNREADABLE, Wire, address_halves,
    clear, coded, decoded, fib, pointer, read, within_reach, write,
};
use crate::{
    Egress, Packet,
    icmp::{self, Quote},
    maps::{DEEP, QUOTE, SCRATCH},
    parse::{self, Deep, Link},
};

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
        let context = self.context.ctx.cast_const();
        (
            pointer::<_, { offset_of!(xdp_md, data) }>(context),
            pointer::<_, { offset_of!(xdp_md, data_end) }>(context),
        )
    }

    /// Was the checksum complete before the edit, which is stored already? What is longer than a jumbo frame is still to be
    /// cut, and so to be finished.
    #[inline(always)]
    fn adds_up(&self, edit: &ChecksumEdit) -> Result<bool, DropReason> {
        if edit.segment > CHUNK * CHUNKS {
            return Ok(false);
        }
        let sum = sum_packet(self.context.ctx, edit.l4 as u32, edit.segment);
        if sum >= UNREADABLE {
            return Err(DropReason::Truncated);
        }
        let ports = u64::from(edit.ports.sum32());
        Ok(fold(sum + edit.pseudo) == fold(ports + u64::from(u16::MAX)))
    }

    /// Moves the start of the packet: forward to make it shorter, backward to make room.
    #[inline(always)]
    fn move_head(&mut self, by: i32) -> Result<(), DropReason> {
        // SAFETY: every look at the packet is checked anew.
        match unsafe { helpers::generated::bpf_xdp_adjust_head(self.context.ctx, by) } {
            0 => Ok(()),
            _ => Err(DropReason::Internal),
        }
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
    let mut sum = 0;
    for place in 0..CHUNKS {
        let done = place * CHUNK;
        if done >= length {
            break;
        }
        sum += sum_packet_chunk(context, at + done, length - done);
    }
    sum
}

/// The sum of the first [`CHUNK`] of these bytes of a packet, or [`UNREADABLE`] and more.
///
/// A function of its own for the verifier (Linux 5.6).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn sum_packet_chunk(context: *mut xdp_md, at: u32, length: u32) -> u64 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return UNREADABLE;
    };
    super::chunk(scratch, length.min(CHUNK), |into, length| {
        // SAFETY: the scratch record has room for a chunk.
        unsafe { helpers::generated::bpf_xdp_load_bytes(context, at, into, length) }
    })
}

impl<const GENERIC: bool> Frame for XdpFrame<'_, GENERIC> {
    const ASKS: bool = false;

    #[inline(always)]
    fn tagged(&self) -> bool {
        false
    }

    #[inline(always)]
    fn tag(&self) -> u16 {
        0
    }

    #[inline(always)]
    fn ingress(&self) -> u32 {
        self.context.ingress_ifindex() as u32
    }

    #[inline(always)]
    fn link_mtu(&self, interface: u32) -> u32 {
        fib::link_mtu(self.context.as_ptr(), interface)
    }

    #[inline(always)]
    fn retag(&mut self, link: &Link, vlan: u32) -> Result<(), DropReason> {
        let [outer, inner] = [vlan as u16, (vlan >> 16) as u16];
        let wanted = u32::from(outer != 0) + u32::from(inner != 0);
        let macs: [u16; 6] = self.load(0)?;
        if wanted != link.inside {
            self.move_head((link.inside as i32 - wanted as i32) * 4)?;
            self.store(0, macs)?;
        }
        if outer != 0 {
            let (kind, control) = untag(outer);
            self.store(12, [kind, control.to_be()])?;
        }
        if inner != 0 {
            let (kind, control) = untag(inner);
            self.store(16, [kind, control.to_be()])?;
        }
        Ok(())
    }

    #[inline(always)]
    fn quote(&mut self, link: &Link, length: u32, keep: u32, room: u32) -> Result<(), DropReason> {
        let (start, end) = self.bounds();
        let size = (end - start) as u32;
        let wanted = link.l3 as u32 + keep;
        // A packet in several pieces is as long as its header says; another may be padded.
        let have = (link.l3 as u32 + length).max(size);
        if have > wanted {
            // SAFETY: the packet stays as long as `keep`, and every look at it is checked anew.
            let cut = unsafe {
                helpers::generated::bpf_xdp_adjust_tail(
                    self.context.ctx,
                    wanted as i32 - have as i32,
                )
            };
            if cut != 0 {
                return Err(DropReason::Internal);
            }
        }
        self.move_head(-(room as i32))?;
        let front: [u16; 7] = self.load(room as usize)?;
        self.store(0, front)?;
        Ok(())
    }

    #[inline(always)]
    fn cut(&mut self, length: usize) -> Result<(), DropReason> {
        let have = self.context.data_end() - self.context.data();
        let less = length as i64 - have as i64;
        if less >= 0 {
            return self.reach(length);
        }
        // SAFETY: the program's own packet.
        match unsafe { helpers::generated::bpf_xdp_adjust_tail(self.context.ctx, less as i32) } {
            0 => self.reach(length),
            _ => Err(DropReason::Truncated),
        }
    }

    #[inline(always)]
    fn sum(&self, at: u32, length: u32) -> Result<u64, DropReason> {
        match sum_packet(self.context.ctx, at, length) {
            UNREADABLE.. => Err(DropReason::Truncated),
            sum => Ok(sum),
        }
    }

    #[inline(always)]
    fn may_be_partial(&self) -> Partial {
        match GENERIC {
            true => Partial::Perhaps,
            false => Partial::Never,
        }
    }

    #[inline(always)]
    fn deep<'a>(&mut self, _: &'a mut Deep) -> Result<Option<&'a Deep>, DropReason> {
        let found = decoded(deep_xdp(self.context.ctx))?;
        let record = DEEP.get_ptr(0).ok_or(DropReason::Internal)?;
        // SAFETY: the record is this CPU's own, and written by the call only.
        Ok(found.then_some(unsafe { &*record }))
    }

    #[inline(always)]
    fn error<'a>(&mut self, _: &'a mut Quote) -> Result<Option<&'a Quote>, DropReason> {
        let found = decoded(error_xdp(self.context.ctx))?;
        let record = QUOTE.get_ptr(0).ok_or(DropReason::Internal)?;
        // SAFETY: as above.
        Ok(found.then_some(unsafe { &*record }))
    }

    #[inline(always)]
    fn reach(&mut self, length: usize) -> Result<(), DropReason> {
        let (start, end) = self.bounds();
        if start + within_reach(length) > end {
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
    /// complete packet in 65,536 looks the same by chance. Summing it anew is right for both; where a device will finish
    /// it, one that adds up as it is has to be told apart, or its sender would repeat it in vain for ever.
    #[inline(always)]
    fn amend_checksum(&mut self, edit: &ChecksumEdit) -> Result<(), DropReason> {
        let field: u16 = self.load(edit.at)?;
        if edit.complete || field != fold(edit.pseudo) {
            return self.store(edit.at, edit.addresses.and(edit.ports).apply(field));
        }
        if GENERIC {
            return match self.adds_up(edit)? {
                true => self.store(edit.at, edit.addresses.and(edit.ports).apply(field)),
                false => self.store(edit.at, edit.addresses.apply_partial(field)),
            };
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

/// [`parse::deep`], a function of its own for the verifier (Linux 5.6).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn deep_xdp(context: *mut xdp_md) -> u32 {
    let Some(record) = DEEP.get_ptr_mut(0) else {
        return TRUNCATED;
    };
    // SAFETY: the record is this CPU's own; zeros are its default.
    let record = unsafe {
        clear(record);
        &mut *record
    };
    let context = XdpContext::new(context);
    coded(parse::deep(&mut XdpFrame::<false>::new(&context), record))
}

/// [`icmp::parse`], in the same way.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn error_xdp(context: *mut xdp_md) -> u32 {
    let Some(record) = QUOTE.get_ptr_mut(0) else {
        return TRUNCATED;
    };
    // SAFETY: the record is this CPU's own; zeros are its default.
    let record = unsafe {
        clear(record);
        &mut *record
    };
    let context = XdpContext::new(context);
    coded(icmp::parse(&mut XdpFrame::<false>::new(&context), record))
}
