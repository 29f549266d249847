//! Flows whose sequence numbers are shifted: [`lb_common::shift`] has the rules, this applies them to packets.

pub mod options;
pub(crate) mod segment;
#[cfg(test)]
mod tests;

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    checksum::Delta,
    flow::{Flow, FlowKey},
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

/// The farthest that a TCP header may lie from the start of a frame here, bytes; extension headers reach farther.
const LONGEST: usize = 255;

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
    let packet = &deep.packet;
    let whole = deep.part as u32 == Part::Whole as u32;
    let hit = flow::find(tables, packet).ok_or(DropReason::Internal)?;
    let flow = tables.flow(hit.slot()).ok_or(DropReason::Internal)?;
    let (direction, now) = (hit.direction(), tables.now());
    forward::way(frame, packet, flow, direction, now, egress)?;
    if !F::ASKS && (!egress.known || flow.vlan.load(Relaxed) == odd::LOOPBACK) {
        return Ok(Verdict::Pass);
    }
    if packet.l4 > LONGEST {
        return Err(DropReason::Internal);
    }
    let plan = &mut workspace.plan;
    *plan = Plan::default();
    match direction {
        Direction::Forward => {
            odd::note_way_back(frame, flow, &deep.link, now)?;
            to_member(frame, flow, packet, now, plan)?;
        }
        Direction::Reverse => to_client(frame, flow, packet, plan)?,
    }
    if plan.header != 0 {
        // Nobody cuts what has no payload, or so little.
        if !whole {
            return Err(DropReason::Truncated);
        }
        let end = segment::header_length(packet) + flow.shift[0].load(Relaxed);
        if frame.make_room(packet.l4 + end as usize).is_err() {
            return Ok(Verdict::Pass);
        }
    }
    if !whole {
        tables.note_fragment(&deep.fragment(), hit);
    }
    tables.track(hit.slot(), &Note::of(packet, direction));
    // First to its new addresses, which is the same for all: what comes after has many ways, and the verifier goes each.
    let to = &flow.route.leave[direction as usize & 1];
    // What is half rewritten goes nowhere, and nobody is told of it.
    rewrite::apply(frame, packet, to, !whole).map_err(|_| DropReason::Internal)?;
    workspace.slot = hit.slot();
    workspace.spot = Spot::of(packet, to, !whole);
    frame
        .perform(workspace, flow)
        .map_err(|_| DropReason::Internal)?;
    odd::leave(frame, &deep.link, flow, direction, egress)
}

/// What becomes of a packet.
///
/// A plain record that is always filled: one shape for all ways that lead to it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plan {
    /// Its new numbers.
    sequence: u32,
    acknowledgement: u32,
    /// What is done to its options, see [`options::edit`], and by how much.
    options: u32,
    by: u32,
    /// It becomes the PROXY header, at this instant; 0 when it does not.
    header: u32,
}

/// Where a packet's headers lie, and how long its segment is; again in one shape, whatever the family.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spot {
    l3: u32,
    l4: u32,
    v6: u32,
    flags: u32,
    /// Length of the TCP header.
    header: u32,
    /// Length of the segment.
    segment: u32,
    /// Sequence number.
    sequence: u32,
    /// Is the checksum complete for sure?
    complete: u32,
    /// Sum of the pseudo-header with a length of 0.
    pseudo: u64,
}

impl Spot {
    #[inline(always)]
    fn of(packet: &Packet, to: &FlowKey, complete: bool) -> Self {
        Self {
            l3: packet.l3 as u32,
            l4: packet.l4 as u32,
            v6: u32::from(packet.v6),
            flags: u32::from(packet.flags.0),
            header: segment::header_length(packet),
            segment: segment::length(packet),
            sequence: packet.sequence,
            complete: u32::from(complete),
            pseudo: segment::pseudo(to, packet.v6),
        }
    }

