//! Finding, opening, tracking and releasing flows.
//!
//! A record is owned by whoever clears its port's bit, or moves its phase to `Claimed` by compare-and-swap. It is entered
//! into the index only when it is complete, and leaves it before it is given back, so nothing leads to another
//! connection's record; a packet that was led here just before is caught by comparing its addresses with the record.

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    atomic::AtomicU32,
    event::Cause,
    flow::{Flow, FlowKey, Hit, owners, split_owners},
    layout::POOL_MEMBERS,
    pair::Mark,
    reason::DropReason,
    service::Service,
    tcp::{Direction, Flags, Phase, advances, plausible, tick},
};

use crate::{Packet, Tables, atomic, expire, index, opaque, ports, report, service, shift};

/// Where a packet belongs: a word, so that a function of its own can give it back.
#[derive(Clone, Copy)]
pub(crate) struct Found(pub(crate) u64);

impl Found {
    /// The flow.
    #[inline(always)]
    pub(crate) const fn hit(self) -> Hit {
        Hit(self.0 as u32)
    }

    /// Is it for a virtual server?
    #[inline(always)]
    pub(crate) const fn served(self) -> bool {
        self.0 >> 32 != 0
    }
}

/// The live flow a packet belongs to. A SYN on a flow that has ended belongs to none: a client may use its port again.
#[inline(always)]
pub(crate) fn find<T: Tables>(tables: &T, packet: &Packet) -> Option<Hit> {
    let hit = Found(tables.look_up(&packet.key)).hit();
    if hit == Hit::NONE {
        return None;
    }
    let flow = tables.flow(hit.slot())?;
    (!reopens(flow, hit, packet.flags)).then_some(hit)
}

/// Whether a packet is for a virtual server, and the flow that it belongs to: as [`Found`] takes it apart.
#[inline(always)]
pub(crate) fn look_up<T: Tables>(tables: &T, key: &FlowKey) -> u64 {
    let Some(config) = tables.config() else {
        return 0;
    };
    let mut direction = Direction::Forward;
    let mut served = 0;
    match service::find(tables, config, &key.dst, key.dport) {
        Some(found) => {
            served = 1 << 32;
            if found.forward == Service::PROXY {
                return served;
            }
        }
        None => {
            let (slot, by_key) = service::reply(tables, config, key);
            if slot != 0 {
                return u64::from(Hit::new(slot, Direction::Reverse).0);
            }
            if !by_key {
                return 0;
            }
            direction = Direction::Reverse;
        }
    }
    match index::find(tables, config, key, direction) {
        0 => served,
        slot => served | u64::from(Hit::new(slot, direction).0),
    }
}

/// May a packet open a connection although a flow of the same addresses is there? When that one has ended: a client may
/// use its port again.
#[inline(always)]
pub(crate) fn reopens(flow: &Flow, hit: Hit, flags: Flags) -> bool {
    flags.opens()
        && hit.direction() == Direction::Forward
        && Phase::from_u32(flow.phase.load(Relaxed)).ended()
}

/// Opens a flow for the first packet of a connection, or for one that brings back a SYN cookie with this class of segment
/// size.
///
/// # Errors
///
/// Why there is none; [`DropReason::SynCookie`] when only half-open flows are in the way of a client that brings none.
#[inline(always)]
pub(crate) fn open<T: Tables>(
    tables: &T,
    service: &Service,
    packet: &Packet,
    class: u32,
) -> Result<(), DropReason> {
    let chosen = tables.select(service.pool);
    if chosen == 0 {
        return Err(DropReason::NoMember);
    }
    // The optimiser has seen that the place is one; the verifier has not.
    let place = opaque::index::<POOL_MEMBERS>(u64::from(chosen >> 16));
    let number = chosen & 0xffff;
    let pool = tables.pool(service.pool).ok_or(DropReason::Internal)?;
    let last = match class {
        lb_common::cookie::NONE => ports::level::YIELDING,
        _ => ports::level::CEDING,
    };
    let got = tables.take(u32::from(pool.sources[place]), last);
    let slot = got as u32;
    match got {
        ports::NO_CHUNK => return Err(DropReason::FlowTableFull),
        ports::NO_PAIR => return Err(DropReason::NoSnatAddress),
        ports::NO_PORT => return Err(DropReason::PortsExhausted),
        ports::CEDED => return Err(DropReason::SynCookie),
        _ => {}
    }
    tables.write_leave(slot, Direction::Reverse, &packet.key);
    let flow = tables.flow(slot).ok_or(DropReason::Internal)?;
    shift::prepare(flow, service, packet, class);
    let owners = owners(number as u16, service.virtual_server);
    match tables.fill(got, owners, u32::from(service.snat)) {
        filled::DONE => Ok(()),
        // The same SYN on another CPU was first, or the member could not tell the client's connections apart.
        filled::TWICE => Err(DropReason::Raced),
        _ => Err(DropReason::FlowTableFull),
    }
}

