//! Taking and giving back ports, and the flow records that belong to them. Exact: a port is refused only when every one
//! of its pair is in use.
//!
//! Whoever clears a port's bit owns its record, and nobody else does. A port whose flow has ended rests: its record stays
//! for the last retransmissions, and it may be taken when no other is to be had. There the record's phase decides who
//! was first, as ever.

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    bits::lowest,
    pair::{self, CHUNK, Chunk, Mark, PLACES, SOURCE_PAIRS, slot},
    tcp::Phase,
};

use crate::{
    Tables, atomic, expire,
    marks::{self, NONE},
    opaque::{self, opaque},
};

/// How often a search is tried while other CPUs are faster, or marks are stale.
const TRIES: u32 = 6;
/// Records of a pair that a new flow looks at when it finds no port.
const PROBES: u32 = 8;
/// How often it does so for a client that is there without doubt.
const ROUNDS: u32 = 8;
/// Chunks that a new flow sweeps when it finds none.
const CHUNKS: u32 = 4;

/// Where a port may come from, the better first.
pub(crate) mod level {
    /// It has rested, or its chunk is bound just now.
    pub(crate) const RESTED: u32 = 0;
    /// It rests still.
    pub(crate) const RESTING: u32 = 1;
    /// Its flow has expired, or is half-open and old.
    pub(crate) const YIELDING: u32 = 2;
    /// The same, or half-open and young, for a client that is there without doubt.
    pub(crate) const CEDING: u32 = 3;
}

/// Answers of [`take`] that are no slot: every port is in use; there is no chunk; there is no pair; there would be one for
/// a client that shows that it is there.
pub(crate) const NO_PORT: u64 = 0;
pub(crate) const NO_CHUNK: u64 = 1;
pub(crate) const NO_PAIR: u64 = 2;
pub(crate) const CEDED: u64 = 3;

/// Slot and port in one word.
#[inline(always)]
const fn pack(slot: u32, port: u32) -> u64 {
    slot as u64 | (port as u64) << 32
}

/// Takes a port of a source, its pairs in turn: the slot of its claimed record in the low half, the port (host order) in
/// the high half. `last`: the last level that is tried, yielding or ceding.
#[inline(always)]
pub(crate) fn take<T: Tables>(tables: &T, number: u32, last: u32) -> u64 {
    let (Some(source), Some(allocation)) = (tables.source(number), tables.allocation()) else {
        return NO_PAIR;
    };
    let count = source.count;
    if count == 0 {
        return NO_PAIR;
    }
    let start = match count {
        1 => 0,
        _ => pair::first(atomic::draw(&allocation.turn), count),
    };
    for level in [level::RESTED, level::RESTING] {
        let got = tables.take_turn(number, start, level);
        if got != 0 {
            return got;
        }
    }
    let first = u32::from(source.pairs[opaque::index::<{ 2 * SOURCE_PAIRS }>(u64::from(start))]);
    let rounds = if last == level::CEDING { ROUNDS } else { 1 };
    for round in 0..ROUNDS {
        if round >= rounds {
            break;
        }
        let got = tables.take_port(first, last);
        if got != 0 {
            return got;
        }
    }
    // The record of a pair without a free port is worth nothing to another.
    let unbound = tables
        .pair(first)
        .is_some_and(|pair| pair.tops[Mark::Unbound as usize].load(Relaxed) != 0);
    match unbound {
        true => tables.take_swept(first),
        false => NO_PORT,
    }
}

/// Takes a port of one of a source's pairs, from the one whose turn it is on; 0 when none has any at this level.
#[inline(always)]
pub(crate) fn take_turn<T: Tables>(tables: &T, source: u32, start: u32, level: u32) -> u64 {
    let Some(source) = tables.source(source) else {
        return 0;
    };
    for step in 0..SOURCE_PAIRS as u32 {
        if step >= source.count {
            break;
        }
        let place = opaque::index::<{ 2 * SOURCE_PAIRS }>(u64::from(start + step));
        let got = tables.take_port(u32::from(source.pairs[place]), level);
        if got != 0 {
            return got;
        }
    }
    0
}

