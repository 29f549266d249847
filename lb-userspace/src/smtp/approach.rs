//! From a member's greeting to a member that takes the client's commands.
//!
//! ```text
//! Greeting ──220──┬───────────────────────────────────────────────────────────────────────▶ Ready
//!                 └─▶ Hello ──250, STARTTLS──▶ StartTls ──220──▶ Tls ──secured────────────▶ Ready
//! Ready ──the client's EHLO──▶ Probe ──250, XCLIENT──▶ Introduction ──220──▶ Ready, and the EHLO once more
//!                                ├──250, no XCLIENT──▶ Ready, and the EHLO is answered
//!                                ├──refused──▶ Ready, the EHLO is answered, and the next one is a probe again
//!                                └──500, 502 where the client said HELO──▶ Helo ──▶ Ready, and the HELO is answered
//! Ready ──the client stays in plaintext──▶ Replay ──250──▶ Ready
//! ```
//!
//! No command of the client's but its EHLO is sent before [`Next::Ready`]; whatever goes wrong until then, another member
//! may be tried.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use super::{capability::Capabilities, command::Verb, reply::Reply};

/// What a member has to go through.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Plan {
    /// STARTTLS (RFC 3207), or no service.
    pub starttls: bool,
    /// The client that XCLIENT tells of, where the member offers it.
    pub xclient: Option<SocketAddr>,
}

/// One member on its way.
#[derive(Debug)]
pub struct Approach {
    starttls: bool,
    step: Step,
    /// The client that the member does not know yet.
    client: Option<SocketAddr>,
    /// The box's own address towards the member: the only name that is true whoever asks.
    own: IpAddr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Greeting,
    Hello,
    StartTls,
    Tls,
    Probe,
    Helo,
    Introduction,
    Replay,
    Ready,
}

/// What follows a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Another reply is awaited.
    Reply,
    /// A TLS handshake; [`Approach::secured`] goes on from there.
    Secure,
    /// Commands.
    Ready,
    /// Commands, and the reply answers the client's EHLO or HELO.
    Answered,
    /// The member does not serve.
    Fault(Fault),
}

/// Why a member does not serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It greeted with something else than 220.
    Greeting,
    /// It sent more than was asked for: behind a 220 to STARTTLS that is what an attacker would do.
    Unasked,
    /// It does not know EHLO.
    Hello,
    /// It does not offer STARTTLS.
    NoStartTls,
    /// It offers STARTTLS and refuses it.
    StartTls,
    /// It offers XCLIENT and refuses it.
    Xclient,
    /// It heard by XCLIENT who the client is, and greets it with something else than 220.
    Client,
}

impl Fault {
    /// Behind XCLIENT comes a greeting, as this client would have had it, unless the command itself is refused: by what
    /// RFC 5321 §4.2.2 says of commands, or since this box is not allowed to (550).
    const fn of_introduction(code: u16) -> Self {
        match code {
            ..400 | 500..=504 | 550 => Self::Xclient,
            _ => Self::Client,
        }
    }

    /// Is it the member's word on the client, and nothing that the operator could mend?
    pub const fn is_refusal(self) -> bool {
        matches!(self, Self::Greeting | Self::Client)
    }
}

/// The attributes that a member lists behind XCLIENT, as far as we know them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    name: bool,
    address: bool,
    port: bool,
    helo: bool,
    protocol: bool,
}

impl Approach {
    /// A member that was just connected.
    pub fn new(plan: Plan, own: IpAddr) -> Self {
        Self {
            starttls: plan.starttls,
            step: Step::Greeting,
            client: plan.xclient,
            own,
        }
    }

    /// Takes the member's next reply; `rest` says that more bytes came with it. Appends what is to be said.
    ///
    /// `hello`: how the client introduces itself, while that is held.
    pub fn take(
        &mut self,
        reply: &Reply,
        rest: bool,
        hello: Option<(Verb, &[u8])>,
        out: &mut Vec<u8>,
    ) -> Next {
        if rest {
            return Next::Fault(Fault::Unasked);
        }
        match (self.step, reply.code) {
            (Step::Greeting, 220) if self.starttls => {
                self.say_hello(out);
                Next::Reply
            }
            (Step::Hello, 250) if !Capabilities::of(reply).starttls => {
                Next::Fault(Fault::NoStartTls)
            }
            (Step::Hello, 250) => {
                out.extend_from_slice(b"STARTTLS\r\n");
                self.step = Step::StartTls;
                Next::Reply
            }
            (Step::StartTls, 220) => {
                self.step = Step::Tls;
                Next::Secure
            }
            (Step::Probe, code) if code != 421 => self.take_probe(reply, hello, out),
            (Step::Helo, code) if code != 421 => self.take_helo(reply),
            (Step::Greeting | Step::Introduction, 220) => self.ready(),
            (Step::Replay, 250) => self.answered(),
            (step, _) => Next::Fault(match step {
                Step::Greeting => Fault::Greeting,
                Step::Hello | Step::Probe | Step::Helo | Step::Replay => Fault::Hello,
                Step::StartTls => Fault::StartTls,
                Step::Introduction => Fault::of_introduction(reply.code),
                Step::Tls | Step::Ready => Fault::Unasked,
            }),
        }
    }

