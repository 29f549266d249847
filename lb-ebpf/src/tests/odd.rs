//! Fragments, tags, ICMP: over plain memory.

use lb_common::{
    checksum::{fold, sum_bytes},
    vlan::outer,
};

use super::*;
use crate::{
    answer::{Notice, answer},
    frame::Frame as _,
    odd::refuse,
    parse::{Link, link},
};

const RANDOM: u64 = 0x2545_f491_4f6c_dd1d;

fn random(seed: &mut u64) -> usize {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed as usize
}

/// A fragment of a packet from a client to the virtual server; offset in units of eight bytes.
fn fragment(port: u16, offset: u16, more: bool) -> Vec<u8> {
    let mut frame = packet(port, ACK);
    frame[18..20].copy_from_slice(&7u16.to_be_bytes());
    frame[20..22].copy_from_slice(&(offset | u16::from(more) << 13).to_be_bytes());
    frame
}

/// An ICMP error from a router about what the virtual server sent to a client's port.
fn error(port: u16) -> Vec<u8> {
    let mut frame = packet(port, ACK);
    let inner = frame.split_off(14);
    frame.extend([0x45, 0, 0, 68, 0, 1, 0, 0, 64, 1, 0, 0]);
    frame.extend([10, 0, 1, 254, 10, 0, 1, 100, 3, 1, 0, 0, 0, 0, 0, 0]);
    frame.extend(inner);
    // The quoted packet goes the other way.
    let quoted = frame.len() - 40;
    frame[quoted + 12..quoted + 20].rotate_left(4);
    frame[quoted + 20..quoted + 24].rotate_left(2);
    frame
}

/// A packet behind extension headers.
fn extended(port: u16) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 36, 0, 64]);
    frame.extend([0xfd; 32]);
    frame.extend([60, 0, 1, 4, 0, 0, 0, 0, 6, 0, 1, 4, 0, 0, 0, 0]);
    frame.extend(port.to_be_bytes());
    frame.extend(465u16.to_be_bytes());
    frame.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, SYN, 0, 0, 0, 0, 0, 0]);
    frame
}

fn tagged(mut frame: Vec<u8>, tags: &[[u8; 4]]) -> Vec<u8> {
    frame.splice(12..12, tags.concat());
    frame
}

#[test]
fn later_fragments_follow_the_first() {
    let tables = MemoryTables::one_address(Service::SNAT_AUTOMAP);
    open(&tables, 1000).unwrap();
    let mut early = fragment(1000, 4, false);
    let untouched = early.clone();
    assert_eq!(tables.send(&mut early), Ok(Verdict::Pass));
    assert_eq!(early, untouched, "one before the first is left alone");
    assert!(tables.early.get().is_some(), "but remembered");
    assert_eq!(tables.send(&mut fragment(1000, 0, true)), Ok(Verdict::Send));
    let mut late = fragment(1000, 4, false);
    assert_eq!(tables.send(&mut late), Ok(Verdict::Send));
    assert_eq!(late[26..34], [10, 0, 2, 1, 10, 0, 2, 11], "its addresses");
    assert_eq!(late[34..], untouched[34..], "and nothing behind them");
}

#[test]
fn a_fragment_of_a_flow_that_is_no_more_is_left_alone() {
    let tables = MemoryTables::one_address(Service::SNAT_NONE);
    open(&tables, 1000).unwrap();
    tables.send(&mut fragment(1000, 0, true)).unwrap();
    let limit = u64::from(tables.config.idle_limit(Phase::Established)) + 1;
    tables.now.set(tables.now.get() + limit * TICK);
    sweep(&tables);
    assert_eq!(
        tables.send(&mut fragment(1000, 4, false)),
        Ok(Verdict::Pass)
    );
}

#[test]
fn tags_go_off_towards_members_and_on_towards_clients() {
    let tables = MemoryTables::one_address(Service::SNAT_NONE);
    for tags in [
        &[[0x81, 0x00, 0x60, 10]][..],
        &[[0x88, 0xa8, 0, 20], [0x81, 0x00, 0, 7]],
    ] {
        let port = 1000 + tags.len() as u16;
        let mut syn = tagged(packet(port, SYN), tags);
        assert_eq!(tables.send(&mut syn), Ok(Verdict::Send));
        assert_eq!(syn.len(), 54);
        assert_eq!(syn[12..14], [0x08, 0x00]);
        let mut answer = packet(port, SYN | ACK);
        answer[26..30].copy_from_slice(&syn[30..34]);
        answer[30..34].copy_from_slice(&[10, 0, 1, CLIENT]);
        answer[34..38].rotate_left(2);
        assert_eq!(tables.send(&mut answer), Ok(Verdict::Send));
        assert_eq!(answer[12..12 + 4 * tags.len()], tags.concat());
    }
    let foreign = [[0x81, 0x00, 0, FOREIGN_VLAN as u8]];
    assert_eq!(
        tables.send(&mut tagged(packet(2000, SYN), &foreign)),
        Err(DropReason::ForeignVlan)
    );
}

