//! Incremental internet checksums (RFC 1624, equation 3).

/// What a rewrite adds to a one's complement sum: new words minus old words.
///
/// Kept unfolded, so that steps chain without branches.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Delta(u64);

impl Delta {
    /// Nothing changed.
    pub const NONE: Self = Self(0);

    /// One 32-bit word, network order, becomes another.
    #[inline(always)]
    #[must_use]
    pub const fn word(self, old: u32, new: u32) -> Self {
        Self(self.0 + !old as u64 + new as u64)
    }

    /// One 16-bit word, network order, becomes another.
    #[inline(always)]
    #[must_use]
    pub const fn half(self, old: u16, new: u16) -> Self {
        Self(self.0 + !old as u64 + new as u64)
    }

    /// From a sum as [`Self::sum32`] gives it.
    #[inline(always)]
    #[must_use]
    pub const fn from_sum(sum: u32) -> Self {
        Self(sum as u64)
    }

    /// Both changes.
    #[inline(always)]
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// As the 32-bit sum that the kernel's checksum helpers take.
    #[inline(always)]
    pub const fn sum32(self) -> u32 {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        ((sum & 0xffff_ffff) + (sum >> 32)) as u32
    }

    /// The checksum field (complemented, as on the wire) after the change.
    #[inline(always)]
    pub const fn apply(self, field: u16) -> u16 {
        !fold(self.0 + !field as u64)
    }

    /// The field of a packet whose sum the device will finish: the folded pseudo-header sum, not complemented.
    #[inline(always)]
    pub const fn apply_partial(self, field: u16) -> u16 {
        fold(self.0 + field as u64)
    }
}

/// Folds a sum of words to 16 bits with end-around carry (RFC 1071 §2).
#[inline(always)]
pub const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// The sum of bytes as big-endian words in network order memory, unfolded; an odd last byte is padded with zero.
pub fn sum_bytes(bytes: &[u8]) -> u64 {
    let mut words = bytes.chunks_exact(2);
    let mut sum = 0;
    for word in &mut words {
        sum += u16::from_ne_bytes([word[0], word[1]]) as u64;
    }
    if let [last] = words.remainder() {
        sum += u16::from_ne_bytes([*last, 0]) as u64;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 1624 §4: header sum 0xdd2f, word 0x5555 becomes 0x3285, the new sum is 0x0000.
    #[test]
    fn example_of_the_rfc() {
        let delta = Delta::NONE.half(0x5555u16.to_be(), 0x3285u16.to_be());
        assert_eq!(delta.apply(0xdd2fu16.to_be()), 0x0000);
    }

    #[test]
    fn equals_full_recomputation() {
        let mut seed = 0x2545_f491_4f6c_dd1du64;
        let mut random = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        for _ in 0..10_000 {
            let mut data = [0u8; 24];
            for chunk in data.chunks_exact_mut(8) {
                chunk.copy_from_slice(&random().to_ne_bytes());
            }
            let field = !fold(sum_bytes(&data));
            let word = |data: &[u8; 24], at: usize| {
                u32::from_ne_bytes(data[at..at + 4].try_into().unwrap())
            };
            let half = |data: &[u8; 24], at: usize| {
                u16::from_ne_bytes(data[at..at + 2].try_into().unwrap())
            };
            let mut changed = data;
            changed[4..8].copy_from_slice(&(random() as u32).to_ne_bytes());
            changed[20..22].copy_from_slice(&(random() as u16).to_ne_bytes());
            let delta = Delta::NONE
                .word(word(&data, 4), word(&changed, 4))
                .half(half(&data, 20), half(&changed, 20));
            assert_eq!(delta.apply(field), !fold(sum_bytes(&changed)));
            assert_eq!(
                fold(delta.sum32() as u64 + !field as u64),
                fold(sum_bytes(&changed))
            );
            assert_eq!(
                delta.apply_partial(fold(sum_bytes(&data))),
                fold(sum_bytes(&changed))
            );
        }
    }
}
