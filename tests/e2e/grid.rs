//! Every way of TLS towards clients, with every way towards members, to Postfix, OpenSMTPD and Exim.

use std::{collections::BTreeMap, net::SocketAddr, num::NonZeroUsize};

use anyhow::{Context, Result, ensure};
use tests::{
    client::{Mode, Options, Outcome},
    daemon::{
        Daemon,
        config::{ClientTls, Config, tag},
    },
    lab::{Family, Host, Lab, Plan},
    mail::{LARGEST, Sizes},
    member::{Mta, Site},
};

use crate::scene::Scene;

/// One on each member of the lab.
const MTAS: [Mta; 3] = [Mta::Postfix, Mta::OpenSmtpd, Mta::Exim];

/// Towards clients, and how these may come.
const CLIENT: [(&str, ClientTls, &[Mode]); 4] = [
    ("none", ClientTls::None, &[Mode::Plain]),
    ("implicit", ClientTls::Implicit, &[Mode::Implicit]),
    ("require", ClientTls::Require, &[Mode::Starttls]),
    ("allow", ClientTls::Allow, &[Mode::Plain, Mode::Starttls]),
];

/// Towards members: `server_tls`, and the port that speaks so.
const SERVER: [(&str, u16); 3] = [("none", 25), ("implicit", 465), ("starttls", 587)];

/// Pipelined or in strict alternation, by DATA or in chunks of so many bytes.
const WAYS: [(bool, Option<NonZeroUsize>); 4] = [
    (true, None),
    (false, None),
    (true, NonZeroUsize::new(7_001)),
    (false, NonZeroUsize::new(7_001)),
];
/// Of a large message: the kernel moves so much from socket to socket by itself.
const LARGE_CHUNK: Option<NonZeroUsize> = NonZeroUsize::new(1 << 20);

/// One virtual server.
struct Point<'a> {
    client: (&'static str, ClientTls, &'static [Mode]),
    server: (&'static str, u16),
    member: &'a Host,
    mta: Mta,
    family: Family,
    port: u16,
}

impl Point<'_> {
    fn name(&self) -> String {
        let (client, server) = (self.client.0, self.server.0);
        format!(
            "{client}-{server}-{}-{}",
            self.member.name,
            tag(self.family)
        )
    }

    /// 25 MB take their time: each server, each way of TLS and each family has some, unless all are asked for.
    fn is_telling(&self) -> bool {
        std::env::var_os("SMTPLB_FULL").is_some()
            || match self.family {
                Family::V4 => self.client.0 == self.server.0,
                Family::V6 => (self.client.0, self.server.0) == ("require", "starttls"),
            }
    }
}

fn points(lab: &Lab) -> Vec<Point<'_>> {
    let mut points = Vec::new();
    for ((m, member), mta) in (0..).zip(&lab.members).zip(MTAS) {
        for (c, client) in (0..).zip(CLIENT) {
            for (s, server) in (0..).zip(SERVER) {
                points.extend(Family::ALL.map(|family| Point {
                    client,
                    server,
                    member,
                    mta,
                    family,
                    port: 2000 + 100 * m + 10 * c + s,
                }));
            }
        }
    }
    points
}

fn config(lab: &Lab, site: &Site) -> Config {
    let mut config = Config::new(lab, "tc");
    config.certificate("mail", &site.certificate);
    config.monitor("opens", "tcp");
    for member in &lab.members {
        for (server, port) in SERVER {
            for family in Family::ALL {
                let pool = format!("{}-{server}-{}", member.name, tag(family));
                config.pool_of(&pool, member, family, port);
            }
        }
    }
    for point in points(lab) {
        let (server, member) = (point.server.0, &point.member.name);
        let pool = format!("{member}-{server}-{}", tag(point.family));
        let address = point.family.virtual_address();
        config.proxy(&point.name(), address, point.port, &pool, point.client.1);
        config.raw(&format!("server_tls = \"{server}\""));
        if server != "none" {
            config.raw(&format!(
                "server_roots = \"{}\"\nserver_name = \"{member}.lab.example\"",
                site.ca.display()
            ));
        }
    }
    config
}

