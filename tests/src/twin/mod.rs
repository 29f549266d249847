//! The differential test: the same packets through smtplb and through nftables NAT, outputs compared byte by byte.
//!
//! Even the port is the same: the nft box is told which one smtplb has chosen. So nothing has to be blotted out but what
//! a box may choose freely in an error of its own.

mod boxes;
mod compare;
mod dialogue;
mod packet;
mod port;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

pub use self::{
    boxes::{BOX_MACS, Boxes, CLIENT_MAC, MEMBER_MAC, MEMBER_MTU, TwinBox, address, ends},
    compare::{Origin, Outputs, ip, show},
    dialogue::Spice,
    packet::{Ends, Leg, Packet, Segment, fold, octets, pseudo, sum},
    port::Port,
};
use crate::mail::random::Random;

/// Connections side by side; what they send at once fits the queue of a CPU (`net.core.netdev_max_backlog`, 1000).
const WIDTH: usize = 128;
/// Readable examples of each kind of difference.
const EXAMPLES: u64 = 2;
/// How long a box may take for what it was sent.
const PATIENCE: Duration = Duration::from_secs(10);
/// Tags of the datagrams that close a round, by the side they enter.
const CLOSING: [u32; 2] = [0x7ffe, 0x7fff];

/// What a run found.
#[derive(Debug, Default)]
pub struct Report {
    /// Packets sent to each box.
    pub packets: u64,
    /// Frames that came out of both boxes alike, by kind.
    pub alike: BTreeMap<&'static str, u64>,
    /// Documented differences, by name.
    pub explained: BTreeMap<&'static str, u64>,
    /// The others, by kind.
    pub different: BTreeMap<String, u64>,
    /// Some of them, readable; the first few of each kind.
    pub examples: Vec<String>,
}

/// A connection on its way through its dialogue.
struct Connection {
    ends: Ends,
    port: u16,
    steps: std::vec::IntoIter<Packet>,
}

/// Sends dialogues until so many packets were sent.
///
/// # Errors
/// When a box does not answer at all.
pub fn run(boxes: &mut Boxes, seed: u64, packets: u64, spice: Spice) -> Result<Report> {
    let mut random = Random::new(seed);
    let mut report = Report::default();
    let mut number = 0;
    while report.packets < packets {
        let mut batch: Vec<Connection> = (0..WIDTH)
            .map(|_| {
                number += 1;
                let v6 = number % 2 == 1;
                let mut ends = ends(number / 2, v6);
                if !boxes.snat {
                    ends.snat = ends.client.ip();
                }
                let routers = [address(71, 250, v6), address(72, 250, v6)];
                let steps = dialogue::dialogue(&mut random, &ends, routers, spice).into_iter();
                Connection {
                    ends,
                    port: 0,
                    steps,
                }
            })
            .collect();
        let mut first = true;
        while !batch.is_empty() {
            round(boxes, &mut batch, first, &mut report)?;
            first = false;
        }
    }
    Ok(report)
}

/// One packet of every connection.
fn round(
    boxes: &mut Boxes,
    batch: &mut Vec<Connection>,
    first: bool,
    report: &mut Report,
) -> Result<()> {
    let mut sent: Vec<(usize, Packet)> = Vec::new();
    for (at, connection) in batch.iter_mut().enumerate() {
        if let Some(mut packet) = connection.steps.next() {
            dialogue::stamp(&mut packet, sent.len() as u32 + 1);
            sent.push((at, packet));
        }
    }
    report.packets += sent.len() as u64;
    let own = exchange(&mut boxes.own, batch, &sent)?;
    if first {
        let mut chosen = Vec::new();
        for (at, packet) in &sent {
            let connection = &mut batch[*at];
            let origin = Origin {
                to_client: false,
                tag: packet.tag(),
                generated: false,
            };
            if let Some(port) = own
                .get(&origin)
                .and_then(|frames| source_port(frames.first()?))
            {
                connection.port = port;
                chosen.push((connection.ends, port));
            }
        }
        boxes.agree(&chosen)?;
    }
    let nft = exchange(&mut boxes.nft, batch, &sent)?;
    for (at, packet) in &sent {
        judge(&batch[*at], packet, &own, &nft, report);
    }
    let mut at = 0;
    batch.retain(|connection| {
        at += 1;
        connection.steps.len() > 0 && connection.port != 0
    });
    Ok(())
}

