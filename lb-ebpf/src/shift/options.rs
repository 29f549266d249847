//! TCP options: where those lie that a shifted flow cares about, and their edits (RFC 9293 §3.2).
//!
//! The walk takes no branch that depends on the packet: the verifier follows every combination of a loop's branches, and
//! forty steps have many (Linux 5.15 did not finish with a loop of `if`).

use lb_common::{checksum::Delta, map_record};

use super::Workspace;
use crate::opaque::opaque;

/// Bytes of the longest TCP header, rounded up to a power of two.
pub const ROOM: usize = 64;
/// Where options start.
const START: u64 = 20;
/// Bytes of options.
const BYTES: usize = 40;
/// Options looked at, NOPs included; whoever hides one behind more misleads nobody but his own peer.
const STEPS: usize = 24;

const NOP: u8 = 1;
pub(super) const MSS: u64 = 2;
const SACK: u64 = 5;
/// Multipath TCP (RFC 8684): its own numbers would not follow the shift.
const MPTCP: u64 = 30;
/// TCP Fast Open (RFC 7413), and where it was tried out first (RFC 6994).
const FAST_OPEN: u64 = 34;
const FAST_OPEN_TRIAL: u64 = 254;
const TRIAL_MAGIC: u64 = 0xf989;

map_record!(
    /// What a walk has found. Offsets count from the TCP header; 0 stands for "not there".
    Found {
        /// Bytes that have to become NOPs, one bit each.
        blank: u64,
        /// The same for a SACK option.
        sack_bytes: u64,
        /// Of the MSS option.
        mss: u32,
        /// Of the SACK option.
        sack: u32,
    } size 24 align 8
);

impl Found {
    /// Nothing found yet.
    pub const NONE: Self = Self {
        blank: 0,
        sack_bytes: 0,
        mss: 0,
        sack: 0,
    };
}

/// 1 if `a < b`, else 0, for numbers below 2^63; in arithmetic that no optimiser turns into a jump.
#[inline(always)]
fn below(a: u64, b: u64) -> u64 {
    opaque(opaque(a.wrapping_sub(b)) >> 63)
}

/// 1 if equal, else 0.
#[inline(always)]
fn equal(a: u64, b: u64) -> u64 {
    opaque(opaque((a ^ b).wrapping_sub(1)) >> 63)
}

/// Finds the options of a TCP header of `end` bytes. One that is cut off or shorter than itself ends the walk, as it does
/// at the receiver.
#[inline(always)]
pub fn walk(tcp: &[u8; ROOM], end: u32, found: &mut Found) {
    let end = u64::from(end);
    let mut at = START;
    for _ in 0..STEPS {
        let byte = |offset: u64| u64::from(tcp[(opaque(at + offset) & (ROOM as u64 - 1)) as usize]);
        let (kind, length) = (byte(0), byte(1));
        let single = equal(kind, u64::from(NOP));
        let step = single + (1 - single) * length;
        let fits = 1 - below(end, at + step);
        let sound = single | (1 - below(length, 2));
        let go = fits & sound & (1 - equal(kind, 0)) & below(at, end);
        let trial = equal(kind, FAST_OPEN_TRIAL)
            & equal(byte(2) << 8 | byte(3), TRIAL_MAGIC)
            & (1 - below(length, 4));
        let strip = go & (equal(kind, FAST_OPEN) | equal(kind, MPTCP) | trial);
        // `step` is at most 40 where it counts, else some shift of no consequence.
        let bytes = ((1u64 << (step & 63)) - 1) << (at & 63);
        found.blank |= bytes & 0u64.wrapping_sub(strip);
        let mss = go & equal(kind, MSS) & equal(length, 4) & equal(u64::from(found.mss), 0);
        found.mss |= (at * mss) as u32;
        let sack = go & equal(kind, SACK) & equal(u64::from(found.sack), 0);
        found.sack |= (at * sack) as u32;
        found.sack_bytes |= bytes & 0u64.wrapping_sub(sack);
        at += step * go;
    }
}

/// Turns the marked bytes into NOPs.
#[inline(always)]
pub fn blank(tcp: &mut [u8; ROOM], marked: u64) {
    let options = &mut tcp[START as usize..START as usize + BYTES];
    for (at, byte) in options.iter_mut().enumerate() {
        let mask = 0u8.wrapping_sub(opaque(marked >> (at as u64 + START) & 1) as u8);
        *byte = (*byte & !mask) | (NOP & mask);
    }
}

