//! Where flow records and SNAT ports are one: pairs, the chunks bound to them, and their bitmaps.
//!
//! A *pair* is a SNAT address and a member's address and port: every port of the SNAT address can carry one flow to that
//! member. A *chunk* is 64 flow records in a row; bound to a pair and a *place* it holds the flows of the 64 ports from
//! `place * 64` on. So a port says which record, and no reply has to be looked up by a hash of its flow.

use crate::{
    addr::Addr,
    atomic::{AtomicU32, AtomicU64},
    index::MAX_SLOTS,
    map_record,
};

/// Flow records in a chunk: one word of a bitmap.
pub const CHUNK: u32 = 64;
/// Places of a pair: all 65,536 ports.
pub const PLACES: usize = 1024;
/// Words with a bit for each place.
pub const WORDS: usize = PLACES / 64;
/// Pairs; number 0 means "none".
pub const MAX_PAIRS: u32 = 4096;
/// Sets of usable ports; number 0 is empty.
pub const MAX_PORT_SETS: u32 = 256;
/// Addresses of one SNAT pool and family.
pub const SOURCE_PAIRS: usize = 32;
/// Sources of one generation. Number 0 means "none".
pub const MAX_SOURCES: u32 = 4096;

/// Chunks for so many flows, and one more that stays unused.
pub const fn chunks_for(flows: u32) -> u32 {
    let most = MAX_SLOTS - CHUNK;
    (if flows < most { flows } else { most }).div_ceil(CHUNK) + 1
}

/// Pairs that fit beside so many flows, number 0 included.
pub const fn pairs_for(flows: u32) -> u32 {
    match chunks_for(flows) {
        ..64 => 64,
        MAX_PAIRS.. => MAX_PAIRS,
        chunks => chunks,
    }
}

/// What a bit of a pair says of a place.
#[repr(usize)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mark {
    /// Its chunk has a port that nobody uses and that has rested.
    Free = 0,
    /// It has usable ports and no chunk yet.
    Unbound = 1,
    /// Its chunk has a port whose flow has ended, but which rests still.
    Resting = 2,
    /// It has a chunk.
    Bound = 3,
}

/// How many marks there are.
pub const MARKS: usize = 4;

/// A SNAT address towards a member's address and port, and which records hold its flows.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Pair {
    /// The SNAT address; unset where the client's address stays and the pair lends records only.
    pub source: Addr,
    /// The member's address; unset for an unused pair, and where `source` is.
    pub member: Addr,
    /// The member's port, network order.
    pub port: u16,
    /// 1 when the pair is in use.
    pub known: u16,
    /// Its set of usable ports.
    pub ports: AtomicU32,
    /// The port where the search for one goes on.
    pub cursor: AtomicU32,
    /// Where the search for a flow that may be given up goes on; as the cursor, a port.
    pub hand: AtomicU32,
    /// By [`Mark`]: which of the words below are not zero.
    pub tops: [AtomicU32; MARKS],
    /// By [`Mark`]: which places have it.
    pub words: [[AtomicU64; WORDS]; MARKS],
    /// By place: the chunk bound to it; 0 for none.
    pub chunks: [AtomicU32; PLACES],
}

const _: () = assert!(
    size_of::<Pair>() == 4672,
    "Pair: layout changed, bump ABI_VERSION"
);

/// A chunk: who it belongs to, and what its ports do. A port that is neither free nor resting carries a flow.
#[repr(C, align(32))]
#[derive(Debug, Default)]
pub struct Chunk {
    /// The pair it is bound to; 0 for none.
    pub pair: AtomicU32,
    /// Where in that pair.
    pub place: AtomicU32,
    /// Ports that nobody uses and that have rested.
    pub free: AtomicU64,
    /// Ports whose flow has ended, and whose record may be taken if no other is to be had.
    pub resting: AtomicU64,
    spare: u64,
}

const _: () = assert!(
    size_of::<Chunk>() == 32,
    "Chunk: layout changed, bump ABI_VERSION"
);

/// Which ports may be used, one bit each.
#[repr(C)]
#[derive(Debug)]
pub struct PortSet {
    /// By place.
    pub words: [AtomicU64; PLACES],
}

/// Where chunks come from. One record, shared by all CPUs.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Allocation {
    /// The highest chunk that was ever used.
    pub unused: AtomicU32,
    /// Where a new flow that finds no chunk goes on to look for an empty one.
    pub hand: AtomicU32,
    /// Where the sweep goes on.
    pub sweep: AtomicU32,
    /// Whose turn it is among the addresses of a SNAT pool.
    pub turn: AtomicU32,
    /// Half-open flows now.
    pub embryonic: AtomicU32,
    /// Tick of the last SYN cookie; 0 for none.
    pub baked: AtomicU32,
    spare: [u32; 2],
}

map_record!(
    /// Where flows to one member come from: its pairs, one for each SNAT address, taken in turn.
    Source {
        /// How many entries of `pairs` count.
        count: u32,
        /// Numbers of pairs, again from the first where they end: as many from any place on are all of them.
        pairs: [u16; 2 * SOURCE_PAIRS],
    } size 132 align 4
);

/// Which of so many SNAT addresses is asked first, by turn. Scattered: in plain turns a member might always meet the same
/// address when members are taken in turn too.
#[inline(always)]
pub const fn first(turn: u32, count: u32) -> u32 {
    match (turn.wrapping_mul(0x9e37_79b9) >> 16).checked_rem(count) {
        Some(place) => place,
        None => 0,
    }
}

/// The slot of a port's record in a chunk.
#[inline(always)]
pub const fn slot(chunk: u32, port: u16) -> u32 {
    chunk * CHUNK + (port as u32 & (CHUNK - 1))
}
