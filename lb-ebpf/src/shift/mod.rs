//! Flows whose sequence numbers are shifted: [`lb_common::shift`] has the rules, this applies them to packets.

pub mod options;
pub(crate) mod segment;
#[cfg(test)]
mod tests;

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    checksum::Delta,
    flow::Flow,
    reason::DropReason,
    service::Service,
    shift::{self as rule, Act, PLAIN, SETTLED, UNSENT, header, instant},
    tcp::{Direction, Flags, Phase},
};

pub use self::{
    options::ROOM,
    segment::{Place, SEGMENT, Workspace},
};
use crate::{
    Egress, Packet, Tables, Verdict,
    flow::{self, Note},
    forward,
    frame::{ChecksumEdit, Reshape, halves, word},
    odd,
    opaque::opaque,
    parse::{Deep, Part},
    rewrite,
};

/// Offsets of sequence and acknowledgement number in the TCP header (RFC 9293 §3.1).
const SEQUENCE: usize = 4;
const ACKNOWLEDGEMENT: usize = 8;
/// NOP, NOP, timestamps of ten bytes: what almost every segment has for options, and nothing here to edit.
const TIMESTAMPS_ALONE: [u16; 2] = [u16::from_ne_bytes([1, 1]), u16::from_ne_bytes([8, 10])];

/// Prepares the record of a new flow, whose shifts are zero, by its first packet.
#[inline(always)]
pub(crate) fn prepare(flow: &Flow, service: &Service, syn: &Packet) {
    flow.first.store(syn.sequence.wrapping_add(1), Relaxed);
    if service.flags & Service::PROXY_HEADER == 0 {
        flow.header.store(PLAIN, Relaxed);
    } else {
        flow.shift[0].store(header::length(!syn.v6), Relaxed);
        flow.header.store(UNSENT, Relaxed);
    }
}

/// Is this a flow for [`shift`]?
#[inline(always)]
pub(crate) fn concerns(flow: &Flow) -> bool {
    flow.header.load(Relaxed) != PLAIN
}

/// Carries a packet of a shifted flow.
///
/// # Errors
///
/// The reason why it was not carried.
#[inline(always)]
pub fn shift<F: Reshape, T: Tables>(
    frame: &mut F,
    tables: &T,
    workspace: &mut Workspace,
    egress: &mut Egress,
) -> Result<Verdict, DropReason> {
    let mut room = Deep::default();
    let Some(deep) = frame.deep(&mut room)? else {
        return Ok(Verdict::Pass);
    };
    let mut packet = deep.packet;
    let whole = deep.part as u32 == Part::Whole as u32;
    let hit = flow::find(tables, &packet).ok_or(DropReason::Internal)?;
    let flow = tables.flow(hit.slot()).ok_or(DropReason::Internal)?;
    let (direction, now) = (hit.direction(), tables.now());
    forward::way(frame, &packet, flow, direction, now, egress)?;
    if !egress.known && !F::ASKS {
        return Ok(Verdict::Pass);
    }
    let mut plan = Plan::default();
    match direction {
        Direction::Forward => {
            odd::note_way_back(frame, flow, &deep.link, now)?;
            to_member(frame, flow, &packet, now, &mut plan)?;
        }
        Direction::Reverse => to_client(frame, flow, &packet, &mut plan)?,
    }
    if plan.header != 0 {
        // Nobody cuts what has no payload, or so little.
        if !whole {
            return Err(DropReason::Truncated);
        }
        let end = segment::header_length(&packet) + flow.shift[0].load(Relaxed);
        if frame.make_room(packet.l4 + end as usize).is_err() {
            return Ok(Verdict::Pass);
        }
    }
    plan.forget();
    if !whole {
        tables.note_fragment(&deep.fragment(), hit);
    }
    tables.track(hit.slot(), &Note::of(&packet, direction));
    // First to its new addresses, which is the same for all: what comes after has many ways, and the verifier goes each.
    let to = &flow.route.leave[direction as usize & 1];
    rewrite::apply(frame, &packet, to, !whole)?;
    packet.key = *to;
    let spot = Spot::of(&packet, !whole);
    perform(frame, (hit.slot(), flow), &spot, workspace, &plan)?;
    odd::leave(frame, &deep.link, flow, direction, egress)
}

