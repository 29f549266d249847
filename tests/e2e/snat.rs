//! SNAT pools: what members and neighbours see of their addresses, how full they are, and what happens when they are.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr, TcpStream},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lb_userspace::admin::view::ExplanationView;
use tests::{
    client::{Held, Mode, Options},
    daemon::{
        Daemon,
        config::{Config, tag},
    },
    lab::{Family, Host, Lab, Plan},
    member::Mta,
    wait::wait_until,
};

use crate::scene::{Scene, play};

const PATIENCE: Duration = Duration::from_secs(20);
/// What the daemon logs when a pool is full.
const TOLD: &str = "new connections refused: ports-exhausted";
/// Nobody's.
const STRANGER: &str = "02:00:00:00:00:99";

/// Addresses that the members' network has free.
fn addresses(family: Family) -> [IpAddr; 2] {
    match family {
        Family::V4 => ["10.72.0.200", "10.72.0.201"],
        Family::V6 => ["fd72::200", "fd72::201"],
    }
    .map(|text| text.parse().expect("an address"))
}

/// Passthrough on 465 of both families by a SNAT pool of both.
fn pooled(lab: &Lab, ports: &str) -> Config {
    let mut config = Config::new(lab, "tc");
    let list = Family::ALL.map(addresses).concat();
    let list: Vec<_> = list.iter().map(|it| format!("\"{it}\"")).collect();
    config.raw(&format!(
        "\n[snat.wide]\naddresses = [{}]\nports = \"{ports}\"",
        list.join(", ")
    ));
    for family in Family::ALL {
        let pool = format!("tls-{}", tag(family));
        config.pool(lab, &pool, family, 465, None);
        let name = format!("smtps-{}", tag(family));
        config.passthrough(&name, family.virtual_address(), 465, &pool, "wide");
    }
    config
}

