//! Reading headers of a balancer in front of us.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{CRC32C, FIXED, LONG4, LONG6, SIGNATURE, TCP4, TCP6, crc32c};

/// Longest header taken, in octets: TLVs of every kind fit twice. Version 1 has at most 107.
pub const LONGEST: usize = 2048;
const LONGEST_V1: usize = 107;
const V1: &[u8] = b"PROXY ";

/// How far a header has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// All of these bytes belong to it, and more are to come.
    More,
    /// It is complete.
    Done {
        /// Its octets; what is behind them is the client's.
        length: usize,
        /// The client's address and the one that it connected to; nothing where the sender speaks for itself (`LOCAL`)
        /// or does not know.
        told: Option<(SocketAddr, SocketAddr)>,
    },
}

/// The bytes are no header, whatever comes behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed PROXY protocol header")]
pub struct Malformed;

/// Reads the header that a connection begins with, from all of its bytes so far.
///
/// # Errors
/// They begin none.
pub fn parse(bytes: &[u8]) -> Result<Progress, Malformed> {
    match bytes.first() {
        None => Ok(Progress::More),
        Some(b'P') => text(bytes),
        Some(_) => binary(bytes),
    }
}

/// Can a client that a header names have this address? Loopback and link-local ones mean something to their own host or
/// link alone.
pub fn is_client(address: IpAddr) -> bool {
    let local = match address.to_canonical() {
        IpAddr::V4(address) => address.is_loopback() || address.is_link_local(),
        IpAddr::V6(address) => address.is_loopback() || address.is_unicast_link_local(),
    };
    !local
}

fn text(bytes: &[u8]) -> Result<Progress, Malformed> {
    let known = bytes.len().min(V1.len());
    if bytes[..known] != V1[..known] {
        return Err(Malformed);
    }
    let window = &bytes[..bytes.len().min(LONGEST_V1)];
    let Some(end) = window.iter().position(|byte| matches!(byte, b'\n' | 0)) else {
        // A CR is the last but one octet.
        let cr = window.iter().position(|byte| *byte == b'\r');
        let stray = cr.is_some_and(|at| at + 1 < window.len());
        return match window.len() == LONGEST_V1 || stray {
            true => Err(Malformed),
            false => Ok(Progress::More),
        };
    };
    let line = window[..end].strip_suffix(b"\r").ok_or(Malformed)?;
    if window[end] == 0 || line.contains(&b'\r') {
        return Err(Malformed);
    }
    let line = std::str::from_utf8(line).map_err(|_| Malformed)?;
    let mut words = line.split(' ').skip(1);
    let mut word = || words.next().ok_or(Malformed);
    let told = match word()? {
        // What follows has no meaning.
        "UNKNOWN" => None,
        family @ ("TCP4" | "TCP6") => {
            let (source, destination) = (ip(family, word()?)?, ip(family, word()?)?);
            let ports = (port(word()?)?, port(word()?)?);
            if words.next().is_some() {
                return Err(Malformed);
            }
            Some(ends(source, ports.0, destination, ports.1)?)
        }
        _ => return Err(Malformed),
    };
    let length = end + 1;
    Ok(Progress::Done { length, told })
}

fn ip(family: &str, word: &str) -> Result<IpAddr, Malformed> {
    match family {
        "TCP4" => word.parse::<Ipv4Addr>().map(IpAddr::V4),
        _ => word.parse::<Ipv6Addr>().map(IpAddr::V6),
    }
    .map_err(|_| Malformed)
}

/// Digits alone, no zero in front: one number has one spelling.
fn port(word: &str) -> Result<u16, Malformed> {
    let digits = word.bytes().all(|byte| byte.is_ascii_digit());
    let plain = digits && (word == "0" || !word.starts_with('0'));
    word.parse().ok().filter(|_| plain).ok_or(Malformed)
}

