//! Atomic cells for both targets. Core's have no 32-bit cell for BPF, and its loads do not compile there.

#[cfg(not(target_arch = "bpf"))]
pub use core::sync::atomic::{AtomicU32, AtomicU64};

#[cfg(target_arch = "bpf")]
pub use bpf::{AtomicU32, AtomicU64};

#[cfg(target_arch = "bpf")]
#[expect(
    unsafe_code,
    reason = "interior mutability that core does not offer on this target"
)]
mod bpf {
    use core::{cell::UnsafeCell, sync::atomic::Ordering};

    macro_rules! cell {
        ($name:ident, $t:ty) => {
            /// A cell in a map, shared by CPUs.
            #[repr(transparent)]
            #[derive(Debug, Default)]
            pub struct $name(UnsafeCell<$t>);

            // SAFETY: aligned accesses of this width are single instructions on this target.
            unsafe impl Sync for $name {}

            impl $name {
                /// Reads it.
                #[inline(always)]
                pub fn load(&self, _: Ordering) -> $t {
                    // SAFETY: see `Sync`; volatile, since another CPU may write meanwhile.
                    unsafe { self.0.get().read_volatile() }
                }

                /// Writes it.
                #[inline(always)]
                pub fn store(&self, value: $t, _: Ordering) {
                    // SAFETY: see `Sync`; volatile, since another CPU may read meanwhile.
                    unsafe { self.0.get().write_volatile(value) }
                }

                /// Where it lies, for the atomic instructions.
                #[inline(always)]
                pub const fn as_ptr(&self) -> *mut $t {
                    self.0.get()
                }
            }
        };
    }
    cell!(AtomicU32, u32);
    cell!(AtomicU64, u64);
}
