//! Resets in the name of the other side, for flows that the box ends.
//!
//! A receiver takes a reset only with exactly the sequence number it expects next (RFC 5961 §3.2), which the flow's
//! record knows.

use std::net::{IpAddr, SocketAddr};

use lb_common::{
    addr::Addr,
    shift::{PLAIN, SETTLED, UNSENT, waits},
    vlan::untag,
};
use socket2::{Domain, Protocol, Socket, Type};

use super::{FlowSnapshot, flows::Behind, sys};

/// `IPPROTO_RAW`: the packet brings its IP header along.
const IPPROTO_RAW: i32 = 255;
/// `ETH_P_IP` and `ETH_P_IPV6`.
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const TCP: u8 = 6;
const TCP_HEADER: usize = 20;
const RST_ACK: u8 = 0x14;
/// As most stacks send (RFC 1700).
const TTL: u8 = 64;

/// A reset to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reset {
    from: SocketAddr,
    to: SocketAddr,
    /// What the receiver expects next.
    sequence: u32,
    /// What the receiver sends next: a client that waits for the member's SYN believes nothing else (RFC 9293 §3.10.7.3).
    acknowledged: u32,
    /// Where the receiver is, if no routing table knows.
    behind: Option<Behind>,
}

/// The virtual server's reset to the client.
pub(super) fn to_client(flow: &FlowSnapshot) -> Reset {
    let [client, member] = flow.next;
    Reset {
        from: socket(flow.route.address()),
        to: socket(flow.route.client()),
        sequence: member.wrapping_add(flow.shift[1]),
        acknowledged: client,
        behind: flow.behind,
    }
}

/// The client's resets to the member: two while an inserted header is on its way, since nobody knows whether it has
/// arrived. The wrong one is answered, and nobody listens.
pub(super) fn to_member(flow: &FlowSnapshot) -> impl Iterator<Item = Reset> {
    let [client, member] = flow.next;
    let (before, behind) = (client, client.wrapping_add(flow.shift[0]));
    let places = match flow.header {
        word if word == UNSENT || waits(word) => [Some(before), None],
        PLAIN | SETTLED => [Some(behind), None],
        _ => [Some(before), Some(behind)],
    };
    places.into_iter().flatten().map(move |sequence| Reset {
        from: socket(flow.route.snat()),
        to: socket(flow.route.member()),
        sequence,
        acknowledged: member,
        behind: None,
    })
}

fn socket((address, port): (Addr, u16)) -> SocketAddr {
    address.to_socket_addr(port)
}

impl Reset {
    /// The packet, IP header included; nothing where the families differ.
    fn packet(&self) -> Option<Vec<u8>> {
        let mut tcp = [0; TCP_HEADER];
        tcp[..2].copy_from_slice(&self.from.port().to_be_bytes());
        tcp[2..4].copy_from_slice(&self.to.port().to_be_bytes());
        tcp[4..8].copy_from_slice(&self.sequence.to_be_bytes());
        tcp[8..12].copy_from_slice(&self.acknowledged.to_be_bytes());
        tcp[12] = (TCP_HEADER as u8 / 4) << 4;
        tcp[13] = RST_ACK;
        let length = TCP_HEADER as u8;
        let mut packet = Vec::with_capacity(60);
        let pseudo: Vec<u8> = match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                packet.extend_from_slice(&[0x45, 0, 0, 20 + length, 0, 0, 0x40, 0, TTL, TCP, 0, 0]);
                packet.extend_from_slice(&from.octets());
                packet.extend_from_slice(&to.octets());
                let sum = checksum(packet.iter());
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
                [&from.octets()[..], &to.octets(), &[0, TCP, 0, length]].concat()
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                packet.extend_from_slice(&[0x60, 0, 0, 0, 0, length, TCP, TTL]);
                packet.extend_from_slice(&from.octets());
                packet.extend_from_slice(&to.octets());
                let rest = [0, 0, 0, length, 0, 0, 0, TCP];
                [&from.octets()[..], &to.octets(), &rest].concat()
            }
            _ => return None,
        };
        let sum = checksum(pseudo.iter().chain(&tcp));
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        packet.extend_from_slice(&tcp);
        Some(packet)
    }
}

