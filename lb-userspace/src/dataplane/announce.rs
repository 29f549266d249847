//! Tells neighbours where an address lives from now on: what they remember of an earlier owner would lead them astray.
//!
//! The kernel answers who asks, but speaks unasked only when an interface comes up (`arp_notify`, `ndisc_notify`).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures_util::TryStreamExt as _;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType};
use rtnetlink::Handle;
use socket2::{Domain, Protocol, Socket, Type};

use super::{reset::checksum, sys};

/// Times that an address is announced, a second apart: a switch whose port has just come up loses the first
/// (RFC 5227 §2.3, RFC 4861 §7.2.6).
const TIMES: u8 = 3;

/// `ETH_P_ARP` and `ETH_P_IPV6`.
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// `ff02::1`, every node on the link, and its group address on Ethernet (RFC 2464 §7).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
const BROADCAST: Mac = [0xff; 6];
const ICMPV6: u8 = 58;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;
/// Whoever knows another hardware address shall forget it (RFC 4861 §4.4).
const OVERRIDE: u8 = 0x20;
const ROUTER: u8 = 0x80;
const TARGET_LINK_LAYER_ADDRESS: u8 = 2;

type Mac = [u8; 6];

/// Addresses that were added a moment ago.
#[derive(Debug, Default)]
pub(super) struct Announcements {
    /// With the index of the interface, and how often it is still to be said.
    due: BTreeMap<(IpAddr, u32), u8>,
    socket: Option<Socket>,
}

impl Announcements {
    /// This address is on this interface from now on.
    pub(super) fn add(&mut self, address: IpAddr, index: u32) {
        self.due.insert((address, index), TIMES);
    }

    /// It is not any more.
    pub(super) fn forget(&mut self, address: IpAddr, index: u32) {
        self.due.remove(&(address, index));
    }

    /// Says what is due, once; to be called every second, as soon as the programs carry what neighbours may then send.
    pub(super) async fn tell(&mut self, handle: &Handle) {
        if self.due.is_empty() {
            return;
        }
        if self.socket.is_none() {
            match open() {
                Ok(socket) => self.socket = Some(socket),
                Err(error) => {
                    log::warn!(
                        "cannot announce {} new addresses ({error}): neighbours that remember another owner learn of it \
                         when they ask again; CAP_NET_RAW lets them know at once",
                        self.due.len()
                    );
                    self.due.clear();
                    return;
                }
            }
        }
        let indices: BTreeSet<u32> = self.due.keys().map(|(_, index)| *index).collect();
        let mut links = BTreeMap::new();
        for index in indices {
            links.extend(Link::find(handle, index).await.map(|link| (index, link)));
        }
        for (address, index) in self.due.keys() {
            // Other links than Ethernet have no neighbours to tell, or none that ask by these protocols.
            if let (Some(link), Some(socket)) = (links.get(index), &self.socket) {
                let packet = link.announcement(*address);
                let to = sys::link_address(*index, packet.protocol, packet.to);
                if let Err(error) = socket.send_to(&packet.bytes, &to) {
                    log::debug!("an announcement of {address} is lost: {error}");
                }
            }
        }
        self.due.retain(|_, left| {
            *left -= 1;
            *left > 0
        });
    }
}

/// Sends whatever it is told to; no protocol: nothing is received.
fn open() -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(Protocol::from(0)))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// May this process announce? Asks the system, and sends nothing.
pub(super) fn may_announce() -> bool {
    open().is_ok()
}

/// An Ethernet interface with neighbours.
struct Link {
    mac: Mac,
    /// Does it forward IPv6? The kernel says so in its own advertisements.
    router: bool,
}

struct Packet {
    protocol: u16,
    to: Mac,
    bytes: Vec<u8>,
}

