//! Every map: what it holds, who writes it, what happens when it is full.
//!
//! | map | writer | when full |
//! | --- | --- | --- |
//! | `CONFIG` | daemon | one record |
//! | `SERVICES`, `PAIR_INDEX`, `POOLS`, `SNAT_SOURCES`, `MEMBERS`, `PORT_SETS` | daemon | the generation is refused before anything changes |
//! | `TURNS`, `ALLOCATION` | programs | fixed |
//! | `MEMBER_CELLS`, `SERVICE_CELLS` | programs, and the daemon through shared memory | fixed |
//! | `PAIRS` | daemon: who; programs: which ports | the generation is refused before anything changes |
//! | `CHUNKS`, `FREE`, `FLOWS`, `FLOW_INDEX` | programs | ended, expired and half-open flows make room, then new flows are refused |
//! | `DROPS`, `FLOW_ENDS_LOST` | programs | fixed |
//! | `FLOW_ENDS` (in `report.rs`) | programs; the daemon takes out | ends of flows are lost for the log, and counted |
//! | `LISTENERS` | daemon | fixed |
//! | `FRAGMENTS`, `EARLY_FRAGMENTS` | programs | the oldest make room |
//! | `VLANS` | daemon | fixed |
//! | `SCRATCH`, `KEY`, `NOTICE`, `DEEP`, `QUOTE`, `WORKSPACE` | programs | one record per CPU |
//! | `TC_JUMPS`, `XDP_JUMPS`, `XDP_GENERIC_JUMPS` | daemon, of each load its own | fixed |
//!
//! Those of policies, rates and events are in [`access`].
//!
//! Capacities of `FLOWS`, `CHUNKS`, `FREE` and `FLOW_INDEX` are set when the object is loaded.
#![expect(unsafe_code, reason = "map access")]

mod access;
mod calls;

use core::sync::atomic::Ordering::Relaxed;

use aya_ebpf::{
    helpers,
    macros::map,
    maps::{Array, LruHashMap, PerCpuArray, ProgramArray, Queue, SockMap},
};
use lb_common::{
    addr::{Addr, MAPPED},
    atomic::AtomicU32,
    event::Cause,
    flow::{Flow, FlowKey, FragmentKey, Hit},
    index::{Bucket, PAIR_BUCKETS, SERVICE_BUCKETS, ServiceBucket},
    layout::{
        EARLY, EPOCHS, FRAGMENTED, MAX_JUMPS, MAX_MEMBERS, MAX_POOLS, MAX_VIEWS,
        MAX_VIRTUAL_SERVERS, MAX_WORKERS, VLAN_WORDS,
    },
    member::Member,
    pair::{
        Allocation, Chunk, MAX_PAIRS, MAX_PORT_SETS, MAX_SOURCES, Mark, PLACES, Pair, PortSet,
        Source,
    },
    reason::{DropReason, MAX_REASONS},
    service::{Config, Pool},
    stats::TrafficCell,
    tcp::{Direction, Phase, tick},
};

use self::calls::{
    bake_cookie, bind_chunk, bucket_room, busy_member, check_cookie, clear_entry, enter_flow,
    expire_flow, fill_flow, find_rival, forget_flow, forget_last_flow, leave_flow, look_up_v4,
    look_up_v6, peek_member, pick_port, put_entry, put_port, release_flow, same_ends,
    select_member, settle_place, surrender_flow, sweep_chunk, take_port, take_port_in_turn,
    take_port_of, take_swept_port, track_flow, unrest_port, withdraw_flow,
};
pub use self::{
    access::is_unjudged,
    calls::{build_segment, decide_shift, edit_options, end_flow, segment_size},
};
use crate::{
    Packet,
    answer::{ANSWERS, Notice},
    flow::Note,
    icmp::Quote,
    opaque,
    parse::Deep,
    report,
    shift::Workspace,
    tables::Tables,
};

/// The daemon maps the array into its memory (Linux 5.5).
const BPF_F_MMAPABLE: u32 = 1 << 10;