/// What cannot be read to its end goes nowhere when it may be for a virtual server, and else is not ours to count.
#[test]
fn headers_without_end_reach_nobody_unjudged() {
    let mut tables = MemoryTables::one_address(Service::SNAT_NONE);
    tables.config.filter = Default::default();
    let mut frame = extended(1);
    frame.truncate(54);
    for _ in 0..8 {
        frame.extend([60, 7, 1, 60]);
        frame.resize(frame.len() + 60, 0);
    }
    for length in 54..frame.len() {
        let mut cut = frame[..length].to_vec();
        assert_eq!(tables.send(&mut cut), Ok(Verdict::Pass), "{length} bytes");
    }
    tables.config.let_through(&Addr([0xfdfd_fdfd; 4]));
    for length in 54..frame.len() {
        let mut cut = frame[..length].to_vec();
        let hidden = Err(DropReason::HiddenHeader);
        assert_eq!(tables.send(&mut cut), hidden, "{length} bytes");
    }
    // Seven short ones, and TCP behind them.
    let mut many = extended(1);
    let one = many[54..62].to_vec();
    many.splice(54..54, [60, 0, 1, 4, 0, 0, 0, 0].repeat(5));
    assert_eq!(many[94..102], one);
    let last = many[102..110].to_vec();
    many.splice(102..102, [60, 0, 1, 4, 0, 0, 0, 0]);
    assert_eq!(many[110..118], last);
    assert_eq!(tables.send(&mut many), Err(DropReason::HiddenHeader));
}

#[test]
fn a_first_fragment_hides_no_part_of_its_header() {
    let mut tables = MemoryTables::one_address(Service::SNAT_AUTOMAP);
    tables.config.filter = Default::default();
    for own in [false, true] {
        if own {
            tables.config.let_through(&address(100));
        }
        for payload in [8u16, 16, 24] {
            let mut frame = fragment(1000, 0, true);
            // With options, so that 24 bytes are not all of the header either.
            frame[46] = 0x70;
            frame.resize(34 + usize::from(payload), 0);
            frame[16..18].copy_from_slice(&(20 + payload).to_be_bytes());
            let expected = match own {
                true => Err(DropReason::HiddenHeader),
                false => Ok(Verdict::Pass),
            };
            assert_eq!(tables.send(&mut frame), expected, "{payload} bytes");
        }
    }
}

#[test]
fn a_guess_does_not_lead_replies_away() {
    let tables = MemoryTables::one_address(Service::SNAT_NONE);
    let client = [[0x81, 0, 0, 10]];
    let mut syn = tagged(packet(1, SYN), &client);
    tables.send(&mut syn).unwrap();
    let flow = tables.flow(tables.live()[0]).unwrap();
    flow.phase.store(Phase::Established as u32, Relaxed);
    for (next, number) in flow.next.iter().zip([0x1000_0000, 0x2000_0000]) {
        next.store(number, Relaxed);
    }
    let known = || (flow.vlan.load(Relaxed), flow.ways[1].macs[0].load(Relaxed));
    let before = known();
    let from = |tags: &[[u8; 4]], mac: u8, flags: u8, numbers: [u32; 2]| {
        let mut frame = packet(1, flags);
        frame[6..12].fill(mac);
        frame[38..46].copy_from_slice(numbers.map(u32::to_be_bytes).as_flattened());
        assert_eq!(
            tables.send(&mut tagged(frame, tags)),
            Ok(Verdict::Send),
            "it is carried all the same"
        );
    };
    let near = [0x1000_0100, 0x2000_0200];
    for tags in [&[][..], &[[0x81, 0, 0, 20]], &client] {
        tables.wait(1);
        from(tags, 0xee, ACK, [0x1000_0100, 7]);
        from(tags, 0xee, ACK, [7, 0x2000_0200]);
        from(tags, 0xee, 0, near);
        assert_eq!(known(), before, "{tags:?}");
    }
    from(&[[0x81, 0, 0, 20]], 0xaa, ACK, near);
    assert_ne!(known(), before, "the client itself has moved");
}

