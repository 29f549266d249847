//! Reload: another configuration without a refused connection or a reset, and nothing at all when the file has faults.

use std::{
    net::{SocketAddr, TcpStream},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use tests::{
    client::{Held, Mode, Options, Storm},
    daemon::{self, Daemon, config::Config},
    lab::{Family, Lab, Plan},
    mail::{Message, Sizes},
    member::{Mta, Site},
    wait::wait_until,
};

use crate::scene::{Scene, play_site};

const PATIENCE: Duration = Duration::from_secs(30);

fn site(scene: &Scene<'_>) -> String {
    let config = Config::site(scene.lab, "tc", &scene.site.certificate);
    config.text().to_owned()
}

/// The site with other timing, another method, and two virtual servers more.
fn other(scene: &Scene<'_>) -> String {
    let mut text = site(scene)
        .replace("interval = \"1s\"", "interval = \"2s\"")
        .replace(
            "[pool.plain-v4]",
            "[pool.plain-v4]\nmethod = \"round-robin\"",
        );
    let address = Family::V4.virtual_address();
    for (name, port, forward, pool) in [
        ("more", 4465, "passthrough", "tls-v4"),
        ("again", 2525, "proxy", "plain-v4"),
    ] {
        text.push_str(&format!(
            "\n[virtual_server.{name}]\naddress = \"{address}\"\nport = {port}\nforward = \"{forward}\"\npool = \"{pool}\"\n"
        ));
    }
    text
}

fn held(scene: &Scene<'_>, port: u16, mode: Mode, count: usize) -> Result<Vec<Held>> {
    Family::ALL
        .map(|family| {
            let options = Options {
                mode,
                ca: Some(scene.site.ca.clone()),
                ..Options::to((family.virtual_address(), port).into())
            };
            let client = &scene.lab.clients[0].namespace;
            client.enter(|| Held::open(&options, count))
        })
        .into_iter()
        .collect()
}

fn connects(scene: &Scene<'_>, family: Family, port: u16) -> Result<bool> {
    let server = SocketAddr::new(family.virtual_address(), port);
    let client = &scene.lab.clients[0].namespace;
    client.enter(|| Ok(TcpStream::connect_timeout(&server, Duration::from_secs(5)).is_ok()))
}

#[test]
fn a_reload_under_a_storm_harms_no_connection() -> Result<()> {
    play_site(|scene| {
        let mut open = held(scene, 465, Mode::Implicit, 20)?;
        open.extend(held(scene, 587, Mode::Starttls, 20)?);
        let mut storms = Vec::new();
        for family in Family::ALL {
            for port in [25, 465] {
                let server = SocketAddr::new(family.virtual_address(), port);
                storms.push(Storm::start(&scene.lab.clients[1].namespace, server, 1)?);
            }
        }
        let (site, other) = (site(scene), other(scene));
        let before = scene.daemon.status()?.generation;
        let pid = scene.daemon.id();
        for turn in 0..8 {
            scene
                .daemon
                .reconfigure(if turn % 2 == 0 { &other } else { &site })?;
            match turn {
                // The way of those who have no command line at hand.
                6 | 7 => {
                    scene.daemon.signal(Signal::HUP)?;
                    wait_until(PATIENCE, "the reload by signal", || {
                        let generation = scene.daemon.status().map(|status| status.generation);
                        generation.is_ok_and(|generation| generation == before + turn + 1)
                    })?;
                }
                _ => drop(scene.daemon.good_verb(&["reload"])?),
            }
            let opened: Vec<u64> = storms.iter().map(Storm::opened).collect();
            wait_until(PATIENCE, "connections after the reload", || {
                storms
                    .iter()
                    .zip(&opened)
                    .all(|(storm, before)| storm.opened() > before + 50)
            })?;
            for port in [2525, 4465] {
                let there = connects(scene, Family::V4, port)?;
                ensure!(there == (turn % 2 == 0), "turn {turn}: {port}: {there}");
            }
        }
        let status = scene.daemon.status()?;
        ensure!(status.generation == before + 8, "{}", status.generation);
        ensure!(status.pid == pid, "another process answers");
        let text = Message::new("after-reloads", 0, Sizes::Exactly(20_000), 1).text();
        for held in &mut open {
            let broken = held.send_over_each(&text);
            ensure!(broken.is_empty(), "{broken:?}");
        }
        for storm in storms {
            let report = storm.stop();
            ensure!(
                report.failed.is_empty(),
                "{} opened, but {:?}",
                report.opened,
                report.failed
            );
        }
        for member in scene.daemon.members()? {
            ensure!(member.state == "up", "{member:?}");
        }
        Ok(())
    })
}

#[test]
fn a_file_with_faults_changes_nothing() -> Result<()> {
    play_site(|scene| {
        let before = scene.daemon.status()?;
        let site = site(scene);
        let certificate = scene.site.certificate.chain.display().to_string();
        let cases = [
            (
                site.replace("attach = ", "atach = "),
                "smtplb.toml:4:1: error: ",
            ),
            (
                site.replace("pool = \"tls-v6\"", "pool = \"tls-v9\""),
                "which does not exist",
            ),
            (site.replace(&certificate, "/nowhere.pem"), "/nowhere.pem"),
            (site.replace("\"cli0\"", "\"cli9\""), "cli9"),
            (String::new(), "has no virtual server"),
            (
                site.replace("[network]", "[network]\nmax_flows = 4096"),
                "max_flows: 262144 → 4096",
            ),
        ];
        let storm = Storm::start(
            &scene.lab.clients[1].namespace,
            (Family::V4.virtual_address(), 465).into(),
            1,
        )?;
        for (text, said) in &cases {
            ensure!(*text != site, "{said}: nothing is wrong");
            scene.daemon.reconfigure(text)?;
            for words in [
                &["reload"][..],
                &["reload", "--dry-run"],
                &["config", "diff"],
            ] {
                let output = scene.daemon.verb(words)?;
                let error = String::from_utf8_lossy(&output.stderr).into_owned();
                ensure!(output.status.code() == Some(78), "{words:?}: {output:?}");
                ensure!(error.contains(said), "{words:?}: {error}");
            }
            scene.daemon.signal(Signal::HUP)?;
        }
        wait_until(PATIENCE, "connections", || storm.opened() > 100)?;
        let after = scene.daemon.status()?;
        ensure!(after.generation == before.generation, "{after:?}");
        ensure!(after.kernel.attachments == before.kernel.attachments);
        let report = storm.stop();
        ensure!(report.failed.is_empty(), "{:?}", report.failed);
        scene.daemon.reconfigure(&site)?;
        scene.daemon.good_verb(&["reload"]).map(drop)
    })
}

#[test]
fn what_a_reload_would_change_is_told_before() -> Result<()> {
    play_site(|scene| {
        let before = scene.daemon.status()?.generation;
        let same = scene.daemon.good_verb(&["config", "diff"])?;
        ensure!(same.contains("the file says what is in use"), "{same}");
        scene.daemon.reconfigure(&other(scene))?;
        let diff = scene.daemon.good_verb(&["reload", "--dry-run"])?;
        for line in [
            "added    virtual server \"more\"",
            "added    virtual server \"again\"",
            "changed  pool \"plain-v4\"",
            "method: \"least-connections\" → \"round-robin\"",
            "changed  monitor \"opens\"",
            "interval: \"1s\" → \"2s\"",
            "nothing was changed",
        ] {
            ensure!(diff.contains(line), "{line}: {diff}");
        }
        ensure!(scene.daemon.status()?.generation == before);
        // What is shown loads to the same.
        let shown = scene.daemon.good_verb(&["config", "show"])?;
        scene.daemon.reconfigure(&shown)?;
        let same = scene.daemon.good_verb(&["config", "diff"])?;
        ensure!(
            same.contains("the file says what is in use"),
            "{same}\n{shown}"
        );
        Ok(())
    })
}

#[test]
fn what_is_removed_takes_nothing_new_and_its_connections_go_on() -> Result<()> {
    play_site(|scene| {
        let mut open = held(scene, 465, Mode::Implicit, 5)?;
        open.extend(held(scene, 587, Mode::Starttls, 5)?);
        let six = Family::V6.virtual_address().to_string();
        let text: String = site(scene)
            .split("\n\n")
            .filter(|table| !table.contains(&format!("address = \"{six}\"")))
            .collect::<Vec<_>>()
            .join("\n\n");
        scene.daemon.reconfigure(&text)?;
        scene.daemon.good_verb(&["reload"])?;
        for port in [25, 465, 587] {
            ensure!(!connects(scene, Family::V6, port)?, "{port} still answers");
            ensure!(connects(scene, Family::V4, port)?, "{port} is gone as well");
        }
        // Longer than the daemon takes to look what it can remove.
        let log = || scene.daemon.log();
        wait_until(PATIENCE, "the note about what goes on", || {
            log().contains("connections go on until they end")
        })?;
        let text = Message::new("removed", 0, Sizes::Exactly(20_000), 1).text();
        for held in &mut open {
            let broken = held.send_over_each(&text);
            ensure!(broken.is_empty(), "{broken:?}");
        }
        ensure!(
            addresses(scene)?.contains(&six),
            "the address is gone too early"
        );
        open.into_iter().for_each(Held::close);
        wait_until(PATIENCE, "the address to go", || {
            addresses(scene).is_ok_and(|text| !text.contains(&six))
        })
    })
}

#[test]
fn what_comes_does_not_count_as_what_lingers() -> Result<()> {
    play_site(|scene| {
        let mut open = held(scene, 465, Mode::Implicit, 5)?;
        open.extend(held(scene, 587, Mode::Starttls, 5)?);
        let lingering = scene.daemon.open_flows()?.len();
        // Other places under the same names, as often as numbers could come round.
        for port in ["2465", "3465", "4465"] {
            let text = site(scene).replace("port = 465", &format!("port = {port}"));
            let text = text.replace("port = 587", &format!("port = 1{port}"));
            let text = text.replace("port = 25", &format!("port = 2{port}"));
            scene.daemon.reconfigure(&text)?;
            scene.daemon.good_verb(&["reload"])?;
            let stats = scene.daemon.stats()?;
            for (name, traffic) in stats.virtual_servers.iter().chain(&stats.members) {
                let (active, total) = (traffic.active, traffic.total);
                ensure!((active, total) == (0, 0), "{port}: {name}: {traffic:?}");
            }
            let flows = scene.daemon.open_flows()?;
            ensure!(flows.len() == lingering, "{flows:?}");
            let named = flows.iter().find(|it| !it.virtual_server.starts_with('#'));
            ensure!(named.is_none(), "{port}: {named:?}");
        }
        let text = Message::new("linger", 0, Sizes::Exactly(20_000), 1).text();
        for held in &mut open {
            let broken = held.send_over_each(&text);
            ensure!(broken.is_empty(), "{broken:?}");
        }
        open.into_iter().for_each(Held::close);
        wait_until(PATIENCE, "flows to end", || {
            scene
                .daemon
                .open_flows()
                .is_ok_and(|flows| flows.is_empty())
        })?;
        let stats = scene.daemon.stats()?;
        let all = stats.virtual_servers.values().chain(stats.members.values());
        ensure!(all.map(|it| it.total).sum::<u64>() == 0, "{stats:?}");
        Ok(())
    })
}

fn addresses(scene: &Scene<'_>) -> Result<String> {
    let mut ip = Command::new("ip");
    scene.lab.balancer.run(ip.args(["-oneline", "address"]))
}

#[test]
fn certificates_are_read_again_and_sessions_keep_theirs() -> Result<()> {
    play_site(|scene| {
        let mut open = held(scene, 587, Mode::Starttls, 3)?;
        let files = &scene.site.certificate;
        // Another member's certificate is as good as a renewed one.
        let other = &scene.site.members[0].cert;
        let before = certificate(scene)?;
        std::fs::copy(&other.chain, &files.chain)?;
        std::fs::copy(&other.key, &files.key)?;
        let diff = scene.daemon.good_verb(&["config", "diff"])?;
        ensure!(
            diff.contains("changed  certificate \"mail\"") && diff.contains("other content"),
            "{diff}"
        );
        ensure!(certificate(scene)? == before, "it is in use already");
        let shown = || scene.daemon.good_verb(&["show", "certificates"]);
        ensure!(shown()?.contains("balancer.lab.example"), "{}", shown()?);
        scene.daemon.good_verb(&["reload"])?;
        ensure!(certificate(scene)? != before, "the old one is still in use");
        ensure!(shown()?.contains("m1.lab.example"), "{}", shown()?);
        for held in &mut open {
            let broken = held.broken();
            ensure!(broken.is_empty(), "{broken:?}");
        }
        Ok(())
    })
}

/// What `openssl` sees of the certificate on 587.
fn certificate(scene: &Scene<'_>) -> Result<String> {
    let server = format!("{}:587", Family::V4.virtual_address());
    let mut openssl = Command::new("openssl");
    openssl.args(["s_client", "-starttls", "smtp", "-connect", &server]);
    let output = scene.lab.clients[0].namespace.output(&mut openssl)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let begin = text
        .find("-----BEGIN CERTIFICATE")
        .context("no certificate")?;
    let end = text
        .find("-----END CERTIFICATE")
        .context("no certificate")?;
    Ok(text[begin..end].to_owned())
}

#[test]
fn the_first_passthrough_server_may_come_by_reload() -> Result<()> {
    Lab::run(Plan::TWO_ARM, |lab| {
        let site = Site::start(lab, Mta::Sink)?;
        let full = Config::site(lab, "tc", &site.certificate).text().to_owned();
        let proxy: String = full
            .split("\n\n")
            .filter(|table| !table.contains("\"passthrough\""))
            .collect::<Vec<_>>()
            .join("\n\n");
        let daemon = Daemon::start(lab, &proxy)?;
        let scene = Scene { lab, site, daemon };
        ensure!(scene.daemon.status()?.kernel.attachments.is_empty());
        let mut open = held(&scene, 587, Mode::Starttls, 3)?;
        for _ in 0..2 {
            scene.daemon.reconfigure(&full)?;
            scene.daemon.good_verb(&["reload"])?;
            wait_until(PATIENCE, "connections through the kernel", || {
                connects(&scene, Family::V4, 465).unwrap_or(false)
            })?;
            scene.daemon.reconfigure(&proxy)?;
            scene.daemon.good_verb(&["reload"])?;
            ensure!(!connects(&scene, Family::V4, 465)?, "465 still answers");
            wait_until(PATIENCE, "the packet programs to go", || {
                let status = scene.daemon.status();
                status.is_ok_and(|status| status.kernel.attachments.is_empty())
            })?;
        }
        let resized = full.replace("[network]", "[network]\nmax_flows = 4096");
        scene.daemon.reconfigure(&resized)?;
        let output = scene.daemon.verb(&["reload"])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(78), "{output:?}");
        ensure!(said.contains("max_flows: 262144 → 4096"), "{said}");
        for held in &mut open {
            let broken = held.broken();
            ensure!(broken.is_empty(), "{broken:?}");
        }
        Ok(())
    })
}

