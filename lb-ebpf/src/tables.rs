//! What the pipeline reads and writes, without saying where it lies.

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    access::{Event, Explanation, Guard, Policies, Rule, SourceKey, Spending, matching},
    addr::Addr,
    atomic::AtomicU32,
    cookie,
    event::Cause,
    flow::{Flow, FlowKey, FragmentKey, Hit},
    index::{Bucket, ServiceBucket},
    member::Member,
    pair::{Allocation, CHUNK, Chunk, Mark, Pair, Source},
    reason::DropReason,
    service::{Config, Pool, PrefixKey, Service},
    stats::TrafficCell,
    tcp::{Direction, Phase},
};

use crate::{Packet, access::Knock, flow::Note};

/// What is asked before a connection is opened.
pub trait Access: Policies {
    /// Monotonic time of an event, nanoseconds.
    fn clock(&self) -> u64;
    /// What guards a virtual server, epoch included.
    fn guard(&self, index: u32) -> Option<&Guard>;
    /// A rule by index, epoch included.
    fn rule(&self, index: u32) -> Option<&Rule>;
    /// The virtual server with the longest prefix of an address.
    fn prefix(&self, key: &PrefixKey) -> Option<&Service>;
    /// Counts a match of a rule, in force or staged.
    fn count_rule(&self, number: u32, staged: bool);
    /// Counts what was not carried, where the caller does not.
    fn count_drop(&self, reason: DropReason);
    /// May a source connect once more? With `counts` it has, else it is only asked. Interval and lead in nanoseconds.
    fn within_rate(&self, key: &SourceKey, interval: u64, ahead: u64, counts: bool) -> bool;
    /// Takes a piece of this CPU's budget; false when it is used up, which is counted.
    fn spend(&self, what: Spending) -> bool;
    /// Hands an event to userspace.
    fn announce(&self, event: &Event);
    /// Answers `smtplb explain`.
    fn explain(&self, explanation: &Explanation);

    /// Lays down who knocks, for [`Self::ask`] behind a call.
    fn hold(&self, _: &Knock) {}

    /// [`crate::access::ask`], behind a call that the verifier checks once. There the one who was laid down is asked about.
    #[inline(always)]
    fn ask(&self, policy: u32, kind: u8, knock: &Knock) -> u32
    where
        Self: Sized,
    {
        crate::access::ask(self, policy, kind, knock)
    }

    /// [`lb_common::access::matching`] for who was laid down, in the same way; 0 without a policy.
    #[inline(always)]
    fn match_rule(&self, policy: u32, knock: &Knock) -> u32
    where
        Self: Sized,
    {
        matching(self, policy, &knock.arrival).unwrap_or(0)
    }
}

/// The tables of the kernel plane: maps in the kernel, plain memory in tests.
pub trait Tables: Access {
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
    /// Notes in such a record what packets to the member say: from a SNAT address and port, else from the client, as the
    /// other direction's has it.
    fn write_source(&self, slot: u32, source: Option<(&Addr, u16)>, member: &Member);
    /// The state of the allocation of chunks.
    fn allocation(&self) -> Option<&Allocation>;
    /// Takes a chunk that was given back.
    fn pop_chunk(&self) -> Option<u32>;
    /// Gives a chunk back.
    fn push_chunk(&self, chunk: u32);
    /// Tells the daemon that a flow has ended, if it listens.
    fn report(&self, slot: u32, phase: Phase, cause: Cause);

    /// The flow of a fragmented packet whose first fragment was seen.
    fn fragment(&self, key: &FragmentKey) -> Option<Hit>;
    /// Remembers whose later fragments will follow, and counts one that came before.
    fn note_fragment(&self, key: &FragmentKey, hit: Hit);
    /// Remembers a fragment whose first has not come.
    fn note_early(&self, key: &FragmentKey);
    /// Keeps the tags of a packet for its answer.
    fn keep_tags(&self, vlan: u32);
    /// May clients use this VLAN?
    fn vlan_allowed(&self, vlan: u32) -> bool;

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

    /// [`crate::select::peek`], behind such a call.
    fn peek(&self, pool: u32) -> u32
    where
        Self: Sized,
    {
        crate::select::peek(self, pool)
    }

    /// [`crate::select::busy`], behind such a call.
    fn busy(&self, member: u32) -> u64
    where
        Self: Sized,
    {
        crate::select::busy(self, member)
    }

    /// [`crate::ports::take`], behind such a call.
    fn take(&self, source: u32, last: u32) -> u64
    where
        Self: Sized,
    {
        crate::ports::take(self, source, last)
    }

    /// [`crate::ports::take_turn`], behind such a call.
    fn take_turn(&self, source: u32, start: u32, level: u32) -> u64
    where
        Self: Sized,
    {
        crate::ports::take_turn(self, source, start, level)
    }

    /// [`crate::ports::take_swept`], behind such a call.
    fn take_swept(&self, pair: u32) -> u64
    where
        Self: Sized,
    {
        crate::ports::take_swept(self, pair)
    }

