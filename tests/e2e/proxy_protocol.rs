//! The client's address through the kernel plane: PROXY protocol headers over links that lose and reorder, to HAProxy and
//! to Postfix.
//!
//! `SMTPLB_SOAK=1` does it in full: 10,000 handshakes and 100 messages of 25 MB.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Mutex,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use tests::{
    client::{Mode, Options},
    daemon::config::{Config, tag},
    haproxy::{self, Haproxy},
    lab::{Family, Lab, Links, Plan, Topology, Weather},
    mail::Sizes,
    member::Mta,
    wait::wait_until,
    wire::{self, Wire},
};

use crate::scene::{Scene, play};

const BAD: Weather = Weather {
    loss: 5,
    disorder: 5,
    delay: Duration::from_millis(3),
    seed: 20_261_121,
};

fn soak() -> bool {
    std::env::var_os("SMTPLB_SOAK").is_some()
}

fn plan(attach: &str) -> Plan {
    Plan {
        topology: Topology::TwoArm,
        links: match attach {
            "tc" => Links::Plain,
            _ => Links::ForXdp,
        },
    }
}

/// Virtual servers that lead to ports behind a header, for both families. No monitor: it would bring none.
fn config(lab: &Lab, attach: &str, ports: &[(u16, u16)]) -> Config {
    let mut config = Config::new(lab, attach);
    for family in Family::ALL {
        for &(port, member) in ports {
            let name = format!("told-{}-{port}", tag(family));
            config.pool(lab, &name, family, member, None);
            config
                .passthrough(&name, family.virtual_address(), port, &name, "automap")
                .with_header();
        }
    }
    config
}

/// One connection up to the greeting and a goodbye; the address it came from.
fn greet(
    server: SocketAddr,
    tls: Option<&std::sync::Arc<rustls::ClientConfig>>,
) -> Result<SocketAddr> {
    // As long as a client's own TCP tries to connect (net.ipv4.tcp_syn_retries), and some more.
    const PATIENCE: Duration = Duration::from_secs(180);
    let tcp = TcpStream::connect_timeout(&server, PATIENCE)?;
    tcp.set_read_timeout(Some(PATIENCE))?;
    let local = tcp.local_addr()?;
    let mut wire = Wire::plain(tcp)?;
    if let Some(tls) = tls {
        wire = wire.connect_tls(tls, tests::certs::MAIL_NAME)?;
    }
    let mut reader = BufReader::new(wire);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    ensure!(line.starts_with("220"), "{line}");
    reader.get_mut().write_all(b"QUIT\r\n")?;
    line.clear();
    reader.read_line(&mut line)?;
    ensure!(line.starts_with("221"), "{line}");
    Ok(local)
}

fn count(addresses: impl IntoIterator<Item = SocketAddr>) -> BTreeMap<SocketAddr, u32> {
    let mut counts = BTreeMap::new();
    for address in addresses {
        *counts.entry(address).or_default() += 1;
    }
    counts
}

/// Handshakes over bad links: TLS that the client begins, and SMTP that the server begins. Each is seen with its own
/// address and port.
fn handshakes(scene: &Scene<'_>, proxies: &[Haproxy], number: usize) -> Result<()> {
    let tls = wire::client_config(&scene.site.ca)?;
    let client = &scene.lab.clients[0];
    let (made, failed) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    client.namespace.enter(|| {
        thread::scope(|scope| {
            for worker in 0..16 {
                let (tls, made, failed) = (&tls, &made, &failed);
                scope.spawn(move || {
                    for round in (worker..number).step_by(16) {
                        let family = Family::ALL[round / 16 % 2];
                        let (port, tls) = [(465, Some(tls)), (25, None)][round / 32 % 2];
                        let server = SocketAddr::new(family.virtual_address(), port);
                        match greet(server, tls) {
                            Ok(local) => made.lock().expect("no panic").push(local),
                            Err(error) => failed
                                .lock()
                                .expect("no panic")
                                .push(format!("{server}: {error:#}")),
                        }
                    }
                });
            }
        });
        Ok(())
    })?;
    let failed = failed.into_inner().expect("no panic");
    ensure!(
        failed.is_empty(),
        "{} of {number} failed: {failed:?}",
        failed.len()
    );
    let made = count(made.into_inner().expect("no panic"));
    let seen = || -> Result<_> {
        let mut all = Vec::new();
        for proxy in proxies {
            all.extend(proxy.clients()?);
        }
        // The lab asked whether they listen, from their own machines.
        all.retain(|address| {
            client.address(Family::V4) == address.ip() || client.address(Family::V6) == address.ip()
        });
        Ok(count(all))
    };
    let _ = wait_until(Duration::from_secs(60), "the last goodbyes", || {
        seen().is_ok_and(|seen| seen == made)
    });
    let seen = seen()?;
    ensure!(
        seen == made,
        "{} addresses made, {} seen",
        made.len(),
        seen.len()
    );
    Ok(())
}

