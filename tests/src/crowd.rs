//! Many idle sessions in the proxy plane, held while others come and go: none may be lost, and memory stays flat.

use std::{
    fs,
    net::SocketAddr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Resource, getrlimit};

use crate::{
    client::{Mode, Options, Session},
    daemon::{
        Daemon,
        config::{ClientTls, Config, tag},
    },
    echo,
    lab::{Family, Lab, Plan},
    mail::{Message, Sizes},
    member::{Mta, Site},
    wait::{patience, pause, wait_until},
    wire,
};

/// How much.
#[derive(Debug, Clone, Copy)]
pub struct Crowd {
    /// Sessions that do nothing behind STARTTLS and EHLO.
    pub idle: usize,
    /// Others that come in a second, each with one message; fewer where everything takes longer ([`patience`]).
    pub rate: u32,
    /// For how long these come.
    pub time: Duration,
}

/// Threads that open, and that send.
const THREADS: usize = 8;
/// What an idle session may take in the daemon, in KiB.
const IDLE: f64 = 12.0;
/// Room that memory may take beyond what it was when the first messages had passed, in KiB.
const SLACK: u64 = 8 * 1024;
/// Open files beside those of the idle sessions: 1,024 that the daemon keeps for other things than sessions, and two for
/// each of 64 that come or are just going.
const FILES_BESIDE: u64 = 1024 + 2 * 64;

/// Holds the idle ones while the others come and go.
///
/// # Errors
/// Says what was lost, or how memory grew.
pub fn endure(mut crowd: Crowd) -> Result<()> {
    // Sinks inherit it, as the daemon does, which needs two for each session.
    echo::raise_open_files()?;
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let most = usize::try_from(files.saturating_sub(FILES_BESIDE) / 2)?;
    if most < crowd.idle {
        println!(
            "{files} open files are allowed: {most} idle sessions in place of {}",
            crowd.idle
        );
        crowd.idle = most;
    }
    Lab::run(Plan::TWO_ARM, |lab| {
        let site = Site::start(lab, Mta::Sink)?;
        let daemon = Daemon::start(lab, config(lab, &site).text())?;
        daemon.wait_for_checked()?;
        for client in &lab.clients {
            let range = "net/ipv4/ip_local_port_range";
            client.namespace.sysctl(range, "1024 65535")?;
        }
        let empty = resident(&daemon)?;
        let mut idle = open(lab, &site, crowd.idle)?;
        let full = resident(&daemon)?;
        let came = come_and_go(lab, &daemon, crowd)?;
        let broken: Vec<_> = idle
            .iter_mut()
            .filter_map(|session| session.noop().err().map(|error| error.to_string()))
            .collect();
        let each = full.saturating_sub(empty) as f64 / crowd.idle as f64;
        println!(
            "{} idle sessions took {each:.1} KiB each; {} others came at {:.0}/s; resident KiB: {empty} before, {full} with \
             the idle ones, then {:?}; {} lost",
            crowd.idle,
            came.sent,
            came.sent as f64 / crowd.time.as_secs_f64(),
            came.resident,
            broken.len(),
        );
        if let Some(first) = broken.first() {
            bail!(
                "{} of {} idle sessions were lost: {first}",
                broken.len(),
                crowd.idle
            );
        }
        // A few hundred do not outweigh what the first of them leave behind.
        ensure!(
            crowd.idle < 2_000 || each <= IDLE,
            "an idle one takes {each:.1} KiB"
        );
        let first = came.resident.first().copied().unwrap_or_default();
        let last = came.resident.last().copied().unwrap_or_default();
        ensure!(
            last <= first + first / 10 + SLACK,
            "memory grew from {first} to {last} KiB"
        );
        // Nine of ten, so that a busy machine is no failure; what came at all was taken.
        let rate = f64::from(crowd.rate) / f64::from(patience());
        let expected = rate * crowd.time.as_secs_f64() * 0.9;
        ensure!(
            came.sent as f64 >= expected,
            "{} of {expected} came",
            came.sent
        );
        let arrived = || site.arrivals().map(|all| all.len() as u64);
        let _ = wait_until(Duration::from_secs(30), "delivery", || {
            arrived().is_ok_and(|count| count >= came.sent)
        });
        let arrived = arrived()?;
        ensure!(arrived == came.sent, "{arrived} of {} arrived", came.sent);
        Ok(())
    })
}

