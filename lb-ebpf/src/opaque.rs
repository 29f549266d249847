//! A wall between the optimiser and the verifier.

/// The same value, of which the optimiser knows nothing: what it cannot see it cannot turn into a branch, or compute a
/// second time in another way.
#[cfg(target_arch = "bpf")]
#[inline(always)]
#[expect(unsafe_code, reason = "an instruction as optimisation barrier")]
pub(crate) fn opaque(mut value: u64) -> u64 {
    // SAFETY: a register copied to itself; an empty template would leave line information without an instruction.
    unsafe {
        core::arch::asm!("{0} = {0}", inout(reg) value, options(pure, nomem, nostack, preserves_flags))
    };
    value
}

/// The host has no verifier to please.
#[cfg(not(target_arch = "bpf"))]
pub(crate) const fn opaque(value: u64) -> u64 {
    value
}
