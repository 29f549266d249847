//! Flows whose sequence numbers are shifted: [`lb_common::shift`] has the rules, this applies them to packets.

pub mod options;
pub(crate) mod segment;
#[cfg(test)]
mod tests;

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    checksum::Delta,
    cookie,
    flow::{Flow, FlowKey, LOOPBACK},
    reason::DropReason,
    service::Service,
    shift::{self as rule, Act, PLAIN, SETTLED, UNSENT, header, instant, waiting, waits},
    tcp::{Direction, Flags, Phase, at},
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

/// NOP, NOP, timestamps of ten bytes: what almost every segment has for options, and nothing here to edit.
const TIMESTAMPS_ALONE: [u16; 2] = [u16::from_ne_bytes([1, 1]), u16::from_ne_bytes([8, 10])];

/// Prepares the numbers in the record of a new flow by its first packet, or by one that brings back a cookie with this
/// class of segment size.
#[inline(always)]
pub(crate) fn prepare(flow: &Flow, service: &Service, packet: &Packet, class: u32) {
    let told = service.flags & Service::PROXY_HEADER != 0;
    let (word, first, back) = match class {
        cookie::NONE => {
            let word = if told { UNSENT } else { PLAIN };
            (word, packet.sequence.wrapping_add(1), 0)
        }
        class => (waiting(class), packet.sequence, packet.acknowledgement),
    };
    flow.header.store(word, Relaxed);
    flow.first.store(first, Relaxed);
    flow.next[0].store(first, Relaxed);
    flow.next[1].store(0, Relaxed);
    let length = if told { header::length(!packet.v6) } else { 0 };
    flow.shift[0].store(length, Relaxed);
    flow.shift[1].store(back, Relaxed);
}

/// Is this a flow for [`shift`]?
#[inline(always)]
pub(crate) fn concerns(flow: &Flow) -> bool {
    flow.header.load(Relaxed) != PLAIN
}

/// The farthest that a TCP header may lie from the start of a frame here, bytes; extension headers reach farther.
pub(crate) const LONGEST: usize = 255;

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
    let (came, now) = (hit.direction(), tables.now());
    let turns = came as u32 == Direction::Reverse as u32 && turns(flow, packet.flags);
    let direction = if turns { Direction::Forward } else { came };
    if let Err(reason) = forward::way(frame, packet, flow, direction, now, egress) {
        tables.withdraw(hit.slot());
        return Err(reason);
    }
    if !F::ASKS && (!egress.known || flow.vlan.load(Relaxed) == LOOPBACK) {
        return Ok(Verdict::Pass);
    }
    if packet.l4 > LONGEST {
        return Err(DropReason::Internal);
    }
    if came as u32 == Direction::Forward as u32 {
        odd::note_way_back(frame, flow, deep, now)?;
    }
    if !once::decide(workspace, (hit.slot(), flow), packet, came, now) {
        return Err(DropReason::Unexpected);
    }
    let plan = &workspace.plan;
    if plan.becomes != Becomes::ITSELF {
        // Nobody cuts what has no payload, or so little.
        if !whole {
            return Err(DropReason::Unexpected);
        }
        let end =
            segment::header_length(packet).max(segment::HANDSHAKE) + flow.shift[0].load(Relaxed);
        if frame.make_room(packet.l4 + end as usize).is_err() {
            return Ok(Verdict::Pass);
        }
    }
    if !whole {
        tables.note_fragment(&deep.fragment(), hit);
    }
    if plan.becomes != Becomes::REFUSAL {
        tables.track(hit.slot(), &Note::of(packet, came));
    }
    if plan.becomes == Becomes::ANSWER {
        // The client has acknowledged the cookie long ago.
        let answer = Note {
            way: (Direction::Forward, Flags(Flags::ACK)),
            next: plan.sequence,
            acknowledgement: plan
                .acknowledgement
                .wrapping_add(flow.shift[1].load(Relaxed)),
            length: 0,
            data: false,
        };
        tables.track(hit.slot(), &answer);
    }
    (workspace.slot, workspace.leaves) = (hit.slot(), direction as u32);
    // What is half rewritten goes nowhere, and nobody is told of it.
    frame
        .readdress(workspace, flow, deep)
        .and_then(|()| frame.perform(workspace, flow))
        .map_err(|_| DropReason::Internal)?;
    odd::leave(frame, &deep.link, flow, direction, egress)
}

