//! The rules against two model TCPs over a link that loses, repeats and reorders: both streams arrive byte for byte.
//!
//! The models do what the rules lean on and no more: go-back-N, holes left out that a SACK claims to be filled, a repeat
//! after three equal acknowledgements, an answer to everything unexpected. Their SACK is believed for good, so a
//! wrongly shifted edge leaves a hole that is never filled.

use std::{collections::BTreeMap, vec, vec::Vec};

use super::{Act, SETTLED, UNSENT, WAITING, acknowledges, forward, header, instant, told};
use crate::tcp::Flags;

const SYN: u8 = Flags::SYN;
const ACK: u8 = Flags::ACK;
const FIN: u8 = Flags::FIN;
const MILLISECOND: u64 = 1_000_000;
/// Nothing takes longer, with every timer backed off.
const DEADLINE: u64 = 600_000;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 11) % bound
    }
    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

#[derive(Clone, Debug)]
struct Segment {
    seq: u32,
    ack: u32,
    flags: u8,
    payload: Vec<u8>,
    sack: Vec<(u32, u32)>,
}

/// One end. Places count from the SYN: it has place 0, the first byte place 1, the FIN the one behind the last byte.
struct End {
    isn: u32,
    peer: Option<u32>,
    out: Vec<u8>,
    /// Bytes that the application has handed over.
    offered: usize,
    closed: bool,
    una: usize,
    next: usize,
    filled: Vec<bool>,
    repeats: u32,
    timer: Option<u64>,
    backoff: u32,
    came: Vec<Option<u8>>,
    complete: usize,
    end: Option<usize>,
    mss: usize,
    /// The acknowledgement of the SYN waits for the first bytes.
    lazy: bool,
}

impl End {
    fn new(isn: u32, out: Vec<u8>, mss: usize) -> Self {
        Self {
            isn,
            peer: None,
            filled: vec![false; out.len() + 2],
            out,
            offered: 0,
            closed: false,
            una: 0,
            next: 0,
            repeats: 0,
            timer: None,
            backoff: 0,
            came: Vec::new(),
            complete: 0,
            end: None,
            mss,
            lazy: false,
        }
    }

    fn received(&self) -> Vec<u8> {
        self.came[..self.complete]
            .iter()
            .flatten()
            .copied()
            .collect()
    }

    fn done(&self) -> bool {
        self.una == self.out.len() + 2 && self.end == Some(self.complete)
    }

    fn acknowledgement(&self) -> u32 {
        let fin = usize::from(self.end == Some(self.complete));
        self.peer.map_or(0, |peer| {
            peer.wrapping_add((1 + self.complete + fin) as u32)
        })
    }

    fn segment(&self, place: usize, flags: u8, payload: &[u8]) -> Segment {
        let mut sack = Vec::new();
        if let Some(peer) = self.peer {
            let mut at = self.complete;
            while at < self.came.len() && sack.len() < 3 {
                let start = at;
                while self.came.get(at).is_some_and(Option::is_some) {
                    at += 1;
                }
                if at > start {
                    let edge = |at: usize| peer.wrapping_add(1 + at as u32);
                    sack.push((edge(start), edge(at)));
                }
                at += 1;
            }
        }
        Segment {
            seq: self.isn.wrapping_add(place as u32),
            ack: self.acknowledgement(),
            flags: flags | if self.peer.is_some() { ACK } else { 0 },
            payload: payload.to_vec(),
            sack,
        }
    }

    /// The segment at a place that was offered already; how far it goes.
    fn cut(&self, place: usize) -> (Segment, usize) {
        let mut end = (place + self.mss).min(self.offered + 1);
        if let Some(filled) = (place + 1..end).find(|at| self.filled[*at]) {
            end = filled;
        }
        if place == 0 {
            return (self.segment(0, SYN, &[]), 1);
        }
        if place > self.out.len() {
            return (self.segment(place, FIN, &[]), place + 1);
        }
        (self.segment(place, 0, &self.out[place - 1..end - 1]), end)
    }

    fn limit(&self) -> usize {
        1 + self.offered + usize::from(self.closed && self.offered == self.out.len())
    }