    /// The handshake is done: what was learned in clear is forgotten (RFC 3207 §4.2).
    pub fn secured(&mut self) -> Next {
        self.ready()
    }

    /// Is the handshake due?
    pub fn is_securing(&self) -> bool {
        self.step == Step::Tls
    }

    /// Shall the member be told of the client before it serves?
    pub fn has_more(&self) -> bool {
        self.client.is_some()
    }

    /// Says the client's EHLO, or for its HELO an EHLO of the same name: the reply tells whether there is XCLIENT.
    pub fn probe(&mut self, name: &[u8], out: &mut Vec<u8>) {
        self.step = Step::Probe;
        say(b"EHLO ", name, out);
    }

    /// Says again what the client said to another member.
    pub fn replay(&mut self, hello: &[u8], out: &mut Vec<u8>) {
        self.step = Step::Replay;
        say(b"", hello, out);
    }

    /// The client is forgotten with an EHLO that the member accepts, and no other: who could have it refused and go on
    /// would be taken for this box.
    fn take_probe(
        &mut self,
        reply: &Reply,
        hello: Option<(Verb, &[u8])>,
        out: &mut Vec<u8>,
    ) -> Next {
        let offered = Capabilities::of(reply).xclient;
        match (reply.code, hello) {
            (250, Some(hello)) => {
                if let (Some(client), Some(attributes)) =
                    (self.client.take(), offered.filter(|it| it.address))
                {
                    attributes.write(client, hello, out);
                    self.step = Step::Introduction;
                    return Next::Reply;
                }
            }
            // RFC 5321 §4.2.4: it is the command that it does not know; any other code is about this name or this time.
            (500 | 502, Some((Verb::Helo, name))) => {
                say(b"HELO ", name, out);
                self.step = Step::Helo;
                return Next::Reply;
            }
            _ => {}
        }
        self.answered()
    }

    /// A member without EHLO has no XCLIENT to offer.
    fn take_helo(&mut self, reply: &Reply) -> Next {
        self.client.take_if(|_| reply.is_positive());
        self.answered()
    }

    fn say_hello(&mut self, out: &mut Vec<u8>) {
        // RFC 5321 §4.1.3.
        let hello = match self.own.to_canonical() {
            IpAddr::V4(own) => format!("EHLO [{own}]\r\n"),
            IpAddr::V6(own) => format!("EHLO [IPv6:{own}]\r\n"),
        };
        out.extend_from_slice(hello.as_bytes());
        self.step = Step::Hello;
    }

    fn ready(&mut self) -> Next {
        self.step = Step::Ready;
        Next::Ready
    }

    fn answered(&mut self) -> Next {
        self.step = Step::Ready;
        Next::Answered
    }
}

fn say(verb: &[u8], name: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(verb);
    out.extend_from_slice(name);
    out.extend_from_slice(b"\r\n");
}

impl Attributes {
    /// From what follows the keyword.
    pub fn of(list: &[u8]) -> Self {
        let mut found = Self::default();
        for word in list.split(u8::is_ascii_whitespace) {
            match word.to_ascii_uppercase().as_slice() {
                b"NAME" => found.name = true,
                b"ADDR" => found.address = true,
                b"PORT" => found.port = true,
                b"HELO" => found.helo = true,
                b"PROTO" => found.protocol = true,
                _ => {}
            }
        }
        found
    }

    /// Appends the command, with what the member lists and nothing else.
    fn write(self, client: SocketAddr, hello: (Verb, &[u8]), out: &mut Vec<u8>) {
        let (verb, name) = hello;
        out.extend_from_slice(b"XCLIENT");
        if self.name {
            // Else the member keeps the name it found for this box.
            out.extend_from_slice(b" NAME=[UNAVAILABLE]");
        }
        let address = match client.ip().to_canonical() {
            IpAddr::V4(address) => format!(" ADDR={address}"),
            IpAddr::V6(address) => format!(" ADDR=IPV6:{address}"),
        };
        out.extend_from_slice(address.as_bytes());
        if self.port {
            out.extend_from_slice(format!(" PORT={}", client.port()).as_bytes());
        }
        if self.helo && !name.is_empty() {
            out.extend_from_slice(b" HELO=");
            write_xtext(&name[..name.len().min(MAX_NAME)], out);
        }
        if self.protocol {
            let protocol: &[u8] = match verb {
                Verb::Ehlo => b" PROTO=ESMTP",
                _ => b" PROTO=SMTP",
            };
            out.extend_from_slice(protocol);
        }
        out.extend_from_slice(b"\r\n");
    }
}