    /// Offset of the TCP header, which the verifier has to see is small: behind two tags, an IP header and extensions.
    #[inline(always)]
    fn l4(&self) -> usize {
        opaque(u64::from(self.l4)) as usize & 255
    }

    /// For a new segment of this length.
    #[inline(always)]
    fn place(&self, after: u32) -> Place {
        Place {
            l3: self.l3 as usize & 127,
            l4: self.l4(),
            v6: self.v6 != 0,
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

/// Does what was planned; the checksum follows.
#[inline(always)]
pub(crate) fn perform<F: Reshape>(
    frame: &mut F,
    workspace: &mut Workspace,
    flow: &Flow,
) -> Result<(), DropReason> {
    let (l4, flags) = (workspace.spot.l4(), Flags(workspace.spot.flags as u8));
    let syn = flags.any(Flags::SYN);
    if workspace.plan.header != 0 {
        flow.header.store(workspace.plan.header, Relaxed);
        let length = workspace.spot.header;
        frame.take(workspace, l4, length)?;
        workspace.number(
            workspace.plan.sequence,
            workspace.plan.acknowledgement,
            Flags::ACK | Flags::PSH,
        );
        let slot = workspace.slot;
        let end = once::append_header(workspace, length, (slot, flow));
        let place = workspace.spot.place(end);
        return frame.replace(workspace, &place);
    }
    frame.reach(l4 + 20)?;
    frame.store(l4 + SEQUENCE, halves(workspace.plan.sequence.to_be()))?;
    let mut delta = Delta::NONE.word(
        workspace.spot.sequence.to_be(),
        workspace.plan.sequence.to_be(),
    );
    if flags.any(Flags::ACK) {
        let old = acknowledgement(frame, l4)?;
        let new = halves(workspace.plan.acknowledgement.to_be());
        frame.store(l4 + ACKNOWLEDGEMENT, new)?;
        delta = delta.word(old.to_be(), workspace.plan.acknowledgement.to_be());
    }
    if workspace.spot.header > 20
        && (syn || workspace.plan.by != 0)
        && !timestamps_alone(frame, &workspace.spot)?
    {
        let length = workspace.spot.header;
        frame.take(workspace, l4, length)?;
        let what = if syn {
            options::SYN
        } else {
            workspace.plan.options
        };
        let by = workspace.plan.by;
        let change = once::edit_options(workspace, length, what, by);
        if change != 0 {
            frame.copy_in(l4, &workspace.new, length, false)?;
        }
        delta = delta.and(Delta::from_sum(change));
    }
    frame.amend_checksum(&ChecksumEdit {
        at: l4 + segment::CHECKSUM,
        addresses: Delta::NONE,
        ports: delta,
        pseudo: workspace.spot.pseudo + u64::from(workspace.spot.segment.to_be()),
        l4,
        segment: workspace.spot.segment,
        complete: workspace.spot.complete != 0,
    })?;
    if syn && workspace.spot.complete == 0 && workspace.spot.segment > workspace.spot.header {
        // Fast Open's: nobody but the first server may answer it. The client repeats it, as to a server that knows none.
        let length = workspace.spot.header;
        frame.take(workspace, l4, length)?;
        let place = workspace.spot.place(length);
        return frame.replace(workspace, &place);
    }
    Ok(())
}

#[inline(always)]
fn timestamps_alone<F: Reshape>(frame: &mut F, spot: &Spot) -> Result<bool, DropReason> {
    frame.reach(spot.l4() + 24)?;
    let start: [u16; 2] = frame.load(spot.l4() + 20)?;
    Ok(spot.header == 32 && start == TIMESTAMPS_ALONE)
}

/// Work on this CPU's workspace, as functions that the verifier checks once, whatever comes before and after.
mod once {
    #[cfg(target_arch = "bpf")]
    use crate::maps;

    use super::{Flow, Workspace};
    #[cfg(not(target_arch = "bpf"))]
    use super::{options, segment};

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
