//! The flow records, read beside the programs that write them.

use std::sync::atomic::Ordering::Relaxed;

use lb_common::{
    flow::{Flow, LOOPBACK, Route, split_owners},
    layout::ENDS,
    pair::{Allocation, CHUNK},
    tcp::{Direction, Phase},
};

use super::sys;

/// Every flow record there is; a handle to shared memory.
#[derive(Debug, Clone, Copy)]
pub struct FlowTable {
    flows: &'static [Flow],
    allocation: &'static [Allocation],
}

/// One flow, read out of its record.
#[derive(Debug, Clone, Copy)]
pub struct FlowSnapshot {
    /// The number of its record.
    pub slot: u32,
    /// The four ends.
    pub route: Route,
    /// Where it is in its life.
    pub phase: Phase,
    /// Number of its virtual server.
    pub virtual_server: u16,
    /// Number of its member.
    pub member: u16,
    /// Tick of the first packet.
    pub created: u32,
    /// Tick of the last packet.
    pub last_seen: u32,
    /// Packets forward and reverse.
    pub packets: [u64; 2],
    /// Bytes forward and reverse.
    pub bytes: [u64; 2],
    /// What the other side has acknowledged, of the client's and of the member's numbers, as the sender counts.
    pub next: [u32; 2],
    /// Who sent the last reset; forward is the client.
    pub reset_by: Direction,
    /// What is added to sequence numbers, forward and reverse.
    pub shift: [u32; 2],
    /// How far an inserted header is, as [`lb_common::shift`] says.
    pub header: u32,
    /// Where the client is, if no routing table knows.
    pub(super) behind: Option<Behind>,
}

/// A client behind VLAN tags: where its frames come from, and replies go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Behind {
    /// Index of the interface.
    pub interface: u32,
    /// Destination and source of frames to it.
    pub macs: [[u8; 6]; 2],
    /// The tags as records hold them: the outer one in the low half.
    pub vlan: u32,
}

impl Behind {
    fn of(flow: &Flow) -> Option<Self> {
        let vlan = flow.vlan.load(Relaxed);
        if vlan == 0 || vlan == LOOPBACK {
            return None;
        }
        let way = &flow.ways[Direction::Reverse as usize];
        let [a, b, c] = [0, 1, 2].map(|word| way.macs[word].load(Relaxed).to_ne_bytes());
        Some(Self {
            interface: way.interface.load(Relaxed),
            macs: [
                [a[0], a[1], a[2], a[3], b[0], b[1]],
                [b[2], b[3], c[0], c[1], c[2], c[3]],
            ],
            vlan,
        })
    }
}

impl FlowTable {
    pub(super) const fn new(flows: &'static [Flow], allocation: &'static [Allocation]) -> Self {
        Self { flows, allocation }
    }

    /// Records that may hold a flow: those before this number.
    pub fn used(&self) -> u32 {
        let used = self
            .allocation
            .first()
            .map_or(0, |allocation| allocation.unused.load(Relaxed));
        ((used as usize + 1) * CHUNK as usize).min(self.flows.len()) as u32
    }

    /// Every flow in a range of records, half-open and closing ones included.
    pub fn range(self, slots: std::ops::Range<u32>) -> impl Iterator<Item = FlowSnapshot> {
        let end = slots.end.min(self.used());
        (slots.start..end).filter_map(move |slot| self.snapshot(slot))
    }

    /// Every flow.
    pub fn all(self) -> impl Iterator<Item = FlowSnapshot> {
        self.range(0..u32::MAX)
    }

    /// Does a flow that began before this tick go on?
    pub fn any_older(self, tick: u32) -> bool {
        self.all()
            .any(|flow| flow.created <= tick && !flow.phase.ended())
    }

    /// The flows of a member that have not ended, in portions that can be ended at once.
    pub fn of_member(self, member: u16) -> impl Iterator<Item = Vec<FlowSnapshot>> {
        let mut flows = self
            .all()
            .filter(move |flow| flow.member == member && !flow.phase.ended());
        std::iter::from_fn(move || {
            let portion: Vec<_> = flows.by_ref().take(ENDS as usize).collect();
            (!portion.is_empty()).then_some(portion)
        })
    }

    fn snapshot(self, slot: u32) -> Option<FlowSnapshot> {
        let flow = self.flows.get(slot as usize)?;
        let phase = Phase::from_u32(flow.phase.load(Relaxed));
        if matches!(phase, Phase::Free | Phase::Claimed | Phase::Forgotten) {
            return None;
        }
        let created = flow.created.load(Relaxed);
        let route = sys::route(flow);
        let claimed = flow.phase.load(Relaxed) == Phase::Claimed as u32;
        if claimed || flow.created.load(Relaxed) != created {
            return None;
        }
        let (member, virtual_server) = split_owners(flow.owners.load(Relaxed));
        Some(FlowSnapshot {
            slot,
            route,
            phase,
            virtual_server,
            member,
            created,
            last_seen: flow.last_seen.load(Relaxed),
            packets: [0, 1].map(|side| u64::from(flow.packets[side].load(Relaxed))),
            bytes: [0, 1].map(|side| flow.bytes[side].load(Relaxed)),
            next: [0, 1].map(|side| flow.next[side].load(Relaxed)),
            reset_by: flow.reset_by(),
            shift: [0, 1].map(|side| flow.shift[side].load(Relaxed)),
            header: flow.header.load(Relaxed),
            behind: Behind::of(flow),
        })
    }
}
