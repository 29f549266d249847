//! A successor that finds late that it cannot serve: the daemon beside it goes on as if it had never come.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use tests::{
    client::Storm,
    daemon::{
        self,
        config::{ClientTls, Config},
    },
    lab::{Family, Lab, Plan},
    member::Mta,
    wait::wait_until,
};

use crate::scene::{Scene, play};

const PATIENCE: Duration = Duration::from_secs(20);
/// A virtual address that only a start which fails has.
const ANOTHER: &str = "10.99.0.77";
/// What such a start says.
const SAYS: &str = "pairs of SNAT address and member";

/// IPv4 alone, in the smallest tables: 465 through the kernel, 25 through the proxy.
fn small(lab: &Lab, attach: &str) -> Config {
    let mut config = Config::new(lab, attach);
    config.raw("max_flows = 1024");
    let address = Family::V4.virtual_address();
    config.pool(lab, "tls-v4", Family::V4, 465, None);
    config.pool(lab, "plain-v4", Family::V4, 25, None);
    config.passthrough("smtps-v4", address, 465, "tls-v4", "automap");
    config.proxy("smtp-v4", address, 25, "plain-v4", ClientTls::None);
    config
}

/// As many pairs of SNAT address and member as these tables have, so that there is no room beside those in use; and
/// another virtual address, and the other family.
fn does_not_fit_beside(lab: &Lab, attach: &str) -> Config {
    let text = small(lab, attach).text().replace("automap", "wide");
    let mut config = Config::new(lab, attach);
    let begins = config.text().len();
    let addresses: Vec<_> = (1..=20).map(|it| format!("\"10.72.1.{it}\"")).collect();
    config
        .raw(&text[begins..])
        .raw(&format!(
            "[snat.wide]\naddresses = [{}]",
            addresses.join(", ")
        ))
        .proxy(
            "more",
            ANOTHER.parse().expect("an address"),
            25,
            "plain-v4",
            ClientTls::None,
        )
        .pool(lab, "tls-v6", Family::V6, 465, None)
        .passthrough(
            "smtps-v6",
            Family::V6.virtual_address(),
            465,
            "tls-v6",
            "automap",
        );
    config
}

/// Connections of new clients in both planes.
fn serves(scene: &Scene<'_>) -> Result<()> {
    for port in [25, 465] {
        let server = SocketAddr::new(Family::V4.virtual_address(), port);
        let storm = Storm::start(&scene.lab.clients[0].namespace, server, 1)?;
        let opened = wait_until(PATIENCE, "connections", || storm.opened() > 100);
        let report = storm.stop();
        let (count, first) = (report.failed.len(), report.failed.first());
        ensure!(count == 0, "{port}: {count} failed: {first:?}");
        opened?;
    }
    Ok(())
}

#[test]
fn a_successor_that_does_not_fit_leaves_the_proxy_to_the_other() -> Result<()> {
    let config = |lab: &Lab, _: &_| small(lab, "tc");
    play(Plan::TWO_ARM, Mta::Sink, config, |scene| {
        let next = does_not_fit_beside(scene.lab, "tc");
        let output = daemon::refused(scene.lab, next.text())?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1), "{output:?}");
        ensure!(said.contains(SAYS), "{said}");
        serves(scene)
    })
}
