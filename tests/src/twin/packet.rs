//! Packets of a connection as a test says them, and their bytes with every checksum computed in full.

use std::net::{IpAddr, SocketAddr};

/// The four ends of a connection through a box. The box chooses the port of the last.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    pub client: SocketAddr,
    pub service: SocketAddr,
    pub member: SocketAddr,
    pub snat: IpAddr,
}

/// Which way, and before or behind the box.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leg {
    /// Client to virtual address.
    Request,
    /// SNAT address to member.
    Delivery,
    /// Member to SNAT address.
    Answer,
    /// Virtual address to client.
    Reply,
}

impl Leg {
    /// Source and destination.
    pub fn ends(self, ends: &Ends, port: u16) -> (SocketAddr, SocketAddr) {
        let snat = SocketAddr::new(ends.snat, port);
        match self {
            Self::Request => (ends.client, ends.service),
            Self::Delivery => (snat, ends.member),
            Self::Answer => (ends.member, snat),
            Self::Reply => (ends.service, ends.client),
        }
    }
}

/// One TCP packet.
#[derive(Clone, Debug)]
pub struct Segment {
    pub leg: Leg,
    /// IPv4 identification or IPv6 flow label: survives every box, tells outputs apart.
    pub tag: u32,
    pub ttl: u8,
    pub tos: u8,
    /// IPv4: do not fragment.
    pub df: bool,
    /// IPv4 options, a multiple of four bytes.
    pub options: Vec<u8>,
    /// IPv6 extension headers: their number, and the bytes behind "next header", length included.
    pub extensions: Vec<(u8, Vec<u8>)>,
    pub flags: u16,
    pub seq: u32,
    pub ack: u32,
    pub window: u16,
    pub urgent: u16,
    pub tcp_options: Vec<u8>,
    pub payload: Vec<u8>,
    /// Added to the right TCP checksum.
    pub damage: u16,
}

impl Segment {
    /// A plain one.
    pub fn new(leg: Leg, tag: u32, flags: u16) -> Self {
        Self {
            leg,
            tag,
            ttl: 64,
            tos: 0,
            df: true,
            options: Vec::new(),
            extensions: Vec::new(),
            flags,
            seq: 0x0102_0304,
            ack: 0x0506_0708,
            window: 8192,
            urgent: 0,
            tcp_options: Vec::new(),
            payload: Vec::new(),
            damage: 0,
        }
    }

    /// Length of the IP header with options or extension headers, bytes.
    pub fn ip_header(&self, v6: bool) -> usize {
        let extensions = self.extensions.iter().map(|(_, bytes)| bytes.len() + 1);
        let fixed = if v6 { 40 } else { 20 };
        fixed + self.options.len() + extensions.sum::<usize>()
    }

    /// Length of the TCP header, bytes.
    pub fn tcp_header(&self) -> usize {
        20 + self.tcp_options.len()
    }

    fn tcp(&self, ends: &Ends, port: u16) -> Vec<u8> {
        let (src, dst) = self.leg.ends(ends, port);
        let mut tcp = Vec::with_capacity(60 + self.payload.len());
        tcp.extend(src.port().to_be_bytes());
        tcp.extend(dst.port().to_be_bytes());
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        let words = 5 + self.tcp_options.len() as u16 / 4;
        tcp.extend((words << 12 | self.flags & 0x1ff).to_be_bytes());
        tcp.extend(self.window.to_be_bytes());
        tcp.extend([0, 0]);
        tcp.extend(self.urgent.to_be_bytes());
        tcp.extend(&self.tcp_options);
        tcp.extend(&self.payload);
        let check = !fold(pseudo(src.ip(), dst.ip(), 6, tcp.len()) + sum(&tcp));
        tcp[16..18].copy_from_slice(&check.wrapping_add(self.damage).to_be_bytes());
        tcp
    }

    /// Is it damaged, and its checksum by chance what a sender leaves to a device: the sum of the pseudo-header?
    pub fn looks_unfinished(&self, ends: &Ends, port: u16) -> bool {
        let (src, dst) = self.leg.ends(ends, port);
        let tcp = self.tcp(ends, port);
        let left = fold(pseudo(src.ip(), dst.ip(), 6, tcp.len()));
        self.damage != 0 && tcp[16..18] == left.to_be_bytes()
    }

    /// The packet from its IP header on.
    pub fn ip(&self, ends: &Ends, port: u16) -> Vec<u8> {
        let (src, dst) = self.leg.ends(ends, port);
        let tcp = self.tcp(ends, port);
        let mut body: Vec<u8> = Vec::new();
        for (at, (_, bytes)) in self.extensions.iter().enumerate() {
            body.push(self.extensions.get(at + 1).map_or(6, |next| next.0));
            body.extend(bytes);
        }
        body.extend(tcp);
        let header = Header {
            src: src.ip(),
            dst: dst.ip(),
            tag: self.tag,
            ttl: self.ttl,
            tos: self.tos,
            protocol: self.extensions.first().map_or(6, |first| first.0),
            fragment: if self.df { 0x4000 } else { 0 },
        };
        header.with(&self.options, &body)
    }
}

/// What goes on the link in one step.
#[derive(Clone, Debug)]
pub enum Packet {
    Whole(Segment),
    /// The packet in pieces of so many bytes, a multiple of eight, in this order.
    Fragments {
        segment: Segment,
        size: usize,
        order: Vec<usize>,
    },
    /// An error about a packet that passed the box.
    Error {
        tag: u32,
        ttl: u8,
        from: IpAddr,
        kind: u8,
        code: u8,
        /// The second word of the ICMP header.
        word: u32,
        inner: Segment,
        /// How much of it is quoted, bytes.
        quoted: usize,
        damage: u16,
    },
}