    /// What may go out now.
    fn pump(&mut self, now: u64, wire: &mut Vec<Segment>) {
        while self.peer.is_some() && self.next < self.limit().min(self.una + 6 * self.mss) {
            if self.filled[self.next] {
                self.next += 1;
                continue;
            }
            let (segment, next) = self.cut(self.next);
            wire.push(segment);
            self.next = next;
        }
        if self.una == self.next {
            self.timer = None;
        } else if self.timer.is_none() {
            self.timer = Some(now + (200 << self.backoff));
        }
    }

    fn time(&mut self, now: u64, wire: &mut Vec<Segment>) {
        if self.timer.is_none_or(|at| at > now) {
            return;
        }
        self.timer = None;
        self.backoff = (self.backoff + 1).min(4);
        self.next = self.una;
        // The first one goes out whatever a SACK says (RFC 2018 §8).
        if let Some(first) = self.filled.get_mut(self.una) {
            *first = false;
        }
        if self.una == 0 {
            wire.push(self.cut(0).0);
            self.next = 1;
        }
        self.pump(now, wire);
    }

    fn take(&mut self, segment: &Segment, now: u64, wire: &mut Vec<Segment>) {
        if segment.flags & SYN != 0 {
            if self.peer.is_none() {
                self.peer = Some(segment.seq);
                if self.una == 0 && segment.flags & ACK == 0 {
                    wire.push(self.cut(0).0);
                    self.next = 1;
                    self.timer = Some(now + 1000);
                    return;
                }
            } else if self.una == 0 && segment.flags & ACK == 0 {
                wire.push(self.cut(0).0);
                return;
            }
        }
        let Some(peer) = self.peer else { return };
        let answer = segment.flags & (SYN | FIN) != 0 || !segment.payload.is_empty();
        if segment.flags & ACK != 0 {
            let place = segment.ack.wrapping_sub(self.isn) as i32;
            let sent = self.next.max(self.una);
            if place > 0 && place as usize > self.una && place as usize <= self.out.len() + 2 {
                self.una = place as usize;
                self.next = sent.max(self.una);
                self.backoff = 0;
                self.repeats = 0;
                self.timer = None;
            } else if place as usize == self.una
                && segment.payload.is_empty()
                && segment.flags & SYN == 0
            {
                self.repeats += 1;
                if self.repeats == 3 && self.una > 0 && self.una < self.next {
                    wire.push(self.cut(self.una).0);
                }
            }
            for &(from, to) in &segment.sack {
                let [from, to] = [from, to].map(|edge| edge.wrapping_sub(self.isn) as i32);
                assert!(from < to, "an empty or reversed SACK block");
                for place in from.max(0)..to {
                    let filled = self.filled.get_mut(place as usize);
                    *filled.expect("a SACK block inside what was sent") = true;
                }
            }
        }
        let start = segment.seq.wrapping_sub(peer.wrapping_add(1)) as i32;
        for (at, byte) in (start..).zip(&segment.payload) {
            let Ok(at) = usize::try_from(at) else {
                continue;
            };
            if self.came.len() <= at {
                self.came.resize(at + 1, None);
            }
            assert!(
                self.came[at].is_none_or(|known| known == *byte),
                "two bytes for place {at}"
            );
            self.came[at] = Some(*byte);
        }
        if segment.flags & FIN != 0 {
            self.end = usize::try_from(start)
                .ok()
                .map(|start| start + segment.payload.len());
        }
        while self.came.get(self.complete).is_some_and(Option::is_some) {
            self.complete += 1;
        }
        let before = wire.len();
        let lazy = core::mem::take(&mut self.lazy);
        self.pump(now, wire);
        let spoke = wire.len() > before;
        if answer && !(lazy && spoke) {
            // As a rule the acknowledgement of a SYN goes out before the first bytes do.
            wire.insert(before, self.segment(self.next.max(1), 0, &[]));
        }
    }
}

/// The box: the rules, applied to segments as the packet program applies them to packets.
struct Middle {
    length: u32,
    /// A SYN cookie answers the client.
    cookie: Option<u32>,
    baked: Option<u32>,
    first: Option<u32>,
    header_word: u32,
    back: u32,
    header: Vec<u8>,
}

impl Middle {
    fn header(&mut self, seq: u32, from: &Segment, now: u64) -> Segment {
        self.header_word = instant(now * MILLISECOND);
        Segment {
            seq,
            ack: from.ack,
            flags: ACK,
            payload: self.header.clone(),
            sack: from.sack.clone(),
        }
    }

