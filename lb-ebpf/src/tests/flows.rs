//! Ports, records and the end of flows: over plain memory, with what holds between packets checked all the time.

use super::*;

impl MemoryTables {
    /// What holds between packets, whatever came before.
    fn check(&self) {
        let keys = if self.config.by_key != 0 { 2 } else { 1 };
        let live = self.live();
        assert_eq!(self.entries(), keys * live.len(), "entries of the index");
        let mut ends = std::collections::HashSet::new();
        for slot in &live {
            let flow = self.flows.borrow()[*slot as usize];
            let (snat, member) = (flow.route.snat(), flow.route.member());
            assert!(
                ends.insert((snat, member)),
                "{snat:?} twice towards {member:?}"
            );
            let pair =
                &self.pairs[self.chunks[(slot / CHUNK) as usize].pair.load(Relaxed) as usize];
            if self.config.by_key == 0 {
                assert_eq!(
                    (pair.source, pair.member),
                    (snat.0, member.0),
                    "slot {slot}"
                );
                assert_eq!(u32::from(u16::from_be(snat.1)) % CHUNK, slot % CHUNK);
            }
        }
        let embryonic = live
            .iter()
            .filter(|slot| self.phase(**slot) == Phase::Syn)
            .count();
        assert_eq!(self.allocation.embryonic.load(Relaxed) as usize, embryonic);
        let active = live
            .iter()
            .filter(|slot| !self.phase(**slot).ended())
            .count();
        assert_eq!(self.active(), active as u64);
        for (number, pair) in self.pairs.iter().enumerate().skip(1) {
            for place in 0..PLACES {
                self.check_place(number, pair, place);
            }
        }
    }

    fn check_place(&self, number: usize, pair: &Pair, place: usize) {
        let marked = |mark: Mark| {
            let word = pair.words[mark as usize][place / 64].load(Relaxed);
            let top = pair.tops[mark as usize].load(Relaxed);
            assert!(
                word == 0 || top >> (place / 64) & 1 == 1,
                "a top bit is missing"
            );
            word >> (place % 64) & 1 == 1
        };
        let usable = self.usable.get(place).copied().unwrap_or(0);
        let bound = pair.chunks[place].load(Relaxed);
        assert_eq!(marked(Mark::Bound), bound != 0);
        assert_eq!(marked(Mark::Unbound), bound == 0 && usable != 0);
        if bound == 0 {
            return;
        }
        let chunk = &self.chunks[bound as usize];
        assert_eq!(chunk.pair.load(Relaxed) as usize, number);
        let (free, resting) = (chunk.free.load(Relaxed), chunk.resting.load(Relaxed));
        assert_eq!(free & resting, 0, "free and resting");
        assert_eq!(free & !usable, 0, "free, but not usable");
        assert!(free == 0 || marked(Mark::Free), "free, but not to be found");
        let found = resting == 0 || marked(Mark::Resting);
        assert!(found, "resting, but not to be found");
        for at in 0..CHUNK {
            if usable >> at & 1 == 0 {
                continue;
            }
            let phase = self.phase(bound * CHUNK + at);
            let bit = 1 << at;
            assert_ne!(phase, Phase::Claimed, "nobody is at work");
            match phase {
                Phase::Free => assert_ne!(free & bit, 0, "lost port"),
                Phase::Forgotten => assert_ne!(resting & bit, 0, "lost resting port"),
                phase => {
                    assert_eq!(free & bit, 0, "free with a flow");
                    assert_eq!(resting & bit != 0, phase.ended(), "{phase:?}");
                }
            }
        }
    }
}

/// Ports 1030 to 1100, some of them excluded: 68 in all, in two places.
fn few_ports() -> Vec<u64> {
    let mut usable = vec![0; 18];
    usable[16] = u64::MAX << 6;
    usable[17] = 0x1f & !0b10;
    usable[17] |= 0b111_1110 << 50;
    usable
}

