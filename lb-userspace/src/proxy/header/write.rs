//! Writing headers for members.

use std::net::{IpAddr, SocketAddr};

use super::{
    ALPN, AUTHORITY, CRC32C, SIGNATURE, SSL, SSL_CIPHER, SSL_CN, SSL_VERSION, TCP4, TCP6,
    UNIQUE_ID, crc32c,
};
use crate::model::ProxyHeader;

/// What a member is told.
#[derive(Debug, Clone, Copy)]
pub struct Client<'a> {
    /// The client.
    pub source: SocketAddr,
    /// What it connected to.
    pub destination: SocketAddr,
    /// The session's id, as logs have it.
    pub unique_id: &'a str,
    /// Its TLS; absent while it is in plaintext.
    pub secured: Option<&'a Secured<'a>>,
}

/// What is known of a client's TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Secured<'a> {
    /// `TLSv1.3`.
    pub version: &'a str,
    /// The cipher suite's name.
    pub suite: &'a str,
    /// Has it shown a certificate, and was that found good?
    pub certificate: bool,
    /// Was the session resumed, and so the certificate shown earlier?
    pub resumed: bool,
    /// The common name of that certificate.
    pub common_name: Option<&'a str>,
    /// The protocol that was agreed on.
    pub alpn: Option<&'a [u8]>,
    /// The server name that the client asked for.
    pub authority: Option<&'a str>,
}

/// Bits of the first octet of an SSL TLV.
const OVER_TLS: u8 = 1;
const CERTIFICATE_NOW: u8 = 2;
const CERTIFICATE_EVER: u8 = 4;

/// Longest value of a TLV that holds no others: all of them together fit a header.
const LONGEST_VALUE: usize = 256;

/// The header of a connection that the box makes for itself.
pub fn own(version: ProxyHeader) -> Option<Vec<u8>> {
    match version {
        ProxyHeader::None => None,
        ProxyHeader::V1 => Some(b"PROXY UNKNOWN\r\n".to_vec()),
        ProxyHeader::V2 => Some([&SIGNATURE[..], &[0x20, 0, 0, 0]].concat()),
    }
}

/// Both ends in one family: where they differ, which only a header in front brings about, IPv4 is mapped into IPv6
/// (RFC 4291 §2.5.5.2). A member that was told nothing would take this box for the client.
fn ends(source: IpAddr, destination: IpAddr) -> (IpAddr, IpAddr) {
    let mapped = |end: IpAddr| match end {
        IpAddr::V4(end) => end.to_ipv6_mapped().into(),
        IpAddr::V6(_) => end,
    };
    match source.is_ipv4() == destination.is_ipv4() {
        true => (source, destination),
        false => (mapped(source), mapped(destination)),
    }
}

/// Version 1. Nothing but the addresses.
pub fn v1(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let (from, to) = ends(source.ip(), destination.ip());
    let family = if from.is_ipv4() { "TCP4" } else { "TCP6" };
    let (source, destination) = (source.port(), destination.port());
    format!("PROXY {family} {from} {to} {source} {destination}\r\n").into_bytes()
}

/// Version 2, with a checksum.
pub fn v2(client: &Client<'_>) -> Vec<u8> {
    let (source, destination) = (client.source, client.destination);
    let mut header = SIGNATURE.to_vec();
    let (from, to) = ends(source.ip(), destination.ip());
    let family = if from.is_ipv4() { TCP4 } else { TCP6 };
    header.extend_from_slice(&[0x21, family, 0, 0]);
    for end in [from, to] {
        match end {
            IpAddr::V4(end) => header.extend_from_slice(&end.octets()),
            IpAddr::V6(end) => header.extend_from_slice(&end.octets()),
        }
    }
    header.extend_from_slice(&source.port().to_be_bytes());
    header.extend_from_slice(&destination.port().to_be_bytes());
    tlv(&mut header, UNIQUE_ID, client.unique_id.as_bytes());
    if let Some(secured) = client.secured {
        if let Some(alpn) = secured.alpn {
            tlv(&mut header, ALPN, alpn);
        }
        if let Some(name) = secured.authority {
            tlv(&mut header, AUTHORITY, name.as_bytes());
        }
        put(&mut header, SSL, &ssl(secured));
    }
    tlv(&mut header, CRC32C, &[0; 4]);
    let length = (header.len() - super::FIXED) as u16;
    header[14..16].copy_from_slice(&length.to_be_bytes());
    let sum = crc32c(&[&header]).to_be_bytes();
    let at = header.len() - sum.len();
    header[at..].copy_from_slice(&sum);
    header
}

