//! Every offload of the endpoints, on and off: what a device or a receiver leaves undone must be done by somebody.

use std::{net::SocketAddr, process::Command};

use anyhow::{Context, Result};
use tests::{
    daemon::{
        Daemon,
        config::{Config, tag},
    },
    echo::{Echo, Exchange, Pattern},
    lab::{Family, Host, Lab, Links, Plan},
};

/// A large mail.
const LENGTH: usize = 25_000_000;

/// What an endpoint's link does for it.
#[derive(Debug, Clone, Copy)]
struct Offloads {
    checksum: bool,
    gso: bool,
    gro: bool,
}

impl Offloads {
    const fn of(bits: u8) -> Self {
        Self {
            checksum: bits & 1 != 0,
            gso: bits & 2 != 0,
            gro: bits & 4 != 0,
        }
    }

    fn set(self, host: &Host) -> Result<()> {
        let word = |on: bool| if on { "on" } else { "off" };
        let mut ethtool = Command::new("ethtool");
        ethtool.args(["-K", "eth0", "tx", word(self.checksum)]);
        ethtool.args([
            "gso",
            word(self.gso),
            "tso",
            word(self.gso && self.checksum),
        ]);
        ethtool.args(["gro", word(self.gro)]);
        host.namespace.run(&mut ethtool).map(drop)
    }
}

/// All off, all on, and each alone off: the rest is for `cargo xtask test e2e --full offload`.
const TELLING: [u8; 5] = [0b000, 0b111, 0b110, 0b101, 0b011];

fn combinations() -> Vec<u8> {
    match std::env::var_os("SMTPLB_FULL") {
        Some(_) => (0b000..=0b111).collect(),
        None => TELLING.to_vec(),
    }
}

/// Clients with some offloads, members with the same or with all the others.
fn every_byte_arrives(links: Links, attach: &str) -> Result<()> {
    let plan = Plan {
        links,
        ..Plan::TWO_ARM
    };
    Lab::run(plan, |lab| {
        let mut config = Config::new(lab, attach);
        for family in Family::ALL {
            let name = format!("smtps-{}", tag(family));
            config.pool(lab, &name, family, 465, None);
            config.passthrough(&name, family.virtual_address(), 465, &name, "automap");
        }
        let _servers = lab
            .members
            .iter()
            .map(|member| Echo::start(lab, member, 465))
            .collect::<Result<Vec<_>>>()?;
        let daemon = Daemon::start(lab, config.text())?;
        let pattern = Pattern::default();
        for bits in combinations() {
            for members in [bits, !bits & 0b111] {
                let offloads = [Offloads::of(bits), Offloads::of(members)];
                offloads[0].set(&lab.clients[0])?;
                for member in &lab.members {
                    offloads[1].set(member)?;
                }
                for family in Family::ALL {
                    let server = SocketAddr::new(family.virtual_address(), 465);
                    lab.clients[0]
                        .namespace
                        .enter(|| {
                            let mut exchange = Exchange::open(server, 0)?;
                            exchange.carry(&pattern, LENGTH)?;
                            exchange.close()
                        })
                        .with_context(|| {
                            format!("{server} by {attach}, client and members {offloads:?}")
                        })
                        .inspect_err(|_| eprintln!("{}", daemon.report()))?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn every_byte_arrives_by_tc() -> Result<()> {
    every_byte_arrives(Links::Plain, "tc")
}

#[test]
fn every_byte_arrives_by_xdp() -> Result<()> {
    every_byte_arrives(Links::ForXdp, "xdp")
}

#[test]
fn every_byte_arrives_by_generic_xdp() -> Result<()> {
    every_byte_arrives(Links::ForXdp, "xdp-generic")
}