/// The packet in a frame to a client behind tags.
fn framed(behind: &Behind, packet: &[u8]) -> Vec<u8> {
    let mut frame = behind.macs.concat();
    for tag in [behind.vlan as u16, (behind.vlan >> 16) as u16] {
        if tag != 0 {
            let (kind, control) = untag(tag);
            frame.extend(kind.to_ne_bytes());
            frame.extend(control.to_be_bytes());
        }
    }
    let kind = match packet.first() {
        Some(first) if first >> 4 == 6 => ETHERTYPE_IPV6,
        _ => ETHERTYPE_IPV4,
    };
    frame.extend(kind.to_be_bytes());
    frame.extend(packet);
    frame
}

/// RFC 1071, of an even number of bytes.
pub(super) fn checksum<'a>(bytes: impl Iterator<Item = &'a u8>) -> u16 {
    let sum = bytes.enumerate().fold(0u32, |sum, (at, byte)| {
        sum + (u32::from(*byte) << if at % 2 == 0 { 8 } else { 0 })
    });
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

/// May this process send them? Asks the system, and sends nothing.
pub(super) fn may_send() -> bool {
    Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(IPPROTO_RAW))).is_ok()
}

/// Sends them: through the routing table as any packet of the box, or to where the client's frames come from.
#[derive(Debug)]
pub(super) struct Sender {
    v4: Option<Socket>,
    v6: Option<Socket>,
    link: Option<Socket>,
}

impl Sender {
    /// Opens the sockets. Without the privilege nothing is sent; a peer learns of the end from its next packet.
    pub(super) fn open() -> Self {
        let open = |domain, protocol| {
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(protocol)))
                .and_then(|socket| socket.set_nonblocking(true).map(|()| socket));
            socket
                .inspect_err(|error| {
                    log::warn!(
                        "cannot open a raw socket ({error}): ended flows are reset when their peers speak next;                          CAP_NET_RAW lets them know at once"
                    );
                })
                .ok()
        };
        Self {
            v4: open(Domain::IPV4, IPPROTO_RAW),
            v6: open(Domain::IPV6, IPPROTO_RAW),
            // No protocol: nothing is received.
            link: open(Domain::PACKET, 0),
        }
    }

    /// Sends one, if it can be: a full queue or a missing route is a lost packet like any other.
    pub(super) fn send(&self, reset: &Reset) {
        let Some(packet) = reset.packet() else {
            return;
        };
        let (socket, bytes, to) = match (&reset.behind, reset.to) {
            (Some(behind), _) => (
                &self.link,
                framed(behind, &packet),
                sys::link_address(behind.interface, 0, behind.macs[0]),
            ),
            // A raw IPv6 socket takes the port for a protocol.
            (None, SocketAddr::V4(to)) => {
                (&self.v4, packet, SocketAddr::from((*to.ip(), 0)).into())
            }
            (None, SocketAddr::V6(to)) => {
                (&self.v6, packet, SocketAddr::from((*to.ip(), 0)).into())
            }
        };
        let Some(socket) = socket else {
            return;
        };
        if let Err(error) = socket.send_to(&bytes, &to) {
            log::debug!("a reset to {} is lost: {error}", reset.to);
        }
    }
}

#[cfg(test)]
mod tests {
    use lb_common::{
        flow::{FlowKey, Route},
        shift::{instant, waiting},
        tcp::{Direction, Phase},
    };

    use super::*;

    fn flow(addresses: [&str; 4]) -> FlowSnapshot {
        let [client, address, snat, member] =
            addresses.map(|text| text.parse::<SocketAddr>().unwrap());
        let key = |from: SocketAddr, to: SocketAddr| FlowKey {
            src: from.ip().into(),
            dst: to.ip().into(),
            sport: from.port().to_be(),
            dport: to.port().to_be(),
        };
        FlowSnapshot {
            slot: 1,
            route: Route {
                leave: [key(snat, member), key(address, client)],
            },
            phase: Phase::Established,
            virtual_server: 1,
            member: 1,
            created: 0,
            last_seen: 0,
            packets: [0; 2],
            bytes: [0; 2],
            next: [1000, u32::MAX],
            reset_by: Direction::Forward,
            shift: [28, 0],
            header: SETTLED,
            behind: None,
        }
    }

