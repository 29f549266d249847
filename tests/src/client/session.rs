//! One SMTP connection, from the client's side.

use std::{
    fmt,
    io::{self, BufRead, BufReader, Write as _},
    net::TcpStream,
    num::NonZeroUsize,
    sync::Arc,
    time::Duration,
};

use rustls::ClientConfig;

use super::{Mode, Options};
use crate::wire::{Tls, Wire};

/// Longer than any pause of the lab; a hang is a failure, and this ends it.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Why a message did not get through.
#[derive(Debug)]
pub enum Refusal {
    /// A reply other than the awaited one.
    Reply {
        /// What it was the answer to.
        to: &'static str,
        /// All of it.
        reply: String,
    },
    /// The connection did not open, broke, or stood still.
    Connection {
        /// What was being done.
        at: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// TLS did not come about.
    Tls(String),
}

impl Refusal {
    /// Whether a mail server would try again.
    pub fn is_temporary(&self) -> bool {
        match self {
            Self::Reply { reply, .. } => reply.starts_with('4'),
            Self::Connection { .. } => true,
            Self::Tls(_) => false,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reply { to, reply } => write!(f, "{to}: {}", reply.trim_end()),
            Self::Connection { at, error } => write!(f, "{at}: {error}"),
            Self::Tls(what) => write!(f, "TLS: {what}"),
        }
    }
}

impl std::error::Error for Refusal {}

type Outcome<T> = Result<T, Refusal>;

/// An open connection, past EHLO and, where wanted, TLS.
pub struct Session {
    input: BufReader<Wire>,
    greeting: String,
    capabilities: Vec<String>,
}

impl Session {
    /// Connects, and goes on until mail can be sent.
    ///
    /// # Errors
    /// When it does not come that far.
    pub fn open(options: &Options, tls: Option<&Arc<ClientConfig>>) -> Outcome<Self> {
        let tcp = TcpStream::connect_timeout(&options.server, TIMEOUT).map_err(at("connect"))?;
        tcp.set_read_timeout(Some(TIMEOUT)).map_err(at("connect"))?;
        tcp.set_write_timeout(Some(TIMEOUT))
            .map_err(at("connect"))?;
        let mut wire = Wire::plain(tcp).map_err(at("connect"))?;
        if options.mode == Mode::Implicit {
            wire = shake(wire, options, tls)?;
        }
        let mut session = Self {
            input: BufReader::new(wire),
            greeting: String::new(),
            capabilities: Vec::new(),
        };
        session.greeting = session.expect("greeting", '2')?;
        if options.stumble {
            session.command("EHLO without a name", "EHLO", '5')?;
        }
        session.ehlo(&options.helo)?;
        if options.mode == Mode::Starttls {
            if !session.can("STARTTLS") {
                return Err(Refusal::Tls("STARTTLS is not offered".to_owned()));
            }
            session.command("STARTTLS", "STARTTLS", '2')?;
            if !session.input.buffer().is_empty() {
                return Err(Refusal::Tls(
                    "bytes behind the reply to STARTTLS".to_owned(),
                ));
            }
            let wire = shake(session.input.into_inner(), options, tls)?;
            session.input = BufReader::new(wire);
            // What was said before TLS does not count any more (RFC 3207 §4.2).
            session.ehlo(&options.helo)?;
        }
        Ok(session)
    }

    /// First line of the greeting.
    pub fn greeting(&self) -> &str {
        self.greeting.lines().next().unwrap_or_default()
    }

    /// What the last EHLO announced, one keyword with its parameters each.
    pub fn capabilities(&self) -> &[String] {
        &self.capabilities
    }

    /// What TLS came to.
    pub fn tls(&self) -> Option<&Tls> {
        self.input.get_ref().tls()
    }

    /// Sends one message and returns the reply that took it.
    ///
    /// # Errors
    /// When it was not taken.
    pub fn send(&mut self, text: &[u8], pipelining: bool) -> Outcome<String> {
        let mut commands = envelope();
        commands.push(Step::new("DATA", b"DATA\r\n", '3'));
        self.run(&commands, pipelining)?;
        self.write(&stuffed(text), "message")?;
        self.expect("end of message", '2')
    }

    /// Sends one message by BDAT and returns the reply that took it (RFC 3030 §2).
    ///
    /// # Errors
    /// When it was not taken, or the server does not offer CHUNKING.
    pub fn send_chunks(
        &mut self,
        text: &[u8],
        size: NonZeroUsize,
        pipelining: bool,
    ) -> Outcome<String> {
        if !self.can("CHUNKING") {
            return Err(Refusal::Reply {
                to: "EHLO",
                reply: "500 CHUNKING is not offered".to_owned(),
            });
        }
        let mut commands = envelope();
        let count = text.len().div_ceil(size.get());
        for (number, chunk) in text.chunks(size.get()).enumerate() {
            let last = if number + 1 == count { " LAST" } else { "" };
            let mut bytes = format!("BDAT {}{last}\r\n", chunk.len()).into_bytes();
            bytes.extend_from_slice(chunk);
            commands.push(Step::new("BDAT", &bytes, '2'));
        }
        self.run(&commands, pipelining)
    }

