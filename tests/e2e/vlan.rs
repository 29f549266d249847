//! Clients behind VLAN tags, on a trunk that the box has no VLAN interfaces for.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_common::event::Cause;
use tests::{
    twin::{
        BOX_MACS, Boxes, CLIENT_MAC, Ends, Leg, MEMBER_MAC, Packet, Segment, address, ends, fold,
        framed, ip, pseudo, sum,
    },
    wait::wait_for,
};

const FIN: u16 = 0x01;
const SYN: u16 = 0x02;
const RST: u16 = 0x04;
const ACK: u16 = 0x10;
/// Long enough for the slowest machine; an answer takes microseconds.
const SOON: Duration = Duration::from_secs(5);
/// The box's two sides.
const CLIENT: usize = 0;
const MEMBER: usize = 1;

/// Tags as they lie in a frame.
const TEN: &[u8] = &[0x81, 0x00, 0x60, 0x0a];
const TWENTY_WITH_SEVEN: &[u8] = &[0x88, 0xa8, 0x00, 0x14, 0x81, 0x00, 0x00, 0x07];
const THIRTY: &[u8] = &[0x81, 0x00, 0x00, 0x1e];

struct Trunk {
    boxes: Boxes,
    tag: u32,
}

impl Trunk {
    /// Sends a packet with tags, and returns what comes out at a side with the same identification.
    fn pass(&mut self, packet: &mut Packet, ends: &Ends, port: u16, tags: &[u8]) -> Result<()> {
        self.tag += 1;
        match packet {
            Packet::Whole(segment) | Packet::Fragments { segment, .. } => segment.tag = self.tag,
            Packet::Error { tag, .. } => *tag = self.tag,
        }
        let side = if packet.from_client() { CLIENT } else { MEMBER };
        for ip in packet.ips(ends, port) {
            let mut frame = framed(side, &ip);
            frame.splice(12..12, tags.iter().copied());
            self.boxes.own.ports[side].send(&frame)?;
        }
        Ok(())
    }

    /// The next frame out of a side that is for its hosts and of interest.
    fn next(&mut self, side: usize, wanted: impl Fn(&[u8]) -> bool) -> Result<Vec<u8>> {
        let port = &mut self.boxes.own.ports[side];
        let mac = [CLIENT_MAC, MEMBER_MAC][side];
        wait_for(SOON, "a frame", || {
            while let Ok(Some(frame)) = port.receive() {
                if frame[..6] == mac && ip(&frame).is_some_and(&wanted) {
                    return Some(frame);
                }
            }
            None
        })
    }
}

/// The frame that must come out: no TTL is taken off what the box made itself.
fn frame_to(side: usize, tags: &[u8], ip: &[u8]) -> Vec<u8> {
    let mut frame = [[CLIENT_MAC, MEMBER_MAC][side], BOX_MACS[side]].concat();
    frame.extend(tags);
    frame.extend(if ip[0] >> 4 == 6 {
        [0x86, 0xdd]
    } else {
        [0x08, 0x00]
    });
    frame.extend(ip);
    frame
}

fn is_tcp(ip: &[u8]) -> bool {
    match ip[0] >> 4 {
        4 => ip[9] == 6,
        _ => matches!(ip[6], 6 | 44),
    }
}

fn is_icmp(ip: &[u8]) -> bool {
    match ip[0] >> 4 {
        4 => ip[9] == 1,
        _ => ip[6] == 58 && ip[40] < 5,
    }
}

/// A segment of some payload, one hop older than it was sent when it comes out.
fn segment(leg: Leg, flags: u16, payload: usize, ttl: u8) -> Segment {
    let mut segment = Segment::new(leg, 0, flags);
    segment.payload = vec![0x5a; payload];
    segment.ttl = ttl;
    segment.df = false;
    segment
}

/// The packet as it leaves, untagged.
fn delivered(segment: &Segment, leg: Leg, ends: &Ends, port: u16) -> Vec<u8> {
    let mut segment = segment.clone();
    segment.leg = leg;
    segment.ttl -= 1;
    segment.ip(ends, port)
}

