//! Which member gets a new flow.

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{layout::POOL_MEMBERS, service::Pool};

use crate::{Tables, atomic};

/// The number of the chosen member; `None` when no member is up.
///
/// Every member gets a score, and the lowest wins: connections in the high half, then its distance from a starting place
/// that moves on with each choice, so that ties spread evenly, then its number. Round-robin is the same with nobody busy.
///
/// The score carries the number, so that nothing has to be looked up by the winner's place: an index that depends on
/// every step of the loop would make the verifier follow each combination of steps.
#[inline(always)]
pub(crate) fn member<T: Tables>(tables: &T, pool: &Pool) -> Option<u32> {
    let start = atomic::draw(tables.turn(pool.turn)?).checked_rem(pool.count)?;
    let mut best = u64::MAX;
    for place in 0..POOL_MEMBERS {
        let number = pool.members[place];
        if number == 0 {
            break;
        }
        if tables
            .member(u32::from(number))
            .is_none_or(|member| member.available == 0)
        {
            continue;
        }
        let Some(cell) = tables.member_cell(u32::from(number)) else {
            continue;
        };
        let busy = match pool.method {
            Pool::ROUND_ROBIN => 0,
            _ => cell.flows_active.load(Relaxed) + cell.sessions_active.load(Relaxed),
        };
        let distance = (place as u32).wrapping_sub(start) & (POOL_MEMBERS as u32 - 1);
        let score = busy << 32 | u64::from(distance) << 16 | u64::from(number);
        if score < best {
            best = score;
        }
    }
    (best != u64::MAX).then_some(best as u32 & 0xffff)
}