/// What becomes of a packet.
///
/// A plain record that is always filled: one shape for all ways that lead to it.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Its new numbers.
    sequence: u32,
    acknowledgement: u32,
    /// What is done to its options, see [`options::edit`], and by how much.
    options: u32,
    by: u32,
    /// One of [`Becomes`].
    becomes: u32,
    /// The PROXY header goes with it, at this instant; 0 when it does not.
    header: u32,
}

impl Default for Plan {
    /// Nothing changes; in stores of their own, since the optimiser would call `memset`.
    #[inline(always)]
    fn default() -> Self {
        let [sequence, acknowledgement, options, by, becomes, header] =
            [0; 6].map(|zero| opaque(zero) as u32);
        Self {
            sequence,
            acknowledgement,
            options,
            by,
            becomes,
            header,
        }
    }
}

/// Which segment a packet becomes.
struct Becomes;

impl Becomes {
    /// Itself, with other numbers.
    const ITSELF: u32 = 0;
    /// The PROXY header, on its own header and options.
    const HEADER: u32 = 1;
    /// The first packet to a member.
    const FIRST: u32 = 2;
    /// The answer to the member's own.
    const ANSWER: u32 = 3;
    /// A reset to a member that holds another connection to be the one.
    const REFUSAL: u32 = 4;
}

/// Decides what becomes of a packet; false when it goes nowhere.
#[inline(always)]
pub(crate) fn decide(
    workspace: &mut Workspace,
    flow: &Flow,
    packet: &Packet,
    came: Direction,
    now: u64,
) -> bool {
    let plan = &mut workspace.plan;
    *plan = Plan::default();
    match came {
        Direction::Forward => to_member(flow, packet, now, plan),
        Direction::Reverse if turns(flow, packet.flags) => back_to_member(flow, packet, now, plan),
        Direction::Reverse => to_client(flow, packet, plan),
    }
}

/// Has the client seen a cookie in place of what this packet of the member says, so that the answer is ours?
#[inline(always)]
fn turns(flow: &Flow, flags: Flags) -> bool {
    let [syn, acknowledges, reset] = [Flags::SYN, Flags::ACK, Flags::RST].map(|it| flags.any(it));
    let expected = match waits(flow.header.load(Relaxed)) {
        true => true,
        false => syn && flow.shift[1].load(Relaxed) != 0,
    };
    expected && acknowledges && !reset
}