#[test]
fn every_port_of_every_address_is_given_out_before_one_is_refused() {
    let usable = few_ports();
    let ports: u32 = usable.iter().map(|word| word.count_ones()).sum();
    let tables = MemoryTables::new(Service::SNAT_POOL, 8, &usable);
    let fits = 2 * ADDRESSES * ports;
    for port in 0..fits {
        assert_eq!(
            open(&tables, 1000 + port as u16),
            Ok(Verdict::Send),
            "flow {port}"
        );
    }
    for port in 0..fits {
        establish(&tables, 1000 + port as u16);
    }
    assert_eq!(open(&tables, 9000), Err(DropReason::PortsExhausted));
    assert_eq!(
        tables.active(),
        u64::from(fits),
        "a refused flow leaves nothing behind"
    );
    tables.check();
    assert_eq!(tables.send(&mut packet(1000, RST)), Ok(Verdict::Send));
    assert_eq!(
        open(&tables, 9000),
        Ok(Verdict::Send),
        "an ended flow makes room at once"
    );
    establish(&tables, 9000);
    assert_eq!(open(&tables, 9001), Err(DropReason::PortsExhausted));
    for slot in tables.live() {
        assert_eq!(reply(&tables, slot, RST), Ok(Verdict::Send));
    }
    tables.check();
    tables.wait(100);
    tables.sweep_all();
    assert_eq!(tables.live().len(), 0);
    assert_eq!(tables.free.borrow().len(), 8, "every chunk came back");
    for port in 0..fits {
        assert_eq!(
            open(&tables, 1000 + port as u16),
            Ok(Verdict::Send),
            "flow {port} again"
        );
    }
    tables.check();
}

#[test]
fn a_port_rests_while_another_is_to_be_had() {
    let tables = MemoryTables::new(Service::SNAT_POOL, 16, &[0, u64::MAX, u64::MAX]);
    let mut last = std::collections::HashMap::new();
    for round in 0..400u32 {
        assert_eq!(open(&tables, 1000), Ok(Verdict::Send));
        let slot = *tables
            .live()
            .iter()
            .find(|slot| !tables.phase(**slot).ended())
            .unwrap();
        let route = tables.flows.borrow()[slot as usize].route;
        if let Some(before) = last.insert((route.snat(), route.member()), round) {
            assert!(
                round - before >= 500,
                "port used in round {before} and again in {round}"
            );
        }
        establish(&tables, 1000);
        tables.send(&mut packet(1000, FIN | ACK)).unwrap();
        reply(&tables, slot, FIN | ACK).unwrap();
        assert_eq!(tables.phase(slot), Phase::Closing);
        tables.check();
    }
    tables.wait(55);
    tables.sweep_all();
    assert!(tables.free.borrow().is_empty(), "they rest for a minute");
    tables.wait(2);
    tables.sweep_all();
    assert_eq!(tables.live().len(), 0);
    assert_eq!(
        tables.free.borrow().len() as u32,
        tables.allocation.unused.load(Relaxed)
    );
}

#[test]
fn a_reset_that_nobody_believes_keeps_record_and_port() {
    let tables = MemoryTables::new(Service::SNAT_POOL, 4, &[1 << 63]);
    open(&tables, 1000).unwrap();
    establish(&tables, 1000);
    tables.send(&mut packet(1000, RST)).unwrap();
    tables.send(&mut packet(1000, ACK)).unwrap();
    for port in 2000..2020 {
        let _ = open(&tables, port);
    }
    assert_eq!(tables.send(&mut packet(1000, ACK)), Ok(Verdict::Send));
    assert_eq!(tables.active(), 4);
    tables.check();
}

#[test]
fn without_a_chunk_the_table_is_full_and_not_the_ports() {
    let tables = MemoryTables::new(Service::SNAT_POOL, 2, &[0, u64::MAX, u64::MAX]);
    let opened = (0..128).map(|port| open(&tables, 1000 + port));
    assert!(opened.into_iter().all(|it| it == Ok(Verdict::Send)));
    for port in 0..128 {
        establish(&tables, 1000 + port);
    }
    assert_eq!(open(&tables, 3000), Err(DropReason::FlowTableFull));
    tables.check();
}

