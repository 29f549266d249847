//! What the pipeline reads and writes, without saying where it lies.

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    atomic::AtomicU32,
    flow::{Flow, FlowKey},
    index::{Bucket, ServiceBucket},
    member::Member,
    pair::{Allocation, CHUNK, Chunk, Pair, Source},
    service::{Config, Pool},
    stats::TrafficCell,
    tcp::{Direction, Phase},
};

use crate::flow::Note;

/// The tables of the kernel plane: maps in the kernel, plain memory in tests.
pub trait Tables {
    /// Monotonic time, nanoseconds; coarse is good enough.
    fn now(&self) -> u64;
    /// What holds for every packet; `None` before the first generation.
    fn config(&self) -> Option<&Config>;
    /// A bucket of virtual servers.
    fn service_bucket(&self, index: u32) -> Option<&ServiceBucket>;
    /// A bucket of pairs.
    fn pair_bucket(&self, index: u32) -> Option<&Bucket>;
    /// A bucket of flows.
    fn flow_bucket(&self, index: u32) -> Option<&Bucket>;
    /// A pool by index, epoch included.
    fn pool(&self, index: u32) -> Option<&Pool>;
    /// The turn counter of a pool.
    fn turn(&self, index: u32) -> Option<&AtomicU32>;
    /// A member by number.
    fn member(&self, number: u32) -> Option<&Member>;
    /// The counters of a member.
    fn member_cell(&self, number: u32) -> Option<&TrafficCell>;
    /// The counters of a virtual server.
    fn service_cell(&self, number: u32) -> Option<&TrafficCell>;
    /// Where flows to a member come from, by index, epoch included.
    fn source(&self, index: u32) -> Option<&Source>;
    /// A pair by number.
    fn pair(&self, number: u32) -> Option<&Pair>;
    /// A chunk by number.
    fn chunk(&self, number: u32) -> Option<&Chunk>;
    /// The usable ports of a set at a place.
    fn usable(&self, set: u32, place: u32) -> u64;
    /// A flow record by slot.
    fn flow(&self, slot: u32) -> Option<&Flow>;
    /// Notes in a record that the caller has claimed what packets of a direction say when they leave: the reverse of
    /// what the other direction's packets say when they arrive.
    fn write_leave(&self, slot: u32, direction: Direction, arrive: &FlowKey);
    /// The state of the allocation of chunks.
    fn allocation(&self) -> Option<&Allocation>;
    /// Takes a chunk that was given back.
    fn pop_chunk(&self) -> Option<u32>;
    /// Gives a chunk back.
    fn push_chunk(&self, chunk: u32);

    /// The pair that a slot belongs to.
    #[inline(always)]
    fn pair_of(&self, slot: u32) -> Option<&Pair> {
        let chunk = self.chunk(slot / CHUNK)?;
        self.pair(chunk.pair.load(Relaxed))
    }

    /// [`crate::select::member`], behind a call that the verifier checks once, whatever comes before and after.
    fn select(&self, pool: u32) -> u32
    where
        Self: Sized,
    {
        crate::select::member(self, pool)
    }

    /// [`crate::ports::take`], behind such a call.
    fn take(&self, source: u32, pressed: u32) -> u64
    where
        Self: Sized,
    {
        crate::ports::take(self, source, pressed)
    }

    /// [`crate::ports::take_of`], behind such a call.
    fn take_port(&self, pair: u32, level: u32) -> u64
    where
        Self: Sized,
    {
        crate::ports::take_of(self, pair, level)
    }

    /// [`crate::expire::surrender`], behind such a call.
    fn surrender(&self, slot: u32) -> bool
    where
        Self: Sized,
    {
        crate::expire::surrender(self, slot)
    }

    /// [`crate::expire::sweep_chunk`], behind such a call.
    fn sweep_chunk(&self, chunk: u32) -> bool
    where
        Self: Sized,
    {
        crate::expire::sweep_chunk(self, chunk)
    }

    /// [`crate::index::enter`], behind such a call.
    fn enter(&self, slot: u32, direction: Direction) -> u32
    where
        Self: Sized,
    {
        crate::index::enter(self, slot, direction)
    }

    /// [`crate::index::leave`], behind such a call.
    fn leave(&self, slot: u32, direction: Direction)
    where
        Self: Sized,
    {
        crate::index::leave(self, slot, direction);
    }

    /// [`crate::flow::release`], behind such a call.
    fn release(&self, slot: u32, phase: Phase) -> bool
    where
        Self: Sized,
    {
        crate::flow::release(self, slot, phase)
    }

    /// [`crate::flow::track`], behind such a call.
    fn track(&self, slot: u32, note: &Note)
    where
        Self: Sized,
    {
        crate::flow::track(self, slot, note);
    }
}
