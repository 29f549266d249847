//! Frames that change their length: what becomes of a packet that turns into another one.

use lb_common::{flow::Flow, reason::DropReason};

use super::Frame;
use crate::{
    parse::Deep,
    shift::{self, Place, ROOM, SEGMENT, Workspace, segment},
};

/// A packet whose end can be moved. Offsets count from its Ethernet header.
pub trait Reshape: Frame {
    /// Copies 1 to [`ROOM`] bytes out of the packet, wherever they lie.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] when the packet ends before.
    fn copy_out(&self, at: usize, to: &mut [u8; ROOM], length: u32) -> Result<(), DropReason>;

    /// Copies 1 to [`SEGMENT`] bytes into the packet. `summed`: no checksum of the packet itself makes up for them.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] when the packet ends before.
    fn copy_in(
        &mut self,
        at: usize,
        from: &[u8; SEGMENT],
        length: u32,
        summed: bool,
    ) -> Result<(), DropReason>;

    /// Moves the packet's end; what is new behind the old one is undefined.
    ///
    /// # Errors
    ///
    /// [`DropReason::TooBig`] when there is no room.
    fn resize(&mut self, length: usize) -> Result<(), DropReason>;

    /// Makes room for a packet of that length, if there is less; nothing else changes.
    ///
    /// # Errors
    ///
    /// [`DropReason::TooBig`] when there is none to be had: in a driver's buffer. The hook behind has a socket buffer.
    fn make_room(&mut self, length: usize) -> Result<(), DropReason>;

    /// Will a device finish the TCP checksum at this offset? `pseudo`: the sum of the pseudo-header. Leaves the field
    /// undefined.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] outside of the accessible bytes.
    fn unfinished(&mut self, at: usize, pseudo: u64) -> Result<bool, DropReason>;

    /// [`Workspace::take`], behind a call that the verifier checks once, whatever comes before and after.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] when that is no TCP header, or the packet ends inside.
    #[inline(always)]
    fn take(&self, workspace: &mut Workspace, at: usize, length: u32) -> Result<(), DropReason>
    where
        Self: Sized,
    {
        workspace.take(self, at, length)
    }

    /// [`segment::replace`], behind such a call.
    ///
    /// # Errors
    ///
    /// [`DropReason::TooBig`] when there is no room.
    #[inline(always)]
    fn replace(&mut self, workspace: &mut Workspace, place: &Place) -> Result<(), DropReason>
    where
        Self: Sized,
    {
        segment::replace(self, workspace, place)
    }

    /// [`shift::readdress`], behind such a call.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] when the packet ends inside its headers.
    #[inline(always)]
    fn readdress(
        &mut self,
        workspace: &mut Workspace,
        flow: &Flow,
        deep: &Deep,
    ) -> Result<(), DropReason>
    where
        Self: Sized,
    {
        shift::readdress(self, workspace, flow, deep)
    }

    /// [`shift::perform`], behind such a call.
    ///
    /// # Errors
    ///
    /// [`DropReason::Truncated`] when the packet ends inside its headers, [`DropReason::TooBig`] when there is no room.
    #[inline(always)]
    fn perform(&mut self, workspace: &mut Workspace, flow: &Flow) -> Result<(), DropReason>
    where
        Self: Sized,
    {
        shift::perform(self, workspace, flow)
    }
}

#[cfg(target_arch = "bpf")]
#[expect(unsafe_code, reason = "helper calls")]
mod kernel {
    use aya_ebpf::{
        EbpfContext as _,
        bindings::{__sk_buff, BPF_F_RECOMPUTE_CSUM, xdp_md},
        helpers::generated as helpers,
        programs::{TcContext, XdpContext},
    };
    use lb_common::checksum::fold;

    use super::*;
    use crate::{
        frame::{TcFrame, XdpFrame},
        maps,
        opaque::opaque,
        tables::Tables as _,
    };

    /// The offsets and the family of a place in one word: a function takes five arguments at most.
    #[inline(always)]
    fn pack(place: &Place) -> u32 {
        place.l3 as u32 | (place.l4 as u32) << 8 | u32::from(place.v6) << 16
    }

    #[inline(always)]
    fn unpack(packed: u32, before: u32, after: u32, pseudo: u64) -> Place {
        Place {
            l3: (packed & 0xff) as usize,
            l4: (packed >> 8 & 0xff) as usize,
            v6: packed >> 16 != 0,
            before,
            after,
            pseudo,
        }
    }

    #[inline(always)]
    fn taken<F: Reshape>(frame: &F, at: u32, length: u32) -> u32 {
        let Some(workspace) = maps::workspace() else {
            return 1;
        };
        u32::from(workspace.take(frame, at as usize & 0xff, length).is_err())
    }

    #[inline(always)]
    fn replaced<F: Reshape>(frame: &mut F, place: &Place) -> u32 {
        let Some(workspace) = maps::workspace() else {
            return 1;
        };
        // Every argument has to be used: the compiler leaves others out of the call, and the verifier misses them.
        if place.before == 0 {
            return 1;
        }
        u32::from(segment::replace(frame, workspace, place).is_err())
    }

