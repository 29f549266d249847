//! What a member announces in its EHLO reply, and what of it the client gets to see.

use std::borrow::Cow;

use super::{approach::Attributes, reply::Reply};

/// What we must know of a member's announcements (RFC 5321 §4.1.1.1).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// RFC 2920: several commands may be on their way.
    pub pipelining: bool,
    /// RFC 3030: BDAT.
    pub chunking: bool,
    /// RFC 3207.
    pub starttls: bool,
    /// What a proxy may tell of its client.
    pub xclient: Option<Attributes>,
}

/// What a member, or each of several, announces: the lines behind the first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Offers(Vec<Vec<u8>>);

impl Offers {
    /// From a reply to EHLO.
    pub fn of(reply: &Reply) -> Self {
        Self(reply.lines().skip(1).map(<[u8]>::to_vec).collect())
    }

    /// What both announce.
    pub fn and(&self, other: &Self) -> Self {
        Self(
            self.0
                .iter()
                .filter_map(|line| other.common(line))
                .collect(),
        )
    }

    /// As much of a line as these announce, too.
    fn common(&self, line: &[u8]) -> Option<Vec<u8>> {
        self.0.iter().find_map(|other| common(line, other))
    }
}

/// What two lines promise both: a limit is the smaller one, a list what is in both; of anything else that differs,
/// nobody knows.
fn common(line: &[u8], other: &[u8]) -> Option<Vec<u8>> {
    let (line, other) = (line.trim_ascii(), other.trim_ascii());
    if line.eq_ignore_ascii_case(other) {
        return Some(line.to_vec());
    }
    let mut words = line.split(|byte| *byte == b' ');
    let mut others = other.split(|byte| *byte == b' ');
    let name = words.next()?;
    if !others.next()?.eq_ignore_ascii_case(name) {
        return None;
    }
    match name.to_ascii_uppercase().as_slice() {
        b"SIZE" => {
            // RFC 1870 §4: no number, or 0, is no limit that is told.
            let limit = |word: Option<&[u8]>| {
                let number = word.and_then(|word| str::from_utf8(word).ok());
                number
                    .and_then(|number| number.parse::<u64>().ok())
                    .filter(|limit| *limit > 0)
            };
            let limits = [limit(words.next()), limit(others.next())];
            let least = limits.into_iter().flatten().min();
            Some(least.map_or_else(|| b"SIZE".to_vec(), |least| format!("SIZE {least}").into()))
        }
        b"AUTH" => {
            let others: Vec<_> = others.collect();
            let mut both = name.to_vec();
            for mechanism in words {
                if others
                    .iter()
                    .any(|other| other.eq_ignore_ascii_case(mechanism))
                {
                    both.push(b' ');
                    both.extend_from_slice(mechanism);
                }
            }
            (both.len() > name.len()).then_some(both)
        }
        _ => None,
    }
}

/// What differs between the member's list and the client's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Filter<'o> {
    /// We end the client's TLS and it has not begun.
    pub offer_starttls: bool,
    /// Credentials wait for TLS.
    pub hide_auth: bool,
    /// The way to the member can keep the promise of RFC 8689 §3.
    pub carries_requiretls: bool,
    /// Another member may serve in the end: nothing is promised that it lacks.
    pub also: Option<&'o Offers>,
}

impl Capabilities {
    /// Reads the keywords behind the first line.
    pub fn of(reply: &Reply) -> Self {
        let mut found = Self::default();
        for line in reply.lines().skip(1) {
            let word = keyword(line);
            match word.to_ascii_uppercase().as_slice() {
                b"PIPELINING" => found.pipelining = true,
                b"CHUNKING" => found.chunking = true,
                b"STARTTLS" => found.starttls = true,
                b"XCLIENT" => {
                    let list = line.trim_ascii_start().get(word.len()..);
                    found.xclient = Some(Attributes::of(list.unwrap_or_default()));
                }
                _ => {}
            }
        }
        found
    }
}

