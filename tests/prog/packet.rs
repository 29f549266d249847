//! Builds and reads packets byte by byte, with checksums computed in full: nothing here is shared with the pipeline.

use std::net::{IpAddr, SocketAddr};

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const PSH: u8 = 0x08;
pub const ACK: u8 = 0x10;

/// The first sequence number of everybody who is not given another.
const ISN: u32 = 0x0102_0304;

/// A TCP packet as a test says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub src_mac: [u8; 6],
    pub dst_mac: [u8; 6],
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub flags: u8,
    pub ttl: u8,
    pub payload: Vec<u8>,
    /// IPv4 options, a multiple of four bytes.
    pub options: Vec<u8>,
    pub seq: u32,
    pub ack: u32,
    pub window: u16,
    /// TCP options, a multiple of four bytes.
    pub tcp_options: Vec<u8>,
}

impl Packet {
    pub fn new(src: SocketAddr, dst: SocketAddr, flags: u8) -> Self {
        Self {
            src_mac: [2, 0, 0, 0, 0, 1],
            dst_mac: [2, 0, 0, 0, 0, 2],
            src,
            dst,
            flags,
            ttl: 64,
            payload: Vec::new(),
            options: Vec::new(),
            // Both sides begin alike, and have said nothing since.
            seq: ISN + u32::from(flags & SYN == 0),
            ack: ISN + 1,
            window: 0x2000,
            tcp_options: Vec::new(),
        }
    }

    /// The frame, with complete checksums.
    pub fn bytes(&self) -> Vec<u8> {
        self.build(false)
    }

    /// The frame as a local sender hands it to a device that finishes the TCP checksum.
    pub fn partial_bytes(&self) -> Vec<u8> {
        self.build(true)
    }

    fn build(&self, partial: bool) -> Vec<u8> {
        let mut tcp = Vec::new();
        tcp.extend(self.src.port().to_be_bytes());
        tcp.extend(self.dst.port().to_be_bytes());
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        let header = (20 + self.tcp_options.len() as u8) << 2;
        tcp.extend([header, self.flags]);
        tcp.extend(self.window.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend(&self.tcp_options);
        tcp.extend(&self.payload);
        let mut pseudo = octets(self.src.ip());
        pseudo.extend(octets(self.dst.ip()));
        pseudo.extend((tcp.len() as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, 6]);
        let check = match partial {
            true => sum(&pseudo),
            false => !sum(&[pseudo, tcp.clone()].concat()),
        };
        tcp[16..18].copy_from_slice(&check.to_be_bytes());
        let mut frame = [self.dst_mac, self.src_mac].concat();
        if self.src.is_ipv4() {
            frame.extend([0x08, 0x00]);
            let header = 20 + self.options.len();
            let mut ip = vec![0x40 | (header / 4) as u8, 0];
            ip.extend(((header + tcp.len()) as u16).to_be_bytes());
            ip.extend([0x12, 0x34, 0x40, 0x00, self.ttl, 6, 0, 0]);
            ip.extend(octets(self.src.ip()));
            ip.extend(octets(self.dst.ip()));
            ip.extend(&self.options);
            let check = !sum(&ip);
            ip[10..12].copy_from_slice(&check.to_be_bytes());
            frame.extend(ip);
        } else {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend((tcp.len() as u16).to_be_bytes());
            frame.extend([6, self.ttl]);
            frame.extend(octets(self.src.ip()));
            frame.extend(octets(self.dst.ip()));
        }
        frame.extend(tcp);
        frame
    }
}

/// The source port of a TCP frame without IP options.
pub fn source_port(frame: &[u8]) -> u16 {
    let at = tcp(frame);
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

/// The sequence number of such a frame.
pub fn sequence(frame: &[u8]) -> u32 {
    let at = tcp(frame) + 4;
    u32::from_be_bytes(frame[at..at + 4].try_into().expect("four bytes"))
}

fn tcp(frame: &[u8]) -> usize {
    if frame[12] == 0x08 { 34 } else { 54 }
}

pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The one's complement sum (RFC 1071).
pub fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
