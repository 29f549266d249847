//! One connection to a sink (RFC 5321, with RFC 2920, 3030 and 3207).

use std::{
    io::{BufRead, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use super::{Arrival, Event, Listen, Mode, Sink};
use crate::{
    mail::{
        self,
        digest::{Digest, MessageDigest},
    },
    wire::Wire,
};

/// RFC 5321 §4.5.3.2.7: a server waits at least 5 minutes for a command; tests hold sessions idle for longer.
const TIMEOUT: Duration = Duration::from_hours(1);
/// No command is that long; a client that sends more is told off.
const LONGEST_COMMAND: u64 = 4096;

pub(super) fn run(sink: &Sink, listen: Listen, tcp: TcpStream, peer: SocketAddr) -> Result<()> {
    tcp.set_read_timeout(Some(TIMEOUT))?;
    tcp.set_write_timeout(Some(TIMEOUT))?;
    let mut wire = Wire::plain(tcp)?;
    if listen.mode == Mode::Implicit {
        wire = wire.accept_tls(sink.tls.as_ref().context("no certificate")?)?;
    }
    let session = Session {
        sink,
        listen,
        peer,
        input: BufReader::with_capacity(64 << 10, wire),
        helo: String::new(),
        envelope: None,
    };
    session.talk()
}

#[derive(Default)]
struct Envelope {
    from: String,
    to: Vec<String>,
    /// What BDAT has brought so far.
    chunks: Option<Chunks>,
}

struct Session<'a> {
    sink: &'a Sink,
    listen: Listen,
    peer: SocketAddr,
    input: BufReader<Wire>,
    helo: String,
    envelope: Option<Envelope>,
}

impl Session<'_> {
    fn talk(mut self) -> Result<()> {
        let greeting = format!("220 {} ESMTP sink\r\n", self.sink.options.name);
        self.say(&greeting)?;
        loop {
            let Some(line) = self.command()? else {
                return Ok(());
            };
            let (verb, rest) = line.split_once(' ').unwrap_or((&line, ""));
            match verb.to_ascii_uppercase().as_str() {
                "EHLO" => self.ehlo(rest)?,
                "HELO" => {
                    rest.clone_into(&mut self.helo);
                    self.say("250 hello\r\n")?;
                }
                "STARTTLS" => self = self.starttls()?,
                "MAIL" => self.mail(rest)?,
                "RCPT" => self.rcpt(rest)?,
                "DATA" => self.data()?,
                "BDAT" => self.bdat(rest)?,
                "RSET" => {
                    self.envelope = None;
                    self.say("250 2.0.0 forgotten\r\n")?;
                }
                "NOOP" | "VRFY" => self.say("250 2.0.0 fine\r\n")?,
                "QUIT" => return self.say("221 2.0.0 bye\r\n"),
                _ => self.say("500 5.5.2 what?\r\n")?,
            }
        }
    }

    /// The next line without its end; none when the client has closed.
    fn command(&mut self) -> Result<Option<String>> {
        let mut line = Vec::new();
        self.input
            .by_ref()
            .take(LONGEST_COMMAND)
            .read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(None);
        }
        if !line.ends_with(b"\r\n") {
            self.fault("a command that does not end in CRLF");
            self.say("500 5.5.2 line too long or not ended\r\n")?;
            bail!("not a command");
        }
        line.truncate(line.len() - 2);
        Ok(Some(String::from_utf8_lossy(&line).into_owned()))
    }

    fn ehlo(&mut self, name: &str) -> Result<()> {
        name.clone_into(&mut self.helo);
        let mut lines = vec![self.sink.options.name.clone()];
        lines.extend(self.sink.options.extensions.iter().cloned());
        if self.listen.mode == Mode::Starttls && self.input.get_ref().tls().is_none() {
            lines.push("STARTTLS".to_owned());
        }
        let last = lines.len() - 1;
        let mut reply = String::new();
        for (at, line) in lines.iter().enumerate() {
            let mark = if at == last { ' ' } else { '-' };
            reply.push_str(&format!("250{mark}{line}\r\n"));
        }
        self.say(&reply)
    }

    fn starttls(mut self) -> Result<Self> {
        let Some(config) = self
            .sink
            .tls
            .as_ref()
            .filter(|_| self.listen.mode == Mode::Starttls)
        else {
            self.say("502 5.5.1 no TLS here\r\n")?;
            return Ok(self);
        };
        if !self.input.buffer().is_empty() {
            self.fault("bytes behind STARTTLS");
            self.say("501 5.5.2 bytes behind STARTTLS\r\n")?;
            bail!("command injection");
        }
        self.say("220 2.0.0 go ahead\r\n")?;
        let wire = self.input.into_inner().accept_tls(config)?;
        Ok(Self {
            input: BufReader::with_capacity(64 << 10, wire),
            helo: String::new(),
            envelope: None,
            ..self
        })
    }

    fn mail(&mut self, rest: &str) -> Result<()> {
        let Some(path) = path(rest, "FROM:") else {
            return self.say("501 5.5.4 MAIL FROM:<address>\r\n");
        };
        if self.envelope.is_some() {
            return self.say("503 5.5.1 one at a time\r\n");
        }
        self.envelope = Some(Envelope {
            from: path,
            ..Envelope::default()
        });
        self.say("250 2.1.0 sender fine\r\n")
    }

    fn rcpt(&mut self, rest: &str) -> Result<()> {
        match (path(rest, "TO:"), &mut self.envelope) {
            (Some(path), Some(envelope)) => {
                envelope.to.push(path);
                self.say("250 2.1.5 recipient fine\r\n")
            }
            (None, _) => self.say("501 5.5.4 RCPT TO:<address>\r\n"),
            (_, None) => self.say("503 5.5.1 MAIL first\r\n"),
        }
    }

    fn data(&mut self) -> Result<()> {
        if self
            .envelope
            .as_ref()
            .is_none_or(|envelope| envelope.to.is_empty())
        {
            return self.say("503 5.5.1 MAIL and RCPT first\r\n");
        }
        self.say("354 end with a dot\r\n")?;
        let digest = self.read_data()?;
        self.taken(digest)
    }

    /// Reads up to the line of a lone dot and takes the stuffed dots out (RFC 5321 §4.5.2).
    fn read_data(&mut self) -> Result<Digest> {
        let mut digest = MessageDigest::new();
        let mut line = Vec::new();
        loop {
            line.clear();
            // Only CRLF ends a line: after a bare LF the same line goes on.
            while !line.ends_with(b"\r\n") {
                if self.input.read_until(b'\n', &mut line)? == 0 {
                    bail!("closed in the middle of a message");
                }
            }
            match line.strip_prefix(b".") {
                Some(b"\r\n") => return Ok(digest.finish()),
                Some(rest) => digest.update(rest),
                None => digest.update(&line),
            }
        }
    }

    fn bdat(&mut self, rest: &str) -> Result<()> {
        let mut words = rest.split_whitespace();
        let Some(length) = words.next().and_then(|word| word.parse::<usize>().ok()) else {
            self.say("501 5.5.4 BDAT length\r\n")?;
            bail!("what follows cannot be told from commands");
        };
        let last = words
            .next()
            .is_some_and(|word| word.eq_ignore_ascii_case("LAST"));
        let mut chunk = vec![0; length];
        self.input.read_exact(&mut chunk)?;
        let Some(envelope) = self
            .envelope
            .as_mut()
            .filter(|envelope| !envelope.to.is_empty())
        else {
            return self.say("503 5.5.1 MAIL and RCPT first\r\n");
        };
        envelope
            .chunks
            .get_or_insert_with(Chunks::new)
            .update(&chunk);
        if !last {
            return self.say("250 2.0.0 more\r\n");
        }
        match envelope.chunks.take() {
            Some(chunks) => self.taken(chunks.finish()),
            None => Ok(()),
        }
    }

    fn taken(&mut self, digest: Digest) -> Result<()> {
        let envelope = self.envelope.take().unwrap_or_default();
        self.sink.write(&Event::Message(Arrival {
            member: self.sink.options.name.clone(),
            port: self.listen.port,
            peer: Some(self.peer),
            tls: self.input.get_ref().tls().map(|tls| tls.version.clone()),
            helo: self.helo.clone(),
            from: envelope.from,
            to: envelope.to,
            id: mail::id_of(&digest.head),
            size: digest.size,
            sha256: Some(digest.whole),
            body_sha256: digest.body,
        }));
        let reply = format!("250 2.0.0 {} took it\r\n", self.sink.options.name);
        self.say(&reply)
    }

    fn fault(&self, what: &str) {
        self.sink.write(&Event::Fault {
            member: self.sink.options.name.clone(),
            peer: self.peer,
            what: what.to_owned(),
        });
    }

    fn say(&mut self, reply: &str) -> Result<()> {
        let wire = self.input.get_mut();
        wire.write_all(reply.as_bytes())?;
        wire.flush()?;
        Ok(())
    }
}