impl Filter<'_> {
    /// Appends the reply as the client shall see it: the member's lines, order and values, less what
    /// must not be shown, plus STARTTLS where it is ours to offer.
    pub fn write(&self, reply: &Reply, out: &mut Vec<u8>) {
        let kept = reply
            .lines()
            .enumerate()
            .filter_map(|(at, line)| match self.also {
                _ if at == 0 => Some(Cow::Borrowed(line)),
                _ if !self.shows(line) => None,
                None => carried(line),
                Some(also) => also.common(&carried(line)?).map(Cow::Owned),
            });
        let ours = self
            .offer_starttls
            .then_some(Cow::Borrowed(&b"STARTTLS"[..]));
        let mut lines = kept.chain(ours).peekable();
        while let Some(line) = lines.next() {
            out.extend_from_slice(reply.code.to_string().as_bytes());
            out.push(if lines.peek().is_some() { b'-' } else { b' ' });
            out.extend_from_slice(&line);
            out.extend_from_slice(b"\r\n");
        }
    }

    fn shows(&self, line: &[u8]) -> bool {
        match keyword(line).to_ascii_uppercase().as_slice() {
            b"AUTH" | b"X-EXPS" => !self.hide_auth,
            b"REQUIRETLS" => self.carries_requiretls,
            b"STARTTLS" | b"XCLIENT" | b"XFORWARD" => false,
            b"TURN" | b"ATRN" | b"X-ANONYMOUSTLS" => false,
            b"XEXCH50" | b"X-LINK2STATE" | b"VERB" | b"BURL" => false,
            _ => true,
        }
    }
}

/// A line as far as a proxy can keep it: of the mechanisms of AUTH, in whatever spelling, those that it can carry.
fn carried(line: &[u8]) -> Option<Cow<'_, [u8]>> {
    let name = keyword(line);
    let (true, Some(at)) = (
        is_auth(name),
        line.iter().position(|b| matches!(b, b' ' | b'\t' | b'=')),
    ) else {
        return Some(Cow::Borrowed(line));
    };
    let (head, list) = line.split_at(at + 1);
    let all = || list.split(|b| matches!(b, b' ' | b'\t'));
    if all().all(is_carried) {
        return Some(Cow::Borrowed(line));
    }
    let kept: Vec<_> = all()
        .filter(|word| !word.is_empty() && is_carried(word))
        .collect();
    (!kept.is_empty()).then(|| [head, &kept.join(&b' ')].concat().into())
}

/// AUTH (RFC 4954), and what Exchange calls it among its own.
fn is_auth(name: &[u8]) -> bool {
    name.eq_ignore_ascii_case(b"AUTH") || name.eq_ignore_ascii_case(b"X-EXPS")
}

/// Can a SASL mechanism be used through a proxy? EXTERNAL (RFC 4422 appendix A) would be about the proxy's certificate
/// and log in any client as the proxy; `-PLUS` (RFC 5802 §6) binds to a TLS connection that ends here.
pub fn is_carried(mechanism: &[u8]) -> bool {
    let mechanism = mechanism.to_ascii_uppercase();
    mechanism != b"EXTERNAL" && !mechanism.ends_with(b"-PLUS")
}

/// The keyword of a line; `AUTH=LOGIN` is an old spelling of `AUTH LOGIN`.
fn keyword(line: &[u8]) -> &[u8] {
    let line = line.trim_ascii();
    let end = line
        .iter()
        .position(|byte| matches!(byte, b' ' | b'\t' | b'='));
    &line[..end.unwrap_or(line.len())]
}

#[cfg(test)]
mod tests {
    use super::super::reply::ReplyParser;
    use super::*;

    const MEMBER: &[u8] = b"250-mx1.example\r\n250-PIPELINING\r\n250-SIZE 1000\r\n250-StartTLS\r\n\
        250-AUTH PLAIN LOGIN\r\n250-AUTH=PLAIN\r\n250-X-EXPS NTLM\r\n250-XCLIENT NAME ADDR\r\n250-XFORWARD NAME\r\n\
        250-REQUIRETLS\r\n250-chunking\r\n250 SMTPUTF8\r\n";

    fn reply(bytes: &[u8]) -> Reply {
        ReplyParser::new().push(bytes).unwrap().unwrap()
    }