#[test]
fn half_open_flows_make_room_and_established_ones_do_not() {
    let tables = MemoryTables::new(Service::SNAT_NONE, 4, &[u64::MAX]);
    let fits = 4 * CHUNK as u16;
    for port in 0..fits {
        open(&tables, 1000 + port).unwrap();
    }
    for port in 0..5 {
        establish(&tables, 1000 + port);
    }
    assert_eq!(
        open(&tables, 2000),
        Ok(Verdict::Jump(Jump::Bake)),
        "all of them are young"
    );
    tables.wait(4);
    let mut opened = 0;
    for port in 0..4000 {
        opened += u16::from(open(&tables, 3000 + port) == Ok(Verdict::Send));
    }
    assert_eq!(opened, fits - 5);
    for port in 0..5 {
        assert_eq!(
            tables.send(&mut packet(1000 + port, ACK)),
            Ok(Verdict::Send)
        );
    }
    tables.check();
}

#[test]
fn a_flood_of_half_open_flows_leaves_its_share() {
    let mut tables = MemoryTables::new(Service::SNAT_POOL, 8, &[u64::MAX; 2]);
    tables.config.embryonic = 100;
    let flood = |from: u16| {
        let sent = (from..from + 400).map(|port| open(&tables, port));
        let (opened, others): (Vec<_>, Vec<_>) = sent.partition(|it| *it == Ok(Verdict::Send));
        assert!(others.iter().all(|it| *it == Ok(Verdict::Jump(Jump::Bake))));
        opened.len()
    };
    assert_eq!(flood(1000), 100);
    for port in 0..50 {
        establish(&tables, 1000 + port);
    }
    assert_eq!(
        flood(5000),
        50,
        "those that became connections count no longer"
    );
    tables.check();
}

#[test]
fn a_cookie_that_comes_back_opens_a_flow() {
    let mut tables = MemoryTables::new(Service::SNAT_POOL, 8, &[u64::MAX; 2]);
    tables.config.embryonic = 0;
    let mut frame = packet(1000, SYN);
    let syn = crate::parse::packet(&mut MemoryFrame::new(&mut frame, Ok(VIA)));
    let cookie = tables.bake(&syn.unwrap().unwrap(), 3);
    let back = |port, cookie: u32| tables.send(&mut numbered(port, ACK, 1, cookie.wrapping_add(1)));
    assert_eq!(
        back(1000, cookie),
        Err(DropReason::NoFlow),
        "nobody has baked"
    );
    let now = lb_common::tcp::tick(tables.now.get());
    tables.allocation.baked.store(now, Relaxed);
    assert_eq!(back(1000, cookie ^ 8), Err(DropReason::NoFlow));
    assert_eq!(back(1001, cookie), Err(DropReason::NoFlow));
    assert_eq!(tables.live().len(), 0);
    assert_eq!(back(1000, cookie), Ok(Verdict::Jump(Jump::Shift)));
    let slot = tables.live()[0];
    assert_eq!(tables.phase(slot), Phase::Syn);
    let flow = tables.flow(slot).unwrap();
    assert_eq!(flow.header.load(Relaxed), lb_common::shift::waiting(3));
    assert_eq!(flow.first.load(Relaxed), 1);
    assert_eq!(flow.shift[1].load(Relaxed), cookie.wrapping_add(1));
    assert_eq!(back(1000, cookie), Ok(Verdict::Jump(Jump::Shift)), "once");
    assert_eq!(tables.live().len(), 1);
    tables.check();
    tables.wait(u64::from(lb_common::cookie::LIFETIME) + 1);
    assert_eq!(back(1002, cookie), Err(DropReason::NoFlow));
}

