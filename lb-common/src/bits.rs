//! Bit arithmetic that the BPF target has no instruction for.

/// The number of the lowest set bit; 64 for none.
///
/// The bits below it, counted in parallel: the BPF target can neither count bits nor find one, and a table would cost a
/// load.
#[inline(always)]
pub const fn lowest(bits: u64) -> u32 {
    ones(!bits & bits.wrapping_sub(1))
}

/// How many bits are set (Hacker's Delight, 5-1). Spelt out: the compiler's own count does not select on the BPF target.
#[inline(always)]
pub const fn ones(bits: u64) -> u32 {
    let bits = bits - ((bits >> 1) & 0x5555_5555_5555_5555);
    let bits = (bits & 0x3333_3333_3333_3333) + ((bits >> 2) & 0x3333_3333_3333_3333);
    let bits = (bits + (bits >> 4)) & 0x0f0f_0f0f_0f0f_0f0f;
    (bits.wrapping_mul(0x0101_0101_0101_0101) >> 56) as u32
}

#[cfg(test)]
mod tests {
    use super::lowest;

    #[test]
    fn finds_the_lowest_bit() {
        assert_eq!(lowest(0), 64);
        for place in 0..64 {
            assert_eq!(lowest(1 << place), place);
            assert_eq!(lowest(!0 << place), place);
        }
    }
}
