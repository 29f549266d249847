//! Commands (RFC 5321 §4.1.1 and the extensions we must know of).

/// A command line, taken apart as far as we need to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Command<'a> {
    /// What is asked.
    pub verb: Verb,
    /// What follows the verb, without surrounding spaces.
    pub arguments: &'a [u8],
}

/// The verbs that are not all the same to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// RFC 5321 §4.1.1.1.
    Ehlo,
    /// RFC 5321 §4.1.1.1.
    Helo,
    /// RFC 5321 §4.1.1.2.
    Mail,
    /// RFC 5321 §4.1.1.3.
    Rcpt,
    /// RFC 5321 §4.1.1.4.
    Data,
    /// RFC 3030 §2.
    Bdat,
    /// RFC 5321 §4.1.1.5.
    Rset,
    /// RFC 5321 §4.1.1.9.
    Noop,
    /// RFC 5321 §4.1.1.10.
    Quit,
    /// RFC 5321 §4.1.1.8.
    Help,
    /// RFC 5321 §4.1.1.6 and §4.1.1.7: VRFY and EXPN.
    Lookup,
    /// RFC 3207 §4.
    StartTls,
    /// RFC 4954 §4, and X-EXPS, which Exchange has beside it.
    Auth,
    /// XCLIENT and XFORWARD: a proxy's word to a server, never a client's.
    Forged,
    /// TURN, ATRN and X-ANONYMOUSTLS change what the connection is, XEXCH50 and X-LINK2STATE bring content that is no
    /// mail, VERB brings replies that nothing asked for, and BURL (RFC 4468) ends a message with no octet of it on the
    /// way; we cannot carry them.
    Uncarried,
    /// The verbs of HTTP: a browser that was led here (cross-protocol attacks).
    Http,
    /// Any other.
    Other,
}

/// Largest chunk taken, in octets: a member that counts in 32 bits must not see another number.
pub const MAX_CHUNK: u64 = i32::MAX as u64;

/// `BDAT size [LAST]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Octets that follow the line.
    pub size: u64,
    /// Does the message end with it?
    pub last: bool,
}

/// The line has no verb.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

impl<'a> Command<'a> {
    /// Reads a line that has lost its CRLF.
    ///
    /// # Errors
    /// The line does not start with letters, digits and hyphens up to a space or its end, or it is a PROXY protocol
    /// header, which a member might believe.
    pub fn parse(line: &'a [u8]) -> Result<Self, Malformed> {
        let end = line.iter().position(|byte| *byte == b' ');
        let (verb, arguments) = line.split_at(end.unwrap_or(line.len()));
        let header = verb.eq_ignore_ascii_case(b"PROXY");
        if header
            || verb.is_empty()
            || !verb.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-')
        {
            return Err(Malformed);
        }
        let arguments = arguments.trim_ascii();
        let verb = match Verb::parse(verb) {
            // WebDAV and HTTP/2 have verbs of their own.
            Verb::Other if arguments.rsplit(|b| *b == b' ').next().is_some_and(is_http) => {
                Verb::Http
            }
            verb => verb,
        };
        Ok(Self { verb, arguments })
    }

    /// The chunk that a BDAT announces.
    ///
    /// # Errors
    /// RFC 3030 §2 allows a decimal size and `LAST`, nothing else; or the size is beyond [`MAX_CHUNK`].
    pub fn chunk(&self) -> Result<Chunk, Malformed> {
        let mut words = self
            .arguments
            .split(|byte| *byte == b' ')
            .filter(|word| !word.is_empty());
        let digits = words
            .next()
            .filter(|word| word.iter().all(u8::is_ascii_digit));
        let size = digits
            .and_then(|word| str::from_utf8(word).ok())
            .and_then(|word| word.parse().ok())
            .filter(|size| *size <= MAX_CHUNK)
            .ok_or(Malformed)?;
        let last = match words.next() {
            None => false,
            Some(word) if word.eq_ignore_ascii_case(b"LAST") => true,
            Some(_) => return Err(Malformed),
        };
        match words.next() {
            None => Ok(Chunk { size, last }),
            Some(_) => Err(Malformed),
        }
    }