/// Sweeps a few chunks until a pair gets one; [`NO_CHUNK`] when none was empty.
#[inline(always)]
pub(crate) fn take_swept<T: Tables>(tables: &T, pair: u32) -> u64 {
    let Some(allocation) = tables.allocation() else {
        return NO_CHUNK;
    };
    for _ in 0..CHUNKS {
        let used = allocation.unused.load(Relaxed);
        let next = atomic::draw(&allocation.hand)
            .checked_rem(used)
            .unwrap_or(0)
            + 1;
        if tables.sweep_chunk(next) {
            let got = tables.take_port(pair, level::RESTED);
            if got != 0 {
                return got;
            }
        }
    }
    NO_CHUNK
}

/// Takes a port of one pair, from one level; 0 when it has none there.
#[inline(always)]
pub(crate) fn take_of<T: Tables>(tables: &T, number: u32, level: u32) -> u64 {
    let Some(pair) = tables.pair(number) else {
        return 0;
    };
    let kind = match level {
        level::RESTED => Mark::Free,
        level::RESTING => Mark::Resting,
        level => return expire::yielding(tables, pair, PROBES, level),
    };
    for _ in 0..TRIES {
        let got = tables.pick(number, kind);
        if got == 0 {
            break;
        }
        if got != AGAIN {
            return got;
        }
    }
    if level != level::RESTED {
        return 0;
    }
    for _ in 0..TRIES {
        let got = tables.bind(number);
        if got != AGAIN {
            return got;
        }
    }
    0
}

/// Another CPU was faster, or a mark was stale.
const AGAIN: u64 = 1;

/// Takes the next port that a pair's bitmaps name; 0 when there is none, or [`AGAIN`].
#[inline(always)]
pub(crate) fn pick<T: Tables>(tables: &T, number: u32, kind: Mark) -> u64 {
    let Some(pair) = tables.pair(number) else {
        return 0;
    };
    let resting = kind as u32 == Mark::Resting as u32;
    let cursor = pair.cursor.load(Relaxed);
    let place = marks::find(pair, kind, cursor / CHUNK);
    if place == NONE {
        return 0;
    }
    let bound = pair.chunks[opaque::index::<PLACES>(u64::from(place))].load(Relaxed);
    let Some(chunk) = tables.chunk(bound) else {
        return 0;
    };
    let leaf = if resting { &chunk.resting } else { &chunk.free };
    let all = leaf.load(Relaxed);
    if all == 0 || bound == 0 {
        tables.settle(number, kind, place, bound);
        return AGAIN;
    }
    let here = place == cursor / CHUNK;
    let ahead = all & (u64::MAX << if here { cursor % CHUNK } else { 0 });
    if ahead == 0 {
        pair.cursor.store((place + 1) * CHUNK, Relaxed);
        return AGAIN;
    }
    let at = lowest(opaque(ahead)) & (CHUNK - 1);
    let old = atomic::keep(leaf, !(1 << at));
    if old & 1 << at == 0 {
        return AGAIN;
    }
    if old == 1 << at {
        tables.settle(number, kind, place, bound);
    }
    let port = place * CHUNK + at;
    let slot = slot(bound, at as u16);
    // Between reading who the chunk belongs to and taking its bit it may have been bound elsewhere.
    if chunk.pair.load(Relaxed) != number || chunk.place.load(Relaxed) != place {
        tables.put_port(slot, kind);
        return AGAIN;
    }
    pair.cursor.store(port + 1, Relaxed);
    let Some(record) = tables.flow(slot) else {
        return 0;
    };
    if !resting {
        record.phase.store(Phase::Claimed as u32, Relaxed);
        return pack(slot, port);
    }
    // A flow that talks on keeps its record, and now its port too.
    if expire::retake(tables, record, slot) {
        return pack(slot, port);
    }
    AGAIN
}

/// Binds a chunk to a place of a pair, and takes its first port; 0 when there is none, or [`AGAIN`].
#[inline(always)]
pub(crate) fn bind<T: Tables>(tables: &T, number: u32) -> u64 {
    let Some(pair) = tables.pair(number) else {
        return 0;
    };
    let place = marks::find(pair, Mark::Unbound, 0);
    if place == NONE {
        return 0;
    }
    let usable = tables.usable(pair.ports.load(Relaxed), place);
    if usable == 0 {
        marks::unmark(pair, Mark::Unbound, place);
        return AGAIN;
    }
    if !marks::unmark(pair, Mark::Unbound, place) {
        return AGAIN;
    }
    let bound = fresh(tables);
    let (Some(chunk), true) = (tables.chunk(bound), bound != 0) else {
        marks::mark(pair, Mark::Unbound, place);
        return 0;
    };
    let at = lowest(opaque(usable)) & (CHUNK - 1);
    let slot = slot(bound, at as u16);
    if let Some(record) = tables.flow(slot) {
        record.phase.store(Phase::Claimed as u32, Relaxed);
    }
    chunk.place.store(place, Relaxed);
    chunk.resting.store(0, Relaxed);
    chunk.pair.store(number, Relaxed);
    pair.chunks[opaque::index::<PLACES>(u64::from(place))].store(bound, Relaxed);
    marks::mark(pair, Mark::Bound, place);
    // Nobody else adds to it before a port of it was taken.
    let rest = usable & !(1 << at);
    chunk.free.store(rest, Relaxed);
    if rest != 0 {
        marks::mark(pair, Mark::Free, place);
    }
    pack(slot, place * CHUNK + at)
}

