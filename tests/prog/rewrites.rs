//! Packet in, packet out: byte for byte, checksums computed in full by the test.

use std::net::SocketAddr;

use lb_userspace::model::{Generation, Method, Snat};

use crate::{
    packet::{ACK, FIN, Packet, RST, SYN, source_port},
    rig::{CLIENT_MAC, MEMBER_MAC, Outcome, Rig, generation, mac},
};

const CLIENT: &str = "10.0.1.2:40000";
const SERVICE: &str = "10.0.1.100:465";
const MEMBER: &str = "10.0.2.11:4465";
const BOX: &str = "10.0.2.1:0";
const CLIENT6: &str = "[fd00:1::2]:40000";
const SERVICE6: &str = "[fd00:1::100]:465";
const MEMBER6: &str = "[fd00:2::11]:4465";
const BOX6: &str = "[fd00:2::1]:0";

fn both(snat: Snat) -> Generation {
    generation(
        Method::LeastConnections,
        &[
            ("four", SERVICE, snat.clone(), &[MEMBER]),
            ("six", SERVICE6, snat, &[MEMBER6]),
        ],
    )
}

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// The packet as it must leave towards the member.
fn to_member(sent: &Packet, snat: SocketAddr, member: &str) -> Packet {
    Packet {
        src_mac: mac("s0"),
        dst_mac: MEMBER_MAC,
        src: snat,
        dst: at(member),
        ttl: sent.ttl - 1,
        ..sent.clone()
    }
}

/// The packet as it must leave towards the client.
fn to_client(sent: &Packet, service: &str, client: &str) -> Packet {
    Packet {
        src_mac: mac("c0"),
        dst_mac: CLIENT_MAC,
        src: at(service),
        dst: at(client),
        ttl: sent.ttl - 1,
        ..sent.clone()
    }
}

/// Opens a connection and returns the source that the member sees.
fn open(rig: &mut Rig, client: &str, service: &str, own: &str) -> SocketAddr {
    let (outcome, out) = rig.send(&Packet::new(at(client), at(service), SYN).bytes(), "c0");
    assert_eq!(outcome, Outcome::Sent);
    SocketAddr::new(at(own).ip(), source_port(&out))
}

#[test]
fn every_packet_of_a_connection_is_translated_both_ways() {
    Rig::each(
        "both-ways",
        || both(Snat::Automap),
        1024,
        |rig| {
            for (client, service, member, own) in [
                (CLIENT, SERVICE, MEMBER, BOX),
                (CLIENT6, SERVICE6, MEMBER6, BOX6),
            ] {
                let syn = Packet::new(at(client), at(service), SYN);
                let (outcome, out) = rig.send(&syn.bytes(), "c0");
                assert_eq!(outcome, Outcome::Sent);
                let snat = SocketAddr::new(at(own).ip(), source_port(&out));
                assert_eq!(out, to_member(&syn, snat, member).bytes(), "SYN");
                for (flags, length) in [
                    (SYN | ACK, 0),
                    (ACK, 0),
                    (ACK, 1),
                    (ACK, 1001),
                    (ACK, 1400),
                    (FIN | ACK, 0),
                ] {
                    let mut packet = Packet::new(at(member), snat, flags);
                    packet.payload = (0..length).map(|byte| byte as u8).collect();
                    let (outcome, out) = rig.send(&packet.bytes(), "s0");
                    assert_eq!(outcome, Outcome::Sent);
                    assert_eq!(
                        out,
                        to_client(&packet, service, client).bytes(),
                        "reverse {flags:#x} {length}"
                    );
                    let mut packet = Packet::new(at(client), at(service), ACK);
                    packet.payload = vec![0xa5; length];
                    let (outcome, out) = rig.send(&packet.bytes(), "c0");
                    assert_eq!(outcome, Outcome::Sent);
                    assert_eq!(
                        out,
                        to_member(&packet, snat, member).bytes(),
                        "forward {length}"
                    );
                }
            }
        },
    );
}

#[test]
fn without_snat_the_member_sees_the_client() {
    Rig::each(
        "no-snat",
        || both(Snat::None),
        1024,
        |rig| {
            for (client, service, member) in
                [(CLIENT, SERVICE, MEMBER), (CLIENT6, SERVICE6, MEMBER6)]
            {
                let syn = Packet::new(at(client), at(service), SYN);
                let (outcome, out) = rig.send(&syn.bytes(), "c0");
                assert_eq!(outcome, Outcome::Sent);
                assert_eq!(out, to_member(&syn, at(client), member).bytes());
                let answer = Packet::new(at(member), at(client), SYN | ACK);
                let (outcome, out) = rig.send(&answer.bytes(), "s0");
                assert_eq!(outcome, Outcome::Sent);
                assert_eq!(out, to_client(&answer, service, client).bytes());
            }
        },
    );
}

#[test]
fn a_partial_checksum_leaves_complete_or_still_partial() {
    Rig::each(
        "partial",
        || both(Snat::Automap),
        1024,
        |rig| {
            // A test-run packet counts as complete at the TC hook, whatever its bytes say: nothing to see there.
            if rig.program == "balance_tc" {
                return;
            }
            for (client, service, member, own) in [
                (CLIENT, SERVICE, MEMBER, BOX),
                (CLIENT6, SERVICE6, MEMBER6, BOX6),
            ] {
                let snat = open(rig, client, service, own);
                for length in [0, 1, 3, 511, 512, 513, 1023, 1024, 1399] {
                    let mut packet = Packet::new(at(client), at(service), ACK);
                    packet.payload = (0..length).map(|byte| (byte * 7) as u8).collect();
                    let (outcome, out) = rig.send(&packet.partial_bytes(), "c0");
                    assert_eq!(outcome, Outcome::Sent);
                    let expected = to_member(&packet, snat, member);
                    let expected = match rig.program {
                        "balance_xdp" => expected.bytes(),
                        _ => expected.partial_bytes(),
                    };
                    assert_eq!(out, expected, "{length} bytes");
                }
            }
        },
    );
}