fn through_haproxy(attach: &str, handshake: usize, messages: usize, size: usize) -> Result<()> {
    let ports = [(465, 465 + haproxy::OFFSET), (25, 25 + haproxy::OFFSET)];
    play(
        plan(attach),
        Mta::Sink,
        |lab, _| config(lab, attach, &ports),
        |scene| {
            let lab = scene.lab;
            for host in &lab.members {
                // Of ten thousand connections that the server begins one meets as bad a link six times in a row, and then
                // TCP itself gives up; this is not about that.
                host.namespace.sysctl("net/ipv4/tcp_synack_retries", "8")?;
            }
            let proxies: Vec<_> = lab
                .members
                .iter()
                .map(|host| Haproxy::start(host, lab.folder(), &[25, 465]))
                .collect::<Result<_>>()?;
            let hops = lab.weather(BAD)?;
            handshakes(scene, &proxies, handshake)?;
            let mut sent = Vec::new();
            for family in Family::ALL {
                let options = Options {
                    mode: Mode::Implicit,
                    count: messages / 2,
                    sizes: Sizes::Exactly(size),
                    run: format!("told-{}", tag(family)),
                    concurrency: 4,
                    ..Options::to((family.virtual_address(), 465).into())
                };
                sent.extend(scene.send(&lab.clients[1], &options)?);
            }
            scene.check_balance(&sent)?;
            for hop in &hops {
                let (lost, overtaken, all) = hop.toll();
                println!("of {all} frames, {lost} were lost and {overtaken} overtaken");
                ensure!(
                    lost * 100 > all * 3 && overtaken > 0,
                    "the weather was too good"
                );
            }
            Ok(())
        },
    )
}

#[test]
fn haproxy_learns_every_client_over_bad_links_by_tc() -> Result<()> {
    match soak() {
        true => through_haproxy("tc", 10_000, 100, 25_000_000),
        false => through_haproxy("tc", 128, 4, 1_000_000),
    }
}

#[test]
fn haproxy_learns_every_client_over_bad_links_by_xdp() -> Result<()> {
    match soak() {
        true => through_haproxy("xdp", 10_000, 100, 25_000_000),
        false => through_haproxy("xdp", 128, 4, 1_000_000),
    }
}

#[test]
fn haproxy_learns_every_client_by_generic_xdp() -> Result<()> {
    through_haproxy("xdp-generic", 64, 2, 1_000_000)
}

/// Implicit TLS, plain SMTP, and plain SMTP with postscreen before it.
fn through_postfix(attach: &str) -> Result<()> {
    let ports = [(465, 10465), (25, 10025), (26, 10026)];
    play(
        plan(attach),
        Mta::Postfix,
        |lab, _| config(lab, attach, &ports),
        |scene| {
            let _hops = scene.lab.weather(BAD)?;
            let (number, size) = if soak() {
                (50, 25_000_000)
            } else {
                (4, 200_000)
            };
            let client = &scene.lab.clients[0];
            let mut sent = Vec::new();
            for family in Family::ALL {
                for (port, mode) in [(465, Mode::Implicit), (25, Mode::Plain), (26, Mode::Plain)] {
                    let options = Options {
                        mode,
                        count: number,
                        sizes: Sizes::Exactly(size),
                        run: format!("told-{}-{port}", tag(family)),
                        concurrency: 2,
                        ..Options::to((family.virtual_address(), port).into())
                    };
                    sent.extend(scene.send(client, &options)?);
                }
            }
            scene.check_balance(&sent)?;
            for arrival in scene.site.arrivals()? {
                let peer = arrival
                    .peer
                    .context("no address in the Received line")?
                    .ip();
                let id = arrival.id.unwrap_or_default();
                let family = if id.starts_with("told-v4") {
                    Family::V4
                } else {
                    Family::V6
                };
                ensure!(peer == client.address(family), "{id}: Postfix saw {peer}");
            }
            Ok(())
        },
    )
}

#[test]
fn postfix_learns_every_client_over_bad_links_by_tc() -> Result<()> {
    through_postfix("tc")
}

#[test]
fn postfix_learns_every_client_over_bad_links_by_xdp() -> Result<()> {
    through_postfix("xdp")
}
