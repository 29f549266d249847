//! Packets of shifted flows in plain memory, with every checksum computed in full by the test.

use lb_common::{
    addr::Addr,
    atomic::AtomicU32,
    checksum::{fold, sum_bytes},
    flow::{FlowKey, Route},
    shift::{PATIENCE, WAITING, waiting},
};

use super::*;
use crate::frame::{Frame, MemoryFrame};

const SYN: u8 = Flags::SYN;
const ACK: u8 = Flags::ACK;
const PSH: u8 = Flags::PSH;
/// So close to the end that every test wraps.
const ISN: u32 = u32::MAX - 10;
const FIRST: u32 = ISN.wrapping_add(1);
/// The member's number, as the client knows it.
const THEIRS: u32 = 5000;
const SECOND: u64 = 1_000_000_000;

/// A packet that may grow.
struct VecFrame(Vec<u8>);

impl VecFrame {
    fn frame(&mut self) -> MemoryFrame<'_> {
        MemoryFrame::new(&mut self.0, Err(DropReason::NoRoute))
    }
}

impl Frame for VecFrame {
    const ASKS: bool = true;

    fn tagged(&self) -> bool {
        false
    }
    fn tag(&self) -> u16 {
        0
    }
    fn ingress(&self) -> u32 {
        0
    }
    fn link_mtu(&self, _: u32) -> u32 {
        1500
    }
    fn retag(&mut self, _: &crate::parse::Link, _: u32) -> Result<(), DropReason> {
        Err(DropReason::Internal)
    }
    fn quote(&mut self, _: &crate::parse::Link, _: u32, _: u32, _: u32) -> Result<(), DropReason> {
        Err(DropReason::Internal)
    }
    fn sum(&self, _: u32, _: u32) -> Result<u64, DropReason> {
        Err(DropReason::Internal)
    }
    fn may_be_partial(&self) -> crate::frame::Partial {
        crate::frame::Partial::Never
    }
    fn reach(&mut self, length: usize) -> Result<(), DropReason> {
        self.frame().reach(length)
    }
    fn load<T: crate::frame::Wire>(&self, at: usize) -> Result<T, DropReason> {
        MemoryFrame::new(&mut self.0.clone(), Err(DropReason::NoRoute)).load(at)
    }
    fn store<T: crate::frame::Wire>(&mut self, at: usize, value: T) -> Result<(), DropReason> {
        self.frame().store(at, value)
    }
    fn store_summed(&mut self, at: usize, value: u16) -> Result<(), DropReason> {
        self.frame().store_summed(at, value)
    }
    fn store_addresses(&mut self, at: usize, to: &FlowKey) -> Result<(), DropReason> {
        self.frame().store_addresses(at, to)
    }
    fn amend_checksum(&mut self, edit: &ChecksumEdit) -> Result<(), DropReason> {
        self.frame().amend_checksum(edit)
    }
    fn cut(&mut self, length: usize) -> Result<(), DropReason> {
        self.frame().cut(length)
    }
    fn size(&self, packet: &Packet) -> u32 {
        packet.length
    }
    fn route(&self, _: &FlowKey, _: &mut Egress) -> Result<(), DropReason> {
        Err(DropReason::NoRoute)
    }
}

impl Reshape for VecFrame {
    fn copy_out(&self, at: usize, to: &mut [u8; ROOM], length: u32) -> Result<(), DropReason> {
        let from = self
            .0
            .get(at..at + length as usize)
            .ok_or(DropReason::Truncated)?;
        to[..from.len()].copy_from_slice(from);
        Ok(())
    }
    fn copy_in(
        &mut self,
        at: usize,
        from: &[u8; SEGMENT],
        length: u32,
        _: bool,
    ) -> Result<(), DropReason> {
        let to = self
            .0
            .get_mut(at..at + length as usize)
            .ok_or(DropReason::Truncated)?;
        to.copy_from_slice(&from[..length as usize]);
        Ok(())
    }
    fn resize(&mut self, length: usize) -> Result<(), DropReason> {
        self.0.resize(length, 0xee);
        Ok(())
    }
    fn make_room(&mut self, _: usize) -> Result<(), DropReason> {
        Ok(())
    }
    fn unfinished(&mut self, _: usize, _: u64) -> Result<bool, DropReason> {
        Ok(false)
    }
}

