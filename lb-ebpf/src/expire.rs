//! Where flow records come from and when they go back.
//!
//! Expiry needs no daemon: a new flow that finds no free record looks at a few old ones itself. While the daemon lives
//! it runs the sweep every second, so that records and ports come back early.

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    event::Cause,
    flow::Flow,
    layout::SWEEP,
    service::Config,
    tcp::{Phase, tick},
};

use crate::{Tables, atomic};

/// Records that a new flow looks at when none is free.
const PROBES: u32 = 8;
/// A half-open flow younger than this many ticks is never taken for a new one.
const EMBRYONIC_GRACE: u32 = 3;

/// Claims a record for a new flow; its phase is `Claimed` afterwards. 0 when none is to be had.
///
/// Free records first, then never used ones, then expired ones, then half-open ones: an established flow is never
/// given up for a new one.
#[inline(always)]
pub(crate) fn claim<T: Tables>(tables: &T, now: u64) -> u32 {
    tables
        .config()
        .and_then(|config| free(tables, config, now))
        .unwrap_or(0)
}

#[inline(always)]
fn free<T: Tables>(tables: &T, config: &Config, now: u64) -> Option<u32> {
    if let Some(slot) = tables.pop_free() {
        let flow = tables.flow(slot)?;
        flow.phase.store(Phase::Claimed as u32, Relaxed);
        return Some(slot);
    }
    let allocation = tables.allocation()?;
    if allocation.unused.load(Relaxed) < config.flows {
        // Slot 0 stays unused: it is what an empty record would lead to.
        let slot = atomic::draw(&allocation.unused) + 1;
        if slot < config.flows {
            let flow = tables.flow(slot)?;
            flow.phase.store(Phase::Claimed as u32, Relaxed);
            return Some(slot);
        }
    }
    for _ in 0..PROBES {
        let slot = atomic::draw(&allocation.hand).checked_rem(config.flows)?;
        let Some(record) = tables.flow(slot) else {
            continue;
        };
        let phase = Phase::from_u32(record.phase.load(Relaxed));
        if slot != 0
            && makes_room(record, phase, now)
            && tables.release(slot, phase, Cause::Reclaimed)
        {
            return Some(slot);
        }
    }
    None
}

/// Gives up a flow that stands in the way of a new one, if it may be; true when its keys are gone.
#[inline(always)]
pub(crate) fn reclaim<T: Tables>(tables: &T, slot: u32) -> bool {
    let Some(record) = tables.flow(slot) else {
        return false;
    };
    let phase = Phase::from_u32(record.phase.load(Relaxed));
    if !makes_room(record, phase, tables.now()) || !tables.release(slot, phase, Cause::Reclaimed) {
        return false;
    }
    record.phase.store(Phase::Free as u32, Relaxed);
    tables.push_free(slot);
    true
}

/// May a flow be given up for a new one? An expired one, and a half-open one that is not young.
#[inline(always)]
fn makes_room(record: &Flow, phase: Phase, now: u64) -> bool {
    let embryonic = phase == Phase::Syn && idle(record, now) >= EMBRYONIC_GRACE;
    embryonic || expired(record, phase, now)
}

/// Releases expired flows among the next [`SWEEP`] records.
#[inline(always)]
pub fn sweep<T: Tables>(tables: &T) {
    let (Some(config), Some(allocation)) = (tables.config(), tables.allocation()) else {
        return;
    };
    let now = tables.now();
    let used = (allocation.unused.load(Relaxed) + 1).min(config.flows);
    for _ in 0..SWEEP {
        let Some(slot) = atomic::draw(&allocation.sweep).checked_rem(used) else {
            return;
        };
        let Some(record) = tables.flow(slot) else {
            continue;
        };
        let phase = Phase::from_u32(record.phase.load(Relaxed));
        if slot != 0 && expired(record, phase, now) && tables.release(slot, phase, Cause::Expired) {
            record.phase.store(Phase::Free as u32, Relaxed);
            tables.push_free(slot);
        }
    }
}

#[inline(always)]
fn expired(record: &Flow, phase: Phase, now: u64) -> bool {
    idle(record, now) > phase.idle_limit()
}

/// Ticks since the last packet. Another CPU's clock may be a tick ahead: that is no idle time.
#[inline(always)]
fn idle(record: &Flow, now: u64) -> u32 {
    let idle = tick(now).wrapping_sub(record.last_seen.load(Relaxed));
    if idle > u32::MAX / 2 { 0 } else { idle }
}
