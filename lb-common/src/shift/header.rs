//! The PROXY protocol header, version 2, of a TCP connection.
//!
//! Source: "The PROXY protocol, versions 1 and 2", §2.2: 12 bytes of signature, version and command, family and
//! transport, length of the rest; then source address, destination address, source port, destination port.

use crate::flow::FlowKey;

/// Length towards an IPv4 client, bytes.
pub const V4: u32 = 28;
/// Length towards an IPv6 client, bytes.
pub const V6: u32 = 52;
/// The longest header in words of four bytes.
pub const WORDS: usize = V6 as usize / 4;

const SIGNATURE: [u32; 3] = [
    u32::from_ne_bytes(*b"\r\n\r\n"),
    u32::from_ne_bytes(*b"\0\r\nQ"),
    u32::from_ne_bytes(*b"UIT\n"),
];
/// Version 2, command PROXY; TCP over IPv4; 12 bytes follow.
const TCP4: u32 = u32::from_ne_bytes([0x21, 0x11, 0, 12]);
/// Version 2, command PROXY; TCP over IPv6; 36 bytes follow.
const TCP6: u32 = u32::from_ne_bytes([0x21, 0x21, 0, 36]);

/// Length for a connection of this family, bytes.
#[inline(always)]
pub const fn length(v4: bool) -> u32 {
    if v4 { V4 } else { V6 }
}

/// The header in words of memory, padded with zero. `reply`: what packets to the client say, from the virtual address.
#[inline(always)]
pub fn words(reply: &FlowKey) -> [u32; WORDS] {
    let [a, b] = reply.dport.to_ne_bytes();
    let [c, d] = reply.sport.to_ne_bytes();
    let ports = u32::from_ne_bytes([a, b, c, d]);
    let mut words = [0; WORDS];
    [words[0], words[1], words[2]] = SIGNATURE;
    if reply.dst.is_v4() {
        words[3] = TCP4;
        words[4] = reply.dst.0[3];
        words[5] = reply.src.0[3];
        words[6] = ports;
    } else {
        words[3] = TCP6;
        [words[4], words[5], words[6], words[7]] = reply.dst.0;
        [words[8], words[9], words[10], words[11]] = reply.src.0;
        words[12] = ports;
    }
    words
}

#[cfg(test)]
mod tests {
    use core::net::SocketAddr;

    use super::*;

    fn bytes(client: &str, address: &str) -> Vec<u8> {
        let [client, address]: [SocketAddr; 2] =
            [client, address].map(|text| text.parse().unwrap());
        let reply = FlowKey {
            src: address.ip().into(),
            dst: client.ip().into(),
            sport: address.port().to_be(),
            dport: client.port().to_be(),
        };
        let length = length(client.is_ipv4()) as usize;
        let all: Vec<u8> = words(&reply)
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        assert!(all[length..].iter().all(|byte| *byte == 0));
        all[..length].to_vec()
    }

    #[test]
    fn says_client_and_virtual_address() {
        let mut expected = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c".to_vec();
        expected.extend([192, 0, 2, 7, 203, 0, 113, 10]);
        expected.extend([0x9c, 0x40, 0x01, 0xd1]);
        assert_eq!(bytes("192.0.2.7:40000", "203.0.113.10:465"), expected);

        let mut expected = b"\r\n\r\n\0\r\nQUIT\n\x21\x21\x00\x24".to_vec();
        expected.extend(
            "2001:db8::7"
                .parse::<core::net::Ipv6Addr>()
                .unwrap()
                .octets(),
        );
        expected.extend(
            "2001:db8::a"
                .parse::<core::net::Ipv6Addr>()
                .unwrap()
                .octets(),
        );
        expected.extend([0x9c, 0x40, 0x00, 0x19]);
        assert_eq!(bytes("[2001:db8::7]:40000", "[2001:db8::a]:25"), expected);
    }
}
