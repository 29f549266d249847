//! Finding, opening, tracking and releasing flows.
//!
//! A record is owned by whoever clears its port's bit, or moves its phase to `Claimed` by compare-and-swap. It is entered
//! into the index only when it is complete, and leaves it before it is given back, so nothing leads to another
//! connection's record; a packet that was led here just before is caught by comparing its addresses with the record.

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    flow::{Flow, FlowKey, Hit, owners, split_owners},
    layout::POOL_MEMBERS,
    reason::DropReason,
    service::{Config, Service},
    tcp::{Direction, Flags, Phase, follows, resets, tick},
};

use crate::{Packet, Tables, atomic, index, ports, service};

/// Where a packet belongs.
#[derive(Clone, Copy)]
pub(crate) struct Found<'a> {
    /// The flow; slot 0 for none.
    pub(crate) hit: Hit,
    /// The virtual server that it is for, where it is for one of the kernel plane's.
    pub(crate) service: Option<&'a Service>,
}

/// The virtual server that a packet is for, and the live flow that it belongs to.
#[inline(always)]
pub(crate) fn find<'a, T: Tables>(tables: &'a T, config: &Config, key: &FlowKey) -> Found<'a> {
    let service = service::find(tables, config, &key.dst, key.dport);
    let mut hit = Hit::NONE;
    if let Some(found) = service {
        if found.forward == Service::PROXY {
            return Found { hit, service: None };
        }
        hit = Hit::new(
            index::find(tables, config, key, Direction::Forward),
            Direction::Forward,
        );
    } else {
        let slot = service::reply(tables, config, key);
        if slot != 0 {
            hit = Hit::new(slot, Direction::Reverse);
        }
    }
    Found { hit, service }
}

/// May a packet open a connection although a flow of the same addresses is there? When that one has ended: a client may
/// use its port again.
#[inline(always)]
pub(crate) fn reopens(flow: &Flow, hit: Hit, flags: Flags) -> bool {
    flags.opens()
        && hit.direction() == Direction::Forward
        && Phase::from_u32(flow.phase.load(Relaxed)).ended()
}

/// Opens a flow for the first packet of a connection: its slot.
#[inline(always)]
pub(crate) fn open<T: Tables>(
    tables: &T,
    config: &Config,
    service: &Service,
    packet: &Packet,
) -> Result<u32, DropReason> {
    let chosen = tables.select(service.pool);
    if chosen == 0 {
        return Err(DropReason::NoMember);
    }
    let (number, place) = (chosen & 0xffff, chosen as usize >> 16 & (POOL_MEMBERS - 1));
    let pool = tables.pool(service.pool).ok_or(DropReason::Internal)?;
    let allocation = tables.allocation().ok_or(DropReason::Internal)?;
    let pressed = allocation.embryonic.load(Relaxed) >= config.embryonic;
    let got = tables.take(u32::from(pool.sources[place]), u32::from(pressed));
    let slot = got as u32;
    match got {
        ports::NO_CHUNK => return Err(DropReason::FlowTableFull),
        ports::NO_PAIR => return Err(DropReason::NoSnatAddress),
        ports::NO_PORT if pressed => return Err(DropReason::FlowTableFull),
        ports::NO_PORT => return Err(DropReason::PortsExhausted),
        _ => {}
    }
    let filled = fill(tables, service, packet, number, got);
    if filled.is_err() {
        if let Some(flow) = tables.flow(slot) {
            flow.phase.store(Phase::Free as u32, Relaxed);
        }
        ports::give(tables, slot);
        // The same SYN on another CPU may have been first.
        let first = index::find(tables, config, &packet.key, Direction::Forward);
        if first != 0 {
            return Ok(first);
        }
    }
    filled.map(|()| slot)
}

