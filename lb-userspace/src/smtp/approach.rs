//! From a member's greeting to a member that takes the client's commands.
//!
//! ```text
//! Greeting ──220──┬────────────────────────────────────────────────────────────▶ Ready
//!                 └─▶ Hello ──250──┬─▶ StartTls ──220──▶ Tls ──secured──┬──────▶ Ready
//!                          ▲       │                                    │
//!                          │       └───────── no STARTTLS wanted ──────────────▶ Ready
//!                          └─────────────────── XCLIENT wanted ─────────┘
//! Ready ──the client's first command, XCLIENT listed──▶ Introduction ──220──▶ Ready
//! Ready ──the client stays in plaintext──▶ Replay ──250──▶ Ready
//! ```
//!
//! Nothing of the client's is sent before [`Next::Ready`]; whatever goes wrong until then, another member may be tried.

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
    plan: Plan,
    step: Step,
    tls: bool,
    /// The box's own address towards the member: the only name that is true whoever asks.
    own: IpAddr,
    /// What XCLIENT may say; nothing once it was said.
    attributes: Option<Attributes>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Greeting,
    Hello,
    StartTls,
    Tls,
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
            plan,
            step: Step::Greeting,
            tls: false,
            own,
            attributes: None,
        }
    }

    /// Takes the member's next reply; `rest` says that more bytes came with it. Appends what is to be said.
    pub fn take(&mut self, reply: &Reply, rest: bool, out: &mut Vec<u8>) -> Next {
        if rest {
            return Next::Fault(Fault::Unasked);
        }
        match (self.step, reply.code) {
            (Step::Greeting, 220) => match self.plan.starttls || self.plan.xclient.is_some() {
                true => self.say_hello(out),
                false => self.ready(),
            },
            (Step::Hello, 250) => self.take_capabilities(reply, out),
            (Step::StartTls, 220) => {
                self.step = Step::Tls;
                Next::Secure
            }
            (Step::Introduction, 220) => self.ready(),
            (Step::Replay, 250) => self.ready(),
            (step, _) => Next::Fault(match step {
                Step::Greeting => Fault::Greeting,
                Step::Hello | Step::Replay => Fault::Hello,
                Step::StartTls => Fault::StartTls,
                Step::Introduction => Fault::Xclient,
                Step::Tls | Step::Ready => Fault::Unasked,
            }),
        }
    }

    /// The handshake is done: what was learned in clear is forgotten (RFC 3207 §4.2).
    pub fn secured(&mut self, out: &mut Vec<u8>) -> Next {
        self.tls = true;
        match self.plan.xclient.is_some() {
            true => self.say_hello(out),
            false => self.ready(),
        }
    }

    /// Is the handshake due?
    pub fn is_securing(&self) -> bool {
        self.step == Step::Tls
    }

    /// Is something left to be said to a member that is ready?
    pub fn has_more(&self) -> bool {
        self.attributes.is_some()
    }

    /// Tells a member that is ready who the client is, once, if it wants to know; false when there is nothing to say.
    /// `hello`: how the client introduces itself with its first command, if that is what it does.
    pub fn introduce(&mut self, hello: Option<(Verb, &[u8])>, out: &mut Vec<u8>) -> bool {
        let (Some(attributes), Some(client)) = (self.attributes.take(), self.plan.xclient) else {
            return false;
        };
        let before = out.len();
        attributes.write(client, hello, out);
        let says = out.len() > before;
        if says {
            self.step = Step::Introduction;
        }
        says
    }

    /// Says again what the client said to another member.
    pub fn replay(&mut self, hello: &[u8], out: &mut Vec<u8>) {
        self.step = Step::Replay;
        out.extend_from_slice(hello);
        out.extend_from_slice(b"\r\n");
    }

    fn take_capabilities(&mut self, reply: &Reply, out: &mut Vec<u8>) -> Next {
        let capabilities = Capabilities::of(reply);
        match self.plan.starttls && !self.tls {
            true if !capabilities.starttls => Next::Fault(Fault::NoStartTls),
            true => {
                out.extend_from_slice(b"STARTTLS\r\n");
                self.step = Step::StartTls;
                Next::Reply
            }
            false => {
                self.attributes = capabilities.xclient;
                self.ready()
            }
        }
    }

    fn say_hello(&mut self, out: &mut Vec<u8>) -> Next {
        // RFC 5321 §4.1.3.
        let hello = match self.own.to_canonical() {
            IpAddr::V4(own) => format!("EHLO [{own}]\r\n"),
            IpAddr::V6(own) => format!("EHLO [IPv6:{own}]\r\n"),
        };
        out.extend_from_slice(hello.as_bytes());
        self.step = Step::Hello;
        Next::Reply
    }

    fn ready(&mut self) -> Next {
        self.step = Step::Ready;
        Next::Ready
    }
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

    /// Appends the command, with what the member lists and nothing else; nothing where it does not take the address.
    fn write(self, client: SocketAddr, hello: Option<(Verb, &[u8])>, out: &mut Vec<u8>) {
        if !self.address {
            return;
        }
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
        if let Some((verb, name)) = hello {
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
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::reply::ReplyParser;
    use super::*;

    const CLIENT: &str = "192.0.2.7:4711";

    /// Feeds replies; returns what was said and what follows the last of them.
    fn play(approach: &mut Approach, replies: &[&str]) -> (String, Next) {
        let (mut out, mut next) = (Vec::new(), Next::Reply);
        for reply in replies {
            let mut parser = ReplyParser::new();
            let whole = parser.push(reply.as_bytes()).unwrap().unwrap();
            next = approach.take(&whole, parser.has_rest(), &mut out);
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

    fn introduced(list: &str, client: &str, hello: Option<(Verb, &[u8])>) -> String {
        let mut out = Vec::new();
        Attributes::of(list.as_bytes()).write(client.parse().unwrap(), hello, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_plain_member_is_ready_with_its_greeting() {
        let said = play(&mut approach(false, false), &["220 hi\r\n"]);
        assert_eq!(said, (String::new(), Next::Ready));
    }

    #[test]
    fn starttls_and_what_is_learned_behind_it() {
        let mut member = approach(true, true);
        let clear = "250-mx\r\n250-XCLIENT NAME\r\n250 StartTLS\r\n";
        let (said, next) = play(&mut member, &["220 hi\r\n", clear, "220 go\r\n"]);
        assert_eq!(said, "EHLO [10.0.0.1]\r\nSTARTTLS\r\n");
        assert_eq!(next, Next::Secure);
        let mut out = Vec::new();
        assert_eq!(member.secured(&mut out), Next::Reply);
        assert_eq!(out, b"EHLO [10.0.0.1]\r\n");
        let (said, next) = play(
            &mut member,
            &["250-mx\r\n250-XCLIENT ADDR PORT\r\n250 OK\r\n"],
        );
        assert_eq!((said.as_str(), next), ("", Next::Ready));
        out.clear();
        assert!(member.introduce(Some((Verb::Ehlo, b"c.example")), &mut out));
        assert_eq!(out, b"XCLIENT ADDR=192.0.2.7 PORT=4711\r\n");
        assert_eq!(play(&mut member, &["220 hi\r\n"]).1, Next::Ready);
        assert!(!member.introduce(None, &mut out), "once");

        let mut member = approach(true, false);
        play(&mut member, &["220 hi\r\n", clear, "220 go\r\n"]);
        assert_eq!(member.secured(&mut out), Next::Ready);
    }

    #[test]
    fn whatever_is_not_as_it_should_is_a_fault() {
        for (replies, fault) in [
            (&["421 busy\r\n"][..], Fault::Greeting),
            (&["220 hi\r\n250 STARTTLS\r\n"], Fault::Unasked),
            (&["220 hi\r\n", "502 what\r\n"], Fault::Hello),
            (&["220 hi\r\n", "250-mx\r\n250 SIZE\r\n"], Fault::NoStartTls),
            (
                &["220 hi\r\n", "250-mx\r\n250 STARTTLS\r\n", "454 no\r\n"],
                Fault::StartTls,
            ),
            (
                &[
                    "220 hi\r\n",
                    "250-mx\r\n250 STARTTLS\r\n",
                    "220 go\r\n250 evil\r\n",
                ],
                Fault::Unasked,
            ),
            (
                &["220 hi\r\n", "250-mx\r\n250 STARTTLS\r\n", "220 go\r\n2"],
                Fault::Unasked,
            ),
        ] {
            let (_, next) = play(&mut approach(true, false), replies);
            assert_eq!(next, Next::Fault(fault), "{replies:?}");
        }
        let mut member = approach(false, true);
        play(
            &mut member,
            &["220 hi\r\n", "250-mx\r\n250 XCLIENT ADDR\r\n"],
        );
        assert!(member.introduce(None, &mut Vec::new()));
        assert_eq!(
            play(&mut member, &["550 no\r\n"]).1,
            Next::Fault(Fault::Xclient)
        );
    }

    #[test]
    fn xclient_says_what_is_listed_and_nothing_breaks_out() {
        let hello = Some((Verb::Ehlo, &b"a b=c+d\xc3\xa9"[..]));
        assert_eq!(
            introduced("NAME ADDR PORT PROTO HELO LOGIN DESTADDR", CLIENT, hello),
            "XCLIENT NAME=[UNAVAILABLE] ADDR=192.0.2.7 PORT=4711 HELO=a+20b+3Dc+2Bd+C3+A9 PROTO=ESMTP\r\n"
        );
        assert_eq!(
            introduced("addr proto", "[2001:db8::7]:25", Some((Verb::Helo, b"c"))),
            "XCLIENT ADDR=IPV6:2001:db8::7 PROTO=SMTP\r\n"
        );
        assert_eq!(
            introduced("ADDR HELO PROTO", CLIENT, None),
            "XCLIENT ADDR=192.0.2.7\r\n"
        );
        assert_eq!(introduced("NAME LOGIN", CLIENT, hello), "");
        let long = introduced("ADDR HELO", CLIENT, Some((Verb::Ehlo, &[b' '; 2000])));
        assert!(long.len() < 1024, "{}", long.len());
    }

    #[test]
    fn a_member_that_does_not_offer_xclient_is_ready_all_the_same() {
        let mut member = approach(false, true);
        let (said, next) = play(&mut member, &["220 hi\r\n", "250-mx\r\n250 SIZE\r\n"]);
        assert_eq!((said.as_str(), next), ("EHLO [10.0.0.1]\r\n", Next::Ready));
        assert!(!member.introduce(None, &mut Vec::new()));
    }
}
