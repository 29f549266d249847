//! The kernel plane: every topology, every hook, both families.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use tests::{
    client::{Held, Mode, Options},
    daemon::{
        self,
        config::{Config, tag},
    },
    lab::{Family, Lab, Links, Plan, Topology},
    mail::{Message, Sizes},
    member::Mta,
    program::{Errand, Program},
    wait::wait_until,
};

use crate::scene::{Scene, play};

/// A way of running the kernel plane.
struct Case {
    topology: Topology,
    links: Links,
    attach: &'static str,
    snat: &'static str,
}

impl Case {
    const fn new(topology: Topology, attach: &'static str) -> Self {
        let links = match attach.as_bytes() {
            b"tc" | b"auto" => Links::Plain,
            _ => Links::ForXdp,
        };
        Self {
            topology,
            links,
            attach,
            snat: "automap",
        }
    }

    /// As `status` has to call it: `auto` takes TC on virtual links.
    fn hook(&self) -> &'static str {
        match self.attach {
            "tc" | "auto" => daemon::tc_hook(),
            hook => hook,
        }
    }

    fn config(&self, lab: &Lab) -> Config {
        let mut config = Config::new(lab, self.attach);
        config.monitor("opens", "tcp");
        for family in Family::ALL {
            let tag = tag(family);
            for (name, port) in [("smtps", 465), ("submission", 587)] {
                let pool = format!("{name}-{tag}");
                config.pool(lab, &pool, family, port, Some("opens"));
                config.passthrough(&pool, family.virtual_address(), port, &pool, self.snat);
            }
        }
        config
    }

    fn run(&self) -> Result<()> {
        let plan = Plan {
            topology: self.topology,
            links: self.links,
        };
        play(
            plan,
            Mta::Sink,
            |lab, _| self.config(lab),
            |scene| {
                if (self.topology, self.snat) == (Topology::OneArm, "none") {
                    lead_back(scene.lab)?;
                }
                self.carry(scene)
            },
        )
    }

    fn carry(&self, scene: &mut Scene<'_>) -> Result<()> {
        for attachment in scene.daemon.status()?.kernel.attachments {
            ensure!(attachment.hook == self.hook(), "{attachment:?}");
        }
        let mut sent = Vec::new();
        for family in Family::ALL {
            // TLS from the first byte, and STARTTLS end to end: both are the member's own.
            for (mode, port) in [(Mode::Implicit, 465), (Mode::Starttls, 587)] {
                let options = Options {
                    mode,
                    count: 30,
                    sizes: Sizes::MixedUpTo(1_000_000),
                    run: format!("{}-{port}", tag(family)),
                    concurrency: 3,
                    per_session: 2,
                    pipelining: true,
                    ..Options::to((family.virtual_address(), port).into())
                };
                let outcomes = scene.send(&scene.lab.clients[0], &options)?;
                let mut shown = BTreeSet::new();
                for outcome in &outcomes {
                    let certificate = outcome.certificate.as_deref().context("no certificate")?;
                    let owner = scene
                        .site
                        .owner_of(certificate)
                        .context("not a member's certificate")?;
                    ensure!(
                        outcome.greeting.contains(owner),
                        "{} by {owner}",
                        outcome.greeting
                    );
                    shown.insert(owner);
                }
                ensure!(
                    shown.len() == scene.site.members.len(),
                    "only {shown:?} got mail"
                );
                sent.extend(outcomes);
            }
        }
        scene.check_balance(&sent)?;
        self.check_peers(scene)?;
        check_flows(scene)
    }

    /// Whom the members take for the client.
    fn check_peers(&self, scene: &Scene<'_>) -> Result<()> {
        let client = &scene.lab.clients[0];
        for arrival in scene.site.arrivals()? {
            let peer = arrival.peer.context("a sink knows its peer")?.ip();
            let is_client = peer == client.v4 || peer == client.v6;
            ensure!(
                is_client == (self.snat == "none"),
                "{peer} with snat {}",
                self.snat
            );
        }
        Ok(())
    }
}

/// Members in the clients' network answer them by the box.
fn lead_back(lab: &Lab) -> Result<()> {
    for member in &lab.members {
        let clients = lab.clients.iter();
        let routes = clients.flat_map(|client| {
            [
                format!("route add {}/32 via 10.71.0.1", client.v4),
                format!("route add {}/128 via fd71::1", client.v6),
            ]
        });
        member.namespace.ip(&routes.collect::<Vec<_>>())?;
    }
    Ok(())
}

