//! What must harm nobody, again and again, under new connections with payload and under old ones.

use std::{
    net::SocketAddr,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use rustix::process::Signal;

use crate::{
    daemon::{
        Daemon,
        config::{Config, tag},
    },
    echo::{self, Echo, Exchange, Pattern, Traffic},
    lab::{Family, Lab, Links, Namespace, Plan},
    wait::wait_until,
};

/// The port of the virtual servers and of the members.
const PORT: u16 = 465;

/// How hard.
#[derive(Debug, Clone, Copy)]
pub struct Soak {
    /// For how long.
    pub time: Duration,
    /// New connections in a second.
    pub rate: u32,
    /// Old connections, which are used after every disturbance.
    pub held: usize,
}

/// What is done to the daemon, over and over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Disturbance {
    /// `kill -9`, then a new one.
    Kill,
    /// A second daemon is started beside the first.
    Upgrade,
    /// SIGHUP with a changed configuration.
    Reload,
    /// As an upgrade, with the programs at another hook.
    Attach,
}

const DISTURBANCES: [Disturbance; 4] = [
    Disturbance::Kill,
    Disturbance::Upgrade,
    Disturbance::Reload,
    Disturbance::Attach,
];

/// A configuration that carries echo traffic.
pub fn config(lab: &Lab, attach: &str) -> Config {
    let mut config = Config::new(lab, attach);
    for family in Family::ALL {
        let name = format!("smtps-{}", tag(family));
        config.pool(lab, &name, family, PORT, None);
        config.passthrough(&name, family.virtual_address(), PORT, &name, "automap");
    }
    config
}

/// Where echo traffic goes.
pub fn servers() -> Vec<SocketAddr> {
    Family::ALL
        .map(|family| SocketAddr::new(family.virtual_address(), PORT))
        .to_vec()
}

/// An echo server on every member.
///
/// Members take all packets of a connection on one processor, as a network card's receive hash has it. Without that, now and
/// then a member reset a connection whose packets were captured there and right (Linux 6.18); presumably its first payload
/// found no socket while the acknowledgement before it made one on the other processor.
///
/// # Errors
/// When one does not start.
pub fn members(lab: &Lab) -> Result<Vec<Echo>> {
    let processors = std::thread::available_parallelism()?.get().min(63);
    let mask = format!("{:x}", (1u64 << processors) - 1);
    for member in &lab.members {
        let steer = format!(
            "for queue in /sys/class/net/*/queues/rx-*/rps_cpus; do echo {mask} > $queue; done"
        );
        let mut command = Command::new("ip");
        // `/sys` shows the links of the namespace that it was mounted in, which this makes sure of.
        command.args([
            "netns",
            "exec",
            member.namespace.name(),
            "sh",
            "-ec",
            &steer,
        ]);
        lab.balancer.run(&mut command)?;
        // A flood's share of half-open connections must not make members give out SYN cookies of their own.
        member.namespace.sysctl("net/core/somaxconn", "65535")?;
        member
            .namespace
            .sysctl("net/ipv4/tcp_max_syn_backlog", "65535")?;
    }
    lab.members
        .iter()
        .map(|member| Echo::start(lab, member, PORT))
        .collect()
}

/// Kill, upgrade, reload and attach anew, in turn: no connection may break, no byte may change.
///
/// # Errors
/// Says what was harmed, and after what.
pub fn disturb(soak: Soak) -> Result<()> {
    let plan = Plan {
        links: Links::ForXdp,
        ..Plan::TWO_ARM
    };
    Lab::run(plan, |lab| {
        let _members = members(lab)?;
        let hooks = ["tc", "xdp"];
        let mut daemon = Daemon::start(lab, config(lab, hooks[0]).text())?;
        let mut held = Held::open(lab, soak.held)?;
        let traffic = Traffic::start(&lab.clients[0].namespace, &servers(), soak.rate)?;
        let (began, mut done) = (Instant::now(), 0usize);
        while began.elapsed() < soak.time || done < DISTURBANCES.len() {
            let what = DISTURBANCES[done % DISTURBANCES.len()];
            let round = done / DISTURBANCES.len();
            disturb_once(lab, &mut daemon, what, hooks[(round + 1) % 2], round)?;
            done += 1;
            // A second's worth, so that each disturbance meets connections of every age.
            let before = traffic.done();
            let more = u64::from(soak.rate) / 2;
            let goes_on = || !traffic.is_unharmed() || traffic.done() > before + more;
            wait_until(Duration::from_secs(30), "traffic to go on", goes_on)?;
            let broken = held.use_each();
            let harmed = !traffic.is_unharmed() || !broken.is_empty();
            if harmed {
                let report = traffic.stop();
                eprintln!("{}", daemon.report());
                anyhow::bail!(
                    "after {what:?} number {done}: {} of {} old connections broke: {broken:?}; new ones: {report:?}; \
                     not carried: {:?}; resets sent by stacks: {:?}",
                    broken.len(),
                    soak.held,
                    daemon.stats().map(|stats| stats.drops),
                    resets(lab)
                );
            }
        }
        let report = traffic.stop();
        println!(
            "{done} disturbances in {} s: {} connections ({:.0}/s), {} bytes, {} failed; {} old connections unharmed",
            began.elapsed().as_secs(),
            report.done,
            report.rate,
            report.bytes,
            report.failed.len(),
            held.exchanges.len(),
        );
        ensure!(report.failed.is_empty(), "{report:?}");
        held.close()
    })
}

