//! Atomic read-modify-write for both targets.

use lb_common::{
    atomic::{AtomicU32, AtomicU64},
    index::Bucket,
};

/// Two entries of a bucket, the first in the low half. Each of them is whole, and both are of nearly one moment.
#[cfg(target_arch = "bpf")]
#[inline(always)]
#[expect(unsafe_code, reason = "the target reads eight aligned bytes at once")]
pub(crate) fn two(bucket: &Bucket, pair: usize) -> u64 {
    // SAFETY: a bucket is aligned to 64 bytes and has room for eight pairs.
    unsafe {
        bucket
            .entries
            .as_ptr()
            .cast::<u64>()
            .add(pair & 7)
            .read_volatile()
    }
}

/// The host reads them one by one.
#[cfg(not(target_arch = "bpf"))]
pub(crate) fn two(bucket: &Bucket, pair: usize) -> u64 {
    use core::sync::atomic::Ordering::Relaxed;
    let [low, high] = [2 * pair, 2 * pair + 1].map(|at| bucket.entries[at].load(Relaxed));
    u64::from(low) | u64::from(high) << 32
}

#[cfg(not(target_arch = "bpf"))]
mod imp {
    use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

    pub(crate) fn add_u64(cell: &AtomicU64, value: u64) {
        cell.fetch_add(value, SeqCst);
    }

    pub(crate) fn add_u32(cell: &AtomicU32, value: u32) -> u32 {
        cell.fetch_add(value, SeqCst)
    }

    pub(crate) fn and_u64(cell: &AtomicU64, value: u64) -> u64 {
        cell.fetch_and(value, SeqCst)
    }

    pub(crate) fn or_u64(cell: &AtomicU64, value: u64) -> u64 {
        cell.fetch_or(value, SeqCst)
    }

    pub(crate) fn and_u32(cell: &AtomicU32, value: u32) -> u32 {
        cell.fetch_and(value, SeqCst)
    }

    pub(crate) fn or_u32(cell: &AtomicU32, value: u32) -> u32 {
        cell.fetch_or(value, SeqCst)
    }

    pub(crate) fn swap_if(cell: &AtomicU32, old: u32, new: u32) -> bool {
        cell.compare_exchange(old, new, SeqCst, SeqCst).is_ok()
    }

    pub(crate) fn swap_if_u64(cell: &AtomicU64, old: u64, new: u64) -> bool {
        cell.compare_exchange(old, new, SeqCst, SeqCst).is_ok()
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
    macro_rules! fetch {
        ($name:ident, $intrinsic:ident, $cell:ty, $t:ty) => {
            #[inline(always)]
            pub(crate) fn $name(cell: &$cell, value: $t) -> $t {
                // SAFETY: the pointer comes from a live atomic cell.
                unsafe { intrinsics::$intrinsic::<$t, $t, { SeqCst }>(cell.as_ptr(), value) }
            }
        };
    }
    fetch!(add_u32, atomic_xadd, AtomicU32, u32);
    fetch!(and_u64, atomic_and, AtomicU64, u64);
    fetch!(or_u64, atomic_or, AtomicU64, u64);
    fetch!(and_u32, atomic_and, AtomicU32, u32);
    fetch!(or_u32, atomic_or, AtomicU32, u32);

    #[inline(always)]
    pub(crate) fn swap_if(cell: &AtomicU32, old: u32, new: u32) -> bool {
        // SAFETY: the pointer comes from a live atomic cell.
        unsafe {
            intrinsics::atomic_cxchg::<u32, { SeqCst }, { SeqCst }>(cell.as_ptr(), old, new).1
        }
    }

    #[inline(always)]
    pub(crate) fn swap_if_u64(cell: &AtomicU64, old: u64, new: u64) -> bool {
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

/// Adds to a gauge that several CPUs count in; `u32::MAX` takes one off.
#[inline(always)]
pub(crate) fn gauge(cell: &AtomicU32, value: u32) {
    imp::add_u32(cell, value);
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

/// The same of 64 bits.
#[inline(always)]
pub(crate) fn swap_if_u64(cell: &AtomicU64, old: u64, new: u64) -> bool {
    imp::swap_if_u64(cell, old, new)
}

/// Keeps only these bits; what was there before.
#[inline(always)]
pub(crate) fn keep(cell: &AtomicU64, bits: u64) -> u64 {
    imp::and_u64(cell, bits)
}

/// Sets bits; what was there before.
#[inline(always)]
pub(crate) fn set(cell: &AtomicU64, bits: u64) -> u64 {
    imp::or_u64(cell, bits)
}

/// Keeps only these bits of a top word.
#[inline(always)]
pub(crate) fn keep_top(cell: &AtomicU32, bits: u32) {
    imp::and_u32(cell, bits);
}

/// Sets bits of a top word.
#[inline(always)]
pub(crate) fn set_top(cell: &AtomicU32, bits: u32) {
    imp::or_u32(cell, bits);
}