/// What filling a record came to.
mod filled {
    /// It carries the connection.
    pub(super) const DONE: u32 = 0;
    /// The index has no room.
    pub(super) const FULL: u32 = 1;
    /// The same connection is there already, from the client's or the member's point of view.
    pub(super) const TWICE: u32 = 2;
}

/// Completes a claimed record, of which the client's side is there, and enters it into the index; else gives it back and
/// says why. `got` is its slot and port as [`ports::take`] says them.
#[inline(always)]
pub(crate) fn fill<T: Tables>(tables: &T, got: u64, owners: u32, snat: u32) -> u32 {
    let (slot, port) = (got as u32, ((got >> 32) as u16).to_be());
    let (number, virtual_server) = split_owners(owners);
    let (Some(config), Some(member), Some(pair)) = (
        tables.config(),
        tables.member(u32::from(number)),
        tables.pair_of(slot),
    ) else {
        return filled::FULL;
    };
    let by_key = snat == u32::from(Service::SNAT_NONE);
    tables.write_source(slot, (!by_key).then_some((&pair.source, port)), member);
    let Some(flow) = tables.flow(slot) else {
        return filled::FULL;
    };
    let now = tick(tables.now());
    flow.owners.store(owners, Relaxed);
    flow.generation.store(config.generation, Relaxed);
    flow.created.store(now, Relaxed);
    flow.last_seen.store(now, Relaxed);
    for direction in 0..2 {
        flow.packets[direction].store(0, Relaxed);
        flow.bytes[direction].store(0, Relaxed);
        flow.ways[direction].resolved.store(0, Relaxed);
    }
    flow.vlan.store(0, Relaxed);
    let mut came_to = filled::DONE;
    if !tables.enter(slot, Direction::Forward) || by_key && !tables.enter(slot, Direction::Reverse)
    {
        came_to = filled::FULL;
    } else if tables.rival(slot, Direction::Forward)
        || by_key && tables.rival(slot, Direction::Reverse)
    {
        came_to = filled::TWICE;
    }
    if came_to != filled::DONE {
        tables.leave(slot, Direction::Forward);
        if by_key {
            tables.leave(slot, Direction::Reverse);
        }
        flow.phase.store(Phase::Free as u32, Relaxed);
        tables.put_port(slot, Mark::Free);
        return came_to;
    }
    if let Some(cell) = tables.member_cell(u32::from(number)) {
        atomic::add(&cell.flows_active, 1);
        atomic::add(&cell.flows_total, 1);
    }
    if let Some(cell) = tables.service_cell(u32::from(virtual_server)) {
        atomic::add(&cell.flows_active, 1);
        atomic::add(&cell.flows_total, 1);
    }
    embryonic(tables, 1);
    flow.phase.store(Phase::Syn as u32, Relaxed);
    filled::DONE
}

/// A flow becomes half-open, or ceases to be: adds 1, or the number that takes 1 off.
#[inline(always)]
fn embryonic<T: Tables>(tables: &T, one: u32) {
    if let Some(allocation) = tables.allocation() {
        atomic::gauge(&allocation.embryonic, one);
    }
}

/// What a packet tells about its flow, in the numbers of its sender.
#[derive(Clone, Copy, Debug)]
pub struct Note {
    /// Which way it travels, and its flags.
    pub way: (Direction, Flags),
    /// The sequence number that follows it; of a SYN what it may carry besides does not count.
    pub next: u32,
    /// Its acknowledgement number.
    pub acknowledgement: u32,
    /// IP header and payload, bytes.
    pub length: u32,
    /// Does it carry payload of TCP?
    pub data: bool,
}

impl Note {
    #[inline(always)]
    pub(crate) fn of(packet: &Packet, direction: Direction) -> Self {
        Self {
            way: (direction, packet.flags),
            next: match packet.flags.any(Flags::SYN) {
                true => packet.sequence.wrapping_add(1),
                false => packet.next(),
            },
            acknowledgement: packet.acknowledgement,
            length: packet.length,
            data: packet.data() != 0,
        }
    }
}