fn config(lab: &Lab, site: &Site) -> Config {
    let mut config = Config::new(lab, "tc");
    config.certificate("mail", &site.certificate);
    for family in Family::ALL {
        let name = format!("mx-{}", tag(family));
        let address = family.virtual_address();
        config.pool(lab, &name, family, 25, None);
        config.proxy(&name, address, 587, &name, ClientTls::Require);
        config.proxy(
            &format!("plain-{}", tag(family)),
            address,
            25,
            &name,
            ClientTls::None,
        );
    }
    // Idle longer than RFC 5321 lets them.
    config.raw("[session]\ncommand_timeout = \"2h\"").clone()
}

/// Resident memory of the daemon, in KiB.
fn resident(daemon: &Daemon<'_>) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.id()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.context("no VmRSS")
}

/// Idle sessions of both clients, over both families.
fn open(lab: &Lab, site: &Site, count: usize) -> Result<Vec<Session>> {
    let tls = wire::client_config(&site.ca)?;
    let one = |number: usize| {
        let family = Family::ALL[number / 2 % 2];
        let options = Options {
            mode: Mode::Starttls,
            ca: Some(site.ca.clone()),
            ..Options::to((family.virtual_address(), 587).into())
        };
        Session::open(&options, Some(&tls)).with_context(|| format!("idle session {number}"))
    };
    let some = |thread: usize| {
        let client = &lab.clients[thread % 2].namespace;
        client.enter(|| {
            (thread..count)
                .step_by(THREADS)
                .map(one)
                .collect::<Result<Vec<_>>>()
        })
    };
    thread::scope(|scope| {
        let opening: Vec<_> = (0..THREADS)
            .map(|thread| scope.spawn(move || some(thread)))
            .collect();
        let mut all = Vec::with_capacity(count);
        for thread in opening {
            all.extend(
                thread
                    .join()
                    .unwrap_or_else(|_| bail!("a client panicked"))?,
            );
        }
        Ok(all)
    })
}

/// What became of those that came and went.
struct Came {
    sent: u64,
    /// Ten looks at the daemon's memory, in KiB.
    resident: Vec<u64>,
}

fn come_and_go(lab: &Lab, daemon: &Daemon<'_>, crowd: Crowd) -> Result<Came> {
    const LOOKS: u32 = 10;
    let (sent, failed) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    let over = AtomicBool::new(false);
    let began = Instant::now();
    let gap = Duration::from_secs(1) * patience() / crowd.rate;
    let mut resident_at = Vec::new();
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (sent, failed, over) = (&sent, &failed, &over);
            let client = &lab.clients[thread % 2].namespace;
            scope.spawn(move || {
                let come = || {
                    for number in (thread..).step_by(THREADS) {
                        let due = began + gap * number as u32;
                        if due > began + crowd.time || over.load(Relaxed) {
                            return Ok(());
                        }
                        pause(due.saturating_duration_since(Instant::now()));
                        visit(number)?;
                        sent.fetch_add(1, Relaxed);
                    }
                    Ok(())
                };
                if let Err(error) = client.enter(come) {
                    over.store(true, Relaxed);
                    failed
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push(format!("{error:#}"));
                }
            });
        }
        for look in 1..=LOOKS {
            pause((began + crowd.time * look / LOOKS).saturating_duration_since(Instant::now()));
            if let Ok(kib) = resident(daemon) {
                resident_at.push(kib);
            }
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    ensure!(failed.is_empty(), "new sessions failed: {failed:?}");
    Ok(Came {
        sent: sent.into_inner(),
        resident: resident_at,
    })
}

/// One session with one message.
fn visit(number: usize) -> Result<()> {
    let family = Family::ALL[number / 2 % 2];
    let server: SocketAddr = (family.virtual_address(), 25).into();
    let mut session = Session::open(&Options::to(server), None)?;
    let message = Message::new("crowd", number, Sizes::Exactly(2_000), 1);
    session.send(&message.text(), true)?;
    session.quit();
    Ok(())
}
