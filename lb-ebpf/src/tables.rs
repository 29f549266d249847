//! What the pipeline reads and writes, without saying where it lies.

use lb_common::{
    access::{Event, Explanation, Guard, Policies, Rule, SourceKey, Spending, matching},
    atomic::AtomicU32,
    event::Cause,
    flow::{Flow, FlowKey, FragmentKey, Hit},
    member::Member,
    reason::DropReason,
    service::{Config, Pool, PrefixKey, Service, ServiceKey},
    stats::TrafficCell,
    tcp::{Direction, Phase},
};

use crate::{access::Knock, flow::Note};

/// Where new flow records come from. One record, shared by all CPUs.
#[repr(C)]
#[derive(Debug)]
pub struct Allocation {
    /// The highest slot that was ever used.
    pub unused: AtomicU32,
    /// Where the search for an expired record goes on.
    pub hand: AtomicU32,
    /// Where the sweep goes on.
    pub sweep: AtomicU32,
    /// Whose turn it is among the SNAT ports.
    pub port: AtomicU32,
}

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
    /// The virtual server of an address and port.
    fn service(&self, key: &ServiceKey) -> Option<&Service>;
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
    /// The flow of a packet.
    fn hit(&self, key: &FlowKey) -> Option<Hit>;
    /// Makes a key lead to a flow; false when it already leads elsewhere or the table is full.
    fn insert(&self, key: &FlowKey, hit: Hit) -> bool;
    /// Forgets a key.
    fn remove(&self, key: &FlowKey);
    /// A flow record by slot.
    fn flow(&self, slot: u32) -> Option<&Flow>;
    /// Notes in a record that the caller has claimed what packets of a direction say when they leave: the reverse of
    /// what the other direction's packets say when they arrive.
    fn write_leave(&self, slot: u32, direction: Direction, arrive: &FlowKey);
    /// The state of the allocation of flow records.
    fn allocation(&self) -> Option<&Allocation>;
    /// Takes a slot that was given back.
    fn pop_free(&self) -> Option<u32>;
    /// Gives a slot back.
    fn push_free(&self, slot: u32);
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

    /// [`crate::snat::port`], behind such a call.
    fn bind_port(&self, member: u32, slot: u32) -> u32
    where
        Self: Sized,
    {
        crate::snat::port(self, member, slot)
    }

    /// [`crate::expire::reclaim`], behind such a call.
    fn reclaim(&self, slot: u32) -> bool
    where
        Self: Sized,
    {
        crate::expire::reclaim(self, slot)
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

    /// [`crate::expire::claim`], behind such a call.
    fn claim(&self, now: u64) -> u32
    where
        Self: Sized,
    {
        crate::expire::claim(self, now)
    }
}