#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
static SERVICES: Array<ServiceBucket> = Array::with_max_entries(EPOCHS * SERVICE_BUCKETS, 0);
#[map]
static PAIR_INDEX: Array<Bucket> = Array::with_max_entries(EPOCHS * PAIR_BUCKETS, BPF_F_MMAPABLE);
#[map]
static POOLS: Array<Pool> = Array::with_max_entries(EPOCHS * MAX_VIEWS, 0);
#[map]
static SNAT_SOURCES: Array<Source> = Array::with_max_entries(EPOCHS * MAX_SOURCES, 0);
#[map]
static PORT_SETS: Array<PortSet> = Array::with_max_entries(MAX_PORT_SETS, BPF_F_MMAPABLE);
#[map]
static TURNS: Array<AtomicU32> = Array::with_max_entries(MAX_POOLS, 0);
#[map]
static MEMBERS: Array<Member> = Array::with_max_entries(MAX_MEMBERS, 0);
#[map]
static MEMBER_CELLS: Array<TrafficCell> = Array::with_max_entries(MAX_MEMBERS, BPF_F_MMAPABLE);
#[map]
static SERVICE_CELLS: Array<TrafficCell> =
    Array::with_max_entries(MAX_VIRTUAL_SERVERS, BPF_F_MMAPABLE);
#[map]
static PAIRS: Array<Pair> = Array::with_max_entries(MAX_PAIRS, BPF_F_MMAPABLE);
#[map]
static CHUNKS: Array<Chunk> = Array::with_max_entries(16, BPF_F_MMAPABLE);
#[map]
static FREE: Queue<u32> = Queue::with_max_entries(16, 0);
#[map]
static FLOWS: Array<Flow> = Array::with_max_entries(1024, BPF_F_MMAPABLE);
#[map]
static FLOW_INDEX: Array<Bucket> = Array::with_max_entries(128, 0);
#[map]
static ALLOCATION: Array<Allocation> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static DROPS: PerCpuArray<u64> = PerCpuArray::with_max_entries(MAX_REASONS, 0);
/// IPv4 listeners first, IPv6 listeners from [`MAX_WORKERS`] on.
#[map]
pub static LISTENERS: SockMap = SockMap::with_max_entries(2 * MAX_WORKERS, 0);
/// Programs of the TC hook that others jump to, by [`lb_common::layout::Jump`].
#[map]
pub static TC_JUMPS: ProgramArray = ProgramArray::with_max_entries(MAX_JUMPS, 0);
/// The same of the XDP hook in the driver.
#[map]
pub static XDP_JUMPS: ProgramArray = ProgramArray::with_max_entries(MAX_JUMPS, 0);
/// The same of the XDP hook behind the driver.
#[map]
pub static XDP_GENERIC_JUMPS: ProgramArray = ProgramArray::with_max_entries(MAX_JUMPS, 0);
/// Fragmented packets whose first fragment has passed. The oldest make room: a packet's fragments come close together.
#[map]
static FRAGMENTS: LruHashMap<FragmentKey, Hit> = LruHashMap::with_max_entries(FRAGMENTED, 0);
/// TCP fragments whose first has not passed, whoever they are for: only the first tells. The oldest make room.
#[map]
static EARLY_FRAGMENTS: LruHashMap<FragmentKey, u32> = LruHashMap::with_max_entries(EARLY, 0);
/// A bit for each VLAN that clients may use; the last record says whether there are any.
#[map]
static VLANS: Array<u64> = Array::with_max_entries(VLAN_WORDS + 1, 0);
/// What a program found about a packet that is to be answered, for the program that answers.
#[map]
static NOTICE: PerCpuArray<Notice> = PerCpuArray::with_max_entries(1, 0);
/// Where a packet that needs more looking at is parsed to.
#[map]
pub static DEEP: PerCpuArray<Deep> = PerCpuArray::with_max_entries(1, 0);
/// The same of ICMP errors.
#[map]
pub static QUOTE: PerCpuArray<Quote> = PerCpuArray::with_max_entries(1, 0);
/// The key of an IPv6 packet that is looked up.
#[map]
static KEY: PerCpuArray<FlowKey> = PerCpuArray::with_max_entries(1, 0);
/// Where programs sum a packet.
#[map]
pub static SCRATCH: PerCpuArray<[u32; 128]> = PerCpuArray::with_max_entries(1, 0);
/// Where programs build segments.
#[map]
static WORKSPACE: PerCpuArray<Workspace> = PerCpuArray::with_max_entries(1, 0);