fn binary(bytes: &[u8]) -> Result<Progress, Malformed> {
    let known = bytes.len().min(SIGNATURE.len());
    if bytes[..known] != SIGNATURE[..known] {
        return Err(Malformed);
    }
    let Some(&[.., version, family, high, low]) = bytes.get(..FIXED) else {
        // What cannot become good is not waited for.
        return match bytes
            .get(12)
            .is_none_or(|version| matches!(version, 0x20 | 0x21))
        {
            true => Ok(Progress::More),
            false => Err(Malformed),
        };
    };
    let length = FIXED + usize::from(u16::from_be_bytes([high, low]));
    if length > LONGEST || !matches!(version, 0x20 | 0x21) {
        return Err(Malformed);
    }
    let local = version == 0x20;
    let addresses = match family {
        _ if local => 0,
        TCP4 => LONG4,
        TCP6 => LONG6,
        // Unspecified, and unix sockets: the sender cannot say who the client is.
        0x00 | 0x31 => 0,
        // Datagrams, or nothing known.
        _ => return Err(Malformed),
    };
    if length < FIXED + addresses {
        return Err(Malformed);
    }
    let Some(header) = bytes.get(..length) else {
        return Ok(Progress::More);
    };
    let body = &header[FIXED..];
    let told = match (addresses, body) {
        (LONG4, [s0, s1, s2, s3, d0, d1, d2, d3, sh, sl, dh, dl, ..]) => Some(ends(
            Ipv4Addr::new(*s0, *s1, *s2, *s3).into(),
            u16::from_be_bytes([*sh, *sl]),
            Ipv4Addr::new(*d0, *d1, *d2, *d3).into(),
            u16::from_be_bytes([*dh, *dl]),
        )?),
        (LONG6, [..]) => {
            let octets = |at: usize| {
                let part = body.get(at..at + 16).and_then(|part| part.try_into().ok());
                part.map(|octets: [u8; 16]| Ipv6Addr::from(octets).into())
            };
            let (source, destination) = (octets(0).ok_or(Malformed)?, octets(16).ok_or(Malformed)?);
            let ports = body.get(32..LONG6).ok_or(Malformed)?;
            let source_port = u16::from_be_bytes([ports[0], ports[1]]);
            let port = u16::from_be_bytes([ports[2], ports[3]]);
            Some(ends(source, source_port, destination, port)?)
        }
        _ => None,
    };
    if addresses > 0 {
        check_tlvs(header, FIXED + addresses)?;
    }
    Ok(Progress::Done { length, told })
}

/// They fill the rest of the header exactly, and a checksum among them is right.
fn check_tlvs(header: &[u8], from: usize) -> Result<(), Malformed> {
    let mut at = from;
    while at < header.len() {
        let Some(&[kind, high, low]) = header.get(at..at + 3) else {
            return Err(Malformed);
        };
        let value = at + 3..at + 3 + usize::from(u16::from_be_bytes([high, low]));
        let found = header.get(value.clone()).ok_or(Malformed)?;
        if kind == CRC32C {
            // It is of the header with zeros in its own place.
            let sum = crc32c(&[&header[..value.start], &[0; 4], &header[value.end..]]);
            if found != sum.to_be_bytes() {
                return Err(Malformed);
            }
        }
        at = value.end;
    }
    Ok(())
}