    /// The cookie for a first packet, which in a program is the one that was parsed last; behind such a call.
    fn bake(&self, packet: &Packet, class: u32) -> u32 {
        self.config().map_or(0, |config| {
            cookie::bake(
                &config.cookie,
                &packet.key,
                packet.sequence,
                class,
                self.now(),
            )
        })
    }

    /// The class of a cookie that a packet brings back, of the same one and in the same way; [`cookie::NONE`] for none.
    fn check_cookie(&self, packet: &Packet) -> u32 {
        let (sequence, brought) = (
            packet.sequence.wrapping_sub(1),
            packet.acknowledgement.wrapping_sub(1),
        );
        self.config().map_or(cookie::NONE, |config| {
            cookie::check(&config.cookie, &packet.key, sequence, brought, self.now())
        })
    }

    /// [`crate::ports::take_of`], behind such a call.
    fn take_port(&self, pair: u32, level: u32) -> u64
    where
        Self: Sized,
    {
        crate::ports::take_of(self, pair, level)
    }

    /// [`crate::expire::surrender`], behind such a call.
    fn surrender(&self, slot: u32, level: u32) -> u32
    where
        Self: Sized,
    {
        crate::expire::surrender(self, slot, level)
    }

    /// [`crate::expire::withdraw`], behind such a call.
    fn withdraw(&self, slot: u32)
    where
        Self: Sized,
    {
        crate::expire::withdraw(self, slot);
    }

    /// [`crate::expire::sweep_chunk`], behind such a call.
    fn sweep_chunk(&self, chunk: u32) -> bool
    where
        Self: Sized,
    {
        crate::expire::sweep_chunk(self, chunk)
    }

    /// [`crate::index::enter`], behind such a call.
    fn enter(&self, slot: u32, direction: Direction) -> bool
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

    /// [`crate::index::put`], behind such a call.
    fn put(&self, bucket: u32, entry: u32) -> bool
    where
        Self: Sized,
    {
        crate::index::put(self, bucket, entry)
    }

    /// [`crate::index::clear`], behind such a call.
    fn clear(&self, bucket: u32, entry: u32)
    where
        Self: Sized,
    {
        crate::index::clear(self, bucket, entry);
    }

    /// [`crate::index::rival`], behind such a call.
    fn rival(&self, slot: u32, direction: Direction) -> bool
    where
        Self: Sized,
    {
        crate::index::rival(self, slot, direction)
    }

    /// [`crate::index::same`], behind such a call.
    fn same(&self, one: u32, other: u32) -> bool
    where
        Self: Sized,
    {
        crate::index::same(self, one, other)
    }

    /// [`crate::index::room`], behind such a call.
    fn room(&self, bucket: u32) -> u32
    where
        Self: Sized,
    {
        crate::index::room(self, bucket)
    }

    /// [`crate::flow::look_up`], behind such a call.
    fn look_up(&self, key: &FlowKey) -> u64
    where
        Self: Sized,
    {
        crate::flow::look_up(self, key)
    }

    /// [`crate::flow::forget`], behind such a call.
    fn forget(&self, slot: u32) -> bool
    where
        Self: Sized,
    {
        crate::flow::forget(self, slot)
    }

    /// [`crate::flow::forget_last`] for a packet, which in a program is the one that was parsed last; behind such a call.
    fn forget_last(&self, packet: &Packet)
    where
        Self: Sized,
    {
        crate::flow::forget_last(self, &packet.key);
    }

    /// [`crate::flow::fill`], behind such a call.
    fn fill(&self, got: u64, owners: u32, snat: u32) -> u32
    where
        Self: Sized,
    {
        crate::flow::fill(self, got, owners, snat)
    }

    /// [`crate::ports::put`], behind such a call.
    fn put_port(&self, slot: u32, kind: Mark)
    where
        Self: Sized,
    {
        crate::ports::put(self, slot, kind);
    }

    /// [`crate::ports::unrest`], behind such a call.
    fn unrest(&self, slot: u32)
    where
        Self: Sized,
    {
        crate::ports::unrest(self, slot);
    }

    /// [`crate::ports::settle`], behind such a call.
    fn settle(&self, pair: u32, kind: Mark, place: u32, chunk: u32)
    where
        Self: Sized,
    {
        crate::ports::settle(self, pair, kind, place, chunk);
    }

    /// [`crate::ports::pick`], behind such a call.
    fn pick(&self, pair: u32, kind: Mark) -> u64
    where
        Self: Sized,
    {
        crate::ports::pick(self, pair, kind)
    }

    /// [`crate::ports::bind`], behind such a call.
    fn bind(&self, pair: u32) -> u64
    where
        Self: Sized,
    {
        crate::ports::bind(self, pair)
    }

    /// [`crate::expire::end`], behind such a call.
    fn expire(&self, slot: u32) -> bool
    where
        Self: Sized,
    {
        crate::expire::end(self, slot)
    }

    /// [`crate::flow::release`], behind such a call.
    fn release(&self, slot: u32, phase: Phase, cause: Cause) -> bool
    where
        Self: Sized,
    {
        crate::flow::release(self, slot, phase, cause)
    }

    /// [`crate::flow::track`], behind such a call.
    fn track(&self, slot: u32, note: &Note)
    where
        Self: Sized,
    {
        crate::flow::track(self, slot, note);
    }
}
