//! Who carries: smtplb, and what it is measured beside, each in the box of a lab of its own.

use std::{fs, process::Command};

use anyhow::{Context, Result};

use super::load::Server;
use crate::{
    daemon::{Daemon, config::Config},
    lab::{Family, Lab, Links, Plan, VIRTUAL},
    process::{self, Process},
};

/// Of the virtual server, and of the members.
pub(super) const PORT: u16 = 465;

/// A way of carrying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The box is a router and nothing else: clients talk to a member. A ceiling, not a contender.
    Routed,
    /// smtplb by TC, links as they come.
    Tc,
    /// smtplb by XDP; endpoints compute their checksums, so there is no segmentation offload.
    Xdp,
    /// DNAT to members in turn, and masquerade.
    Nftables,
    /// TCP mode, least connections.
    Haproxy,
}

impl Kind {
    pub(super) const ALL: [Self; 5] = [
        Self::Routed,
        Self::Tc,
        Self::Xdp,
        Self::Nftables,
        Self::Haproxy,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Routed => "routed",
            Self::Tc => "smtplb-tc",
            Self::Xdp => "smtplb-xdp",
            Self::Nftables => "nftables",
            Self::Haproxy => "haproxy",
        }
    }

    pub(super) fn plan(self) -> Plan {
        let links = match self {
            Self::Xdp => Links::ForXdp,
            _ => Links::Plain,
        };
        Plan {
            links,
            ..Plan::TWO_ARM
        }
    }
}

/// One of them, at work.
pub(super) struct Contender<'lab> {
    // Dropped in this order: who carries before who answers.
    _daemon: Option<Daemon<'lab>>,
    _haproxy: Option<Process>,
    _servers: Vec<Server>,
}

impl<'lab> Contender<'lab> {
    /// # Errors
    /// When something does not start.
    pub(super) fn start(kind: Kind, lab: &'lab Lab) -> Result<Self> {
        let servers = lab
            .members
            .iter()
            .map(|member| Server::start(&member.namespace, member.v4, PORT))
            .collect::<Result<_>>()?;
        let mut contender = Self {
            _daemon: None,
            _haproxy: None,
            _servers: servers,
        };
        match kind {
            Kind::Routed => lab.balancer.sysctl("net/ipv4/ip_forward", "1")?,
            Kind::Tc => contender._daemon = Some(smtplb(lab, "tc")?),
            Kind::Xdp => contender._daemon = Some(smtplb(lab, "xdp")?),
            Kind::Nftables => nftables(lab)?,
            Kind::Haproxy => contender._haproxy = Some(haproxy(lab)?),
        }
        Ok(contender)
    }
}

fn smtplb<'lab>(lab: &'lab Lab, attach: &str) -> Result<Daemon<'lab>> {
    let mut config = Config::new(lab, attach);
    config.pool(lab, "bench", Family::V4, PORT, None);
    config.passthrough("bench", VIRTUAL.0.into(), PORT, "bench", "automap");
    Daemon::start(lab, config.text())
}

fn nftables(lab: &Lab) -> Result<()> {
    lab.balancer.sysctl("net/ipv4/ip_forward", "1")?;
    own_address(lab)?;
    let members: Vec<String> = (0..)
        .zip(&lab.members)
        .map(|(number, member)| format!("{number} : {}", member.v4))
        .collect();
    let rules = format!(
        "table ip bench {{\n chain there {{ type nat hook prerouting priority dstnat;\n  \
         ip daddr {} tcp dport {PORT} dnat to numgen inc mod {} map {{ {} }}\n }}\n \
         chain back {{ type nat hook postrouting priority srcnat;\n  oifname \"{}\" masquerade\n }}\n}}\n",
        VIRTUAL.0,
        members.len(),
        members.join(", "),
        lab.interfaces().1,
    );
    let path = lab.folder().join("bench.nft");
    fs::write(&path, rules)?;
    lab.balancer.run(Command::new("nft").arg("-f").arg(&path))?;
    Ok(())
}

fn haproxy(lab: &Lab) -> Result<Process> {
    own_address(lab)?;
    // As many source ports as it may need: by default it runs out of them (TIME_WAIT).
    lab.balancer
        .sysctl("net/ipv4/ip_local_port_range", "1024 65535")?;
    lab.balancer.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
    let servers: String = lab
        .members
        .iter()
        .map(|member| format!("    server {} {}:{PORT}\n", member.name, member.v4))
        .collect();
    let text = format!(
        "global\n    maxconn 5000\ndefaults\n    mode tcp\n    timeout connect 10s\n    timeout client 1m\n    \
         timeout server 1m\nfrontend bench\n    bind {}:{PORT}\n    default_backend bench\nbackend bench\n    \
         balance leastconn\n{servers}",
        VIRTUAL.0
    );
    let path = lab.folder().join("haproxy.cfg");
    fs::write(&path, text)?;
    let log = lab.folder().join("haproxy.log");
    let mut command = Command::new("haproxy");
    command.arg("-db").arg("-f").arg(&path);
    let process = Process::spawn(&lab.balancer, "haproxy", &log, &mut command)?;
    let address = (VIRTUAL.0, PORT).into();
    process::wait_for_listener(&lab.balancer, address, std::time::Duration::from_secs(10))
        .with_context(|| process.log())?;
    Ok(process)
}

fn own_address(lab: &Lab) -> Result<()> {
    let interface = lab.interfaces().0;
    lab.balancer
        .ip(&[format!("address add {}/32 dev {interface}", VIRTUAL.0)])
}
