//! The session log: one line when a proxy session ends.

use std::{
    fmt::{self, Write as _},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use super::lines::Lines;
use crate::{
    model::Name,
    smtp::{end::End, phase::Phase},
};

/// Longest value of a client's making in a line, in characters before escaping.
const MAX_VALUE: usize = 128;

/// A session that is over. AUTH arguments, addresses of mail and content are not in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionEnd {
    /// As in `smtplb show sessions`.
    pub id: SessionId,
    /// The number of the configuration that it began with.
    pub generation: u64,
    /// The virtual server's name.
    pub virtual_server: Name,
    /// The client.
    pub client: SocketAddr,
    /// What it connected to.
    pub local: SocketAddr,
    /// The last member, by name and address; absent where none was reached.
    pub member: Option<(Name, SocketAddr)>,
    /// The address that the member saw.
    pub snat: Option<IpAddr>,
    /// From accept until members were looked for: a header in front, a greeting kept back, TLS from the first byte.
    pub wait: Duration,
    /// Until the first member was connected, those that were not reached included.
    pub connect: Option<Duration>,
    /// From there until the client was greeted.
    pub greeting: Option<Duration>,
    /// It talked before it was greeted; said only where somebody looked.
    pub early: bool,
    /// The client's TLS; absent in plaintext.
    pub tls: Option<TlsFacts>,
    /// The member's TLS; absent in plaintext.
    pub member_tls: Option<TlsFacts>,
    /// Was STARTTLS in an EHLO reply?
    pub starttls_offered: bool,
    /// Was it used?
    pub starttls_used: bool,
    /// The client's name for itself.
    pub helo: Option<Box<[u8]>>,
    /// Messages that the member accepted.
    pub messages: u32,
    /// Recipients that the member accepted.
    pub recipients: u32,
    /// Messages whose line ends were mended; said only where there are some.
    pub normalized: u32,
    /// Bytes of SMTP from the client to the member.
    pub bytes_in: u64,
    /// Bytes of SMTP to the client.
    pub bytes_out: u64,
    /// From accept.
    pub duration: Duration,
    /// The last reply's code; 0 where there was none.
    pub last_code: u16,
    /// Why it ended.
    pub end: End,
    /// Where it was then.
    pub phase: Phase,
}

/// What was agreed with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TlsFacts {
    /// `TLSv1.2` or `TLSv1.3`.
    pub version: &'static str,
    /// The cipher suite's registered name.
    pub suite: &'static str,
}

/// A session's number, unique across restarts of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// Takes the line.
pub trait SessionSink: Send + Sync {
    /// A session has ended.
    fn session_ended(&self, session: &SessionEnd);
}

impl SessionSink for Lines {
    fn session_ended(&self, session: &SessionEnd) {
        self.say(session);
    }
}