/// Notes a packet of a plain flow that changes no phase, as nearly all do; false when it may.
#[inline(always)]
pub(crate) fn touch(flow: &Flow, note: &Note, now: u64) -> bool {
    let (direction, flags) = note.way;
    let phase = flow.phase.load(Relaxed);
    if flags.0 & (Flags::SYN | Flags::FIN | Flags::RST | Flags::ACK) != Flags::ACK
        || phase.wrapping_sub(Phase::Established as u32)
            > Phase::Closing as u32 - Phase::Established as u32
    {
        return false;
    }
    count(flow, direction, note, now);
    acknowledge(
        &flow.next[(direction as usize & 1) ^ 1],
        note.acknowledgement,
    );
    true
}

/// Notes how much of what the other side sent has arrived.
#[inline(always)]
fn acknowledge(next: &AtomicU32, acknowledged: u32) {
    let before = next.load(Relaxed);
    if advances(acknowledged, before) {
        next.store(acknowledged, Relaxed);
    }
}

#[inline(always)]
fn count(flow: &Flow, direction: Direction, note: &Note, now: u64) {
    let side = direction as usize & 1;
    flow.last_seen.store(tick(now), Relaxed);
    flow.packets[side].store(flow.packets[side].load(Relaxed).wrapping_add(1), Relaxed);
    let bytes = &flow.bytes[side];
    bytes.store(
        bytes.load(Relaxed).wrapping_add(u64::from(note.length)),
        Relaxed,
    );
}

/// Notes a packet: time, counters, phase.
#[inline(always)]
pub(crate) fn track<T: Tables>(tables: &T, slot: u32, note: &Note) {
    let Some(flow) = tables.flow(slot) else {
        return;
    };
    let (direction, flags) = note.way;
    let side = direction as usize & 1;
    count(flow, direction, note, tables.now());
    let phase = Phase::from_u32(flow.phase.load(Relaxed));
    let [own, other] = [&flow.next[side], &flow.next[side ^ 1]];
    let acknowledged = note
        .acknowledgement
        .wrapping_sub(flow.shift[side ^ 1].load(Relaxed));
    if flags.any(Flags::SYN) {
        if phase == Phase::Syn {
            own.store(note.next, Relaxed);
        }
        return;
    }
    let believed = match (phase, direction) {
        // A reset that refuses the connection has no number (RFC 9293 §3.10.7.1), and without one a member talks only to
        // whom it has heard.
        (Phase::Syn, Direction::Reverse) => note.data || flags.any(Flags::RST),
        // Who acknowledges the member's SYN has received it: no one else knows its number.
        (Phase::Syn, Direction::Forward) if !flags.any(Flags::RST) => {
            flow.packets[1].load(Relaxed) != 0 && acknowledged == other.load(Relaxed)
        }
        // Who has sent a reset and talks on did not send it.
        (Phase::Reset, _) => {
            flow.was_established()
                && flow.reset_by() as u32 == direction as u32
                && flags.any(Flags::ACK)
                && plausible(acknowledged, other.load(Relaxed))
        }
        // Nobody outside speaks in a member's name, if the network's edge lets no such packet in.
        (_, Direction::Reverse) => true,
        // Nor does anyone outside know how far the talk is.
        _ if flags.any(Flags::FIN | Flags::RST) => plausible(note.next, own.load(Relaxed)),
        _ => flags.any(Flags::ACK),
    };
    if !believed {
        return;
    }
    let mut flags = flags;
    if phase == Phase::Syn && note.data && direction == Direction::Reverse {
        // Whichever of its numbers was noted, this is the one it uses.
        own.store(note.next, Relaxed);
    }
    if flags.any(Flags::RST) {
        // A member believes only the number that it expects next (RFC 5961 §3). Another may be that number by the time it
        // arrives: then this side says no more.
        let exact = direction == Direction::Reverse || note.next == own.load(Relaxed);
        match exact || phase == Phase::Syn {
            true => flow.note_reset(direction),
            false => flags = Flags(Flags::FIN),
        }
    } else {
        acknowledge(other, acknowledged);
    }
    if phase.after(direction, flags) != phase {
        turn(tables, slot, flow, direction, flags);
    }
}

/// How often a phase is tried to be changed while other CPUs change it: each of them moves on at most this often.
const TURNS: u32 = 4;

/// Moves a flow to its next phase. Another CPU may do the same for the other direction: then from where that one left it.
#[inline(always)]
fn turn<T: Tables>(tables: &T, slot: u32, flow: &Flow, direction: Direction, flags: Flags) {
    for _ in 0..TURNS {
        let number = flow.phase.load(Relaxed);
        let phase = Phase::from_u32(number);
        let next = phase.after(direction, flags);
        if !atomic::swap_if(&flow.phase, number, next as u32) {
            continue;
        }
        moved(tables, slot, flow, phase, next);
        return;
    }
}