    fn shown(filter: Filter<'_>, bytes: &[u8]) -> String {
        let mut out = Vec::new();
        filter.write(&reply(bytes), &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn before_required_tls() {
        let filter = Filter {
            offer_starttls: true,
            hide_auth: true,
            ..Filter::default()
        };
        assert_eq!(
            shown(filter, MEMBER),
            "250-mx1.example\r\n250-PIPELINING\r\n250-SIZE 1000\r\n250-chunking\r\n250-SMTPUTF8\r\n250 STARTTLS\r\n"
        );
    }

    #[test]
    fn after_tls() {
        assert_eq!(
            shown(Filter::default(), MEMBER),
            "250-mx1.example\r\n250-PIPELINING\r\n250-SIZE 1000\r\n250-AUTH PLAIN LOGIN\r\n250-AUTH=PLAIN\r\n\
             250-X-EXPS NTLM\r\n250-chunking\r\n250 SMTPUTF8\r\n"
        );
    }

    #[test]
    fn mechanisms_that_end_at_the_proxy_are_not_shown() {
        for (line, seen) in [
            (
                "AUTH PLAIN External SCRAM-SHA-256-PLUS LOGIN",
                Some("AUTH PLAIN LOGIN"),
            ),
            ("auth  EXTERNAL\tSCRAM-SHA-256", Some("auth SCRAM-SHA-256")),
            ("AUTH=EXTERNAL PLAIN", Some("AUTH=PLAIN")),
            ("X-EXPS EXTERNAL NTLM", Some("X-EXPS NTLM")),
            ("AUTH EXTERNAL SCRAM-SHA-1-PLUS", None),
            ("AUTH=EXTERNAL", None),
            ("X-EXPS external", None),
            ("AUTH  PLAIN", Some("AUTH  PLAIN")),
            ("AUTH", Some("AUTH")),
            ("X-OTHER EXTERNAL", Some("X-OTHER EXTERNAL")),
        ] {
            let list = format!("250-mx\r\n250-{line}\r\n250 DSN\r\n");
            let line = seen.map_or(String::new(), |seen| format!("250-{seen}\r\n"));
            let expected = format!("250-mx\r\n{line}250 DSN\r\n");
            assert_eq!(shown(Filter::default(), list.as_bytes()), expected);
        }
        let also = Offers::of(&reply(b"250-mx\r\n250 AUTH EXTERNAL LOGIN\r\n"));
        let filter = Filter {
            also: Some(&also),
            ..Filter::default()
        };
        let list = b"250-mx\r\n250 AUTH EXTERNAL LOGIN\r\n";
        assert_eq!(shown(filter, list), "250-mx\r\n250 AUTH LOGIN\r\n");
    }

    #[test]
    fn what_would_change_the_dialogue_is_not_shown() {
        let list = b"250-mx\r\n250-XEXCH50\r\n250-x-link2state\r\n250-VERB\r\n250-TURN\r\n250-BURL imap\r\n250-XVERB\r\n250 DSN\r\n";
        assert_eq!(
            shown(Filter::default(), list),
            "250-mx\r\n250-XVERB\r\n250 DSN\r\n"
        );
    }

    #[test]
    fn the_last_line_stays_the_last() {
        assert_eq!(
            shown(Filter::default(), b"250-a\r\n250 STARTTLS\r\n"),
            "250 a\r\n"
        );
        assert_eq!(
            shown(Filter::default(), b"250 STARTTLS\r\n"),
            "250 STARTTLS\r\n"
        );
        let offer = Filter {
            offer_starttls: true,
            ..Filter::default()
        };
        assert_eq!(shown(offer, b"250 a\r\n"), "250-a\r\n250 STARTTLS\r\n");
    }

    #[test]
    fn nothing_is_promised_that_another_member_lacks() {
        let other = b"250-legacy\r\n250-SIZE 500\r\n250-Pipelining\r\n250-AUTH LOGIN CRAM-MD5\r\n250-DSN\r\n250 X 1\r\n";
        let filter = Filter {
            offer_starttls: true,
            also: Some(&Offers::of(&reply(other))),
            ..Filter::default()
        };
        assert_eq!(
            shown(filter, MEMBER),
            "250-mx1.example\r\n250-PIPELINING\r\n250-SIZE 500\r\n250-AUTH LOGIN\r\n250 STARTTLS\r\n"
        );
        let none = Offers::default();
        let filter = Filter {
            also: Some(&none),
            ..filter
        };
        assert_eq!(shown(filter, MEMBER), "250-mx1.example\r\n250 STARTTLS\r\n");
    }

    #[test]
    fn what_two_lines_promise_both() {
        for (one, other, both) in [
            ("SIZE 1000", "SIZE 10", Some("SIZE 10")),
            ("SIZE", "size 10", Some("SIZE 10")),
            ("SIZE 0", "SIZE", Some("SIZE")),
            ("8BITMIME", "8bitmime", Some("8BITMIME")),
            (
                "AUTH PLAIN LOGIN",
                "AUTH login plain",
                Some("AUTH PLAIN LOGIN"),
            ),
            ("AUTH PLAIN", "AUTH GSSAPI", None),
            ("LIMITS RCPTMAX=10", "LIMITS RCPTMAX=20", None),
            ("DSN", "DSNX", None),
        ] {
            let found = common(one.as_bytes(), other.as_bytes());
            assert_eq!(found.as_deref(), both.map(str::as_bytes), "{one}, {other}");
        }
    }

    #[test]
    fn what_the_member_can_do() {
        assert_eq!(
            Capabilities::of(&reply(MEMBER)),
            Capabilities {
                pipelining: true,
                chunking: true,
                starttls: true,
                xclient: Some(Attributes::of(b"NAME ADDR")),
            }
        );
        assert_eq!(
            Capabilities::of(&reply(b"250 PIPELINING\r\n")),
            Capabilities::default()
        );
    }
}
