//! A mail client for tests: sends messages that can be told apart, and says what became of each.

mod load;
mod session;

use std::{
    net::SocketAddr,
    num::NonZeroUsize,
    path::PathBuf,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::Duration,
};

use anyhow::Result;
use rustls::ClientConfig;
use serde::{Deserialize, Serialize};

pub use self::{
    load::{Held, Storm, StormReport},
    session::{Refusal, Session, stuffed},
};
use crate::{
    certs,
    mail::{Message, Sizes, digest},
    wait::pause,
};

/// When the client wants TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Never.
    Plain,
    /// By STARTTLS; without it nothing is sent.
    Starttls,
    /// From the first byte.
    Implicit,
}

/// What to send, and how.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Address and port of the server
    #[arg(long)]
    pub server: SocketAddr,
    /// When to use TLS
    #[arg(long, value_enum, default_value = "plain")]
    pub mode: Mode,
    /// How many messages
    #[arg(long, default_value_t = 1)]
    pub count: usize,
    /// `mixed`, or bytes
    #[arg(long, default_value = "mixed", value_parser = Sizes::from_str)]
    pub sizes: Sizes,
    /// The same seed gives the same messages
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Begins each message's id, so that several runs can be told apart
    #[arg(long, default_value = "run")]
    pub run: String,
    /// Connections side by side
    #[arg(long, default_value_t = 1)]
    pub concurrency: usize,
    /// Messages per connection
    #[arg(long, default_value_t = 10)]
    pub per_session: usize,
    /// Send MAIL, RCPT and DATA in one go where the server allows it (RFC 2920)
    #[arg(long)]
    pub pipelining: bool,
    /// Send messages by BDAT (RFC 3030) in chunks of so many bytes; a server without CHUNKING gets nothing
    #[arg(long)]
    pub chunk: Option<NonZeroUsize>,
    /// Try again this often after a 4yz reply or a lost connection, as mail servers do
    #[arg(long, default_value_t = 0)]
    pub retry: u32,
    /// The authority to trust, PEM
    #[arg(long, required_if_eq_any = [("mode", "starttls"), ("mode", "implicit")])]
    pub ca: Option<PathBuf>,
    /// The name that the certificate has to be for
    #[arg(long, default_value = certs::MAIL_NAME)]
    pub name: String,
    /// The name to say in EHLO
    #[arg(long, default_value = "client.lab.example")]
    pub helo: String,
    /// Say EHLO without a name before, which is refused
    #[arg(long)]
    pub stumble: bool,
}

impl Options {
    /// One message in plaintext; the start for tests that change a few fields.
    pub fn to(server: SocketAddr) -> Self {
        Self {
            server,
            mode: Mode::Plain,
            count: 1,
            sizes: Sizes::Exactly(2_000),
            seed: 1,
            run: "run".to_owned(),
            concurrency: 1,
            per_session: 10,
            pipelining: false,
            chunk: None,
            stumble: false,
            retry: 0,
            ca: None,
            name: certs::MAIL_NAME.to_owned(),
            helo: "client.lab.example".to_owned(),
        }
    }
}

/// What became of one message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// From its Message-ID.
    pub id: String,
    /// Bytes.
    pub size: u64,
    /// SHA-256 of every byte.
    pub sha256: String,
    /// SHA-256 of the body.
    pub body_sha256: String,
    /// Whether the server said that it took it.
    pub ok: bool,
    /// The server's last word, or why there was none.
    pub reply: String,
    /// How often it was tried.
    pub attempts: u32,
    /// TLS version, absent in plaintext.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<String>,
    /// SHA-256 of the server's certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// First line of the server's greeting.
    pub greeting: String,
}

/// Sends everything; hands each outcome to `done` as it comes.
///
/// # Errors
/// When the authority's file is of no use. What goes wrong with a message is its outcome.
pub fn send(options: &Options, done: impl Fn(Outcome) + Sync) -> Result<()> {
    let tls = match &options.ca {
        Some(ca) => Some(crate::wire::client_config(ca)?),
        None => None,
    };
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..options.concurrency.max(1) {
            scope.spawn(|| {
                let mut sender = Sender {
                    options,
                    tls: tls.clone(),
                    session: None,
                };
                loop {
                    let number = next.fetch_add(1, Relaxed);
                    if number >= options.count {
                        break;
                    }
                    done(sender.send(number));
                }
                sender.close();
            });
        }
    });
    Ok(())
}

/// As [`send`], for callers that want all outcomes at once.
///
/// # Errors
/// As [`send`].
pub fn send_all(options: &Options) -> Result<Vec<Outcome>> {
    let outcomes = std::sync::Mutex::new(Vec::with_capacity(options.count));
    send(options, |outcome| {
        outcomes
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .push(outcome);
    })?;
    Ok(outcomes
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// One connection after the other.
struct Sender<'a> {
    options: &'a Options,
    tls: Option<Arc<ClientConfig>>,
    session: Option<(Session, usize)>,
}

impl Sender<'_> {
    fn send(&mut self, number: usize) -> Outcome {
        let message = Message::new(
            &self.options.run,
            number,
            self.options.sizes,
            self.options.seed,
        );
        let text = message.text();
        let digest = digest::of_message(&text);
        let mut outcome = Outcome {
            id: message.id,
            size: digest.size,
            sha256: digest.whole,
            body_sha256: digest.body,
            ok: false,
            reply: String::new(),
            attempts: 0,
            tls: None,
            certificate: None,
            greeting: String::new(),
        };
        loop {
            outcome.attempts += 1;
            let refusal = match self.attempt(&text, &mut outcome) {
                Ok(reply) => {
                    outcome.ok = true;
                    outcome.reply = reply;
                    return outcome;
                }
                Err(refusal) => refusal,
            };
            self.session = None;
            outcome.reply = refusal.to_string();
            if !refusal.is_temporary() || outcome.attempts > self.options.retry {
                return outcome;
            }
            // Mail servers wait minutes; what matters here is that it is another connection, a little later.
            pause(Duration::from_millis(
                50 * u64::from(outcome.attempts.min(20)),
            ));
        }
    }

    fn attempt(&mut self, text: &[u8], outcome: &mut Outcome) -> Result<String, Refusal> {
        let (session, sent) = match &mut self.session {
            Some(open) => open,
            none => none.insert((Session::open(self.options, self.tls.as_ref())?, 0)),
        };
        session.greeting().clone_into(&mut outcome.greeting);
        outcome.tls = session.tls().map(|tls| tls.version.clone());
        outcome.certificate = session.tls().and_then(|tls| tls.peer_certificate.clone());
        let reply = match self.options.chunk {
            Some(size) => session.send_chunks(text, size, self.options.pipelining)?,
            None => session.send(text, self.options.pipelining)?,
        };
        *sent += 1;
        if *sent >= self.options.per_session {
            self.close();
        }
        Ok(reply)
    }

    fn close(&mut self) {
        if let Some((session, _)) = self.session.take() {
            session.quit();
        }
    }
}
