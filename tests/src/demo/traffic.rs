//! The mail of the demo: who sends what to which port, with which program.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread,
};

use anyhow::{Context, Result};

use crate::{
    client::{self, Mode, Options, Outcome},
    lab::{Family, Host, Lab},
    mail::{Message, Sizes},
    member::Site,
    program::{Errand, Program},
};

/// One kind of traffic; each is sent over IPv4 and over IPv6.
struct Kind {
    port: u16,
    mode: Mode,
    /// Messages of our own client, per family.
    count: usize,
}

const KINDS: [Kind; 4] = [
    Kind {
        port: 465,
        mode: Mode::Implicit,
        count: 150,
    },
    Kind {
        port: 587,
        mode: Mode::Starttls,
        count: 100,
    },
    Kind {
        port: 25,
        mode: Mode::Plain,
        count: 50,
    },
    Kind {
        port: 25,
        mode: Mode::Starttls,
        count: 50,
    },
];

/// How often a message is tried that a dying member did not take. A mail server would go on for days.
const RETRIES: u32 = 40;

/// A message and how it was sent.
#[derive(Debug, Clone)]
pub(super) struct Sent {
    /// Where to.
    pub(super) server: SocketAddr,
    /// How.
    pub(super) mode: Mode,
    /// `c1`, `c2`
    pub(super) client: String,
    /// `smtplb-send`, `curl`, …
    pub(super) program: &'static str,
    /// What became of it.
    pub(super) outcome: Outcome,
}

/// How many messages there will be.
pub(super) fn planned() -> usize {
    let programs = |kind: &Kind| {
        Program::ALL
            .iter()
            .filter(|program| program.can(kind.mode))
            .count()
    };
    KINDS
        .iter()
        .map(|kind| Family::ALL.len() * (kind.count + programs(kind)))
        .sum()
}

/// All of it.
pub(super) struct Errands<'a> {
    lab: &'a Lab,
    ca: PathBuf,
    mail: PathBuf,
}

impl<'a> Errands<'a> {
    /// # Errors
    /// When there is no room for the messages.
    pub(super) fn new(lab: &'a Lab, site: &Site) -> Result<Self> {
        let mail = lab.folder().join("mail");
        std::fs::create_dir_all(&mail)
            .with_context(|| format!("cannot make {}", mail.display()))?;
        Ok(Self {
            lab,
            ca: site.ca.clone(),
            mail,
        })
    }

    /// Sends every kind over both families side by side; clients take turns.
    ///
    /// # Errors
    /// When a program cannot be run at all.
    pub(super) fn run(&self, sent: &Mutex<Vec<Sent>>) -> Result<()> {
        thread::scope(|scope| {
            let mut running = Vec::new();
            for (at, kind) in KINDS.iter().enumerate() {
                for family in Family::ALL {
                    let client = &self.lab.clients
                        [(at + usize::from(family == Family::V6)) % self.lab.clients.len()];
                    running.push(scope.spawn(move || self.send(kind, family, client, sent)));
                }
            }
            running
                .into_iter()
                .try_for_each(|thread| thread.join().ok().context("a client panicked")?)
        })
    }

    /// Our own client and everybody's programs, side by side.
    fn send(
        &self,
        kind: &Kind,
        family: Family,
        client: &Host,
        sent: &Mutex<Vec<Sent>>,
    ) -> Result<()> {
        let server = SocketAddr::new(family.virtual_address(), kind.port);
        let note = |program, outcome| {
            sent.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(Sent {
                    server,
                    mode: kind.mode,
                    client: client.name.clone(),
                    program,
                    outcome,
                });
        };
        let options = Options {
            mode: kind.mode,
            count: kind.count,
            sizes: Sizes::MixedUpTo(5_000_000),
            run: run_name("send", kind, server.ip()),
            concurrency: 2,
            per_session: 4,
            pipelining: true,
            retry: RETRIES,
            ca: Some(self.ca.clone()),
            helo: format!("{}.lab.example", client.name),
            ..Options::to(server)
        };
        thread::scope(|scope| {
            let own = scope.spawn(|| {
                let send = || client::send(&options, |outcome| note("smtplb-send", outcome));
                client.namespace.enter(send)
            });
            for program in Program::ALL
                .into_iter()
                .filter(|program| program.can(kind.mode))
            {
                note(program.name(), self.by(program, kind, server, client)?);
            }
            own.join().ok().context("a client panicked")?
        })
    }

    /// One message by a program that everybody has; tried again as a person would.
    fn by(
        &self,
        program: Program,
        kind: &Kind,
        server: SocketAddr,
        client: &Host,
    ) -> Result<Outcome> {
        let folder: &Path = &self.mail;
        let errand = Errand {
            from: &client.namespace,
            server,
            mode: kind.mode,
            ca: &self.ca,
            folder,
        };
        let message = Message::new(
            &run_name(program.name(), kind, server.ip()),
            0,
            Sizes::Exactly(50_000),
            1,
        );
        let mut tries = 1;
        loop {
            let mut outcome = errand.send(program, &message)?;
            outcome.attempts = tries;
            if outcome.ok || tries == 3 {
                return Ok(outcome);
            }
            tries += 1;
        }
    }
}

/// Unique within a demo, and fit for a file's name.
fn run_name(program: &str, kind: &Kind, address: IpAddr) -> String {
    let family = if address.is_ipv4() { "v4" } else { "v6" };
    format!("{program}-{}-{:?}-{family}", kind.port, kind.mode).to_lowercase()
}