impl Link {
    async fn find(handle: &Handle, index: u32) -> Option<Self> {
        let mut found = handle.link().get().match_index(index).execute();
        let message = found.try_next().await.ok().flatten()?;
        let mac = message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::Address(bytes) => Mac::try_from(bytes.as_slice()).ok(),
                _ => None,
            })?;
        let name = message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name),
                _ => None,
            })?;
        let header = &message.header;
        let speaks = header.link_layer_type == LinkLayerType::Ether
            && !header.flags.contains(LinkFlags::Noarp);
        let forwarding = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{name}/forwarding"));
        speaks.then(|| Self {
            mac,
            router: forwarding.is_ok_and(|word| word.trim() != "0"),
        })
    }

    fn announcement(&self, address: IpAddr) -> Packet {
        match address {
            IpAddr::V4(address) => Packet {
                protocol: ETHERTYPE_ARP,
                to: BROADCAST,
                bytes: self.arp(address),
            },
            IpAddr::V6(address) => Packet {
                protocol: ETHERTYPE_IPV6,
                to: ALL_NODES_MAC,
                bytes: self.advertisement(address),
            },
        }
    }

    /// An ARP announcement: a request for one's own address (RFC 5227 §1.1).
    fn arp(&self, address: Ipv4Addr) -> Vec<u8> {
        // Ethernet and IPv4, their lengths, a request.
        let header = [0, 1, 8, 0, 6, 4, 0, 1];
        [
            &header[..],
            &self.mac,
            &address.octets(),
            &[0; 6],
            &address.octets(),
        ]
        .concat()
    }

    /// An unsolicited neighbor advertisement (RFC 4861 §7.2.6), IPv6 header included.
    fn advertisement(&self, address: Ipv6Addr) -> Vec<u8> {
        let flags = OVERRIDE | if self.router { ROUTER } else { 0 };
        let mut message = vec![NEIGHBOR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
        message.extend(address.octets());
        message.extend([TARGET_LINK_LAYER_ADDRESS, 1]);
        message.extend(self.mac);
        let length = message.len() as u8;
        let addresses = [address.octets(), ALL_NODES.octets()].concat();
        let pseudo = [&addresses[..], &[0, 0, 0, length, 0, 0, 0, ICMPV6]].concat();
        let sum = checksum(pseudo.iter().chain(&message));
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        // The hop limit proves that no router has passed it on (RFC 4861 §7.1.2).
        let mut packet = vec![0x60, 0, 0, 0, 0, length, ICMPV6, 255];
        packet.extend(addresses);
        packet.extend(message);
        packet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: Link = Link {
        mac: [2, 0, 0, 0, 0, 0x17],
        router: true,
    };

    #[test]
    fn an_ipv4_address_is_asked_for_in_its_own_name() {
        let packet = LINK.announcement("10.0.0.200".parse().unwrap());
        assert_eq!((packet.protocol, packet.to), (ETHERTYPE_ARP, BROADCAST));
        assert_eq!(
            packet.bytes,
            [
                0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 0x17, 10, 0, 0, 200, 0, 0, 0, 0, 0, 0, 10,
                0, 0, 200
            ]
        );
    }

    #[test]
    fn an_ipv6_address_is_advertised_to_all() {
        let packet = LINK.announcement("fd00::200".parse().unwrap());
        assert_eq!(
            (packet.protocol, packet.to),
            (ETHERTYPE_IPV6, ALL_NODES_MAC)
        );
        let bytes = packet.bytes;
        assert_eq!(bytes.len(), 40 + 32);
        assert_eq!(bytes[..8], [0x60, 0, 0, 0, 0, 32, ICMPV6, 255]);
        assert_eq!(bytes[44], ROUTER | OVERRIDE);
        assert_eq!(bytes[48..64], bytes[8..24], "the target is the sender");
        assert_eq!(bytes[64..], [2, 1, 2, 0, 0, 0, 0, 0x17]);
        let pseudo = [&bytes[8..40], &[0, 0, 0, 32, 0, 0, 0, ICMPV6], &bytes[40..]].concat();
        assert_eq!(checksum(pseudo.iter()), 0);
        let host = Link {
            router: false,
            ..LINK
        };
        assert_eq!(
            host.announcement("fd00::200".parse().unwrap()).bytes[44],
            OVERRIDE
        );
    }
}