/// Open connections are listed, closed ones are not, and counters keep what was.
fn check_flows(scene: &Scene<'_>) -> Result<()> {
    let none_left = || {
        scene
            .daemon
            .open_flows()
            .is_ok_and(|flows| flows.is_empty())
    };
    wait_until(Duration::from_secs(10), "closed flows to go", none_left)?;
    let before = scene.daemon.stats()?;
    for family in Family::ALL {
        let server = SocketAddr::new(family.virtual_address(), 465);
        let options = Options {
            mode: Mode::Implicit,
            ca: Some(scene.site.ca.clone()),
            ..Options::to(server)
        };
        let client = &scene.lab.clients[1];
        let held = client.namespace.enter(|| Held::open(&options, 3))?;
        let flows = scene.daemon.open_flows()?;
        ensure!(flows.len() == 3, "{flows:?}");
        for flow in &flows {
            ensure!(
                flow.address == server && flow.client.ip() == client.address(family),
                "{flow:?}"
            );
            ensure!(flow.phase == "established", "{flow:?}");
            ensure!(
                flow.packets_in > 0 && flow.packets_out > 0 && flow.bytes_out > 1000,
                "{flow:?}"
            );
        }
        client.namespace.enter(|| {
            held.close();
            Ok(())
        })?;
        wait_until(Duration::from_secs(10), "closed flows to go", none_left)?;
    }
    let after = scene.daemon.stats()?;
    for (name, traffic) in &after.virtual_servers {
        let before = before
            .virtual_servers
            .get(name)
            .context("a virtual server came up")?;
        let more = if name.starts_with("smtps") { 3 } else { 0 };
        ensure!(
            traffic.total == before.total + more,
            "{name}: {before:?}, then {traffic:?}"
        );
        ensure!(traffic.active == 0, "{name}: {traffic:?}");
    }
    Ok(())
}

#[test]
fn two_arms_by_tc() -> Result<()> {
    Case::new(Topology::TwoArm, "tc").run()
}

#[test]
fn auto_takes_tc_on_virtual_links() -> Result<()> {
    Case::new(Topology::TwoArm, "auto").run()
}

#[test]
fn two_arms_by_xdp() -> Result<()> {
    Case::new(Topology::TwoArm, "xdp").run()
}

#[test]
fn two_arms_by_generic_xdp() -> Result<()> {
    Case::new(Topology::TwoArm, "xdp-generic").run()
}

#[test]
fn one_arm_by_tc() -> Result<()> {
    Case::new(Topology::OneArm, "tc").run()
}

#[test]
fn one_arm_by_xdp() -> Result<()> {
    Case::new(Topology::OneArm, "xdp").run()
}

#[test]
fn members_behind_a_router_by_tc() -> Result<()> {
    Case::new(Topology::Routed, "tc").run()
}

#[test]
fn members_behind_a_router_by_xdp() -> Result<()> {
    Case::new(Topology::Routed, "xdp").run()
}

#[test]
fn members_see_the_client_without_snat() -> Result<()> {
    let case = Case::new(Topology::TwoArm, "tc");
    Case {
        snat: "none",
        ..case
    }
    .run()
}

#[test]
fn members_see_the_client_without_snat_by_xdp() -> Result<()> {
    let case = Case::new(Topology::TwoArm, "xdp");
    Case {
        snat: "none",
        ..case
    }
    .run()
}

#[test]
fn members_on_one_arm_see_the_client_without_snat() -> Result<()> {
    let case = Case::new(Topology::OneArm, "tc");
    Case {
        snat: "none",
        ..case
    }
    .run()
}

#[test]
fn members_on_one_arm_see_the_client_without_snat_by_xdp() -> Result<()> {
    let case = Case::new(Topology::OneArm, "xdp");
    Case {
        snat: "none",
        ..case
    }
    .run()
}

#[test]
fn everybodys_programs_reach_postfix() -> Result<()> {
    let case = Case::new(Topology::TwoArm, "tc");
    let config = |lab: &Lab, _: &_| {
        let mut config = Config::new(lab, case.attach);
        for family in Family::ALL {
            let name = format!("smtps-{}", tag(family));
            config.pool(lab, &name, family, 465, None);
            config.passthrough(&name, family.virtual_address(), 465, &name, "automap");
        }
        config
    };
    play(Plan::TWO_ARM, Mta::Postfix, config, |scene| {
        let mut sent = Vec::new();
        for family in Family::ALL {
            let errand = Errand {
                from: &scene.lab.clients[0].namespace,
                server: (family.virtual_address(), 465).into(),
                mode: Mode::Implicit,
                ca: &scene.site.ca,
                folder: scene.lab.folder(),
            };
            for program in Program::ALL {
                let run = format!("{}-{}", program.name(), tag(family));
                let outcome =
                    errand.send(program, &Message::new(&run, 0, Sizes::Exactly(500_000), 1))?;
                ensure!(outcome.ok, "{run}: {}", outcome.reply);
                ensure!(
                    outcome.tls.as_deref() == Some("TLSv1.3"),
                    "{run}: {}",
                    outcome.reply
                );
                sent.push(outcome);
            }
        }
        scene.check_balance(&sent)
    })
}
