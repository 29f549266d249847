//! A successor that finds late that it cannot serve: the daemon beside it goes on as if it had never come.

use std::{fs, net::SocketAddr, process::Command, time::Duration};

use anyhow::{Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use tests::{
    client::Storm,
    daemon::{
        self,
        config::{ClientTls, Config},
    },
    lab::{Family, Lab, Links, Plan},
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

/// What a start has changed on the box by the time it flips.
fn traces(lab: &Lab) -> Result<Vec<String>> {
    let (client, server) = lab.interfaces();
    // What the kernel adds by itself, some moments after a link is up, is nobody's.
    let by_itself = |line: &&str| line.contains("fe80::") || line.contains("ff00::");
    let ip = |words: &[&str]| -> Result<String> {
        let said = lab.balancer.run(Command::new("ip").args(words))?;
        let lines = said.lines().filter(|line| !by_itself(line));
        Ok(lines.collect::<Vec<_>>().join("\n"))
    };
    let mut traces = vec![
        ip(&["-oneline", "address"])?,
        ip(&["route", "show", "table", "all"])?,
        ip(&["rule"])?,
        fs::read_to_string(lab.folder().join("state/forwarding"))?,
    ];
    for interface in [client, server] {
        let name = format!("net/ipv6/conf/{interface}/forwarding");
        traces.push(format!("{name} {}", lab.balancer.read_sysctl(&name)?));
        // "xdp/id:33", of whatever program.
        let link = ip(&["-oneline", "link", "show", interface])?;
        let modes = link
            .split_whitespace()
            .filter(|word| word.starts_with("xdp"));
        let modes = modes.filter_map(|word| word.split('/').next());
        traces.push(format!("{interface} {:?}", modes.collect::<Vec<_>>()));
    }
    let own = format!("v{}", lb_common::layout::ABI_VERSION);
    let pins = daemon::bpffs(lab).join(own);
    let judged = Map::HashMap(MapData::from_pin(pins.join("JUDGED"))?);
    let judged: HashMap<_, u32, u32> = judged.try_into()?;
    let mut judged: Vec<u32> = judged.keys().collect::<Result<_, _>>()?;
    judged.sort_unstable();
    traces.push(format!("judged: {judged:?}"));
    let links = fs::read_dir(pins)?.flatten();
    let links = links.filter_map(|entry| entry.file_name().into_string().ok());
    let mut links: Vec<_> = links.filter(|name| name.starts_with("link-")).collect();
    links.sort_unstable();
    traces.extend(links);
    Ok(traces)
}

/// With programs attached in one way, and a successor that attaches in another.
fn fails_late(attach: &str, next: &str) -> Result<()> {
    let links = match [attach, next] {
        ["tc", "tc"] => Links::Plain,
        _ => Links::ForXdp,
    };
    let plan = Plan {
        links,
        ..Plan::TWO_ARM
    };
    let config = |lab: &Lab, _: &_| small(lab, attach);
    play(plan, Mta::Sink, config, |scene| {
        let (lab, pid) = (scene.lab, scene.daemon.id());
        let (client, server) = lab.interfaces();
        let before = traces(lab)?;
        let forwards = format!("net/ipv6/conf/{client}/forwarding 0");
        ensure!(before.contains(&forwards), "{before:#?}");
        let next = does_not_fit_beside(lab, next).text().to_owned();
        let fewer = next.replace(&format!("[\"{server}\"]"), &format!("[\"{client}\"]"));
        for next in [next, fewer] {
            let output = daemon::refused(lab, &next)?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(said.contains(SAYS), "{said}");
            let after = traces(lab)?;
            ensure!(after == before, "{before:#?}, then {after:#?}");
            let status = scene.daemon.status()?;
            ensure!(status.pid == pid, "somebody else answers");
        }
        serves(scene)
    })
}

#[test]
fn a_failed_successor_takes_back_what_it_did() -> Result<()> {
    fails_late("tc", "tc")
}

#[test]
fn a_failed_successor_by_generic_xdp_leaves_xdp_in_the_driver() -> Result<()> {
    fails_late("xdp", "xdp-generic")
}

#[test]
fn a_failed_successor_by_xdp_in_the_driver_leaves_generic_xdp() -> Result<()> {
    fails_late("xdp-generic", "xdp")
}
