//! What a monitor says to a member and what it expects. Pure: bytes and instants in, bytes and a verdict out.
//!
//! ```text
//! connecting ─ tcp ──────────────────────────────────────────────▶ up
//!     └─ smtp ▶ greeting ─220▶ EHLO sent ─250▶ QUIT sent ─221, end▶ up
//! any other reply, end, or silence: down
//! ```

use std::{
    io,
    time::{Duration, Instant},
};

use super::Health;
use crate::{
    model,
    smtp::reply::{Reply, ReplyParser},
};

/// Longest [`Health::reason`], characters.
pub const LONGEST_REASON: usize = 160;

/// One probe under way.
#[derive(Debug)]
pub struct Probe {
    started: Instant,
    waiting: Waiting,
    /// What to say in EHLO; nothing to say where the open connection is enough.
    helo: Option<String>,
    parser: ReplyParser,
    /// What a good end will be called.
    praise: String,
}

/// What comes next.
#[derive(Debug)]
pub enum Step {
    /// More bytes of the member are needed.
    Wait(Probe),
    /// These bytes go to the member, then more of its bytes are needed.
    Send(Probe, Vec<u8>),
    /// The probe is over; the connection can be closed.
    Done(Health),
}

/// What the probe waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    Connect,
    Greeting,
    Ehlo,
    Quit,
}

impl Probe {
    /// A probe whose connection is being opened.
    pub fn new(kind: &model::Probe, now: Instant) -> Self {
        let helo = match kind {
            model::Probe::Tcp => None,
            model::Probe::Smtp { helo } => Some(helo.clone()),
        };
        Self {
            started: now,
            waiting: Waiting::Connect,
            helo,
            parser: ReplyParser::new(),
            praise: String::new(),
        }
    }

    /// The connection is open.
    pub fn connected(mut self, now: Instant) -> Step {
        if self.helo.is_none() {
            return up(format!("connected in {} ms", self.elapsed(now)));
        }
        self.waiting = Waiting::Greeting;
        Step::Wait(self)
    }

    /// The connection did not open.
    pub fn refused(self, error: &io::Error) -> Health {
        let reason = match error.kind() {
            io::ErrorKind::ConnectionRefused => "connect refused".to_owned(),
            io::ErrorKind::TimedOut => "connect timed out".to_owned(),
            _ => format!("connect: {error}"),
        };
        health(false, &reason)
    }

    /// The member has sent something.
    pub fn received(mut self, bytes: &[u8], now: Instant) -> Step {
        match self.parser.push(bytes) {
            Ok(None) => Step::Wait(self),
            Ok(Some(reply)) => self.replied(&reply, now),
            Err(error) => down(&format!("{}: {error}", self.waiting.answer())),
        }
    }

    /// The member has closed the connection, or it broke.
    pub fn closed(self, error: Option<&io::Error>) -> Health {
        // RFC 5321 §4.1.1.10 wants the 221, but the session is over all the same.
        if self.waiting == Waiting::Quit && !self.parser.has_rest() {
            return health(true, &format!("{}, closed without 221", self.praise));
        }
        let how = error.map_or_else(|| "connection closed".to_owned(), ToString::to_string);
        health(false, &format!("{}: {how}", self.waiting.answer()))
    }

    /// The time limit has passed.
    pub fn timed_out(self, limit: Duration) -> Health {
        let awaited = match self.waiting {
            Waiting::Connect => "connection",
            Waiting::Greeting => "greeting",
            Waiting::Ehlo => "answer to EHLO",
            Waiting::Quit => "answer to QUIT",
        };
        let limit = match limit.subsec_millis() {
            0 => format!("{} s", limit.as_secs()),
            _ => format!("{} ms", limit.as_millis()),
        };
        health(false, &format!("no {awaited} within {limit}"))
    }

