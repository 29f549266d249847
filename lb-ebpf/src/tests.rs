//! The pipeline over plain memory: the same code as in the kernel, with no kernel.

mod odd;

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
    layout::Jump,
    member::Member,
    reason::DropReason,
    service::{Config, Pool, PrefixKey, Service, ServiceKey},
    stats::TrafficCell,
    tcp::{Direction, Phase},
};

use crate::{
    Egress, Verdict, balance,
    frame::MemoryFrame,
    sweep,
    tables::{Access, Allocation, Tables},
};

const FLOWS: usize = 16;
/// A VLAN that clients may not use.
const FOREIGN_VLAN: u32 = 66;
const TICK: u64 = 1 << lb_common::tcp::TICK_SHIFT;
const VIA: Egress = Egress {
    interface: 7,
    known: true,
    macs: [1, 2, 3],
    mtu: 1500,
};

/// Tables in memory, with a clock that stands still until it is set.
struct MemoryTables {
    now: Cell<u64>,
    config: Config,
    services: HashMap<(Addr, u16), Service>,
    pool: Pool,
    turn: AtomicU32,
    members: Vec<Member>,
    cells: Vec<TrafficCell>,
    keys: RefCell<HashMap<(Addr, Addr, u16, u16), Hit>>,
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
    sources: RefCell<HashMap<([u32; 2], u16), u64>>,
    events: RefCell<Vec<Event>>,
}

