//! What a rejected client hears, byte by byte.

use crate::packet::{Packet, octets, sum};

/// The whole SYN in an ICMP error from the virtual address, with right checksums.
pub fn check_icmp(sent: &Packet, out: &[u8]) {
    let v4 = sent.src.is_ipv4();
    let (header, kind) = if v4 { (20, [3, 13]) } else { (40, [1, 1]) };
    let (ip, icmp) = out[14..].split_at(header);
    assert_eq!(out[..12], [sent.src_mac, sent.dst_mac].concat());
    let ends = if v4 { &ip[12..] } else { &ip[8..] };
    assert_eq!(
        ends,
        [octets(sent.dst.ip()), octets(sent.src.ip())].concat()
    );
    assert_eq!(icmp[..2], kind);
    assert_eq!(icmp[4..8], [0; 4]);
    assert_eq!(
        icmp[8..][..header + 8],
        sent.bytes()[14..][..header + 8],
        "addresses, ports and sequence number"
    );
    if v4 {
        assert_eq!(sum(ip), 0xffff, "header");
    }
    // Where a device still finishes the quoted checksum, that makes the sum right.
    let mut finished = icmp.to_vec();
    if let Some(quoted) = finished.get_mut(8 + header + 16..8 + header + 18) {
        quoted.copy_from_slice(&sent.bytes()[14 + header + 16..][..2]);
    }
    let sums = [icmp.to_vec(), finished].map(|message| {
        let length = (message.len() as u32).to_be_bytes();
        let pseudo = [ends, &length[..], &[0, 0, 0, 58]].concat();
        sum(&if v4 {
            message
        } else {
            [pseudo, message].concat()
        })
    });
    assert!(sums.contains(&0xffff), "message: {sums:x?}");
}

/// RST and ACK of the number after the SYN, with right checksums.
pub fn check_rst(sent: &Packet, out: &[u8], program: &str, partial: bool) {
    let v4 = sent.src.is_ipv4();
    let header = if v4 { 20 } else { 40 };
    let (ip, tcp) = out[14..].split_at(header);
    assert_eq!(out[..12], [sent.src_mac, sent.dst_mac].concat());
    let ends = if v4 { &ip[12..] } else { &ip[8..] };
    assert_eq!(
        ends,
        [octets(sent.dst.ip()), octets(sent.src.ip())].concat()
    );
    assert_eq!(tcp.len(), 20);
    assert_eq!(
        tcp[..4],
        [sent.dst.port().to_be_bytes(), sent.src.port().to_be_bytes()].concat()
    );
    assert_eq!(tcp[4..12], [0, 0, 0, 0, 1, 2, 3, 5]);
    assert_eq!(tcp[12..14], [0x50, 0x14]);
    if v4 {
        assert_eq!(sum(ip), 0xffff, "header");
    }
    let pseudo = [ends, &20u32.to_be_bytes(), &[0, 0, 0, 6]].concat();
    // Where a device would finish the client's checksum, it finishes ours.
    let unfinished = partial && program != "balance_xdp";
    let expected = if unfinished { sum(&pseudo) } else { 0xffff };
    let got = match unfinished {
        true => u16::from_be_bytes([tcp[16], tcp[17]]),
        false => sum(&[&pseudo[..], tcp].concat()),
    };
    assert_eq!(got, expected, "{program}, {sent:?}");
}