fn carries(trunk: &mut Trunk, ends: &Ends, tags: &[u8]) -> Result<()> {
    let mut syn = Packet::Whole(segment(Leg::Request, SYN, 0, 64));
    trunk.pass(&mut syn, ends, 0, tags)?;
    let out = trunk.next(MEMBER, is_tcp)?;
    let bytes = ip(&out).context("an IP packet")?;
    let at = if ends.client.is_ipv4() { 20 } else { 40 };
    let port = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let Packet::Whole(sent) = &syn else {
        unreachable!("it is whole")
    };
    let expected = delivered(sent, Leg::Delivery, ends, port);
    ensure!(out == frame_to(MEMBER, &[], &expected), "SYN: {out:02x?}");
    for payload in [0, 1, 1000] {
        let answer = segment(
            Leg::Answer,
            if payload == 0 { SYN | ACK } else { ACK },
            payload,
            64,
        );
        let mut packet = Packet::Whole(answer);
        trunk.pass(&mut packet, ends, port, &[])?;
        let out = trunk.next(CLIENT, is_tcp)?;
        let Packet::Whole(sent) = &packet else {
            unreachable!("it is whole")
        };
        let expected = frame_to(CLIENT, tags, &delivered(sent, Leg::Reply, ends, port));
        ensure!(out == expected, "answer:\n{out:02x?}\n{expected:02x?}");
        let mut packet = Packet::Whole(segment(Leg::Request, ACK, payload, 64));
        trunk.pass(&mut packet, ends, port, tags)?;
        let out = trunk.next(MEMBER, is_tcp)?;
        let Packet::Whole(sent) = &packet else {
            unreachable!("it is whole")
        };
        let expected = frame_to(MEMBER, &[], &delivered(sent, Leg::Delivery, ends, port));
        ensure!(out == expected, "request:\n{out:02x?}\n{expected:02x?}");
    }
    // Fragments, both ways.
    for (leg, side, tags_in, tags_out) in [
        (Leg::Request, MEMBER, tags, &[][..]),
        (Leg::Answer, CLIENT, &[][..], tags),
    ] {
        let mut packet = Packet::Fragments {
            segment: segment(leg, ACK, 1000, 64),
            size: 512,
            order: vec![0, 1],
        };
        trunk.pass(&mut packet, ends, port, tags_in)?;
        for fragment in 0..2 {
            let out = trunk.next(side, is_tcp)?;
            let start = 12 + tags_out.len();
            ensure!(
                out[12..start] == *tags_out,
                "fragment {fragment}: {out:02x?}"
            );
        }
    }
    // A later fragment before the first: lost, and counted by name once the first tells whose it was.
    let early = trunk.boxes.plane.drops()["early-fragment"];
    let mut packet = Packet::Fragments {
        segment: segment(Leg::Request, ACK, 1000, 64),
        size: 512,
        order: vec![1, 0],
    };
    trunk.pass(&mut packet, ends, port, tags)?;
    trunk.next(MEMBER, is_tcp)?;
    ensure!(trunk.boxes.plane.drops()["early-fragment"] == early + 1);
    // At the end of its life: answered with the tags it came with.
    let mut old = Packet::Whole(segment(Leg::Request, ACK, 10, 1));
    trunk.pass(&mut old, ends, port, tags)?;
    let out = trunk.next(CLIENT, is_icmp)?;
    ensure!(out[12..12 + tags.len()] == *tags, "answer: {out:02x?}");
    // An error from the members' side.
    let v6 = ends.client.is_ipv6();
    let mut error = Packet::Error {
        tag: 0,
        ttl: 64,
        from: address(72, 250, v6),
        kind: if v6 { 1 } else { 3 },
        code: 1,
        word: 0,
        inner: segment(Leg::Delivery, ACK, 10, 60),
        quoted: if v6 { 60 } else { 40 },
        damage: 0,
    };
    trunk.pass(&mut error, ends, port, &[])?;
    let out = trunk.next(CLIENT, is_icmp)?;
    ensure!(out[12..12 + tags.len()] == *tags, "error: {out:02x?}");
    Ok(())
}

/// What a TCP header says: flags, sequence number, acknowledgement.
fn said(ip: &[u8]) -> (u16, u32, u32) {
    let tcp = &ip[if ip[0] >> 4 == 4 { 20 } else { 40 }..];
    let number = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
    (u16::from(tcp[13]), number(4), number(8))
}