fn play_pooled(ports: &str, test: impl FnOnce(&mut Scene<'_>) -> Result<()>) -> Result<()> {
    play(Plan::TWO_ARM, Mta::Sink, |lab, _| pooled(lab, ports), test)
}

#[test]
fn mail_comes_from_every_address_of_a_pool() -> Result<()> {
    play_pooled("20000-29999", |scene| {
        let lab = scene.lab;
        let mut sent = Vec::new();
        for family in Family::ALL {
            let server = SocketAddr::new(family.virtual_address(), 465);
            let options = Options {
                mode: Mode::Implicit,
                count: 20,
                per_session: 1,
                run: format!("pool-{}", tag(family)),
                ca: Some(scene.site.ca.clone()),
                ..Options::to(server)
            };
            sent.extend(scene.send(&lab.clients[0], &options)?);
            let client = &lab.clients[1].namespace;
            let held = client.enter(|| Held::open(&options, 6))?;
            let flows = scene.daemon.open_flows()?;
            let flows: Vec<_> = flows
                .iter()
                .filter(|flow| flow.client.ip() == lab.clients[1].address(family))
                .collect();
            let sources: BTreeSet<IpAddr> = flows.iter().map(|flow| flow.snat.ip()).collect();
            ensure!(sources == addresses(family).into(), "{flows:?}");
            ensure!(
                flows
                    .iter()
                    .all(|flow| (20_000..30_000).contains(&flow.snat.port())),
                "{flows:?}"
            );
            // As many are in use as there are flows, and so it says for people.
            let stats = scene.daemon.stats()?;
            let pairs: Vec<_> = stats
                .snat_ports
                .iter()
                .filter(|(ends, _)| {
                    let of = |it: IpAddr| ends.contains(&it.to_string());
                    addresses(family).into_iter().any(of)
                })
                .collect();
            ensure!(pairs.len() == 2 * lab.members.len(), "{pairs:?}");
            ensure!(
                pairs.iter().all(|(_, ports)| ports.usable == 10_000),
                "{pairs:?}"
            );
            let used: u32 = pairs.iter().map(|(_, ports)| ports.used).sum();
            ensure!(used as usize == flows.len(), "{pairs:?}, {flows:?}");
            let said = scene.daemon.good_verb(&["stats"])?;
            let shown = addresses(family).map(|it| said.contains(&it.to_string()));
            ensure!(shown == [true; 2], "{said}");
            client.enter(|| {
                held.close();
                Ok(())
            })?;
        }
        scene.check_balance(&sent)?;
        let peers = scene.site.arrivals()?;
        let peers: Option<BTreeSet<IpAddr>> = peers
            .iter()
            .map(|arrival| arrival.peer.map(|peer| peer.ip()))
            .collect();
        let peers = peers.context("a sink knows its peers")?;
        let wanted: BTreeSet<_> = Family::ALL.map(addresses).concat().into_iter().collect();
        ensure!(peers == wanted, "{peers:?}");

        scene.daemon.stop()?;
        let list = lab
            .balancer
            .run(Command::new("ip").args(["-oneline", "address"]))?;
        let left = wanted
            .iter()
            .find(|address| list.contains(&format!(" {address}/")));
        ensure!(left.is_none(), "{left:?} is left: {list}");
        Ok(())
    })
}

/// `smtplb explain --json`
fn explain(scene: &Scene<'_>, from: SocketAddr, to: SocketAddr) -> Result<ExplanationView> {
    let (from, to) = (from.to_string(), to.to_string());
    let said = scene
        .daemon
        .good_verb(&["explain", "--from", &from, "--to", &to, "--json"])?;
    Ok(serde_json::from_str(&said)?)
}

#[test]
fn explain_names_the_address_and_port_that_the_next_connection_gets() -> Result<()> {
    play_pooled("20000-20001", |scene| {
        let lab = scene.lab;
        for family in Family::ALL {
            let server = SocketAddr::new(family.virtual_address(), 465);
            let client = &lab.clients[0];
            let anybody = SocketAddr::new(client.address(family), 1);
            let mut held = Vec::new();
            for _ in 0..2 * 2 * lab.members.len() {
                let told = explain(scene, anybody, server)?;
                held.push(connect(client, server)?);
                let from = held.last().context("one")?.local_addr()?;
                let flows = scene.daemon.open_flows()?;
                let flow = flows.iter().find(|flow| flow.client == from);
                let flow = flow.context("no flow of the connection")?;
                let snat = told.snat.zip(told.snat_port).map(SocketAddr::from);
                ensure!(
                    (snat, told.member_address) == (Some(flow.snat), Some(flow.member)),
                    "{told:?}, then {flow:?}"
                );
                let told = explain(scene, from, server)?;
                ensure!(told.flow.as_deref() == Some("established"), "{told:?}");
                ensure!(told.snat_port == Some(flow.snat.port()), "{told:?}");
            }
            let told = explain(scene, anybody, server)?;
            ensure!(told.verdict == "refused", "{told:?}");
            ensure!(
                told.reason.as_deref() == Some("ports-exhausted"),
                "{told:?}"
            );
        }
        Ok(())
    })
}

/// Connects, or says that nobody answers.
fn connect(host: &Host, server: SocketAddr) -> Result<TcpStream> {
    host.namespace
        .enter(|| Ok(TcpStream::connect_timeout(&server, Duration::from_secs(1))?))
}

#[test]
fn a_pool_without_a_free_port_refuses_by_name() -> Result<()> {
    play_pooled("20000-20001", |scene| {
        let lab = scene.lab;
        for family in Family::ALL {
            let server = SocketAddr::new(family.virtual_address(), 465);
            let client = &lab.clients[0];
            // Each of two ports of two addresses, towards each member.
            let places = 2 * 2 * lab.members.len();
            let held: Result<Vec<_>> = (0..places).map(|_| connect(client, server)).collect();
            let held = held.with_context(|| format!("{places} connections to {server}"))?;
            let refused = || {
                let stats = scene.daemon.stats()?;
                Ok::<_, anyhow::Error>(stats.drops["ports-exhausted"])
            };
            let lines = scene.daemon.log().matches(TOLD).count();
            let before = refused()?;
            ensure!(connect(client, server).is_err(), "one more than ports");
            let after = refused()?;
            ensure!(after > before, "{before} refusals, then {after}");
            let stats = scene.daemon.stats()?;
            let full = stats.snat_ports.values().filter(|ports| ports.used == 2);
            ensure!(full.count() == places / 2, "{:?}", stats.snat_ports);
            wait_until(PATIENCE, "a line about it", || {
                scene.daemon.log().matches(TOLD).count() > lines
            })?;
            drop(held);
            // Ports rest for a while, but not when no other is left.
            wait_until(PATIENCE, "a port", || connect(client, server).is_ok())?;
        }
        Ok(())
    })
}

/// Whom a neighbour takes for the owner of an address.
fn owner(host: &Host, address: IpAddr) -> Result<String> {
    let mut show = Command::new("ip");
    show.args(["neighbour", "show", &address.to_string()]);
    host.namespace.run(&mut show)
}

#[test]
fn neighbours_learn_of_new_addresses_without_asking() -> Result<()> {
    Lab::run(Plan::TWO_ARM, |lab| {
        let mac = |interface: &str| {
            let mut show = Command::new("ip");
            show.args(["-oneline", "link", "show", interface]);
            let line = lab.balancer.run(&mut show)?;
            let mut words = line.split_whitespace();
            words.find(|word| *word == "link/ether");
            words.next().map(str::to_owned).context(line)
        };
        let (client, server) = lab.interfaces();
        let (client, server) = (mac(client)?, mac(server)?);
        // What an earlier owner has left in the neighbours' memory.
        let mut stale = Vec::new();
        for family in Family::ALL {
            let more = match family {
                Family::V4 => "10.71.0.101",
                Family::V6 => "fd71::101",
            };
            stale.push((&lab.members[0], addresses(family)[0], &server));
            stale.push((&lab.clients[0], family.virtual_address(), &client));
            stale.push((&lab.clients[0], more.parse()?, &client));
        }
        for (host, address, _) in &stale {
            let mut replace = Command::new("ip");
            replace.args(["neighbour", "replace", &address.to_string()]);
            replace.args(["lladdr", STRANGER, "dev", "eth0", "nud", "stale"]);
            host.namespace.run(&mut replace)?;
        }
        let config = pooled(lab, "20000-29999");
        let daemon = Daemon::start(lab, config.text())?;
        let learns = |(host, address, mac): &(&Host, IpAddr, &String)| {
            let what = format!("{} to learn that {address} is at {mac}", host.name);
            wait_until(PATIENCE, &what, || {
                owner(host, *address).is_ok_and(|said| said.contains(mac.as_str()))
            })
        };
        let (later, at_start): (Vec<_>, Vec<_>) = stale
            .iter()
            .partition(|(_, address, _)| address.to_string().ends_with("101"));
        at_start.iter().try_for_each(&learns)?;
        for (host, address, _) in &later {
            let said = owner(host, *address)?;
            ensure!(said.contains(STRANGER), "{address} is not ours yet: {said}");
        }
        let mut config = config;
        for (number, (_, address, _)) in later.iter().enumerate() {
            let family = if address.is_ipv4() { "v4" } else { "v6" };
            let pool = format!("tls-{family}");
            config.passthrough(&format!("more-{number}"), *address, 465, &pool, "wide");
        }
        daemon.reconfigure(config.text())?;
        daemon.good_verb(&["reload"])?;
        later.iter().try_for_each(learns)
    })
}