/// Completes a claimed record and enters it into the index. `got` is its slot and port as [`ports::take`] says them.
///
/// A function of its own: its keys need stack that the rest of the path would lack.
#[inline(never)]
fn fill<T: Tables>(
    tables: &T,
    service: &Service,
    packet: &Packet,
    number: u32,
    got: u64,
) -> Result<(), DropReason> {
    let (slot, port) = (got as u32, ((got >> 32) as u16).to_be());
    let config = tables.config().ok_or(DropReason::Internal)?;
    let member = tables.member(number).ok_or(DropReason::Internal)?;
    let pair = tables.pair_of(slot).ok_or(DropReason::Internal)?;
    let by_key = service.snat == Service::SNAT_NONE;
    let mut reply = FlowKey {
        src: member.address,
        dst: pair.source,
        sport: member.port,
        dport: port,
    };
    if by_key {
        reply.dst = packet.key.src;
        reply.dport = packet.key.sport;
    }
    tables.write_leave(slot, Direction::Forward, &reply);
    tables.write_leave(slot, Direction::Reverse, &packet.key);
    let flow = tables.flow(slot).ok_or(DropReason::Internal)?;
    let now = tick(tables.now());
    flow.owners
        .store(owners(number as u16, service.virtual_server), Relaxed);
    flow.generation.store(config.generation, Relaxed);
    flow.created.store(now, Relaxed);
    flow.last_seen.store(now, Relaxed);
    for direction in 0..2 {
        flow.packets[direction].store(0, Relaxed);
        flow.bytes[direction].store(0, Relaxed);
        flow.ways[direction].resolved.store(0, Relaxed);
        flow.shift[direction].store(0, Relaxed);
    }
    flow.next[0].store(packet.next(), Relaxed);
    flow.vlan.store(0, Relaxed);
    if by_key {
        // Two virtual servers with a member in common: the member could not tell the client's connections apart.
        match tables.enter(slot, Direction::Reverse) {
            index::entered::DONE => {}
            index::entered::FULL => return Err(DropReason::FlowTableFull),
            _ => return Err(DropReason::PortsExhausted),
        }
    }
    if tables.enter(slot, Direction::Forward) != index::entered::DONE {
        if by_key {
            tables.leave(slot, Direction::Reverse);
        }
        return Err(DropReason::FlowTableFull);
    }
    if let Some(cell) = tables.member_cell(number) {
        atomic::add(&cell.flows_active, 1);
        atomic::add(&cell.flows_total, 1);
    }
    if let Some(cell) = tables.service_cell(u32::from(service.virtual_server)) {
        atomic::add(&cell.flows_active, 1);
        atomic::add(&cell.flows_total, 1);
    }
    embryonic(tables, 1);
    flow.phase.store(Phase::Syn as u32, Relaxed);
    Ok(())
}

/// A flow becomes half-open, or ceases to be: adds 1, or the number that takes 1 off.
#[inline(always)]
fn embryonic<T: Tables>(tables: &T, one: u32) {
    if let Some(allocation) = tables.allocation() {
        atomic::gauge(&allocation.embryonic, one);
    }
}

/// What a packet tells about its flow.
#[derive(Clone, Copy, Debug)]
pub struct Note {
    /// Which way it travels, and its flags.
    pub way: (Direction, Flags),
    /// Its sequence number.
    pub sequence: u32,
    /// The sequence number that follows it.
    pub next: u32,
    /// IP header and payload, bytes.
    pub length: u32,
}

impl Note {
    #[inline(always)]
    pub(crate) fn of(packet: &Packet, direction: Direction) -> Self {
        Self {
            way: (direction, packet.flags),
            sequence: packet.sequence,
            next: packet.next(),
            length: packet.length,
        }
    }
}

/// Notes a packet that changes no phase, as nearly all do; false when it may.
#[inline(always)]
pub(crate) fn touch(flow: &Flow, note: &Note, now: u64) -> bool {
    let (direction, flags) = note.way;
    let phase = flow.phase.load(Relaxed);
    if flags.any(Flags::SYN | Flags::FIN | Flags::RST)
        || phase.wrapping_sub(Phase::Established as u32)
            > Phase::Closing as u32 - Phase::Established as u32
    {
        return false;
    }
    count(flow, direction, note, now);
    let next = &flow.next[direction as usize & 1];
    if follows(note.next, next.load(Relaxed)) {
        next.store(note.next, Relaxed);
    }
    true
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
    count(flow, direction, note, tables.now());
    let phase = Phase::from_u32(flow.phase.load(Relaxed));
    let next = &flow.next[direction as usize & 1];
    let seen = next.load(Relaxed);
    if flags.any(Flags::RST) {
        // Half-open, a reset answers the other side's SYN and its number says nothing.
        if phase != Phase::Syn && !resets(note.sequence, seen) {
            return;
        }
    } else if phase == Phase::Syn || follows(note.next, seen) {
        next.store(note.next, Relaxed);
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
    }
    if !from.ended() && to.ended() {
        count_active(tables, flow, u64::MAX);
        ports::rest(tables, slot);
    }
    if from.ended() && !to.ended() {
        count_active(tables, flow, 1);
        ports::unrest(tables, slot);
    }
}

/// Takes a flow apart; true when the caller now owns the claimed record, false when another CPU was first.
#[inline(always)]
pub(crate) fn release<T: Tables>(tables: &T, slot: u32, phase: Phase) -> bool {
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
    true
}

/// Takes an ended flow apart whose client opens another from the same port: the connection is forgotten, but the port
/// towards the member rests on.
#[inline(always)]
pub(crate) fn forget<T: Tables>(tables: &T, slot: u32) {
    let Some(flow) = tables.flow(slot) else {
        return;
    };
    let phase = Phase::from_u32(flow.phase.load(Relaxed));
    if phase.ended() && tables.release(slot, phase) {
        flow.phase.store(Phase::Free as u32, Relaxed);
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