    /// From the client; what goes to the member, and what back.
    fn forward(&mut self, mut segment: Segment, now: u64) -> (Option<Segment>, Option<Segment>) {
        if let Some(cookie) = self.cookie {
            if segment.flags & SYN != 0 {
                let answer = Segment {
                    seq: cookie,
                    ack: segment.seq.wrapping_add(1),
                    flags: SYN | ACK,
                    payload: Vec::new(),
                    sack: Vec::new(),
                };
                // A real cookie carries this in its hash.
                self.baked = Some(segment.seq);
                return (None, Some(answer));
            }
            let fits = segment.ack == cookie.wrapping_add(1)
                && self.baked == Some(segment.seq.wrapping_sub(1));
            if self.first.is_none() && fits && segment.flags & ACK != 0 {
                self.first = Some(segment.seq);
                self.header_word = WAITING;
            }
            let Some(first) = self.first else {
                return (None, None);
            };
            if self.header_word == WAITING {
                let syn = Segment {
                    seq: first.wrapping_sub(1),
                    ack: 0,
                    flags: SYN,
                    payload: Vec::new(),
                    sack: Vec::new(),
                };
                return (Some(syn), None);
            }
        }
        let first = *self.first.get_or_insert(segment.seq.wrapping_add(1));
        let payload = segment.payload.len() as u32;
        segment.ack = segment.ack.wrapping_sub(self.back);
        for edge in &mut segment.sack {
            *edge = (
                edge.0.wrapping_sub(self.back),
                edge.1.wrapping_sub(self.back),
            );
        }
        let act = forward(
            self.header_word,
            first,
            segment.seq,
            Flags(segment.flags),
            payload,
            instant(now * MILLISECOND),
        );
        match act {
            Act::Keep => {}
            Act::Shift => segment.seq = segment.seq.wrapping_add(self.length),
            Act::Header => segment = self.header(first, &segment, now),
        }
        (Some(segment), None)
    }

    /// From the member; what goes to the client, and what back.
    fn backward(&mut self, mut segment: Segment, now: u64) -> (Option<Segment>, Option<Segment>) {
        let first = self.first.expect("the member answers only");
        if let (Some(cookie), SYN) = (self.cookie, segment.flags & SYN) {
            self.back = cookie.wrapping_sub(segment.seq);
            let mut answer = Segment {
                seq: first,
                ack: segment.seq.wrapping_add(1),
                flags: ACK,
                payload: Vec::new(),
                sack: Vec::new(),
            };
            if self.header_word == WAITING {
                self.header_word = if self.length == 0 { SETTLED } else { UNSENT };
            }
            if self.header_word != SETTLED {
                answer = self.header(answer.seq, &answer.clone(), now);
            }
            return (None, Some(answer));
        }
        if self.header_word != SETTLED && acknowledges(first, self.length, segment.ack) {
            self.header_word = SETTLED;
        }
        let settled = self.header_word == SETTLED;
        segment.seq = segment.seq.wrapping_add(self.back);
        segment.ack = told(settled, first, self.length, segment.ack);
        if !settled {
            segment.sack.clear();
        }
        for edge in &mut segment.sack {
            *edge = (
                edge.0.wrapping_sub(self.length),
                edge.1.wrapping_sub(self.length),
            );
        }
        (Some(segment), None)
    }
}

/// Where a segment is on its way.
#[derive(Clone, Copy)]
enum Hop {
    Coming,
    Going,
    Returning,
    Home,
}

struct Link {
    loss: u64,
    disorder: u64,
    queue: BTreeMap<(u64, u64), (Hop, Segment)>,
    number: u64,
}

impl Link {
    fn send(&mut self, random: &mut Random, now: u64, hop: Hop, segment: Segment) {
        let copies = 1 + u64::from(random.chance(self.loss / 4));
        for _ in 0..copies {
            if random.chance(self.loss) {
                continue;
            }
            let delay = match random.chance(self.disorder) {
                true => 1 + random.below(250),
                false => 1,
            };
            self.number += 1;
            self.queue
                .insert((now + delay, self.number), (hop, segment.clone()));
        }
    }
}

fn stream(random: &mut Random) -> Vec<u8> {
    let length = 1 + random.below(300);
    (0..length).map(|_| random.next() as u8).collect()
}

