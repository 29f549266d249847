//! PROXY protocol headers, versions 1 and 2, as HAProxy's `doc/proxy-protocol.txt` has them; pure.

mod read;
mod write;

pub use self::{
    read::{LONGEST, Malformed, Progress, is_client, parse},
    write::{Client, Secured, own, v1, v2},
};

/// The twelve octets that no other protocol begins with.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family, length.
const FIXED: usize = 16;
/// TCP over IPv4, TCP over IPv6.
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;
/// Octets of both addresses and ports.
const LONG4: usize = 12;
const LONG6: usize = 36;

/// Types of TLVs.
const ALPN: u8 = 0x01;
const AUTHORITY: u8 = 0x02;
const CRC32C: u8 = 0x03;
const UNIQUE_ID: u8 = 0x05;
const SSL: u8 = 0x20;
/// Types within [`SSL`].
const SSL_VERSION: u8 = 0x21;
const SSL_CN: u8 = 0x22;
const SSL_CIPHER: u8 = 0x23;

/// CRC-32C (RFC 9260, appendix A), which headers are checked by.
fn crc32c(parts: &[&[u8]]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < 256 {
            let mut value = index as u32;
            let mut bit = 0;
            while bit < 8 {
                // The polynomial, least significant bit first.
                value = (value >> 1) ^ (0x82f6_3b78 * (value & 1));
                bit += 1;
            }
            table[index] = value;
            index += 1;
        }
        table
    };
    let bytes = parts.iter().copied().flatten();
    !bytes.fold(u32::MAX, |sum, byte| {
        TABLE[usize::from(sum as u8 ^ byte)] ^ (sum >> 8)
    })
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_checksum_is_that_of_the_standard() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[b"123456789"]), 0xe306_9283);
        assert_eq!(crc32c(&[&[0; 32]]), 0x8a91_36aa);
        assert_eq!(crc32c(&[b"1234", b"", b"56789"]), 0xe306_9283);
    }

    /// Whatever is written is read back, cut anywhere, and nothing behind it is touched.
    #[test]
    fn what_is_written_is_read() {
        let secured = Secured {
            version: "TLSv1.3",
            suite: "TLS13_AES_256_GCM_SHA384",
            certificate: true,
            resumed: false,
            common_name: Some("client.example"),
            alpn: Some(b"smtp"),
            authority: Some("mx.example"),
        };
        for (source, destination) in [
            ("192.0.2.1:4711", "203.0.113.10:25"),
            ("[2001:db8::1]:65535", "[2001:db8::25]:587"),
        ] {
            for secured in [None, Some(&secured)] {
                let client = Client {
                    source: address(source),
                    destination: address(destination),
                    unique_id: "0000000000000abc",
                    secured,
                };
                for header in [v1(client.source, client.destination), v2(&client)] {
                    for cut in 0..header.len() {
                        assert_eq!(parse(&header[..cut]), Ok(Progress::More), "{cut}");
                    }
                    let mut more = header.clone();
                    more.extend_from_slice(b"EHLO behind it\r\n");
                    let told = Some((client.source, client.destination));
                    let length = header.len();
                    assert_eq!(parse(&more), Ok(Progress::Done { length, told }));
                }
            }
        }
    }
}