    #[test]
    fn each_side_gets_the_number_it_expects() {
        let flow = flow([
            "198.51.100.7:4000",
            "203.0.113.1:465",
            "10.0.0.1:2000",
            "10.0.0.9:25",
        ]);
        let client = to_client(&flow);
        assert_eq!(
            (client.from, client.to),
            (
                "203.0.113.1:465".parse().unwrap(),
                "198.51.100.7:4000".parse().unwrap()
            )
        );
        assert_eq!((client.sequence, client.acknowledged), (u32::MAX, 1000));
        let members: Vec<_> = to_member(&flow).collect();
        let [member] = &members[..] else {
            panic!("{members:?}");
        };
        assert_eq!(
            (member.from, member.to),
            (
                "10.0.0.1:2000".parse().unwrap(),
                "10.0.0.9:25".parse().unwrap()
            )
        );
        assert_eq!(
            (member.sequence, member.acknowledged),
            (1028, u32::MAX),
            "a header of 28 bytes was inserted on the way to the member"
        );
    }

    #[test]
    fn a_member_is_told_both_numbers_while_a_header_is_on_its_way() {
        let mut flow = flow([
            "198.51.100.7:4000",
            "203.0.113.1:465",
            "10.0.0.1:2000",
            "10.0.0.9:25",
        ]);
        for (header, sequences) in [
            (UNSENT, &[1000][..]),
            (waiting(2), &[1000]),
            (instant(1 << 40), &[1000, 1028]),
            (SETTLED, &[1028]),
        ] {
            flow.header = header;
            let told: Vec<_> = to_member(&flow).map(|reset| reset.sequence).collect();
            assert_eq!(told, sequences, "{header}");
        }
    }

    #[test]
    fn a_client_behind_tags_is_found_by_its_record() {
        let mut flow = flow([
            "198.51.100.7:4000",
            "203.0.113.1:465",
            "10.0.0.1:2000",
            "10.0.0.9:25",
        ]);
        let behind = Behind {
            interface: 7,
            macs: [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]],
            // VLAN 20 of a provider, VLAN 7 with a priority within.
            vlan: 0x6007_1014,
        };
        flow.behind = Some(behind);
        let reset = to_client(&flow);
        let packet = reset.packet().unwrap();
        let frame = framed(&reset.behind.unwrap(), &packet);
        assert_eq!(
            frame[..22],
            [
                &[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2][..],
                &[0x88, 0xa8, 0, 20, 0x81, 0, 0x60, 7, 8, 0],
            ]
            .concat()
        );
        assert_eq!(frame[22..], packet);
        let members: Vec<_> = to_member(&flow).map(|reset| reset.behind).collect();
        assert_eq!(members, [None], "members are where routes lead");
    }

    #[test]
    fn packets_are_whole_and_sum_up() {
        let v4 = to_client(&flow([
            "198.51.100.7:4000",
            "203.0.113.1:465",
            "10.0.0.1:2000",
            "10.0.0.9:25",
        ]));
        let packet = v4.packet().unwrap();
        assert_eq!(packet.len(), 40);
        assert_eq!(checksum(packet[..20].iter()), 0);
        let pseudo = [&packet[12..20], &[0, 6, 0, 20], &packet[20..]].concat();
        assert_eq!(checksum(pseudo.iter()), 0);
        assert_eq!(packet[33], RST_ACK);
        let v6 = flow([
            "[2001:db8::7]:4000",
            "[2001:db8::1]:465",
            "[fd00::1]:2000",
            "[fd00::9]:25",
        ]);
        let packet = to_member(&v6).next().unwrap().packet().unwrap();
        assert_eq!(packet.len(), 60);
        let pseudo = [&packet[8..40], &[0, 0, 0, 20, 0, 0, 0, 6], &packet[40..]].concat();
        assert_eq!(checksum(pseudo.iter()), 0);
        assert_eq!(packet[44..48], 1028u32.to_be_bytes());
    }
}
