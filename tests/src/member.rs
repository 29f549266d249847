//! The members of a lab at work: a mail server on each, and the certificates of the site.

use std::{
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{
    certs::{Authority, CertFiles, KeyKind},
    lab::{Host, Lab},
    postfix::Postfix,
    process::{self, Process},
    sink::{self, Arrival, Event},
    unpacked::{Kind, Unpacked},
    wire,
};

/// What plays a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mta {
    /// Our own: takes everything, quick.
    Sink,
    /// The real thing.
    Postfix,
    /// The one that knows neither PIPELINING nor CHUNKING.
    OpenSmtpd,
    /// The one that minds what comes too early.
    Exim,
}

/// A mail server on a member.
#[derive(Debug)]
enum Server {
    Sink { process: Process, events: PathBuf },
    Postfix(Postfix),
    Unpacked(Unpacked),
}

/// One member and what runs on it.
#[derive(Debug)]
pub struct Member {
    /// As the host is called.
    pub name: String,
    /// SHA-256 of the certificate that it shows.
    pub certificate: String,
    /// Where that certificate and its key lie.
    pub cert: CertFiles,
    server: Server,
}

/// Mail servers and certificates of a lab.
#[derive(Debug)]
pub struct Site {
    /// The authority that clients trust.
    pub ca: PathBuf,
    /// The box's certificate.
    pub certificate: CertFiles,
    /// The same with an RSA key.
    pub certificate_rsa: CertFiles,
    /// m1, m2, m3
    pub members: Vec<Member>,
}

impl Site {
    /// Issues certificates and starts a mail server on each member: 25 in plaintext, 465 with implicit TLS, 587 with
    /// STARTTLS.
    ///
    /// # Errors
    /// When one does not start.
    pub fn start(lab: &Lab, mta: Mta) -> Result<Self> {
        Self::start_mixed(lab, &[mta])
    }

    /// As [`Self::start`], with another server on each member, in turn.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_mixed(lab: &Lab, mtas: &[Mta]) -> Result<Self> {
        let authority = Authority::new(lab.folder())?;
        // Side by side: a Postfix takes its time.
        let members = thread::scope(|scope| {
            let authority = &authority;
            let starting: Vec<_> = lab
                .members
                .iter()
                .zip(mtas.iter().cycle())
                .map(|(host, mta)| {
                    scope.spawn(|| Member::start(host, lab.folder(), *mta, authority))
                })
                .collect();
            starting
                .into_iter()
                .map(|member| {
                    member
                        .join()
                        .unwrap_or_else(|_| bail!("a member's start panicked"))
                })
                .collect::<Result<_>>()
        })?;
        Ok(Self {
            ca: authority.ca(),
            certificate: authority.issue("balancer", KeyKind::Ecdsa)?,
            certificate_rsa: authority.issue("balancer", KeyKind::Rsa)?,
            members,
        })
    }

    /// Everything that has arrived at any member.
    ///
    /// # Errors
    /// When a member's records cannot be read.
    pub fn arrivals(&self) -> Result<Vec<Arrival>> {
        let mut all = Vec::new();
        for member in &self.members {
            all.extend(member.arrivals()?);
        }
        Ok(all)
    }

    /// The name of the member whose certificate this is.
    pub fn owner_of(&self, certificate: &str) -> Option<&str> {
        self.members
            .iter()
            .find(|member| member.certificate == certificate)
            .map(|member| member.name.as_str())
    }

    /// Lets the mail servers run on when the value goes.
    pub fn keep(&mut self) {
        for member in &mut self.members {
            member.process().keep();
        }
    }
}

impl Member {
    fn start(host: &Host, folder: &Path, mta: Mta, authority: &Authority) -> Result<Self> {
        let kind = match mta {
            // An RSA key among them.
            Mta::OpenSmtpd => KeyKind::Rsa,
            Mta::Sink | Mta::Postfix | Mta::Exim => KeyKind::Ecdsa,
        };
        let cert = authority.issue(&host.name, kind)?;
        let server = match mta {
            Mta::Postfix => Server::Postfix(Postfix::start(host, folder, &cert)?),
            Mta::OpenSmtpd => {
                Server::Unpacked(Unpacked::start(Kind::OpenSmtpd, host, folder, &cert)?)
            }
            Mta::Exim => Server::Unpacked(Unpacked::start(Kind::Exim, host, folder, &cert)?),
            Mta::Sink => {
                let events = folder.join(format!("{}.jsonl", host.name));
                Server::Sink {
                    process: start_sink(host, folder, &events, &cert)?,
                    events,
                }
            }
        };
        Ok(Self {
            name: host.name.clone(),
            certificate: wire::fingerprint(&cert.chain)?,
            cert,
            server,
        })
    }

    /// What has arrived here.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub fn arrivals(&self) -> Result<Vec<Arrival>> {
        match &self.server {
            Server::Postfix(postfix) => postfix.arrivals(),
            Server::Unpacked(server) => server.arrivals(),
            Server::Sink { .. } => Ok(self
                .events()?
                .into_iter()
                .filter_map(|event| match event {
                    Event::Message(arrival) => Some(arrival),
                    _ => None,
                })
                .collect()),
        }
    }

    /// What a sink has noted; nothing of a Postfix.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub fn events(&self) -> Result<Vec<Event>> {
        match &self.server {
            Server::Sink { events, .. } => sink::read_events(events),
            Server::Postfix(_) | Server::Unpacked(_) => Ok(Vec::new()),
        }
    }

    /// Ends everything on the host in the middle of whatever it does, as a crash would.
    ///
    /// # Errors
    /// When it is gone already.
    pub fn crash(&mut self, host: &Host) -> Result<()> {
        host.namespace.kill_processes();
        self.process().wait(Duration::from_secs(5)).map(drop)
    }

    /// Starts the mail server again; what it had taken is still there.
    ///
    /// # Errors
    /// When it does not start.
    pub fn revive(&mut self, host: &Host, folder: &Path) -> Result<()> {
        match &mut self.server {
            Server::Sink { process, events } => {
                *process = start_sink(host, folder, events, &self.cert)?
            }
            Server::Postfix(postfix) => *postfix = Postfix::start(host, folder, &self.cert)?,
            Server::Unpacked(_) => bail!("{} cannot be revived", self.name),
        }
        Ok(())
    }

    fn process(&mut self) -> &mut Process {
        match &mut self.server {
            Server::Sink { process, .. } => process,
            Server::Postfix(postfix) => postfix.process(),
            Server::Unpacked(server) => server.process(),
        }
    }
}

fn start_sink(host: &Host, folder: &Path, events: &Path, cert: &CertFiles) -> Result<Process> {
    let log = folder.join(format!("{}.log", host.name));
    let mut command = Command::new(process::own_program("smtplb-sink")?);
    command.args(["--name", &host.name]);
    command.args([
        "--listen",
        "plain:25",
        "--listen",
        "implicit:465",
        "--listen",
        "starttls:587",
    ]);
    command
        .arg("--cert")
        .arg(&cert.chain)
        .arg("--key")
        .arg(&cert.key);
    command.arg("--out").arg(events);
    let mut process = Process::spawn(&host.namespace, &host.name, &log, &mut command)?;
    process
        .wait_for_line(Duration::from_secs(10), 0, "ready")
        .with_context(|| format!("the sink on {}", host.name))?;
    Ok(process)
}