/// One connection. Panics when a byte is wrong or it never ends.
fn connection(seed: u64, with_cookie: bool) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    random.next();
    let length = [0, header::V4, header::V6][if with_cookie {
        random.below(3)
    } else {
        1 + random.below(2)
    } as usize];
    let client_first = with_cookie || random.chance(50);
    let half_close = random.chance(30);
    let [ours, theirs] = [stream(&mut random), stream(&mut random)];
    let mss = 8 + random.below(60) as usize;
    let mut client = End::new(random.next() as u32, ours.clone(), mss);
    let mut member = End::new(random.next() as u32, theirs.clone(), mss);
    client.lazy = random.chance(30);
    let mut link = Link {
        loss: random.below(26),
        disorder: random.below(40),
        queue: BTreeMap::new(),
        number: 0,
    };
    let mut middle = Middle {
        length,
        cookie: with_cookie.then(|| random.next() as u32),
        baked: None,
        first: None,
        header_word: if length == 0 { SETTLED } else { UNSENT },
        back: 0,
        header: (0..length as u8).map(|byte| byte ^ 0xa5).collect(),
    };
    let mut wire = vec![client.cut(0).0];
    client.next = 1;
    client.timer = Some(1000);
    let mut now = 0;
    let mut back = Vec::new();
    while !(client.done() && member.done()) {
        // The applications.
        if client_first || client.complete > 0 {
            client.offered = ours.len();
        }
        let headed = member.complete >= length as usize;
        if headed && (!client_first || member.complete > length as usize) {
            member.offered = theirs.len();
        }
        client.closed = half_close || client.complete == theirs.len();
        member.closed = member.end == Some(member.complete);
        client.pump(now, &mut wire);
        if member.una > 0 {
            member.pump(now, &mut back);
        }
        for segment in wire.drain(..) {
            link.send(&mut random, now, Hop::Coming, segment);
        }
        for segment in back.drain(..) {
            link.send(&mut random, now, Hop::Returning, segment);
        }
        let arrival = link.queue.keys().next().map(|key| key.0);
        let timers = [client.timer, member.timer];
        now = timers
            .into_iter()
            .flatten()
            .chain(arrival)
            .min()
            .expect("somebody waits for something");
        assert!(
            now < DEADLINE,
            "seed {seed} with cookie {with_cookie}: stuck at {now}, client {} {} of {} got {} end {:?}, member {} {} of {} got {} end {:?}, header {}",
            client.una,
            client.next,
            ours.len(),
            client.complete,
            client.end,
            member.una,
            member.next,
            theirs.len(),
            member.complete,
            member.end,
            middle.header_word
        );
        if arrival == Some(now)
            && let Some((_, (hop, segment))) = link.queue.pop_first()
        {
            match hop {
                Hop::Coming => {
                    let (on, answer) = middle.forward(segment, now);
                    on.into_iter()
                        .for_each(|on| link.send(&mut random, now, Hop::Going, on));
                    answer
                        .into_iter()
                        .for_each(|answer| link.send(&mut random, now, Hop::Home, answer));
                }
                Hop::Returning => {
                    let (on, answer) = middle.backward(segment, now);
                    on.into_iter()
                        .for_each(|on| link.send(&mut random, now, Hop::Home, on));
                    answer
                        .into_iter()
                        .for_each(|answer| link.send(&mut random, now, Hop::Going, answer));
                }
                Hop::Going => member.take(&segment, now, &mut back),
                Hop::Home => client.take(&segment, now, &mut wire),
            }
        }
        client.time(now, &mut wire);
        member.time(now, &mut back);
    }
    let mut expected = middle.header.clone();
    expected.extend(&ours);
    assert_eq!(
        member.received(),
        expected,
        "seed {seed}: what the member got"
    );
    assert_eq!(
        client.received(),
        theirs,
        "seed {seed}: what the client got"
    );
}

/// `SMTPLB_SEEDS` connections, or as many as take a second; `SMTPLB_SEED` is the first.
fn seeds() -> core::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let first: u64 = number("SMTPLB_SEED").unwrap_or(1);
    first..first + number("SMTPLB_SEEDS").unwrap_or(10_000)
}

#[test]
fn a_header_goes_in_whatever_the_link_does() {
    seeds().for_each(|seed| connection(seed, false));
}

#[test]
fn a_cookie_and_a_header_go_together() {
    seeds().for_each(|seed| connection(seed, true));
}
