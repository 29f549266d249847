//! The table that leads a client's packet to its flow: two buckets of one cache line each, by a hash of the packet's key.
//!
//! An entry is put in and taken out by compare-and-swap, and says the slot; whether it is the right one the record says.

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    bits::lowest,
    flow::{FlowKey, Route},
    index::{Bucket, Hash, WAYS},
    service::Config,
    tcp::{Direction, Phase},
};

use crate::{
    Tables, atomic,
    opaque::{self, opaque},
};

/// A bucket that is filled beyond this shares new entries with the other one.
const HALF: u32 = 10;
/// Entries of a bucket that may have the same tag: so many are looked at.
const TWINS: u32 = 3;
/// How often a vacancy is tried while other CPUs are faster.
const TRIES: u32 = 4;

/// The slot of the flow that packets with this key belong to; 0 for none.
#[inline(always)]
pub(crate) fn find<T: Tables>(
    tables: &T,
    config: &Config,
    key: &FlowKey,
    direction: Direction,
) -> u32 {
    let hash = Hash::of(&config.hash, key);
    for choice in 0..2 {
        let Some(bucket) = tables.flow_bucket(hash.bucket(choice, config.flow_mask)) else {
            return 0;
        };
        let mut twins = tagged(bucket, hash.tag());
        for _ in 0..TWINS {
            if twins == 0 {
                break;
            }
            let slot = entry(bucket, twins) & 0x00ff_ffff;
            twins &= twins - 1;
            if let Some(flow) = tables.flow(slot)
                && Phase::is_live(flow.phase.load(Relaxed))
                && matches(&flow.route, direction, key)
            {
                return slot;
            }
        }
    }
    0
}

/// As [`Route::matches`], with what tells most flows apart first.
#[inline(always)]
pub(crate) fn matches(route: &Route, direction: Direction, key: &FlowKey) -> bool {
    let other = &route.leave[(direction as usize & 1) ^ 1];
    // One chain of differences: the verifier would follow every branch of a comparison.
    let ports = u32::from(other.dport ^ key.sport) | u32::from(other.sport ^ key.dport);
    let mut different = ports;
    for word in 0..4 {
        different |= other.dst.0[word] ^ key.src.0[word];
        different |= other.src.0[word] ^ key.dst.0[word];
    }
    opaque(u64::from(different)) == 0
}

/// Enters a claimed, filled record under one of its keys; false when there is no room.
///
/// Of two CPUs that do it for the same connection at most one goes on: each looks for a [`rival`] after it has entered its
/// own, so the later one sees the earlier. If both see each other both give up, and the client sends its SYN again.
#[inline(always)]
pub(crate) fn enter<T: Tables>(tables: &T, slot: u32, direction: Direction) -> bool {
    let (Some(config), Some(flow)) = (tables.config(), tables.flow(slot)) else {
        return false;
    };
    let hash = Hash::of(&config.hash, &flow.route.key(direction));
    let entry = hash.tag() << 24 | slot;
    let (first, second) = (
        hash.bucket(0, config.flow_mask),
        hash.bucket(1, config.flow_mask),
    );
    let room = tables.room(first);
    let (better, other) = match room < WAYS as u32 - HALF && tables.room(second) > room {
        true => (second, first),
        false => (first, second),
    };
    tables.put(better, entry) || tables.put(other, entry)
}

/// How many entries a bucket has room for.
#[inline(always)]
pub(crate) fn room<T: Tables>(tables: &T, bucket: u32) -> u32 {
    tables
        .flow_bucket(bucket)
        .map_or(0, |bucket| count(equal(bucket, 0, 0)))
}

/// Puts an entry into a bucket; false when it is full, or has too many of the same tag.
#[inline(always)]
pub(crate) fn put<T: Tables>(tables: &T, bucket: u32, entry: u32) -> bool {
    let Some(bucket) = tables.flow_bucket(bucket) else {
        return false;
    };
    if count(tagged(bucket, entry >> 24)) >= TWINS {
        return false;
    }
    let mut vacant = equal(bucket, 0, 0);
    for _ in 0..TRIES {
        if vacant == 0 {
            return false;
        }
        if atomic::swap_if(&bucket.entries[place(vacant)], 0, entry) {
            return true;
        }
        vacant &= vacant - 1;
    }
    false
}

/// Is another record of the same connection entered?
#[inline(always)]
pub(crate) fn rival<T: Tables>(tables: &T, slot: u32, direction: Direction) -> bool {
    let (Some(config), Some(flow)) = (tables.config(), tables.flow(slot)) else {
        return false;
    };
    let hash = Hash::of(&config.hash, &flow.route.key(direction));
    for choice in 0..2 {
        let Some(bucket) = tables.flow_bucket(hash.bucket(choice, config.flow_mask)) else {
            return false;
        };
        let mut twins = tagged(bucket, hash.tag());
        for _ in 0..TWINS {
            if twins == 0 {
                break;
            }
            let other = entry(bucket, twins) & 0x00ff_ffff;
            twins &= twins - 1;
            // An ended one makes room: a client may use its port again.
            if other != slot && tables.same(slot, other) && !tables.forget(other) {
                return true;
            }
        }
    }
    false
}

