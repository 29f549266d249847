//! A frame at the TC hook: keeps GSO, and the kernel finishes or follows checksums itself.
#![expect(unsafe_code, reason = "packet access and helper calls")]

use core::mem::offset_of;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        __sk_buff, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
    },
    helpers,
    programs::TcContext,
};
use lb_common::{
    flow::FlowKey,
    reason::DropReason,
    vlan::{self, untag},
};

use super::{
    Bounds, CHUNK, ChecksumEdit, Frame, Partial, TRUNCATED, UNREADABLE, Wire, clear, coded,
    decoded, fib, pointer, read, within_reach, write,
};
use crate::{
    Egress, Packet,
    icmp::{self, Quote},
    maps::{DEEP, QUOTE, SCRATCH},
    parse::{self, Deep, Link},
};

/// A packet in a socket buffer.
pub struct TcFrame<'a> {
    pub(super) context: &'a TcContext,
}

impl<'a> TcFrame<'a> {
    /// The packet of a TC program.
    #[inline(always)]
    pub fn new(context: &'a TcContext) -> Self {
        Self { context }
    }

    #[inline(always)]
    fn bounds(&self) -> Bounds {
        let context = self.context.skb.skb.cast_const();
        (
            pointer::<_, { offset_of!(__sk_buff, data) }>(context),
            pointer::<_, { offset_of!(__sk_buff, data_end) }>(context),
        )
    }
}

impl Frame for TcFrame<'_> {
    const ASKS: bool = true;

    #[inline(always)]
    fn tagged(&self) -> bool {
        // SAFETY: a field of the context that every program may read.
        unsafe { (*self.context.skb.skb).vlan_present != 0 }
    }

    #[inline(always)]
    fn tag(&self) -> u16 {
        if !self.tagged() {
            return 0;
        }
        // SAFETY: fields of the context that every program may read.
        let (kind, control) = unsafe {
            let skb = self.context.skb.skb;
            ((*skb).vlan_proto, (*skb).vlan_tci)
        };
        vlan::tag(kind as u16, control as u16)
    }

    #[inline(always)]
    fn ingress(&self) -> u32 {
        // SAFETY: a field of the context that every program may read.
        unsafe { (*self.context.skb.skb).ifindex }
    }

    #[inline(always)]
    fn link_mtu(&self, interface: u32) -> u32 {
        fib::link_mtu(self.context.as_ptr(), interface)
    }

    #[inline(always)]
    fn retag(&mut self, link: &Link, vlan: u32) -> Result<(), DropReason> {
        let skb = self.context.skb.skb;
        let have = link.inside + u32::from(link.outside);
        let mut wrong = 0;
        for number in 0..3 {
            if number < have {
                // SAFETY: the program's own context; every look at the packet is checked anew.
                wrong |= unsafe { helpers::generated::bpf_skb_vlan_pop(skb) };
            }
        }
        // The outer tag goes on last.
        for tag in [(vlan >> 16) as u16, vlan as u16] {
            if tag != 0 {
                let (kind, control) = untag(tag);
                // SAFETY: as above.
                wrong |= unsafe { helpers::generated::bpf_skb_vlan_push(skb, kind, control) };
            }
        }
        if wrong != 0 {
            return Err(DropReason::Internal);
        }
        Ok(())
    }

    #[inline(always)]
    fn quote(&mut self, link: &Link, length: u32, keep: u32, room: u32) -> Result<(), DropReason> {
        let _ = length;
        let skb = self.context.skb.skb;
        let wanted = link.l3 as u32 + keep;
        // SAFETY: a field of the context that every program may read.
        if unsafe { (*skb).len } > wanted {
            // SAFETY: the program's own context; every look at the packet is checked anew.
            if unsafe { helpers::generated::bpf_skb_change_tail(skb, wanted, 0) } != 0 {
                return Err(DropReason::Internal);
            }
        }
        // SAFETY: as above.
        let grown = unsafe {
            helpers::generated::bpf_skb_adjust_room(skb, room as i32, BPF_ADJ_ROOM_MAC, 0)
        };
        if grown != 0 {
            return Err(DropReason::Internal);
        }
        self.reach((wanted + room) as usize)
    }

    #[inline(always)]
    fn cut(&mut self, length: usize) -> Result<(), DropReason> {
        // SAFETY: the program's own packet.
        match unsafe {
            helpers::generated::bpf_skb_change_tail(self.context.skb.skb, length as u32, 0)
        } {
            0 => self.reach(length),
            _ => Err(DropReason::Truncated),
        }
    }

    #[inline(always)]
    fn sum(&self, at: u32, length: u32) -> Result<u64, DropReason> {
        match sum_skb(self.context.skb.skb, at, length) {
            UNREADABLE.. => Err(DropReason::Truncated),
            sum => Ok(sum),
        }
    }

    #[inline(always)]
    fn may_be_partial(&self) -> Partial {
        // SAFETY: a field of the context that every program may read (Linux 5.7).
        match unsafe { (*self.context.skb.skb).gso_size } {
            0 => Partial::Perhaps,
            _ => Partial::Surely,
        }
    }

    #[inline(always)]
    fn deep<'a>(&mut self, _: &'a mut Deep) -> Result<Option<&'a Deep>, DropReason> {
        let found = decoded(deep_tc(self.context.skb.skb))?;
        let record = DEEP.get_ptr(0).ok_or(DropReason::Internal)?;
        // SAFETY: the record is this CPU's own, and written by the call only.
        Ok(found.then_some(unsafe { &*record }))
    }

    #[inline(always)]
    fn error<'a>(&mut self, _: &'a mut Quote) -> Result<Option<&'a Quote>, DropReason> {
        let found = decoded(error_tc(self.context.skb.skb))?;
        let record = QUOTE.get_ptr(0).ok_or(DropReason::Internal)?;
        // SAFETY: as above.
        Ok(found.then_some(unsafe { &*record }))
    }

    #[inline(always)]
    fn reach(&mut self, length: usize) -> Result<(), DropReason> {
        let (start, end) = self.bounds();
        if start + within_reach(length) <= end {
            return Ok(());
        }
        self.context
            .pull_data(length as u32)
            .map_err(|_| DropReason::Truncated)
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
        self.context
            .store(at, &value, u64::from(BPF_F_RECOMPUTE_CSUM))
            .map_err(|_| DropReason::Truncated)
    }

    #[inline(always)]
    fn store_addresses(&mut self, at: usize, to: &FlowKey) -> Result<(), DropReason> {
        // SAFETY: source and destination are the first 32 bytes of a key.
        let stored = unsafe {
            helpers::generated::bpf_skb_store_bytes(
                self.context.skb.skb,
                at as u32,
                core::ptr::from_ref(to).cast(),
                32,
                u64::from(BPF_F_RECOMPUTE_CSUM),
            )
        };
        if stored == 0 {
            Ok(())
        } else {
            Err(DropReason::Truncated)
        }
    }

    /// The helper leaves a partial checksum to the device and follows only the addresses there.
    #[inline(always)]
    fn amend_checksum(&mut self, edit: &ChecksumEdit) -> Result<(), DropReason> {
        let amend = |sum: u32, flags: u64| {
            self.context
                .l4_csum_replace(edit.at, 0, u64::from(sum), flags)
                .map_err(|_| DropReason::Truncated)
        };
        amend(edit.addresses.sum32(), u64::from(BPF_F_PSEUDO_HDR))?;
        amend(edit.ports.sum32(), 0)
    }

    #[inline(always)]
    fn size(&self, packet: &Packet) -> u32 {
        // SAFETY: a field of the context that every program may read (Linux 5.7).
        match unsafe { (*self.context.skb.skb).gso_size } {
            0 => packet.length,
            segment => packet.headers + segment,
        }
    }

    #[inline(always)]
    fn route(&self, to: &FlowKey, egress: &mut Egress) -> Result<(), DropReason> {
        // SAFETY: a field of the context that every program may read.
        let interface = unsafe { (*self.context.skb.skb).ingress_ifindex };
        fib::lookup(self.context.as_ptr(), interface, to, egress)
    }
}