/// `<address>` behind `FROM:` or `TO:`, whatever parameters follow.
fn path(rest: &str, keyword: &str) -> Option<String> {
    let head = rest.get(..keyword.len())?;
    let rest = head
        .eq_ignore_ascii_case(keyword)
        .then(|| rest[keyword.len()..].trim_start())?;
    let (path, _) = rest.strip_prefix('<')?.split_once('>')?;
    Some(path.to_owned())
}

/// A message in pieces that do not end where lines do.
struct Chunks {
    digest: MessageDigest,
    rest: Vec<u8>,
}

impl Chunks {
    fn new() -> Self {
        Self {
            digest: MessageDigest::new(),
            rest: Vec::new(),
        }
    }

    fn update(&mut self, chunk: &[u8]) {
        self.rest.extend_from_slice(chunk);
        while !self.digest.in_body()
            && let Some(end) = self.rest.windows(2).position(|two| two == b"\r\n")
        {
            let line: Vec<u8> = self.rest.drain(..end + 2).collect();
            self.digest.update(&line);
        }
        if self.digest.in_body() {
            self.digest.update(&self.rest);
            self.rest.clear();
        }
    }

    fn finish(mut self) -> Digest {
        self.digest.update(&self.rest);
        self.digest.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_come_without_their_parameters() {
        assert_eq!(path("FROM:<a@b> SIZE=3", "FROM:").as_deref(), Some("a@b"));
        assert_eq!(path("to: <c@d>", "TO:").as_deref(), Some("c@d"));
        assert_eq!(path("FROM:<>", "FROM:").as_deref(), Some(""));
        assert_eq!(path("a@b", "FROM:"), None);
    }

    #[test]
    fn chunks_cut_anywhere_give_the_same_digest() {
        let text = b"Message-ID: <x@y>\r\nA: b\r\n\r\n.dots stay\r\nend\r\n";
        let whole = mail::digest::of_message(text);
        for cut in 0..text.len() {
            let mut chunks = Chunks::new();
            chunks.update(&text[..cut]);
            chunks.update(&text[cut..]);
            assert_eq!(chunks.finish(), whole, "cut at {cut}");
        }
    }
}
