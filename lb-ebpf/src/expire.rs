//! When flow records go back.
//!
//! Expiry needs no daemon: a new flow that finds no free record looks at a few old ones itself. While the daemon lives
//! it runs the sweep every second, so that records and ports come back early. Established flows are never given up for
//! new ones.

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    bits::lowest,
    event::Cause,
    flow::Flow,
    pair::{CHUNK, Mark, PLACES, Pair, slot},
    service::Config,
    shift,
    tcp::{Phase, tick},
};

use crate::{
    Tables, atomic, cookie,
    marks::{self, NONE},
    opaque::{self, opaque},
    ports, report,
};

/// Ticks without a packet after which a connection that has ended is told of: its last words may come twice.
const LAST_WORDS: u32 = 5;
/// Ticks that a half-open flow may idle while there are many: clients repeat their SYN after 1, 2, 4 and 8 seconds.
const EMBRYONIC_CROWD: u32 = 15;
/// A half-open flow younger than this many ticks is never taken for a new one.
const EMBRYONIC_GRACE: u32 = 3;

/// Looks at a few flows of a pair for one that may be given up at this level: slot and port of its claimed record, or 0,
/// or [`ports::CEDED`].
#[inline(always)]
pub(crate) fn yielding<T: Tables>(tables: &T, pair: &Pair, probes: u32, level: u32) -> u64 {
    let hand = pair.hand.load(Relaxed);
    let place = marks::find(pair, Mark::Bound, hand / CHUNK);
    if place == NONE {
        return 0;
    }
    let start = if place == hand / CHUNK {
        hand % CHUNK
    } else {
        0
    };
    pair.hand.store(place * CHUNK + start + probes, Relaxed);
    let bound = pair.chunks[opaque::index::<PLACES>(u64::from(place))].load(Relaxed);
    let Some(chunk) = tables.chunk(bound) else {
        return 0;
    };
    let idle = chunk.free.load(Relaxed) | chunk.resting.load(Relaxed);
    let mut came_to = ports::NO_PORT;
    for step in 0..probes {
        let at = (start + step) & (CHUNK - 1);
        if idle >> at & 1 != 0 || bound == 0 {
            continue;
        }
        let slot = slot(bound, at as u16);
        let given = tables.surrender(slot, level);
        if given == given::UP {
            return u64::from(slot) | u64::from(place * CHUNK + at) << 32;
        }
        // No branch: the verifier would walk the rest once for each.
        came_to |= u64::from(given);
    }
    came_to
}

/// What asking for a flow came to.
pub(crate) mod given {
    /// It is kept.
    pub(crate) const NOT: u32 = super::ports::NO_PORT as u32;
    /// Its claimed record is the caller's.
    pub(crate) const UP: u32 = 1;
    /// It is half-open, too young for a client that nobody has heard twice.
    pub(crate) const YOUNG: u32 = super::ports::CEDED as u32;
}

/// Gives up a flow if it may be given up for a new one: an expired one, and a half-open one. A client that has brought a
/// cookie back has shown that it is there, and most of those that are half-open in a flood never will.
#[inline(always)]
pub(crate) fn surrender<T: Tables>(tables: &T, slot: u32, level: u32) -> u32 {
    let (Some(config), Some(record)) = (tables.config(), tables.flow(slot)) else {
        return given::NOT;
    };
    let now = tables.now();
    let phase = Phase::from_u32(record.phase.load(Relaxed));
    if !expired(tables, config, record, phase, now) {
        let young = idle(record, now) < EMBRYONIC_GRACE;
        // Who waits for a member has brought one back, too.
        if phase != Phase::Syn || young && shift::waits(record.header.load(Relaxed)) {
            return given::NOT;
        }
        if young && level != ports::level::CEDING {
            return given::YOUNG;
        }
    }
    if !tables.release(slot, phase, Cause::Reclaimed) {
        return given::NOT;
    }
    tables.unrest(slot);
    given::UP
}

/// Takes back a flow whose first packet found no way out.
#[inline(always)]
pub(crate) fn withdraw<T: Tables>(tables: &T, slot: u32) {
    let Some(record) = tables.flow(slot) else {
        return;
    };
    if record.phase.load(Relaxed) != Phase::Syn as u32 || record.packets[0].load(Relaxed) != 0 {
        return;
    }
    // No connection, no line in the log.
    record.note_reported();
    if tables.release(slot, Phase::Syn, Cause::Reclaimed) {
        restore(tables, record, slot);
    }
}

