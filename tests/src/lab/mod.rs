//! Clients, the box and members, each a namespace, wired as a small site would be.
//!
//! ```text
//! two-arm    c1 c2 ─ switch ─ cli0 box srv0 ─ switch ─ m1 m2 m3
//! one-arm    c1 c2 ─ switch ─ lan0 box, m1 m2 m3 on the same switch
//! routed     as two-arm, with a router between the box's switch and the members'
//! ```
//!
//! The switches are namespaces with a bridge, so that the box has as few interfaces as a real one.

mod hop;
mod namespace;
mod pass;
pub(crate) mod prefix;
mod wiring;

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

pub(crate) use self::pass::Pass;
pub use self::{
    hop::{Hop, Weather},
    namespace::Namespace,
    prefix::remove_leftovers,
    wiring::VIRTUAL,
};

/// How the machines are wired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Topology {
    /// Clients and members on different interfaces of the box.
    TwoArm,
    /// Everything on one network and one interface of the box.
    OneArm,
    /// Members behind a router.
    Routed,
}

/// What the virtual links are fit for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// As they come, with segmentation offload: for programs in TC.
    Plain,
    /// Ready for XDP in the box: endpoints compute their checksums, the far ends of the box's links carry a program
    /// of their own, without which frames sent by XDP are lost in a ring that nobody reads.
    ForXdp,
}

/// What to build.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// How the machines are wired.
    pub topology: Topology,
    /// What the links are fit for.
    pub links: Links,
}

impl Plan {
    /// Clients – box – members, links as they come.
    pub const TWO_ARM: Self = Self {
        topology: Topology::TwoArm,
        links: Links::Plain,
    };
}

/// An endpoint: a client or a member.
#[derive(Debug)]
pub struct Host {
    /// `c1`, `m3`
    pub name: String,
    /// The machine.
    pub namespace: Namespace,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

impl Host {
    /// Its address of one family.
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }
}

/// Which Internet Protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The virtual address of this family that configurations of the lab use.
    pub fn virtual_address(self) -> IpAddr {
        match self {
            Self::V4 => VIRTUAL.0.into(),
            Self::V6 => VIRTUAL.1.into(),
        }
    }
}

/// A machine without wires, for what needs a namespace and no site.
///
/// # Errors
/// When this is not root.
pub fn lone_machine(name: &str) -> Result<Namespace> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "namespaces are made as root"
    );
    prefix::remove_leftovers(false);
    Namespace::create(&format!("{}-{name}", prefix::new()))
}

/// The site. Everything that it is made of goes when it is dropped.
#[derive(Debug)]
pub struct Lab {
    prefix: String,
    folder: PathBuf,
    keep: bool,
    /// What was built.
    pub plan: Plan,
    /// c1, c2
    pub clients: Vec<Host>,
    /// m1, m2, m3
    pub members: Vec<Host>,
    /// The machine that smtplb runs on.
    pub balancer: Namespace,
    // Dropped before the switches: they hold links in them.
    _passes: Vec<pass::Pass>,
    switches: Vec<Namespace>,
}

impl Lab {
    /// Builds a site; first removes what crashed runs left.
    ///
    /// # Errors
    /// When this is not root, or the kernel lacks something.
    pub fn build(plan: Plan) -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "the lab is made of network namespaces: run it as root"
        );
        prefix::remove_leftovers(false);
        let prefix = prefix::new();
        let folder = prefix::folder(&prefix);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        wiring::build(prefix.clone(), folder.clone(), plan)
            .inspect_err(|_| prefix::remove_folder(&folder))
    }

    /// Builds a site and lets `test` use it; when that fails, shows what a person wants to see.
    ///
    /// # Errors
    /// What `test` returns.
    pub fn run(plan: Plan, test: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let lab = Self::build(plan)?;
        test(&lab).inspect_err(|_| eprintln!("{}", lab.report()))
    }

    /// A folder for logs, sockets and configurations of this lab.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes the links between the box and everybody else bad.
    ///
    /// # Errors
    /// When the kernel has no taps.
    pub fn weather(&self, weather: Weather) -> Result<Vec<Hop>> {
        let towards_box = |switch: &&Namespace| wiring::has_link(switch, "box");
        let insert = |(number, switch): (u64, &Namespace)| {
            let seed = weather.seed.wrapping_add(number);
            Hop::insert(switch, Weather { seed, ..weather })
        };
        (0..)
            .zip(self.switches.iter().filter(towards_box))
            .map(insert)
            .collect()
    }

    /// The router before the members, where there is one.
    pub fn router(&self) -> Option<&Namespace> {
        let mut others = self.switches.iter();
        others.find(|machine| machine.name().ends_with("-router"))
    }

    /// The box's interfaces: towards clients, towards members.
    pub fn interfaces(&self) -> (&'static str, &'static str) {
        wiring::interfaces(self.plan.topology)
    }

    /// The clients' switch; its port towards the box is called `box`.
    pub fn client_switch(&self) -> Option<&Namespace> {
        let name = format!("{}-sw-c", self.prefix);
        self.switches.iter().find(|switch| switch.name() == name)
    }

    /// Leaves everything up when the value goes.
    ///
    /// # Errors
    /// When the mark for later runs cannot be left.
    pub fn keep(&mut self) -> Result<()> {
        prefix::mark_kept(&self.prefix)?;
        self.keep = true;
        self.balancer.keep();
        self.switches.iter_mut().for_each(Namespace::keep);
        for host in self.clients.iter_mut().chain(&mut self.members) {
            host.namespace.keep();
        }
        Ok(())
    }

    /// What a person wants to see when a test failed: addresses, neighbours, counters and the logs' ends.
    pub fn report(&self) -> String {
        let mut report = String::new();
        for (title, words) in [
            ("addresses", &["-brief", "address"][..]),
            ("links", &["-brief", "-stats", "link"]),
            ("routes", &["route"]),
            ("IPv6 routes", &["-6", "route"]),
            ("neighbours", &["neighbour"]),
        ] {
            let text = self.balancer.run(Command::new("ip").args(words));
            let text = text.unwrap_or_else(|error| format!("{error:#}"));
            let _ = writeln!(report, "── box: {title}\n{}", text.trim_end());
        }
        let mut logs: Vec<PathBuf> = fs::read_dir(&self.folder)
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
            .collect();
        logs.sort();
        for log in logs {
            let text = fs::read_to_string(&log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let end = lines[lines.len().saturating_sub(60)..].join("\n");
            let _ = writeln!(report, "── {}\n{end}", log.display());
        }
        report
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if std::thread::panicking() {
            eprintln!("{}", self.report());
        }
        // The daemon holds files in the folder; it ends with its namespace, so that goes first.
        namespace::remove(self.balancer.name());
        prefix::remove_folder(&self.folder);
    }
}