/// Takes `by` off the edges of a SACK option, at whatever alignment.
#[inline(always)]
pub fn shift_sack(tcp: &mut [u8; ROOM], sack: u32, by: u32) {
    let place = |at: u64| (opaque(at) & (ROOM as u64 - 1)) as usize;
    let sack = u64::from(sack);
    let length = u64::from(tcp[place(sack + 1)]);
    for edge in 0..8u64 {
        let at = sack + 2 + edge * 4;
        // Edges come in pairs; half a one is none.
        let whole = 1 - below(length, 2 + (edge / 2 + 1) * 8);
        let by = by & 0u32.wrapping_sub(whole as u32);
        let [a, b, c, d] = [0, 1, 2, 3].map(|byte| place(at + byte));
        let value = u32::from_be_bytes([tcp[a], tcp[b], tcp[c], tcp[d]]);
        let [e, f, g, h] = value.wrapping_sub(by).to_be_bytes();
        (tcp[a], tcp[b], tcp[c], tcp[d]) = (e, f, g, h);
    }
}

/// Lowers the MSS option to leave room for `by` more bytes, never below [`LEAST_MSS`].
#[inline(always)]
pub fn lower_mss(tcp: &mut [u8; ROOM], mss: u32, by: u32) {
    let at = [2, 3].map(|byte| (opaque(u64::from(mss) + byte) & (ROOM as u64 - 1)) as usize);
    let value = u32::from(u16::from_be_bytes([tcp[at[0]], tcp[at[1]]]));
    let lowered = value.saturating_sub(by).max(LEAST_MSS.min(value)) as u16;
    [tcp[at[0]], tcp[at[1]]] = lowered.to_be_bytes();
}

/// The MSS that the TCP header of `length` bytes offers which was taken in; 0 for none.
#[inline(always)]
pub(crate) fn segment_size(workspace: &Workspace, length: u32) -> u32 {
    let mut found = Found::NONE;
    walk(&workspace.old, length, &mut found);
    if found.mss == 0 {
        return 0;
    }
    let at = |offset| (opaque(u64::from(found.mss) + offset) & (ROOM as u64 - 1)) as usize;
    u32::from(u16::from_be_bytes([
        workspace.old[at(2)],
        workspace.old[at(3)],
    ]))
}

/// No MSS is lowered beyond this: with less, mail would not be worth sending (Linux's own least, `tcp_min_snd_mss`).
pub const LEAST_MSS: u32 = 48;

/// The sum of what a checksum has to follow when `old` became `new`, 0 when nothing did; offsets in a TCP header are as
/// even as the header's own.
#[inline(always)]
pub fn delta(old: &[u8; ROOM], new: &[u8; ROOM]) -> u32 {
    let (mut delta, mut changed) = (Delta::NONE, 0);
    for at in (START as usize..START as usize + BYTES).step_by(2) {
        let half = |bytes: &[u8; ROOM]| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        delta = delta.half(half(old), half(new));
        changed |= half(old) ^ half(new);
    }
    if changed == 0 { 0 } else { delta.sum32() }
}

/// [`edit`]: of a SYN, lowers the MSS and strips what must not be agreed on.
pub const SYN: u32 = 0;
/// [`edit`]: takes a SACK away.
pub const HIDE_SACK: u32 = 1;
/// [`edit`]: takes something off the edges of a SACK.
pub const SHIFT_SACK: u32 = 2;