#[test]
fn two_starts_at_once_come_one_after_the_other() -> Result<()> {
    play_site(|scene| {
        let storm = Storm::start(
            &scene.lab.clients[1].namespace,
            (Family::V4.virtual_address(), 465).into(),
            1,
        )?;
        scene.daemon.succeed_twice_at_once()?;
        let opened = storm.opened();
        wait_until(PATIENCE, "connections", || storm.opened() > opened + 100)?;
        let report = storm.stop();
        ensure!(report.failed.is_empty(), "{:?}", report.failed);
        let log = scene.daemon.log();
        ensure!(log.contains("is starting; waiting for it"), "{log}");
        scene.daemon.stop()?;
        ensure!(!daemon::has_pins(&daemon::bpffs(scene.lab)));
        Ok(())
    })
}

/// The passthrough virtual servers as proxies on the same places.
fn proxied(site: &str) -> String {
    let tables = site.split("\n\n").map(|table| {
        let lines = table.lines().filter(|line| !line.starts_with("snat"));
        let table = lines.collect::<Vec<_>>().join("\n");
        table.replace(
            "forward = \"passthrough\"",
            "forward = \"proxy\"\nserver_tls = \"none\"\nclient_tls = \"none\"",
        )
    });
    tables.collect::<Vec<_>>().join("\n\n")
}

