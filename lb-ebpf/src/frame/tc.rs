//! A frame at the TC hook: keeps GSO, and the kernel finishes or follows checksums itself.
#![expect(unsafe_code, reason = "packet access and helper calls")]

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM},
    helpers,
    programs::TcContext,
};
use lb_common::{flow::FlowKey, reason::DropReason};

use super::{Bounds, ChecksumEdit, Frame, Wire, fib, read, write};
use crate::{Egress, Packet};

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
        (self.context.data(), self.context.data_end())
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
    fn reach(&mut self, length: usize) -> Result<(), DropReason> {
        if self.context.data() + length <= self.context.data_end() {
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
