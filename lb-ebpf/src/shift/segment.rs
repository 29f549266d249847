//! Packets that become another segment: the PROXY protocol header, a SYN, the answer to one.

use core::mem::offset_of;

use lb_common::{
    checksum::{Delta, fold},
    flow::FlowKey,
    reason::DropReason,
    shift::header,
    tcp::Flags,
};
use network_types::ip::{IpProto, Ipv4Hdr, Ipv6Hdr};

use super::options::ROOM;
use crate::{Packet, frame::Reshape, opaque::opaque};

/// The longest segment that is built here: TCP header (60 bytes) and PROXY header (52), rounded up.
pub const SEGMENT: usize = 128;
/// Offset of the checksum in the TCP header (RFC 9293 §3.1).
pub(super) const CHECKSUM: usize = 16;

/// Where a program edits and builds headers; one per CPU.
#[repr(C, align(8))]
#[derive(Clone, Debug)]
pub struct Workspace {
    /// A TCP header as it came.
    pub(super) old: [u8; ROOM],
    /// What it becomes, with payload behind it and zeros behind that.
    pub(super) new: [u8; SEGMENT],
}

impl Default for Workspace {
    fn default() -> Self {
        Self {
            old: [0; ROOM],
            new: [0; SEGMENT],
        }
    }
}

impl Workspace {
    /// Takes a packet's TCP header in, old and new the same.
    #[inline(always)]
    pub(super) fn take<F: Reshape>(
        &mut self,
        frame: &F,
        packet: &Packet,
    ) -> Result<u32, DropReason> {
        let length = header_length(packet);
        // Less is no TCP header, and no header length says more.
        if !(20..=60).contains(&length) {
            return Err(DropReason::Truncated);
        }
        self.old = [0; ROOM];
        frame.copy_out(packet.l4, &mut self.old, length)?;
        self.new = [0; SEGMENT];
        self.new[..ROOM].copy_from_slice(&self.old);
        Ok(length)
    }

    /// Sets the numbers and flags of the new header; nothing in it is urgent.
    #[inline(always)]
    pub(super) fn number(&mut self, sequence: u32, acknowledgement: u32, flags: u8) {
        self.new[4..8].copy_from_slice(&sequence.to_be_bytes());
        self.new[8..12].copy_from_slice(&acknowledgement.to_be_bytes());
        self.new[13] = flags;
        self.new[18..20].copy_from_slice(&[0; 2]);
    }
}

/// Bytes of a packet's TCP header.
#[inline(always)]
pub(super) fn header_length(packet: &Packet) -> u32 {
    packet
        .headers
        .saturating_sub((packet.l4 - packet.l3) as u32)
}

/// Sum of the pseudo-header of a segment of this length (RFC 9293 §3.1, RFC 8200 §8.1).
#[inline(always)]
pub(super) fn pseudo(packet: &Packet, length: u32) -> u64 {
    let key = &packet.key;
    let mut sum = u64::from(u32::from(IpProto::Tcp as u8).to_be()) + u64::from(length.to_be());
    for word in 0..4 {
        if packet.v6 || word == 3 {
            sum += u64::from(key.src.0[word]) + u64::from(key.dst.0[word]);
        }
    }
    sum
}

/// Turns a packet into the PROXY header of its connection: at the first place of the stream, with the acknowledgement,
/// window and options of the packet.
#[inline(always)]
pub(super) fn insert_header<F: Reshape>(
    frame: &mut F,
    packet: &mut Packet,
    workspace: &mut Workspace,
    first: u32,
    acknowledgement: u32,
    reply: &FlowKey,
) -> Result<(), DropReason> {
    let length = workspace.take(frame, packet)?;
    workspace.number(first, acknowledgement, Flags::ACK | Flags::PSH);
    let end = append_header(workspace, length, reply);
    replace(frame, packet, workspace, end)
}

/// Puts the PROXY header behind the TCP header of this length; the length of both.
#[inline(always)]
pub(super) fn append_header(workspace: &mut Workspace, length: u32, reply: &FlowKey) -> u32 {
    let words = header::words(reply);
    for (place, word) in words.iter().enumerate() {
        for (byte, value) in word.to_ne_bytes().into_iter().enumerate() {
            let at = opaque(u64::from(length) + (place * 4 + byte) as u64);
            workspace.new[at as usize & (SEGMENT - 1)] = value;
        }
    }
    length + header::length(reply.dst.is_v4())
}

/// Makes the packet the new segment of the workspace, with checksums complete, or left to the device that would have
/// finished the old one.
#[inline(always)]
pub(super) fn replace<F: Reshape>(
    frame: &mut F,
    packet: &mut Packet,
    workspace: &mut Workspace,
    length: u32,
) -> Result<(), DropReason> {
    let before = packet.length.saturating_sub((packet.l4 - packet.l3) as u32);
    let unfinished = frame.unfinished(packet.l4 + CHECKSUM, pseudo(packet, before))?;
    workspace.new[CHECKSUM..CHECKSUM + 2].copy_from_slice(&[0; 2]);
    let mut sum = pseudo(packet, length);
    if !unfinished {
        for pair in 0..SEGMENT / 2 {
            let half = [workspace.new[pair * 2], workspace.new[pair * 2 + 1]];
            sum += u64::from(u16::from_ne_bytes(half));
        }
    }
    let field = if unfinished { fold(sum) } else { !fold(sum) };
    workspace.new[CHECKSUM..CHECKSUM + 2].copy_from_slice(&field.to_ne_bytes());
    frame.resize(packet.l4 + length as usize)?;
    frame.reach(packet.l4 + 20)?;
    packet.length = (packet.l4 - packet.l3) as u32 + length;
    if packet.v6 {
        let payload = packet.length.saturating_sub(Ipv6Hdr::LEN as u32) as u16;
        frame.store_summed(
            packet.l3 + offset_of!(Ipv6Hdr, payload_len),
            payload.to_be(),
        )?;
    } else {
        let at = packet.l3 + offset_of!(Ipv4Hdr, tot_len);
        let check = packet.l3 + offset_of!(Ipv4Hdr, check);
        let (old, new) = (frame.load::<u16>(at)?, (packet.length as u16).to_be());
        let field: u16 = frame.load(check)?;
        frame.store(at, new)?;
        frame.store(check, Delta::NONE.half(old, new).apply(field))?;
    }
    frame.copy_in(packet.l4, &workspace.new, length, true)
}
