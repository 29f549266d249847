//! One passthrough connection: the keys that find it from both sides, and its record.

use core::sync::atomic::Ordering::Relaxed;

use crate::{
    addr::Addr,
    atomic::{AtomicU32, AtomicU64},
    map_record,
    tcp::Direction,
};

map_record!(
    /// A packet's addresses and ports, as it arrives.
    FlowKey {
        /// Source address.
        src: Addr,
        /// Destination address.
        dst: Addr,
        /// Source port, network order.
        sport: u16,
        /// Destination port, network order.
        dport: u16,
    } size 36 align 4
);

impl FlowKey {
    /// Becomes another, word by word: see [`Addr::copy`].
    #[inline(always)]
    pub fn copy(&mut self, from: &Self) {
        self.src.copy(&from.src);
        self.dst.copy(&from.dst);
        (self.sport, self.dport) = (from.sport, from.dport);
    }

    /// The key of packets that go the other way.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            sport: self.dport,
            dport: self.sport,
        }
    }
}

impl Default for FlowKey {
    #[inline(always)]
    fn default() -> Self {
        Self {
            src: Addr::UNSET,
            dst: Addr::UNSET,
            sport: 0,
            dport: 0,
        }
    }
}

map_record!(
    /// What the fragments of a TCP packet have in common.
    FragmentKey {
        /// Source address.
        src: Addr,
        /// Destination address.
        dst: Addr,
        /// Identification, network order.
        id: u32,
    } size 36 align 4
);

map_record!(
    /// What a flow's packets say when they leave, by direction. Written while the record is claimed, then constant.
    ///
    /// Forward: from the SNAT source to the member. Reverse: from the virtual address to the client. Packets arrive
    /// with the other direction's addresses, reversed.
    Route {
        /// Forward and reverse.
        leave: [FlowKey; 2],
    } size 72 align 4
);

impl Route {
    /// The key of packets in this direction, as they arrive.
    #[inline(always)]
    pub const fn key(&self, direction: Direction) -> FlowKey {
        match direction {
            Direction::Forward => self.leave[1].reversed(),
            Direction::Reverse => self.leave[0].reversed(),
        }
    }

    /// Does a packet that arrived with this key belong to this direction?
    #[inline(always)]
    pub fn matches(&self, direction: Direction, key: &FlowKey) -> bool {
        let other = &self.leave[(direction as usize & 1) ^ 1];
        other.src == key.dst
            && other.dst == key.src
            && other.sport == key.dport
            && other.dport == key.sport
    }

    /// The client's end.
    pub const fn client(&self) -> (Addr, u16) {
        (self.leave[1].dst, self.leave[1].dport)
    }

    /// The virtual server's end.
    pub const fn address(&self) -> (Addr, u16) {
        (self.leave[1].src, self.leave[1].sport)
    }

    /// The member's end.
    pub const fn member(&self) -> (Addr, u16) {
        (self.leave[0].dst, self.leave[0].dport)
    }

    /// What the member takes for the client.
    pub const fn snat(&self) -> (Addr, u16) {
        (self.leave[0].src, self.leave[0].sport)
    }
}

/// The way out of one direction, as the routing table last gave it.
///
/// Used within the tick it was looked up in, then asked for again: so no daemon has to watch routes and neighbours, and
/// a busy flow still asks only once a tick.
#[repr(C)]
#[derive(Debug, Default)]
pub struct Way {
    /// Interface index.
    pub interface: AtomicU32,
    /// Destination and source MAC address, in the order of an Ethernet header.
    pub macs: [AtomicU32; 3],
    /// Largest IP packet that fits, bytes.
    pub mtu: AtomicU32,
    /// Tick of the look-up; 0 for none.
    pub resolved: AtomicU32,
}

/// A flow record: three cache lines, one per flow, found by slot number.
///
/// Counters are added to without a locked instruction: one direction of a flow stays on one CPU (the NIC's
/// receive hash), and a packet that strays costs a count, never a flow.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Flow {
    /// The four ends.
    pub route: Route,
    /// A [`crate::tcp::Phase`]; changed by compare-and-swap only.
    pub phase: AtomicU32,
    /// Tick of the last packet, see [`crate::tcp::tick`].
    pub last_seen: AtomicU32,
    /// Tick of the first packet.
    pub created: AtomicU32,
    /// Number of the generation that made it; the highest bits tell of resets, the log and whether it was established.
    pub generation: AtomicU32,
    /// Packets forward and reverse.
    pub packets: [AtomicU32; 2],
    /// Bytes forward and reverse, IP header included.
    pub bytes: [AtomicU64; 2],
    /// Member number in the low half, virtual server number in the high half.
    pub owners: AtomicU32,
    /// The VLAN tags of the client's side, inner in the high half, as [`crate::vlan`] holds them; 0 for none, [`LOOPBACK`]
    /// for a client on the box.
    pub vlan: AtomicU32,
    /// The client's first data byte (sequence number), where a header is inserted before it.
    pub first: AtomicU32,
    /// When the inserted header was last sent, or one of the words of [`crate::shift`].
    pub header: AtomicU32,
    /// The ways out, by direction.
    pub ways: [Way; 2],
    /// Added to sequence numbers of this direction, and taken off acknowledgements of the other.
    pub shift: [AtomicU32; 2],
    /// How far the other side has acknowledged this direction, as its sender counts; until it has, what follows its SYN.
    pub next: [AtomicU32; 2],
}

