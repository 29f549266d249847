//! Many dialogues by dice: the seed is in the message of a failure.

use super::*;

/// xorshift64*: the same numbers for the same seed, everywhere.
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    pub(super) fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % sides
    }

    pub(super) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.roll(from.len())]
    }

    /// The bytes in random pieces.
    pub(super) fn cut<'a>(&mut self, mut bytes: &'a [u8]) -> Vec<&'a [u8]> {
        let mut pieces = Vec::new();
        while !bytes.is_empty() {
            let (piece, rest) = bytes.split_at(1 + self.roll(bytes.len().min(40)));
            pieces.push(piece);
            bytes = rest;
        }
        pieces
    }
}

const DIALOGUE: &[(&str, &str)] = &[
    ("", "220-mx1\r\n220 hello\r\n"),
    ("EHLO c.example\r\n", CAPABLE),
    (
        "mail from:<a@b> SIZE=9\r\nRCPT TO:<c@d>\r\nXCLIENT a=b\r\nDATA\r\n",
        "250 1\r\n250 2\r\n354 3\r\n",
    ),
    (
        "..\r\n.x\r\n\r\n\u{fc}\u{fc}\r\n.\r\n",
        "250-4\r\n250 4\r\n",
    ),
    (
        "MAIL FROM:<>\r\nBDAT 12\r\n\r\n.\r\nQUIT\r\n\0BDAT 2 LAST\r\n\n\r",
        "250 5\r\n250 6\r\n250 7\r\n",
    ),
    ("NOOP\nx\r\nFOO:\r\n\r\n", ""),
    ("AUTH LOGIN\r\n", "334 8\r\n"),
    ("cGFzcw==\r\n", "535 9\r\n"),
    ("RSET\r\n", "250 10\r\n"),
    ("QUIT\r\n", "221 11\r\n"),
];

#[test]
fn random_cuts_are_the_same() {
    let play = |mut cut: Box<dyn FnMut(&'static str) -> Vec<&'static [u8]>>| {
        let mut lab = Lab::silent(ClientSecurity::Implicit);
        let mut log = Vec::new();
        for (client, member) in DIALOGUE {
            cut(client).into_iter().for_each(|piece| lab.sends(piece));
            log.push(lab.reached());
            cut(member).into_iter().for_each(|piece| lab.says(piece));
            log.push(lab.heard());
        }
        (log, lab.end, lab.session.facts().clone())
    };
    let whole = play(Box::new(|text| vec![text.as_bytes()]));
    assert_eq!(whole.1, Some(End::Quit));
    for seed in 1..=2000 {
        let mut dice = Dice::new(seed);
        assert_eq!(
            play(Box::new(move |text| dice.cut(text.as_bytes()))),
            whole,
            "seed {seed}"
        );
    }
}

#[test]
fn no_dialogue_breaks_the_rules() {
    const CLIENT: &[&str] = &[
        "EHLO c\r\n",
        "HELO c\r\n",
        "MAIL FROM:<a@b>\r\n",
        "RCPT TO:<c@d>\r\n",
        "DATA\r\n",
        "x\r\n.\r\n",
        ".\r\n",
        "\r\n",
        "..\r\n",
        "a\nb\r\n",
        "a\rb",
        "\0",
        "\r",
        "\n",
        "BDAT 3\r\nabc",
        "BDAT 0 LAST\r\n",
        "BDAT 99\r\nabc",
        "BDAT x\r\n",
        "STARTTLS\r\n",
        "STARTTLS x\r\n",
        "AUTH PLAIN\r\n",
        "RSET\r\n",
        "NOOP\r\n",
        "QUIT\r\n",
        "XCLIENT a\r\n",
        "FOO\r\n",
        "\u{16}\u{3}",
        "GET / HTTP/1.1\r\n",
    ];
    const MEMBER: &[&str] = &[
        "250 ok\r\n",
        "250-a\r\n",
        "354 go\r\n",
        "334 x\r\n",
        "421 bye\r\n",
        "550 no\r\n",
        "220 hi\r\n",
        "250-mx\r\n250-PIPELINING\r\n250 CHUNKING\r\n",
        "junk\r\n",
        "25",
        "\r\n",
        "503 bad\r\n",
        "250-mx\r\n250-XCLIENT ADDR HELO\r\n250 STARTTLS\r\n",
        "220 go\r\n",
    ];
    for seed in 1..=20_000_u64 {
        let mut dice = Dice::new(seed);
        let security = *dice.pick(&[
            ClientSecurity::None,
            ClientSecurity::Implicit,
            REQUIRE,
            ALLOW,
        ]);
        let plan = Plan {
            starttls: dice.roll(3) == 0,
            xclient: (dice.roll(3) == 0).then(|| "192.0.2.7:25".parse().unwrap()),
        };
        let max_recipients = dice.roll(4) as u32;
        let mut lab = Lab::silent(Terms {
            plan,
            switches: security == ALLOW && dice.roll(2) == 0,
            max_recipients,
            ..Terms::from(security)
        });
        lab.session.member_sought(lab.now);
        let mut secured = false;
        let mut taken = 0;
        for _ in 0..60 {
            let connects = lab.connects;
            match dice.roll(20) {
                0..9 => {
                    let text = *dice.pick(CLIENT);
                    dice.cut(text.as_bytes())
                        .into_iter()
                        .for_each(|piece| lab.sends(piece));
                }
                9..18 => {
                    let text = if dice.roll(2) == 0 {
                        MEMBER[0]
                    } else {
                        *dice.pick(MEMBER)
                    };
                    taken += text.matches("250 ").count() as u32;
                    lab.says(text);
                }
                18 if dice.roll(8) == 0 => lab.session.client_closed(lab.now),
                18 if dice.roll(8) == 0 => lab.session.member_closed(lab.now),
                18 if dice.roll(8) == 0 => lab.session.drain(lab.now),
                18 => lab.wait(Duration::from_secs(dice.roll(200) as u64)),
                _ if lab.border && lab.session.open_border(lab.now) => {
                    lab.session.tls_established(lab.now);
                }
                _ => {}
            }
            lab.offer();
            if std::mem::take(&mut lab.securing) && dice.roll(4) > 0 {
                lab.session.member_secured(lab.now);
                secured = true;
            } else {
                lab.session.member_insecure();
            }
            lab.offer();
            if plan.starttls && !secured {
                for line in String::from_utf8_lossy(&lab.member).lines() {
                    let ours = line == "EHLO [10.0.0.1]" || line == "STARTTLS";
                    assert!(ours, "seed {seed}: {line:?} to a member in clear");
                }
            }
            if lab.connects > connects {
                secured = false;
                lab.session.member_sought(lab.now);
                lab.session.member_connected(OWN, lab.now);
                // What another member was told is no affair of this one's.
                lab.member.clear();
            }
            let facts = lab.session.facts();
            assert!(
                facts.messages <= taken,
                "seed {seed}: a message that nobody took"
            );
            if security == REQUIRE && !lab.session.is_tls() {
                let seen = String::from_utf8_lossy(&lab.member);
                for verb in ["MAIL", "RCPT", "DATA", "BDAT", "AUTH", "FOO", "XCLIENT a"] {
                    assert!(!seen.contains(verb), "seed {seed}: {verb} before TLS");
                }
            }
            assert!(
                max_recipients == 0 || lab.session.recipients <= max_recipients,
                "seed {seed}: too many recipients"
            );
            assert!(
                lab.backlog.len() < 4096
                    && lab.session.queue.len() <= crate::smtp::session::MAX_QUEUE + 1
            );
        }
        if let Some(end) = lab.end {
            lab.heard();
            lab.sends("NOOP\r\nMAIL FROM:<a@b>\r\n");
            lab.says("250 late\r\n");
            assert_eq!(lab.heard(), "", "seed {seed}: words after {end}");
            assert_eq!(lab.session.to_member().len(), 0);
        }
    }
}

/// What a member says that knows XCLIENT, and that accepts names as the dice fall.
fn says_to(line: &str, dice: &mut Dice) -> &'static str {
    const REFUSALS: [&str; 4] = ["501 no\r\n", "504 no\r\n", "550 no\r\n", "450 later\r\n"];
    const VERDICTS: [&str; 3] = ["501 no\r\n", "554 no\r\n", "421 no\r\n"];
    match line.get(..4) {
        Some("EHLO" | "HELO") if dice.roll(2) == 0 => REFUSALS[dice.roll(4)],
        Some("EHLO") => "250-mx\r\n250-PIPELINING\r\n250 XCLIENT ADDR HELO\r\n",
        Some("XCLI") if dice.roll(4) == 0 => VERDICTS[dice.roll(3)],
        Some("XCLI") => "220 mx\r\n",
        Some("DATA") => "503 no\r\n",
        Some("QUIT") => "221 bye\r\n",
        _ => "250 ok\r\n",
    }
}

