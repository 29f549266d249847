//! The client's address through the proxy plane: PROXY protocol headers out and in, the client's own address, and
//! addresses of a SNAT pool.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use tests::{
    client::{Mode, Options},
    daemon::config::{ClientTls, Config, tag},
    haproxy::{self, Haproxy},
    lab::{Family, Host, Lab, Plan},
    mail::Sizes,
    member::Mta,
    wait::wait_until,
};

use crate::scene::{Scene, play};

const PATIENCE: Duration = Duration::from_secs(30);

/// Proxy virtual servers of both families on 25, with these lines, whose members listen on a port.
fn config(lab: &Lab, member: u16, lines: &str) -> Config {
    let mut config = Config::new(lab, "tc");
    for family in Family::ALL {
        let name = format!("mx-{}", tag(family));
        let address = family.virtual_address();
        config.pool(lab, &name, family, member, None);
        config.proxy(&name, address, 25, &name, ClientTls::None);
        config.raw(lines);
    }
    config
}

fn send(scene: &Scene<'_>, from: &Host, family: Family, run: &str, count: usize) -> Result<()> {
    let options = Options {
        mode: Mode::Plain,
        count,
        sizes: Sizes::Exactly(50_000),
        run: run.to_owned(),
        concurrency: 4,
        ..Options::to((family.virtual_address(), 25).into())
    };
    let sent = scene.send(from, &options)?;
    ensure!(sent.len() == count, "{} of {count} sent", sent.len());
    Ok(())
}

/// From which address each message came, as the members saw it.
fn origins(scene: &Scene<'_>, run: &str) -> Result<BTreeMap<IpAddr, usize>> {
    let mut found = BTreeMap::new();
    for arrival in scene.site.arrivals()? {
        if arrival.id.as_deref().is_some_and(|id| id.starts_with(run)) {
            let peer = arrival.peer.context("no address in the Received line")?;
            *found.entry(peer.ip().to_canonical()).or_default() += 1;
        }
    }
    Ok(found)
}

#[test]
fn postfix_and_postscreen_learn_the_client_from_either_version() -> Result<()> {
    for (version, port) in [("v1", 10025), ("v2", 10025), ("v2", 10026)] {
        let line = format!("proxy_protocol = \"{version}\"");
        play(
            Plan::TWO_ARM,
            Mta::Postfix,
            |lab, _| config(lab, port, &line),
            |scene| {
                for family in Family::ALL {
                    let client = &scene.lab.clients[0];
                    let run = format!("told-{}", tag(family));
                    send(scene, client, family, &run, 4)?;
                    let seen = wait_for_origins(scene, &run, 4)?;
                    let expected = BTreeMap::from([(client.address(family), 4)]);
                    ensure!(seen == expected, "{version} to {port}: {seen:?}");
                }
                Ok(())
            },
        )?;
    }
    Ok(())
}

fn wait_for_origins(scene: &Scene<'_>, run: &str, count: usize) -> Result<BTreeMap<IpAddr, usize>> {
    let _ = wait_until(PATIENCE, "delivery", || {
        origins(scene, run).is_ok_and(|seen| seen.values().sum::<usize>() == count)
    });
    origins(scene, run)
}

/// Two balancers in a row: what the first tells, the second passes on. The first is HAProxy, on a client's machine.
#[test]
fn what_a_trusted_balancer_tells_is_passed_on() -> Result<()> {
    let lines = "proxy_protocol = \"v2\"\naccept_proxy_from = [\"10.71.0.11\", \"fd71::11\"]";
    let member = 25 + haproxy::OFFSET;
    play(
        Plan::TWO_ARM,
        Mta::Sink,
        |lab, _| config(lab, member, lines),
        |scene| {
            let lab = scene.lab;
            let proxies: Vec<_> = lab
                .members
                .iter()
                .map(|host| Haproxy::start(host, lab.folder(), &[25]))
                .collect::<Result<_>>()?;
            for (family, announced) in [
                (
                    Family::V4,
                    "PROXY TCP4 198.51.100.7 203.0.113.9 4711 25\r\n",
                ),
                (Family::V6, "PROXY TCP6 2001:db8::7 2001:db8::9 4711 25\r\n"),
            ] {
                let server = SocketAddr::new(family.virtual_address(), 25);
                let talk = |host: &Host, first: &str| {
                    let first = first.to_owned();
                    host.namespace.enter(move || dialogue(server, &first))
                };
                let good = talk(&lab.clients[0], announced)?;
                ensure!(good.starts_with("220") && good.contains("221"), "{good}");
                // From anybody else it is no command.
                let stranger = talk(&lab.clients[1], announced)?;
                ensure!(stranger.contains("500 5.5.2"), "{stranger}");
            }
            let told: [SocketAddr; 2] =
                ["198.51.100.7:4711".parse()?, "[2001:db8::7]:4711".parse()?];
            wait_until(PATIENCE, "the members to hear of both", || {
                let seen = proxies
                    .iter()
                    .flat_map(|proxy| proxy.clients().unwrap_or_default());
                let seen: Vec<_> = seen.collect();
                told.iter().all(|client| seen.contains(client))
            })?;
            let words = " client=198.51.100.7:4711 local=203.0.113.9:25 ";
            scene.daemon.wait_for_log(words)
        },
    )
}