#[test]
fn who_shows_that_it_is_there_gets_the_port_of_one_that_does_not() {
    let tables = MemoryTables::new(Service::SNAT_POOL, 4, &[u64::MAX]);
    let fits = 4 * CHUNK as u16;
    for port in 0..fits {
        assert_eq!(open(&tables, 1000 + port), Ok(Verdict::Send));
        if port < fits / 2 {
            establish(&tables, 1000 + port);
        }
    }
    let mut frame = packet(2000, SYN);
    let syn = crate::parse::packet(&mut MemoryFrame::new(&mut frame, Ok(VIA)));
    let cookie = tables.bake(&syn.unwrap().unwrap(), 3);
    let asked = (0..40).map(|_| open(&tables, 2000));
    let asked: Vec<_> = asked
        .filter(|it| *it != Err(DropReason::PortsExhausted))
        .collect();
    assert!(!asked.is_empty(), "it looks at a few a time");
    assert!(asked.iter().all(|it| *it == Ok(Verdict::Jump(Jump::Bake))));
    let now = lb_common::tcp::tick(tables.now.get());
    tables.allocation.baked.store(now, Relaxed);
    let mut back = numbered(2000, ACK, 1, cookie.wrapping_add(1));
    assert_eq!(tables.send(&mut back), Ok(Verdict::Jump(Jump::Shift)));
    assert_eq!(tables.live().len(), usize::from(fits));
    let waiting = tables
        .live()
        .into_iter()
        .filter(|slot| lb_common::shift::waits(tables.flow(*slot).unwrap().header.load(Relaxed)));
    assert_eq!(waiting.count(), 1, "in place of one that was half-open");
    for port in 0..fits / 2 {
        let sent = tables.send(&mut packet(1000 + port, ACK));
        assert_eq!(sent, Ok(Verdict::Send), "an established one");
    }
    tables.check();
}

#[test]
fn a_first_packet_that_cannot_leave_leaves_nothing_behind() {
    let tables = MemoryTables::new(Service::SNAT_POOL, 4, &[u64::MAX]);
    for (reason, ttl) in [(DropReason::NoRoute, 64), (DropReason::TtlExceeded, 1)] {
        let mut frame = packet(1000, SYN);
        frame[22] = ttl;
        assert_eq!(tables.send_by(&mut frame, Err(reason)), Err(reason));
        assert_eq!(tables.live().len(), 0);
        assert_eq!(tables.active(), 0);
        assert!(tables.reports.borrow().is_empty());
        tables.check();
    }
    assert_eq!(open(&tables, 1000), Ok(Verdict::Send));
    tables.wait(1);
    let again = tables.send_by(&mut packet(1000, SYN), Err(DropReason::NoRoute));
    assert_eq!(again, Err(DropReason::NoRoute));
    assert_eq!(tables.live().len(), 1, "its first packet has left");
    tables.check();
}

/// A packet as a client sends it, or as somebody does who only knows who talks to whom.
fn numbered(port: u16, flags: u8, sequence: u32, acknowledgement: u32) -> Vec<u8> {
    let mut frame = packet(port, flags);
    frame[38..42].copy_from_slice(&sequence.to_be_bytes());
    frame[42..46].copy_from_slice(&acknowledgement.to_be_bytes());
    frame
}

#[test]
fn who_does_not_know_the_members_number_establishes_nothing() {
    let tables = MemoryTables::new(Service::SNAT_NONE, 4, &[u64::MAX]);
    open(&tables, 1000).unwrap();
    let slot = tables.live()[0];
    tables.send(&mut packet(1000, ACK)).unwrap();
    assert_eq!(tables.phase(slot), Phase::Syn, "the member has not spoken");
    reply(&tables, slot, SYN | ACK).unwrap();
    for guess in [0, 2, 1 << 20, u32::MAX] {
        for flags in [ACK, FIN | ACK] {
            let mut frame = numbered(1000, flags, 1, guess);
            assert_eq!(
                tables.send(&mut frame),
                Ok(Verdict::Send),
                "carried, not believed"
            );
            assert_eq!(tables.phase(slot), Phase::Syn, "{flags} {guess}");
        }
    }
    reply(&tables, slot, ACK).unwrap();
    assert_eq!(
        tables.phase(slot),
        Phase::Syn,
        "a member may answer a guess"
    );
    tables.send(&mut packet(1000, ACK)).unwrap();
    assert_eq!(tables.phase(slot), Phase::Established);
    tables.check();
}