fn is_reset(ip: &[u8]) -> bool {
    is_tcp(ip) && said(ip).0 & RST != 0
}

impl Trunk {
    /// Sends a segment of these flags, numbers and length, with tags.
    fn say(
        &mut self,
        (leg, ends, port): (Leg, &Ends, u16),
        (flags, seq, ack): (u16, u32, u32),
        payload: usize,
        tags: &[u8],
    ) -> Result<()> {
        let mut segment = segment(leg, flags, payload, 64);
        (segment.seq, segment.ack) = (seq, ack);
        self.pass(&mut Packet::Whole(segment), ends, port, tags)
    }

    /// The client is told that there is no connection, by a whole packet from the virtual address.
    fn told(&mut self, ends: &Ends, tags: &[u8], expected: (u16, u32, u32)) -> Result<()> {
        let out = self.next(CLIENT, is_reset)?;
        ensure!(out[12..12 + tags.len()] == *tags, "tags: {out:02x?}");
        let bytes = ip(&out).context("an IP packet")?;
        let got = said(bytes);
        ensure!(got == expected, "{got:x?} instead of {expected:x?}");
        let v6 = ends.client.is_ipv6();
        let (header, length) = if v6 {
            (40, 40 + usize::from(bytes[5]))
        } else {
            ensure!(fold(sum(&bytes[..20])) == 0xffff, "header: {bytes:02x?}");
            (20, usize::from(bytes[3]))
        };
        ensure!(length == header + 20, "length: {bytes:02x?}");
        let tcp = &bytes[header..length];
        let base = pseudo(ends.service.ip(), ends.client.ip(), 6, tcp.len());
        // What the stack itself answers may be left for a device to finish.
        let left = tags.is_empty() && sum(&tcp[16..18]) == u64::from(fold(base));
        ensure!(left || fold(base + sum(tcp)) == 0xffff, "TCP: {bytes:02x?}");
        let ports = [ends.service.port(), ends.client.port()].map(u16::to_be_bytes);
        ensure!(tcp[..4] == ports.concat(), "ports: {bytes:02x?}");
        Ok(())
    }
}

/// Opens a connection, has it ended as `drain` and `maint` do, and looks what its client hears then and later.
fn tells(trunk: &mut Trunk, ends: &Ends, tags: &[u8]) -> Result<()> {
    let client = (Leg::Request, ends, 0);
    trunk.say(client, (SYN, 1000, 0), 0, tags)?;
    let out = trunk.next(MEMBER, is_tcp)?;
    let bytes = ip(&out).context("an IP packet")?;
    let at = if ends.client.is_ipv4() { 20 } else { 40 };
    let port = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    trunk.say((Leg::Answer, ends, port), (SYN | ACK, 5000, 1001), 0, &[])?;
    trunk.next(CLIENT, is_tcp)?;
    trunk.say(client, (ACK, 1001, 5001), 0, tags)?;
    trunk.next(MEMBER, is_tcp)?;
    let Boxes { own, plane, .. } = &mut trunk.boxes;
    let flows: Vec<_> = plane
        .flows()
        .into_iter()
        .filter(|flow| !flow.phase.ended())
        .collect();
    let member = flows.first().context("a flow")?.member;
    let ended = own
        .namespace
        .enter(|| plane.end_flows(member, &flows, Cause::Maintenance))?;
    ensure!(ended == 1, "{ended} flows ended");
    trunk.told(ends, tags, (RST | ACK, 5001, 1001))?;
    trunk.next(MEMBER, is_reset)?;
    // Whoever does not believe it, or comes too late, asks about no flow.
    let before = trunk.boxes.plane.drops()["no-flow"];
    trunk.say(client, (ACK, 1001, 5001), 100, tags)?;
    trunk.told(ends, tags, (RST, 5001, 0))?;
    trunk.say(client, (FIN, 7000, 0), 10, tags)?;
    trunk.told(ends, tags, (RST | ACK, 0, 7011))?;
    let counted = trunk.boxes.plane.drops()["no-flow"] - before;
    ensure!(counted == 2, "{counted} without a flow");
    // A reset is never answered: the next answer is that to the next question.
    trunk.say(client, (RST, 1001, 0), 0, tags)?;
    trunk.say(client, (RST | ACK, 1001, 6001), 0, tags)?;
    trunk.say(client, (ACK, 1001, 6002), 0, tags)?;
    trunk.told(ends, tags, (RST, 6002, 0))?;
    // Nobody there to serve it.
    let v6 = ends.client.is_ipv6();
    let service = u8::from(ends.member == tests::twin::ends(1, v6).member);
    let pool = format!("twin{service}-{}", if v6 { "v6" } else { "v4" });
    let set = |boxes: &mut Boxes, up: bool| {
        let Boxes { own, plane, .. } = boxes;
        let name = pool.as_str().into();
        own.namespace
            .enter(|| plane.set_member(member, &name, ends.member, up))
    };
    set(&mut trunk.boxes, false)?;
    let before = trunk.boxes.plane.drops()["no-member"];
    trunk.say(client, (SYN, 8000, 0), 0, tags)?;
    trunk.told(ends, tags, (RST | ACK, 0, 8001))?;
    let counted = trunk.boxes.plane.drops()["no-member"] - before;
    ensure!(counted == 1, "{counted} without a member");
    set(&mut trunk.boxes, true)
}