/// Hands a rewritten packet to its interface; the program's return code.
#[inline(always)]
pub fn send(egress: &Egress) -> i32 {
    if egress.known {
        // SAFETY: helper call without pointers.
        return unsafe { helpers::generated::bpf_redirect(egress.interface, 0) as i32 };
    }
    // SAFETY: no next hop given: the helper routes by the packet itself.
    unsafe {
        helpers::generated::bpf_redirect_neigh(egress.interface, core::ptr::null_mut(), 0, 0) as i32
    }
}

/// The sum of the bytes of a packet from an offset on, or [`UNREADABLE`] and more; at most three chunks are summed.
///
/// A function of its own for the verifier (Linux 5.6).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn sum_skb(skb: *mut __sk_buff, at: u32, length: u32) -> u64 {
    let mut sum = 0;
    for place in 0..3 {
        let done = place * CHUNK;
        if done >= length {
            break;
        }
        sum += sum_skb_chunk(skb, at + done, length - done);
    }
    sum
}

/// The sum of the first [`CHUNK`] of these bytes of a packet, or [`UNREADABLE`] and more.
///
/// A function of its own for the verifier (Linux 5.6).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn sum_skb_chunk(skb: *mut __sk_buff, at: u32, length: u32) -> u64 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else {
        return UNREADABLE;
    };
    super::chunk(scratch, length.min(CHUNK), |into, length| {
        // SAFETY: the scratch record has room for a chunk.
        unsafe { helpers::generated::bpf_skb_load_bytes(skb.cast(), at, into, length) }
    })
}

/// [`parse::deep`], a function of its own for the verifier (Linux 5.6).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn deep_tc(context: *mut __sk_buff) -> u32 {
    let Some(record) = DEEP.get_ptr_mut(0) else {
        return TRUNCATED;
    };
    // SAFETY: the record is this CPU's own; zeros are its default.
    let record = unsafe {
        clear(record);
        &mut *record
    };
    let context = TcContext::new(context);
    coded(parse::deep(&mut TcFrame::new(&context), record))
}

/// [`icmp::parse`], in the same way.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn error_tc(context: *mut __sk_buff) -> u32 {
    let Some(record) = QUOTE.get_ptr_mut(0) else {
        return TRUNCATED;
    };
    // SAFETY: the record is this CPU's own; zeros are its default.
    let record = unsafe {
        clear(record);
        &mut *record
    };
    let context = TcContext::new(context);
    coded(icmp::parse(&mut TcFrame::new(&context), record))
}
