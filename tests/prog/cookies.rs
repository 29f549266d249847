//! SYN cookies: what clients and members see when half-open connections have their share, byte for byte.

use std::net::SocketAddr;

use lb_common::{addr::Addr, tcp::Phase};
use lb_userspace::model::{Generation, Method, Snat};

use crate::{
    packet::{ACK, PSH, Packet, RST, SYN, octets, sequence, source_port},
    rig::{CLIENT_MAC, MEMBER_MAC, Outcome, Rig, generation, mac},
};

/// Client, virtual address, member, the box towards members; with a PROXY header and without.
const SITES: [([&str; 4], &str); 4] = [
    (
        [
            "10.0.1.2:40000",
            "10.0.1.100:465",
            "10.0.2.11:4465",
            "10.0.2.1:0",
        ],
        "four",
    ),
    (
        [
            "[fd00:1::2]:40000",
            "[fd00:1::100]:465",
            "[fd00:2::11]:4465",
            "[fd00:2::1]:0",
        ],
        "six",
    ),
    (
        [
            "10.0.1.2:40000",
            "10.0.1.101:465",
            "10.0.2.12:4465",
            "10.0.2.1:0",
        ],
        "told-four",
    ),
    (
        [
            "[fd00:1::2]:40000",
            "[fd00:1::101]:465",
            "[fd00:2::12]:4465",
            "[fd00:2::1]:0",
        ],
        "told-six",
    ),
];
const CLIENT_ISN: u32 = u32::MAX;
const MEMBER_ISN: u32 = 0x7654_3210;
/// Linux's: MSS, SACK permitted, timestamps, NOP, window scale.
const OPTIONS: [u8; 20] = [
    2, 4, 5, 0xb4, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7,
];

fn sites() -> Generation {
    let servers = SITES.each_ref().map(|([_, service, member, _], name)| {
        (*name, *service, Snat::Automap, std::slice::from_ref(member))
    });
    generation(Method::LeastConnections, &servers)
}

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// A client of a rig whose half-open connections have their share.
struct Client<'a> {
    rig: &'a mut Rig,
    client: SocketAddr,
    service: SocketAddr,
    member: SocketAddr,
    own: SocketAddr,
    told: bool,
}