/// Counts a packet or connection that was not carried.
#[inline(always)]
pub fn count_drop(reason: DropReason) {
    if let Some(count) = DROPS.get_ptr_mut(reason as u32) {
        // SAFETY: the record is this CPU's own.
        unsafe { *count += 1 };
    }
}

/// This CPU's place to build segments in.
#[inline(always)]
pub fn workspace() -> Option<&'static mut Workspace> {
    let pointer = WORKSPACE.get_ptr_mut(0)?;
    // SAFETY: the record is this CPU's own, and a program asks once.
    Some(unsafe { &mut *pointer })
}

/// Notes for the program that answers why a packet cannot go on; false when this CPU has answered enough for now.
#[inline(always)]
pub fn notice(reason: DropReason, mtu: u32) -> bool {
    let Some(notice) = NOTICE.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: the record is this CPU's own.
    let notice = unsafe { &mut *notice };
    let now = tick(KernelTables.now());
    if notice.tick != now {
        (notice.tick, notice.counts) = (now, [0; 2]);
    }
    // Who finds out the path's MTU must not wait for those that run in circles.
    let count = &mut notice.counts[usize::from(reason == DropReason::TooBig)];
    *count += 1;
    let allowed = *count <= ANSWERS;
    notice.vlan = 0;
    (notice.reason, notice.mtu) = (reason as u32, mtu);
    allowed
}

/// What was noted.
#[inline(always)]
pub fn noticed() -> Notice {
    // SAFETY: the record is this CPU's own.
    NOTICE
        .get_ptr(0)
        .map(|notice| unsafe { *notice })
        .unwrap_or_default()
}

/// The maps of the running kernel.
pub struct KernelTables;

