//! What came out of a box, told apart by tags, and made comparable where two right boxes may differ.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{
    dialogue::QUOTED,
    packet::{fold, sum},
};

/// Where something came out, and which packet it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Origin {
    /// Towards the client?
    pub to_client: bool,
    /// The tag of the packet that was sent.
    pub tag: u32,
    /// The box's own error about it, not the packet itself.
    pub generated: bool,
}

/// Frames by origin, in order.
pub type Outputs = BTreeMap<Origin, Vec<Vec<u8>>>;

/// The IP part of an Ethernet frame, VLAN tags skipped; `None` when there is none.
pub fn ip(frame: &[u8]) -> Option<&[u8]> {
    let mut at = 12;
    loop {
        let kind = u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?);
        at += 2;
        match kind {
            0x0800 | 0x86dd => return frame.get(at..),
            0x8100 | 0x88a8 => at += 2,
            _ => return None,
        }
    }
}

/// Tells which packet a frame belongs to; `None` for traffic of no concern.
pub fn origin(frame: &[u8], to_client: bool) -> Option<Origin> {
    let ip = ip(frame)?;
    if let Some(inner) = quoted(ip)
        && let Some(tag) = tag(inner)
        && tag & QUOTED == 0
    {
        return Some(Origin {
            to_client,
            tag,
            generated: true,
        });
    }
    Some(Origin {
        to_client,
        tag: tag(ip)?,
        generated: false,
    })
}

/// The packet that an ICMP error quotes.
fn quoted(ip: &[u8]) -> Option<&[u8]> {
    let (at, errors): (usize, &[u8]) = match (ip.first()? >> 4, ip.get(9)?, ip.get(6)?) {
        (4, 1, _) => (usize::from(ip[0] & 0xf) * 4, &[3, 11, 12]),
        (6, _, 58) => (40, &[1, 2, 3, 4]),
        _ => return None,
    };
    errors.contains(ip.get(at)?).then(|| ip.get(at + 8..))?
}

fn tag(ip: &[u8]) -> Option<u32> {
    match ip.first()? >> 4 {
        4 => Some(u32::from(u16::from_be_bytes([*ip.get(4)?, *ip.get(5)?]))),
        6 => Some(u32::from_be_bytes(ip.get(..4)?.try_into().ok()?) & 0xf_ffff),
        _ => None,
    }
}

/// An error that a box made: what it may choose freely (identification, flow label, and with it the header checksum) is
/// blotted out.
pub fn blot(frame: &mut [u8]) {
    match frame.get(14).map(|first| first >> 4) {
        Some(4) => {
            frame[18..20].fill(0);
            frame[24..26].fill(0);
        }
        Some(6) => {
            frame[15] &= 0xf0;
            frame[16..18].fill(0);
        }
        _ => {}
    }
}

/// Puts fragments together as the receiver would: one frame, its fragment fields cleared; `None` when some are missing.
pub fn reassemble(frames: &[Vec<u8>]) -> Option<Vec<u8>> {
    let first = frames.first()?;
    let v6 = first.get(14)? >> 4 == 6;
    let mut parts: Vec<(usize, bool, Vec<u8>, &[u8])> = Vec::new();
    for frame in frames {
        let ip = frame.get(14..)?;
        let (mut head, body, offset, more);
        if v6 {
            let length = usize::from(u16::from_be_bytes([ip[4], ip[5]]));
            let whole = ip.get(..40 + length)?;
            // The unfragmentable part of these tests may hold hop-by-hop options (RFC 8200 §4.5).
            let (mut at, mut kind_at) = (40, 6);
            while matches!(whole[kind_at], 0 | 60) {
                kind_at = at;
                at += 8 + usize::from(whole[at + 1]) * 8;
            }
            head = whole[..at].to_vec();
            head[4..6].fill(0);
            if whole[kind_at] == 44 {
                head[kind_at] = whole[at];
                let field = u16::from_be_bytes([whole[at + 2], whole[at + 3]]);
                (offset, more) = (usize::from(field & !7), field & 1 != 0);
                body = &whole[at + 8..];
            } else {
                (offset, more) = (0, false);
                body = &whole[at..];
            }
        } else {
            let length = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
            let (top, rest) = ip.get(..length)?.split_at(usize::from(ip[0] & 0xf) * 4);
            let field = u16::from_be_bytes([top[6], top[7]]);
            (offset, more) = (usize::from(field & 0x1fff) * 8, field & 0x2000 != 0);
            head = top.to_vec();
            if fold(sum(&head)) != 0xffff {
                return None;
            }
            head[2..4].fill(0);
            head[6..8].fill(0);
            head[10..12].fill(0);
            body = rest;
        }
        parts.push((offset, more, [&frame[..14], &head].concat(), body));
    }
    parts.sort_by_key(|part| part.0);
    let mut out = parts.first()?.2.clone();
    let mut next = 0;
    let mut ended = false;
    for (offset, more, _, body) in parts {
        if offset != next || ended {
            return None;
        }
        next += body.len();
        ended = !more;
        out.extend(body);
    }
    ended.then_some(out)
}

/// Two frames side by side, the differing bytes marked.
pub fn show(left: (&str, &[Vec<u8>]), right: (&str, &[Vec<u8>])) -> String {
    let mut text = String::new();
    for at in 0..left.1.len().max(right.1.len()) {
        let pair = [left.1.get(at), right.1.get(at)];
        for (name, frame, other) in [(left.0, pair[0], pair[1]), (right.0, pair[1], pair[0])] {
            let Some(frame) = frame else {
                let _ = writeln!(text, "  {name}: nothing");
                continue;
            };
            let _ = write!(text, "  {name}: {} bytes:", frame.len());
            for (place, byte) in frame.iter().enumerate().take(140) {
                if matches!(place, 14 | 34 | 54) {
                    text.push_str(" |");
                }
                let same = other.is_none_or(|other| other.get(place) == Some(byte));
                let _ = match same {
                    true => write!(text, " {byte:02x}"),
                    false => write!(text, " [{byte:02x}]"),
                };
            }
            if frame.len() > 140 {
                text.push_str(" …");
            }
            text.push('\n');
        }
        if let [Some(one), Some(other)] = pair
            && one != other
        {
            let first = one.iter().zip(other).position(|(a, b)| a != b);
            let _ = writeln!(
                text,
                "  first difference at byte {}",
                first.unwrap_or(one.len().min(other.len()))
            );
        }
    }
    text
}