/// Edits the options of the TCP header of `length` bytes that was taken in: the sum of the change, 0 when there is none.
#[inline(always)]
pub(crate) fn edit(workspace: &mut Workspace, length: u32, what: u32, by: u32) -> u32 {
    let mut found = Found::NONE;
    walk(&workspace.old, length, &mut found);
    let Some(new) = workspace.new.first_chunk_mut() else {
        return 0;
    };
    // Once each, whatever is asked: the verifier goes every way.
    let is = |wanted: u32| equal(u64::from(what), u64::from(wanted));
    let mask = |wanted: u32| 0u64.wrapping_sub(is(wanted));
    blank(
        new,
        found.blank & mask(SYN) | found.sack_bytes & mask(HIDE_SACK),
    );
    if found.mss != 0 {
        lower_mss(new, found.mss, by & mask(SYN) as u32);
    }
    if found.sack != 0 {
        shift_sack(new, found.sack, by & mask(SHIFT_SACK) as u32);
    }
    delta(&workspace.old, new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(options: &[u8]) -> ([u8; ROOM], u32) {
        let mut tcp = [0; ROOM];
        tcp[20..20 + options.len()].copy_from_slice(options);
        (tcp, 20 + options.len() as u32)
    }

    fn found(options: &[u8]) -> Found {
        let (tcp, end) = header(options);
        let mut found = Found::NONE;
        walk(&tcp, end, &mut found);
        found
    }

    fn bits(range: core::ops::Range<u32>) -> u64 {
        range.fold(0, |bits, at| bits | 1 << at)
    }

    #[test]
    fn finds_what_clients_send() {
        // Linux: MSS, SACK permitted, timestamps, NOP, window scale.
        let syn = [
            2, 4, 5, 0xb4, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7,
        ];
        assert_eq!(
            found(&syn),
            Found {
                mss: 20,
                ..Found::NONE
            }
        );
        let mut fast = syn.to_vec();
        fast.extend([34, 10, 1, 2, 3, 4, 5, 6, 7, 8, 1, 1]);
        let expected = Found {
            mss: 20,
            blank: bits(40..50),
            ..Found::NONE
        };
        assert_eq!(found(&fast), expected);
        let mut sack = vec![1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0, 1, 5, 10];
        sack.extend([0; 8]);
        sack.push(0);
        let expected = Found {
            sack: 33,
            sack_bytes: bits(33..43),
            ..Found::NONE
        };
        assert_eq!(found(&sack), expected, "odd alignment");
        assert_eq!(
            found(&[254, 4, 0xf9, 0x89, 30, 4, 1, 1, 254, 4, 0, 0]).blank,
            bits(20..28)
        );
    }

    /// The walk as one would write it for a processor.
    fn simple(options: &[u8]) -> Found {
        let mut found = Found::NONE;
        let mut at = 0;
        for _ in 0..STEPS {
            let Some(&kind) = options.get(at) else { break };
            let length = match (kind, options.get(at + 1)) {
                (0, _) => break,
                (1, _) => 1,
                (_, Some(&length)) if length >= 2 => usize::from(length),
                _ => break,
            };
            let Some(option) = options.get(at..at + length) else {
                break;
            };
            let start = 20 + at as u32;
            let range = bits(start..start + length as u32);
            match option {
                [2, 4, ..] if found.mss == 0 => found.mss = start,
                [5, ..] if found.sack == 0 => (found.sack, found.sack_bytes) = (start, range),
                [30 | 34, ..] | [254, _, 0xf9, 0x89, ..] => found.blank |= range,
                _ => {}
            }
            at += length;
        }
        found
    }

    #[test]
    fn walks_hostile_options_as_the_simple_walk_does() {
        let mut seed = 0x2545_f491_4f6c_dd1du64;
        let mut random = move || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        for round in 0..300_000 {
            let mut options = vec![0; random() as usize % 11 * 4];
            let mut at = 0;
            while at < options.len() {
                let kind =
                    [1, 1, 2, 3, 4, 5, 8, 30, 34, 254, random() as u8][random() as usize % 11];
                let length = [2, 4, 10, 18, random() as u8 % 44][random() as usize % 5];
                for (place, byte) in [kind, length, 0xf9, 0x89].into_iter().enumerate() {
                    if let Some(to) = options.get_mut(at + place) {
                        *to = byte;
                    }
                }
                at += if kind == 1 {
                    1
                } else {
                    usize::from(length).max(1)
                };
            }
            assert_eq!(
                found(&options),
                simple(&options),
                "round {round}: {options:?}"
            );
            // Whatever was found, the edits stay inside of the header.
            let (mut tcp, _) = header(&options);
            let found = found(&options);
            blank(&mut tcp, found.blank);
            shift_sack(&mut tcp, found.sack, 28);
            lower_mss(&mut tcp, found.mss, 28);
        }
    }

    #[test]
    fn edits_what_was_found_and_nothing_else() {
        let mut options = vec![34, 3, 9, 2, 4, 5, 0xb4, 5, 18];
        for edge in [1000u32, 2000, 5, 20] {
            options.extend(edge.to_be_bytes());
        }
        options.extend([7; 3]);
        let (old, end) = header(&options);
        let (mut new, mut found) = (old, Found::NONE);
        walk(&old, end, &mut found);
        blank(&mut new, found.blank);
        lower_mss(&mut new, found.mss, 28);
        shift_sack(&mut new, found.sack, 28);
        let mut expected = vec![1, 1, 1, 2, 4, 5, 0x98, 5, 18];
        for edge in [972u32, 1972, 5u32.wrapping_sub(28), 20u32.wrapping_sub(28)] {
            expected.extend(edge.to_be_bytes());
        }
        expected.extend([7; 3]);
        assert_eq!(new[20..48], expected[..]);
        let sum = |tcp: &[u8]| lb_common::checksum::fold(lb_common::checksum::sum_bytes(tcp));
        assert_eq!(
            Delta::from_sum(delta(&old, &new)).apply(!sum(&old)),
            !sum(&new)
        );
        assert_eq!(delta(&old, &old), 0);
    }
}