/// Says something, then QUIT; everything that is answered.
fn dialogue(server: SocketAddr, first: &str) -> Result<String> {
    let mut tcp = TcpStream::connect_timeout(&server, PATIENCE)?;
    tcp.set_read_timeout(Some(PATIENCE))?;
    tcp.write_all(first.as_bytes())?;
    let mut reader = BufReader::new(tcp);
    let mut heard = String::new();
    reader.read_line(&mut heard)?;
    reader.get_mut().write_all(b"QUIT\r\n")?;
    while reader.read_line(&mut heard)? > 0 {}
    Ok(heard)
}

/// Members whose way back leads over the box see the client itself, and nobody had to set up a route.
#[test]
fn members_see_the_client_itself() -> Result<()> {
    play(
        Plan::TWO_ARM,
        Mta::Sink,
        |lab, _| config(lab, 25, "snat = \"none\""),
        |scene| {
            let lab = scene.lab;
            for family in Family::ALL {
                for client in &lab.clients {
                    let run = format!("own-{}-{}", tag(family), client.name);
                    send(scene, client, family, &run, 8)?;
                    let seen = wait_for_origins(scene, &run, 8)?;
                    let expected = BTreeMap::from([(client.address(family), 8)]);
                    ensure!(seen == expected, "{seen:?}");
                }
            }
            let words = format!(" snat={} ", lab.clients[0].v4);
            scene.daemon.wait_for_log(&words)?;
            let rules = |family| lab.balancer.run(Command::new("ip").args([family, "rule"]));
            ensure!(rules("-4")?.contains("lookup 4650"), "{}", rules("-4")?);
            // Sessions that go on keep their way back when nothing new needs it.
            let held = lab.clients[0]
                .namespace
                .enter(|| open((Family::V4.virtual_address(), 25).into()))?;
            let next = config(lab, 25, "snat = \"automap\"");
            scene.daemon.reconfigure(next.text())?;
            scene.daemon.good_verb(&["reload"])?;
            held_still_talks(held)?;
            wait_until(PATIENCE, "the rules to go", || {
                let gone = |family| rules(family).is_ok_and(|text| !text.contains("4650"));
                gone("-4") && gone("-6")
            })?;
            send(scene, &lab.clients[0], Family::V4, "automap", 2)?;
            let seen = wait_for_origins(scene, "automap", 2)?;
            ensure!(!seen.contains_key(&lab.clients[0].v4.into()), "{seen:?}");
            Ok(())
        },
    )
}

fn open(server: SocketAddr) -> Result<BufReader<TcpStream>> {
    let tcp = TcpStream::connect_timeout(&server, PATIENCE)?;
    tcp.set_read_timeout(Some(PATIENCE))?;
    let mut reader = BufReader::new(tcp);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    ensure!(line.starts_with("220"), "{line}");
    Ok(reader)
}

fn held_still_talks(mut held: BufReader<TcpStream>) -> Result<()> {
    held.get_mut().write_all(b"NOOP\r\nQUIT\r\n")?;
    let mut heard = String::new();
    while held.read_line(&mut heard)? > 0 {}
    ensure!(
        heard.starts_with("250") && heard.contains("\n221"),
        "{heard}"
    );
    Ok(())
}

/// With a hundred ports for each address, three addresses carry more sessions to one member than one could.
#[test]
fn a_snat_pool_multiplies_the_ports_towards_a_member() -> Result<()> {
    const PORTS: usize = 100;
    let addresses = ["10.72.0.201", "10.72.0.202", "10.72.0.203"];
    let pool = format!("\n[snat.wide]\naddresses = {addresses:?}\n");
    play(
        Plan::TWO_ARM,
        Mta::Sink,
        |lab, _| {
            let mut config = Config::new(lab, "tc");
            let member = lab.members[0].v4;
            config.raw(&format!(
                "[pool.one]\n[[pool.one.member]]\naddress = \"{member}\"\nport = 25"
            ));
            config.proxy(
                "mx",
                Family::V4.virtual_address(),
                25,
                "one",
                ClientTls::None,
            );
            config.raw("snat = \"wide\"").raw(&pool);
            config
        },
        |scene| {
            let lab = scene.lab;
            let range = format!("40000 {}", 40000 + PORTS - 1);
            lab.balancer
                .sysctl("net/ipv4/ip_local_port_range", &range)?;
            let server: SocketAddr = (Family::V4.virtual_address(), 25).into();
            let wanted = PORTS * 5 / 2;
            let held: Vec<_> = lab.clients[0]
                .namespace
                .enter(|| (0..wanted).map(|_| open(server)).collect())?;
            ensure!(held.len() == wanted);
            let sessions = scene.daemon.good_verb(&["show", "sessions"])?;
            ensure!(sessions.lines().count() > wanted, "{sessions}");
            for session in held {
                held_still_talks(session)?;
            }
            for address in addresses {
                let words = format!(" snat={address} ");
                wait_until(PATIENCE, "the log to tell of both addresses", || {
                    scene.daemon.log().matches(&words).count() > PORTS / 2
                })?;
            }
            // The addresses go with the last that needs them.
            let mut next = config(lab, 25, "snat = \"automap\"");
            next.raw("");
            scene.daemon.reconfigure(next.text())?;
            scene.daemon.good_verb(&["reload"])?;
            wait_until(PATIENCE, "the addresses to go", || {
                let shown = lab.balancer.run(Command::new("ip").args(["address"]));
                shown.is_ok_and(|text| addresses.iter().all(|address| !text.contains(address)))
            })
        },
    )
}