/// How many resets the machines' own stacks have sent, by name: whose they are is half the answer.
fn resets(lab: &Lab) -> Vec<(String, u64)> {
    let sent = |namespace: &Namespace| {
        let text = namespace.enter(|| Ok(std::fs::read_to_string("/proc/thread-self/net/snmp")?));
        let text = text.unwrap_or_default();
        let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
        let [names, values] = [lines.next(), lines.next()].map(|it| it.unwrap_or_default());
        let mut pairs = names.split(' ').zip(values.split(' '));
        let found = pairs.find(|(name, _)| *name == "OutRsts");
        found.and_then(|(_, value)| value.parse().ok()).unwrap_or(0)
    };
    let hosts = lab.clients.iter().chain(&lab.members);
    let hosts = hosts.map(|host| (host.name.to_string(), sent(&host.namespace)));
    std::iter::once(("box".to_owned(), sent(&lab.balancer)))
        .chain(hosts)
        .collect()
}

fn disturb_once(
    lab: &Lab,
    daemon: &mut Daemon<'_>,
    what: Disturbance,
    hook: &str,
    round: usize,
) -> Result<()> {
    match what {
        Disturbance::Kill => {
            daemon.kill()?;
            daemon.start_again()
        }
        Disturbance::Upgrade => daemon.succeed(),
        Disturbance::Reload => {
            let kept = daemon.status()?.kernel.attachments;
            let before = daemon.status()?.generation;
            let other = match kept.first().is_some_and(|at| at.hook == "xdp") {
                true => "xdp",
                false => "tc",
            };
            let mut next = config(lab, other);
            // Something has to be different: a virtual server comes, and goes with the next reload.
            if round.is_multiple_of(2) {
                let pool = format!("smtps-{}", tag(Family::V4));
                let address = Family::V4.virtual_address();
                next.passthrough("another", address, 2525, &pool, "automap");
            }
            daemon.reconfigure(next.text())?;
            daemon.signal(Signal::HUP)?;
            wait_until(Duration::from_secs(20), "the next generation", || {
                daemon
                    .status()
                    .is_ok_and(|status| status.generation > before)
            })
        }
        Disturbance::Attach => {
            daemon.reconfigure(config(lab, hook).text())?;
            daemon.succeed()
        }
    }
}

/// Old connections, from a client of their own.
pub struct Held {
    pattern: Pattern,
    exchanges: Vec<Exchange>,
}

impl Held {
    /// Opens them and uses each once.
    ///
    /// # Errors
    /// When one does not open.
    pub fn open(lab: &Lab, count: usize) -> Result<Self> {
        echo::raise_open_files()?;
        let (pattern, servers) = (Pattern::default(), servers());
        let namespace = &lab.clients[1].namespace;
        namespace.sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
        let exchanges = namespace.enter(|| {
            (0..count)
                .map(|number| {
                    let mut exchange = Exchange::open(servers[number % servers.len()], number)?;
                    exchange.carry(&pattern, 100)?;
                    Ok(exchange)
                })
                .collect::<Result<_>>()
        })?;
        Ok(Self { pattern, exchanges })
    }

    /// Sends something over each; what went wrong, with the first of them.
    pub fn use_each(&mut self) -> Vec<String> {
        let mut broken = Vec::new();
        for exchange in &mut self.exchanges {
            if let Err(error) = exchange.carry(&self.pattern, 500) {
                broken.push(format!("{error:#}"));
            }
        }
        broken
    }

    /// Closes each in order.
    ///
    /// # Errors
    /// When one does not close.
    pub fn close(self) -> Result<()> {
        self.exchanges.into_iter().try_for_each(Exchange::close)
    }
}