/// A source that no connection can come from is a lie, or an accident.
fn ends(
    source: IpAddr,
    source_port: u16,
    destination: IpAddr,
    port: u16,
) -> Result<(SocketAddr, SocketAddr), Malformed> {
    let source = source.to_canonical();
    if source.is_unspecified() || source.is_multicast() || source == Ipv4Addr::BROADCAST {
        return Err(Malformed);
    }
    Ok((
        SocketAddr::new(source, source_port),
        SocketAddr::new(destination.to_canonical(), port),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(text: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
        match parse(text) {
            Ok(Progress::Done { length, told }) => {
                assert_eq!(length, text.len());
                told
            }
            other => panic!("{:?}: {other:?}", String::from_utf8_lossy(text)),
        }
    }

    #[test]
    fn good_lines() {
        let (source, destination) = done(b"PROXY TCP4 192.0.2.1 203.0.113.1 4711 25\r\n").unwrap();
        assert_eq!(source, "192.0.2.1:4711".parse().unwrap());
        assert_eq!(destination, "203.0.113.1:25".parse().unwrap());
        let (source, _) = done(b"PROXY TCP6 2001:db8::1 2001:db8::2 0 65535\r\n").unwrap();
        assert_eq!(source, "[2001:db8::1]:0".parse().unwrap());
        let (source, _) = done(b"PROXY TCP6 ::ffff:192.0.2.1 ::1 1 1\r\n").unwrap();
        assert_eq!(source, "192.0.2.1:1".parse().unwrap(), "as it is elsewhere");
        assert_eq!(done(b"PROXY UNKNOWN\r\n"), None);
        let longest = [b"PROXY UNKNOWN ".as_slice(), &[b'x'; 91], b"\r\n"].concat();
        assert_eq!(longest.len(), LONGEST_V1);
        assert_eq!(done(&longest), None);
    }

    #[test]
    fn clients_come_from_elsewhere() {
        for (address, client) in [
            ("192.0.2.1", true),
            ("10.0.0.1", true),
            ("fd00::1", true),
            ("127.0.0.1", false),
            ("127.9.9.9", false),
            ("::ffff:127.0.0.1", false),
            ("169.254.1.1", false),
            ("::1", false),
            ("fe80::1", false),
            ("febf::1", false),
        ] {
            assert_eq!(is_client(address.parse().unwrap()), client, "{address}");
        }
    }

    #[test]
    fn bad_lines_are_refused_as_soon_as_they_are_bad() {
        for (bad, at) in [
            ("GET / HTTP/1.1\r\n", 1),
            ("PROXIED", 5),
            ("PROXY TCP4 192.0.2.1 203.0.113.1 4711 25\n", 41),
            ("PROXY TCP4\0", 11),
            ("PROXY TCP4\rx", 12),
            ("PROXY TCP5 192.0.2.1 203.0.113.1 4711 25\r\n", 42),
            ("PROXY TCP4 192.0.2.1 203.0.113.1 4711 65536\r\n", 45),
            ("PROXY TCP4 192.0.2.1 203.0.113.1 04711 25\r\n", 43),
            ("PROXY TCP4 192.0.2.1 203.0.113.1 +471 25\r\n", 42),
            ("PROXY TCP4 192.0.2.1  203.0.113.1 4711 25\r\n", 43),
            ("PROXY TCP4 192.0.2.1 203.0.113.1 4711 25 \r\n", 43),
            ("PROXY TCP4 192.0.2.1 203.0.113.1 4711\r\n", 39),
            ("PROXY TCP4 192.0.2.01 203.0.113.1 4711 25\r\n", 43),
            ("PROXY TCP4 2001:db8::1 203.0.113.1 4711 25\r\n", 44),
            ("PROXY TCP4 0.0.0.0 203.0.113.1 4711 25\r\n", 40),
            ("PROXY TCP4 255.255.255.255 203.0.113.1 1 25\r\n", 45),
            ("PROXY TCP6 ff02::1 2001:db8::1 1 25\r\n", 37),
            ("PROXY TCP4 224.0.0.1 203.0.113.1 1 25\r\n", 39),
            ("PROXY TCP6 :: 2001:db8::1 1 25\r\n", 32),
            ("PROXY \r\n", 8),
        ] {
            for cut in 0..=bad.len() {
                let expected = if cut < at {
                    Ok(Progress::More)
                } else {
                    Err(Malformed)
                };
                assert_eq!(parse(&bad.as_bytes()[..cut]), expected, "{bad:?} at {cut}");
            }
        }
        let long = [b"PROXY UNKNOWN ".as_slice(), &[b'x'; 93]].concat();
        assert_eq!(parse(&long[..106]), Ok(Progress::More));
        assert_eq!(parse(&long), Err(Malformed));
    }

    /// A header of version 2 with this behind its signature.
    fn v2(version: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = (body.len() as u16).to_be_bytes();
        [&SIGNATURE[..], &[version, family], &length, body].concat()
    }

    const FOUR: [u8; 12] = [192, 0, 2, 1, 203, 0, 113, 1, 0x12, 0x67, 0, 25];

    #[test]
    fn binary_headers() {
        let (source, destination) = done(&v2(0x21, TCP4, &FOUR)).unwrap();
        assert_eq!(source, "192.0.2.1:4711".parse().unwrap());
        assert_eq!(destination, "203.0.113.1:25".parse().unwrap());
        for local in [
            v2(0x20, 0, &[]),
            v2(0x20, TCP4, &FOUR),
            v2(0x20, 0x7f, &[9]),
        ] {
            assert_eq!(done(&local), None, "the sender's own connection");
        }
        for unknown in [
            v2(0x21, 0, &[]),
            v2(0x21, 0, &[0; 7]),
            v2(0x21, 0x31, &[0; 216]),
        ] {
            assert_eq!(done(&unknown), None);
        }
        let tlv = [&FOUR[..], &[0x04, 0, 2, 0, 0]].concat();
        assert!(done(&v2(0x21, TCP4, &tlv)).is_some());
    }

    #[test]
    fn bad_binary_headers() {
        let none = [0, 0, 0, 0, 203, 0, 113, 1, 0, 1, 0, 25];
        let wrong_sum = [&FOUR[..], &[CRC32C, 0, 4, 1, 2, 3, 4]].concat();
        for bad in [
            v2(0x11, TCP4, &FOUR),
            v2(0x22, TCP4, &FOUR),
            v2(0x21, 0x12, &FOUR),
            v2(0x21, TCP6, &FOUR),
            v2(0x21, TCP4, &FOUR[..11]),
            v2(0x21, TCP4, &none),
            v2(0x21, TCP4, &[&FOUR[..], &[1]].concat()),
            v2(0x21, TCP4, &[&FOUR[..], &[1, 0, 9, 0]].concat()),
            v2(0x21, TCP4, &[&FOUR[..], &[CRC32C, 0, 1, 0]].concat()),
            v2(0x21, TCP4, &wrong_sum),
            v2(0x20, 0, &[0; LONGEST]),
        ] {
            assert_eq!(parse(&bad), Err(Malformed), "{bad:?}");
        }
        assert_eq!(parse(b"\r\n\r\n\0\r\nQUIX"), Err(Malformed));
        assert_eq!(parse(&v2(0x31, 0, &[])[..13]), Err(Malformed));
        assert_eq!(parse(&[0x16, 3, 1]), Err(Malformed));
    }
}