#[test]
fn who_sweeps_the_numbers_ends_nothing() {
    let tables = MemoryTables::new(Service::SNAT_NONE, 4, &[u64::MAX]);
    open(&tables, 1000).unwrap();
    let slot = establish(&tables, 1000);
    // Every 2 MiB of all there are: some lie in every window, none is the true one.
    for guess in (0..2048u32).map(|step| step << 21 | 0x1234) {
        for flags in [ACK, FIN | ACK, RST, RST | ACK, SYN] {
            let mut frame = numbered(1000, flags, guess, guess);
            assert_eq!(tables.send(&mut frame), Ok(Verdict::Send));
            assert!(!tables.phase(slot).ended(), "{flags} {guess}");
        }
    }
    assert_eq!(tables.live(), [slot], "nobody took its place");
    assert_eq!(tables.active(), 1);
    // Both sides go on talking, and what they say is believed.
    tables.send(&mut numbered(1000, ACK, 1, 1)).unwrap();
    reply(&tables, slot, FIN | ACK).unwrap();
    tables.send(&mut numbered(1000, RST, 1, 0)).unwrap();
    assert!(tables.phase(slot).ended());
    tables.check();
}

#[test]
fn only_who_has_sent_a_reset_can_take_it_back() {
    let tables = MemoryTables::new(Service::SNAT_NONE, 4, &[u64::MAX]);
    open(&tables, 1000).unwrap();
    let slot = establish(&tables, 1000);
    tables.send(&mut packet(1000, RST)).unwrap();
    assert_eq!(tables.phase(slot), Phase::Reset);
    reply(&tables, slot, ACK).unwrap();
    assert_eq!(tables.phase(slot), Phase::Reset, "it was on its way before");
    tables.send(&mut numbered(1000, ACK, 1, 1 << 31)).unwrap();
    assert_eq!(tables.phase(slot), Phase::Reset, "a guess");
    tables.send(&mut packet(1000, ACK)).unwrap();
    assert_eq!(tables.phase(slot), Phase::Established);
    tables.check();
}

#[test]
fn what_was_never_established_is_not_after_a_reset_either() {
    let tables = MemoryTables::new(Service::SNAT_NONE, 4, &[u64::MAX]);
    for port in 1000..1003 {
        open(&tables, port).unwrap();
        let slot = *tables.live().last().unwrap();
        if port == 1001 {
            reply(&tables, slot, SYN | ACK).unwrap();
        }
        tables.send(&mut packet(port, RST)).unwrap();
        for acknowledged in [0, 1, 2] {
            tables
                .send(&mut numbered(port, ACK, 1, acknowledged))
                .unwrap();
            assert_eq!(tables.phase(slot), Phase::Reset);
        }
    }
    assert_eq!(tables.active(), 0);
    tables.check();
}

#[test]
fn a_port_that_is_used_again_under_a_flood_gets_a_cookie_and_its_old_flow_goes() {
    let mut tables = MemoryTables::new(Service::SNAT_POOL, 8, &[u64::MAX; 2]);
    open(&tables, 1000).unwrap();
    let slot = tables.live()[0];
    tables.send(&mut packet(1000, RST)).unwrap();
    tables.config.embryonic = 0;
    assert_eq!(open(&tables, 1000), Ok(Verdict::Jump(Jump::Bake)));
    assert!(
        !tables.live().contains(&slot),
        "what comes back finds nothing else"
    );
    tables.check();
}

#[test]
fn many_half_open_flows_wait_less_long() {
    let mut tables = MemoryTables::new(Service::SNAT_POOL, 8, &[u64::MAX; 2]);
    tables.config.embryonic = 20;
    for port in 0..9 {
        open(&tables, 1000 + port).unwrap();
    }
    tables.wait(16);
    tables.sweep_all();
    assert_eq!(tables.live().len(), 9, "few");
    open(&tables, 2000).unwrap();
    tables.wait(16);
    tables.sweep_all();
    assert_eq!(tables.live().len(), 9, "until there are few");
    tables.check();
}