impl MemoryTables {
    fn new(snat: u8) -> Self {
        let member = |host: u8| Member {
            address: Addr::from(std::net::Ipv4Addr::new(10, 0, 2, host)),
            automap: Addr::from(std::net::Ipv4Addr::new(10, 0, 2, 1)),
            port: 465u16.to_be(),
            available: u16::from(host != 0),
            pool_hash: 0,
        };
        let service = Service {
            pool: 1,
            virtual_server: 1,
            forward: Service::PASSTHROUGH,
            snat,
            flags: 0,
        };
        let mut pool = Pool {
            method: Pool::LEAST_CONNECTIONS,
            count: 2,
            turn: 1,
            members: [0; lb_common::layout::POOL_MEMBERS],
        };
        pool.members[..2].copy_from_slice(&[1, 2]);
        Self {
            now: Cell::new(1000 * TICK),
            config: Config {
                epoch: 0,
                port_low: 1024,
                port_count: 4,
                generation: 1,
                flows: FLOWS as u32,
                workers: 1,
                owner: 1,
                instance: 1,
                prefixes: 0,
            },
            services: HashMap::from([((address(100), 465u16.to_be()), service)]),
            pool,
            turn: AtomicU32::new(0),
            members: vec![member(0), member(11), member(12)],
            cells: (0..3).map(|_| TrafficCell::default()).collect(),
            keys: RefCell::default(),
            flows: RefCell::new((0..FLOWS).map(|_| record(unset(), Phase::Free)).collect()),
            allocation: Allocation {
                unused: AtomicU32::new(0),
                hand: AtomicU32::new(0),
                sweep: AtomicU32::new(0),
                port: AtomicU32::new(0),
            },
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
            sources: RefCell::default(),
            events: RefCell::default(),
        }
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

fn flat(key: &FlowKey) -> (Addr, Addr, u16, u16) {
    (key.src, key.dst, key.sport, key.dport)
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
        self.services.get(&(Addr::UNSET, key.port))
    }
    fn count_rule(&self, number: u32, staged: bool) {
        self.hits.borrow_mut().push((number, staged));
    }
    fn count_drop(&self, _: DropReason) {}
    fn within_rate(&self, key: &SourceKey, interval: u64, ahead: u64, counts: bool) -> bool {
        let mut sources = self.sources.borrow_mut();
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
    fn service(&self, key: &ServiceKey) -> Option<&Service> {
        self.services.get(&(key.address, key.port))
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
    fn hit(&self, key: &FlowKey) -> Option<Hit> {
        self.keys.borrow().get(&flat(key)).copied()
    }
    fn insert(&self, key: &FlowKey, hit: Hit) -> bool {
        let mut keys = self.keys.borrow_mut();
        let vacant = !keys.contains_key(&flat(key));
        if vacant {
            keys.insert(flat(key), hit);
        }
        vacant
    }
    fn remove(&self, key: &FlowKey) {
        self.keys.borrow_mut().remove(&flat(key));
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
    fn pop_free(&self) -> Option<u32> {
        self.free.borrow_mut().pop_front()
    }
    fn push_free(&self, slot: u32) {
        self.free.borrow_mut().push_back(slot);
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
    frame[46..48].copy_from_slice(&[0x50, flags]);
    frame
}

fn open(tables: &MemoryTables, port: u16) -> Result<Verdict, DropReason> {
    tables.send(&mut packet(port, SYN))
}

#[test]
fn ports_are_refused_only_when_every_one_is_in_use() {
    let tables = MemoryTables::new(Service::SNAT_AUTOMAP);
    for port in 0..8 {
        assert_eq!(open(&tables, 1000 + port), Ok(Verdict::Send), "flow {port}");
    }
    assert_eq!(open(&tables, 2000), Err(DropReason::PortsExhausted));
    assert_eq!(tables.active(), 8, "a refused flow leaves nothing behind");
    assert_eq!(tables.keys.borrow().len(), 16);
    assert_eq!(tables.send(&mut packet(1000, RST)), Ok(Verdict::Send));
    assert_eq!(
        open(&tables, 2000),
        Err(DropReason::PortsExhausted),
        "a reset flow rests first"
    );
    tables.now.set(tables.now.get() + 4 * TICK);
    assert_eq!(
        open(&tables, 2000),
        Ok(Verdict::Send),
        "no sweep is needed to get the port back"
    );
}

#[test]
fn half_open_flows_make_room_and_established_ones_do_not() {
    let tables = MemoryTables::new(Service::SNAT_NONE);
    let fits = FLOWS as u16 - 1;
    for port in 0..fits {
        open(&tables, 1000 + port).unwrap();
    }
    for port in 0..5 {
        tables.send(&mut packet(1000 + port, ACK)).unwrap();
    }
    assert_eq!(
        open(&tables, 2000),
        Err(DropReason::FlowTableFull),
        "all of them are young"
    );
    tables.now.set(tables.now.get() + 4 * TICK);
    let mut opened = 0;
    for port in 0..40 {
        opened += u16::from(open(&tables, 3000 + port).is_ok());
    }
    assert_eq!(opened, fits - 5);
    for port in 0..5 {
        assert_eq!(
            tables.send(&mut packet(1000 + port, ACK)),
            Ok(Verdict::Send)
        );
    }
}

#[test]
fn an_idle_flow_goes_when_its_phase_says_so() {
    let tables = MemoryTables::new(Service::SNAT_NONE);
    for (port, flags, limit) in [
        (1, None, Phase::Syn),
        (2, Some(ACK), Phase::Established),
        (3, Some(RST), Phase::Reset),
    ] {
        open(&tables, port).unwrap();
        if let Some(flags) = flags {
            tables.send(&mut packet(port, flags)).unwrap();
        }
        let limit = u64::from(limit.idle_limit());
        tables.now.set(tables.now.get() + limit * TICK);
        sweep(&tables);
        assert_eq!(tables.keys.borrow().len(), 2, "flow {port} at its limit");
        tables.now.set(tables.now.get() + TICK);
        sweep(&tables);
        assert_eq!(
            tables.keys.borrow().len(),
            0,
            "flow {port} beyond its limit"
        );
        assert_eq!(tables.active(), 0);
    }
}

#[test]
fn a_flow_without_a_way_out_waits_for_the_hook_behind() {
    let tables = MemoryTables::new(Service::SNAT_NONE);
    let mut frame = packet(1000, SYN);
    let untouched = frame.clone();
    let refused = tables.send_by(&mut frame, Err(DropReason::NoRoute));
    assert_eq!(refused, Err(DropReason::NoRoute));
    assert_eq!(
        frame, untouched,
        "nothing is changed before the way is known"
    );
}

/// Random frames and mutations of a good one, and the invariants that hold after each.
#[test]
fn hostile_bytes_neither_panic_nor_leak() {
    let tables = MemoryTables::new(Service::SNAT_AUTOMAP);
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for round in 0..200_000 {
        let flags = random() as u8;
        let mut frame = packet(random() as u16 % 32, flags);
        for _ in 0..random() % 4 {
            let at = random() as usize % frame.len();
            frame[at] = random() as u8;
        }
        frame.truncate(random() as usize % 80);
        let _ = tables.send(&mut frame);
        tables.now.set(tables.now.get() + random() % TICK);
        if round % 16 == 0 {
            sweep(&tables);
        }
        let live = tables
            .flows
            .borrow()
            .iter()
            .filter(|flow| {
                let phase = Phase::from_u32(flow.phase.load(std::sync::atomic::Ordering::Relaxed));
                !matches!(phase, Phase::Free | Phase::Claimed)
            })
            .count();
        assert_eq!(
            tables.keys.borrow().len(),
            2 * live,
            "round {round}: two keys for each flow"
        );
        assert!(tables.active() <= live as u64, "round {round}");
    }
}

#[test]
fn every_end_is_reported_once_with_its_cause() {
    let tables = MemoryTables::new(Service::SNAT_AUTOMAP);
    for port in [1000, 1001, 1002] {
        assert_eq!(open(&tables, port), Ok(Verdict::Send));
    }
    // The port is used again after a reset, one client never comes back, one flow is ended by the operator.
    assert_eq!(tables.send(&mut packet(1000, RST)), Ok(Verdict::Send));
    assert_eq!(open(&tables, 1000), Ok(Verdict::Send));
    let slot = 3;
    let flow = tables.flow(slot).unwrap();
    let (member, _) = split_owners(flow.owners.load(Relaxed));
    let (member, created) = (u32::from(member), flow.created.load(Relaxed));
    let end = |created, member| crate::flow::end(&tables, slot, created, member, Cause::Drained);
    assert!(!end(created, member ^ 3), "of another member");
    assert!(!end(created + 1, member), "a later flow in the same record");
    assert!(end(created, member));
    assert!(!end(created, member), "there is nothing left to end");
    tables.now.set(tables.now.get() + 100 * TICK);
    sweep(&tables);
    let mut reports = tables.reports.borrow().clone();
    reports.sort_by_key(|(_, _, cause)| *cause as u8);
    let ends: Vec<_> = reports
        .iter()
        .map(|(_, phase, cause)| (*phase, *cause))
        .collect();
    assert_eq!(
        ends,
        [
            (Phase::Syn, Cause::Expired),
            (Phase::Syn, Cause::Expired),
            (Phase::Reset, Cause::Reused),
            (Phase::Syn, Cause::Drained),
        ]
    );
    assert_eq!(tables.active(), 0);
}
