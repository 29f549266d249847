//! The table that leads a client's packet to its flow: two buckets of one cache line each, by a hash of the packet's key.
//!
//! An entry is put in and taken out by compare-and-swap, and says the slot; whether it is the right one the record says.

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    flow::{Flow, FlowKey, Route},
    index::{Bucket, Hash, WAYS},
    service::Config,
    tcp::{Direction, Phase},
};

use crate::{Tables, atomic};

/// A bucket that is filled beyond this shares new entries with the other one.
const HALF: u32 = 10;

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
        for place in 0..WAYS {
            let entry = bucket.entries[place].load(Relaxed);
            if entry >> 24 != hash.tag() {
                continue;
            }
            let slot = entry & 0x00ff_ffff;
            if let Some(flow) = tables.flow(slot)
                && live(flow)
                && matches(&flow.route, direction, key)
            {
                return slot;
            }
        }
    }
    0
}

#[inline(always)]
fn live(flow: &Flow) -> bool {
    let phase = flow.phase.load(Relaxed);
    phase != Phase::Free as u32 && phase != Phase::Claimed as u32
}

/// As [`Route::matches`], with what tells most flows apart first.
#[inline(always)]
pub(crate) fn matches(route: &Route, direction: Direction, key: &FlowKey) -> bool {
    let other = &route.leave[(direction as usize & 1) ^ 1];
    other.dst.0[3] == key.src.0[3]
        && other.dport == key.sport
        && other.sport == key.dport
        && other.src.0[3] == key.dst.0[3]
        && other.src.0[2] == key.dst.0[2]
        && other.src.0[1] == key.dst.0[1]
        && other.src.0[0] == key.dst.0[0]
        && other.dst.0[2] == key.src.0[2]
        && other.dst.0[1] == key.src.0[1]
        && other.dst.0[0] == key.src.0[0]
}

/// What an attempt to enter a flow came to.
pub(crate) mod entered {
    /// It is in the table.
    pub(crate) const DONE: u32 = 0;
    /// Both buckets are full.
    pub(crate) const FULL: u32 = 1;
    /// The same connection is there already.
    pub(crate) const TWICE: u32 = 2;
}

/// Enters a claimed, filled record under one of its keys.
///
/// Of two CPUs that do it for the same connection at most one succeeds: each looks for the other after it has entered its
/// own, so the later one sees the earlier. If both see each other both give up, and the client sends its SYN again.
#[inline(always)]
pub(crate) fn enter<T: Tables>(tables: &T, slot: u32, direction: Direction) -> u32 {
    let (Some(config), Some(flow)) = (tables.config(), tables.flow(slot)) else {
        return entered::FULL;
    };
    let key = flow.route.key(direction);
    let hash = Hash::of(&config.hash, &key);
    let entry = hash.tag() << 24 | slot;
    let (first, second) = (
        hash.bucket(0, config.flow_mask),
        hash.bucket(1, config.flow_mask),
    );
    let (Some(one), Some(other)) = (tables.flow_bucket(first), tables.flow_bucket(second)) else {
        return entered::FULL;
    };
    let used = fill(one);
    let into = match used > HALF && fill(other) < used {
        true => other,
        false => one,
    };
    if !put(into, entry) {
        return entered::FULL;
    }
    for choice in 0..2 {
        let bucket = if choice == 0 { one } else { other };
        for place in 0..WAYS {
            let found = bucket.entries[place].load(Relaxed);
            if found >> 24 != hash.tag() || found == entry {
                continue;
            }
            if let Some(rival) = tables.flow(found & 0x00ff_ffff)
                && rival.phase.load(Relaxed) != Phase::Free as u32
                && matches(&rival.route, direction, &key)
            {
                clear(into, entry);
                return entered::TWICE;
            }
        }
    }
    entered::DONE
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
        if let Some(bucket) = tables.flow_bucket(hash.bucket(choice, config.flow_mask))
            && clear(bucket, entry)
        {
            return;
        }
    }
}

#[inline(always)]
fn fill(bucket: &Bucket) -> u32 {
    let mut used = 0;
    for place in 0..WAYS {
        used += u32::from(bucket.entries[place].load(Relaxed) != 0);
    }
    used
}

#[inline(always)]
fn put(bucket: &Bucket, entry: u32) -> bool {
    for place in 0..WAYS {
        let cell = &bucket.entries[place];
        if cell.load(Relaxed) == 0 && atomic::swap_if(cell, 0, entry) {
            return true;
        }
    }
    false
}

#[inline(always)]
fn clear(bucket: &Bucket, entry: u32) -> bool {
    for place in 0..WAYS {
        let cell = &bucket.entries[place];
        if cell.load(Relaxed) == entry {
            return atomic::swap_if(cell, entry, 0);
        }
    }
    false
}
