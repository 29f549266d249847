//! Connections made of dice: every step is a packet that real hosts or routers could send.

use std::net::IpAddr;

use super::packet::{Ends, Leg, Packet, Segment};
use crate::mail::random::Random;

const FIN: u16 = 0x01;
const SYN: u16 = 0x02;
const RST: u16 = 0x04;
const PSH: u16 = 0x08;
const ACK: u16 = 0x10;
const URG: u16 = 0x20;
const ECE: u16 = 0x40;
const CWR: u16 = 0x80;

/// What may occur in a dialogue besides plain segments.
#[derive(Clone, Copy, Debug)]
pub struct Spice {
    pub fragments: bool,
    pub errors: bool,
    pub extensions: bool,
    /// Packets at the end of their life, for which a box answers itself.
    pub expiring: bool,
    /// Segments longer than the link behind the box takes.
    pub oversized: bool,
    /// Wrong checksums.
    pub damage: bool,
}

/// Tags of packets quoted in errors, which are never sent themselves.
pub const QUOTED: u32 = 0x8000;

/// A connection in the making: both ends' numbers, and the dice.
struct Dice<'a> {
    random: &'a mut Random,
    spice: Spice,
    v6: bool,
    /// Where routers on the client's and on the member's side are.
    routers: [IpAddr; 2],
    /// Next sequence numbers of client and member.
    seq: [u32; 2],
    steps: Vec<Packet>,
}

/// The packets of one connection, in order.
pub fn dialogue(
    random: &mut Random,
    ends: &Ends,
    routers: [IpAddr; 2],
    spice: Spice,
) -> Vec<Packet> {
    let seq = [random.next() as u32, random.next() as u32];
    let mut dice = Dice {
        random,
        spice,
        v6: ends.client.is_ipv6(),
        routers,
        seq,
        steps: Vec::new(),
    };
    dice.handshake();
    for _ in 0..5 + dice.random.below(30) {
        dice.event();
    }
    dice.end();
    dice.steps
}