impl Client<'_> {
    fn says(&self, flags: u8, seq: u32, ack: u32) -> Packet {
        let mut packet = Packet::new(self.client, self.service, flags);
        (packet.seq, packet.ack) = (seq, ack);
        packet
    }

    fn syn(&self) -> Packet {
        let mut syn = self.says(SYN, CLIENT_ISN, 0);
        syn.tcp_options = OPTIONS.to_vec();
        syn
    }

    fn hears(&self, flags: u8, seq: u32, ack: u32) -> Packet {
        let mut packet = Packet::new(self.service, self.client, flags);
        (packet.src_mac, packet.dst_mac) = (mac("c0"), CLIENT_MAC);
        (packet.seq, packet.ack) = (seq, ack);
        packet
    }

    fn member_hears(&self, port: u16, flags: u8, seq: u32, ack: u32) -> Packet {
        let snat = SocketAddr::new(self.own.ip(), port);
        let mut packet = Packet::new(snat, self.member, flags);
        (packet.src_mac, packet.dst_mac) = (mac("s0"), MEMBER_MAC);
        (packet.seq, packet.ack, packet.ttl) = (seq, ack, 63);
        packet
    }

    fn member_says(&self, port: u16, flags: u8, seq: u32, ack: u32) -> Packet {
        let snat = SocketAddr::new(self.own.ip(), port);
        let mut packet = Packet::new(self.member, snat, flags);
        (packet.seq, packet.ack) = (seq, ack);
        packet
    }

    /// The PROXY header of version 2 that the member gets.
    fn header(&self) -> Vec<u8> {
        if !self.told {
            return Vec::new();
        }
        let ends = [octets(self.client.ip()), octets(self.service.ip())].concat();
        let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21".to_vec();
        header.extend([if self.client.is_ipv4() { 0x11 } else { 0x21 }, 0]);
        header.push(ends.len() as u8 + 4);
        header.extend(ends);
        header.extend(self.client.port().to_be_bytes());
        header.extend(self.service.port().to_be_bytes());
        header
    }

    /// Sends a SYN and takes the cookie out of the answer, which is as it should be.
    fn cookie(&mut self) -> u32 {
        self.cookie_in(Dress::Plain)
    }

    /// As [`Self::cookie`], for a client whose frames look like this.
    fn cookie_in(&mut self, dress: Dress) -> u32 {
        let mut syn = self.syn();
        // Answers go where frames came from.
        syn.src_mac = CLIENT_MAC;
        syn.dst_mac = mac("c0");
        let flows = self.rig.plane.flows().len();
        let (outcome, out) = self.rig.send(&dress.on(&syn), "c0");
        assert_eq!(outcome, Outcome::Sent, "{dress:?}");
        let cookie = sequence(&dress.off(&out));
        let mut expected = self.hears(SYN | ACK, cookie, CLIENT_ISN.wrapping_add(1));
        let size: u16 = match (self.service.is_ipv4(), self.told) {
            (true, false) => 1460,
            (true, true) => 1460 - 28,
            (false, false) => 1440,
            (false, true) => 1440 - 52,
        };
        expected.window = 4096;
        expected.tcp_options = [&[2, 4], &size.to_be_bytes()[..]].concat();
        assert_eq!(out, dress.on(&expected), "{dress:?}");
        assert_eq!(
            self.rig.plane.flows().len(),
            flows,
            "nothing is left behind"
        );
        cookie
    }

    fn flow(&self) -> Option<Phase> {
        let ends = |(address, port): (Addr, u16)| address.to_socket_addr(port);
        let wanted = (self.client, self.service);
        let flows = self.rig.plane.flows();
        let ours = flows
            .iter()
            .find(|flow| (ends(flow.route.client()), ends(flow.route.address())) == wanted);
        ours.map(|flow| flow.phase)
    }
}

/// What a client's frames have beside the plain headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dress {
    Plain,
    Tag,
    TwoTags,
    /// Options of IPv4, an extension header of IPv6: what has to be looked behind.
    Deep,
}

impl Dress {
    fn tags(self) -> &'static [u8] {
        match self {
            Self::Tag => &[0x81, 0, 0, 10],
            Self::TwoTags => &[0x88, 0xa8, 0, 20, 0x81, 0, 0, 10],
            Self::Plain | Self::Deep => &[],
        }
    }

    fn on(self, packet: &Packet) -> Vec<u8> {
        let mut packet = packet.clone();
        if self == Self::Deep && packet.src.is_ipv4() {
            // Router alert, then end of options (RFC 2113).
            packet.options = vec![0x94, 4, 0, 0, 0, 0, 0, 0];
        }
        let mut frame = packet.bytes();
        if self == Self::Deep && packet.src.is_ipv6() {
            // Hop-by-hop options: padding (RFC 8200 §4.2).
            let length = frame.len() as u16 - 54 + 8;
            frame[18..20].copy_from_slice(&length.to_be_bytes());
            frame[20] = 0;
            frame.splice(54..54, [6, 0, 1, 4, 0, 0, 0, 0]);
        }
        frame.splice(12..12, self.tags().iter().copied());
        frame
    }

    /// The frame without all that; only good to read TCP from.
    fn off(self, frame: &[u8]) -> Vec<u8> {
        let mut frame = frame.to_vec();
        frame.drain(12..12 + self.tags().len());
        if self == Self::Deep {
            let at = if frame[12] == 0x08 { 34 } else { 54 };
            frame.drain(at..at + 8);
        }
        frame
    }
}

