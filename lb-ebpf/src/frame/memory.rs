//! A frame in plain memory, for tests and fuzzing: complete checksums, one fixed way out.

use alloc::vec::Vec;

use lb_common::{checksum::sum_bytes, flow::FlowKey, reason::DropReason, vlan::untag};

use super::{ChecksumEdit, Frame, Partial, Wire, address_halves};
use crate::{Egress, Packet, parse::Link};

/// A packet in a byte buffer.
#[derive(Debug)]
pub struct MemoryFrame<'a> {
    bytes: &'a mut Vec<u8>,
    egress: Result<Egress, DropReason>,
}

impl<'a> MemoryFrame<'a> {
    /// A frame whose routing always ends like this.
    pub fn new(bytes: &'a mut Vec<u8>, egress: Result<Egress, DropReason>) -> Self {
        Self { bytes, egress }
    }
}

impl Frame for MemoryFrame<'_> {
    const ASKS: bool = true;

    fn tagged(&self) -> bool {
        false
    }

    fn tag(&self) -> u16 {
        0
    }

    fn ingress(&self) -> u32 {
        2
    }

    fn link_mtu(&self, _: u32) -> u32 {
        1500
    }

    fn retag(&mut self, link: &Link, vlan: u32) -> Result<(), DropReason> {
        let tags = [vlan as u16, (vlan >> 16) as u16];
        let bytes = tags
            .into_iter()
            .filter(|tag| *tag != 0)
            .flat_map(|tag| {
                let (kind, control) = untag(tag);
                [kind.to_ne_bytes(), control.to_be_bytes()].concat()
            })
            .collect::<Vec<u8>>();
        self.bytes.splice(12..12 + 4 * link.inside as usize, bytes);
        Ok(())
    }

    fn quote(&mut self, link: &Link, _: u32, keep: u32, room: u32) -> Result<(), DropReason> {
        self.bytes.truncate(link.l3 + keep as usize);
        let room = core::iter::repeat_n(0, room as usize);
        self.bytes.splice(link.l3..link.l3, room);
        Ok(())
    }

    fn may_be_partial(&self) -> Partial {
        Partial::Never
    }

    /// What was cut off stays in the buffer.
    fn cut(&mut self, length: usize) -> Result<(), DropReason> {
        self.reach(length)
    }

    fn sum(&self, at: u32, length: u32) -> Result<u64, DropReason> {
        let at = at as usize;
        let bytes = self.bytes.get(at..at + length as usize);
        Ok(sum_bytes(bytes.ok_or(DropReason::Truncated)?))
    }

    fn reach(&mut self, length: usize) -> Result<(), DropReason> {
        if self.bytes.len() < length {
            return Err(DropReason::Truncated);
        }
        Ok(())
    }

    #[expect(unsafe_code, reason = "the host's twin of the packet access")]
    fn load<T: Wire>(&self, at: usize) -> Result<T, DropReason> {
        let bytes = self
            .bytes
            .get(at..at + size_of::<T>())
            .ok_or(DropReason::Truncated)?;
        // SAFETY: the slice is as long as `T`, and any bytes are a `T` by the promise of `Wire`.
        Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }

    #[expect(unsafe_code, reason = "the host's twin of the packet access")]
    fn store<T: Wire>(&mut self, at: usize, value: T) -> Result<(), DropReason> {
        let bytes = self
            .bytes
            .get_mut(at..at + size_of::<T>())
            .ok_or(DropReason::Truncated)?;
        // SAFETY: the slice is as long as `T`, and `T` has no padding by the promise of `Wire`.
        unsafe { bytes.as_mut_ptr().cast::<T>().write_unaligned(value) };
        Ok(())
    }

    fn store_summed(&mut self, at: usize, value: u16) -> Result<(), DropReason> {
        self.store(at, value)
    }

    fn store_addresses(&mut self, at: usize, to: &FlowKey) -> Result<(), DropReason> {
        self.store(at, address_halves(to))
    }

    fn amend_checksum(&mut self, edit: &ChecksumEdit) -> Result<(), DropReason> {
        let field: u16 = self.load(edit.at)?;
        self.store(edit.at, edit.addresses.and(edit.ports).apply(field))
    }

    fn size(&self, packet: &Packet) -> u32 {
        packet.length
    }

    fn route(&self, _: &FlowKey, egress: &mut Egress) -> Result<(), DropReason> {
        *egress = self.egress?;
        Ok(())
    }
}