/// A flow went from one phase to another: who counts it, and may its port be taken?
#[inline(always)]
fn moved<T: Tables>(tables: &T, slot: u32, flow: &Flow, from: Phase, to: Phase) {
    if from == Phase::Syn && to != Phase::Syn {
        embryonic(tables, u32::MAX);
        if !to.ended() {
            flow.note_established();
        }
    }
    if !from.ended() && to.ended() {
        count_active(tables, flow, u64::MAX);
        tables.put_port(slot, Mark::Resting);
    }
    if from.ended() && !to.ended() {
        count_active(tables, flow, 1);
        tables.unrest(slot);
    }
}

/// Takes a flow apart; true when the caller now owns the claimed record, false when another CPU was first.
#[inline(always)]
pub(crate) fn release<T: Tables>(tables: &T, slot: u32, phase: Phase, cause: Cause) -> bool {
    let Some(flow) = tables.flow(slot) else {
        return false;
    };
    if !atomic::swap_if(&flow.phase, phase as u32, Phase::Claimed as u32) {
        return false;
    }
    tables.leave(slot, Direction::Forward);
    if flow.route.snat() == flow.route.client() {
        tables.leave(slot, Direction::Reverse);
    }
    if phase == Phase::Syn {
        embryonic(tables, u32::MAX);
    }
    if !phase.ended() {
        count_active(tables, flow, u64::MAX);
    }
    let (member, virtual_server) = split_owners(flow.owners.load(Relaxed));
    if let Some(cell) = tables.member_cell(u32::from(member)) {
        count_traffic(cell, flow);
    }
    if let Some(cell) = tables.service_cell(u32::from(virtual_server)) {
        count_traffic(cell, flow);
    }
    if !flow.is_reported() {
        report::end(tables, slot, phase, cause);
    }
    true
}

/// Ends a flow on behalf of the daemon: true when it was still this member's, from that moment, and is now free.
#[inline(always)]
pub fn end<T: Tables>(tables: &T, slot: u32, created: u32, member: u32, cause: Cause) -> bool {
    let Some(flow) = tables.flow(slot) else {
        return false;
    };
    let number = flow.phase.load(Relaxed);
    let (owner, _) = split_owners(flow.owners.load(Relaxed));
    let known = u32::from(owner) == member && flow.created.load(Relaxed) == created;
    if !known || !Phase::is_live(number) {
        return false;
    }
    if !tables.release(slot, Phase::from_u32(number), cause) {
        return false;
    }
    expire::restore(tables, flow, slot);
    true
}

/// Takes an ended flow apart whose client opens another from the same port: the connection is forgotten, but the port
/// towards the member rests on. False when it has not ended.
#[inline(always)]
pub(crate) fn forget<T: Tables>(tables: &T, slot: u32) -> bool {
    let Some(flow) = tables.flow(slot) else {
        return false;
    };
    let phase = Phase::from_u32(flow.phase.load(Relaxed));
    let ended = phase.ended() && tables.release(slot, phase, Cause::Reused);
    if ended {
        flow.phase.store(Phase::Forgotten as u32, Relaxed);
        // Who was looking for a resting port may have met the claimed record, and taken the mark off.
        tables.put_port(slot, Mark::Resting);
    }
    ended
}

/// [`forget`] for the flow that packets with these ends belong to, if there is one.
#[inline(always)]
pub(crate) fn forget_last<T: Tables>(tables: &T, key: &FlowKey) {
    let hit = Found(tables.look_up(key)).hit();
    if hit != Hit::NONE {
        tables.forget(hit.slot());
    }
}

/// The connection begins or ceases to count as active: adds 1, or the number that takes 1 off.
#[inline(always)]
fn count_active<T: Tables>(tables: &T, flow: &Flow, one: u64) {
    let (member, virtual_server) = split_owners(flow.owners.load(Relaxed));
    if let Some(cell) = tables.member_cell(u32::from(member)) {
        atomic::add(&cell.flows_active, one);
    }
    if let Some(cell) = tables.service_cell(u32::from(virtual_server)) {
        atomic::add(&cell.flows_active, one);
    }
}

/// Adds what a flow carried to the totals of its owner.
#[inline(always)]
fn count_traffic(cell: &lb_common::stats::TrafficCell, flow: &Flow) {
    atomic::add(
        &cell.flow_packets_in,
        u64::from(flow.packets[0].load(Relaxed)),
    );
    atomic::add(
        &cell.flow_packets_out,
        u64::from(flow.packets[1].load(Relaxed)),
    );
    atomic::add(&cell.flow_bytes_in, flow.bytes[0].load(Relaxed));
    atomic::add(&cell.flow_bytes_out, flow.bytes[1].load(Relaxed));
}