fn ssl(secured: &Secured<'_>) -> Vec<u8> {
    let shown = match (secured.certificate, secured.resumed) {
        (false, _) => 0,
        (true, false) => CERTIFICATE_NOW | CERTIFICATE_EVER,
        (true, true) => CERTIFICATE_EVER,
    };
    let mut value = vec![OVER_TLS | shown];
    // Zero says that a certificate was shown and verified.
    value.extend_from_slice(&u32::from(!secured.certificate).to_be_bytes());
    tlv(&mut value, SSL_VERSION, secured.version.as_bytes());
    tlv(&mut value, SSL_CIPHER, secured.suite.as_bytes());
    if let Some(name) = secured.common_name {
        tlv(&mut value, SSL_CN, name.as_bytes());
    }
    value
}

fn tlv(out: &mut Vec<u8>, kind: u8, value: &[u8]) {
    put(out, kind, &value[..value.len().min(LONGEST_VALUE)]);
}

fn put(out: &mut Vec<u8>, kind: u8, value: &[u8]) {
    out.push(kind);
    out.extend_from_slice(&(value.len() as u16).to_be_bytes());
    out.extend_from_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_is_a_line() {
        let [four, six] = ["192.0.2.1:4711", "[2001:db8::1]:4711"].map(|it| it.parse().unwrap());
        assert_eq!(
            v1(four, four),
            b"PROXY TCP4 192.0.2.1 192.0.2.1 4711 4711\r\n"
        );
        assert_eq!(
            v1(six, six),
            b"PROXY TCP6 2001:db8::1 2001:db8::1 4711 4711\r\n"
        );
        assert_eq!(
            v1(four, six),
            b"PROXY TCP6 ::ffff:192.0.2.1 2001:db8::1 4711 4711\r\n"
        );
        assert_eq!(
            v1(six, four),
            b"PROXY TCP6 2001:db8::1 ::ffff:192.0.2.1 4711 4711\r\n"
        );
    }

    #[test]
    fn a_client_of_another_family_is_no_stranger() {
        let client = Client {
            source: "192.0.2.1:258".parse().unwrap(),
            destination: "[2001:db8::1]:25".parse().unwrap(),
            unique_id: "id",
            secured: None,
        };
        let told = crate::proxy::header::parse(&v2(&client));
        let ends = Some((client.source, client.destination));
        assert!(
            matches!(told, Ok(crate::proxy::header::Progress::Done { told, .. }) if told == ends)
        );
    }

    #[test]
    fn version_2_tells_of_tls() {
        let secured = Secured {
            version: "TLSv1.2",
            suite: "SUITE",
            certificate: true,
            resumed: true,
            common_name: Some("cn"),
            alpn: Some(b"smtp"),
            authority: Some("mx"),
        };
        let header = v2(&Client {
            source: "192.0.2.1:258".parse().unwrap(),
            destination: "203.0.113.1:25".parse().unwrap(),
            unique_id: "id",
            secured: Some(&secured),
        });
        let body: &[u8] = b"\xc0\0\x02\x01\xcb\0\x71\x01\x01\x02\0\x19\
            \x05\0\x02id\
            \x01\0\x04smtp\
            \x02\0\x02mx\
            \x20\0\x1c\x05\0\0\0\0\x21\0\x07TLSv1.2\x23\0\x05SUITE\x22\0\x02cn";
        let [sum @ .., _, _, _, _] = &header[16 + body.len()..] else {
            panic!("no checksum")
        };
        assert_eq!(&header[12..14], b"\x21\x11");
        assert_eq!(header[14..16], ((header.len() - 16) as u16).to_be_bytes());
        assert_eq!(&header[16..16 + body.len()], body);
        assert_eq!(sum, b"\x03\0\x04");
    }

    #[test]
    fn values_of_any_length_make_a_header_that_is_taken() {
        let long = "x".repeat(70_000);
        let secured = Secured {
            version: "TLSv1.3",
            suite: &long,
            certificate: false,
            resumed: false,
            common_name: Some(&long),
            alpn: Some(long.as_bytes()),
            authority: Some(&long),
        };
        let header = v2(&Client {
            source: "[2001:db8::1]:1".parse().unwrap(),
            destination: "[2001:db8::2]:1".parse().unwrap(),
            unique_id: &long,
            secured: Some(&secured),
        });
        assert!(
            matches!(super::super::parse(&header), Ok(super::super::Progress::Done { length, .. }) if length == header.len())
        );
    }
}
