//! Atomic read-modify-write for both targets.

use lb_common::atomic::{AtomicU32, AtomicU64};

#[cfg(not(target_arch = "bpf"))]
mod imp {
    use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

    pub(crate) fn add_u64(cell: &AtomicU64, value: u64) {
        cell.fetch_add(value, Relaxed);
    }

    pub(crate) fn add_u32(cell: &AtomicU32, value: u32) -> u32 {
        cell.fetch_add(value, Relaxed)
    }

    pub(crate) fn swap_if(cell: &AtomicU32, old: u32, new: u32) -> bool {
        cell.compare_exchange(old, new, Relaxed, Relaxed).is_ok()
    }
}

#[cfg(target_arch = "bpf")]
#[expect(
    unsafe_code,
    reason = "the target has atomic instructions that core does not offer"
)]
mod imp {
    use core::intrinsics::{
        self,
        AtomicOrdering::{Relaxed, SeqCst},
    };

    use lb_common::atomic::{AtomicU32, AtomicU64};

    #[inline(always)]
    pub(crate) fn add_u64(cell: &AtomicU64, value: u64) {
        // SAFETY: the pointer comes from a live atomic cell.
        unsafe { intrinsics::atomic_xadd::<u64, u64, { Relaxed }>(cell.as_ptr(), value) };
    }

    // Ordered more than needed: LLVM 22 turns a relaxed one into the instruction that returns nothing, and then takes
    // the addend for the result.
    #[inline(always)]
    pub(crate) fn add_u32(cell: &AtomicU32, value: u32) -> u32 {
        // SAFETY: the pointer comes from a live atomic cell.
        unsafe { intrinsics::atomic_xadd::<u32, u32, { SeqCst }>(cell.as_ptr(), value) }
    }

    #[inline(always)]
    pub(crate) fn swap_if(cell: &AtomicU32, old: u32, new: u32) -> bool {
        // SAFETY: the pointer comes from a live atomic cell.
        unsafe {
            intrinsics::atomic_cxchg::<u32, { SeqCst }, { SeqCst }>(cell.as_ptr(), old, new).1
        }
    }

    #[inline(always)]
    pub(crate) fn swap_wide(cell: &AtomicU64, old: u64, new: u64) -> bool {
        // SAFETY: the pointer comes from a live atomic cell.
        unsafe {
            intrinsics::atomic_cxchg::<u64, { SeqCst }, { SeqCst }>(cell.as_ptr(), old, new).1
        }
    }
}

/// Adds to a counter that several CPUs count in; `u64::MAX` takes one off.
#[inline(always)]
pub(crate) fn add(cell: &AtomicU64, value: u64) {
    imp::add_u64(cell, value);
}

/// Draws the next number of a sequence.
#[inline(always)]
pub(crate) fn draw(cell: &AtomicU32) -> u32 {
    imp::add_u32(cell, 1)
}

/// Replaces `old` by `new`; false when another CPU was first.
#[inline(always)]
pub(crate) fn swap_if(cell: &AtomicU32, old: u32, new: u32) -> bool {
    imp::swap_if(cell, old, new)
}

/// The same of a wide cell.
#[cfg(target_arch = "bpf")]
#[inline(always)]
pub(crate) fn swap_wide(cell: &AtomicU64, old: u64, new: u64) -> bool {
    imp::swap_wide(cell, old, new)
}