/// A chunk that is bound to nobody; 0 when there is none.
#[inline(always)]
fn fresh<T: Tables>(tables: &T) -> u32 {
    if let Some(chunk) = tables.pop_chunk() {
        return chunk;
    }
    let (Some(config), Some(allocation)) = (tables.config(), tables.allocation()) else {
        return 0;
    };
    // Chunk 0 stays unused: it is what an empty entry leads to.
    if allocation.unused.load(Relaxed) + 1 >= config.chunks {
        return 0;
    }
    let chunk = atomic::draw(&allocation.unused) + 1;
    if chunk < config.chunks { chunk } else { 0 }
}

/// Takes a chunk without flows off its pair; false when it has one. `all` is what its free ports are when it has none.
#[inline(always)]
pub(crate) fn unbind<T: Tables>(tables: &T, number: u32, chunk: &Chunk, all: u64) -> bool {
    let place = chunk.place.load(Relaxed);
    let Some(pair) = tables.pair(chunk.pair.load(Relaxed)) else {
        return false;
    };
    // From here on every port of it is ours.
    if !atomic::swap_if_u64(&chunk.free, all, 0) {
        return false;
    }
    marks::unmark(pair, Mark::Free, place);
    marks::unmark(pair, Mark::Bound, place);
    pair.chunks[opaque::index::<PLACES>(u64::from(place))].store(0, Relaxed);
    chunk.pair.store(0, Relaxed);
    marks::mark(pair, Mark::Unbound, place);
    tables.push_chunk(number);
    true
}

/// A place whose word is zero loses its mark, unless the word fills meanwhile.
#[inline(always)]
pub(crate) fn settle<T: Tables>(tables: &T, number: u32, kind: Mark, place: u32, bound: u32) {
    let (Some(pair), Some(chunk)) = (tables.pair(number), tables.chunk(bound)) else {
        return;
    };
    marks::unmark(pair, kind, place);
    let leaf = if kind as u32 == Mark::Resting as u32 {
        &chunk.resting
    } else {
        &chunk.free
    };
    if bound != 0 && leaf.load(Relaxed) != 0 {
        marks::mark(pair, kind, place);
    }
}

/// Sets the bit of a port. `Free`: it has rested, anybody may have it, and the caller owns its record, which is free.
/// `Resting`: its flow has ended.
#[inline(always)]
pub(crate) fn put<T: Tables>(tables: &T, slot: u32, kind: Mark) {
    let Some(chunk) = tables.chunk(slot / CHUNK) else {
        return;
    };
    let place = chunk.place.load(Relaxed);
    let Some(pair) = tables.pair(chunk.pair.load(Relaxed)) else {
        return;
    };
    let bit = 1 << (slot % CHUNK);
    // A port that was excluded meanwhile stays unused.
    if tables.usable(pair.ports.load(Relaxed), place) & bit == 0 {
        return;
    }
    let leaf = if kind as u32 == Mark::Resting as u32 {
        &chunk.resting
    } else {
        &chunk.free
    };
    if atomic::set(leaf, bit) == 0 {
        marks::mark(pair, kind, place);
    }
}

/// A port no longer rests: its record was taken, or its flow talks on.
#[inline(always)]
pub(crate) fn unrest<T: Tables>(tables: &T, slot: u32) {
    let Some(chunk) = tables.chunk(slot / CHUNK) else {
        return;
    };
    let bit = 1 << (slot % CHUNK);
    if atomic::keep(&chunk.resting, !bit) == bit {
        let (number, place) = (chunk.pair.load(Relaxed), chunk.place.load(Relaxed));
        tables.settle(number, Mark::Resting, place, slot / CHUNK);
    }
}
