//! Tables without chains and locks: a hash says the bucket, a bucket is a line of memory.

use crate::{
    addr::{Addr, MAPPED},
    atomic::AtomicU32,
    flow::FlowKey,
    map_record,
    service::Service,
};

/// Entries of a bucket.
pub const WAYS: usize = 16;

/// A bucket of 32-bit entries; 0 for none. Of flows: 8 bits of the hash, then the slot. Of pairs: 16 bits of the hash,
/// then the pair.
#[repr(C, align(64))]
#[derive(Debug, Default)]
pub struct Bucket {
    /// In no order.
    pub entries: [AtomicU32; WAYS],
}

/// Slots that an entry can name.
pub const MAX_SLOTS: u32 = 1 << 24;
/// Buckets of the table of pairs, of each generation.
pub const PAIR_BUCKETS: u32 = 1024;
/// Buckets of the table of virtual servers, of each generation.
pub const SERVICE_BUCKETS: u32 = 8192;
/// Virtual servers in a bucket.
pub const SERVICE_WAYS: usize = 4;

/// Words of [`FlowKey`] and one more: what [`Hash::of`] multiplies by.
pub const HASH_KEYS: usize = 10;

/// The hash of a flow's key: multilinear, so that nobody who does not know the random keys can aim at a bucket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hash(pub u64);

impl Hash {
    /// Two words of IPv4 addresses and the ports; of IPv6 six words more.
    #[inline(always)]
    pub const fn of(keys: &[u64; HASH_KEYS], key: &FlowKey) -> Self {
        let ports = key.sport as u64 | (key.dport as u64) << 16;
        let mut sum = keys[0]
            .wrapping_add(keys[1].wrapping_mul(ports))
            .wrapping_add(keys[2].wrapping_mul(key.src.0[3] as u64))
            .wrapping_add(keys[3].wrapping_mul(key.dst.0[3] as u64));
        if key.dst.0[2] != MAPPED {
            sum = sum
                .wrapping_add(keys[4].wrapping_mul(key.src.0[2] as u64))
                .wrapping_add(keys[5].wrapping_mul(key.dst.0[2] as u64))
                .wrapping_add(keys[6].wrapping_mul(key.src.0[1] as u64))
                .wrapping_add(keys[7].wrapping_mul(key.dst.0[1] as u64))
                .wrapping_add(keys[8].wrapping_mul(key.src.0[0] as u64))
                .wrapping_add(keys[9].wrapping_mul(key.dst.0[0] as u64));
        }
        Self(sum)
    }

    /// What a flow's entry says in its upper 8 bits. Never 0, which empty entries say.
    #[inline(always)]
    pub const fn tag(self) -> u32 {
        (self.0 >> 56) as u32 | 1
    }

    /// One of the two buckets a flow may be in; `mask` is their number less one.
    #[inline(always)]
    pub const fn bucket(self, choice: u32, mask: u32) -> u32 {
        let mixed = if choice == 0 {
            self.0
        } else {
            self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15)
        };
        (mixed >> 32) as u32 & mask
    }
}

/// Hashes what only the daemon puts into tables: it draws seeds until no bucket overflows.
#[inline(always)]
const fn mix(seed: u64, address: &Addr, more: u64) -> u64 {
    // A product's high bits depend on all lower ones, never the other way round: what differs most lies low.
    let high = address.0[1] as u64 | (address.0[0] as u64) << 32;
    let low = address.0[3] as u64 | (address.0[2] as u64) << 32;
    let sum = (low ^ high.wrapping_mul(0xff51_afd7_ed55_8ccd)).wrapping_add(more);
    (sum ^ sum >> 29).wrapping_mul(seed | 1)
}

/// The bucket of a virtual server.
#[inline(always)]
pub const fn service_bucket(seed: u64, epoch: u32, address: &Addr, port: u16) -> u32 {
    let hash = mix(
        seed,
        address,
        (port as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15),
    );
    (epoch & 1) * SERVICE_BUCKETS + ((hash >> 40) as u32 & (SERVICE_BUCKETS - 1))
}

/// Bucket and tag of a pair, by what its packets say when they arrive.
#[inline(always)]
pub const fn pair_bucket(
    seed: u64,
    epoch: u32,
    source: &Addr,
    member: &Addr,
    port: u16,
) -> (u32, u32) {
    let to = source.0[3] as u64 ^ (source.0[1] as u64) << 32 ^ (source.0[0] as u64) << 13;
    let more = to
        .wrapping_add((port as u64) << 40)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let hash = mix(seed, member, more);
    (
        (epoch & 1) * PAIR_BUCKETS + ((hash >> 32) as u32 & (PAIR_BUCKETS - 1)),
        // Never 0, which empty entries say.
        (hash >> 48) as u32 | 1,
    )
}

/// The entry of [`PAIR_BUCKETS`] that says "a member whose replies come with the client's address": look at the flow's
/// own key. Numbers of pairs end before it.
pub const BY_KEY: u32 = 0xffff;

map_record!(
    /// A virtual server in its table.
    ServiceEntry {
        /// The virtual address.
        address: Addr,
        /// Port, network order.
        port: u16,
        /// 1 when the entry is in use; entries are used from the first on.
        used: u16,
        /// What it is.
        service: Service,
    } size 32 align 4
);

map_record!(
    /// A bucket of virtual servers.
    ServiceBucket {
        /// From the first on.
        entries: [ServiceEntry; SERVICE_WAYS],
    } size 128 align 4
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_of_a_key_moves_it() {
        let keys = core::array::from_fn(|place| {
            0x9e37_79b9_7f4a_7c15u64.rotate_left(place as u32 * 7) | 1
        });
        let base = FlowKey {
            src: Addr([1, 2, 3, 4]),
            dst: Addr([5, 6, 7, 8]),
            sport: 9,
            dport: 10,
        };
        for word in 0..4 {
            for bit in 0..32 {
                let mut other = base;
                other.src.0[word] ^= 1 << bit;
                assert_ne!(Hash::of(&keys, &base), Hash::of(&keys, &other));
                let mut other = base;
                other.dst.0[word] ^= 1 << bit;
                assert_ne!(Hash::of(&keys, &base), Hash::of(&keys, &other));
            }
        }
    }
}
