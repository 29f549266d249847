//! A mail server that takes everything, forgets nothing, and writes one line of JSON per event.

mod session;

use std::{
    fs::{self, File},
    io::Write as _,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    str::FromStr,
    sync::{Arc, Mutex},
    thread,
};

use anyhow::{Context, Result};
use rustls::ServerConfig;
use serde::{Deserialize, Serialize};

/// When a listener speaks TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Never.
    Plain,
    /// From the first byte.
    Implicit,
    /// When the client asks (RFC 3207).
    Starttls,
}

/// Where a sink listens: `plain:25` or `implicit:465`, on every address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listen {
    /// When it speaks TLS.
    pub mode: Mode,
    /// The port.
    pub port: u16,
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fault = || format!("`{text}` is not MODE:PORT with plain, implicit or starttls");
        let (mode, port) = text.split_once(':').ok_or_else(fault)?;
        Ok(Self {
            mode: clap::ValueEnum::from_str(mode, true).map_err(|_| fault())?,
            port: port.parse().map_err(|_| fault())?,
        })
    }
}

/// What a sink is told.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// The name in the greeting and in each event
    #[arg(long)]
    pub name: String,
    /// Where to listen: plain:25, implicit:465, starttls:587
    #[arg(long, required = true)]
    pub listen: Vec<Listen>,
    /// The certificate, PEM
    #[arg(long, requires = "key")]
    pub cert: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long, requires = "cert")]
    pub key: Option<PathBuf>,
    /// Where events go, one JSON object per line
    #[arg(long)]
    pub out: PathBuf,
    /// What the reply to EHLO announces
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "PIPELINING,SIZE 52428800,8BITMIME,CHUNKING,SMTPUTF8,DSN,ENHANCEDSTATUSCODES"
    )]
    pub extensions: Vec<String>,
}

/// Something that happened at a sink.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event {
    /// A connection was accepted.
    Connect {
        /// The sink's name.
        member: String,
        /// The port it was on.
        port: u16,
        /// Who connected.
        peer: SocketAddr,
    },
    /// A message was taken; written down before the client is told so.
    Message(Arrival),
    /// The client broke a rule that matters to a test.
    Fault {
        /// The sink's name.
        member: String,
        /// Who it was.
        peer: SocketAddr,
        /// What it did.
        what: String,
    },
}

/// A message that was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// Who took it.
    pub member: String,
    /// On which port.
    pub port: u16,
    /// Who brought it.
    pub peer: Option<SocketAddr>,
    /// TLS version, absent when it came in plaintext.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<String>,
    /// The name said in EHLO or HELO.
    pub helo: String,
    /// Reverse path.
    pub from: String,
    /// Forward paths.
    pub to: Vec<String>,
    /// From its Message-ID.
    pub id: Option<String>,
    /// Bytes; 0 where a server's own header lines came on top.
    pub size: u64,
    /// SHA-256 of every byte; absent where a server added header lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// SHA-256 of the body.
    pub body_sha256: String,
}

/// Serves until the process ends; prints a line starting with `ready` once it listens.
///
/// # Errors
/// When it cannot listen, or certificate and key are of no use.
pub fn serve(options: Options) -> Result<()> {
    let tls = match (&options.cert, &options.key) {
        (Some(cert), Some(key)) => Some(crate::wire::server_config(cert, key)?),
        _ => None,
    };
    let out = File::options()
        .create(true)
        .append(true)
        .open(&options.out)
        .with_context(|| format!("cannot open {}", options.out.display()))?;
    let listens = options.listen.clone();
    let sink = Arc::new(Sink {
        options,
        tls,
        out: Mutex::new(out),
    });
    let mut acceptors = Vec::new();
    for listen in listens {
        // `[::]` takes IPv4 too.
        let address = SocketAddr::from(([0u16; 8], listen.port));
        let listener =
            TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
        let sink = Arc::clone(&sink);
        acceptors.push(thread::spawn(move || sink.accept(&listener, listen)));
    }
    println!("ready: {}", sink.options.name);
    for acceptor in acceptors {
        let _ = acceptor.join();
    }
    Ok(())
}

/// What the sessions of a sink share.
struct Sink {
    options: Options,
    tls: Option<Arc<ServerConfig>>,
    out: Mutex<File>,
}

impl Sink {
    fn accept(self: &Arc<Self>, listener: &TcpListener, listen: Listen) {
        while let Ok((tcp, peer)) = listener.accept() {
            let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
            let sink = Arc::clone(self);
            // Without a thread there is nobody to answer; the connection closes, as on any busy server.
            let _ = thread::Builder::new().stack_size(256 << 10).spawn(move || {
                sink.write(&Event::Connect {
                    member: sink.options.name.clone(),
                    port: listen.port,
                    peer,
                });
                // A client that goes away in the middle is everyday life for a mail server.
                let _ = session::run(&sink, listen, tcp, peer);
            });
        }
    }

    /// One write per line, so that a sink that is killed leaves whole lines.
    fn write(&self, event: &Event) {
        let Ok(mut line) = serde_json::to_vec(event) else {
            return;
        };
        line.push(b'\n');
        let mut out = self
            .out
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let _ = out.write_all(&line);
    }
}

/// Reads what a sink wrote; a line that is not there yet in full is left out.
///
/// # Errors
/// When the file cannot be read, or holds something else.
pub fn read_events(out: &Path) -> Result<Vec<Event>> {
    let text = fs::read_to_string(out).with_context(|| format!("cannot read {}", out.display()))?;
    text.split_inclusive('\n')
        .filter(|line| line.ends_with('\n'))
        .map(|line| serde_json::from_str(line).with_context(|| format!("not an event: {line}")))
        .collect()
}