/// What one point carries, in every way that the member knows; each outcome with whether its member must have seen TLS.
fn carry(scene: &Scene<'_>, point: &Point<'_>) -> Result<Vec<Outcome>> {
    let server = SocketAddr::new(point.family.virtual_address(), point.port);
    let mut sent = Vec::new();
    for &mode in point.client.2 {
        for (pipelining, chunk) in WAYS {
            if chunk.is_some() && point.mta == Mta::OpenSmtpd {
                continue;
            }
            let by = chunk.map_or("data", |_| "bdat");
            let run = format!("{}-{mode:?}-{pipelining}-{by}", point.name()).to_lowercase();
            let options = Options {
                mode,
                count: 2,
                sizes: Sizes::Exactly(20_000),
                run,
                pipelining,
                chunk,
                ..Options::to(server)
            };
            sent.extend(scene.send(&scene.lab.clients[0], &options)?);
        }
        if point.is_telling() {
            let large = Options {
                mode,
                sizes: Sizes::Exactly(LARGEST),
                run: format!("{}-{mode:?}-large", point.name()).to_lowercase(),
                pipelining: true,
                ..Options::to(server)
            };
            sent.extend(scene.send(&scene.lab.clients[1], &large)?);
            let plain = (point.client.0, point.server.0) == ("none", "none");
            if plain && point.mta != Mta::OpenSmtpd {
                let chunked = Options {
                    run: format!("{}-bdat", large.run),
                    chunk: LARGE_CHUNK,
                    ..large
                };
                sent.extend(scene.send(&scene.lab.clients[1], &chunked)?);
            }
        }
    }
    for outcome in &sent {
        let name = &point.member.name;
        ensure!(outcome.greeting.contains(name.as_str()), "{outcome:?}");
    }
    Ok(sent)
}

#[test]
fn every_point_of_the_grid_carries_mail_byte_by_byte() -> Result<()> {
    Lab::run(Plan::TWO_ARM, |lab| {
        let site = Site::start_mixed(lab, &MTAS)?;
        let daemon = Daemon::start(lab, config(lab, &site).text())?;
        daemon.wait_for_checked()?;
        let scene = Scene { lab, site, daemon };
        let mut sent = Vec::new();
        let mut in_tls = BTreeMap::new();
        for point in points(lab) {
            let outcomes = carry(&scene, &point)
                .with_context(|| point.name())
                .inspect_err(|_| eprintln!("{}", scene.daemon.report()))?;
            let tls = point.server.0 != "none";
            in_tls.extend(outcomes.iter().map(|outcome| (outcome.id.clone(), tls)));
            sent.extend(outcomes);
        }
        scene.check_balance(&sent)?;
        for arrival in scene.site.arrivals()? {
            let id = arrival.id.clone().unwrap_or_default();
            ensure!(arrival.tls.is_some() == in_tls[&id], "{arrival:?}");
        }
        Ok(())
    })
}

#[test]
fn servers_learn_the_client_by_xclient() -> Result<()> {
    let port = |server: usize, client: usize| 2000 + 10 * client as u16 + server as u16;
    Lab::run(Plan::TWO_ARM, |lab| {
        let site = Site::start_mixed(lab, &[Mta::Postfix])?;
        let mut config = Config::new(lab, "tc");
        config.certificate("mail", &site.certificate);
        config.monitor("opens", "tcp");
        for family in Family::ALL {
            for (s, (server, at)) in SERVER.into_iter().enumerate() {
                let pool = format!("{server}-{}", tag(family));
                config.pool_of(&pool, &lab.members[0], family, at);
                for (c, (client, tls, _)) in CLIENT.into_iter().enumerate() {
                    let name = format!("{client}-{pool}");
                    config.proxy(&name, family.virtual_address(), port(s, c), &pool, tls);
                    config.raw(&format!("server_tls = \"{server}\"\nxclient = true"));
                    if server != "none" {
                        config.raw(&format!(
                            "server_roots = \"{}\"\nserver_name = \"m1.lab.example\"",
                            site.ca.display()
                        ));
                    }
                }
            }
        }
        let daemon = Daemon::start(lab, config.text())?;
        daemon.wait_for_checked()?;
        let scene = Scene { lab, site, daemon };
        let mut sent = Vec::new();
        let mut clients = BTreeMap::new();
        for family in Family::ALL {
            for (s, c) in (0..SERVER.len()).flat_map(|s| (0..CLIENT.len()).map(move |c| (s, c))) {
                let modes = CLIENT[c].2.iter();
                // A refused introduction must not make the box the client.
                for (&mode, stumble) in modes.flat_map(|mode| [(mode, false), (mode, true)]) {
                    let options = Options {
                        mode,
                        run: format!("{s}-{c}-{mode:?}-{stumble}-{}", tag(family)).to_lowercase(),
                        helo: "xclient.lab.example".to_owned(),
                        stumble,
                        ..Options::to((family.virtual_address(), port(s, c)).into())
                    };
                    let client = &lab.clients[c % 2];
                    let outcomes = scene.send(client, &options)?;
                    clients.extend(
                        outcomes
                            .iter()
                            .map(|outcome| (outcome.id.clone(), client.address(family))),
                    );
                    sent.extend(outcomes);
                }
            }
        }
        scene.check_balance(&sent)?;
        for arrival in scene.site.arrivals()? {
            let id = arrival.id.clone().unwrap_or_default();
            let peer = arrival.peer.map(|peer| peer.ip());
            ensure!(peer == Some(clients[&id]), "{arrival:?}");
            ensure!(arrival.helo == "xclient.lab.example", "{arrival:?}");
        }
        Ok(())
    })
}