/// Do two records, neither of them free, carry connections between the same ends? Of flows with one client and virtual
/// server that is the same question as with one client and member.
#[inline(always)]
pub(crate) fn same<T: Tables>(tables: &T, one: u32, other: u32) -> bool {
    let (Some(one), Some(other)) = (tables.flow(one), tables.flow(other)) else {
        return false;
    };
    let phase = other.phase.load(Relaxed);
    (phase == Phase::Claimed as u32 || Phase::is_live(phase))
        && (equal_keys(&one.route.leave[1], &other.route.leave[1])
            || equal_keys(&one.route.leave[0], &other.route.leave[0]))
}

#[inline(always)]
fn equal_keys(one: &FlowKey, other: &FlowKey) -> bool {
    let mut different = u32::from(one.sport ^ other.sport) | u32::from(one.dport ^ other.dport);
    for word in 0..4 {
        different |= one.src.0[word] ^ other.src.0[word];
        different |= one.dst.0[word] ^ other.dst.0[word];
    }
    opaque(u64::from(different)) == 0
}

/// Takes a flow's entry out.
#[inline(always)]
pub(crate) fn leave<T: Tables>(tables: &T, slot: u32, direction: Direction) {
    let (Some(config), Some(flow)) = (tables.config(), tables.flow(slot)) else {
        return;
    };
    let hash = Hash::of(&config.hash, &flow.route.key(direction));
    let entry = hash.tag() << 24 | slot;
    for choice in 0..2 {
        tables.clear(hash.bucket(choice, config.flow_mask), entry);
    }
}

/// Takes an entry out of a bucket, if it is there.
#[inline(always)]
pub(crate) fn clear<T: Tables>(tables: &T, bucket: u32, entry: u32) {
    let Some(bucket) = tables.flow_bucket(bucket) else {
        return;
    };
    let found = equal(bucket, 0, entry);
    if found != 0 {
        atomic::swap_if(&bucket.entries[place(found)], entry, 0);
    }
}

/// The first entry of a bucket that a mask names.
#[inline(always)]
pub(crate) fn entry(bucket: &Bucket, mask: u64) -> u32 {
    bucket.entries[place(mask)].load(Relaxed)
}

/// The place of the first entry that a mask names.
#[inline(always)]
fn place(mask: u64) -> usize {
    let bit = lowest(opaque(mask));
    opaque::index::<WAYS>(u64::from(bit << 1 | bit >> 5))
}

/// Which entries have a tag, as a mask.
#[inline(always)]
fn tagged(bucket: &Bucket, tag: u32) -> u64 {
    equal(bucket, 24, tag)
}

/// Which entries, shifted, equal a value, as a mask: a bit each, those at even places in its low half, the others in its
/// high half. Two at a time and without a branch: the verifier would follow every combination.
#[inline(always)]
pub(crate) fn equal(bucket: &Bucket, shift: u32, value: u32) -> u64 {
    const BOTH: u64 = 1 << 32 | 1;
    const LOW: u64 = (u32::MAX >> 1) as u64 * BOTH;
    let kept = u64::from(u32::MAX >> shift) * BOTH;
    let value = u64::from(value) * BOTH;
    let mut different = 0;
    for pair in 0..WAYS / 2 {
        let difference = (atomic::two(bucket, pair) >> shift & kept) ^ value;
        // The highest bit of a half is set unless all of it is zero.
        let high = match shift {
            0 => ((difference & LOW) + LOW) | difference,
            _ => difference + LOW,
        };
        different |= (high & !LOW) >> (31 - pair);
    }
    !different & (0xff * BOTH)
}

#[inline(always)]
fn count(mask: u64) -> u32 {
    lb_common::bits::ones(opaque(mask))
}

#[cfg(test)]
mod tests {
    use lb_common::atomic::AtomicU32;

    use super::*;

    #[test]
    fn every_place_is_found_and_no_other() {
        let values = [
            0,
            1,
            0x7fff_ffff,
            0x8000_0000,
            u32::MAX,
            0x0100_0000,
            0xff00_0001,
        ];
        for at in 0..WAYS {
            for (here, others) in values.into_iter().zip(values.into_iter().skip(1)) {
                let bucket = Bucket {
                    entries: std::array::from_fn(|place| {
                        AtomicU32::new(if place == at { here } else { others })
                    }),
                };
                for shift in [0, 16, 24] {
                    let mask = equal(&bucket, shift, here >> shift);
                    assert_ne!(mask, 0);
                    if here >> shift != others >> shift {
                        assert_eq!(
                            count(mask),
                            1,
                            "{here:x} at {at} among {others:x} >> {shift}"
                        );
                        assert_eq!(place(mask), at);
                        assert_eq!(count(equal(&bucket, shift, others >> shift)), 15);
                    }
                }
            }
        }
    }
}
