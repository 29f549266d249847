//! Mailboxes (Maildir) of real mail servers, read as what has arrived.

use std::{fs, net::SocketAddr, path::Path};

use anyhow::Result;

use crate::{
    mail::{self, digest},
    sink::Arrival,
};

/// What lies in `inbox/new` of a member.
///
/// # Errors
/// When a message cannot be read.
pub fn arrivals(member: &str, inbox: &Path) -> Result<Vec<Arrival>> {
    let Ok(entries) = fs::read_dir(inbox) else {
        // Made with the first delivery.
        return Ok(Vec::new());
    };
    entries
        .map(|entry| {
            let text = fs::read(entry?.path())?;
            Ok(arrival(member, &with_crlf(&text)))
        })
        .collect()
}

fn arrival(member: &str, text: &[u8]) -> Arrival {
    let digest = digest::of_message(text);
    let head = String::from_utf8_lossy(&digest.head).into_owned();
    let tls = tls(&head);
    Arrival {
        member: member.to_owned(),
        port: if tls.is_some() { 465 } else { 25 },
        peer: peer(&head),
        tls,
        helo: head
            .split("Received: from ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next())
            .unwrap_or_default()
            .to_owned(),
        from: field(&head, "Return-Path"),
        to: vec![field(&head, "Delivered-To")],
        id: mail::id_of(&digest.head),
        size: 0,
        sha256: None,
        body_sha256: digest.body,
    }
}

/// The version in a Received line: "(using TLSv1.3 with cipher …)", "(TLSv1.3:…)", "(TLS1.3)".
fn tls(head: &str) -> Option<String> {
    let version = ["(using ", "("].iter().find_map(|before| {
        let mut places = head.split(before).skip(1);
        places.find(|rest| rest.starts_with("TLS"))
    })?;
    let end = version.find([' ', ':', ')'])?;
    Some(version[..end].replace("TLSv", "TLS").replace("TLS", "TLSv"))
}

/// The client's address in a Received line, "from helo (unknown [10.71.0.11])"; its port is not there.
fn peer(head: &str) -> Option<SocketAddr> {
    let inside = head.split("Received: from ").nth(1)?.split('[').nth(1)?;
    let address = inside.split(']').next()?.trim_start_matches("IPv6:");
    Some(SocketAddr::new(address.parse().ok()?, 0))
}

fn field(head: &str, name: &str) -> String {
    head.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
        .unwrap_or_default()
        .to_owned()
}

/// A mailbox holds lines as Unix does.
fn with_crlf(text: &[u8]) -> Vec<u8> {
    let mut lines = Vec::with_capacity(text.len() + text.len() / 40);
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        match line.strip_suffix(b"\n") {
            Some(line) => {
                lines.extend_from_slice(line);
                lines.extend_from_slice(b"\r\n");
            }
            None => lines.extend_from_slice(line),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_server_has_its_way_to_tell_of_tls() {
        for (head, version) in [
            (
                "from a (b [10.0.0.1])\r\n\t(using TLSv1.3 with cipher X",
                Some("TLSv1.3"),
            ),
            ("with ESMTPS id 12 (TLSv1.2:ECDHE:256:NO)", Some("TLSv1.2")),
            (
                "by m3 with esmtps  (TLS1.3) tls TLS_AES_256_GCM_SHA384",
                Some("TLSv1.3"),
            ),
            (
                "from a (b [10.0.0.1])\r\n\tby m1 (Postfix) with ESMTP",
                None,
            ),
        ] {
            assert_eq!(tls(head).as_deref(), version, "{head}");
        }
    }
}
