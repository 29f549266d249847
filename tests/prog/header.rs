//! The PROXY protocol header as the kernel inserts it: a whole dialogue, byte for byte, through every program.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use lb_userspace::model::{Generation, Method, Snat};

use tests::wait::wait_until;

use crate::{
    packet::{ACK, FIN, PSH, Packet, SYN, source_port},
    rig::{CLIENT_MAC, MEMBER_MAC, Outcome, Rig, generation, mac},
};

const FAMILIES: [[&str; 4]; 2] = [
    [
        "10.0.1.2:40000",
        "10.0.1.100:465",
        "10.0.2.11:4465",
        "10.0.2.1:0",
    ],
    [
        "[fd00:1::2]:40000",
        "[fd00:1::100]:465",
        "[fd00:2::11]:4465",
        "[fd00:2::1]:0",
    ],
];
/// Client and member count from here; the client's numbers wrap on the way.
const CLIENT_ISN: u32 = u32::MAX - 100;
const MEMBER_ISN: u32 = 77;

fn told() -> Generation {
    let [four, six] = FAMILIES;
    generation(
        Method::LeastConnections,
        &[
            ("told-four", four[1], Snat::Automap, &[four[2]]),
            ("told-six", six[1], Snat::Automap, &[six[2]]),
        ],
    )
}

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// The header as the protocol has it.
fn header(client: SocketAddr, address: SocketAddr) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    header.extend(match client {
        SocketAddr::V4(_) => [0x21, 0x11, 0, 12],
        SocketAddr::V6(_) => [0x21, 0x21, 0, 36],
    });
    for ip in [client.ip(), address.ip()] {
        match ip {
            IpAddr::V4(ip) => header.extend(ip.octets()),
            IpAddr::V6(ip) => header.extend(ip.octets()),
        }
    }
    header.extend(client.port().to_be_bytes());
    header.extend(address.port().to_be_bytes());
    header
}

/// A connection through a rig, from both ends.
struct Talk<'a> {
    rig: &'a mut Rig,
    client: SocketAddr,
    service: SocketAddr,
    member: SocketAddr,
    snat: SocketAddr,
    header: Vec<u8>,
}

impl<'a> Talk<'a> {
    fn open(rig: &'a mut Rig, [client, service, member, own]: [&str; 4]) -> Self {
        let [client, service, member, own] = [client, service, member, own].map(at);
        let header = header(client, service);
        let mut talk = Self {
            rig,
            client,
            service,
            member,
            snat: own,
            header,
        };
        let mut syn = talk.by_client(SYN, 0, 0);
        (syn.seq, syn.ack) = (CLIENT_ISN, 0);
        syn.tcp_options = vec![2, 4, 5, 0xb4, 34, 10, 1, 2, 3, 4, 5, 6, 7, 8, 1, 1];
        syn.payload = vec![7; 50];
        let (outcome, out) = talk.rig.send(&syn.bytes(), "c0");
        assert_eq!(outcome, Outcome::Sent);
        talk.snat = SocketAddr::new(own.ip(), source_port(&out));
        syn.tcp_options[4..].fill(1);
        syn.payload.clear();
        assert_eq!(out, talk.at_member(&syn).bytes(), "SYN");
        talk
    }

    fn length(&self) -> u32 {
        self.header.len() as u32
    }

    /// `place` counts from the client's first byte, `ack` from the member's.
    fn by_client(&self, flags: u8, place: u32, payload: usize) -> Packet {
        let mut packet = Packet::new(self.client, self.service, flags);
        packet.seq = CLIENT_ISN.wrapping_add(1).wrapping_add(place);
        packet.ack = MEMBER_ISN + 1;
        packet.tcp_options = vec![1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8];
        packet.payload = (0..payload).map(|byte| (byte * 7) as u8).collect();
        packet
    }

    fn by_member(&self, flags: u8, ack: u32, payload: usize) -> Packet {
        let mut packet = Packet::new(self.member, self.snat, flags);
        packet.seq = MEMBER_ISN + 1;
        packet.ack = CLIENT_ISN.wrapping_add(1).wrapping_add(ack);
        packet.payload = (0..payload).map(|byte| (byte * 5) as u8).collect();
        packet
    }

    fn at_member(&self, packet: &Packet) -> Packet {
        Packet {
            src_mac: mac("s0"),
            dst_mac: MEMBER_MAC,
            src: self.snat,
            dst: self.member,
            ttl: packet.ttl - 1,
            ..packet.clone()
        }
    }

    fn at_client(&self, packet: &Packet) -> Packet {
        Packet {
            src_mac: mac("c0"),
            dst_mac: CLIENT_MAC,
            src: self.service,
            dst: self.client,
            ttl: packet.ttl - 1,
            ..packet.clone()
        }
    }

    fn forward(&mut self, packet: &Packet, expected: &Packet, what: &str) {
        let (outcome, out) = self.rig.send(&packet.bytes(), "c0");
        assert_eq!(
            (outcome, out),
            (Outcome::Sent, self.at_member(expected).bytes()),
            "{what}"
        );
    }

    fn reverse(&mut self, packet: &Packet, expected: &Packet, what: &str) {
        let (outcome, out) = self.rig.send(&packet.bytes(), "s0");
        assert_eq!(
            (outcome, out),
            (Outcome::Sent, self.at_client(expected).bytes()),
            "{what}"
        );
    }