    /// The SASL mechanism that an AUTH asks for (RFC 4422 §3.1), whatever a lenient member would skip before it.
    pub fn mechanism(&self) -> &'a [u8] {
        let foreign = |byte: &u8| !byte.is_ascii_alphanumeric() && !matches!(byte, b'-' | b'_');
        let mut words = self.arguments.split(foreign);
        words.find(|word| !word.is_empty()).unwrap_or_default()
    }
}

impl Command<'_> {
    /// Does a MAIL carry this parameter (RFC 5321 §4.1.1.11)? What stands within `<>` is no parameter.
    pub fn has_parameter(&self, name: &[u8]) -> bool {
        let behind = &self.arguments[self.path_end()..];
        let mut words = behind.split(u8::is_ascii_whitespace);
        words.any(|word| word.eq_ignore_ascii_case(name))
    }

    /// The position behind the `>` of the path; a value may contain one, too, and so may a quoted
    /// local part (RFC 5321 §4.1.2).
    fn path_end(&self) -> usize {
        let (mut quoted, mut escaped) = (false, false);
        for (at, byte) in self.arguments.iter().enumerate() {
            match byte {
                _ if escaped => escaped = false,
                b'\\' if quoted => escaped = true,
                b'"' => quoted = !quoted,
                b'>' if !quoted => return at + 1,
                _ => {}
            }
        }
        0
    }
}

/// RFC 9112 §2.3.
fn is_http(word: &[u8]) -> bool {
    word.starts_with(b"HTTP/")
}

impl Chunk {
    /// Appends the command in its one plain form: a member reads no other number than we did.
    pub fn write(&self, out: &mut Vec<u8>) {
        let last = if self.last { " LAST" } else { "" };
        out.extend_from_slice(format!("BDAT {}{last}\r\n", self.size).as_bytes());
    }
}

impl Verb {
    fn parse(verb: &[u8]) -> Self {
        const VERBS: [(&[u8], Verb); 31] = [
            (b"EHLO", Verb::Ehlo),
            (b"HELO", Verb::Helo),
            (b"MAIL", Verb::Mail),
            (b"RCPT", Verb::Rcpt),
            (b"DATA", Verb::Data),
            (b"BDAT", Verb::Bdat),
            (b"RSET", Verb::Rset),
            (b"NOOP", Verb::Noop),
            (b"QUIT", Verb::Quit),
            (b"HELP", Verb::Help),
            (b"VRFY", Verb::Lookup),
            (b"EXPN", Verb::Lookup),
            (b"STARTTLS", Verb::StartTls),
            (b"AUTH", Verb::Auth),
            (b"X-EXPS", Verb::Auth),
            (b"XCLIENT", Verb::Forged),
            (b"XFORWARD", Verb::Forged),
            (b"TURN", Verb::Uncarried),
            (b"ATRN", Verb::Uncarried),
            (b"GET", Verb::Http),
            (b"HEAD", Verb::Http),
            (b"POST", Verb::Http),
            (b"PUT", Verb::Http),
            (b"CONNECT", Verb::Http),
            (b"OPTIONS", Verb::Http),
            (b"DELETE", Verb::Http),
            (b"X-ANONYMOUSTLS", Verb::Uncarried),
            (b"XEXCH50", Verb::Uncarried),
            (b"X-LINK2STATE", Verb::Uncarried),
            (b"VERB", Verb::Uncarried),
            (b"BURL", Verb::Uncarried),
        ];
        let known = VERBS
            .iter()
            .find(|(name, _)| verb.eq_ignore_ascii_case(name));
        known.map_or(Self::Other, |(_, verb)| *verb)
    }

    /// May the client send the next command before this one is answered?
    ///
    /// RFC 2920 §3.1 names the commands that must end a group; unknown ones are treated as such.
    pub fn may_be_followed(self) -> bool {
        matches!(self, Self::Mail | Self::Rcpt | Self::Rset | Self::Bdat)
    }

