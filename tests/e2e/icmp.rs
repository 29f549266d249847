//! ICMP that the box answers, and that it does not carry.

use std::{net::IpAddr, time::Duration};

use anyhow::{Result, ensure};
use tests::{
    twin::{
        Boxes, CLIENT_MAC, Leg, Packet, Segment, address, ends, fold, framed, ip, octets, pseudo,
        sum,
    },
    wait::wait_for,
};

const SOON: Duration = Duration::from_secs(5);

/// An echo request with this identifier (RFC 792, RFC 4443 §4.1).
fn echo(src: IpAddr, dst: IpAddr, id: u8) -> Vec<u8> {
    let v6 = src.is_ipv6();
    let mut icmp = vec![if v6 { 128 } else { 8 }, 0, 0, 0, 0, id, 0, 1];
    icmp.extend([0x5a; 32]);
    let base = if v6 {
        pseudo(src, dst, 58, icmp.len())
    } else {
        0
    };
    let check = !fold(base + sum(&icmp));
    icmp[2..4].copy_from_slice(&check.to_be_bytes());
    let mut ip = if v6 {
        vec![0x60, 0, 0, 0, 0, icmp.len() as u8, 58, 64]
    } else {
        vec![0x45, 0, 0, 20 + icmp.len() as u8, 0, id, 0, 0, 64, 1, 0, 0]
    };
    ip.extend(octets(src));
    ip.extend(octets(dst));
    if !v6 {
        let check = !fold(sum(&ip));
        ip[10..12].copy_from_slice(&check.to_be_bytes());
    }
    ip.extend(icmp);
    ip
}

/// The identifier of an echo reply.
fn reply(frame: &[u8]) -> Option<u8> {
    let ip = ip(frame)?;
    let (at, kind) = match (ip[0] >> 4, ip.get(9)?, ip.get(6)?) {
        (4, 1, _) => (20, 0),
        (6, _, 58) => (40, 129),
        _ => return None,
    };
    (*ip.get(at)? == kind).then(|| ip.get(at + 5).copied())?
}

fn echo_of_own_addresses_only(attach: &str) -> Result<()> {
    let mut boxes = Boxes::build(attach, "")?;
    for v6 in [false, true] {
        let client = address(71, 11, v6);
        // A neighbour's address, one behind the box, one from elsewhere; then the virtual address, as the last.
        let foreign = [address(71, 77, v6), address(72, 77, v6), address(99, 1, v6)];
        let own = address(71, 100, v6);
        for (id, target) in (1..).zip(foreign.into_iter().chain([own])) {
            let frame = framed(0, &echo(client, target, id));
            boxes.own.ports[0].send(&frame)?;
        }
        let port = &mut boxes.own.ports[0];
        let answered = wait_for(SOON, "an echo reply", || {
            while let Ok(Some(frame)) = port.receive() {
                if frame[..6] == CLIENT_MAC
                    && let Some(id) = reply(&frame)
                {
                    return Some(id);
                }
            }
            None
        })?;
        ensure!(answered == 4, "address {answered} was answered");
    }
    Ok(())
}

/// A redirect about a flow would lead the client past the box.
fn redirects_are_dropped(attach: &str) -> Result<()> {
    let mut boxes = Boxes::build(attach, "")?;
    let ends = ends(0, false);
    let syn = Packet::Whole(Segment::new(Leg::Request, 1, 2));
    boxes.own.ports[0].send(&framed(0, &syn.ips(&ends, 0)[0]))?;
    let port = &mut boxes.own.ports[1];
    let port = wait_for(SOON, "the SYN", || {
        let frame = port.receive().ok()??;
        let ip = ip(&frame).filter(|ip| ip[0] == 0x45 && ip[9] == 6)?;
        Some(u16::from_be_bytes([ip[20], ip[21]]))
    })?;
    let redirect = Packet::Error {
        tag: 2,
        ttl: 64,
        from: address(72, 250, false),
        kind: 5,
        code: 1,
        word: 0x0a48_00fb,
        inner: Segment::new(Leg::Delivery, 3, 2),
        quoted: 28,
        damage: 0,
    };
    boxes.own.ports[1].send(&framed(1, &redirect.ips(&ends, port)[0]))?;
    wait_for(SOON, "a drop by name", || {
        (boxes.plane.drops()["icmp-redirect"] == 1).then_some(())
    })
}

#[test]
fn echo_of_own_addresses_only_by_tc() -> Result<()> {
    echo_of_own_addresses_only("tc")
}

#[test]
fn echo_of_own_addresses_only_by_xdp() -> Result<()> {
    echo_of_own_addresses_only("xdp")
}

#[test]
fn echo_of_own_addresses_only_by_generic_xdp() -> Result<()> {
    echo_of_own_addresses_only("xdp-generic")
}

#[test]
fn redirects_are_dropped_by_tc() -> Result<()> {
    redirects_are_dropped("tc")
}

#[test]
fn redirects_are_dropped_by_xdp() -> Result<()> {
    redirects_are_dropped("xdp")
}

#[test]
fn redirects_are_dropped_by_generic_xdp() -> Result<()> {
    redirects_are_dropped("xdp-generic")
}