fn each(name: &str, test: impl Fn(&mut Client<'_>) + Sync) {
    Rig::each(name, sites, 512, |rig| {
        let most = rig.plane.flows_max() as u16 / 2;
        for port in 0..most {
            let ends = (at(SITES[0].0[0]).ip(), 1000 + port).into();
            let syn = Packet::new(ends, at(SITES[0].0[1]), SYN).bytes();
            assert_eq!(rig.send(&syn, "c0").0, Outcome::Sent, "{port} of {most}");
        }
        assert_eq!(rig.drops("syn-cookie"), 0);
        for ([client, service, member, own], site) in SITES {
            let [client, service, member, own] = [client, service, member, own].map(at);
            let told = site.starts_with("told");
            test(&mut Client {
                rig,
                client,
                service,
                member,
                own,
                told,
            });
        }
        assert!(rig.drops("syn-cookie") > 0);
        assert_eq!(rig.drops("internal"), 0);
    });
}

#[test]
fn a_client_that_exists_gets_in_by_a_cookie() {
    each("cookie", |it| {
        let first = CLIENT_ISN.wrapping_add(1);
        let cookie = it.cookie();
        let mut ack = it.says(ACK, first, cookie.wrapping_add(1));
        ack.window = 1234;
        let mut snat = 0;
        // Whatever the client sends until the member has answered.
        for payload in [0, 700] {
            ack.payload = vec![5; payload];
            let (outcome, out) = it.rig.send(&ack.bytes(), "c0");
            snat = source_port(&out);
            let mut expected = it.member_hears(snat, SYN, CLIENT_ISN, 0);
            expected.window = 1234;
            expected.tcp_options = vec![2, 4, 0x05, 0xa0];
            assert_eq!((outcome, out), (Outcome::Sent, expected.bytes()));
            assert_eq!(it.flow(), Some(Phase::Syn));
        }

        let mut answer = it.member_says(snat, SYN | ACK, MEMBER_ISN, first);
        answer.tcp_options = vec![2, 4, 5, 0xb4];
        let length = it.header().len() as u32;
        for _ in 0..2 {
            let (outcome, out) = it.rig.send(&answer.bytes(), "s0");
            let mut expected = it.member_hears(snat, ACK, first, MEMBER_ISN + 1);
            expected.window = 4096;
            if it.told {
                expected.flags |= PSH;
                expected.payload = it.header();
            }
            assert_eq!((outcome, out), (Outcome::Sent, expected.bytes()));
            assert_eq!(it.flow(), Some(Phase::Established));
        }

        let mut greeting = it.member_says(snat, ACK | PSH, MEMBER_ISN + 1, first + length);
        greeting.payload = b"220 mx.example.org\r\n".to_vec();
        let mut heard = it.hears(ACK | PSH, cookie.wrapping_add(1), first);
        (heard.ttl, heard.payload) = (63, greeting.payload.clone());
        let (outcome, out) = it.rig.send(&greeting.bytes(), "s0");
        assert_eq!((outcome, out), (Outcome::Sent, heard.bytes()));

        let mut hello = it.says(ACK | PSH, first, cookie.wrapping_add(21));
        hello.payload = b"EHLO client.example\r\n".to_vec();
        let mut expected = it.member_hears(snat, ACK | PSH, first + length, MEMBER_ISN + 21);
        expected.payload = hello.payload.clone();
        let (outcome, out) = it.rig.send(&hello.bytes(), "c0");
        assert_eq!((outcome, out), (Outcome::Sent, expected.bytes()));
        // What the member has acknowledged last.
        let reset = it.says(RST, first, 0);
        assert_eq!(it.rig.send(&reset.bytes(), "c0").0, Outcome::Sent);
        assert_eq!(it.flow(), Some(Phase::Reset));
    });
}

#[test]
fn a_member_that_refuses_is_heard() {
    each("cookie-refused", |it| {
        let first = CLIENT_ISN.wrapping_add(1);
        let cookie = it.cookie();
        let ack = it.says(ACK, first, cookie.wrapping_add(1));
        let snat = source_port(&it.rig.send(&ack.bytes(), "c0").1);
        let stray = it.member_says(snat, ACK, 5, 6);
        let mut told = it.member_hears(snat, RST, 6, 0);
        told.window = 4096;
        let (outcome, out) = it.rig.send(&stray.bytes(), "s0");
        assert_eq!((outcome, out), (Outcome::Sent, told.bytes()));
        assert_eq!(it.flow(), Some(Phase::Syn), "and the client asks again");
        let refusal = it.member_says(snat, RST | ACK, 0, first);
        let mut heard = it.hears(RST | ACK, cookie.wrapping_add(1), first);
        heard.ttl = 63;
        let (outcome, out) = it.rig.send(&refusal.bytes(), "s0");
        assert_eq!((outcome, out), (Outcome::Sent, heard.bytes()));
        assert_eq!(it.flow(), Some(Phase::Reset));
    });
}

#[test]
fn who_invents_a_cookie_leaves_nothing_behind() {
    each("cookie-forged", |it| {
        let first = CLIENT_ISN.wrapping_add(1);
        let cookie = it.cookie();
        let before = it.rig.plane.flows().len();
        let mut forged = vec![
            it.says(ACK, first, cookie),
            it.says(ACK, first.wrapping_add(1), cookie.wrapping_add(1)),
            it.says(SYN | ACK, first, cookie.wrapping_add(1)),
            it.says(RST | ACK, first, cookie.wrapping_add(1)),
        ];
        let mut other = it.says(ACK, first, cookie.wrapping_add(1));
        other.src.set_port(40_001);
        forged.push(other);
        for packet in forged {
            assert_eq!(it.rig.send(&packet.bytes(), "c0").0, Outcome::Passed);
        }
        assert_eq!(it.rig.plane.flows().len(), before);
    });
}

#[test]
fn tagged_clients_and_those_with_options_get_in_by_a_cookie() {
    each("cookie-dressed", |it| {
        for (port, dress) in (40_010..).zip([Dress::Tag, Dress::TwoTags, Dress::Deep]) {
            it.client.set_port(port);
            let first = CLIENT_ISN.wrapping_add(1);
            let cookie = it.cookie_in(dress);
            let mut ack = it.says(ACK, first, cookie.wrapping_add(1));
            (ack.src_mac, ack.dst_mac) = (CLIENT_MAC, mac("c0"));
            // Tags are the client's network's; what is in the packet goes on.
            let further = match dress {
                Dress::Deep => Dress::Deep,
                _ => Dress::Plain,
            };
            let (outcome, out) = it.rig.send(&dress.on(&ack), "c0");
            let snat = source_port(&further.off(&out));
            let mut expected = it.member_hears(snat, SYN, CLIENT_ISN, 0);
            expected.window = ack.window;
            expected.tcp_options = vec![2, 4, 0x05, 0xa0];
            assert_eq!((outcome, out), (Outcome::Sent, further.on(&expected)));
            assert_eq!(it.flow(), Some(Phase::Syn));

            let answer = it.member_says(snat, SYN | ACK, MEMBER_ISN, first);
            let (outcome, _) = it.rig.send(&answer.bytes(), "s0");
            assert_eq!(outcome, Outcome::Sent);
            assert_eq!(it.flow(), Some(Phase::Established));

            let length = it.header().len() as u32;
            let mut greeting = it.member_says(snat, ACK | PSH, MEMBER_ISN + 1, first + length);
            greeting.payload = b"220 mx.example.org\r\n".to_vec();
            let mut heard = it.hears(ACK | PSH, cookie.wrapping_add(1), first);
            (heard.ttl, heard.payload) = (63, greeting.payload.clone());
            // The tag that TC puts on last is beside the packet, where a test-run shows nothing.
            let back = match (dress, it.rig.program) {
                (Dress::Deep, _) | (Dress::Tag, "balance_tc") => Dress::Plain,
                (Dress::TwoTags, "balance_tc") => Dress::Tag,
                (tagged, _) => tagged,
            };
            let (outcome, out) = it.rig.send(&greeting.bytes(), "s0");
            assert_eq!(
                (outcome, out),
                (Outcome::Sent, back.on(&heard)),
                "{dress:?}"
            );
            let reset = it.says(RST, first, 0);
            assert_eq!(it.rig.send(&dress.on(&reset), "c0").0, Outcome::Sent);
            assert_eq!(it.flow(), Some(Phase::Reset));
        }
    });
}
