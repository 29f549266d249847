//! Finding, opening, tracking and releasing flows.
//!
//! A record is owned by whoever moves its phase to `Claimed` by compare-and-swap. Both keys are inserted only when the
//! record is complete and removed before it is given back, so a key never leads to another connection's record; a
//! packet that looked a key up just before is caught by comparing its addresses with the record.

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    event::Cause,
    flow::{Flow, Hit, owners, split_owners},
    reason::DropReason,
    service::Service,
    tcp::{Direction, Flags, Phase, follows, resets, tick},
};

use crate::{Packet, Tables, atomic, report, shift, snat};

/// The live flow a packet belongs to. A SYN on a flow that has ended belongs to none: a client may use its port again.
#[inline(always)]
pub(crate) fn find<T: Tables>(tables: &T, packet: &Packet) -> Option<Hit> {
    let hit = tables.hit(&packet.key)?;
    let flow = tables.flow(hit.slot())?;
    if !flow.route.matches(hit.direction(), &packet.key) {
        return None;
    }
    match Phase::from_u32(flow.phase.load(Relaxed)) {
        Phase::Free | Phase::Claimed => None,
        phase if phase.ended() && packet.flags.opens() && hit.direction() == Direction::Forward => {
            if tables.release(hit.slot(), phase, Cause::Reused) {
                flow.phase.store(Phase::Free as u32, Relaxed);
                tables.push_free(hit.slot());
            }
            None
        }
        _ => Some(hit),
    }
}

/// Opens a flow for the first packet of a connection: its slot.
#[inline(always)]
pub(crate) fn open<T: Tables>(
    tables: &T,
    service: &Service,
    packet: &Packet,
    now: u64,
) -> Result<u32, DropReason> {
    let number = tables.select(service.pool);
    if number == 0 {
        return Err(DropReason::NoMember);
    }
    let slot = tables.claim(now);
    if slot == 0 {
        return Err(DropReason::FlowTableFull);
    }
    let filled = fill(tables, service, packet, number, slot);
    if filled.is_err() {
        if let Some(flow) = tables.flow(slot) {
            flow.phase.store(Phase::Free as u32, Relaxed);
        }
        tables.push_free(slot);
        // The same SYN on another CPU may have been first.
        if let Some(hit) = tables.hit(&packet.key) {
            return Ok(hit.slot());
        }
    }
    filled.map(|()| slot)
}

/// Completes a claimed record and makes both keys lead to it.
///
/// A function of its own: its keys need stack that the rest of the path would lack.
#[inline(never)]
fn fill<T: Tables>(
    tables: &T,
    service: &Service,
    packet: &Packet,
    number: u32,
    slot: u32,
) -> Result<(), DropReason> {
    let config = tables.config().ok_or(DropReason::Internal)?;
    let reply = snat::bind(tables, service, packet, number, slot)?;
    if !tables.insert(&packet.key, Hit::new(slot, Direction::Forward)) {
        tables.remove(&reply);
        return Err(DropReason::FlowTableFull);
    }
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
    shift::prepare(flow, service, packet);
    flow.next[0].store(packet.next(), Relaxed);
    flow.vlan.store(0, Relaxed);
    if let Some(cell) = tables.member_cell(number) {
        atomic::add(&cell.flows_active, 1);
        atomic::add(&cell.flows_total, 1);
    }
    if let Some(cell) = tables.service_cell(u32::from(service.virtual_server)) {
        atomic::add(&cell.flows_active, 1);
        atomic::add(&cell.flows_total, 1);
    }
    flow.phase.store(Phase::Syn as u32, Relaxed);
    Ok(())
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

/// Notes a packet: time, counters, phase.
#[inline(always)]
pub(crate) fn track<T: Tables>(tables: &T, slot: u32, note: &Note) {
    let Some(flow) = tables.flow(slot) else {
        return;
    };
    let (direction, flags) = note.way;
    let side = direction as usize & 1;
    flow.last_seen.store(tick(tables.now()), Relaxed);
    flow.packets[side].store(flow.packets[side].load(Relaxed).wrapping_add(1), Relaxed);
    flow.bytes[side].store(
        flow.bytes[side]
            .load(Relaxed)
            .wrapping_add(u64::from(note.length)),
        Relaxed,
    );
    let phase = Phase::from_u32(flow.phase.load(Relaxed));
    let seen = flow.next[side].load(Relaxed);
    if flags.any(Flags::RST) {
        // Half-open, a reset answers the other side's SYN and its number says nothing.
        if phase != Phase::Syn && !resets(note.sequence, seen) {
            return;
        }
        flow.note_reset(direction);
    } else if phase == Phase::Syn || follows(note.next, seen) {
        flow.next[side].store(note.next, Relaxed);
    }
    if phase.after(direction, flags) != phase {
        turn(tables, flow, direction, flags);
    }
}

/// How often a phase is tried to be changed while other CPUs change it: each of them moves on at most this often.
const TURNS: u32 = 4;

/// Moves a flow to its next phase. Another CPU may do the same for the other direction: then from where that one left it.
#[inline(always)]
fn turn<T: Tables>(tables: &T, flow: &Flow, direction: Direction, flags: Flags) {
    for _ in 0..TURNS {
        let number = flow.phase.load(Relaxed);
        let phase = Phase::from_u32(number);
        let next = phase.after(direction, flags);
        if !atomic::swap_if(&flow.phase, number, next as u32) {
            continue;
        }
        match (phase.ended(), next.ended()) {
            (false, true) => count_active(tables, flow, u64::MAX),
            (true, false) => count_active(tables, flow, 1),
            _ => {}
        }
        return;
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
    tables.remove(&flow.route.key(Direction::Forward));
    tables.remove(&flow.route.key(Direction::Reverse));
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
    report::end(tables, slot, phase, cause);
    true
}

/// Ends a flow on behalf of the daemon: true when it was still this member's, from that moment, and is now free.
#[inline(always)]
pub fn end<T: Tables>(tables: &T, slot: u32, created: u32, member: u32, cause: Cause) -> bool {
    let Some(flow) = tables.flow(slot) else {
        return false;
    };
    let phase = Phase::from_u32(flow.phase.load(Relaxed));
    let (owner, _) = split_owners(flow.owners.load(Relaxed));
    let known = u32::from(owner) == member && flow.created.load(Relaxed) == created;
    if !known || matches!(phase, Phase::Free | Phase::Claimed) {
        return false;
    }
    if !tables.release(slot, phase, cause) {
        return false;
    }
    flow.phase.store(Phase::Free as u32, Relaxed);
    tables.push_free(slot);
    true
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
