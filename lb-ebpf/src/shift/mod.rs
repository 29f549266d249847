//! Flows whose sequence numbers are shifted: [`lb_common::shift`] has the rules, this applies them to packets.

pub mod options;
mod segment;
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
    segment::{SEGMENT, Workspace},
};
use crate::{
    Egress, Packet, Tables, Verdict,
    flow::{self, Note},
    forward,
    frame::{ChecksumEdit, Reshape, halves, word},
    parse, rewrite,
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
    let Some(mut packet) = parse::packet(frame)? else {
        return Ok(Verdict::Pass);
    };
    let hit = flow::find(tables, &packet).ok_or(DropReason::Internal)?;
    let flow = tables.flow(hit.slot()).ok_or(DropReason::Internal)?;
    let (direction, now) = (hit.direction(), tables.now());
    forward::way(frame, &packet, flow, direction, now, egress)?;
    if !egress.known && !F::ASKS {
        return Ok(Verdict::Pass);
    }
    tables.track(hit.slot(), &Note::of(&packet, direction));
    match direction {
        Direction::Forward => to_member(frame, flow, &mut packet, workspace, now)?,
        Direction::Reverse => to_client(frame, flow, &mut packet, workspace)?,
    }
    rewrite::apply(frame, &packet, &flow.route.leave[direction as usize & 1])?;
    frame.address(egress)?;
    Ok(Verdict::Send)
}

/// What changes in a packet that stays itself.
#[derive(Clone, Copy)]
struct Edit {
    /// The new numbers.
    sequence: u32,
    acknowledgement: u32,
    /// Taken off the edges of a SACK option.
    sack: u32,
    /// A SACK option is not for the receiver's eyes.
    hide_sack: bool,
    /// Taken off the MSS of a SYN.
    room: u32,
}

#[inline(always)]
fn to_member<F: Reshape>(
    frame: &mut F,
    flow: &Flow,
    packet: &mut Packet,
    workspace: &mut Workspace,
    now: u64,
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
    );
    let acknowledgement = acknowledgement(frame, packet)?.wrapping_sub(back);
    if act as u32 == Act::Header as u32 {
        flow.header.store(now, Relaxed);
        let reply = &flow.route.leave[Direction::Reverse as usize];
        return segment::insert_header(frame, packet, workspace, first, acknowledgement, reply);
    }
    let by = if act as u32 == Act::Shift as u32 {
        length
    } else {
        0
    };
    let edit = Edit {
        sequence: packet.sequence.wrapping_add(by),
        acknowledgement,
        sack: back,
        hide_sack: false,
        room: 0,
    };
    apply(frame, packet, workspace, &edit)
}

#[inline(always)]
fn to_client<F: Reshape>(
    frame: &mut F,
    flow: &Flow,
    packet: &mut Packet,
    workspace: &mut Workspace,
) -> Result<(), DropReason> {
    let first = flow.first.load(Relaxed);
    let [length, back] = [0, 1].map(|side| flow.shift[side].load(Relaxed));
    let acknowledgement = acknowledgement(frame, packet)?;
    let mut settled = flow.header.load(Relaxed) == SETTLED;
    if !settled
        && packet.flags.any(Flags::ACK)
        && rule::acknowledges(first, length, acknowledgement)
    {
        flow.header.store(SETTLED, Relaxed);
        settled = true;
    }
    let edit = Edit {
        sequence: packet.sequence.wrapping_add(back),
        acknowledgement: rule::told(settled, first, length, acknowledgement),
        sack: length,
        hide_sack: !settled,
        room: length,
    };
    apply(frame, packet, workspace, &edit)
}

#[inline(always)]
fn acknowledgement<F: Reshape>(frame: &F, packet: &Packet) -> Result<u32, DropReason> {
    Ok(u32::from_be(word(frame.load(packet.l4 + ACKNOWLEDGEMENT)?)))
}

/// Applies an edit; the checksum follows.
#[inline(always)]
fn apply<F: Reshape>(
    frame: &mut F,
    packet: &mut Packet,
    workspace: &mut Workspace,
    edit: &Edit,
) -> Result<(), DropReason> {
    let syn = packet.flags.any(Flags::SYN);
    let mut delta = Delta::NONE;
    let at = packet.l4 + SEQUENCE;
    frame.store(at, halves(edit.sequence.to_be()))?;
    delta = delta.word(packet.sequence.to_be(), edit.sequence.to_be());
    if packet.flags.any(Flags::ACK) {
        let old = acknowledgement(frame, packet)?;
        frame.store(
            packet.l4 + ACKNOWLEDGEMENT,
            halves(edit.acknowledgement.to_be()),
        )?;
        delta = delta.word(old.to_be(), edit.acknowledgement.to_be());
    }
    let length = segment::header_length(packet);
    if length > 20 && (syn || edit.sack != 0) && !timestamps_alone(frame, packet, length)? {
        delta = delta.and(options(frame, packet, workspace, edit)?);
    }
    let segment = packet.length.saturating_sub((packet.l4 - packet.l3) as u32);
    frame.amend_checksum(&ChecksumEdit {
        at: packet.l4 + segment::CHECKSUM,
        addresses: Delta::NONE,
        ports: delta,
        pseudo: segment::pseudo(packet, segment),
        l4: packet.l4,
        segment,
    })?;
    if syn && packet.data() != 0 {
        // Fast Open's: nobody but the first server may answer it. The client repeats it, as to a server that knows none.
        let length = workspace.take(frame, packet)?;
        return segment::replace(frame, packet, workspace, length);
    }
    Ok(())
}

#[inline(always)]
fn timestamps_alone<F: Reshape>(
    frame: &mut F,
    packet: &Packet,
    length: u32,
) -> Result<bool, DropReason> {
    frame.reach(packet.l4 + 24)?;
    let start: [u16; 2] = frame.load(packet.l4 + 20)?;
    Ok(length == 32 && start == TIMESTAMPS_ALONE)
}

/// Edits the options; what the checksum has to follow.
#[inline(always)]
fn options<F: Reshape>(
    frame: &mut F,
    packet: &Packet,
    workspace: &mut Workspace,
    edit: &Edit,
) -> Result<Delta, DropReason> {
    let length = workspace.take(frame, packet)?;
    let mut found = options::Found::NONE;
    options::walk(&workspace.old, length, &mut found);
    let Some(new) = workspace.new.first_chunk_mut() else {
        return Err(DropReason::Internal);
    };
    if packet.flags.any(Flags::SYN) {
        options::blank(new, found.blank);
        if found.mss != 0 {
            options::lower_mss(new, found.mss, edit.room);
        }
    } else if found.sack != 0 {
        if edit.hide_sack {
            options::blank(new, found.sack_bytes);
        } else {
            options::shift_sack(new, found.sack, edit.sack);
        }
    } else {
        return Ok(Delta::NONE);
    }
    let delta = options::delta(&workspace.old, new);
    frame.copy_in(packet.l4, &workspace.new, length, false)?;
    Ok(delta)
}