/// Sends to one box and collects what comes out, until datagrams sent last have come out of both sides.
fn exchange(
    target: &mut TwinBox,
    batch: &[Connection],
    sent: &[(usize, Packet)],
) -> Result<Outputs> {
    let mut outputs = Outputs::new();
    for (at, packet) in sent {
        let side = usize::from(!packet.from_client());
        let connection = &batch[*at];
        for ip in packet.ips(&connection.ends, connection.port) {
            target.ports[side].send(&framed(side, &ip))?;
        }
    }
    for (side, tag) in CLOSING.into_iter().enumerate() {
        target.ports[side].send(&framed(side, &datagram(side, tag)))?;
    }
    let mut open = CLOSING.to_vec();
    let deadline = Instant::now() + PATIENCE;
    while !open.is_empty() {
        ensure!(
            Instant::now() < deadline,
            "{}: no end of the round: {open:x?}",
            target.namespace.name()
        );
        for side in 0..2 {
            while let Some(frame) = target.ports[side].receive()? {
                if frame[..6] != [CLIENT_MAC, MEMBER_MAC][side] {
                    continue;
                }
                let Some(origin) = compare::origin(&frame, side == 0) else {
                    continue;
                };
                if CLOSING.contains(&origin.tag) {
                    open.retain(|tag| *tag != origin.tag);
                } else {
                    outputs.entry(origin).or_default().push(frame);
                }
            }
        }
    }
    Ok(outputs)
}

/// Compares what both boxes made of a packet.
fn judge(
    connection: &Connection,
    packet: &Packet,
    own: &Outputs,
    nft: &Outputs,
    report: &mut Report,
) {
    for to_client in [false, true] {
        for generated in [false, true] {
            let origin = Origin {
                to_client,
                tag: packet.tag(),
                generated,
            };
            let take = |outputs: &Outputs| {
                let mut frames = outputs.get(&origin).cloned().unwrap_or_default();
                if generated {
                    frames.iter_mut().for_each(|frame| compare::blot(frame));
                }
                frames
            };
            let (left, right) = (take(own), take(nft));
            if left.is_empty() && right.is_empty() {
                continue;
            }
            let whole = |frames: &[Vec<u8>]| compare::reassemble(frames);
            let alike = left == right
                || matches!(packet, Packet::Fragments { .. })
                    && whole(&left).is_some()
                    && whole(&left) == whole(&right);
            let kind = match (packet, generated) {
                (_, true) => "error-made",
                (Packet::Whole(_), _) => "segment",
                (Packet::Fragments { .. }, _) => "fragments",
                (Packet::Error { .. }, _) => "error-translated",
            };
            if alike {
                *report.alike.entry(kind).or_default() += 1;
            } else if let Some(name) = explained(packet, origin, connection, &left, &right) {
                *report.explained.entry(name).or_default() += 1;
            } else {
                let class = format!(
                    "{kind}, IPv{}, towards the {}: {}",
                    if connection.ends.client.is_ipv6() {
                        6
                    } else {
                        4
                    },
                    if to_client { "client" } else { "member" },
                    match (left.is_empty(), right.is_empty()) {
                        (true, _) => "only nft",
                        (_, true) => "only smtplb",
                        _ => "other bytes",
                    },
                );
                let count = report.different.entry(class.clone()).or_default();
                *count += 1;
                if *count <= EXAMPLES {
                    report.examples.push(format!(
                        "{class}: {packet:?}\n  {:?} by port {}\n{}",
                        connection.ends,
                        connection.port,
                        compare::show(("smtplb", &left), ("nft", &right))
                    ));
                }
            }
        }
    }
}