    #[inline(always)]
    fn readdressed<F: Reshape>(frame: &mut F) -> u32 {
        let (Some(workspace), Some(deep)) = (maps::workspace(), maps::DEEP.get_ptr(0)) else {
            return 1;
        };
        let Some(flow) = maps::KernelTables.flow(workspace.slot) else {
            return 1;
        };
        // SAFETY: the record is this CPU's own, and was written by the parser just now.
        let deep = unsafe { &*deep };
        u32::from(shift::readdress(frame, workspace, flow, deep).is_err())
    }

    #[inline(always)]
    fn performed<F: Reshape>(frame: &mut F) -> u32 {
        let Some(workspace) = maps::workspace() else {
            return 1;
        };
        let Some(flow) = maps::KernelTables.flow(workspace.slot) else {
            return 1;
        };
        u32::from(shift::perform(frame, workspace, flow).is_err())
    }

    macro_rules! once {
        ($frame:ty, $context:ident, $raw:ty, $take:ident, $replace:ident, $perform:ident, $readdress:ident) => {
            /// A function of its own for the verifier (Linux 5.6).
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub extern "C" fn $perform(context: *mut $raw) -> u32 {
                performed(&mut <$frame>::new(&$context::new(context)))
            }

            /// A function of its own for the verifier (Linux 5.6).
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub extern "C" fn $readdress(context: *mut $raw) -> u32 {
                readdressed(&mut <$frame>::new(&$context::new(context)))
            }

            /// A function of its own for the verifier (Linux 5.6).
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub extern "C" fn $take(context: *mut $raw, at: u32, length: u32) -> u32 {
                taken(&<$frame>::new(&$context::new(context)), at, length)
            }

            /// A function of its own for the verifier (Linux 5.6).
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub extern "C" fn $replace(
                context: *mut $raw,
                packed: u32,
                before: u32,
                after: u32,
                pseudo: u64,
            ) -> u32 {
                let place = unpack(packed, before, after, pseudo);
                replaced(&mut <$frame>::new(&$context::new(context)), &place)
            }
        };
    }
    once!(
        TcFrame<'_>,
        TcContext,
        __sk_buff,
        take_tc,
        replace_tc,
        perform_tc,
        readdress_tc
    );
    once!(
        XdpFrame<'_, false>,
        XdpContext,
        xdp_md,
        take_xdp,
        replace_xdp,
        perform_xdp,
        readdress_xdp
    );
    once!(
        XdpFrame<'_, true>,
        XdpContext,
        xdp_md,
        take_xdp_generic,
        replace_xdp_generic,
        perform_xdp_generic,
        readdress_xdp_generic
    );

    /// 1 to `most` (a power of two) already, but the verifier has to see it.
    #[inline(always)]
    fn bounded(length: u32, most: usize) -> u32 {
        (opaque(u64::from(length) - 1) as u32 & (most as u32 - 1)) + 1
    }

    #[inline(always)]
    fn done(code: i64, otherwise: DropReason) -> Result<(), DropReason> {
        if code == 0 { Ok(()) } else { Err(otherwise) }
    }

    impl Reshape for TcFrame<'_> {
        #[inline(always)]
        fn copy_out(&self, at: usize, to: &mut [u8; ROOM], length: u32) -> Result<(), DropReason> {
            let length = bounded(length, ROOM);
            // SAFETY: the buffer holds `ROOM` bytes.
            let code = unsafe {
                helpers::bpf_skb_load_bytes(
                    self.context.as_ptr().cast_const(),
                    at as u32,
                    to.as_mut_ptr().cast(),
                    length,
                )
            };
            done(code, DropReason::Truncated)
        }

        #[inline(always)]
        fn copy_in(
            &mut self,
            at: usize,
            from: &[u8; SEGMENT],
            length: u32,
            summed: bool,
        ) -> Result<(), DropReason> {
            let length = bounded(length, SEGMENT);
            let flags = if summed { BPF_F_RECOMPUTE_CSUM } else { 0 };
            // SAFETY: the buffer holds `SEGMENT` bytes.
            let code = unsafe {
                helpers::bpf_skb_store_bytes(
                    self.context.skb.skb,
                    at as u32,
                    from.as_ptr().cast(),
                    length,
                    u64::from(flags),
                )
            };
            done(code, DropReason::Truncated)
        }

        #[inline(always)]
        fn resize(&mut self, length: usize) -> Result<(), DropReason> {
            // SAFETY: helper call without pointers but the context.
            let code =
                unsafe { helpers::bpf_skb_change_tail(self.context.skb.skb, length as u32, 0) };
            done(code, DropReason::TooBig)
        }

        /// A socket buffer grows when it has to.
        #[inline(always)]
        fn make_room(&mut self, _: usize) -> Result<(), DropReason> {
            Ok(())
        }

        /// The helper changes a field only that no device will finish.
        #[inline(always)]
        fn unfinished(&mut self, at: usize, _: u64) -> Result<bool, DropReason> {
            let before: u16 = self.load(at)?;
            self.context
                .l4_csum_replace(at, 0, 0x1234, 0)
                .map_err(|_| DropReason::Truncated)?;
            let after: u16 = self.load(at)?;
            Ok(before == after)
        }