impl fmt::Display for SessionEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            id,
            generation,
            virtual_server,
            client,
            local,
            ..
        } = self;
        write!(
            f,
            "session id={id} generation={generation} virtual_server={}",
            Quoted(virtual_server.as_bytes())
        )?;
        write!(f, " client={client} local={local} member=")?;
        match &self.member {
            Some((name, address)) => write!(f, "{}/{address}", Quoted(name.as_bytes()))?,
            None => f.write_char('-')?,
        }
        match self.snat {
            Some(address) => write!(f, " snat={address}")?,
            None => f.write_str(" snat=-")?,
        }
        write!(f, " wait_ms={}", self.wait.as_millis())?;
        for (key, wait) in [("connect_ms", self.connect), ("greeting_ms", self.greeting)] {
            match wait {
                Some(wait) => write!(f, " {key}={}", wait.as_millis())?,
                None => write!(f, " {key}=-")?,
            }
        }
        if self.early {
            f.write_str(" early=yes")?;
        }
        for (side, tls) in [("", &self.tls), ("member_", &self.member_tls)] {
            match tls {
                Some(tls) => write!(f, " {side}tls={} {side}suite={}", tls.version, tls.suite)?,
                None => write!(f, " {side}tls=none {side}suite=-")?,
            }
        }
        let starttls = match (self.starttls_used, self.starttls_offered) {
            (true, _) => "used",
            (false, true) => "offered",
            (false, false) => "none",
        };
        write!(f, " starttls={starttls} helo=")?;
        match &self.helo {
            Some(name) => write!(f, "{}", Quoted(name))?,
            None => f.write_char('-')?,
        }
        write!(
            f,
            " messages={} recipients={}",
            self.messages, self.recipients
        )?;
        if self.normalized > 0 {
            write!(f, " normalized={}", self.normalized)?;
        }
        write!(
            f,
            " bytes_in={} bytes_out={}",
            self.bytes_in, self.bytes_out
        )?;
        write!(f, " duration_ms={}", self.duration.as_millis())?;
        write!(
            f,
            " code={} end={} by={} phase={}",
            self.last_code,
            self.end,
            self.end.by().as_str(),
            self.phase.as_str()
        )
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A value from outside: cut, and in quotes with everything escaped that could end a value or a line.
pub(super) struct Quoted<'a>(pub(super) &'a [u8]);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = String::from_utf8_lossy(self.0);
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._:[]/".contains(c);
        if !text.is_empty() && text.len() <= MAX_VALUE && text.chars().all(plain) {
            return f.write_str(&text);
        }
        f.write_char('"')?;
        for c in text.chars().take(MAX_VALUE) {
            match c {
                '"' | '\\' => write!(f, "\\{c}")?,
                ' '..='~' => f.write_char(c)?,
                _ => write!(f, "{}", c.escape_unicode())?,
            }
        }
        f.write_char('"')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end() -> SessionEnd {
        SessionEnd {
            id: SessionId(0xabc),
            generation: 7,
            virtual_server: "submission".into(),
            client: "[2001:db8::1]:4711".parse().unwrap(),
            local: "[2001:db8::25]:587".parse().unwrap(),
            member: Some(("msa1".into(), "10.0.0.11:25".parse().unwrap())),
            snat: Some("10.0.0.1".parse().unwrap()),
            wait: Duration::ZERO,
            connect: Some(Duration::from_millis(2)),
            greeting: Some(Duration::from_millis(34)),
            early: false,
            member_tls: None,
            tls: Some(TlsFacts {
                version: "TLSv1.3",
                suite: "TLS13_AES_256_GCM_SHA384",
            }),
            starttls_offered: true,
            starttls_used: true,
            helo: Some((*b"client.example").into()),
            messages: 2,
            recipients: 3,
            normalized: 0,
            bytes_in: 4096,
            bytes_out: 512,
            duration: Duration::from_millis(1234),
            last_code: 221,
            end: End::Quit,
            phase: Phase::Command,
        }
    }

    #[test]
    fn a_line_says_it_all() {
        assert_eq!(
            end().to_string(),
            "session id=0000000000000abc generation=7 virtual_server=submission client=[2001:db8::1]:4711 \
             local=[2001:db8::25]:587 member=msa1/10.0.0.11:25 snat=10.0.0.1 wait_ms=0 connect_ms=2 greeting_ms=34 \
             tls=TLSv1.3 suite=TLS13_AES_256_GCM_SHA384 member_tls=none member_suite=- starttls=used \
             helo=client.example messages=2 recipients=3 bytes_in=4096 bytes_out=512 duration_ms=1234 \
             code=221 end=quit by=client phase=command"
        );
        let bare = SessionEnd {
            member: None,
            snat: None,
            connect: None,
            greeting: None,
            early: true,
            normalized: 1,
            tls: None,
            starttls_offered: false,
            starttls_used: false,
            helo: None,
            last_code: 0,
            end: End::NoMember,
            phase: Phase::Connect,
            ..end()
        };
        let line = bare.to_string();
        assert!(line.contains(
            " member=- snat=- wait_ms=0 connect_ms=- greeting_ms=- early=yes tls=none suite=- member_tls=none "
        ));
        assert!(line.contains(" messages=2 recipients=3 normalized=1 bytes_in="));
        assert!(line.ends_with(" code=0 end=no-member by=proxy phase=connect"));
    }

    #[test]
    fn no_value_forges_a_line_or_grows_it() {
        let helo = b"x\r\nsession id=0 \"end\\=quit\x1b[2J\xff\xe2\x80\xa8".as_slice();
        let line = SessionEnd {
            helo: Some(helo.into()),
            ..end()
        }
        .to_string();
        assert!(line.contains(
            r#" helo="x\u{d}\u{a}session id=0 \"end\\=quit\u{1b}[2J\u{fffd}\u{2028}" messages="#
        ));
        assert!(line.is_ascii() && !line.contains('\n'));
        let line = SessionEnd {
            helo: Some(vec![b'a'; 10_000].into()),
            ..end()
        }
        .to_string();
        assert!(line.len() < 600);
    }
}
