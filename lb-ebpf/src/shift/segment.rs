//! Packets that become another segment: the PROXY protocol header, a SYN, the answer to one.

use core::{mem::offset_of, sync::atomic::Ordering::Relaxed};

use lb_common::{
    checksum::{Delta, fold},
    cookie,
    flow::{Flow, FlowKey},
    reason::DropReason,
    shift::{header, waiting_class},
    tcp::{Direction, Flags, at},
};
use network_types::{
    ip::{IpProto, Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
};

use super::{
    Becomes, Plan, Spot,
    options::{MSS, ROOM},
};
use crate::{
    Packet,
    frame::Reshape,
    opaque::{blank, opaque},
};

/// The longest segment that is built here: TCP header (60 bytes) and PROXY header (52), rounded up.
pub const SEGMENT: usize = 128;

/// Where a program edits and builds headers; one per CPU.
#[repr(C, align(8))]
#[derive(Clone, Debug)]
pub struct Workspace {
    /// A TCP header as it came.
    pub(crate) old: [u8; ROOM],
    /// What it becomes, with payload behind it and zeros behind that.
    pub(crate) new: [u8; SEGMENT],
    /// What becomes of the packet, where its headers lie, the slot of its flow, and the direction that it leaves in.
    pub(crate) plan: Plan,
    pub(crate) spot: Spot,
    pub(crate) slot: u32,
    pub(crate) leaves: u32,
}

impl Default for Workspace {
    fn default() -> Self {
        Self {
            old: [0; ROOM],
            new: [0; SEGMENT],
            plan: Plan::default(),
            spot: Spot::default(),
            slot: 0,
            leaves: 0,
        }
    }
}

impl Workspace {
    /// Takes a packet's TCP header of `length` bytes in, old and new the same.
    #[inline(always)]
    pub(crate) fn take<F: Reshape>(
        &mut self,
        frame: &F,
        at: usize,
        length: u32,
    ) -> Result<(), DropReason> {
        // Less is no TCP header, and no header length says more.
        if !(20..=60).contains(&length) {
            return Err(DropReason::Truncated);
        }
        blank(&mut self.old);
        frame.copy_out(at, &mut self.old, length)?;
        blank(&mut self.new);
        self.new[..ROOM].copy_from_slice(&self.old);
        Ok(())
    }

    /// Sets the numbers and flags of the new header; nothing in it is urgent.
    #[inline(always)]
    fn number(&mut self, [sequence, acknowledgement]: [u32; 2], flags: u8) {
        self.new[4..8].copy_from_slice(&sequence.to_be_bytes());
        self.new[8..12].copy_from_slice(&acknowledgement.to_be_bytes());
        self.new[13] = flags;
        self.new[18..20].copy_from_slice(&[0; 2]);
    }

    /// Makes the new segment a header of its own with this window, without options; the ports stay.
    #[inline(always)]
    fn bare(&mut self, window: u16) {
        let [a, b, c, d] = [self.new[0], self.new[1], self.new[2], self.new[3]];
        blank(&mut self.new);
        self.new[..4].copy_from_slice(&[a, b, c, d]);
        self.new[at::LENGTH] = 5 << 4;
        self.new[14..16].copy_from_slice(&window.to_be_bytes());
    }

    /// The segment size as the only option, of a header that has none.
    #[inline(always)]
    fn offer(&mut self, size: u16) {
        let [high, low] = size.to_be_bytes();
        self.new[at::LENGTH] = 6 << 4;
        self.new[20..24].copy_from_slice(&[MSS as u8, 4, high, low]);
    }

    /// Makes the new segment, of [`HANDSHAKE`] bytes, our answer to a first packet; ports as they lie in memory.
    #[inline(always)]
    pub(crate) fn handshake(&mut self, ports: [u16; 2], numbers: [u32; 2], size: u16) {
        self.bare(WINDOW);
        self.new[..2].copy_from_slice(&ports[0].to_ne_bytes());
        self.new[2..4].copy_from_slice(&ports[1].to_ne_bytes());
        self.number(numbers, Flags::SYN | Flags::ACK);
        self.offer(size);
    }
}

/// Length of a segment that opens a connection, with the segment size for option; bytes.
pub(crate) const HANDSHAKE: u32 = 24;
/// What a peer may send until it hears the other side's own window, bytes: what a client says first, and a greeting.
const WINDOW: u16 = 4096;

/// Makes the segment that was taken in the one that was planned; its length.
#[inline(always)]
pub(crate) fn build(workspace: &mut Workspace, flow: &Flow) -> u32 {
    let (plan, mut end) = (workspace.plan, workspace.spot.header);
    let word = flow.header.load(Relaxed);
    let window = u16::from_be_bytes([workspace.new[14], workspace.new[15]]);
    match plan.becomes {
        Becomes::FIRST => {
            workspace.bare(window);
            workspace.offer(cookie::size(waiting_class(word)));
            end = HANDSHAKE;
        }
        Becomes::ANSWER | Becomes::REFUSAL => {
            workspace.bare(WINDOW);
            end = TcpHdr::LEN as u32;
        }
        _ => {}
    }
    let push = if plan.header != 0 { Flags::PSH } else { 0 };
    let flags = match plan.becomes {
        Becomes::FIRST => Flags::SYN,
        Becomes::REFUSAL => Flags::RST,
        _ => Flags::ACK | push,
    };
    workspace.number([plan.sequence, plan.acknowledgement], flags);
    if plan.header != 0 {
        flow.header.store(plan.header, Relaxed);
        end = append_header(workspace, end, flow);
    }
    end
}

/// Bytes of a packet's TCP header.
#[inline(always)]
pub(crate) fn header_length(packet: &Packet) -> u32 {
    packet
        .headers
        .saturating_sub((packet.l4 - packet.l3) as u32)
}

/// Bytes of a packet's segment, as its IP header says.
#[inline(always)]
pub(super) fn length(packet: &Packet) -> u32 {
    packet.length.saturating_sub((packet.l4 - packet.l3) as u32)
}

/// Sum of the pseudo-header, with a length of 0 (RFC 9293 §3.1, RFC 8200 §8.1).
#[inline(always)]
pub(crate) fn pseudo(key: &FlowKey, v6: bool) -> u64 {
    let mut sum = u64::from(u32::from(IpProto::Tcp as u8).to_be());
    for word in 0..4 {
        if v6 || word == 3 {
            sum += u64::from(key.src.0[word]) + u64::from(key.dst.0[word]);
        }
    }
    sum
}

/// Puts the PROXY header of a flow behind the TCP header of this length; the length of both.
#[inline(always)]
fn append_header(workspace: &mut Workspace, length: u32, flow: &Flow) -> u32 {
    let reply = &flow.route.leave[Direction::Reverse as usize];
    let words = header::words(reply);
    for (place, word) in words.iter().enumerate() {
        for (byte, value) in word.to_ne_bytes().into_iter().enumerate() {
            let at = opaque(u64::from(length) + (place * 4 + byte) as u64);
            workspace.new[at as usize & (SEGMENT - 1)] = value;
        }
    }
    length + header::length(reply.dst.is_v4())
}

/// The sum of the new segment.
#[inline(always)]
pub(crate) fn sum(workspace: &Workspace) -> u32 {
    let mut sum = 0;
    for pair in workspace.new.chunks_exact(2) {
        sum += u32::from(u16::from_ne_bytes([pair[0], pair[1]]));
    }
    sum
}

/// Where the new segment of the workspace goes.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Offset of the IP header.
    pub l3: usize,
    /// Offset of the TCP header.
    pub l4: usize,
    /// IPv6?
    pub v6: bool,
    /// Length of the segment until now, bytes.
    pub before: u32,
    /// Length of the new one, bytes.
    pub after: u32,
    /// Sum of the pseudo-header with a length of 0.
    pub pseudo: u64,
}

