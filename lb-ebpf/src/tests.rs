//! The pipeline over plain memory: the same code as in the kernel, with no kernel.

mod flows;
mod odd;
mod races;

use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, VecDeque},
    sync::atomic::Ordering::Relaxed,
};

use lb_common::{
    access::{
        Bound, Event, Explanation, Guard, PlaceKey, Policies, Policy, Rule, SourceKey, Spending,
        admit,
    },
    addr::Addr,
    atomic::AtomicU32,
    event::Cause,
    flow::{Flow, FlowKey, FragmentKey, Hit, Route, split_owners},
    index::{
        BY_KEY, Bucket, PAIR_BUCKETS, SERVICE_BUCKETS, ServiceBucket, ServiceEntry, pair_bucket,
        service_bucket,
    },
    layout::Jump,
    member::Member,
    pair::{Allocation, CHUNK, Chunk, Mark, PLACES, Pair, SOURCE_PAIRS, Source},
    reason::DropReason,
    service::{Config, Pool, PrefixKey, Service},
    stats::TrafficCell,
    tcp::{DEFAULT_LIMITS, Direction, Phase},
};

use crate::{
    Egress, Verdict, balance,
    frame::MemoryFrame,
    sweep,
    tables::{Access, Tables},
};

/// A VLAN that clients may not use.
const FOREIGN_VLAN: u32 = 66;
const TICK: u64 = 1 << lb_common::tcp::TICK_SHIFT;
const VIA: Egress = Egress {
    interface: 7,
    known: true,
    macs: [1, 2, 3],
    mtu: 1500,
};
/// Pairs of one member: a SNAT address each.
const ADDRESSES: u32 = 2;

/// Tables in memory, with a clock that stands still until it is set: two members, two SNAT addresses.
struct MemoryTables {
    now: Cell<u64>,
    config: Config,
    services: Vec<ServiceBucket>,
    pair_index: Vec<Bucket>,
    flow_index: Vec<Bucket>,
    pool: Pool,
    turn: AtomicU32,
    members: Vec<Member>,
    cells: Vec<TrafficCell>,
    sources: Vec<Source>,
    pairs: Vec<Pair>,
    chunks: Vec<Chunk>,
    usable: Vec<u64>,
    flows: RefCell<Vec<&'static Flow>>,
    allocation: Allocation,
    free: RefCell<VecDeque<u32>>,
    reports: RefCell<Vec<(u32, Phase, Cause)>>,
    fragments: RefCell<HashMap<(Addr, Addr, u32), Hit>>,
    tags: Cell<u32>,
    early: Cell<Option<(Addr, Addr, u32)>>,
    guard: Guard,
    policies: Vec<Policy>,
    bounds: Vec<Bound>,
    rules: Vec<Rule>,
    hits: RefCell<Vec<(u32, bool)>>,
    rates: RefCell<HashMap<([u32; 2], u16), u64>>,
    prefix: Option<Service>,
    events: RefCell<Vec<Event>>,
}