/// Takes the record of a resting port, whose bit the caller has taken; false when its flow talks on.
#[inline(always)]
pub(crate) fn retake<T: Tables>(tables: &T, record: &Flow, slot: u32) -> bool {
    let phase = Phase::from_u32(record.phase.load(Relaxed));
    if phase.ended() {
        return tables.release(slot, phase, Cause::Reclaimed);
    }
    phase == Phase::Forgotten && atomic::swap_if(&record.phase, phase as u32, Phase::Claimed as u32)
}

/// Releases the expired flows of the next chunk.
#[inline(always)]
pub fn sweep<T: Tables>(tables: &T) {
    let Some(allocation) = tables.allocation() else {
        return;
    };
    let used = allocation.unused.load(Relaxed);
    if let Some(chunk) = atomic::draw(&allocation.sweep).checked_rem(used) {
        tables.sweep_chunk(chunk + 1);
    }
}

/// Releases the expired flows of a chunk, and takes it off its pair when it has none left: then true.
#[inline(always)]
pub(crate) fn sweep_chunk<T: Tables>(tables: &T, number: u32) -> bool {
    let Some(chunk) = tables.chunk(number) else {
        return false;
    };
    let Some(pair) = tables.pair(chunk.pair.load(Relaxed)) else {
        return false;
    };
    if chunk.pair.load(Relaxed) == 0 {
        return false;
    }
    let mut busy = !chunk.free.load(Relaxed);
    let mut live = 0;
    for _ in 0..CHUNK {
        if busy == 0 {
            break;
        }
        let at = lowest(opaque(busy)) & (CHUNK - 1);
        busy &= busy.wrapping_sub(1);
        live += u32::from(!tables.expire(slot(number, at as u16)));
    }
    let all = tables.usable(pair.ports.load(Relaxed), chunk.place.load(Relaxed));
    live == 0 && ports::unbind(tables, number, chunk, all)
}

/// Releases a flow when it has expired, and a port when it has rested; true when nothing is left there.
#[inline(always)]
pub(crate) fn end<T: Tables>(tables: &T, slot: u32) -> bool {
    let (Some(config), Some(record)) = (tables.config(), tables.flow(slot)) else {
        return true;
    };
    let now = tables.now();
    let phase = Phase::from_u32(record.phase.load(Relaxed));
    match phase {
        // One that is being taken clears its free bit, so its chunk is not empty.
        Phase::Free => return true,
        Phase::Forgotten => return rested(tables, config, record, slot, now),
        _ => {}
    }
    // Its port rests on, but nobody has to wait for the log line until then.
    if phase.ended() && !record.is_reported() && idle(record, now) > LAST_WORDS {
        record.note_reported();
        report::end(tables, slot, phase, Cause::Expired);
    }
    if !expired(tables, config, record, phase, now) || !tables.release(slot, phase, Cause::Expired)
    {
        return false;
    }
    restore(tables, record, slot);
    true
}

/// A port whose connection was forgotten rests as long as if it had not been.
#[inline(always)]
fn rested<T: Tables>(tables: &T, config: &Config, record: &Flow, slot: u32, now: u64) -> bool {
    let (forgotten, claimed) = (Phase::Forgotten as u32, Phase::Claimed as u32);
    if idle(record, now) <= config.idle_limit(Phase::Closing)
        || !atomic::swap_if(&record.phase, forgotten, claimed)
    {
        return false;
    }
    restore(tables, record, slot);
    true
}

/// Gives a claimed record back.
#[inline(always)]
pub(crate) fn restore<T: Tables>(tables: &T, record: &Flow, slot: u32) {
    tables.unrest(slot);
    record.phase.store(Phase::Free as u32, Relaxed);
    tables.put_port(slot, Mark::Free);
}

#[inline(always)]
fn expired<T: Tables>(tables: &T, config: &Config, record: &Flow, phase: Phase, now: u64) -> bool {
    let limit = config.idle_limit(phase);
    // A few first packets a second must not keep the others from having their own.
    let limit = match phase == Phase::Syn && cookie::is_near(tables, config) {
        true => limit.min(EMBRYONIC_CROWD),
        false => limit,
    };
    idle(record, now) > limit
}

/// Ticks since the last packet. Another CPU's clock may be a tick ahead: that is no idle time.
#[inline(always)]
fn idle(record: &Flow, now: u64) -> u32 {
    let idle = tick(now).wrapping_sub(record.last_seen.load(Relaxed));
    if idle > u32::MAX / 2 { 0 } else { idle }
}