    /// Is it served in plaintext where TLS is required (RFC 3207 §4)?
    pub fn is_served_before_tls(self) -> bool {
        use Verb::{Ehlo, Helo, Help, Noop, Quit, Rset, StartTls};
        matches!(self, Ehlo | Helo | Help | Noop | Quit | Rset | StartTls)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbs_are_case_insensitive_and_end_at_a_space() {
        let parse = |line: &'static [u8]| Command::parse(line).map(|c| (c.verb, c.arguments));
        assert_eq!(parse(b"StartTls"), Ok((Verb::StartTls, &b""[..])));
        assert_eq!(parse(b"STARTTLS  "), Ok((Verb::StartTls, &b""[..])));
        assert_eq!(
            parse(b"mail FROM:<> SIZE=1"),
            Ok((Verb::Mail, &b"FROM:<> SIZE=1"[..]))
        );
        assert_eq!(parse(b"xclient NAME=a"), Ok((Verb::Forged, &b"NAME=a"[..])));
        assert_eq!(parse(b"MAILX"), Ok((Verb::Other, &b""[..])));
        for line in [&b"get /"[..], b"PRI * HTTP/2.0", b"PROPFIND / HTTP/1.1"] {
            assert_eq!(Command::parse(line).unwrap().verb, Verb::Http);
        }
        for line in [
            &b""[..],
            b" NOOP",
            b"Proxy TCP4 192.0.2.1 203.0.113.1 4711 25",
            b"STARTTLS\tx",
            b"Subject: x",
            b"<html>",
            b"\xff\xfe",
            b"QUIT;",
        ] {
            assert_eq!(
                Command::parse(line),
                Err(Malformed),
                "{}",
                line.escape_ascii()
            );
        }
    }

    #[test]
    fn parameters_stand_behind_the_path() {
        let has = |line: &'static [u8]| Command::parse(line).unwrap().has_parameter(b"REQUIRETLS");
        assert!(has(b"MAIL FROM:<a@b> SIZE=1 RequireTLS"));
        assert!(has(b"MAIL FROM:<a@b>  REQUIRETLS BODY=7BIT"));
        assert!(has(b"MAIL FROM:a@b REQUIRETLS"));
        assert!(!has(b"MAIL FROM:<a@b> SIZE=1"));
        assert!(!has(b"MAIL FROM:<\"x REQUIRETLS y\"@b>"));
        assert!(!has(b"MAIL FROM:<a@b> ENVID=REQUIRETLS"));
        assert!(has(b"MAIL FROM:<a@b> REQUIRETLS ENVID=a>b"));
        assert!(has(b"MAIL FROM:<\"\\\">\"@b>REQUIRETLS"));
        assert!(has(b"MAIL FROM:<a@b>\tREQUIRETLS"));
        assert!(!has(b"MAIL FROM:<\"> REQUIRETLS \"@b> SIZE=1"));
    }

    #[test]
    fn mechanisms() {
        let mechanism = |line: &'static [u8]| Command::parse(line).unwrap().mechanism();
        assert_eq!(
            mechanism(b"AUTH SCRAM-SHA-1-PLUS bixzPQ=="),
            b"SCRAM-SHA-1-PLUS"
        );
        assert_eq!(mechanism(b"AUTH  \x0bEXTERNAL\t="), b"EXTERNAL");
        assert_eq!(mechanism(b"AUTH"), b"");
    }

    #[test]
    fn chunks() {
        let chunk = |line: &'static [u8]| Command::parse(line).unwrap().chunk();
        assert_eq!(
            chunk(b"BDAT 10"),
            Ok(Chunk {
                size: 10,
                last: false
            })
        );
        assert_eq!(
            chunk(b"bdat 0 last"),
            Ok(Chunk {
                size: 0,
                last: true
            })
        );
        for line in [
            &b"BDAT"[..],
            b"BDAT LAST",
            b"BDAT -1",
            b"BDAT +1",
            b"BDAT 1 2",
            b"BDAT 1 LAST x",
        ] {
            assert_eq!(chunk(line), Err(Malformed), "{}", line.escape_ascii());
        }
        for beyond in [
            "2147483648",
            "4294967296",
            "18446744073709551615",
            "99999999999999999999",
        ] {
            let line = format!("BDAT {beyond} LAST");
            let command = Command::parse(line.as_bytes()).unwrap();
            assert_eq!(command.chunk(), Err(Malformed), "{line}");
        }
        let mut plain = Vec::new();
        chunk(b"bdat  010  last").unwrap().write(&mut plain);
        assert_eq!(plain, b"BDAT 10 LAST\r\n");
    }
}
