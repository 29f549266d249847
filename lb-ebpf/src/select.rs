//! Which member gets a new flow.

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{layout::POOL_MEMBERS, service::Pool};

use crate::{Tables, opaque::opaque};

/// Set in the score of a member that is down.
const UNAVAILABLE: u64 = 1 << 62;
/// Connections that a score can tell apart.
const BUSIEST: u64 = (1 << 30) - 1;

/// The number of the chosen member of a pool, and its place in the upper half; 0 when none is up.
///
/// Every member gets a score, and the lowest wins: connections in the high half, then its distance from a starting place
/// that moves on with each choice, so that ties spread evenly, then its number. Round-robin is the same with nobody busy.
///
/// The score carries the number, so that nothing has to be looked up by the winner's place, and the lower of two is
/// taken without a branch: the verifier follows every combination of a loop's branches.
#[inline(always)]
pub(crate) fn member<T: Tables>(tables: &T, pool: u32) -> u32 {
    tables
        .pool(pool)
        .and_then(|pool| best(tables, pool, true))
        .unwrap_or(0)
}

/// The member that would be chosen now, and its place in the upper half.
#[inline(always)]
pub(crate) fn peek<T: Tables>(tables: &T, pool: u32) -> u32 {
    tables
        .pool(pool)
        .and_then(|pool| best(tables, pool, false))
        .unwrap_or(0)
}

#[inline(always)]
fn best<T: Tables>(tables: &T, pool: &Pool, takes: bool) -> Option<u32> {
    let turn = tables.turn(pool.turn)?;
    let start = turn.load(Relaxed).checked_rem(pool.count)?;
    let counts = match pool.method {
        Pool::ROUND_ROBIN => 0,
        _ => BUSIEST,
    };
    let mut best = UNAVAILABLE;
    for place in 0..POOL_MEMBERS {
        let number = u32::from(pool.members[place]);
        if number == 0 {
            break;
        }
        let busy = tables.busy(number);
        let distance = (place as u32).wrapping_sub(start) & (POOL_MEMBERS as u32 - 1);
        best = lower(
            best,
            busy & (counts << 32 | UNAVAILABLE) | u64::from(distance) << 16 | u64::from(number),
        );
    }
    if best >= UNAVAILABLE {
        return None;
    }
    let place = (start + (best >> 16) as u32) & (POOL_MEMBERS as u32 - 1);
    if takes {
        // The next turn begins behind the chosen one, so that a dead member's turns go to all the others.
        turn.store(place + 1, Relaxed);
    }
    Some(best as u32 & 0xffff | place << 16)
}

/// The connections of a member, in the high half of its score; [`UNAVAILABLE`] when it is down.
#[inline(always)]
pub(crate) fn busy<T: Tables>(tables: &T, number: u32) -> u64 {
    let (Some(member), Some(cell)) = (tables.member(number), tables.member_cell(number)) else {
        return UNAVAILABLE;
    };
    if member.available == 0 {
        return UNAVAILABLE;
    }
    let busy = cell.flows_active.load(Relaxed) + cell.sessions_active.load(Relaxed);
    (busy & BUSIEST) << 32
}

/// The lower of two numbers below 2^63.
#[inline(always)]
fn lower(one: u64, other: u64) -> u64 {
    let difference = other.wrapping_sub(one);
    // All ones when `other` is lower, else zero.
    let mask = ((opaque(difference) as i64) >> 63) as u64;
    one.wrapping_add(difference & opaque(mask))
}
