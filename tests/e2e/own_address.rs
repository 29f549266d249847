//! Where what the box itself says comes from: its own address, never one that it has for its clients or for SNAT.

use std::{
    collections::BTreeSet,
    io::ErrorKind,
    net::{IpAddr, SocketAddr, TcpListener},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tests::{
    client::{Held, Mode, Options},
    daemon::{
        Daemon,
        config::{ClientTls, Config},
        refused,
    },
    lab::{Family, Host, Lab, Links, Plan, Topology},
    mail::{Message, Sizes},
    member::{Mta, Site},
    sink::Arrival,
    wait::wait_until,
};

use crate::scene::{Scene, play};

const PATIENCE: Duration = Duration::from_secs(30);
const ONE_ARM: Plan = Plan {
    topology: Topology::OneArm,
    links: Links::Plain,
};
/// In the network of the virtual address, and as free.
const SECOND: &str = "fd71::101";
/// Nobody serves it until the test does.
const WATCHED: u16 = 4025;

fn ip(lab: &Lab, words: &str) -> Result<String> {
    lab.balancer.run(Command::new("ip").args(words.split(' ')))
}

/// What the box takes for its own address towards another one.
fn source(lab: &Lab, to: IpAddr) -> Result<IpAddr> {
    let route = ip(lab, &format!("-oneline -6 route get {to}"))?;
    let mut words = route.split_whitespace();
    words.find(|word| *word == "src");
    let address = words.next().with_context(|| route.clone())?;
    Ok(address.parse()?)
}

/// Whose connection comes next.
fn caller(listener: &TcpListener) -> Result<IpAddr> {
    let mut peer = None;
    wait_until(PATIENCE, "a probe", || match listener.accept() {
        Ok((_, from)) => {
            peer = Some(from.ip());
            true
        }
        Err(error) => error.kind() != ErrorKind::WouldBlock,
    })?;
    peer.context("the listener takes nobody")
}

/// Who brought the messages of a run, once all are there.
fn peers(scene: &Scene<'_>, run: &str, count: usize) -> Result<BTreeSet<IpAddr>> {
    let of_run = |it: &Arrival| it.id.as_ref().is_some_and(|id| id.contains(run));
    let mut arrivals = Vec::new();
    wait_until(PATIENCE, "delivery", || {
        arrivals = scene.site.arrivals().unwrap_or_default();
        arrivals.retain(of_run);
        arrivals.len() == count
    })?;
    let peers: Option<_> = arrivals
        .iter()
        .map(|it| it.peer.map(|peer| peer.ip()))
        .collect();
    peers.context("a sink knows its peers")
}

#[test]
fn an_address_for_snat_is_the_source_of_nothing_else() -> Result<()> {
    let (wide, named) = (["fd72::200", "fd72::201"], ["fd72::202"]);
    let config = |lab: &Lab, _: &Site| {
        let mut config = Config::new(lab, "tc");
        config.raw(&format!("\n[snat.wide]\naddresses = {wide:?}"));
        config.raw(&format!("\n[snat.named]\naddresses = {named:?}"));
        config.monitor("opens", "tcp");
        config.pool(lab, "tls", Family::V6, 465, None);
        config.pool(lab, "plain", Family::V6, 25, None);
        config.pool(lab, "watched", Family::V6, WATCHED, Some("opens"));
        let address = Family::V6.virtual_address();
        config.passthrough("smtps", address, 465, "tls", "wide");
        config.proxy("smtp", address, 25, "plain", ClientTls::None);
        config.proxy("watched", address, WATCHED, "watched", ClientTls::None);
        config.proxy("bound", address, 2525, "plain", ClientTls::None);
        config.raw("snat = \"named\"");
        config
    };
    Lab::run(Plan::TWO_ARM, |lab| {
        let site = Site::start(lab, Mta::Sink)?;
        let daemon = Daemon::start(lab, config(lab, &site).text())?;
        let scene = Scene { lab, site, daemon };
        let [member, client] = [&lab.members[0], &lab.clients[0]];
        let own: IpAddr = "fd72::1".parse()?;
        let towards = source(lab, member.v6.into())?;
        ensure!(towards == own, "towards members the box is {towards}");
        let listener = member.namespace.enter(|| {
            let listener = TcpListener::bind((member.v6, WATCHED))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })?;
        let prober = caller(&listener)?;
        ensure!(prober == own, "monitors come from {prober}");
        let set = |texts: &[&str]| texts.iter().map(|it| it.parse().expect("one")).collect();
        for (run, port, mode, sources) in [
            ("auto", 25, Mode::Plain, BTreeSet::from([own])),
            // Who asks for an address by name has it.
            ("bound", 2525, Mode::Plain, set(&named)),
            ("kernel", 465, Mode::Implicit, set(&wide)),
        ] {
            let sent = scene.send(
                client,
                &Options {
                    mode,
                    count: 12,
                    per_session: 1,
                    run: run.to_owned(),
                    ..Options::to((Family::V6.virtual_address(), port).into())
                },
            )?;
            let peers = peers(&scene, run, sent.len())?;
            ensure!(peers == sources, "{run}: {peers:?}");
        }
        Ok(())
    })
}

/// Passthrough by automap on 465 of these addresses.
fn served(lab: &Lab, addresses: &[IpAddr]) -> Config {
    let mut config = Config::new(lab, "tc");
    config.monitor("opens", "tcp");
    config.pool(lab, "tls", Family::V6, 465, Some("opens"));
    for (number, address) in addresses.iter().enumerate() {
        config.passthrough(&format!("smtps-{number}"), *address, 465, "tls", "automap");
    }
    config
}

fn hold(scene: &Scene<'_>, client: &Host, address: IpAddr) -> Result<Held> {
    let options = Options {
        mode: Mode::Implicit,
        ca: Some(scene.site.ca.clone()),
        ..Options::to(SocketAddr::new(address, 465))
    };
    client.namespace.enter(|| Held::open(&options, 6))
}

fn goes_on(held: &mut Held) -> Result<()> {
    let text = Message::new("goes-on", 0, Sizes::Exactly(20_000), 1).text();
    let broken = held.send_over_each(&text);
    ensure!(broken.is_empty(), "{broken:?}");
    Ok(())
}

#[test]
fn a_virtual_address_that_goes_takes_no_other_flow_along() -> Result<()> {
    let first = Family::V6.virtual_address();
    let second: IpAddr = SECOND.parse()?;
    let config = |lab: &Lab, _: &Site| served(lab, &[first, second]);
    play(ONE_ARM, Mta::Sink, config, |scene| {
        let lab = scene.lab;
        let own: IpAddr = "fd71::1".parse()?;
        let mut held = hold(scene, &lab.clients[0], first)?;
        let flows = scene.daemon.open_flows()?;
        ensure!(flows.iter().all(|it| it.snat.ip() == own), "{flows:?}");
        let outside = source(lab, lab.clients[0].v6.into())?;
        ensure!(outside == own, "towards clients the box is {outside}");
        scene.daemon.reconfigure(served(lab, &[first]).text())?;
        scene.daemon.good_verb(&["reload"])?;
        wait_until(PATIENCE, "the address to go", || {
            ip(lab, "-oneline address").is_ok_and(|list| !list.contains(&format!("{second}/")))
        })?;
        goes_on(&mut held)?;
        held.close();
        Ok(())
    })
}

#[test]
fn a_virtual_address_that_is_all_the_box_has_stays_for_its_flows() -> Result<()> {
    let all: [IpAddr; 3] = [
        Family::V6.virtual_address(),
        SECOND.parse()?,
        "fd71::102".parse()?,
    ];
    Lab::run(ONE_ARM, |lab| {
        let site = Site::start(lab, Mta::Sink)?;
        ip(lab, "address del fd71::1/64 dev lan0")?;
        ip(lab, "route add fd71::/64 dev lan0")?;
        let daemon = Daemon::start(lab, served(lab, &all).text())?;
        daemon.wait_for_checked()?;
        let scene = Scene { lab, site, daemon };
        let from = source(lab, lab.members[0].v6.into())?;
        let others: Vec<_> = all.into_iter().filter(|it| *it != from).collect();
        ensure!(others.len() == 2, "{from}");
        let mut held = hold(&scene, &lab.clients[0], others[0])?;
        let flows = scene.daemon.open_flows()?;
        ensure!(flows.iter().all(|it| it.snat.ip() == from), "{flows:?}");
        scene.daemon.reconfigure(served(lab, &others[..1]).text())?;
        scene.daemon.good_verb(&["reload"])?;
        let there = |address: IpAddr| {
            ip(lab, "-oneline address").map(|list| list.contains(&format!("{address}/")))
        };
        let goes = |address: IpAddr| {
            wait_until(PATIENCE, &format!("{address} to go"), || {
                there(address).is_ok_and(|there| !there)
            })
        };
        // What nobody needs goes at once, and what is needed could go with it.
        goes(others[1])?;
        goes_on(&mut held)?;
        ensure!(there(from)?, "{from} is gone too early");
        held.close();
        goes(from)
    })
}

#[test]
fn what_an_earlier_daemon_has_added_is_mended_and_what_the_admin_has_stays() -> Result<()> {
    let ours = Family::V6.virtual_address();
    let admins: IpAddr = SECOND.parse()?;
    Lab::run(Plan::TWO_ARM, |lab| {
        let _site = Site::start(lab, Mta::Sink)?;
        ip(lab, &format!("address add {admins}/128 dev cli0 nodad"))?;
        let mut daemon = Daemon::start(lab, served(lab, &[ours, admins]).text())?;
        daemon.kill()?;
        // As a daemon before this one left it on a kernel that forgets whose it is.
        ip(lab, &format!("address del {ours}/128 dev cli0"))?;
        ip(lab, &format!("address add {ours}/128 dev cli0 nodad"))?;
        let index = ip(lab, "-oneline link show cli0")?;
        let index = index.split(':').next().context("no index")?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        std::fs::write(
            lab.folder().join("state/addresses"),
            format!("{boot}{ours} {index}\n"),
        )?;
        daemon.start_again()?;
        let list = ip(lab, "-oneline -6 address show dev cli0")?;
        let line = |address: IpAddr| {
            let mut lines = list.lines();
            let line = lines.find(|line| line.contains(&format!(" {address}/128 ")));
            line.with_context(|| list.clone())
        };
        let (mended, left) = (line(ours)?, line(admins)?);
        ensure!(mended.contains(" deprecated"), "{mended}");
        ensure!(mended.contains("valid_lft forever"), "{mended}");
        ensure!(!left.contains(" deprecated"), "{left}");
        daemon.stop()?;
        let list = ip(lab, "-oneline address")?;
        ensure!(!list.contains(&format!(" {ours}/")), "{list}");
        ensure!(list.contains(&format!(" {admins}/128 ")), "{list}");
        Ok(())
    })
}

#[test]
fn the_address_that_the_box_comes_from_is_none_for_snat() -> Result<()> {
    Lab::run(Plan::TWO_ARM, |lab| {
        let _site = Site::start(lab, Mta::Sink)?;
        // As on many a cloud machine: one address with all its bits, and a route without one.
        ip(lab, "address del 10.72.0.1/24 dev srv0")?;
        ip(lab, "address add 10.72.0.1/32 dev srv0")?;
        ip(lab, "route add 10.72.0.0/24 dev srv0 src 10.72.0.1")?;
        let config = |address: &str| {
            let mut config = Config::new(lab, "tc");
            config.raw(&format!("\n[snat.own]\naddresses = [\"{address}\"]"));
            config.pool(lab, "tls", Family::V4, 465, None);
            config.passthrough("smtps", Family::V4.virtual_address(), 465, "tls", "own");
            config
        };
        let output = refused(lab, config("10.72.0.1").text())?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(said.contains("an address of the box itself"), "{said}");
        // Another one that the admin has set up for this alone serves.
        ip(lab, "address add 10.72.0.9/32 dev srv0")?;
        let mut daemon = Daemon::start(lab, config("10.72.0.9").text())?;
        daemon.stop()
    })
}