#[test]
fn every_tag_survives_the_record() {
    for kind in [[0x81, 0x00], [0x88, 0xa8]] {
        for control in [1u16, 10, 4094, 0xe00a, 0x2001] {
            let tag = [kind, control.to_be_bytes()].concat().try_into().unwrap();
            let mut frame = tagged(packet(1, SYN), &[tag]);
            let expected = frame.clone();
            let mut found = Link::default();
            let mut memory = MemoryFrame::new(&mut frame, Ok(VIA));
            assert!(link(&mut memory, &mut found));
            assert_eq!(outer(found.vlan), u32::from(control & 0xfff));
            memory.retag(&found, found.vlan).unwrap();
            assert_eq!(frame, expected);
        }
    }
}

#[test]
fn an_error_is_translated_and_one_about_others_is_not() {
    let tables = MemoryTables::one_address(Service::SNAT_AUTOMAP);
    let mut stray = error(1000);
    let untouched = stray.clone();
    assert_eq!(tables.send(&mut stray), Ok(Verdict::Pass));
    assert_eq!(stray, untouched);
    open(&tables, 1000).unwrap();
    let mut ours = error(1000);
    assert_eq!(tables.send(&mut ours), Ok(Verdict::Send));
    assert_eq!(ours[26..34], [10, 0, 2, 1, 10, 0, 2, 11], "outside");
    assert_eq!(ours[54..62], [10, 0, 2, 11, 10, 0, 2, 1], "inside");
}

#[test]
fn a_quoted_number_is_the_one_its_sender_chose() {
    let tables = MemoryTables::one_address(Service::SNAT_AUTOMAP);
    open(&tables, 1000).unwrap();
    let hit = tables.live()[0];
    let flow = tables.flow(hit).unwrap();
    // As behind an inserted header: forward numbers are shifted by 28.
    flow.shift[0].store(28, std::sync::atomic::Ordering::Relaxed);
    let mut plain = error(1000);
    plain[66..74].copy_from_slice(&[0, 0, 1, 0, 0, 0, 2, 0]);
    let check = fold(sum_bytes(&plain[34..]));
    plain[36..38].copy_from_slice(&(!check).to_ne_bytes());
    let mut out = plain.clone();
    assert_eq!(tables.send(&mut out), Ok(Verdict::Send));
    // The quoted packet is a reply: its number is not shifted, but its acknowledgement was.
    assert_eq!(out[66..74], [0, 0, 1, 0, 0, 0, 2, 28]);
    assert_eq!(fold(sum_bytes(&out[34..])), 0xffff, "ICMP");
}

#[test]
fn answers_are_complete() {
    for (frame, reason, kind) in [
        (packet(1, ACK), DropReason::TtlExceeded, [11, 0]),
        (packet(1, ACK), DropReason::TooBig, [3, 4]),
        (extended(1), DropReason::TtlExceeded, [3, 0]),
        (extended(1), DropReason::TooBig, [2, 0]),
    ] {
        let tables = MemoryTables::one_address(Service::SNAT_NONE);
        let mut out = frame.clone();
        let notice = Notice {
            reason: reason as u32,
            mtu: 1400,
            ..Notice::default()
        };
        let mut egress = Egress::default();
        let mut memory = MemoryFrame::new(&mut out, Ok(VIA));
        let verdict = answer(&mut memory, &tables, &notice, &mut egress);
        assert_eq!(verdict, Ok(Verdict::Send));
        let v6 = frame[12] == 0x86;
        let (icmp, quoted) = if v6 { (54, 62) } else { (34, 42) };
        assert_eq!(out[icmp..icmp + 2], kind);
        assert_eq!(out[quoted..], frame[14..], "the packet as it came");
        let length = (out.len() - icmp) as u32;
        let base = if v6 {
            sum_bytes(&out[22..54]) + u64::from(length.to_be()) + u64::from(58u32.to_be())
        } else {
            assert_eq!(fold(sum_bytes(&out[14..34])), 0xffff, "IP header");
            0
        };
        assert_eq!(fold(base + sum_bytes(&out[icmp..])), 0xffff, "ICMP");
    }
}

/// The answer to a packet that belongs to nothing.
fn refusal(frame: &mut Vec<u8>, reason: DropReason) -> Result<Verdict, DropReason> {
    let tables = MemoryTables::one_address(Service::SNAT_NONE);
    let notice = Notice {
        reason: reason as u32,
        ..Notice::default()
    };
    let mut memory = MemoryFrame::new(frame, Ok(VIA));
    answer(&mut memory, &tables, &notice, &mut Egress::default())
}