#[test]
fn flows_of_what_becomes_a_proxy_go_on() -> Result<()> {
    play_site(|scene| {
        let mut open = held(scene, 465, Mode::Implicit, 5)?;
        let text = proxied(&site(scene));
        scene.daemon.reconfigure(&text)?;
        scene.daemon.good_verb(&["reload"])?;
        let log = || scene.daemon.log();
        wait_until(PATIENCE, "the note about what goes on", || {
            log().contains("flows go on until they end")
        })?;
        // A second look would take the packet programs away.
        let generation = scene.daemon.status()?.generation;
        scene.daemon.good_verb(&["reload"])?;
        ensure!(scene.daemon.status()?.generation > generation);
        // Gone for good, its flows still have what was passed through.
        let proxy = |table: &&str| !table.contains("port = 465\nforward");
        let gone: Vec<_> = text.split("\n\n").filter(proxy).collect();
        scene.daemon.reconfigure(&gone.join("\n\n"))?;
        scene.daemon.good_verb(&["reload"])?;
        let text = Message::new("proxied", 0, Sizes::Exactly(20_000), 1).text();
        for held in &mut open {
            let broken = held.send_over_each(&text);
            ensure!(broken.is_empty(), "{broken:?}");
        }
        open.into_iter().for_each(Held::close);
        wait_until(PATIENCE, "the packet programs to go", || {
            let status = scene.daemon.status();
            status.is_ok_and(|status| status.kernel.attachments.is_empty())
        })
    })
}

