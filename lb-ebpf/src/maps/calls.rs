//! Functions of their own for the verifier (Linux 5.6): each is walked once, whatever comes before and after its calls.
#![expect(unsafe_code, reason = "their names are symbols; map access")]

use lb_common::{
    addr::Addr,
    cookie,
    event::Cause,
    flow::FlowKey,
    pair::Mark,
    tcp::{Direction, Flags, Phase},
};

use super::{DEEP, KEY, KernelTables, workspace};
use crate::{
    expire,
    flow::{self, Note},
    index, ports, select, shift,
    tables::Tables as _,
};

#[inline(always)]
const fn direction(number: u32) -> Direction {
    match number & 1 {
        0 => Direction::Forward,
        _ => Direction::Reverse,
    }
}

/// What a port becomes.
#[inline(always)]
const fn kind(number: u32) -> Mark {
    match number {
        2 => Mark::Resting,
        _ => Mark::Free,
    }
}

macro_rules! functions {
    ($($name:ident($($argument:ident),*) -> $result:ty = $body:expr;)*) => { $(
        /// A function of its own for the verifier (Linux 5.6).
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $name($($argument: u32),*) -> $result {
            $body
        }
    )* };
}

functions! {
    look_up_v4(source, destination, ports) -> u64 = {
        let key = FlowKey {
            src: Addr::v4(source),
            dst: Addr::v4(destination),
            sport: ports as u16,
            dport: (ports >> 16) as u16,
        };
        flow::look_up(&KernelTables, &key)
    };
    look_up_v6() -> u64 = match KEY.get_ptr(0) {
        // SAFETY: the record is this CPU's own, and was written just now.
        Some(key) => flow::look_up(&KernelTables, unsafe { &*key }),
        None => 0,
    };
    bake_cookie(sequence, class) -> u32 = match (KernelTables.config(), DEEP.get_ptr(0)) {
        (Some(config), Some(deep)) => {
            // SAFETY: the record is this CPU's own, and was written just now.
            let key = unsafe { &(*deep).packet.key };
            cookie::bake(&config.cookie, key, sequence, class, KernelTables.now())
        }
        _ => 0,
    };
    check_cookie(sequence, brought) -> u32 = match (KernelTables.config(), DEEP.get_ptr(0)) {
        (Some(config), Some(deep)) => {
            // SAFETY: as above.
            let key = unsafe { &(*deep).packet.key };
            cookie::check(&config.cookie, key, sequence, brought, KernelTables.now())
        }
        _ => cookie::NONE,
    };
    select_member(pool) -> u32 = select::member(&KernelTables, pool);
    peek_member(pool) -> u32 = select::peek(&KernelTables, pool);
    busy_member(member) -> u64 = select::busy(&KernelTables, member);
    take_port(source, last) -> u64 = ports::take(&KernelTables, source, last);
    take_port_in_turn(source, start, level) -> u64 =
        ports::take_turn(&KernelTables, source, start, level);
    take_swept_port(pair) -> u64 = ports::take_swept(&KernelTables, pair);
    take_port_of(pair, level) -> u64 = ports::take_of(&KernelTables, pair, level);
    surrender_flow(slot, level) -> u32 = expire::surrender(&KernelTables, slot, level);
    withdraw_flow(slot) -> u32 = {
        expire::withdraw(&KernelTables, slot);
        0
    };
    sweep_chunk(chunk) -> u32 = u32::from(expire::sweep_chunk(&KernelTables, chunk));
    enter_flow(slot, side) -> u32 =
        u32::from(index::enter(&KernelTables, slot, direction(side)));
    leave_flow(slot, side) -> u32 = {
        index::leave(&KernelTables, slot, direction(side));
        0
    };
    fill_flow(slot, port, owners, snat) -> u32 =
        flow::fill(&KernelTables, u64::from(slot) | u64::from(port) << 32, owners, snat);
    forget_flow(slot) -> u32 = u32::from(flow::forget(&KernelTables, slot));
    forget_last_flow() -> u32 = {
        if let Some(deep) = DEEP.get_ptr(0) {
            // SAFETY: as above.
            flow::forget_last(&KernelTables, unsafe { &(*deep).packet.key });
        }
        0
    };
    put_port(slot, mark) -> u32 = {
        ports::put(&KernelTables, slot, kind(mark));
        0
    };
    unrest_port(slot) -> u32 = {
        ports::unrest(&KernelTables, slot);
        0
    };
    settle_place(pair, mark, place, chunk) -> u32 = {
        ports::settle(&KernelTables, pair, kind(mark), place, chunk);
        0
    };
    pick_port(pair, mark) -> u64 = ports::pick(&KernelTables, pair, kind(mark));
    bind_chunk(pair) -> u64 = ports::bind(&KernelTables, pair);
    expire_flow(slot) -> u32 = u32::from(expire::end(&KernelTables, slot));
    end_flow(slot, created, member, cause) -> u32 = {
        let cause = Cause::from_u8(cause as u8);
        u32::from(flow::end(&KernelTables, slot, created, member, cause))
    };
    put_entry(bucket, entry) -> u32 = u32::from(index::put(&KernelTables, bucket, entry));
    clear_entry(bucket, entry) -> u32 = {
        index::clear(&KernelTables, bucket, entry);
        0
    };
    find_rival(slot, side) -> u32 =
        u32::from(index::rival(&KernelTables, slot, direction(side)));
    same_ends(one, other) -> u32 = u32::from(index::same(&KernelTables, one, other));
    bucket_room(bucket) -> u32 = index::room(&KernelTables, bucket);
    release_flow(slot, phase, cause) -> u32 = {
        let (phase, cause) = (Phase::from_u32(phase), Cause::from_u8(cause as u8));
        u32::from(flow::release(&KernelTables, slot, phase, cause))
    };
    track_flow(slot, way, next, acknowledgement, length) -> u32 = {
        // `way` is the direction, the flags in the second byte, and whether there is payload in the third.
        let note = Note {
            way: (direction(way), Flags((way >> 8) as u8)),
            next,
            acknowledgement,
            length,
            data: way >> 16 != 0,
        };
        flow::track(&KernelTables, slot, &note);
        0
    };
}

/// A function of its own for the verifier (Linux 5.6).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn edit_options(length: u32, what: u32, by: u32) -> u32 {
    match workspace() {
        Some(workspace) => shift::options::edit(workspace, length, what, by),
        None => 0,
    }
}

/// A function of its own for the verifier (Linux 5.6).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn decide_shift(slot: u32, came: u32) -> u32 {
    let (Some(workspace), Some(flow), Some(deep)) =
        (workspace(), KernelTables.flow(slot), DEEP.get_ptr(0))
    else {
        return 0;
    };
    // SAFETY: the record is this CPU's own, and was written just now.
    let packet = unsafe { &(*deep).packet };
    let now = KernelTables.now();
    u32::from(shift::decide(workspace, flow, packet, direction(came), now))
}

/// A function of its own for the verifier (Linux 5.6).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn segment_size(length: u32) -> u32 {
    workspace().map_or(0, |workspace| {
        shift::options::segment_size(workspace, length)
    })
}

/// A function of its own for the verifier (Linux 5.6).
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn build_segment(slot: u32) -> u32 {
    match (workspace(), KernelTables.flow(slot)) {
        (Some(workspace), Some(flow)) => shift::segment::build(workspace, flow),
        _ => 0,
    }
}