/// What becomes of a packet.
///
/// A plain record that is always filled: one shape for all ways that lead to it.
#[derive(Clone, Copy, Debug, Default)]
struct Plan {
    /// Its new numbers.
    sequence: u32,
    acknowledgement: u32,
    /// What is done to its options, see [`options::edit`], and by how much.
    options: u32,
    by: u32,
    /// It becomes the PROXY header, at this instant; 0 when it does not.
    header: u32,
}

impl Plan {
    /// Lets the verifier forget how it came about: from here on there is one way, not one for each.
    #[inline(always)]
    fn forget(&mut self) {
        let number = |value: u32| opaque(u64::from(value)) as u32;
        self.sequence = number(self.sequence);
        self.acknowledgement = number(self.acknowledgement);
        self.options = number(self.options);
        self.by = number(self.by);
        self.header = number(self.header);
    }
}

/// Where a packet's headers lie, and how long its segment is; again in one shape, whatever the family.
#[derive(Clone, Copy, Debug)]
struct Spot {
    l3: usize,
    l4: usize,
    v6: bool,
    flags: Flags,
    /// Length of the TCP header.
    header: u32,
    /// Length of the segment.
    segment: u32,
    /// Sequence number.
    sequence: u32,
    /// Sum of the pseudo-header with a length of 0.
    pseudo: u64,
    /// Is the checksum complete for sure?
    complete: bool,
}

impl Spot {
    #[inline(always)]
    fn of(packet: &Packet, complete: bool) -> Self {
        // Offsets are below 128: an Ethernet header with two tags, and an IP header.
        let offset = |at: usize| opaque(at as u64) as usize & 127;
        Self {
            l3: offset(packet.l3),
            l4: offset(packet.l4),
            v6: opaque(u64::from(packet.v6)) & 1 != 0,
            flags: packet.flags,
            header: opaque(u64::from(segment::header_length(packet))) as u32,
            segment: opaque(u64::from(segment::length(packet))) as u32,
            sequence: packet.sequence,
            pseudo: opaque(segment::pseudo(packet)),
            complete: opaque(u64::from(complete)) & 1 != 0,
        }
    }

    /// For a new segment of this length.
    #[inline(always)]
    fn place(&self, after: u32) -> Place {
        Place {
            l3: self.l3,
            l4: self.l4,
            v6: self.v6,
            before: self.segment,
            after,
            pseudo: self.pseudo,
        }
    }
}

#[inline(always)]
fn to_member<F: Reshape>(
    frame: &F,
    flow: &Flow,
    packet: &Packet,
    now: u64,
    plan: &mut Plan,
) -> Result<(), DropReason> {
    let [length, back] = [0, 1].map(|side| flow.shift[side].load(Relaxed));
    if packet.flags.opens() && flow.phase.load(Relaxed) == Phase::Syn as u32 {
        // The same SYN again, or that of another attempt from the same port.
        flow.first.store(packet.sequence.wrapping_add(1), Relaxed);
    }
    let first = flow.first.load(Relaxed);
    let now = instant(now);
    let act = rule::forward(
        flow.header.load(Relaxed),
        first,
        packet.sequence,
        packet.flags,
        packet.data(),
        now,
    ) as u32;
    plan.acknowledgement = acknowledgement(frame, packet.l4)?.wrapping_sub(back);
    plan.sequence = packet.sequence;
    if act == Act::Header as u32 {
        plan.sequence = first;
        plan.header = now;
    } else if act == Act::Shift as u32 {
        plan.sequence = packet.sequence.wrapping_add(length);
    }
    plan.options = options::SHIFT_SACK;
    plan.by = back;
    Ok(())
}

#[inline(always)]
fn to_client<F: Reshape>(
    frame: &F,
    flow: &Flow,
    packet: &Packet,
    plan: &mut Plan,
) -> Result<(), DropReason> {
    let first = flow.first.load(Relaxed);
    let [length, back] = [0, 1].map(|side| flow.shift[side].load(Relaxed));
    let acknowledgement = acknowledgement(frame, packet.l4)?;
    let mut settled = flow.header.load(Relaxed) == SETTLED;
    if !settled
        && packet.flags.any(Flags::ACK)
        && rule::acknowledges(first, length, acknowledgement)
    {
        flow.header.store(SETTLED, Relaxed);
        settled = true;
    }
    plan.sequence = packet.sequence.wrapping_add(back);
    plan.acknowledgement = rule::told(settled, first, length, acknowledgement);
    plan.options = if settled {
        options::SHIFT_SACK
    } else {
        options::HIDE_SACK
    };
    plan.by = length;
    Ok(())
}