/// A connection of one family, and what its record holds.
struct Connection {
    flow: Flow,
    v6: bool,
    now: u64,
}

impl Connection {
    /// As a new one with a header to insert, its SYN seen.
    fn new(v6: bool) -> Self {
        let address = |host: u8| match v6 {
            true => Addr::from(std::net::Ipv6Addr::new(
                0xfd00,
                0,
                0,
                0,
                0,
                0,
                0,
                host.into(),
            )),
            false => Addr::from(std::net::Ipv4Addr::new(10, 0, 1, host)),
        };
        let key = |src, dst, sport: u16, dport: u16| FlowKey {
            src: address(src),
            dst: address(dst),
            sport: sport.to_be(),
            dport: dport.to_be(),
        };
        let flow = Flow {
            route: Route {
                leave: [key(1, 11, 3000, 4465), key(100, 2, 465, 40000)],
            },
            phase: AtomicU32::new(Phase::Syn as u32),
            last_seen: AtomicU32::new(0),
            created: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            packets: Default::default(),
            bytes: Default::default(),
            owners: AtomicU32::new(0),
            vlan: AtomicU32::new(0),
            first: AtomicU32::new(FIRST),
            header: AtomicU32::new(UNSENT),
            ways: Default::default(),
            shift: [AtomicU32::new(header::length(!v6)), AtomicU32::new(0)],
            next: Default::default(),
        };
        Self {
            flow,
            v6,
            now: 100 * SECOND,
        }
    }

    fn length(&self) -> u32 {
        header::length(!self.v6)
    }

    fn send(&mut self, direction: Direction, segment: &Segment) -> Segment {
        self.try_send(direction, segment).unwrap()
    }

    fn try_send(&mut self, direction: Direction, segment: &Segment) -> Result<Segment, DropReason> {
        let key = self.flow.route.key(direction);
        let mut frame = VecFrame(segment.frame(&key, self.v6));
        let packet = crate::parse::packet(&mut frame).unwrap().expect("TCP");
        let mut workspace = Workspace::default();
        if !decide(&mut workspace, &self.flow, &packet, direction, self.now) {
            return Err(DropReason::Unexpected);
        }
        workspace.spot = Spot::of(&packet, &packet.key, false);
        perform(&mut frame, &mut workspace, &self.flow)?;
        Ok(Segment::read(&frame.0, self.v6))
    }

    fn forward(&mut self, segment: &Segment) -> Segment {
        self.send(Direction::Forward, segment)
    }

    fn reverse(&mut self, segment: &Segment) -> Segment {
        self.send(Direction::Reverse, segment)
    }