/// Makes the packet the new segment of the workspace, with checksums complete, or left to the device that would have
/// finished the old one.
#[inline(always)]
pub(crate) fn replace<F: Reshape>(
    frame: &mut F,
    workspace: &mut Workspace,
    place: &Place,
) -> Result<(), DropReason> {
    let of = |length: u32| place.pseudo + u64::from(length.to_be());
    let unfinished = frame.unfinished(place.l4 + at::CHECKSUM, of(place.before))?;
    workspace.new[at::CHECKSUM..at::CHECKSUM + 2].copy_from_slice(&[0; 2]);
    let field = if unfinished {
        fold(of(place.after))
    } else {
        !fold(of(place.after) + u64::from(sum(workspace)))
    };
    workspace.new[at::CHECKSUM..at::CHECKSUM + 2].copy_from_slice(&field.to_ne_bytes());
    frame.resize(place.l4 + place.after as usize)?;
    frame.reach(place.l4 + 20)?;
    let length = (place.l4 - place.l3) as u32 + place.after;
    if place.v6 {
        let payload = length.saturating_sub(Ipv6Hdr::LEN as u32) as u16;
        let at = place.l3 + offset_of!(Ipv6Hdr, payload_len);
        frame.store_summed(at, payload.to_be())?;
    } else {
        let at = place.l3 + offset_of!(Ipv4Hdr, tot_len);
        let check = place.l3 + offset_of!(Ipv4Hdr, check);
        let (old, new) = (frame.load::<u16>(at)?, (length as u16).to_be());
        let field: u16 = frame.load(check)?;
        frame.store(at, new)?;
        frame.store(check, Delta::NONE.half(old, new).apply(field))?;
    }
    frame.copy_in(place.l4, &workspace.new, place.after, true)
}
