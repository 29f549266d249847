//! `cargo xtask demo`: the main job on a lab, with real mail, and a member that dies in the middle.

mod report;
mod traffic;

use std::{
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use self::{
    report::{Mishap, Report},
    traffic::Sent,
};
use crate::{
    daemon::{self, Daemon, config::Config},
    lab::{self, Lab, Plan},
    member::{Mta, Site},
    verify::Balance,
    wait::{wait_for, wait_until},
};

/// What the demo is told.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Options {
    /// What plays the members
    #[arg(long, value_enum, default_value = "sink")]
    pub mta: Mta,
    /// Print what happened as JSON
    #[arg(long)]
    pub json: bool,
    /// Leave the lab up and say how to enter it
    #[arg(long)]
    pub keep: bool,
    /// Take down what `--keep` left
    #[arg(long)]
    pub clean: bool,
}

/// The member that dies.
const VICTIM: usize = 1;

/// Runs it; true when every message arrived exactly once and intact, and everything else was as it should.
///
/// # Errors
/// When the lab, the mail servers or the daemon do not start, or one of them does not answer.
pub fn run(options: &Options) -> Result<bool> {
    if options.clean {
        eprintln!("demo: {} labs removed", lab::remove_leftovers(true));
        return Ok(true);
    }
    let mut lab = Lab::build(Plan::TWO_ARM)?;
    let even = show(&lab, options).inspect_err(|_| eprintln!("{}", lab.report()))?;
    if options.keep {
        lab.keep()?;
        say_how_to_enter(&lab)?;
    }
    Ok(even)
}

fn show(lab: &Lab, options: &Options) -> Result<bool> {
    eprintln!("demo: the lab is up: 2 clients, the box, 3 members, each a network namespace");
    let mut site = Site::start(lab, options.mta)?;
    let config = Config::site(lab, "auto", &site.certificate);
    let mut daemon = Daemon::start(lab, config.text())?;
    daemon.wait_for_checked()?;
    eprintln!(
        "demo: smtplb serves; 465 through the kernel, 587 and 25 through the proxy, IPv4 and IPv6"
    );

    let sent = Mutex::new(Vec::new());
    let mishap = carry(lab, &mut site, &daemon, &sent)?;
    let sent = sent.into_inner().unwrap_or_else(PoisonError::into_inner);
    let outcomes: Vec<_> = sent
        .iter()
        .map(|sent: &Sent| sent.outcome.clone())
        .collect();

    // A real mail server says yes first and delivers then.
    let _ = wait_until(Duration::from_secs(30), "delivery", || {
        site.arrivals()
            .is_ok_and(|arrivals| Balance::of(&outcomes, &arrivals).is_even())
    });
    let report = Report::new(&site, &daemon, &sent, mishap)?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    if options.keep {
        daemon.keep();
        site.keep();
    } else {
        daemon.stop()?;
    }
    Ok(report.ok)
}

/// Sends everything; in the middle a member dies, and later comes back.
fn carry(
    lab: &Lab,
    site: &mut Site,
    daemon: &Daemon<'_>,
    sent: &Mutex<Vec<Sent>>,
) -> Result<Mishap> {
    let planned = traffic::planned();
    eprintln!(
        "demo: sending {planned} messages; {} dies in the middle",
        lab.members[VICTIM].name
    );
    let errands = traffic::Errands::new(lab, site)?;
    let so_far = || sent.lock().unwrap_or_else(PoisonError::into_inner).len();
    thread::scope(|scope| {
        let clients = scope.spawn(|| errands.run(sent));
        // Nobody is left to wait for when the clients have given up.
        let enough = |part: usize| {
            wait_for(Duration::from_secs(300), "mail to flow", || {
                (so_far() * 100 >= planned * part || clients.is_finished()).then_some(())
            })
        };
        enough(30)?;
        let host = &lab.members[VICTIM];
        let member = &mut site.members[VICTIM];
        member.crash(host)?;
        let (died, died_at) = (Instant::now(), so_far());
        daemon.wait_for_member(&host.name, "down", Duration::from_secs(10))?;
        let noticed = died.elapsed();
        enough(60)?;
        member.revive(host, lab.folder())?;
        let revived = Instant::now();
        daemon.wait_for_member(&host.name, "up", Duration::from_secs(10))?;
        let back = revived.elapsed();
        clients.join().ok().context("a client panicked")??;
        Ok(Mishap {
            member: host.name.clone(),
            died_after: died_at,
            seen_down_ms: millis(noticed),
            seen_up_ms: millis(back),
        })
    })
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn say_how_to_enter(lab: &Lab) -> Result<()> {
    let smtplb = daemon::program()?;
    let socket = daemon::socket(lab);
    let (smtplb, socket) = (smtplb.display(), socket.display());
    eprintln!("\ndemo: the lab stays up.");
    eprintln!(
        "  ip netns exec {} bash                 the box",
        lab.balancer.name()
    );
    for host in lab.clients.iter().chain(&lab.members) {
        eprintln!("  ip netns exec {} bash", host.namespace.name());
    }
    eprintln!("  {smtplb} status --admin {socket}");
    eprintln!("  {smtplb} show flows --admin {socket}");
    eprintln!(
        "  logs, certificates and the configuration: {}",
        lab.folder().display()
    );
    eprintln!("  cargo xtask demo --clean              takes it down");
    Ok(())
}