fn clients_are_told(attach: &str) -> Result<()> {
    let boxes = Boxes::build(attach, "")?;
    let mut trunk = Trunk { boxes, tag: 0 };
    let mut number = 0;
    for tags in [&[][..], TEN, TWENTY_WITH_SEVEN] {
        for v6 in [false, true] {
            number += 1;
            tells(&mut trunk, &ends(number, v6), tags)
                .with_context(|| format!("tags {tags:02x?}, IPv6 {v6}"))
                .inspect_err(|_| eprintln!("{:?}", trunk.boxes.plane.drops()))?;
        }
    }
    Ok(())
}

#[test]
fn clients_behind_tags_are_reset_by_tc() -> Result<()> {
    clients_are_told("tc")
}

#[test]
fn clients_behind_tags_are_reset_by_xdp() -> Result<()> {
    clients_are_told("xdp")
}

#[test]
fn clients_behind_tags_are_reset_by_generic_xdp() -> Result<()> {
    clients_are_told("xdp-generic")
}

fn tags_are_kept(attach: &str) -> Result<()> {
    let boxes = Boxes::build(attach, "vlans = [10, 20]")?;
    let mut trunk = Trunk { boxes, tag: 0 };
    let mut number = 0;
    for tags in [&[][..], TEN, TWENTY_WITH_SEVEN] {
        for v6 in [false, true] {
            number += 1;
            carries(&mut trunk, &ends(number, v6), tags)
                .with_context(|| format!("tags {tags:02x?}, IPv6 {v6}"))
                .inspect_err(|_| eprintln!("{:?}", trunk.boxes.plane.drops()))?;
        }
    }
    let foreign = |trunk: &Trunk| trunk.boxes.plane.drops()["foreign-vlan"];
    for v6 in [false, true] {
        let ends = ends(50, v6);
        let before = foreign(&trunk);
        let mut syn = Packet::Whole(segment(Leg::Request, SYN, 0, 64));
        trunk.pass(&mut syn, &ends, 0, THIRTY)?;
        wait_for(SOON, "a drop by name", || {
            (foreign(&trunk) == before + 1).then_some(())
        })?;
        // The next that comes out is the next that was sent in a VLAN that may.
        trunk.pass(&mut syn, &ends, 0, TEN)?;
        let out = trunk.next(MEMBER, is_tcp)?;
        let tag = ip(&out).map(|ip| if v6 { ip[3] } else { ip[5] });
        ensure!(tag == Some(trunk.tag as u8), "{out:02x?}");
    }
    Ok(())
}

#[test]
fn tags_are_kept_by_tc() -> Result<()> {
    tags_are_kept("tc")
}

#[test]
fn tags_are_kept_by_xdp() -> Result<()> {
    tags_are_kept("xdp")
}

#[test]
fn tags_are_kept_by_generic_xdp() -> Result<()> {
    tags_are_kept("xdp-generic")
}