#[test]
fn nobody_gets_by_a_member_that_offers_xclient_without_it() {
    const CLIENT: &[&str] = &[
        "EHLO c\r\n",
        "EHLO\r\n",
        "HELO c\r\n",
        "HELO\r\n",
        "MAIL FROM:<a@b>\r\n",
        "RCPT TO:<c@d>\r\n",
        "DATA\r\n",
        "VRFY a\r\n",
        "AUTH PLAIN =\r\n",
        "FOO\r\n",
        "RSET\r\n",
        "NOOP\r\n",
        "STARTTLS\r\n",
    ];
    let mut mails = 0;
    for seed in 1..=5_000_u64 {
        let mut dice = Dice::new(seed);
        let security = *dice.pick(&[ClientSecurity::None, REQUIRE, ALLOW]);
        let mut lab = Lab::silent(Terms {
            plan: Plan {
                starttls: false,
                xclient: Some("192.0.2.7:25".parse().unwrap()),
            },
            switches: security == ALLOW && dice.roll(2) == 0,
            ..Terms::from(security)
        });
        let (mut known, mut connects) = (false, lab.connects);
        lab.says("220 mx\r\n");
        for _ in 0..40 {
            // Groups are what a client would hide something in.
            let group: String = (0..=dice.roll(3)).map(|_| *dice.pick(CLIENT)).collect();
            lab.sends(group);
            loop {
                if lab.session.open_border(lab.now) {
                    lab.session.tls_established(lab.now);
                    lab.offer();
                }
                if lab.connects > connects {
                    (known, connects) = (false, lab.connects);
                    lab.member.clear();
                    lab.session.member_connected(OWN, lab.now);
                    lab.says("220 mx\r\n");
                }
                let said = lab.reached();
                if said.is_empty() {
                    break;
                }
                for line in said.lines() {
                    let verb = line.split(' ').next().unwrap_or_default();
                    let free = ["EHLO", "HELO", "RSET", "NOOP", "XCLIENT"].contains(&verb);
                    assert!(known || free, "seed {seed}: {line:?} of somebody unknown");
                    mails += usize::from(verb == "MAIL");
                    let reply = says_to(line, &mut dice);
                    known |= verb == "XCLIENT" && reply.starts_with("220");
                    lab.says(reply);
                }
            }
        }
    }
    assert!(mails > 1000, "{mails}");
}