/// A record of an array, shared with other CPUs: all that changes in it is atomic.
#[inline(always)]
fn record<T>(array: &'static Array<T>, index: u32) -> Option<&'static T> {
    let pointer = array.get_ptr(index)?;
    // SAFETY: map records live as long as the program.
    Some(unsafe { &*pointer })
}

impl Tables for KernelTables {
    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: helper call without arguments (Linux 5.11).
        unsafe { helpers::generated::bpf_ktime_get_coarse_ns() }
    }

    #[inline(always)]
    fn config(&self) -> Option<&Config> {
        record(&CONFIG, 0).filter(|config| config.generation != 0)
    }

    #[inline(always)]
    fn service_bucket(&self, index: u32) -> Option<&ServiceBucket> {
        record(&SERVICES, index)
    }

    #[inline(always)]
    fn pair_bucket(&self, index: u32) -> Option<&Bucket> {
        record(&PAIR_INDEX, index)
    }

    #[inline(always)]
    fn flow_bucket(&self, index: u32) -> Option<&Bucket> {
        record(&FLOW_INDEX, index)
    }

    #[inline(always)]
    fn pool(&self, index: u32) -> Option<&Pool> {
        record(&POOLS, index)
    }

    #[inline(always)]
    fn turn(&self, index: u32) -> Option<&AtomicU32> {
        record(&TURNS, index)
    }

    #[inline(always)]
    fn member(&self, number: u32) -> Option<&Member> {
        record(&MEMBERS, number)
    }

    #[inline(always)]
    fn member_cell(&self, number: u32) -> Option<&TrafficCell> {
        record(&MEMBER_CELLS, number)
    }

    #[inline(always)]
    fn service_cell(&self, number: u32) -> Option<&TrafficCell> {
        record(&SERVICE_CELLS, number)
    }

    #[inline(always)]
    fn source(&self, index: u32) -> Option<&Source> {
        record(&SNAT_SOURCES, index)
    }

    #[inline(always)]
    fn pair(&self, number: u32) -> Option<&Pair> {
        record(&PAIRS, number)
    }

    #[inline(always)]
    fn chunk(&self, number: u32) -> Option<&Chunk> {
        record(&CHUNKS, number)
    }

    #[inline(always)]
    fn usable(&self, set: u32, place: u32) -> u64 {
        record(&PORT_SETS, set).map_or(0, |set| {
            set.words[opaque::index::<PLACES>(u64::from(place))].load(Relaxed)
        })
    }

    #[inline(always)]
    fn flow(&self, slot: u32) -> Option<&Flow> {
        record(&FLOWS, slot)
    }

    #[inline(always)]
    fn write_leave(&self, slot: u32, direction: Direction, arrive: &FlowKey) {
        if let Some(flow) = FLOWS.get_ptr_mut(slot) {
            // SAFETY: the caller has claimed the record, nobody else relies on its route.
            let leave = unsafe { &mut (*flow).route.leave[direction as usize & 1] };
            leave.src.copy(&arrive.dst);
            leave.dst.copy(&arrive.src);
            leave.sport = arrive.dport;
            leave.dport = arrive.sport;
        }
    }

    #[inline(always)]
    fn write_source(&self, slot: u32, source: Option<(&Addr, u16)>, member: &Member) {
        if let Some(flow) = FLOWS.get_ptr_mut(slot) {
            // SAFETY: the caller has claimed the record, nobody else relies on its route.
            let [to, client] = unsafe { &mut (*flow).route.leave };
            to.dst.copy(&member.address);
            to.dport = member.port;
            let (address, port) = source.unwrap_or((&client.dst, client.dport));
            to.src.copy(address);
            to.sport = port;
        }
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<Hit> {
        // SAFETY: the value is copied out.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(always)]
    fn note_fragment(&self, key: &FragmentKey, hit: Hit) {
        let _ = FRAGMENTS.insert(key, hit, 0);
        if EARLY_FRAGMENTS.remove(key).is_ok() {
            count_drop(DropReason::EarlyFragment);
        }
    }

    #[inline(always)]
    fn note_early(&self, key: &FragmentKey) {
        let _ = EARLY_FRAGMENTS.insert(key, 1, 0);
    }

    #[inline(always)]
    fn keep_tags(&self, vlan: u32) {
        if let Some(notice) = NOTICE.get_ptr_mut(0) {
            // SAFETY: the record is this CPU's own.
            unsafe { (*notice).vlan = vlan };
        }
    }

    #[inline(always)]
    fn vlan_allowed(&self, vlan: u32) -> bool {
        let word = |index: u32| VLANS.get(index).copied().unwrap_or(0);
        word(VLAN_WORDS) == 0 || word((vlan >> 6) & (VLAN_WORDS - 1)) >> (vlan & 63) & 1 != 0
    }

    #[inline(always)]
    fn allocation(&self) -> Option<&Allocation> {
        record(&ALLOCATION, 0)
    }

    #[inline(always)]
    fn pop_chunk(&self) -> Option<u32> {
        FREE.pop().ok().flatten()
    }

    #[inline(always)]
    fn push_chunk(&self, chunk: u32) {
        let _ = FREE.push(chunk, 0);
    }

    #[inline(always)]
    fn select(&self, pool: u32) -> u32 {
        select_member(pool)
    }

    #[inline(always)]
    fn busy(&self, member: u32) -> u64 {
        busy_member(member)
    }

    #[inline(always)]
    fn take(&self, source: u32, last: u32) -> u64 {
        take_port(source, last)
    }

    #[inline(always)]
    fn take_turn(&self, source: u32, start: u32, level: u32) -> u64 {
        take_port_in_turn(source, start, level)
    }

    #[inline(always)]
    fn take_swept(&self, pair: u32) -> u64 {
        take_swept_port(pair)
    }

    #[inline(always)]
    fn bake(&self, packet: &Packet, class: u32) -> u32 {
        bake_cookie(packet.sequence, class)
    }

    #[inline(always)]
    fn check_cookie(&self, packet: &Packet) -> u32 {
        check_cookie(
            packet.sequence.wrapping_sub(1),
            packet.acknowledgement.wrapping_sub(1),
        )
    }

    #[inline(always)]
    fn take_port(&self, pair: u32, level: u32) -> u64 {
        take_port_of(pair, level)
    }

    #[inline(always)]
    fn surrender(&self, slot: u32, level: u32) -> u32 {
        surrender_flow(slot, level)
    }

    #[inline(always)]
    fn forget_last(&self, _: &Packet) {
        forget_last_flow();
    }

    #[inline(always)]
    fn withdraw(&self, slot: u32) {
        withdraw_flow(slot);
    }

    #[inline(always)]
    fn sweep_chunk(&self, chunk: u32) -> bool {
        sweep_chunk(chunk) != 0
    }

    #[inline(always)]
    fn enter(&self, slot: u32, direction: Direction) -> bool {
        enter_flow(slot, direction as u32) != 0
    }

    #[inline(always)]
    fn leave(&self, slot: u32, direction: Direction) {
        leave_flow(slot, direction as u32);
    }

    /// IPv4 fits the registers of a call.
    #[inline(always)]
    fn look_up(&self, key: &FlowKey) -> u64 {
        if key.dst.0[2] == MAPPED {
            let ports = u32::from(key.sport) | u32::from(key.dport) << 16;
            return look_up_v4(key.src.0[3], key.dst.0[3], ports);
        }
        let Some(room) = KEY.get_ptr_mut(0) else {
            return 0;
        };
        // SAFETY: the record is this CPU's own.
        unsafe { *room = *key };
        look_up_v6()
    }

    #[inline(always)]
    fn forget(&self, slot: u32) -> bool {
        forget_flow(slot) != 0
    }

    #[inline(always)]
    fn fill(&self, got: u64, owners: u32, snat: u32) -> u32 {
        fill_flow(got as u32, (got >> 32) as u32, owners, snat)
    }

    #[inline(always)]
    fn put_port(&self, slot: u32, kind: Mark) {
        put_port(slot, kind as u32);
    }

    #[inline(always)]
    fn unrest(&self, slot: u32) {
        unrest_port(slot);
    }

    #[inline(always)]
    fn settle(&self, pair: u32, kind: Mark, place: u32, chunk: u32) {
        settle_place(pair, kind as u32, place, chunk);
    }

    #[inline(always)]
    fn pick(&self, pair: u32, kind: Mark) -> u64 {
        pick_port(pair, kind as u32)
    }

    #[inline(always)]
    fn bind(&self, pair: u32) -> u64 {
        bind_chunk(pair)
    }

    #[inline(always)]
    fn expire(&self, slot: u32) -> bool {
        expire_flow(slot) != 0
    }

    #[inline(always)]
    fn put(&self, bucket: u32, entry: u32) -> bool {
        put_entry(bucket, entry) != 0
    }

    #[inline(always)]
    fn clear(&self, bucket: u32, entry: u32) {
        clear_entry(bucket, entry);
    }

    #[inline(always)]
    fn rival(&self, slot: u32, direction: Direction) -> bool {
        find_rival(slot, direction as u32) != 0
    }

    #[inline(always)]
    fn same(&self, one: u32, other: u32) -> bool {
        same_ends(one, other) != 0
    }

    #[inline(always)]
    fn room(&self, bucket: u32) -> u32 {
        bucket_room(bucket)
    }

    #[inline(always)]
    fn peek(&self, pool: u32) -> u32 {
        peek_member(pool)
    }

    #[inline(always)]
    fn report(&self, slot: u32, phase: Phase, cause: Cause) {
        if let Some(flow) = self.flow(slot) {
            report::write(flow, phase, cause, self.now());
        }
    }

    #[inline(always)]
    fn release(&self, slot: u32, phase: Phase, cause: Cause) -> bool {
        release_flow(slot, phase as u32, cause as u32) != 0
    }

    #[inline(always)]
    fn track(&self, slot: u32, note: &Note) {
        let (direction, flags) = note.way;
        let way = direction as u32 | u32::from(flags.0) << 8 | u32::from(note.data) << 16;
        track_flow(slot, way, note.next, note.acknowledgement, note.length);
    }
}