/// Takes the member's first number, and answers it. A member that does not begin anew remembers another connection from
/// that port, and has to be told what any client would tell it (RFC 9293 §3.5.1); the client's next packet asks again.
#[inline(always)]
fn back_to_member(flow: &Flow, packet: &Packet, now: u64, plan: &mut Plan) -> bool {
    let first = flow.first.load(Relaxed);
    let waiting = waits(flow.header.load(Relaxed));
    if waiting && (!packet.flags.any(Flags::SYN) || packet.acknowledgement != first) {
        plan.becomes = Becomes::REFUSAL;
        plan.sequence = packet.acknowledgement;
        return true;
    }
    let told = flow.shift[0].load(Relaxed) != 0;
    if !waiting {
        // Once more, not another: the client has been told of the first. None is noted where XDP had no room for the answer
        // and left it to us.
        let noted = flow.next[1].load(Relaxed);
        if noted != 0 && packet.sequence.wrapping_add(1) != noted {
            return false;
        }
    } else {
        let cookie = flow.shift[1].load(Relaxed).wrapping_sub(1);
        flow.shift[1].store(cookie.wrapping_sub(packet.sequence), Relaxed);
        flow.header
            .store(if told { UNSENT } else { SETTLED }, Relaxed);
    }
    plan.becomes = Becomes::ANSWER;
    plan.sequence = first;
    plan.acknowledgement = packet.sequence.wrapping_add(1);
    if flow.header.load(Relaxed) != SETTLED {
        plan.header = instant(now);
    }
    true
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
    pub(crate) fn of(packet: &Packet, to: &FlowKey, complete: bool) -> Self {
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
    pub(crate) fn place(&self, after: u32) -> Place {
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
fn to_member(flow: &Flow, packet: &Packet, now: u64, plan: &mut Plan) -> bool {
    let [length, back] = [0, 1].map(|side| flow.shift[side].load(Relaxed));
    let waiting = waits(flow.header.load(Relaxed));
    if waiting && !packet.flags.any(Flags::RST) {
        plan.becomes = Becomes::FIRST;
        plan.sequence = flow.first.load(Relaxed).wrapping_sub(1);
        return true;
    }
    if !waiting && packet.flags.opens() && flow.phase.load(Relaxed) == Phase::Syn as u32 {
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
    plan.acknowledgement = packet.acknowledgement.wrapping_sub(back);
    plan.sequence = packet.sequence;
    if act == Act::Header as u32 {
        plan.becomes = Becomes::HEADER;
        plan.sequence = first;
        plan.header = now;
    } else if act == Act::Shift as u32 {
        plan.sequence = packet.sequence.wrapping_add(length);
    }
    plan.options = options::SHIFT_SACK;
    plan.by = back;
    true
}

#[inline(always)]
fn to_client(flow: &Flow, packet: &Packet, plan: &mut Plan) -> bool {
    let first = flow.first.load(Relaxed);
    let [length, back] = [0, 1].map(|side| flow.shift[side].load(Relaxed));
    let acknowledgement = packet.acknowledgement;
    let word = flow.header.load(Relaxed);
    if waits(word) && !packet.flags.any(Flags::RST) {
        return false;
    }
    let mut settled = word == SETTLED;
    if !settled
        && !waits(word)
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
    true
}

#[inline(always)]
fn acknowledgement<F: Reshape>(frame: &F, l4: usize) -> Result<u32, DropReason> {
    Ok(u32::from_be(word(frame.load(l4 + at::ACKNOWLEDGEMENT)?)))
}

/// Gives a packet its new addresses, which is the same for all; what comes after has many ways.
#[inline(always)]
pub(crate) fn readdress<F: Reshape>(
    frame: &mut F,
    workspace: &mut Workspace,
    flow: &Flow,
    deep: &Deep,
) -> Result<(), DropReason> {
    let complete = deep.part as u32 != Part::Whole as u32;
    let to = &flow.route.leave[workspace.leaves as usize & 1];
    rewrite::apply(frame, &deep.packet, to, complete)?;
    workspace.spot = Spot::of(&deep.packet, to, complete);
    Ok(())
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
    if workspace.plan.becomes != Becomes::ITSELF {
        let (length, slot) = (workspace.spot.header, workspace.slot);
        frame.take(workspace, l4, length)?;
        let end = once::build(workspace, slot, flow);
        let place = workspace.spot.place(end);
        return frame.replace(workspace, &place);
    }
    frame.reach(l4 + 20)?;
    frame.store(l4 + at::SEQUENCE, halves(workspace.plan.sequence.to_be()))?;
    let mut delta = Delta::NONE.word(
        workspace.spot.sequence.to_be(),
        workspace.plan.sequence.to_be(),
    );
    if flags.any(Flags::ACK) {
        let old = acknowledgement(frame, l4)?;
        let new = halves(workspace.plan.acknowledgement.to_be());
        frame.store(l4 + at::ACKNOWLEDGEMENT, new)?;
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
        at: l4 + at::CHECKSUM,
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
pub(crate) mod once {
    #[cfg(target_arch = "bpf")]
    use crate::maps;

    use super::{Direction, Flow, Packet, Workspace};
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
    pub(super) fn decide(
        _workspace: &mut Workspace,
        (_slot, _flow): (u32, &Flow),
        _packet: &Packet,
        _came: Direction,
        _now: u64,
    ) -> bool {
        #[cfg(target_arch = "bpf")]
        return maps::decide_shift(_slot, _came as u32) != 0;
        #[cfg(not(target_arch = "bpf"))]
        super::decide(_workspace, _flow, _packet, _came, _now)
    }

    #[inline(always)]
    pub(super) fn build(_workspace: &mut Workspace, _slot: u32, _flow: &Flow) -> u32 {
        #[cfg(target_arch = "bpf")]
        return maps::build_segment(_slot);
        #[cfg(not(target_arch = "bpf"))]
        segment::build(_workspace, _flow)
    }

    #[inline(always)]
    pub(crate) fn segment_size(_workspace: &mut Workspace, length: u32) -> u32 {
        #[cfg(target_arch = "bpf")]
        return maps::segment_size(length);
        #[cfg(not(target_arch = "bpf"))]
        options::segment_size(_workspace, length)
    }
}