impl Packet {
    /// Does it come from the client's side?
    pub fn from_client(&self) -> bool {
        match self {
            Self::Whole(segment) | Self::Fragments { segment, .. } => segment.leg == Leg::Request,
            Self::Error { inner, .. } => inner.leg == Leg::Reply,
        }
    }

    /// What its outputs are told by.
    pub fn tag(&self) -> u32 {
        match self {
            Self::Whole(segment) | Self::Fragments { segment, .. } => segment.tag,
            Self::Error { tag, .. } => *tag,
        }
    }

    /// The IP packets.
    pub fn ips(&self, ends: &Ends, port: u16) -> Vec<Vec<u8>> {
        match self {
            Self::Whole(segment) => vec![segment.ip(ends, port)],
            Self::Fragments {
                segment,
                size,
                order,
            } => {
                let pieces = pieces(&segment.ip(ends, port), *size, segment.tag);
                order
                    .iter()
                    .filter_map(|at| pieces.get(*at).cloned())
                    .collect()
            }
            Self::Error {
                tag,
                ttl,
                from,
                kind,
                code,
                word,
                inner,
                quoted,
                damage,
            } => {
                let mut packet = inner.ip(ends, port);
                packet.truncate(*quoted);
                let to = inner.leg.ends(ends, port).0.ip();
                let v6 = to.is_ipv6();
                let mut icmp = vec![*kind, *code, 0, 0];
                icmp.extend(word.to_be_bytes());
                icmp.extend(packet);
                let protocol = if v6 { 58 } else { 1 };
                let base = if v6 {
                    pseudo(*from, to, protocol, icmp.len())
                } else {
                    0
                };
                let check = (!fold(base + sum(&icmp))).wrapping_add(*damage);
                icmp[2..4].copy_from_slice(&check.to_be_bytes());
                let header = Header {
                    src: *from,
                    dst: to,
                    tag: *tag,
                    ttl: *ttl,
                    tos: 0xc0,
                    protocol,
                    fragment: 0,
                };
                vec![header.with(&[], &icmp)]
            }
        }
    }
}

struct Header {
    src: IpAddr,
    dst: IpAddr,
    tag: u32,
    ttl: u8,
    tos: u8,
    protocol: u8,
    fragment: u16,
}

impl Header {
    fn with(&self, options: &[u8], body: &[u8]) -> Vec<u8> {
        let mut ip = Vec::with_capacity(60 + body.len());
        if self.src.is_ipv4() {
            let header = 20 + options.len();
            ip.extend([0x40 | (header / 4) as u8, self.tos]);
            ip.extend(((header + body.len()) as u16).to_be_bytes());
            ip.extend((self.tag as u16).to_be_bytes());
            ip.extend(self.fragment.to_be_bytes());
            ip.extend([self.ttl, self.protocol, 0, 0]);
            ip.extend(octets(self.src));
            ip.extend(octets(self.dst));
            ip.extend(options);
            let check = !fold(sum(&ip));
            ip[10..12].copy_from_slice(&check.to_be_bytes());
        } else {
            let first = 6 << 28 | u32::from(self.tos) << 20 | self.tag & 0xf_ffff;
            ip.extend(first.to_be_bytes());
            ip.extend((body.len() as u16).to_be_bytes());
            ip.extend([self.protocol, self.ttl]);
            ip.extend(octets(self.src));
            ip.extend(octets(self.dst));
        }
        ip.extend(body);
        ip
    }
}

/// Cuts an IP packet as a router or sender does (RFC 791 §3.2, RFC 8200 §4.5).
fn pieces(ip: &[u8], size: usize, id: u32) -> Vec<Vec<u8>> {
    let v6 = ip[0] >> 4 == 6;
    let header = if v6 { 40 } else { usize::from(ip[0] & 0xf) * 4 };
    let (head, body) = ip.split_at(header);
    let chunks: Vec<&[u8]> = body.chunks(size).collect();
    let piece = |(at, chunk): (usize, &&[u8])| {
        let more = u16::from(at + 1 < chunks.len());
        let mut out = head.to_vec();
        if v6 {
            let next = out[6];
            out[4..6].copy_from_slice(&((chunk.len() + 8) as u16).to_be_bytes());
            out[6] = 44;
            out.extend([next, 0]);
            out.extend(((at * size) as u16 | more).to_be_bytes());
            out.extend((id | 0x5a00_0000).to_be_bytes());
        } else {
            out[2..4].copy_from_slice(&((header + chunk.len()) as u16).to_be_bytes());
            let field = (at * size / 8) as u16 | more << 13;
            out[6..8].copy_from_slice(&field.to_be_bytes());
            out[10..12].fill(0);
            let check = !fold(sum(&out));
            out[10..12].copy_from_slice(&check.to_be_bytes());
        }
        out.extend(*chunk);
        out
    };
    chunks.iter().enumerate().map(piece).collect()
}

/// The sum of the pseudo-header (RFC 9293 §3.1, RFC 8200 §8.1), unfolded.
pub fn pseudo(src: IpAddr, dst: IpAddr, protocol: u8, length: usize) -> u64 {
    sum(&octets(src)) + sum(&octets(dst)) + u64::from(protocol) + length as u64
}

/// The bytes of an address.
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The one's complement sum (RFC 1071), unfolded.
pub fn sum(bytes: &[u8]) -> u64 {
    bytes
        .chunks(2)
        .map(|pair| {
            u64::from(u16::from_be_bytes([
                pair[0],
                pair.get(1).copied().unwrap_or(0),
            ]))
        })
        .sum()
}

/// Folded to 16 bits.
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