    fn replied(mut self, reply: &Reply, now: Instant) -> Step {
        let expected = match self.waiting {
            Waiting::Connect | Waiting::Greeting => 220,
            Waiting::Ehlo => 250,
            Waiting::Quit => 221,
        };
        if reply.code != expected {
            return down(&format!(
                "{}: {} {}",
                self.waiting.answer(),
                reply.code,
                reply.text()
            ));
        }
        if self.waiting == Waiting::Quit {
            return up(self.praise);
        }
        if self.parser.has_rest() {
            // Whoever answers before being asked does not speak SMTP with us (RFC 5321 §4.2: a reply per command).
            return down(&format!(
                "{}: followed by more than was asked for",
                self.waiting.answer()
            ));
        }
        let command = if self.waiting == Waiting::Ehlo {
            self.waiting = Waiting::Quit;
            "QUIT\r\n".to_owned()
        } else {
            self.waiting = Waiting::Ehlo;
            self.praise = format!("greeting 220 in {} ms", self.elapsed(now));
            format!("EHLO {}\r\n", self.helo.as_deref().unwrap_or_default())
        };
        Step::Send(self, command.into_bytes())
    }

    fn elapsed(&self, now: Instant) -> u128 {
        now.saturating_duration_since(self.started).as_millis()
    }
}

impl Waiting {
    /// How reasons call the answer that is awaited.
    fn answer(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Greeting => "greeting",
            Self::Ehlo => "EHLO",
            Self::Quit => "QUIT",
        }
    }
}

fn up(reason: String) -> Step {
    Step::Done(health(true, &reason))
}

fn down(reason: &str) -> Step {
    Step::Done(health(false, reason))
}