impl MemoryTables {
    /// So many chunks of flow records, and per pair the ports whose bits `usable` has, from port 0 on.
    fn new(snat: u8, chunks: u32, usable: &[u64]) -> Self {
        let end = |host: u8| Addr::from(std::net::Ipv4Addr::new(10, 0, 2, host));
        let member = |host: u8| Member {
            address: end(host),
            port: 465u16.to_be(),
            available: u16::from(host != 0),
            pool_hash: 0,
        };
        let mut pool = Pool {
            method: Pool::LEAST_CONNECTIONS,
            count: 2,
            turn: 1,
            members: [0; lb_common::layout::POOL_MEMBERS],
            sources: [0; lb_common::layout::POOL_MEMBERS],
        };
        pool.members[..2].copy_from_slice(&[1, 2]);
        pool.sources[..2].copy_from_slice(&[1, 2]);
        let by_key = snat == Service::SNAT_NONE;
        let config = Config {
            epoch: 0,
            generation: 1,
            chunks: chunks + 1,
            flow_mask: 63,
            embryonic: u32::MAX,
            by_key: u32::from(by_key),
            limits: DEFAULT_LIMITS,
            workers: 1,
            owner: 1,
            instance: 1,
            prefixes: 0,
            seeds: [0x2545_f491_4f6c_dd1d, 0xda94_2042_e4dd_58b5],
            cookie: [1, 2],
            filter: [u64::MAX; 8],
            hash: std::array::from_fn(|place| {
                let word = (place as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                (word ^ word >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
            }),
        };
        let vacant = ServiceEntry {
            address: Addr::UNSET,
            port: 0,
            used: 0,
            service: Service {
                pool: 1,
                virtual_server: 1,
                forward: Service::PASSTHROUGH,
                snat,
                flags: 0,
            },
        };
        let mut services = vec![
            ServiceBucket {
                entries: [vacant; 4]
            };
            2 * SERVICE_BUCKETS as usize
        ];
        let port = 465u16.to_be();
        let bucket = service_bucket(config.seeds[0], 0, &address(100), port);
        services[bucket as usize].entries[0] = ServiceEntry {
            address: address(100),
            port,
            used: 1,
            ..vacant
        };
        let pair_index: Vec<Bucket> = (0..2 * PAIR_BUCKETS).map(|_| Bucket::default()).collect();
        let enter = |source: Addr, member: Addr, number: u32| {
            let (bucket, tag) = pair_bucket(config.seeds[0], 0, &source, &member, port);
            let entries = &pair_index[bucket as usize].entries;
            let vacant = entries
                .iter()
                .find(|entry| entry.load(Relaxed) == 0)
                .unwrap();
            vacant.store(tag << 16 | number, Relaxed);
        };
        let mut pairs = vec![pair(Addr::UNSET, Addr::UNSET, &[])];
        let mut sources = vec![Source {
            count: 0,
            pairs: [0; 2 * SOURCE_PAIRS],
        }];
        for host in [11, 12] {
            let mut source = Source {
                count: ADDRESSES,
                pairs: [0; 2 * SOURCE_PAIRS],
            };
            for place in 0..ADDRESSES {
                let number = pairs.len() as u32;
                for at in (place as usize..2 * SOURCE_PAIRS).step_by(ADDRESSES as usize) {
                    source.pairs[at] = number as u16;
                }
                let own = if by_key {
                    Addr::UNSET
                } else {
                    end(1 + place as u8)
                };
                pairs.push(pair(own, end(host), usable));
                if !by_key {
                    enter(own, end(host), number);
                }
            }
            sources.push(source);
            if by_key {
                enter(Addr::UNSET, end(host), BY_KEY);
            }
        }
        let flows = (chunks + 1) * CHUNK;
        Self {
            now: Cell::new(1000 * TICK),
            config,
            services,
            pair_index,
            flow_index: (0..64).map(|_| Bucket::default()).collect(),
            pool,
            turn: AtomicU32::new(0),
            members: vec![member(0), member(11), member(12)],
            cells: (0..3).map(|_| TrafficCell::default()).collect(),
            sources,
            pairs,
            chunks: (0..=chunks).map(|_| Chunk::default()).collect(),
            usable: usable.to_vec(),
            flows: RefCell::new((0..flows).map(|_| record(unset(), Phase::Free)).collect()),
            allocation: Allocation::default(),
            free: RefCell::default(),
            reports: RefCell::default(),
            fragments: RefCell::default(),
            tags: Cell::new(0),
            early: Cell::new(None),
            guard: Guard::OPEN,
            policies: Vec::new(),
            bounds: Vec::new(),
            rules: Vec::new(),
            hits: RefCell::default(),
            rates: RefCell::default(),
            prefix: None,
            events: RefCell::default(),
        }
    }

    /// With one SNAT address alone, and few ports of it.
    fn one_address(snat: u8) -> Self {
        let mut tables = Self::new(snat, 8, &[0, u64::MAX]);
        for source in &mut tables.sources[1..] {
            source.count = 1;
            source.pairs = [source.pairs[0]; 2 * SOURCE_PAIRS];
        }
        tables
    }

    fn send(&self, frame: &mut Vec<u8>) -> Result<Verdict, DropReason> {
        self.send_by(frame, Ok(VIA))
    }

    fn send_by(
        &self,
        frame: &mut Vec<u8>,
        way: Result<Egress, DropReason>,
    ) -> Result<Verdict, DropReason> {
        let mut frame = MemoryFrame::new(frame, way);
        let mut egress = Egress::default();
        let mut verdict = balance(&mut frame, self, &mut egress)?;
        // Nobody jumps more often: to what looks closer, to what opens, and back.
        for _ in 0..3 {
            verdict = match verdict {
                Verdict::Jump(Jump::Open) => crate::open(&mut frame, self)?,
                Verdict::Jump(Jump::Redeem) => crate::redeem(&mut frame, self)?,
                Verdict::Jump(Jump::Icmp) => crate::icmp(&mut frame, self, &mut egress)?,
                Verdict::Jump(Jump::Odd) => crate::odd(&mut frame, self, &mut egress)?,
                verdict => return Ok(verdict),
            };
        }
        Ok(verdict)
    }

    fn active(&self) -> u64 {
        self.cells.iter().map(TrafficCell::active).sum()
    }

    fn wait(&self, ticks: u64) {
        self.now.set(self.now.get() + ticks * TICK);
    }

    /// Looks at every chunk once.
    fn sweep_all(&self) {
        for _ in 0..self.chunks.len() {
            sweep(self);
        }
    }

    fn phase(&self, slot: u32) -> Phase {
        Phase::from_u32(self.flows.borrow()[slot as usize].phase.load(Relaxed))
    }

    fn live(&self) -> Vec<u32> {
        (0..self.flows.borrow().len() as u32)
            .filter(|slot| Phase::is_live(self.phase(*slot) as u32))
            .collect()
    }

    fn entries(&self) -> usize {
        let entries = self.flow_index.iter().flat_map(|bucket| &bucket.entries);
        entries.filter(|entry| entry.load(Relaxed) != 0).count()
    }
}

fn pair(source: Addr, member: Addr, usable: &[u64]) -> Pair {
    let pair = Pair {
        source,
        member,
        port: 465u16.to_be(),
        known: 1,
        ports: AtomicU32::new(1),
        cursor: AtomicU32::new(0),
        hand: AtomicU32::new(0),
        tops: Default::default(),
        words: std::array::from_fn(|_| Default::default()),
        chunks: [const { AtomicU32::new(0) }; PLACES],
    };
    for (place, _) in usable.iter().enumerate().filter(|(_, word)| **word != 0) {
        crate::marks::mark(&pair, Mark::Unbound, place as u32);
    }
    pair
}

/// A claimed record, leaked: records live as long as their tables, in the kernel too.
fn record(route: Route, phase: Phase) -> &'static Flow {
    Box::leak(Box::new(Flow {
        route,
        phase: AtomicU32::new(phase as u32),
        last_seen: AtomicU32::new(0),
        created: AtomicU32::new(0),
        generation: AtomicU32::new(0),
        packets: Default::default(),
        bytes: Default::default(),
        owners: AtomicU32::new(0),
        vlan: AtomicU32::new(0),
        first: AtomicU32::new(0),
        header: AtomicU32::new(0),
        ways: Default::default(),
        shift: Default::default(),
        next: Default::default(),
    }))
}

fn unset() -> Route {
    let key = FlowKey {
        src: Addr::UNSET,
        dst: Addr::UNSET,
        sport: 0,
        dport: 0,
    };
    Route { leave: [key; 2] }
}

impl Policies for MemoryTables {
    fn policy(&self, index: u32) -> Option<&Policy> {
        self.policies.get(index as usize)
    }
    fn bound(&self, index: u32) -> Option<&Bound> {
        self.bounds.get(index as usize)
    }
    fn scheduled(&self, _: u32) -> u64 {
        u64::MAX
    }
    fn place(&self, _: &PlaceKey) -> Option<u64> {
        None
    }
}

impl Access for MemoryTables {
    fn clock(&self) -> u64 {
        self.now.get()
    }
    fn guard(&self, _: u32) -> Option<&Guard> {
        Some(&self.guard)
    }
    fn rule(&self, index: u32) -> Option<&Rule> {
        self.rules.get(index as usize)
    }
    fn prefix(&self, key: &PrefixKey) -> Option<&Service> {
        self.prefix.as_ref().filter(|_| key.port == 465u16.to_be())
    }
    fn count_rule(&self, number: u32, staged: bool) {
        self.hits.borrow_mut().push((number, staged));
    }
    fn count_drop(&self, _: DropReason) {}
    fn within_rate(&self, key: &SourceKey, interval: u64, ahead: u64, counts: bool) -> bool {
        let mut sources = self.rates.borrow_mut();
        let due = sources.entry((key.network, key.family)).or_default();
        let next = admit(*due, self.now.get(), interval, ahead);
        *due = next.filter(|_| counts).unwrap_or(*due);
        next.is_some()
    }
    fn spend(&self, _: Spending) -> bool {
        true
    }
    fn announce(&self, event: &Event) {
        self.events.borrow_mut().push(*event);
    }
    fn explain(&self, _: &Explanation) {}
}

impl Tables for MemoryTables {
    fn now(&self) -> u64 {
        self.now.get()
    }
    fn config(&self) -> Option<&Config> {
        Some(&self.config)
    }
    fn service_bucket(&self, index: u32) -> Option<&ServiceBucket> {
        self.services.get(index as usize)
    }
    fn pair_bucket(&self, index: u32) -> Option<&Bucket> {
        self.pair_index.get(index as usize)
    }
    fn flow_bucket(&self, index: u32) -> Option<&Bucket> {
        self.flow_index.get(index as usize)
    }
    fn pool(&self, _: u32) -> Option<&Pool> {
        Some(&self.pool)
    }
    fn turn(&self, _: u32) -> Option<&AtomicU32> {
        Some(&self.turn)
    }
    fn member(&self, number: u32) -> Option<&Member> {
        self.members.get(number as usize)
    }
    fn member_cell(&self, number: u32) -> Option<&TrafficCell> {
        self.cells.get(number as usize)
    }
    fn service_cell(&self, _: u32) -> Option<&TrafficCell> {
        None
    }
    fn source(&self, index: u32) -> Option<&Source> {
        self.sources.get(index as usize)
    }
    fn pair(&self, number: u32) -> Option<&Pair> {
        self.pairs.get(number as usize)
    }
    fn chunk(&self, number: u32) -> Option<&Chunk> {
        self.chunks.get(number as usize)
    }
    fn usable(&self, _: u32, place: u32) -> u64 {
        self.usable.get(place as usize).copied().unwrap_or(0)
    }
    fn flow(&self, slot: u32) -> Option<&Flow> {
        self.flows.borrow().get(slot as usize).copied()
    }
    fn write_leave(&self, slot: u32, direction: Direction, arrive: &FlowKey) {
        let place = &mut self.flows.borrow_mut()[slot as usize];
        let mut route = place.route;
        route.leave[direction as usize] = arrive.reversed();
        *place = record(route, Phase::Claimed);
    }
    fn write_source(&self, slot: u32, source: Option<(&Addr, u16)>, member: &Member) {
        let client = self.flows.borrow()[slot as usize].route.client();
        let (src, sport) = source.map_or(client, |(address, port)| (*address, port));
        let place = &mut self.flows.borrow_mut()[slot as usize];
        let mut route = place.route;
        route.leave[0] = FlowKey {
            src,
            dst: member.address,
            sport,
            dport: member.port,
        };
        let old = *place;
        *place = record(route, Phase::Claimed);
        for (to, from) in [
            (&place.next[0], &old.next[0]),
            (&place.first, &old.first),
            (&place.header, &old.header),
            (&place.shift[0], &old.shift[0]),
            (&place.shift[1], &old.shift[1]),
        ] {
            to.store(from.load(Relaxed), Relaxed);
        }
    }
    fn allocation(&self) -> Option<&Allocation> {
        Some(&self.allocation)
    }
    fn fragment(&self, key: &FragmentKey) -> Option<Hit> {
        self.fragments
            .borrow()
            .get(&(key.src, key.dst, key.id))
            .copied()
    }
    fn note_fragment(&self, key: &FragmentKey, hit: Hit) {
        let key = (key.src, key.dst, key.id);
        self.fragments.borrow_mut().insert(key, hit);
    }
    fn note_early(&self, key: &FragmentKey) {
        self.early.set(Some((key.src, key.dst, key.id)));
    }
    fn keep_tags(&self, vlan: u32) {
        self.tags.set(vlan);
    }
    fn vlan_allowed(&self, vlan: u32) -> bool {
        vlan != FOREIGN_VLAN
    }
    fn pop_chunk(&self) -> Option<u32> {
        self.free.borrow_mut().pop_front()
    }
    fn push_chunk(&self, chunk: u32) {
        self.free.borrow_mut().push_back(chunk);
    }
    fn report(&self, slot: u32, phase: Phase, cause: Cause) {
        self.reports.borrow_mut().push((slot, phase, cause));
    }
}

fn address(host: u8) -> Addr {
    Addr::from(std::net::Ipv4Addr::new(10, 0, 1, host))
}

const CLIENT: u8 = 2;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const FIN: u8 = 0x01;
const ACK: u8 = 0x10;

/// A TCP packet from a client's port to the virtual server; checksums are left to the tests in the kernel.
fn packet(port: u16, flags: u8) -> Vec<u8> {
    let mut frame = vec![0; 54];
    frame[12..14].copy_from_slice(&[0x08, 0x00]);
    frame[14] = 0x45;
    frame[16..18].copy_from_slice(&40u16.to_be_bytes());
    frame[22..24].copy_from_slice(&[64, 6]);
    frame[26..30].copy_from_slice(&[10, 0, 1, CLIENT]);
    frame[30..34].copy_from_slice(&[10, 0, 1, 100]);
    frame[34..36].copy_from_slice(&port.to_be_bytes());
    frame[36..38].copy_from_slice(&465u16.to_be_bytes());
    // Everybody begins with 0 and has said nothing since.
    frame[41] = u8::from(flags & SYN == 0);
    frame[45] = u8::from(flags & ACK != 0);
    frame[46..48].copy_from_slice(&[0x50, flags]);
    frame
}

fn open(tables: &MemoryTables, port: u16) -> Result<Verdict, DropReason> {
    tables.send(&mut packet(port, SYN))
}

/// Completes the handshake of a client's port: the slot of its flow.
fn establish(tables: &MemoryTables, port: u16) -> u32 {
    let ours = |slot: &u32| {
        tables.flows.borrow()[*slot as usize].route.client().1 == port.to_be()
            && !tables.phase(*slot).ended()
    };
    let slot = tables.live().into_iter().find(ours).unwrap();
    assert_eq!(reply(tables, slot, SYN | ACK), Ok(Verdict::Send));
    assert_eq!(tables.send(&mut packet(port, ACK)), Ok(Verdict::Send));
    assert_eq!(tables.phase(slot), Phase::Established);
    slot
}

/// The reply of a member to the flow in a slot.
fn reply(tables: &MemoryTables, slot: u32, flags: u8) -> Result<Verdict, DropReason> {
    let route = tables.flows.borrow()[slot as usize].route;
    let octets = |address: Addr| match address.to_ip() {
        std::net::IpAddr::V4(address) => address.octets(),
        std::net::IpAddr::V6(_) => unreachable!(),
    };
    let mut frame = packet(0, flags);
    let ((member, port), (snat, to)) = (route.member(), route.snat());
    frame[26..30].copy_from_slice(&octets(member));
    frame[30..34].copy_from_slice(&octets(snat));
    frame[34..36].copy_from_slice(&port.to_ne_bytes());
    frame[36..38].copy_from_slice(&to.to_ne_bytes());
    tables.send(&mut frame)
}
