//! Links on the way that take less than those of the ends: nobody clamps anything, path MTU discovery has to work through
//! the translation (RFC 1191, RFC 8201).
//!
//! ```text
//! c1 ─────────── box ── router ── members     client to member: the router says so, about what the box sent
//!  └── c2 ──────┘                             member to client: c2 says so, or the box itself
//! ```
//!
//! The small links are routes with an MTU, which a forwarding host keeps to as to that of a link.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use tests::{
    daemon::{Daemon, config::Config},
    lab::{Family, Lab, Links, Plan, Topology},
};

const PORT: u16 = 9000;
/// Bytes in each direction.
const SIZE: usize = 25 << 20;
/// A transfer takes a second; one that meets a black hole never ends.
const LIMIT: Duration = Duration::from_secs(60);

/// What the byte at this place of a direction is.
fn byte(at: usize, direction: u8) -> u8 {
    (at % 251) as u8 ^ direction
}

fn send(stream: &mut TcpStream, direction: u8) -> Result<()> {
    let bytes: Vec<u8> = (0..SIZE).map(|at| byte(at, direction)).collect();
    stream.write_all(&bytes).context("cannot send")
}

fn receive(stream: &mut TcpStream, direction: u8) -> Result<()> {
    let mut bytes = vec![0; SIZE];
    stream.read_exact(&mut bytes).context("cannot receive")?;
    let wrong = (0..SIZE).find(|at| bytes[*at] != byte(*at, direction));
    ensure!(wrong.is_none(), "byte {wrong:?} is another");
    Ok(())
}

/// Serves one connection after the other: takes all, then gives as much.
fn serve(listener: &TcpListener) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { return };
        let _ = stream.set_read_timeout(Some(LIMIT));
        let _ = stream.set_write_timeout(Some(LIMIT));
        if receive(&mut stream, 1).is_ok() {
            let _ = send(&mut stream, 2);
        }
    }
}

fn transfer(server: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&server, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    send(&mut stream, 1).context("client to member")?;
    receive(&mut stream, 2).context("member to client")
}

/// Makes the ways small, and c2 the router of c1 for what comes back.
fn narrow(lab: &Lab) -> Result<()> {
    let router = lab.router().context("a router")?;
    router.ip(&[
        "route change 10.73.0.0/24 dev far mtu lock 1400".to_owned(),
        "route add fd73::/64 dev far metric 100 mtu 1400".to_owned(),
    ])?;
    let [near, far] = [&lab.clients[1], &lab.clients[0]];
    near.namespace.sysctl("net/ipv4/ip_forward", "1")?;
    near.namespace.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    near.namespace
        .sysctl("net/ipv4/conf/all/send_redirects", "0")?;
    near.namespace
        .sysctl("net/ipv4/conf/eth0/send_redirects", "0")?;
    near.namespace.ip(&[
        format!("route add 10.74.0.0/24 via {} mtu lock 1380", far.v4),
        format!("route add fd74::/64 via {} mtu 1380", far.v6),
    ])?;
    far.namespace.ip(&[
        "address add 10.74.0.11/24 dev eth0".to_owned(),
        "address add fd74::11/64 dev eth0 nodad".to_owned(),
        "route add 10.71.0.100/32 dev eth0 src 10.74.0.11".to_owned(),
        "route add fd71::100/128 dev eth0 src fd74::11".to_owned(),
    ])?;
    lab.balancer.ip(&[
        format!("route add 10.74.0.0/24 via {}", near.v4),
        format!("route add fd74::/64 via {}", near.v6),
    ])
}

fn small_links(attach: &str, links: Links) -> Result<()> {
    let plan = Plan {
        topology: Topology::Routed,
        links,
    };
    Lab::run(plan, |lab| {
        narrow(lab)?;
        for member in &lab.members {
            for family in Family::ALL {
                let address = SocketAddr::new(member.address(family), PORT);
                let listener = member.namespace.enter(|| Ok(TcpListener::bind(address)?))?;
                thread::spawn(move || serve(&listener));
            }
        }
        let mut config = Config::new(lab, attach);
        for family in Family::ALL {
            let name = format!("bulk-{family:?}");
            config.pool(lab, &name, family, PORT, None);
            config.passthrough(&name, family.virtual_address(), PORT, &name, "automap");
        }
        let daemon = Daemon::start(lab, config.text())?;
        let run = |client: usize, what: &str| {
            for family in Family::ALL {
                let server = SocketAddr::new(family.virtual_address(), PORT);
                let namespace = &lab.clients[client].namespace;
                namespace
                    .enter(|| transfer(server))
                    .with_context(|| format!("{what}, {family:?}"))
                    .inspect_err(|_| eprintln!("{}", daemon.report()))?;
            }
            anyhow::Ok(())
        };
        run(0, "behind routers with small links")?;
        let drops = daemon.stats()?.drops;
        ensure!(drops["too-big"] == 0, "routers said it: {drops:?}");
        lab.balancer.ip(&[
            "route change 10.71.0.0/24 dev cli0 mtu lock 1360".to_owned(),
            "route add fd71::/64 dev cli0 metric 100 mtu 1360".to_owned(),
        ])?;
        run(1, "the box has a small link")?;
        let drops = daemon.stats()?.drops;
        ensure!(drops["too-big"] > 0, "the box said it: {drops:?}");
        Ok(())
    })
}

#[test]
fn small_links_are_found_by_tc() -> Result<()> {
    small_links("tc", Links::Plain)
}

#[test]
fn small_links_are_found_by_xdp() -> Result<()> {
    small_links("xdp", Links::ForXdp)
}

#[test]
fn small_links_are_found_by_generic_xdp() -> Result<()> {
    small_links("xdp-generic", Links::ForXdp)
}
