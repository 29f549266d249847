//! A client that says anything, to a member that does as it is told.

use anyhow::Result;
use lb_userspace::{
    model::{LineEndings, StartTls},
    smtp::{
        end::End,
        session::{ClientSecurity, Facts, Terms},
    },
};
use tests::{
    fuzz::{cut, run, signature},
    mail::random::Random,
};

use crate::shell::{Member, Outcome, play};

const DICTIONARY: &[&[u8]] = &[
    b"EHLO c\r\n",
    b"HELO c\r\n",
    b"MAIL FROM:<a@b>\r\n",
    b"RCPT TO:<c@d>\r\n",
    b"DATA\r\n",
    b".\r\n",
    b"\r\n.\r\n",
    b"\r\n",
    b"\r",
    b"\n",
    b"\0",
    b"..\r\n",
    b"\n.\n",
    b"\r.\r",
    b"\r\n.\n",
    b"\n.",
    b"\r\r\n",
    b"MAIL FROM:<a@b>\r\nDATA\r\n",
    b"BDAT 3\r\nabc",
    b"BDAT 0 LAST\r\n",
    b"BDAT 2147483648\r\n",
    b"STARTTLS\r\n",
    b"AUTH PLAIN AGEAYg==\r\n",
    b"AUTH LOGIN\r\n",
    b"=\r\n",
    b"RSET\r\n",
    b"NOOP\r\n",
    b"QUIT\r\n",
    b"VRFY x\r\n",
    b"XCLIENT ADDR=1\r\n",
    b"REQUIRETLS",
    b" SMTPUTF8",
    b"\x16\x03\x01",
    b"GET / HTTP/1.1\r\n",
    b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1\r\n",
    b"REFUSED",
    b"x",
    b"Subject: x\r\n",
];

#[test]
fn smtp_client() -> Result<()> {
    run("smtp_client", DICTIONARY, check)
}

fn check(input: &[u8], random: &mut Random) -> u64 {
    let security = [
        ClientSecurity::None,
        ClientSecurity::Implicit,
        ClientSecurity::StartTls(StartTls::Require),
        ClientSecurity::StartTls(StartTls::Allow),
    ][random.below(4)];
    let terms = Terms {
        line_endings: [LineEndings::Strict, LineEndings::Normalize][random.below(2)],
        ..Terms::from(security)
    };
    let (whole, member) = once(terms, &[input]);
    judge(security, &whole, &member);
    let pieces = cut(input, random);
    let (pieced, other) = once(terms, &pieces);
    judge(security, &pieced, &other);
    // Where a cut falls behind STARTTLS decides whether its reply is still said: there the streams may differ.
    if !matches!(security, ClientSecurity::StartTls(_)) {
        let lengths: Vec<_> = pieces.iter().map(|piece| piece.len()).collect();
        compare(&whole, &pieced).unwrap_or_else(|what| {
            panic!("{what} differs in pieces of {lengths:?}: {pieced:?} in place of {whole:?}")
        });
    }
    let codes: Vec<_> = replies(&whole.to_client).collect();
    signature((
        whole.end,
        codes.len().min(40),
        &codes[codes.len().saturating_sub(6)..],
        (member.messages, whole.facts.normalized),
    ))
}

/// What two outcomes of one input do not share.
fn compare(whole: &Outcome, pieced: &Outcome) -> Result<(), &'static str> {
    let equal = |same: bool, what| if same { Ok(()) } else { Err(what) };
    let begins = |one: &[u8], other: &[u8]| one.starts_with(other) || other.starts_with(one);
    let spent = |outcome: &Outcome| outcome.end == Some(End::TooManyErrors);
    if spent(whole) || spent(pieced) {
        // Commands on their way are charged before a message that is taken gives that back: who waits may say more.
        equal(
            begins(&whole.to_member, &pieced.to_member),
            "what reached the member",
        )?;
        let (one, other) = (before_goodbye(whole), before_goodbye(pieced));
        return equal(begins(one, other), "what the client heard");
    }
    equal(whole.end == pieced.end, "the end")?;
    equal(whole.aborted == pieced.aborted, "what the member saw of it")?;
    // Of a message that is broken off, more or less may have gone before.
    let (one, other) = (&whole.to_member, &pieced.to_member);
    equal(
        one == other || whole.aborted && begins(one, other),
        "what reached the member",
    )?;
    let (one, other) = (&whole.to_client, &pieced.to_client);
    if whole.end == Some(End::ClientHelloInClear) {
        // It closes at once, whatever else was due.
        return equal(begins(one, other), "what the client heard");
    }
    equal(one == other, "what the client heard")?;
    // Where the session was then depends on what the member had answered.
    let facts = |outcome: &Outcome| Facts {
        ended_in: None,
        ..outcome.facts.clone()
    };
    equal(facts(whole) == facts(pieced), "what is logged")
}

/// What the client heard but for the last line.
fn before_goodbye(outcome: &Outcome) -> &[u8] {
    let words = outcome.to_client.strip_suffix(b"\r\n").unwrap_or_default();
    let end = words
        .iter()
        .rposition(|byte| *byte == b'\n')
        .map_or(0, |at| at + 1);
    &outcome.to_client[..end]
}

fn once(terms: Terms, pieces: &[&[u8]]) -> (Outcome, Obedient) {
    let mut member = Obedient::default();
    let outcome = play(terms, pieces, &mut member, true);
    (outcome, member)
}

fn replies(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let lines = bytes.split_inclusive(|byte| *byte == b'\n');
    lines
        .filter(|line| line.get(3) == Some(&b' '))
        .map(|line| &line[..3])
}