/// The name of a difference that docs/life-of-a-packet.md describes.
fn explained(
    packet: &Packet,
    origin: Origin,
    connection: &Connection,
    own: &[Vec<u8>],
    nft: &[Vec<u8>],
) -> Option<&'static str> {
    let Origin {
        generated,
        to_client,
        ..
    } = origin;
    match packet {
        // nftables NAT sums an ICMP message before it changes it; smtplb keeps a wrong sum wrong.
        Packet::Error { damage, .. } if *damage != 0 && nft.is_empty() && own.len() == 1 => {
            Some("a damaged ICMP error is left to its receiver")
        }
        Packet::Whole(segment) if segment.looks_unfinished(&connection.ends, connection.port) => {
            let checksum = segment.ip_header(connection.ends.client.is_ipv6()) + 16;
            let unsummed = |frames: &[Vec<u8>]| {
                let mut bytes = ip(frames.first()?)?.to_vec();
                bytes.get_mut(checksum..checksum + 2)?.fill(0);
                Some(bytes)
            };
            (own.len() == 1 && unsummed(own) == unsummed(nft))
                .then_some("a damaged segment looks as if a device had to finish it")
        }
        _ if generated
            && !to_client
            && !own.is_empty()
            && connection.ends.snat == connection.ends.client.ip() =>
        {
            let source = |frames: &[Vec<u8>]| {
                let mut bytes = ip(frames.first()?)?.to_vec();
                // Source address and the checksum that covers it.
                match bytes[0] >> 4 {
                    4 => bytes[12..16].fill(0),
                    _ => {
                        bytes[8..24].fill(0);
                        bytes[42..44].fill(0);
                    }
                }
                Some(bytes)
            };
            (source(own) == source(nft))
                .then_some("an answer to a member without SNAT is from the client")
        }
        // The caller compares with the count of `no-answer`.
        _ if generated && own.is_empty() && nft.len() == 1 => Some(UNANSWERED),
        _ => None,
    }
}

/// An error that smtplb did not send because it had sent enough for the moment.
pub const UNANSWERED: &str = "no more errors than the limit allows";

/// An Ethernet frame that enters a box on this side.
pub fn framed(side: usize, ip: &[u8]) -> Vec<u8> {
    let mut frame = [BOX_MACS[side], [CLIENT_MAC, MEMBER_MAC][side]].concat();
    frame.extend(if ip[0] >> 4 == 6 {
        [0x86, 0xdd]
    } else {
        [0x08, 0x00]
    });
    frame.extend(ip);
    frame
}

/// A plain routed datagram from one side to the other.
fn datagram(side: usize, tag: u32) -> Vec<u8> {
    let (src, dst) = match side {
        0 => (address(71, 14, false), address(72, 22, false)),
        _ => (address(72, 22, false), address(71, 14, false)),
    };
    let mut ip = vec![0x45, 0, 0, 28];
    ip.extend((tag as u16).to_be_bytes());
    ip.extend([0x40, 0, 64, 17, 0, 0]);
    ip.extend(octets(src));
    ip.extend(octets(dst));
    let check = !fold(sum(&ip));
    ip[10..12].copy_from_slice(&check.to_be_bytes());
    // From and to the discard port, without a checksum (RFC 768).
    ip.extend([0, 9, 0, 9, 0, 8, 0, 0]);
    ip
}

/// The source port of a TCP packet; extension headers of IPv6 are not looked behind.
fn source_port(frame: &[u8]) -> Option<u16> {
    let ip = ip(frame)?;
    let at = match ip.first()? >> 4 {
        4 => usize::from(ip[0] & 0xf) * 4,
        _ => 40,
    };
    Some(u16::from_be_bytes([*ip.get(at)?, *ip.get(at + 1)?]))
}