    /// Sends commands one by one, or in one go where the server allows it, and returns the last reply.
    fn run(&mut self, steps: &[Step], pipelining: bool) -> Outcome<String> {
        let together = pipelining && self.can("PIPELINING");
        if together {
            let all: Vec<u8> = steps.iter().flat_map(|step| step.bytes.clone()).collect();
            self.write(&all, "commands in one go")?;
        }
        let mut reply = String::new();
        for step in steps {
            if !together {
                self.write(&step.bytes, step.name)?;
            }
            reply = self.expect(step.name, step.good)?;
        }
        Ok(reply)
    }

    /// Asks for a sign of life.
    ///
    /// # Errors
    /// When there is none.
    pub fn noop(&mut self) -> Outcome<String> {
        self.command("NOOP", "NOOP", '2')
    }

    /// Says goodbye; whether that is heard does not matter.
    pub fn quit(mut self) {
        let _ = self.command("QUIT", "QUIT", '2');
    }

    /// Sends a line and returns the reply, which has to begin with `good`.
    ///
    /// # Errors
    /// When it does not.
    pub fn command(&mut self, name: &'static str, line: &str, good: char) -> Outcome<String> {
        self.write(format!("{line}\r\n").as_bytes(), name)?;
        self.expect(name, good)
    }

    fn ehlo(&mut self, helo: &str) -> Outcome<()> {
        let reply = self.command("EHLO", &format!("EHLO {helo}"), '2')?;
        self.capabilities = reply
            .lines()
            .skip(1)
            .filter_map(|line| Some(line.get(4..)?.to_owned()))
            .collect();
        Ok(())
    }

    fn can(&self, keyword: &str) -> bool {
        self.capabilities.iter().any(|line| {
            line.split(' ')
                .next()
                .is_some_and(|word| word.eq_ignore_ascii_case(keyword))
        })
    }

    fn write(&mut self, bytes: &[u8], name: &'static str) -> Outcome<()> {
        let wire = self.input.get_mut();
        let outcome = wire.write_all(bytes).and_then(|()| wire.flush());
        // A server that refuses in the middle says why before it closes, and that is worth more than the error.
        match outcome {
            Ok(()) => Ok(()),
            Err(error) => match self.reply() {
                Ok(reply) if !reply.is_empty() => Err(Refusal::Reply { to: name, reply }),
                _ => Err(at(name)(error)),
            },
        }
    }

    fn expect(&mut self, name: &'static str, good: char) -> Outcome<String> {
        let reply = self.reply().map_err(at(name))?;
        if reply.starts_with(good) {
            Ok(reply)
        } else {
            Err(Refusal::Reply { to: name, reply })
        }
    }

    /// The next reply with all its lines.
    fn reply(&mut self) -> io::Result<String> {
        let mut reply = String::new();
        loop {
            let start = reply.len();
            if self.input.read_line(&mut reply)? == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "closed by the server",
                ));
            }
            if reply.as_bytes().get(start + 3) != Some(&b'-') {
                return Ok(reply);
            }
        }
    }
}

/// A command, with what follows it.
struct Step {
    name: &'static str,
    bytes: Vec<u8>,
    /// How a reply begins that lets the message go on.
    good: char,
}

impl Step {
    fn new(name: &'static str, bytes: &[u8], good: char) -> Self {
        Self {
            name,
            bytes: bytes.to_vec(),
            good,
        }
    }
}

fn envelope() -> Vec<Step> {
    vec![
        Step::new("MAIL", b"MAIL FROM:<sender@lab.example>\r\n", '2'),
        Step::new("RCPT", b"RCPT TO:<inbox@lab.example>\r\n", '2'),
    ]
}

fn shake(wire: Wire, options: &Options, tls: Option<&Arc<ClientConfig>>) -> Outcome<Wire> {
    let config = tls.ok_or_else(|| Refusal::Tls("no authority to trust".to_owned()))?;
    wire.connect_tls(config, &options.name)
        .map_err(|error| match error.downcast::<io::Error>() {
            // A lost connection is tried again, a certificate that does not fit is not.
            Ok(error) if error.kind() != io::ErrorKind::InvalidData => at("TLS handshake")(error),
            Ok(error) => Refusal::Tls(error.to_string()),
            Err(error) => Refusal::Tls(format!("{error:#}")),
        })
}

fn at(name: &'static str) -> impl Fn(io::Error) -> Refusal {
    move |error| Refusal::Connection { at: name, error }
}

/// With a second dot where a line begins with one, and the closing line (RFC 5321 §4.5.2).
pub fn stuffed(text: &[u8]) -> Vec<u8> {
    let mut stuffed = Vec::with_capacity(text.len() + text.len() / 500 + 8);
    let mut rest = text;
    while !rest.is_empty() {
        if rest.starts_with(b".") {
            stuffed.push(b'.');
        }
        // As many lines at once as go without a dot in front.
        let end = next_dotted_line(rest).unwrap_or(rest.len());
        stuffed.extend_from_slice(&rest[..end]);
        rest = &rest[end..];
    }
    stuffed.extend_from_slice(b".\r\n");
    stuffed
}

/// Where the next line that begins with a dot starts, the first line left aside.
fn next_dotted_line(text: &[u8]) -> Option<usize> {
    let mut from = 0;
    while let Some(found) = text[from..].iter().position(|byte| *byte == b'\n') {
        from += found + 1;
        if text.get(from) == Some(&b'.') {
            return Some(from);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_in_front_are_doubled() {
        assert_eq!(
            stuffed(b".\r\na\r\n..b\r\nc.\r\n"),
            b"..\r\na\r\n...b\r\nc.\r\n.\r\n"
        );
        assert_eq!(stuffed(b""), b".\r\n");
    }
}