#[inline(always)]
fn acknowledgement<F: Reshape>(frame: &F, l4: usize) -> Result<u32, DropReason> {
    Ok(u32::from_be(word(frame.load(l4 + ACKNOWLEDGEMENT)?)))
}

/// Does it; the checksum follows.
#[inline(always)]
fn perform<F: Reshape>(
    frame: &mut F,
    (slot, flow): (u32, &Flow),
    spot: &Spot,
    workspace: &mut Workspace,
    plan: &Plan,
) -> Result<(), DropReason> {
    let syn = spot.flags.any(Flags::SYN);
    if plan.header != 0 {
        flow.header.store(plan.header, Relaxed);
        frame.take(workspace, spot.l4, spot.header)?;
        workspace.number(plan.sequence, plan.acknowledgement, Flags::ACK | Flags::PSH);
        let end = once::append_header(workspace, spot.header, (slot, flow));
        return frame.replace(workspace, &spot.place(end));
    }
    frame.reach(spot.l4 + 20)?;
    frame.store(spot.l4 + SEQUENCE, halves(plan.sequence.to_be()))?;
    let mut delta = Delta::NONE.word(spot.sequence.to_be(), plan.sequence.to_be());
    if spot.flags.any(Flags::ACK) {
        let old = acknowledgement(frame, spot.l4)?;
        frame.store(
            spot.l4 + ACKNOWLEDGEMENT,
            halves(plan.acknowledgement.to_be()),
        )?;
        delta = delta.word(old.to_be(), plan.acknowledgement.to_be());
    }
    if spot.header > 20 && (syn || plan.by != 0) && !timestamps_alone(frame, spot)? {
        frame.take(workspace, spot.l4, spot.header)?;
        let what = if syn { options::SYN } else { plan.options };
        let change = once::edit_options(workspace, spot.header, what, plan.by);
        if change != 0 {
            frame.copy_in(spot.l4, &workspace.new, spot.header, false)?;
        }
        delta = delta.and(Delta::from_sum(change));
    }
    frame.amend_checksum(&ChecksumEdit {
        at: spot.l4 + segment::CHECKSUM,
        addresses: Delta::NONE,
        ports: delta,
        pseudo: spot.pseudo + u64::from(spot.segment.to_be()),
        l4: spot.l4,
        segment: spot.segment,
        complete: spot.complete,
    })?;
    if syn && !spot.complete && spot.segment > spot.header {
        // Fast Open's: nobody but the first server may answer it. The client repeats it, as to a server that knows none.
        frame.take(workspace, spot.l4, spot.header)?;
        return frame.replace(workspace, &spot.place(spot.header));
    }
    Ok(())
}

#[inline(always)]
fn timestamps_alone<F: Reshape>(frame: &mut F, spot: &Spot) -> Result<bool, DropReason> {
    frame.reach(spot.l4 + 24)?;
    let start: [u16; 2] = frame.load(spot.l4 + 20)?;
    Ok(spot.header == 32 && start == TIMESTAMPS_ALONE)
}

/// Work on this CPU's workspace, as functions that the verifier checks once, whatever comes before and after.
mod once {
    #[cfg(target_arch = "bpf")]
    use crate::maps;

    use super::{Flow, Workspace, options, segment};

    #[inline(always)]
    pub(super) fn edit_options(_workspace: &mut Workspace, length: u32, what: u32, by: u32) -> u32 {
        #[cfg(target_arch = "bpf")]
        return maps::edit_options(length, what, by);
        #[cfg(not(target_arch = "bpf"))]
        options::edit(_workspace, length, what, by)
    }

    #[inline(always)]
    pub(super) fn append_header(
        _workspace: &mut Workspace,
        length: u32,
        (_slot, _flow): (u32, &Flow),
    ) -> u32 {
        #[cfg(target_arch = "bpf")]
        return maps::append_header(length, _slot);
        #[cfg(not(target_arch = "bpf"))]
        segment::append_header(_workspace, length, _flow)
    }
}
