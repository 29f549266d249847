//! Tells the daemon that a flow has ended; its log line is made of it.
//!
//! Nobody waits for the daemon: when the ring buffer is full, the end is counted as lost. Nobody wakes it either, it
//! looks by itself, so that an end costs no interrupt.
#![cfg_attr(target_arch = "bpf", expect(unsafe_code, reason = "map access"))]

use lb_common::{event::Cause, tcp::Phase};

use crate::Tables;

/// Reports the end of a flow whose record the caller has claimed; `phase` is the one it was in.
#[inline(always)]
pub(crate) fn end<T: Tables>(tables: &T, slot: u32, phase: Phase, cause: Cause) {
    tables.report(slot, phase, cause);
}

#[cfg(target_arch = "bpf")]
mod ring {
    use core::sync::atomic::Ordering::Relaxed;

    use aya_ebpf::{
        macros::map,
        maps::{PerCpuArray, RingBuf},
    };
    use lb_common::{
        event::{Cause, FLOW_ENDS_BYTES, FlowEnd},
        flow::Flow,
        tcp::{Phase, tick},
    };

    /// Do not wake whoever waits for the ring buffer (linux/bpf.h).
    const BPF_RB_NO_WAKEUP: u64 = 1;

    /// Ends of flows, for the log; the daemon takes them out. When full, `FLOW_ENDS_LOST` counts (Linux 5.8).
    #[map]
    static FLOW_ENDS: RingBuf = RingBuf::with_byte_size(FLOW_ENDS_BYTES, 0);
    /// Ends that found the ring buffer full.
    #[map]
    static FLOW_ENDS_LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

    /// Writes the record straight into the ring buffer: the stack has no room for it.
    #[inline(always)]
    pub(crate) fn write(flow: &Flow, phase: Phase, cause: Cause, now: u64) {
        let Some(mut entry) = FLOW_ENDS.reserve::<FlowEnd>(0) else {
            if let Some(lost) = FLOW_ENDS_LOST.get_ptr_mut(0) {
                // SAFETY: the record is this CPU's own.
                unsafe { *lost += 1 };
            }
            return;
        };
        let end = entry.as_mut_ptr();
        // SAFETY: the ring buffer has reserved the record for us, aligned to 8; every field is written.
        unsafe {
            for side in 0..2 {
                (&mut (*end).route.leave)[side].copy(&flow.route.leave[side]);
                (*end).bytes[side] = flow.bytes[side].load(Relaxed);
                (*end).packets[side] = flow.packets[side].load(Relaxed);
            }
            (*end).owners = flow.owners.load(Relaxed);
            (*end).created = flow.created.load(Relaxed);
            (*end).last_seen = flow.last_seen.load(Relaxed);
            (*end).ended = tick(now);
            (*end).phase = phase as u8;
            (*end).cause = cause as u8;
            (*end).reset_by = flow.reset_by() as u8;
            (*end).reserved = [0; 5];
        }
        entry.submit(BPF_RB_NO_WAKEUP);
    }
}

#[cfg(target_arch = "bpf")]
pub(crate) use ring::write;