/// Members write parts of the reason: terminals and log lines must survive all of them.
fn health(up: bool, reason: &str) -> Health {
    let printable = |character: char| match character {
        ' '..='~' => character,
        _ => '?',
    };
    let reason = reason
        .trim_end()
        .chars()
        .take(LONGEST_REASON)
        .map(printable)
        .collect();
    Health { up, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn smtp() -> model::Probe {
        model::Probe::Smtp {
            helo: "lb.example.org".into(),
        }
    }

    /// Talks to a member that says these things in turn, each answered after 1 ms, then closes. Returns what was
    /// said to it, and the verdict.
    fn talk(answers: &[&[u8]]) -> (String, Health) {
        let mut now = Instant::now();
        let mut said = String::new();
        let mut step = Probe::new(&smtp(), now).connected(now);
        let mut answers = answers.iter();
        loop {
            now += Duration::from_millis(1);
            let probe = match step {
                Step::Done(health) => return (said, health),
                Step::Wait(probe) => probe,
                Step::Send(probe, bytes) => {
                    said += std::str::from_utf8(&bytes).unwrap();
                    probe
                }
            };
            step = match answers.next() {
                Some(answer) => probe.received(answer, now),
                None => Step::Done(probe.closed(None)),
            };
        }
    }

    fn good(reason: &str) -> Health {
        Health {
            up: true,
            reason: reason.into(),
        }
    }

    fn bad(reason: &str) -> Health {
        Health {
            up: false,
            reason: reason.into(),
        }
    }

    #[test]
    fn an_open_connection_is_enough_for_tcp() {
        let now = Instant::now();
        let step = Probe::new(&model::Probe::Tcp, now).connected(now + Duration::from_millis(7));
        assert!(matches!(step, Step::Done(health) if health == good("connected in 7 ms")));
    }

    #[test]
    fn greeting_ehlo_and_quit_are_awaited_one_by_one() {
        let (said, health) = talk(&[
            b"220 mx\r\n",
            b"250-mx\r\n250-SIZE 1000\r\n",
            b"250 HELP\r\n",
            b"221 bye\r\n",
        ]);
        assert_eq!(said, "EHLO lb.example.org\r\nQUIT\r\n");
        assert_eq!(health, good("greeting 220 in 1 ms"));
    }

    #[test]
    fn whatever_else_is_said_means_down() {
        let cases: [(&[&[u8]], Health); 13] = [
            (&[], bad("greeting: connection closed")),
            (&[b"220 m"], bad("greeting: connection closed")),
            (&[b"554 5.3.2 no\r\n"], bad("greeting: 554 5.3.2 no")),
            (
                &[b"421-later\r\n421 please\r\n"],
                bad("greeting: 421 later please"),
            ),
            (&[b"250 mx\r\n"], bad("greeting: 250 mx")),
            (
                &[b"220 mx\r\n", b"451 try later\r\n"],
                bad("EHLO: 451 try later"),
            ),
            (&[b"220 mx\r\n"], bad("EHLO: connection closed")),
            (
                &[b"220 mx\r\n250 mx\r\n"],
                bad("greeting: followed by more than was asked for"),
            ),
            (
                &[b"220 mx\r\n", b"250 mx\r\n", b"221 bye\r\n"],
                good("greeting 220 in 1 ms"),
            ),
            (
                &[b"220 mx\r\n", b"250 mx\r\n"],
                good("greeting 220 in 1 ms, closed without 221"),
            ),
            (
                &[b"220 mx\r\n", b"250 mx\r\n", b"22"],
                bad("QUIT: connection closed"),
            ),
            (
                &[b"220 mx\r\n", b"250 mx\r\n", b"500 what?\r\n"],
                bad("QUIT: 500 what?"),
            ),
            (
                &[b"\x16\x03\x01\x02\r\n"],
                bad("greeting: a reply line does not start with a code from 200 to 599"),
            ),
        ];
        for (answers, expected) in cases {
            assert_eq!(talk(answers).1, expected);
        }
    }

    #[test]
    fn a_dialogue_cut_anywhere_ends_the_same() {
        let parts: [&[u8]; 3] = [
            b"220-mx\r\n220 hello\r\n",
            b"250-mx\r\n250 SIZE\r\n",
            b"221 bye\r\n",
        ];
        for part in 0..parts.len() {
            for cut in 1..parts[part].len() {
                let mut answers = parts.to_vec();
                let (head, tail) = parts[part].split_at(cut);
                answers.splice(part..=part, [head, tail]);
                let (said, health) = talk(&answers);
                assert_eq!(said, "EHLO lb.example.org\r\nQUIT\r\n");
                assert!(
                    health.up && health.reason.starts_with("greeting 220 in "),
                    "{health:?}"
                );
            }
        }
    }

    #[test]
    fn reasons_stay_printable_and_short() {
        let mut banner = b"554 \x1b[31m\xff\xc3\xa4\x7f ".to_vec();
        banner.extend([b'x'; 1500]);
        banner.extend(b"\r\n");
        let reason = talk(&[&banner]).1.reason;
        assert!(reason.starts_with("greeting: 554 "), "{reason}");
        assert_eq!(reason.len(), LONGEST_REASON);
        assert!(
            reason.bytes().all(|byte| (b' '..=b'~').contains(&byte)),
            "{reason}"
        );
    }

    #[test]
    fn endless_banners_end() {
        for (chunk, reason) in [
            (
                &b"220-again\r\n"[..],
                "greeting: a reply is longer than 16384 octets",
            ),
            (
                &[b'2'; 100][..],
                "greeting: a reply line is longer than 2048 octets",
            ),
        ] {
            let chunks = vec![chunk; 5000];
            assert_eq!(talk(&chunks).1, bad(reason));
        }
    }

    #[test]
    fn noise_is_survived() {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let alphabet = b"220-5 \r\n\0\xffEHLO1";
        for _ in 0..20_000 {
            let mut noise = Vec::new();
            for _ in 0..24 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                noise.push(alphabet[(state >> 33) as usize % alphabet.len()]);
            }
            let (_, health) = talk(&[&noise, b"220 mx\r\n", b"250 mx\r\n"]);
            assert!(!health.reason.is_empty() && health.reason.len() <= LONGEST_REASON);
        }
    }

    #[test]
    fn silence_says_what_was_awaited() {
        let now = Instant::now();
        let probe = || Probe::new(&smtp(), now);
        assert_eq!(
            probe().timed_out(Duration::from_millis(1500)),
            bad("no connection within 1500 ms")
        );
        let wait = |step: Step| match step {
            Step::Wait(probe) | Step::Send(probe, _) => probe,
            Step::Done(health) => panic!("{health:?}"),
        };
        let limit = Duration::from_secs(91);
        let greeting = wait(probe().connected(now));
        assert_eq!(greeting.timed_out(limit), bad("no greeting within 91 s"));
        let ehlo = wait(wait(probe().connected(now)).received(b"220 mx\r\n", now));
        assert_eq!(ehlo.timed_out(limit), bad("no answer to EHLO within 91 s"));
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        assert_eq!(probe().refused(&refused), bad("connect refused"));
        let route = io::Error::from(io::ErrorKind::HostUnreachable);
        assert_eq!(probe().refused(&route), bad("connect: host unreachable"));
    }
}