    fn header_like(&self, packet: &Packet) -> Packet {
        Packet {
            seq: CLIENT_ISN.wrapping_add(1),
            flags: ACK | PSH,
            payload: self.header.clone(),
            ..packet.clone()
        }
    }

    fn shifted(&self, packet: &Packet) -> Packet {
        Packet {
            seq: packet.seq.wrapping_add(self.length()),
            ..packet.clone()
        }
    }
}

fn each(name: &str, test: impl Fn(&mut Talk<'_>) + Sync) {
    Rig::each(name, told, 1024, |rig| {
        for family in FAMILIES {
            test(&mut Talk::open(rig, family));
        }
    });
}

#[test]
fn a_dialogue_that_the_server_begins() {
    each("server-first", |talk| {
        let length = talk.length();
        let mut answer = talk.by_member(SYN | ACK, 0, 0);
        answer.seq = MEMBER_ISN;
        answer.tcp_options = vec![2, 4, 5, 0xb4];
        let mut told = answer.clone();
        told.tcp_options[2..].copy_from_slice(&(1460 - length as u16).to_be_bytes());
        talk.reverse(&answer, &told, "SYN and ACK");

        let ack = talk.by_client(ACK, 0, 0);
        talk.forward(&ack, &talk.header_like(&ack), "the first ACK");
        let mut greeting = talk.by_member(ACK | PSH, 0, 91);
        talk.reverse(&greeting, &greeting.clone(), "a greeting that was faster");
        let again = talk.by_client(ACK, 0, 0);
        talk.forward(&again, &talk.header_like(&again), "still not acknowledged");
        greeting.ack = greeting.ack.wrapping_add(length);
        let told = Packet {
            ack: greeting.ack.wrapping_sub(length),
            ..greeting.clone()
        };
        talk.reverse(&greeting, &told, "the header is there");
        for (place, payload) in [(0, 0), (0, 16), (16, 1399), (1415, 1)] {
            let packet = talk.by_client(ACK | PSH, place, payload);
            talk.forward(&packet, &talk.shifted(&packet), "from then on");
        }
        let fin = talk.by_client(FIN | ACK, 1416, 0);
        talk.forward(&fin, &talk.shifted(&fin), "FIN");
    });
}

#[test]
fn a_dialogue_that_the_client_begins() {
    each("client-first", |talk| {
        let length = talk.length();
        let hello = talk.by_client(ACK | PSH, 0, 517);
        talk.forward(&hello, &talk.header_like(&hello), "no ACK came before");
        // Only right behind it: a slow emulator's next packet may come when the header counts as lost and goes once more.
        let shifted = talk.at_member(&talk.shifted(&hello)).bytes();
        let behind = || talk.rig.send(&hello.bytes(), "c0") == (Outcome::Sent, shifted.clone());
        let what = "a packet while the header is under way";
        wait_until(Duration::from_secs(10), what, behind).unwrap();
        let more = talk.by_client(ACK, 517, 800);
        talk.forward(&more, &talk.shifted(&more), "behind it");

        // The header is lost: the member says so, the client must not hear it.
        let mut hole = talk.by_member(ACK, 0, 0);
        hole.tcp_options = vec![1, 1, 5, 10];
        let edges = [length + 1, length + 1318];
        for edge in edges {
            hole.tcp_options
                .extend(CLIENT_ISN.wrapping_add(edge).to_be_bytes());
        }
        let mut told = hole.clone();
        told.tcp_options.fill(1);
        talk.reverse(&hole, &told, "a hole");
        let header = talk.at_member(&talk.header_like(&hello)).bytes();
        let again = || talk.rig.send(&hello.bytes(), "c0") == (Outcome::Sent, header.clone());
        wait_until(
            Duration::from_secs(10),
            "the header to be sent again",
            again,
        )
        .unwrap();

        let mut answer = talk.by_member(ACK, length + 517, 0);
        answer.tcp_options = vec![1, 5, 10];
        for edge in [length + 600, length + 700] {
            answer
                .tcp_options
                .extend(CLIENT_ISN.wrapping_add(edge).to_be_bytes());
        }
        answer.tcp_options.push(1);
        let mut told = answer.clone();
        told.ack = answer.ack.wrapping_sub(length);
        told.tcp_options.truncate(3);
        for edge in [600, 700] {
            told.tcp_options
                .extend(CLIENT_ISN.wrapping_add(edge).to_be_bytes());
        }
        told.tcp_options.push(1);
        talk.reverse(&answer, &told, "SACK at an odd place");
    });
}

#[test]
fn a_partial_checksum_is_kept_or_completed() {
    each("header-partial", |talk| {
        // A test-run packet counts as complete at the TC hook, whatever its bytes say: nothing to see there.
        if talk.rig.program == "balance_tc" {
            return;
        }
        // One right after the other: the header is under way for a moment only, which passes quickly on an emulated machine.
        let packets = [0, 517].map(|payload| {
            let packet = talk.by_client(ACK, 0, payload);
            let expected = talk.at_member(&match payload {
                0 => talk.header_like(&packet),
                _ => talk.shifted(&packet),
            });
            let expected = match talk.rig.program {
                "balance_xdp" => expected.bytes(),
                _ => expected.partial_bytes(),
            };
            (payload, packet, expected)
        });
        for (payload, packet, expected) in packets {
            let (outcome, out) = talk.rig.send(&packet.partial_bytes(), "c0");
            assert_eq!((outcome, out), (Outcome::Sent, expected), "{payload} bytes");
        }
    });
}
