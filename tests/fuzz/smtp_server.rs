//! A member that says anything, to a client that does all it should.

use anyhow::Result;
use lb_userspace::{
    model::StartTls,
    smtp::{reply::ReplyParser, session::ClientSecurity},
};
use tests::{
    fuzz::{run, signature},
    mail::random::Random,
};

use crate::shell::{Member, play};

const DICTIONARY: &[&[u8]] = &[
    b"220 hi\r\n",
    b"250 ok\r\n",
    b"250-a\r\n",
    b"250-PIPELINING\r\n",
    b"250-CHUNKING\r\n",
    b"250-STARTTLS\r\n",
    b"250-AUTH PLAIN\r\n",
    b"250-SIZE 1\r\n",
    b"354 go\r\n",
    b"334 \r\n",
    b"421 bye\r\n",
    b"450 later\r\n",
    b"550 no\r\n",
    b"503 bad\r\n",
    b"221 bye\r\n",
    b"235 in\r\n",
    b"2",
    b"25",
    b"-",
    b" ",
    b"\r\n",
    b"\r",
    b"\n",
    b"\0",
    b"junk\r\n",
    b"999 x\r\n",
    b"250\r\n",
    b"|",
    b"x",
];

/// What the client says; the member's input answers one of them at each `|`.
const DIALOGUE: &[&[u8]] = &[
    b"EHLO c\r\n",
    b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n",
    b"Subject: x\r\n\r\ntext\r\n.\r\n",
    b"MAIL FROM:<a@b>\r\nBDAT 4 LAST\r\nabcd",
    b"AUTH PLAIN AGEAYg==\r\n",
    b"RSET\r\nNOOP\r\nQUIT\r\n",
];
/// Commands that are answered in all of them.
const COMMANDS: usize = 11;

#[test]
fn smtp_server() -> Result<()> {
    run("smtp_server", DICTIONARY, check)
}

/// Says what stands between two `|` whenever it hears something.
struct Scripted<'a> {
    says: Vec<&'a [u8]>,
    at: usize,
    said: Vec<u8>,
}

impl Member for Scripted<'_> {
    fn greet(&mut self) -> Vec<Vec<u8>> {
        vec![self.next()]
    }

    fn hear(&mut self, _: &[u8]) -> Vec<Vec<u8>> {
        vec![self.next()]
    }
}

impl Scripted<'_> {
    fn next(&mut self) -> Vec<u8> {
        let words = self.says.get(self.at).copied().unwrap_or_default();
        self.at += 1;
        self.said.extend_from_slice(words);
        words.to_vec()
    }
}

fn check(input: &[u8], random: &mut Random) -> u64 {
    let security = [
        ClientSecurity::None,
        ClientSecurity::Implicit,
        ClientSecurity::StartTls(StartTls::Allow),
    ][random.below(3)];
    let mut member = Scripted {
        says: input.split(|byte| *byte == b'|').collect(),
        at: 0,
        said: Vec::new(),
    };
    let outcome = play(security, DIALOGUE, &mut member, random.below(2) == 0);
    // The client hears well-formed replies, and never more than it asked for.
    let mut parser = ReplyParser::new();
    let mut replies = Vec::new();
    let mut rest: &[u8] = &outcome.to_client;
    while let Some(reply) = parser
        .push(std::mem::take(&mut rest))
        .expect("replies to the client")
    {
        replies.push(reply);
    }
    assert!(!parser.has_rest(), "half a reply");
    // The greeting, an answer to each command and to the content of each message, and a last word.
    assert!(
        replies.len() <= 1 + COMMANDS + 2 + 1,
        "{} replies",
        replies.len()
    );
    let taken = replies.iter().filter(|reply| reply.code / 100 == 2).count();
    assert!(
        outcome.facts.messages as usize <= taken,
        "a message that nobody took"
    );
    assert!(outcome.facts.messages <= 2, "more messages than there were");
    let heard = String::from_utf8_lossy(&outcome.to_client);
    assert!(!heard.contains("XCLIENT") || !member.said.is_empty());
    assert!(outcome.most < 64 * 1024, "{} bytes waited", outcome.most);
    let codes: Vec<_> = replies.iter().map(|reply| reply.code / 10).collect();
    signature((outcome.end, codes, outcome.facts.messages, outcome.aborted))
}