const _: () = assert!(
    size_of::<Flow>() == 192,
    "Flow: layout changed, bump ABI_VERSION"
);

/// In [`Flow::vlan`]: the client is on the box. No frame has these tags, since 4095 is no VLAN.
pub const LOOPBACK: u32 = u32::MAX;

/// In [`Flow::generation`]: the member sent the last reset that counted, not the client.
const RESET_BY_MEMBER: u32 = 1 << 31;
/// In [`Flow::generation`]: the log has been told of the end.
const REPORTED: u32 = 1 << 30;
/// In [`Flow::generation`]: it was established once.
const ESTABLISHED: u32 = 1 << 29;

impl Flow {
    /// Notes who sent a reset.
    #[inline(always)]
    pub fn note_reset(&self, direction: Direction) {
        let generation = self.generation.load(Relaxed) & !RESET_BY_MEMBER;
        let by = (direction as u32) << 31;
        self.generation.store(generation | by, Relaxed);
    }

    /// Has the log been told of its end?
    #[inline(always)]
    pub fn is_reported(&self) -> bool {
        self.generation.load(Relaxed) & REPORTED != 0
    }

    /// Notes that the log has been told of its end.
    #[inline(always)]
    pub fn note_reported(&self) {
        self.generation
            .store(self.generation.load(Relaxed) | REPORTED, Relaxed);
    }

    /// Was it ever established?
    #[inline(always)]
    pub fn was_established(&self) -> bool {
        self.generation.load(Relaxed) & ESTABLISHED != 0
    }

    /// Notes that it is established.
    #[inline(always)]
    pub fn note_established(&self) {
        self.generation
            .store(self.generation.load(Relaxed) | ESTABLISHED, Relaxed);
    }

    /// Who sent the last reset; forward is the client.
    #[inline(always)]
    pub fn reset_by(&self) -> Direction {
        match self.generation.load(Relaxed) & RESET_BY_MEMBER {
            0 => Direction::Forward,
            _ => Direction::Reverse,
        }
    }
}

/// Packs member and virtual server for [`Flow::owners`].
#[inline(always)]
pub const fn owners(member: u16, virtual_server: u16) -> u32 {
    member as u32 | (virtual_server as u32) << 16
}

/// Takes [`Flow::owners`] apart: member, virtual server.
#[inline(always)]
pub const fn split_owners(owners: u32) -> (u16, u16) {
    (owners as u16, (owners >> 16) as u16)
}

/// What a key leads to: the slot of the flow record, and the direction of packets with that key.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hit(pub u32);

impl Hit {
    /// No flow.
    pub const NONE: Self = Self(0);

    /// Packs slot and direction.
    #[inline(always)]
    pub const fn new(slot: u32, direction: Direction) -> Self {
        Self(slot << 1 | direction as u32)
    }

    /// The slot of the flow record.
    #[inline(always)]
    pub const fn slot(self) -> u32 {
        self.0 >> 1
    }

    /// The direction of packets with that key.
    #[inline(always)]
    pub const fn direction(self) -> Direction {
        if self.0 & 1 == 0 {
            Direction::Forward
        } else {
            Direction::Reverse
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directions_mirror_each_other() {
        let end = |number: u32| (Addr([number; 4]), number as u16);
        let key = |(src, sport), (dst, dport)| FlowKey {
            src,
            dst,
            sport,
            dport,
        };
        let (client, address, member, snat) = (end(1), end(2), end(3), end(4));
        let route = Route {
            leave: [key(snat, member), key(address, client)],
        };
        assert_eq!(route.key(Direction::Forward), key(client, address));
        assert_eq!(route.key(Direction::Reverse), key(member, snat));
        for direction in [Direction::Forward, Direction::Reverse] {
            assert!(route.matches(direction, &route.key(direction)));
            assert!(!route.matches(direction, &route.leave[0]));
        }
        assert_eq!((route.client(), route.address()), (client, address));
        assert_eq!((route.member(), route.snat()), (member, snat));
        assert_eq!(Hit::new(7, Direction::Reverse).slot(), 7);
        assert_eq!(
            Hit::new(7, Direction::Reverse).direction(),
            Direction::Reverse
        );
        assert_eq!(split_owners(owners(3, 9)), (3, 9));
    }
}