#[test]
fn an_idle_flow_goes_when_its_phase_says_so() {
    let tables = MemoryTables::new(Service::SNAT_NONE, 4, &[u64::MAX]);
    for (port, limit) in [(1, Phase::Syn), (2, Phase::Established), (3, Phase::Reset)] {
        open(&tables, port).unwrap();
        match limit {
            Phase::Established => _ = establish(&tables, port),
            Phase::Reset => _ = tables.send(&mut packet(port, RST)).unwrap(),
            _ => {}
        }
        tables.wait(u64::from(tables.config.idle_limit(limit)));
        tables.sweep_all();
        assert_eq!(tables.entries(), 2, "flow {port} at its limit");
        tables.wait(1);
        tables.sweep_all();
        assert_eq!(tables.entries(), 0, "flow {port} beyond its limit");
        assert_eq!(tables.active(), 0);
    }
}

#[test]
fn a_flow_without_a_way_out_waits_for_the_hook_behind() {
    let tables = MemoryTables::new(Service::SNAT_NONE, 4, &[u64::MAX]);
    let mut frame = packet(1000, SYN);
    let untouched = frame.clone();
    let refused = tables.send_by(&mut frame, Err(DropReason::NoRoute));
    assert_eq!(refused, Err(DropReason::NoRoute));
    assert_eq!(
        frame, untouched,
        "nothing is changed before the way is known"
    );
}

/// Random frames and mutations of good ones from both sides, and the invariants that hold after each.
#[test]
fn hostile_bytes_neither_panic_nor_leak() {
    for snat in [Service::SNAT_POOL, Service::SNAT_NONE] {
        let tables = MemoryTables::new(snat, 5, &[u64::MAX << 40, 0, u64::MAX >> 30]);
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = move || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        for round in 0..60_000u32 {
            let flags = match random() % 3 {
                0 => SYN,
                1 => [ACK, FIN | ACK, RST, SYN | ACK][random() as usize % 4],
                _ => random() as u8,
            };
            let live = tables.live();
            if random() % 2 == 0 && !live.is_empty() {
                let _ = reply(&tables, live[random() as usize % live.len()], flags);
            } else {
                let mut frame = packet(random() as u16 % 512, flags);
                if random() % 4 == 0 {
                    for _ in 0..random() % 4 {
                        let at = random() as usize % frame.len();
                        frame[at] = random() as u8;
                    }
                    frame.truncate(random() as usize % 80);
                }
                let _ = tables.send(&mut frame);
            }
            tables.now.set(tables.now.get() + random() % (TICK / 2));
            if round % 16 == 0 {
                sweep(&tables);
            }
            if round % 64 == 0 {
                tables.check();
            }
        }
        tables.wait(10_000);
        tables.sweep_all();
        tables.check();
        assert_eq!(tables.live().len(), 0);
    }
}

#[test]
fn every_end_is_reported_once_with_its_cause() {
    let tables = MemoryTables::new(Service::SNAT_AUTOMAP, 8, &[u64::MAX]);
    for port in [1000, 1001, 1002] {
        assert_eq!(open(&tables, port), Ok(Verdict::Send));
    }
    // The port is used again after a reset, one client never comes back, one flow is ended by the operator.
    assert_eq!(tables.send(&mut packet(1000, RST)), Ok(Verdict::Send));
    assert_eq!(open(&tables, 1000), Ok(Verdict::Send));
    let slot = *tables.live().last().unwrap();
    let flow = tables.flow(slot).unwrap();
    let (member, _) = split_owners(flow.owners.load(Relaxed));
    let (member, created) = (u32::from(member), flow.created.load(Relaxed));
    let end = |created, member| crate::flow::end(&tables, slot, created, member, Cause::Drained);
    assert!(!end(created, member ^ 3), "of another member");
    assert!(!end(created + 1, member), "a later flow in the same record");
    assert!(end(created, member));
    assert!(!end(created, member), "there is nothing left to end");
    tables.wait(100);
    tables.sweep_all();
    tables.check();
    let mut reports = tables.reports.borrow().clone();
    reports.sort_by_key(|(_, _, cause)| *cause as u8);
    let ends: Vec<_> = reports
        .iter()
        .map(|(_, phase, cause)| (*phase, *cause))
        .collect();
    assert_eq!(
        ends,
        [
            (Phase::Syn, Cause::Expired),
            (Phase::Syn, Cause::Expired),
            (Phase::Reset, Cause::Reused),
            (Phase::Syn, Cause::Drained),
        ]
    );
    assert_eq!(tables.active(), 0);
}