    /// The header segment that a packet like this becomes.
    fn header(&self, from: &Segment) -> Segment {
        let words = header::words(&self.flow.route.leave[1]);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        Segment {
            seq: FIRST,
            flags: ACK | PSH,
            payload: bytes[..self.length() as usize].to_vec(),
            ..from.clone()
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Segment {
    seq: u32,
    ack: u32,
    flags: u8,
    options: Vec<u8>,
    payload: Vec<u8>,
}

impl Segment {
    fn new(seq: u32, flags: u8, payload: usize) -> Self {
        Self {
            seq,
            ack: THEIRS,
            flags,
            options: vec![1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8],
            payload: (0..payload).map(|byte| (byte * 7) as u8).collect(),
        }
    }

    fn frame(&self, key: &FlowKey, v6: bool) -> Vec<u8> {
        let mut tcp = Vec::new();
        tcp.extend(key.sport.to_ne_bytes());
        tcp.extend(key.dport.to_ne_bytes());
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        tcp.extend([
            (20 + self.options.len() as u8) << 2,
            self.flags,
            1,
            2,
            0,
            0,
            0,
            0,
        ]);
        tcp.extend(&self.options);
        tcp.extend(&self.payload);
        let mut frame = vec![0xaa; 12];
        let address = |address: &Addr| -> Vec<u8> {
            address
                .0
                .iter()
                .flat_map(|word| word.to_ne_bytes())
                .skip(if v6 { 0 } else { 12 })
                .collect()
        };
        let addresses = [address(&key.src), address(&key.dst)].concat();
        let pseudo = sum_bytes(&addresses)
            + sum_bytes(&(tcp.len() as u32).to_be_bytes())
            + sum_bytes(&[0, 6]);
        let check = !fold(pseudo + sum_bytes(&tcp));
        tcp[16..18].copy_from_slice(&check.to_ne_bytes());
        if v6 {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend((tcp.len() as u16).to_be_bytes());
            frame.extend([6, 64]);
            frame.extend(addresses);
        } else {
            frame.extend([0x08, 0x00, 0x45, 0]);
            frame.extend((20 + tcp.len() as u16).to_be_bytes());
            frame.extend([1, 2, 0x40, 0, 64, 6, 0, 0]);
            frame.extend(addresses);
            let check = !fold(sum_bytes(&frame[14..34]));
            frame[24..26].copy_from_slice(&check.to_ne_bytes());
        }
        frame.extend(tcp);
        // A short frame is padded, and the padding is no payload.
        frame.resize(frame.len().max(60), 0x55);
        frame
    }

    /// Reads a packet back; its length and checksums have to be right.
    fn read(frame: &[u8], v6: bool) -> Self {
        let (l4, end) = match v6 {
            true => (
                54,
                54 + usize::from(u16::from_be_bytes([frame[18], frame[19]])),
            ),
            false => (
                34,
                14 + usize::from(u16::from_be_bytes([frame[16], frame[17]])),
            ),
        };
        let tcp = &frame[l4..end];
        assert!(
            frame.len() == end || frame.len() == 60,
            "{} of {end}",
            frame.len()
        );
        let addresses = if v6 { &frame[22..54] } else { &frame[26..34] };
        let pseudo = sum_bytes(addresses)
            + sum_bytes(&(tcp.len() as u32).to_be_bytes())
            + sum_bytes(&[0, 6]);
        assert_eq!(fold(pseudo + sum_bytes(tcp)), 0xffff, "TCP checksum");
        if !v6 {
            assert_eq!(fold(sum_bytes(&frame[14..34])), 0xffff, "IP checksum");
        }
        let word = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
        let header = usize::from(tcp[12] >> 4) * 4;
        Self {
            seq: word(4),
            ack: word(8),
            flags: tcp[13],
            options: tcp[20..header].to_vec(),
            payload: tcp[header..].to_vec(),
        }
    }
}

fn each_family(test: impl Fn(Connection)) {
    [false, true]
        .into_iter()
        .for_each(|v6| test(Connection::new(v6)));
}

#[test]
fn every_empty_packet_becomes_the_header_until_it_is_acknowledged() {
    each_family(|mut connection| {
        for (seq, flags) in [
            (FIRST, ACK),
            (FIRST.wrapping_add(700), ACK),
            (FIRST, ACK | Flags::FIN),
        ] {
            let packet = Segment::new(seq, flags, 0);
            assert_eq!(connection.forward(&packet), connection.header(&packet));
        }
        let length = connection.length();
        let mut answer = Segment::new(THEIRS, ACK, 0);
        answer.ack = FIRST.wrapping_add(length);
        assert_eq!(connection.reverse(&answer).ack, FIRST);
        let packet = Segment::new(FIRST, ACK, 0);
        let expected = Segment {
            seq: FIRST.wrapping_add(length),
            ..packet.clone()
        };
        assert_eq!(connection.forward(&packet), expected);
    });
}

#[test]
fn first_payload_becomes_the_header_when_none_is_under_way() {
    each_family(|mut connection| {
        let first = Segment::new(FIRST, ACK | PSH, 517);
        let shifted = Segment {
            seq: FIRST.wrapping_add(connection.length()),
            ..first.clone()
        };
        assert_eq!(connection.forward(&first), connection.header(&first));
        assert_eq!(connection.forward(&first), shifted, "under way");
        connection.now += u64::from(PATIENCE + 2) << 20;
        assert_eq!(
            connection.forward(&first),
            connection.header(&first),
            "lost"
        );
        // One shorter than the header, and one that leaves an odd number of bytes.
        for payload in [1, 11, 1399] {
            connection.now += SECOND;
            let first = Segment::new(FIRST, ACK, payload);
            assert_eq!(connection.forward(&first), connection.header(&first));
        }
    });
}

#[test]
fn the_client_is_told_its_own_numbers() {
    each_family(|mut connection| {
        let length = connection.length();
        let mut greeting = Segment::new(THEIRS, ACK, 100);
        greeting.ack = FIRST;
        assert_eq!(
            connection.reverse(&greeting),
            greeting,
            "before the header came"
        );
        // A hole where the header belongs: the client hears of no SACK, at whatever alignment it stands.
        let mut hole = greeting.clone();
        hole.options = vec![1, 5, 10, 0, 0, 0, 28, 0, 0, 1, 0, 1];
        let mut hidden = hole.clone();
        hidden.options = vec![1; 12];
        assert_eq!(connection.reverse(&hole), hidden);
        hole.ack = FIRST.wrapping_add(length + 1000);
        let edges = [1028u32, 2028].map(|edge| FIRST.wrapping_add(edge));
        hole.options = vec![1, 5, 10];
        hole.options
            .extend(edges.iter().flat_map(|edge| edge.to_be_bytes()));
        hole.options.push(1);
        let told = connection.reverse(&hole);
        let mut expected = hole.clone();
        expected.ack = FIRST.wrapping_add(1000);
        expected.options.truncate(3);
        let edges = edges.map(|edge| edge.wrapping_sub(length));
        expected
            .options
            .extend(edges.iter().flat_map(|edge| edge.to_be_bytes()));
        expected.options.push(1);
        assert_eq!(told, expected);
    });
}

#[test]
fn a_syn_asks_for_nothing_that_the_shift_would_break() {
    each_family(|mut connection| {
        let mut syn = Segment::new(ISN, SYN, 40);
        syn.ack = 0;
        syn.options = vec![2, 4, 5, 0xb4, 34, 6, 1, 2, 3, 4, 1, 30, 4, 0, 1, 1];
        let mut expected = syn.clone();
        expected.options = vec![2, 4, 5, 0xb4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1];
        expected.payload.clear();
        assert_eq!(connection.forward(&syn), expected, "its data is sent again");
        let mut answer = Segment::new(THEIRS, SYN | ACK, 0);
        answer.ack = FIRST;
        answer.options = vec![4, 2, 2, 4, 5, 0xb4, 34, 6, 1, 2, 3, 4];
        let mut expected = answer.clone();
        let mss = 1460 - connection.length() as u16;
        expected.options = vec![4, 2, 2, 4, (mss >> 8) as u8, mss as u8, 1, 1, 1, 1, 1, 1];
        assert_eq!(connection.reverse(&answer), expected);
    });
}

#[test]
fn both_directions_shift_at_once() {
    each_family(|mut connection| {
        let back = 0xdead_beef;
        connection.flow.shift[1].store(back, Relaxed);
        connection.flow.header.store(SETTLED, Relaxed);
        let length = connection.length();
        let mut packet = Segment::new(FIRST, ACK, 99);
        packet.options = vec![5, 10, 0, 0, 0, 1, 0, 0, 0, 9, 1, 1];
        let mut expected = packet.clone();
        expected.seq = FIRST.wrapping_add(length);
        expected.ack = THEIRS.wrapping_sub(back);
        expected.options[2..6].copy_from_slice(&1u32.wrapping_sub(back).to_be_bytes());
        expected.options[6..10].copy_from_slice(&9u32.wrapping_sub(back).to_be_bytes());
        assert_eq!(connection.forward(&packet), expected);
        let packet = Segment::new(7, ACK, 3);
        let expected = Segment {
            seq: 7u32.wrapping_add(back),
            ack: THEIRS.wrapping_sub(length),
            ..packet.clone()
        };
        assert_eq!(connection.reverse(&packet), expected);
    });
}

/// The connection as it is when a cookie has just come back.
fn redeemed(connection: Connection, class: u32) -> Connection {
    connection.flow.header.store(waiting(class), Relaxed);
    connection.flow.shift[1].store(COOKIE.wrapping_add(1), Relaxed);
    connection
}

const COOKIE: u32 = 0xc001_d00d;

#[test]
fn whatever_brings_a_cookie_back_is_the_first_packet_to_the_member() {
    each_family(|connection| {
        let mut connection = redeemed(connection, 2);
        for payload in [0, 1000] {
            let mut packet = Segment::new(FIRST, ACK | PSH, payload);
            packet.ack = COOKIE.wrapping_add(1);
            let first = connection.forward(&packet);
            assert_eq!(first.flags, SYN);
            assert_eq!((first.seq, first.ack), (ISN, 0));
            assert_eq!(first.options, [2, 4, 0x05, 0x78], "1400");
            assert!(first.payload.is_empty());
        }
    });
}

#[test]
fn the_members_answer_to_a_cookie_is_acknowledged_with_the_header() {
    each_family(|connection| {
        let mut connection = redeemed(connection, 2);
        let mut answer = Segment::new(THEIRS, SYN | ACK, 0);
        (answer.ack, answer.options) = (FIRST, vec![2, 4, 5, 0xb4]);
        for round in 0..3 {
            let back = connection.reverse(&answer);
            // The first time nobody notes it: XDP had no room and left the packet to TC.
            if round > 0 {
                connection.flow.next[1].store(THEIRS.wrapping_add(1), Relaxed);
            }
            let mut expected = connection.header(&back);
            expected.ack = THEIRS.wrapping_add(1);
            expected.options = Vec::new();
            assert_eq!(back, expected, "answer {round}");
        }
        let mut other = answer.clone();
        other.seq = THEIRS.wrapping_add(1000);
        assert_eq!(
            connection.try_send(Direction::Reverse, &other),
            Err(DropReason::Unexpected),
            "the client has been told of the first"
        );
        // From then on numbers are shifted both ways.
        let length = connection.length();
        let mut greeting = Segment::new(THEIRS.wrapping_add(1), ACK | PSH, 50);
        greeting.ack = FIRST.wrapping_add(length);
        let heard = connection.reverse(&greeting);
        assert_eq!(heard.seq, COOKIE.wrapping_add(1));
        assert_eq!(heard.ack, FIRST);
        let mut hello = Segment::new(FIRST, ACK | PSH, 20);
        hello.ack = COOKIE.wrapping_add(51);
        let said = connection.forward(&hello);
        assert_eq!(said.seq, FIRST.wrapping_add(length));
        assert_eq!(said.ack, THEIRS.wrapping_add(51));
    });
}

#[test]
fn a_member_that_refuses_a_cookie_is_understood() {
    each_family(|connection| {
        let mut connection = redeemed(connection, 0);
        let mut refusal = Segment::new(0, Flags::RST | ACK, 0);
        refusal.ack = FIRST;
        let heard = connection.reverse(&refusal);
        assert_eq!(heard.flags, Flags::RST | ACK);
        assert_eq!(heard.seq, COOKIE.wrapping_add(1), "what the client expects");
        assert_eq!(heard.ack, FIRST);
        for flags in [ACK, ACK | PSH, SYN | ACK] {
            let stray = Segment::new(77, flags, 100);
            let told = connection.reverse(&stray);
            assert_eq!((told.flags, told.seq), (Flags::RST, stray.ack));
            assert!(told.options.is_empty() && told.payload.is_empty());
        }
        let nothing = Segment::new(77, 0, 0);
        assert_eq!(
            connection.try_send(Direction::Reverse, &nothing),
            Err(DropReason::Unexpected)
        );
    });
}

/// Any segment with right checksums leaves with right checksums, or is refused; nothing panics.
#[test]
fn hostile_segments_stay_sound() {
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for round in 0..100_000 {
        let mut connection = Connection::new(random() % 2 == 0);
        let word = [UNSENT, SETTLED, WAITING, 2, random() as u32][random() as usize % 5];
        connection.flow.header.store(word, Relaxed);
        connection.flow.shift[1].store(random() as u32, Relaxed);
        let mut segment = Segment::new(
            FIRST.wrapping_add([0, 1, u32::MAX, random() as u32][random() as usize % 4]),
            random() as u8 & 0x3f,
            random() as usize % 200,
        );
        segment.ack = FIRST.wrapping_add(random() as u32 % 100);
        segment.options = (0..random() % 11 * 4)
            .map(|_| [1, 2, 5, 34, 10, random() as u8][random() as usize % 6])
            .collect();
        let direction = [Direction::Forward, Direction::Reverse][round % 2];
        let _ = connection.try_send(direction, &segment);
    }
}
