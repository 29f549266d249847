//! Jumbo frames: whole packets of up to 9000 bytes, which XDP sees in pieces.

use std::{process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use tests::{
    twin::{Boxes, Leg, Packet, Segment, ends, framed, ip},
    wait::wait_for,
};

const SYN: u16 = 0x02;
const ACK: u16 = 0x10;
const MTU: usize = 9000;
const SOON: Duration = Duration::from_secs(5);

/// The next TCP packet out of a side.
fn next(boxes: &mut Boxes, side: usize) -> Result<Vec<u8>> {
    let port = &mut boxes.own.ports[side];
    wait_for(SOON, "a packet", || {
        let frame = port.receive().ok()??;
        let packet = ip(&frame)?;
        let tcp = match packet[0] >> 4 {
            4 => packet[9],
            _ => packet[6],
        };
        (tcp == 6).then(|| packet.to_vec())
    })
}

fn jumbo_frames(attach: &str) -> Result<()> {
    let mut boxes = Boxes::build(attach, "")?;
    for (machine, interface) in [
        (&boxes.outside, "own-c"),
        (&boxes.outside, "own-s"),
        (&boxes.own.namespace, "cli0"),
        (&boxes.own.namespace, "srv0"),
    ] {
        let mut link = Command::new("ip");
        let mtu = MTU.to_string();
        machine.run(link.args(["link", "set", interface, "mtu", &mtu]))?;
    }
    for v6 in [false, true] {
        let ends = ends(3, v6);
        let header = if v6 { 40 } else { 20 };
        let syn = Segment::new(Leg::Request, 1, SYN);
        boxes.own.ports[0].send(&framed(0, &syn.ip(&ends, 0)))?;
        let out = next(&mut boxes, 1)?;
        let port = u16::from_be_bytes([out[header], out[header + 1]]);
        for length in [1460, 1461, 3000, 4096, 8000, MTU - header - 20] {
            for (side, leg, to) in [
                (0, Leg::Request, Leg::Delivery),
                (1, Leg::Answer, Leg::Reply),
            ] {
                let mut segment = Segment::new(leg, 2, ACK);
                segment.payload = (0..length).map(|at| (at * 7) as u8).collect();
                let packet = Packet::Whole(segment.clone());
                for ip in packet.ips(&ends, port) {
                    boxes.own.ports[side].send(&framed(side, &ip))?;
                }
                let out = next(&mut boxes, 1 - side)
                    .with_context(|| format!("{length} bytes of {leg:?}, IPv6 {v6}"))?;
                segment.leg = to;
                segment.ttl -= 1;
                ensure!(out == segment.ip(&ends, port), "{length} bytes of {leg:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn jumbo_frames_by_tc() -> Result<()> {
    jumbo_frames("tc")
}

#[test]
fn jumbo_frames_by_xdp() -> Result<()> {
    jumbo_frames("xdp")
}

#[test]
fn jumbo_frames_by_generic_xdp() -> Result<()> {
    jumbo_frames("xdp-generic")
}
