//! What the box has of its own: neighbours it must ask for, and addresses that are none of the daemon's.

use std::{
    net::{SocketAddr, TcpStream},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use tests::{
    client::{self, Mode, Options},
    daemon::{
        Daemon,
        config::{Config, tag},
    },
    lab::{Family, Lab, Links, Plan},
    mail::Sizes,
    member::{Mta, Site},
};

/// Passthrough on 465 of both families, with nothing that would keep neighbours warm.
fn unwatched(lab: &Lab, attach: &str) -> Config {
    let mut config = Config::new(lab, attach);
    for family in Family::ALL {
        let pool = format!("tls-{}", tag(family));
        config.pool(lab, &pool, family, 465, None);
        let name = format!("smtps-{}", tag(family));
        config.passthrough(&name, family.virtual_address(), 465, &pool, "automap");
    }
    config
}

/// Every member and the client have to be asked for: no first packet may be lost to that for long.
fn cold_neighbours(links: Links, attach: &str) -> Result<()> {
    let plan = Plan {
        links,
        ..Plan::TWO_ARM
    };
    Lab::run(plan, |lab| {
        let _site = Site::start(lab, Mta::Sink)?;
        let _daemon = Daemon::start(lab, unwatched(lab, attach).text())?;
        for family in Family::ALL {
            let server = SocketAddr::new(family.virtual_address(), 465);
            for _ in 0..3 {
                let mut flush = Command::new("ip");
                lab.balancer
                    .run(flush.args(["neighbour", "flush", "all"]))?;
                lab.clients[0].namespace.enter(|| {
                    TcpStream::connect_timeout(&server, Duration::from_secs(4))
                        .map(drop)
                        .with_context(|| format!("{server} with cold neighbours by {attach}"))
                })?;
            }
        }
        Ok(())
    })
}

#[test]
fn cold_neighbours_are_asked_for_by_tc() -> Result<()> {
    cold_neighbours(Links::Plain, "tc")
}

#[test]
fn cold_neighbours_are_asked_for_by_xdp() -> Result<()> {
    cold_neighbours(Links::ForXdp, "xdp")
}

#[test]
fn cold_neighbours_are_asked_for_by_generic_xdp() -> Result<()> {
    cold_neighbours(Links::ForXdp, "xdp-generic")
}

#[test]
fn an_address_of_the_admin_stays() -> Result<()> {
    Lab::run(Plan::TWO_ARM, |lab| {
        let _site = Site::start(lab, Mta::Sink)?;
        let own = Family::V4.virtual_address().to_string();
        let mut add = Command::new("ip");
        lab.balancer
            .run(add.args(["address", "add", &format!("{own}/24"), "dev", "cli0"]))?;
        let mut daemon = Daemon::start(lab, unwatched(lab, "tc").text())?;
        let list = || {
            let mut ip = Command::new("ip");
            lab.balancer.run(ip.args(["-oneline", "address"]))
        };
        let added = Family::V6.virtual_address().to_string();
        ensure!(list()?.contains(&format!("{added}/128")), "{}", list()?);
        daemon.stop()?;
        let left = list()?;
        ensure!(left.contains(&format!("{own}/24")), "{left}");
        ensure!(!left.contains(&format!("{added}/")), "{left}");
        Ok(())
    })
}

/// Before Linux 5.18 the kernel forgets whose an address is.
#[test]
fn an_address_that_the_kernel_has_not_marked_is_known_again() -> Result<()> {
    Lab::run(Plan::TWO_ARM, |lab| {
        let _site = Site::start(lab, Mta::Sink)?;
        let mut daemon = Daemon::start(lab, unwatched(lab, "tc").text())?;
        daemon.kill()?;
        let state = lab.folder().join("state/addresses");
        ensure!(!state.exists(), "this kernel marks addresses");
        let ip = |words: &str| lab.balancer.run(Command::new("ip").args(words.split(' ')));
        let [ours, other] = [Family::V4, Family::V6].map(Family::virtual_address);
        // As such a kernel has them: one that was written down, and one that was not.
        for (address, length) in [(ours, 32), (other, 128)] {
            ip(&format!("address del {address}/{length} dev cli0"))?;
            ip(&format!("address add {address}/{length} dev cli0"))?;
        }
        let index = ip("-oneline link show cli0")?;
        let index = index.split(':').next().context("no index")?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        std::fs::write(&state, format!("{boot}{ours} {index}\n"))?;
        daemon.start_again()?;
        daemon.stop()?;
        let left = ip("-oneline address")?;
        ensure!(!left.contains(&format!("{ours}/")), "{left}");
        ensure!(left.contains(&format!("{other}/")), "{left}");
        ensure!(!state.exists(), "it is still written down");
        Ok(())
    })
}

/// Programs on the box itself reach passthrough virtual servers by `lo`.
fn clients_on_the_box(links: Links, attach: &str) -> Result<()> {
    let plan = Plan {
        links,
        ..Plan::TWO_ARM
    };
    Lab::run(plan, |lab| {
        let site = Site::start(lab, Mta::Sink)?;
        let config = unwatched(lab, attach).text().replacen(
            "client_interfaces = [\"cli0\"]",
            "client_interfaces = [\"cli0\", \"lo\"]",
            1,
        );
        let daemon = Daemon::start(lab, &config)?;
        for family in Family::ALL {
            let options = Options {
                mode: Mode::Implicit,
                count: 20,
                sizes: Sizes::MixedUpTo(1_000_000),
                run: format!("own-{}", tag(family)),
                ca: Some(site.ca.clone()),
                ..Options::to((family.virtual_address(), 465).into())
            };
            for (who, namespace) in [
                ("the box", &lab.balancer),
                ("a client", &lab.clients[0].namespace),
            ] {
                let sent = namespace.enter(|| client::send_all(&options))?;
                let failed = sent.iter().find(|outcome| !outcome.ok);
                ensure!(
                    failed.is_none(),
                    "{who}: {}\n{}",
                    failed.map_or("", |outcome| &outcome.reply),
                    daemon.report()
                );
            }
        }
        Ok(())
    })
}

#[test]
fn clients_on_the_box_by_tc() -> Result<()> {
    clients_on_the_box(Links::Plain, "auto")
}

#[test]
fn clients_on_the_box_by_xdp() -> Result<()> {
    clients_on_the_box(Links::ForXdp, "xdp")
}