/// What holds whatever a client says.
fn judge(security: ClientSecurity, outcome: &Outcome, member: &Obedient) {
    assert_eq!(
        member.fault,
        None,
        "reached the member: {:?}",
        String::from_utf8_lossy(&outcome.to_member)
    );
    assert_eq!(outcome.facts.messages, member.messages, "messages counted");
    assert!(
        outcome.facts.normalized <= outcome.facts.messages,
        "mended messages"
    );
    assert!(outcome.most < 64 * 1024, "{} bytes waited", outcome.most);
    for line in outcome.to_client.split_inclusive(|byte| *byte == b'\n') {
        let code = line
            .first_chunk::<3>()
            .filter(|code| code.iter().all(u8::is_ascii_digit));
        assert!(
            code.is_some() && line.ends_with(b"\r\n"),
            "{line:?} is no reply"
        );
    }
    let before_tls =
        security == ClientSecurity::StartTls(StartTls::Require) && !outcome.facts.starttls_used;
    if before_tls {
        for verb in [
            &b"MAIL"[..],
            b"RCPT",
            b"DATA",
            b"BDAT",
            b"AUTH",
            b"VRFY",
            b"X",
        ] {
            assert!(
                !member.verbs.iter().any(|said| said == verb),
                "{verb:?} before TLS"
            );
        }
    }
    for verb in [&b"XCLIENT"[..], b"STARTTLS", b"PROXY", b"GET"] {
        assert!(
            !member.verbs.iter().any(|said| said == verb),
            "{verb:?} reached the member"
        );
    }
}

/// A member that takes everything but what says REFUSED, and that is strict about lines.
#[derive(Default)]
struct Obedient {
    state: State,
    line: Vec<u8>,
    verbs: Vec<Vec<u8>>,
    messages: u32,
    mail: bool,
    fault: Option<&'static str>,
}

#[derive(Default)]
enum State {
    #[default]
    Command,
    Content,
    Chunk(u64, bool),
    Exchange,
}

impl Member for Obedient {
    fn greet(&mut self) -> Vec<Vec<u8>> {
        vec![b"220 obedient\r\n".to_vec()]
    }

    fn hear(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut answer = Vec::new();
        for &byte in bytes {
            if let State::Chunk(left, last) = &mut self.state {
                *left -= 1;
                if *left == 0 {
                    let last = *last;
                    self.chunk_done(last, &mut answer);
                }
                continue;
            }
            self.line.push(byte);
            if byte == 0 {
                self.fault = Some("NUL");
            }
            let [.., before, last] = self.line[..] else {
                if byte == b'\n' {
                    self.fault = Some("a bare LF");
                }
                continue;
            };
            if (before == b'\r') != (last == b'\n') {
                self.fault = Some("a bare control");
            }
            if last == b'\n' {
                let line = std::mem::take(&mut self.line);
                self.take(&line, &mut answer);
            }
        }
        vec![answer]
    }
}

impl Obedient {
    fn take(&mut self, line: &[u8], answer: &mut Vec<u8>) {
        match self.state {
            State::Content if line == b".\r\n" => {
                self.state = State::Command;
                self.messages += 1;
                self.mail = false;
                answer.extend_from_slice(b"250 taken\r\n");
            }
            State::Content | State::Chunk(..) => {}
            State::Exchange => {
                self.state = State::Command;
                answer.extend_from_slice(b"235 in\r\n");
            }
            State::Command => self.command(line, answer),
        }
    }

    fn command(&mut self, line: &[u8], answer: &mut Vec<u8>) {
        let line = line.trim_ascii_end();
        if line.len() > 12 * 1024 {
            self.fault = Some("a line beyond every bound");
        }
        let mut words = line.split(|byte| *byte == b' ');
        let verb = words.next().unwrap_or_default().to_ascii_uppercase();
        let refused = line.windows(7).any(|window| window == b"REFUSED");
        let reply: &[u8] = match verb.as_slice() {
            b"EHLO" => b"250-obedient\r\n250-PIPELINING\r\n250-CHUNKING\r\n250-STARTTLS\r\n250-AUTH PLAIN LOGIN\r\n250 XCLIENT\r\n",
            _ if refused => b"550 refused\r\n",
            b"MAIL" => {
                self.mail = true;
                b"250 ok\r\n"
            }
            b"RSET" => {
                self.mail = false;
                b"250 ok\r\n"
            }
            b"DATA" if self.mail => {
                self.state = State::Content;
                b"354 go\r\n"
            }
            b"DATA" => b"503 no\r\n",
            b"BDAT" => {
                let size = words.next().and_then(|word| std::str::from_utf8(word).ok()?.parse().ok());
                let last = words.next().is_some_and(|word| word.eq_ignore_ascii_case(b"LAST"));
                match size {
                    None => self.fault = Some("a BDAT without a size"),
                    Some(0) => self.chunk_done(last, answer),
                    Some(size) => self.state = State::Chunk(size, last),
                }
                b""
            }
            b"AUTH" if words.count() < 2 => {
                self.state = State::Exchange;
                b"334 \r\n"
            }
            b"QUIT" => b"221 bye\r\n",
            _ => b"250 ok\r\n",
        };
        answer.extend_from_slice(reply);
        self.verbs.push(verb);
    }

    fn chunk_done(&mut self, last: bool, answer: &mut Vec<u8>) {
        self.state = State::Command;
        if last {
            self.messages += 1;
            self.mail = false;
        }
        answer.extend_from_slice(b"250 octets\r\n");
    }
}