/// One packet in 65,536: its complete checksum is the sum of the pseudo-header by chance.
#[test]
fn a_complete_checksum_that_looks_partial_leaves_complete() {
    Rig::each(
        "looks-partial",
        || both(Snat::Automap),
        1024,
        |rig| {
            for (client, service, member, own) in [
                (CLIENT, SERVICE, MEMBER, BOX),
                (CLIENT6, SERVICE6, MEMBER6, BOX6),
            ] {
                let snat = open(rig, client, service, own);
                let packets = (0..=u16::MAX).map(|word| {
                    let mut packet = Packet::new(at(client), at(service), ACK);
                    packet.payload = word.to_be_bytes().to_vec();
                    packet
                });
                let alike: Vec<_> = packets
                    .filter(|packet| packet.bytes() == packet.partial_bytes())
                    .collect();
                assert!(!alike.is_empty());
                for packet in alike {
                    let (outcome, out) = rig.send(&packet.bytes(), "c0");
                    assert_eq!(outcome, Outcome::Sent);
                    assert_eq!(out, to_member(&packet, snat, member).bytes());
                }
            }
        },
    );
}

#[test]
fn ip_options_are_kept() {
    Rig::each(
        "options",
        || both(Snat::None),
        1024,
        |rig| {
            let mut syn = Packet::new(at(CLIENT), at(SERVICE), SYN);
            // Router alert, then end of options (RFC 2113).
            syn.options = vec![0x94, 4, 0, 0, 0, 0, 0, 0];
            let (outcome, out) = rig.send(&syn.bytes(), "c0");
            assert_eq!(outcome, Outcome::Sent);
            assert_eq!(out, to_member(&syn, at(CLIENT), MEMBER).bytes());
        },
    );
}

#[test]
fn what_is_not_ours_passes_untouched() {
    Rig::each(
        "untouched",
        || both(Snat::Automap),
        1024,
        |rig| {
            let mut udp = Packet::new(at(CLIENT), at(SERVICE), SYN).bytes();
            udp[23] = 17;
            let mut fragment = Packet::new(at(CLIENT), at(SERVICE), SYN).bytes();
            fragment[21] = 0x05;
            let mut arp = vec![0xff; 12];
            arp.extend([0x08, 0x06]);
            arp.resize(60, 0);
            for (what, frame) in [
                (
                    "another port",
                    Packet::new(at(CLIENT), at("10.0.1.100:466"), SYN).bytes(),
                ),
                (
                    "another address",
                    Packet::new(at(CLIENT), at("10.0.1.1:465"), SYN).bytes(),
                ),
                (
                    "another address",
                    Packet::new(at(CLIENT6), at("[fd00:1::1]:465"), SYN).bytes(),
                ),
                (
                    "foreign traffic",
                    Packet::new(at("10.9.9.9:1"), at("10.8.8.8:2"), ACK).bytes(),
                ),
                ("UDP", udp),
                ("a fragment whose first is not known", fragment),
                ("ARP", arp),
                ("a runt", vec![0; 14]),
            ] {
                let (outcome, out) = rig.send(&frame, "c0");
                assert_eq!((outcome, out), (Outcome::Passed, frame), "{what}");
            }
            assert!(
                rig.plane.drops().values().all(|count| *count == 0),
                "{:?}",
                rig.plane.drops()
            );
        },
    );
}

#[test]
fn what_is_ours_but_cannot_go_is_counted_by_name() {
    Rig::each(
        "by-name",
        || both(Snat::Automap),
        1024,
        |rig| {
            for flags in [ACK, SYN | ACK, RST, FIN | ACK] {
                let stray = Packet::new(at(CLIENT), at(SERVICE), flags).bytes();
                let before = rig.drops("no-flow");
                assert_eq!(
                    rig.send(&stray, "c0"),
                    (Outcome::Passed, stray),
                    "the stack answers it"
                );
                assert_eq!(rig.drops("no-flow"), before + rig.counts_passed());
            }
            // The rest would come in another fragment, and the stack put it together.
            let mut hiding = Packet::new(at(CLIENT), at(SERVICE), SYN).bytes();
            hiding.truncate(34 + 8);
            hiding[16..18].copy_from_slice(&28u16.to_be_bytes());
            hiding[20..22].copy_from_slice(&0x2000u16.to_be_bytes());
            hiding.resize(60, 0);
            assert_eq!(rig.send(&hiding, "c0").0, Outcome::Dropped);
            assert_eq!(rig.drops("hidden-header"), 1);
            let mut old = Packet::new(at(CLIENT), at(SERVICE), SYN);
            old.ttl = 1;
            let (outcome, out) = rig.send(&old.bytes(), "c0");
            assert_eq!(
                (outcome, out[34]),
                (Outcome::Sent, 11),
                "ICMP time exceeded"
            );
            assert_eq!(
                out[..14],
                [&old.src_mac[..], &old.dst_mac, &[8, 0]].concat()
            );
            assert_eq!(rig.drops("ttl-exceeded"), 1);
            let (number, pool) = (rig.member("four", 0), rig.generation.pools["four"].clone());
            rig.plane
                .set_member(number, &pool.name, pool.members[0].address, false)
                .unwrap();
            let refused = Packet::new(at("10.0.1.2:41000"), at(SERVICE), SYN).bytes();
            assert_eq!(
                rig.send(&refused, "c0"),
                (Outcome::Passed, refused),
                "the stack refuses it"
            );
            assert_eq!(rig.drops("no-member"), rig.counts_passed());
        },
    );
}
