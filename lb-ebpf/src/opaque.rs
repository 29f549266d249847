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

/// An index below a power of two. What is one already is masked all the same, where the verifier sees it: before Linux 6.8
/// it knows nothing of numbers put together with `|`.
#[inline(always)]
pub(crate) fn index<const BELOW: usize>(place: u64) -> usize {
    const { assert!(BELOW.is_power_of_two()) };
    opaque(place) as usize & (BELOW - 1)
}

/// Makes bytes zeros, eight at a time. The optimiser would call the target's own `memset`, which takes one at a time.
#[inline(always)]
pub(crate) fn blank<const N: usize>(bytes: &mut [u8; N]) {
    const { assert!(N.is_multiple_of(8)) };
    for eight in bytes.as_chunks_mut::<8>().0 {
        *eight = opaque(0).to_ne_bytes();
    }
}

/// The host has no verifier to please.
#[cfg(not(target_arch = "bpf"))]
pub(crate) const fn opaque(value: u64) -> u64 {
    value
}