        #[inline(always)]
        fn take(&self, _: &mut Workspace, at: usize, length: u32) -> Result<(), DropReason> {
            let code = take_tc(self.context.skb.skb, at as u32, length);
            done(i64::from(code), DropReason::Truncated)
        }

        #[inline(always)]
        fn replace(&mut self, _: &mut Workspace, place: &Place) -> Result<(), DropReason> {
            let code = replace_tc(
                self.context.skb.skb,
                pack(place),
                place.before,
                place.after,
                place.pseudo,
            );
            done(i64::from(code), DropReason::TooBig)
        }

        #[inline(always)]
        fn readdress(&mut self, _: &mut Workspace, _: &Flow, _: &Deep) -> Result<(), DropReason> {
            let code = readdress_tc(self.context.skb.skb);
            done(i64::from(code), DropReason::Truncated)
        }

        #[inline(always)]
        fn perform(&mut self, _: &mut Workspace, _: &Flow) -> Result<(), DropReason> {
            let code = perform_tc(self.context.skb.skb);
            done(i64::from(code), DropReason::TooBig)
        }
    }

    impl<const GENERIC: bool> Reshape for XdpFrame<'_, GENERIC> {
        #[inline(always)]
        fn copy_out(&self, at: usize, to: &mut [u8; ROOM], length: u32) -> Result<(), DropReason> {
            let length = bounded(length, ROOM);
            // SAFETY: the buffer holds `ROOM` bytes.
            let code = unsafe {
                helpers::bpf_xdp_load_bytes(
                    self.context.ctx,
                    at as u32,
                    to.as_mut_ptr().cast(),
                    length,
                )
            };
            done(code, DropReason::Truncated)
        }

        #[inline(always)]
        fn copy_in(
            &mut self,
            at: usize,
            from: &[u8; SEGMENT],
            length: u32,
            _: bool,
        ) -> Result<(), DropReason> {
            let length = bounded(length, SEGMENT);
            // SAFETY: the buffer holds `SEGMENT` bytes.
            let code = unsafe {
                helpers::bpf_xdp_store_bytes(
                    self.context.ctx,
                    at as u32,
                    from.as_ptr().cast_mut().cast(),
                    length,
                )
            };
            done(code, DropReason::Truncated)
        }

        #[inline(always)]
        fn resize(&mut self, length: usize) -> Result<(), DropReason> {
            // SAFETY: helper call without pointers but the context (Linux 5.18).
            let now = unsafe { helpers::bpf_xdp_get_buff_len(self.context.ctx) } as i64;
            // SAFETY: as above.
            let code = unsafe {
                helpers::bpf_xdp_adjust_tail(self.context.ctx, (length as i64 - now) as i32)
            };
            done(code, DropReason::TooBig)
        }

        #[inline(always)]
        fn make_room(&mut self, length: usize) -> Result<(), DropReason> {
            // SAFETY: helper call without pointers but the context (Linux 5.18).
            let now = unsafe { helpers::bpf_xdp_get_buff_len(self.context.ctx) };
            if length as u64 <= now as u64 {
                return Ok(());
            }
            self.resize(length)
        }

        /// Judged by the value: see [`Frame::amend_checksum`]. In the driver nobody would finish it.
        #[inline(always)]
        fn unfinished(&mut self, at: usize, pseudo: u64) -> Result<bool, DropReason> {
            if !GENERIC {
                return Ok(false);
            }
            let field: u16 = self.load(at)?;
            Ok(field == fold(pseudo))
        }

        #[inline(always)]
        fn take(&self, _: &mut Workspace, at: usize, length: u32) -> Result<(), DropReason> {
            let code = match GENERIC {
                true => take_xdp_generic(self.context.ctx, at as u32, length),
                false => take_xdp(self.context.ctx, at as u32, length),
            };
            done(i64::from(code), DropReason::Truncated)
        }

        #[inline(always)]
        fn replace(&mut self, _: &mut Workspace, place: &Place) -> Result<(), DropReason> {
            let run = match GENERIC {
                true => replace_xdp_generic,
                false => replace_xdp,
            };
            let code = run(
                self.context.ctx,
                pack(place),
                place.before,
                place.after,
                place.pseudo,
            );
            done(i64::from(code), DropReason::TooBig)
        }

        #[inline(always)]
        fn readdress(&mut self, _: &mut Workspace, _: &Flow, _: &Deep) -> Result<(), DropReason> {
            let code = match GENERIC {
                true => readdress_xdp_generic(self.context.ctx),
                false => readdress_xdp(self.context.ctx),
            };
            done(i64::from(code), DropReason::Truncated)
        }

        #[inline(always)]
        fn perform(&mut self, _: &mut Workspace, _: &Flow) -> Result<(), DropReason> {
            let code = match GENERIC {
                true => perform_xdp_generic(self.context.ctx),
                false => perform_xdp(self.context.ctx),
            };
            done(i64::from(code), DropReason::TooBig)
        }
    }
}