#[test]
fn a_reload_that_fails_at_its_switch_changes_nothing() -> Result<()> {
    play_site(|scene| {
        let mut open = held(scene, 465, Mode::Implicit, 5)?;
        scene.site.members[0].crash(&scene.lab.members[0])?;
        scene.daemon.wait_for_member("m1", "down", PATIENCE)?;
        let before = scene.daemon.status()?;
        // No monitor any more, so every member is up; and a prefix that holds the box's own address.
        let mut text: String = site(scene)
            .lines()
            .filter(|line| !line.starts_with("monitor = "))
            .collect::<Vec<_>>()
            .join("\n");
        text.push_str(
            "\n[virtual_server.wide]\naddress = \"10.71.0.0/24\"\nport = 4465\nforward = \"passthrough\"\npool = \"tls-v4\"\n",
        );
        scene.daemon.reconfigure(&text)?;
        let output = scene.daemon.verb(&["reload"])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success(), "{output:?}");
        ensure!(said.contains("the box's own address"), "{said}");
        let after = scene.daemon.status()?;
        ensure!(after.generation == before.generation, "{after:?}");
        ensure!(after.kernel.attachments == before.kernel.attachments);
        let members = scene.daemon.members()?;
        let up = |name: &str| {
            let mut named = members.iter().filter(|member| member.name == name);
            named.any(|member| member.state == "up")
        };
        ensure!(!up("m1") && up("m2"), "{members:?}");
        let text = Message::new("unswitched", 0, Sizes::Exactly(20_000), 1).text();
        for held in &mut open {
            // Those on the member that is down have lost it by themselves.
            let _ = held.send_over_each(&text);
        }
        for _ in 0..6 {
            ensure!(connects(scene, Family::V4, 465)?, "465 no longer answers");
        }
        Ok(())
    })
}