#[test]
fn who_has_no_connection_is_told_by_the_number_it_names() {
    for reason in [DropReason::NoFlow, DropReason::NoMember] {
        for (flags, expected) in [
            (ACK, (RST, 0x0506_0708, 0)),
            (SYN | ACK, (RST, 0x0506_0708, 0)),
            (SYN, (RST | ACK, 0, 0x0102_0305)),
            (FIN, (RST | ACK, 0, 0x0102_0305)),
            (0, (RST | ACK, 0, 0x0102_0304)),
        ] {
            let mut frame = packet(1, flags);
            frame[38..46].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
            let check = !fold(sum_bytes(&frame[14..34]));
            frame[24..26].copy_from_slice(&check.to_ne_bytes());
            assert_eq!(refusal(&mut frame, reason), Ok(Verdict::Send));
            let number = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
            assert_eq!((frame[47], number(38), number(42)), expected);
            assert_eq!(fold(sum_bytes(&frame[14..34])), 0xffff, "IP header");
            let pseudo = sum_bytes(&frame[26..34]) + u64::from(20u32.to_be() + 6u32.to_be());
            assert_eq!(fold(pseudo + sum_bytes(&frame[34..54])), 0xffff, "TCP");
        }
    }
}

#[test]
fn tags_alone_make_it_our_answer() {
    let tag = [[0x81, 0, 0, 10]];
    for (frame, expected) in [
        (
            tagged(packet(1, ACK), &tag),
            Ok(Verdict::Reset(DropReason::NoFlow)),
        ),
        (tagged(packet(1, RST), &tag), Err(DropReason::NoFlow)),
        (tagged(packet(1, RST | ACK), &tag), Err(DropReason::NoFlow)),
        (packet(1, ACK), Err(DropReason::NoFlow)),
    ] {
        let tables = MemoryTables::one_address(Service::SNAT_NONE);
        assert_eq!(tables.send(&mut frame.clone()), Err(DropReason::NoFlow));
        let mut bytes = frame;
        let mut memory = MemoryFrame::new(&mut bytes, Ok(VIA));
        assert_eq!(refuse(&mut memory, DropReason::NoFlow), expected);
        let other = refuse(&mut memory, DropReason::PortsExhausted);
        assert_eq!(other, Err(DropReason::PortsExhausted));
    }
}

#[test]
fn a_client_that_loses_its_tags_is_answered_without() {
    let tables = MemoryTables::one_address(Service::SNAT_NONE);
    let tag = [[0x81, 0, 0, 10]];
    let mut syn = tagged(packet(1, SYN), &tag);
    tables.send(&mut syn).unwrap();
    let slot = tables.live()[0];
    let reply_length = || {
        let mut answer = packet(1, SYN | ACK);
        answer[26..30].copy_from_slice(&syn[30..34]);
        answer[30..34].copy_from_slice(&[10, 0, 1, CLIENT]);
        answer[34..38].rotate_left(2);
        assert_eq!(tables.send(&mut answer), Ok(Verdict::Send));
        answer.len()
    };
    assert_eq!(reply_length(), 58);
    assert_eq!(tables.send(&mut packet(1, ACK)), Ok(Verdict::Send));
    assert_eq!(tables.flow(slot).unwrap().vlan.load(Relaxed), 0);
    assert_eq!(reply_length(), 54);
    assert_eq!(
        tables.send(&mut tagged(packet(1, ACK), &tag)),
        Ok(Verdict::Send)
    );
    assert_eq!(reply_length(), 58, "and with them again");
}

/// What is odd, with bytes of it wrong: nobody panics, nothing leaks, and what is left to the stack is untouched.
#[test]
fn hostile_bytes_are_survived() {
    let tables = MemoryTables::one_address(Service::SNAT_AUTOMAP);
    let mut seed = RANDOM;
    for round in 0..200_000 {
        let port = random(&mut seed) as u16 % 32;
        let mut frame = match random(&mut seed) % 6 {
            0 => fragment(port, 0, true),
            1 => fragment(port, 4, false),
            2 => error(port),
            3 => extended(port),
            4 => tagged(packet(port, SYN), &[[0x81, 0, 0, 10]]),
            _ => packet(port, SYN),
        };
        for _ in 0..random(&mut seed) % 4 {
            let at = random(&mut seed) % frame.len();
            frame[at] = random(&mut seed) as u8;
        }
        frame.truncate(random(&mut seed) % 120);
        let before = frame.clone();
        let verdict = tables.send(&mut frame);
        if verdict == Ok(Verdict::Pass) {
            assert_eq!(frame, before, "round {round}");
        }
        let mut egress = Egress::default();
        let notice = Notice {
            reason: DropReason::TooBig as u32,
            mtu: 1280,
            ..Notice::default()
        };
        let _ = answer(
            &mut MemoryFrame::new(&mut frame, Ok(VIA)),
            &tables,
            &notice,
            &mut egress,
        );
        tables
            .now
            .set(tables.now.get() + random(&mut seed) as u64 % TICK);
        if round % 16 == 0 {
            sweep(&tables);
        }
    }
}