/// RFC 1035 §2.3.4 bounds names; an address literal or a lie needs no more. As xtext, a command stays within its bound.
const MAX_NAME: usize = 255;

/// RFC 3461 §4: nothing of it can end the value or the command.
fn write_xtext(text: &[u8], out: &mut Vec<u8>) {
    for &byte in text {
        if byte.is_ascii_graphic() && !matches!(byte, b'+' | b'=') {
            out.push(byte);
        } else {
            out.extend_from_slice(format!("+{byte:02X}").as_bytes());
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Greeting => "it does not greet with 220",
            Self::Unasked => "it sends more than it was asked for",
            Self::Hello => "it refuses EHLO",
            Self::NoStartTls => "it does not offer STARTTLS",
            Self::StartTls => "it refuses STARTTLS",
            Self::Xclient => "it refuses XCLIENT",
            Self::Client => "it does not greet the client with 220",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::reply::ReplyParser;
    use super::*;

    const CLIENT: &str = "192.0.2.7:4711";
    const HELLO: (Verb, &[u8]) = (Verb::Ehlo, b"c.example");

    /// Feeds replies; returns what was said and what follows the last of them.
    fn play(approach: &mut Approach, replies: &[&str]) -> (String, Next) {
        let (mut out, mut next) = (Vec::new(), Next::Reply);
        for reply in replies {
            let mut parser = ReplyParser::new();
            let whole = parser.push(reply.as_bytes()).unwrap().unwrap();
            next = approach.take(&whole, parser.has_rest(), Some(HELLO), &mut out);
        }
        (String::from_utf8(out).unwrap(), next)
    }

    fn approach(starttls: bool, xclient: bool) -> Approach {
        let plan = Plan {
            starttls,
            xclient: xclient.then(|| CLIENT.parse().unwrap()),
        };
        Approach::new(plan, "10.0.0.1".parse().unwrap())
    }

    fn introduced(list: &str, client: &str, hello: (Verb, &[u8])) -> String {
        let mut out = Vec::new();
        Attributes::of(list.as_bytes()).write(client.parse().unwrap(), hello, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_plain_member_is_ready_with_its_greeting() {
        let mut member = approach(false, false);
        let said = play(&mut member, &["220 hi\r\n"]);
        assert_eq!(said, (String::new(), Next::Ready));
        assert!(!member.has_more());
    }

    #[test]
    fn starttls_then_xclient() {
        let mut member = approach(true, true);
        let clear = "250-mx\r\n250-XCLIENT NAME\r\n250 StartTLS\r\n";
        let (said, next) = play(&mut member, &["220 hi\r\n", clear, "220 go\r\n"]);
        assert_eq!(said, "EHLO [10.0.0.1]\r\nSTARTTLS\r\n");
        assert_eq!(next, Next::Secure);
        assert!(member.is_securing());
        assert_eq!(member.secured(), Next::Ready);
        assert!(member.has_more());
        let mut out = Vec::new();
        member.probe(HELLO.1, &mut out);
        assert_eq!(out, b"EHLO c.example\r\n");
        let (said, next) = play(
            &mut member,
            &["250-mx\r\n250-XCLIENT ADDR PORT\r\n250 OK\r\n"],
        );
        assert_eq!(said, "XCLIENT ADDR=192.0.2.7 PORT=4711\r\n");
        assert_eq!(next, Next::Reply);
        assert_eq!(play(&mut member, &["220 hi\r\n"]).1, Next::Ready);
        assert!(!member.has_more(), "once");
    }

    #[test]
    fn whatever_is_not_as_it_should_is_a_fault() {
        const OFFER: &str = "250-mx\r\n250 STARTTLS\r\n";
        for (replies, fault) in [
            (&["421 busy\r\n"][..], Fault::Greeting),
            (&["220 hi\r\n250 STARTTLS\r\n"], Fault::Unasked),
            (&["220 hi\r\n", "502 what\r\n"], Fault::Hello),
            (&["220 hi\r\n", "250-mx\r\n250 SIZE\r\n"], Fault::NoStartTls),
            (&["220 hi\r\n", OFFER, "454 no\r\n"], Fault::StartTls),
            (
                &["220 hi\r\n", OFFER, "220 go\r\n250 evil\r\n"],
                Fault::Unasked,
            ),
            (&["220 hi\r\n", OFFER, "220 go\r\n2"], Fault::Unasked),
        ] {
            let (_, next) = play(&mut approach(true, false), replies);
            assert_eq!(next, Next::Fault(fault), "{replies:?}");
        }
    }

    #[test]
    fn behind_xclient_the_client_is_greeted_or_not() {
        for (replies, fault) in [
            (
                &["250 ok\r\n", "500 no\r\n", "501 no\r\n", "502 no\r\n"][..],
                Fault::Xclient,
            ),
            (
                &["503 no\r\n", "504 no\r\n", "550 no\r\n", "354 no\r\n"],
                Fault::Xclient,
            ),
            (
                &["421 no\r\n", "450 no\r\n", "521 no\r\n", "554 no\r\n"],
                Fault::Client,
            ),
        ] {
            for reply in replies {
                let mut member = approach(false, true);
                play(&mut member, &["220 hi\r\n"]);
                member.probe(b"c", &mut Vec::new());
                play(&mut member, &["250-mx\r\n250 XCLIENT ADDR\r\n"]);
                assert_eq!(
                    play(&mut member, &[reply]).1,
                    Next::Fault(fault),
                    "{reply:?}"
                );
            }
        }
    }

    #[test]
    fn xclient_says_what_is_listed_and_nothing_breaks_out() {
        let hello = (Verb::Ehlo, &b"a b=c+d\xc3\xa9"[..]);
        assert_eq!(
            introduced("NAME ADDR PORT PROTO HELO LOGIN DESTADDR", CLIENT, hello),
            "XCLIENT NAME=[UNAVAILABLE] ADDR=192.0.2.7 PORT=4711 HELO=a+20b+3Dc+2Bd+C3+A9 PROTO=ESMTP\r\n"
        );
        assert_eq!(
            introduced("addr proto", "[2001:db8::7]:25", (Verb::Helo, b"c")),
            "XCLIENT ADDR=IPV6:2001:db8::7 PROTO=SMTP\r\n"
        );
        let long = introduced("ADDR HELO", CLIENT, (Verb::Ehlo, &[b' '; 2000]));
        assert!(long.len() < 1024, "{}", long.len());
    }

    #[test]
    fn a_member_that_goes_away_at_the_probe_is_no_answer() {
        for hello in [Verb::Ehlo, Verb::Helo] {
            let mut member = approach(false, true);
            play(&mut member, &["220 hi\r\n"]);
            member.probe(b"c", &mut Vec::new());
            let mut parser = ReplyParser::new();
            let reply = parser.push(b"421 bye\r\n").unwrap().unwrap();
            let next = member.take(&reply, false, Some((hello, b"c")), &mut Vec::new());
            assert_eq!(next, Next::Fault(Fault::Hello));
        }
    }

    #[test]
    fn without_xclient_the_probe_is_the_answer() {
        for (reply, told) in [
            ("250-mx\r\n250 SIZE\r\n", true),
            ("250 mx\r\n", true),
            ("250-mx\r\n250 XCLIENT NAME\r\n", true),
            ("501 no\r\n", false),
            ("502 no\r\n", false),
            ("450-later\r\n450 XCLIENT ADDR\r\n", false),
        ] {
            let mut member = approach(false, true);
            assert_eq!(play(&mut member, &["220 hi\r\n"]).1, Next::Ready);
            member.probe(b"c", &mut Vec::new());
            assert_eq!(play(&mut member, &[reply]), (String::new(), Next::Answered));
            assert_eq!(member.has_more(), !told, "{reply:?}");
        }
    }

    #[test]
    fn a_helo_goes_as_it_is_where_ehlo_is_unknown_and_is_the_last_word_when_accepted() {
        for (probe, helo, has_more) in [
            ("500 what\r\n", Some("250 mx\r\n"), false),
            (
                "502 what\r\n",
                Some("250-mx\r\n250 XCLIENT ADDR\r\n"),
                false,
            ),
            ("500 what\r\n", Some("501 no\r\n"), true),
            ("502 what\r\n", Some("450 later\r\n"), true),
            ("501 no\r\n", None, true),
            ("504 no\r\n", None, true),
            ("550 no\r\n", None, true),
            ("450 later\r\n", None, true),
        ] {
            let (mut member, mut out) = (approach(false, true), Vec::new());
            play(&mut member, &["220 hi\r\n"]);
            member.probe(b"c", &mut Vec::new());
            let mut next = Next::Reply;
            for reply in std::iter::once(probe).chain(helo) {
                assert_eq!(next, Next::Reply, "{probe:?}");
                let mut parser = ReplyParser::new();
                let reply = parser.push(reply.as_bytes()).unwrap().unwrap();
                next = member.take(&reply, false, Some((Verb::Helo, b"c")), &mut out);
            }
            let said = helo.map_or("", |_| "HELO c\r\n");
            assert_eq!(String::from_utf8_lossy(&out), said, "{probe:?}");
            assert_eq!(
                (next, member.has_more()),
                (Next::Answered, has_more),
                "{probe:?}"
            );
        }
    }
}