impl Dice<'_> {
    fn one_in(&mut self, odds: usize) -> bool {
        self.random.below(odds) == 0
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..length.div_ceil(8))
            .flat_map(|_| self.random.next().to_ne_bytes())
            .collect();
        bytes.truncate(length);
        bytes
    }

    /// A segment as it enters the box, with everything but flags and payload diced.
    fn segment(&mut self, leg: Leg, flags: u16) -> Segment {
        let client = matches!(leg, Leg::Request | Leg::Delivery);
        let (own, other) = if client { (0, 1) } else { (1, 0) };
        let mut segment = Segment::new(leg, 0, flags);
        segment.seq = self.seq[own];
        segment.ack = if flags & ACK != 0 { self.seq[other] } else { 0 };
        segment.ttl = [2, 3, 32, 63, 64, 64, 64, 128, 255][self.random.below(9)];
        segment.tos = [0, 0, 0, 0x10, 0xb8, 0x02][self.random.below(6)];
        segment.df = !self.one_in(8);
        segment.window = self.random.next() as u16;
        if self.one_in(2) {
            segment.tcp_options = vec![1, 1, 8, 10];
            segment.tcp_options.extend(self.bytes(8));
        } else if flags & SYN == 0 && self.one_in(6) {
            segment.tcp_options = vec![1, 1, 5, 10];
            segment.tcp_options.extend(self.bytes(8));
        }
        if self.v6 && self.spice.extensions && self.one_in(8) {
            segment.extensions = self.extensions();
        }
        if !self.v6 && self.one_in(8) {
            // Router alert, no-operation, record of nothing, padding (RFC 2113, RFC 791 §3.1).
            segment.options = [
                &[0x94, 4, 0, 0][..],
                &[1, 1, 1, 0],
                &[0x94, 4, 0, 0, 1, 1, 1, 0],
                &[1; 40],
            ][self.random.below(4)]
            .to_vec();
        }
        segment
    }

    /// Hop-by-hop and destination options, each one option of some length that everybody has to skip (RFC 8200 §4.2).
    /// Of padding, Linux routers take no more than seven bytes.
    fn extensions(&mut self) -> Vec<(u8, Vec<u8>)> {
        let kinds: &[u8] = [&[60][..], &[0], &[0, 60], &[60, 60]][self.random.below(4)];
        kinds
            .iter()
            .map(|kind| {
                let more = self.random.below(3);
                let room = 6 + 8 * more;
                // Skipped when unknown, for experiments (RFC 4727 §3).
                let mut bytes = vec![more as u8, 0x1e, room as u8 - 2];
                bytes.resize(room + 1, 0);
                (*kind, bytes)
            })
            .collect()
    }

    fn handshake(&mut self) {
        let options = |dice: &mut Self| {
            let mut options = vec![2, 4, 5, 0xa0];
            if dice.one_in(2) {
                options.extend([1, 1, 4, 2]);
            }
            if dice.one_in(2) {
                options.extend([1, 3, 3, 7]);
            }
            options
        };
        let ecn = [0, 0, ECE | CWR][self.random.below(3)];
        let mut syn = self.segment(Leg::Request, SYN | ecn);
        syn.extensions = Vec::new();
        syn.tcp_options = options(self);
        self.steps.push(Packet::Whole(syn.clone()));
        if self.one_in(8) {
            self.steps.push(Packet::Whole(syn));
        }
        self.seq[0] = self.seq[0].wrapping_add(1);
        let mut answer = self.segment(Leg::Answer, SYN | ACK);
        answer.tcp_options = options(self);
        self.steps.push(Packet::Whole(answer));
        self.seq[1] = self.seq[1].wrapping_add(1);
        let ack = self.segment(Leg::Request, ACK);
        self.steps.push(Packet::Whole(ack));
    }

    fn event(&mut self) {
        let leg = [Leg::Request, Leg::Answer][self.random.below(2)];
        match self.random.below(16) {
            0 | 1 if self.spice.errors => self.error(),
            2 | 3 if self.spice.fragments => self.fragments(leg),
            4 if self.spice.expiring => {
                let mut last = self.segment(leg, ACK);
                last.ttl = 1;
                last.payload = self.data(leg);
                self.steps.push(Packet::Whole(last));
            }
            5 if self.spice.oversized && leg == Leg::Request => {
                let mut large = self.segment(leg, ACK);
                large.df = true;
                large.ttl = 64;
                let length =
                    1421 + self.random.below(80) - large.ip_header(self.v6) - large.tcp_header();
                large.payload = self.bytes(length);
                self.steps.push(Packet::Whole(large));
            }
            6 if self.spice.damage => {
                let mut wrong = self.segment(leg, ACK);
                wrong.payload = self.data(leg);
                wrong.damage = self.random.next() as u16;
                self.steps.push(Packet::Whole(wrong));
            }
            7 => {
                let again = self.steps[self.steps.len() - 1].clone();
                if matches!(&again, Packet::Whole(segment) if segment.flags & SYN == 0) {
                    self.steps.push(again);
                }
            }
            8 => {
                let mut urgent = self.segment(leg, ACK | URG | PSH);
                urgent.urgent = 1;
                urgent.payload = self.data(leg);
                self.steps.push(Packet::Whole(urgent));
            }
            9 | 10 => {
                let ack = self.segment(leg, ACK);
                self.steps.push(Packet::Whole(ack));
            }
            _ => {
                let flags = ACK | [0, PSH, ECE][self.random.below(3)];
                let mut data = self.segment(leg, flags);
                data.payload = self.data(leg);
                self.steps.push(Packet::Whole(data));
            }
        }
    }

    /// Payload of the next segment: odd lengths, all lengths, nothing that the link behind would not take.
    fn data(&mut self, leg: Leg) -> Vec<u8> {
        let length = match self.random.below(4) {
            0 => self.random.below(16) + 1,
            1 => [511, 512, 513, 1023, 1024, 1025, 1200][self.random.below(7)],
            _ => self.random.below(1200),
        };
        let own = usize::from(leg == Leg::Answer);
        self.seq[own] = self.seq[own].wrapping_add(length as u32);
        self.bytes(length)
    }

    fn fragments(&mut self, leg: Leg) {
        let mut segment = self.segment(leg, ACK | PSH);
        segment.df = false;
        segment.ttl = 64;
        segment.payload = self.data(leg);
        segment.payload.resize(segment.payload.len() + 400, 0x5a);
        let own = usize::from(leg == Leg::Answer);
        self.seq[own] = self.seq[own].wrapping_add(400);
        let size = 8 * (16 + self.random.below(100));
        let fixed = if self.v6 {
            40
        } else {
            20 + segment.options.len()
        };
        let body =
            segment.ip_header(self.v6) - fixed + segment.tcp_header() + segment.payload.len();
        let mut order: Vec<usize> = (0..body.div_ceil(size)).collect();
        // The rest may come in any order once the first has come.
        if order.len() > 2 && self.one_in(3) {
            order[1..].reverse();
        }
        self.steps.push(Packet::Fragments {
            segment,
            size,
            order,
        });
    }

    fn error(&mut self) {
        let leg = [Leg::Delivery, Leg::Reply][self.random.below(2)];
        let mut inner = self.segment(leg, ACK);
        inner.extensions = Vec::new();
        let length = 8 + self.random.below(600);
        inner.payload = self.bytes(length);
        let (kind, code, word) = if self.v6 {
            [
                (1, 0, 0),
                (1, 3, 0),
                (2, 0, 1280),
                (3, 0, 0),
                (1, 1, 0),
                (4, 1, 40),
            ][self.random.below(6)]
        } else {
            [
                (3, 1, 0),
                (3, 4, 1400),
                (3, 13, 0),
                (11, 0, 0),
                (3, 3, 0),
                (12, 0, 0),
            ][self.random.below(6)]
        };
        let header = inner.ip_header(self.v6);
        let all = header + inner.tcp_header() + inner.payload.len();
        let quoted = match self.random.below(4) {
            0 => header + 8,
            1 => header + 20,
            2 => (header + 8 + self.random.below(64)).min(all),
            _ => all,
        };
        let side = usize::from(leg == Leg::Delivery);
        let damage = match self.spice.damage && self.one_in(8) {
            true => self.random.next() as u16 % 1000 + 1,
            false => 0,
        };
        self.steps.push(Packet::Error {
            tag: 0,
            ttl: 64,
            from: self.routers[side],
            kind,
            code,
            word,
            inner,
            quoted,
            damage,
        });
    }

    fn end(&mut self) {
        if self.one_in(4) {
            let leg = [Leg::Request, Leg::Answer][self.random.below(2)];
            let reset = self.segment(leg, RST | ACK);
            self.steps.push(Packet::Whole(reset));
            return;
        }
        let first = [Leg::Request, Leg::Answer][self.random.below(2)];
        let second = match first {
            Leg::Request => Leg::Answer,
            _ => Leg::Request,
        };
        for (leg, other) in [(first, second), (second, first)] {
            let fin = self.segment(leg, FIN | ACK);
            self.steps.push(Packet::Whole(fin));
            let own = usize::from(leg == Leg::Answer);
            self.seq[own] = self.seq[own].wrapping_add(1);
            let ack = self.segment(other, ACK);
            self.steps.push(Packet::Whole(ack));
        }
    }
}

/// Gives a packet its tag, and what it quotes a tag that is never sent.
pub fn stamp(packet: &mut Packet, number: u32) {
    match packet {
        Packet::Whole(segment) | Packet::Fragments { segment, .. } => segment.tag = number,
        Packet::Error { tag, inner, .. } => {
            *tag = number;
            inner.tag = number | QUOTED;
        }
    }
}
