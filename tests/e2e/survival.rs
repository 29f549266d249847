//! The kernel plane without its daemon: killed, restarted, stopped.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpStream},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use tests::{
    client::{Held, Mode, Options, Storm},
    daemon::{self, Daemon, config::Config},
    lab::Family,
    mail::{Message, Sizes},
    wait::{pause, wait_until},
};

use crate::scene::{Scene, play_site};

const PATIENCE: Duration = Duration::from_secs(20);
/// Per family.
const HELD: usize = 50;

#[test]
fn a_killed_daemon_harms_no_connection() -> Result<()> {
    play_site(|scene| outlive(scene, |daemon| daemon.kill()))
}

#[test]
fn a_restart_harms_no_connection() -> Result<()> {
    play_site(|scene| outlive(scene, |daemon| daemon.stop_for_restart()))
}

/// Open connections and a storm of new ones, while the daemon ends and another comes.
fn outlive(scene: &mut Scene<'_>, end: fn(&mut Daemon<'_>) -> Result<()>) -> Result<()> {
    let [calm, stormy] = [&scene.lab.clients[0], &scene.lab.clients[1]];
    let mut held = Vec::new();
    for family in Family::ALL {
        let options = Options {
            mode: Mode::Implicit,
            ca: Some(scene.site.ca.clone()),
            ..Options::to((family.virtual_address(), 465).into())
        };
        held.push(calm.namespace.enter(|| Held::open(&options, HELD))?);
    }
    let before = scene.daemon.stats()?;
    let storms = Family::ALL
        .map(|family| {
            Storm::start(
                &stormy.namespace,
                SocketAddr::new(family.virtual_address(), 465),
                2,
            )
        })
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let rages_on = |what: &str| {
        let opened: Vec<u64> = storms.iter().map(Storm::opened).collect();
        wait_until(Duration::from_secs(20), what, || {
            storms
                .iter()
                .zip(&opened)
                .all(|(storm, before)| storm.opened() > before + 100)
        })
    };
    rages_on("connections with the daemon")?;

    end(&mut scene.daemon)?;
    rages_on("connections without a daemon")?;
    let text = Message::new("without-a-daemon", 0, Sizes::Exactly(20_000), 1).text();
    for held in &mut held {
        let broken = held.send_over_each(&text);
        ensure!(broken.is_empty(), "without a daemon: {broken:?}");
    }

    scene.daemon.start_again()?;
    rages_on("connections with the next daemon")?;
    for held in &mut held {
        let broken = held.broken();
        ensure!(broken.is_empty(), "with the next daemon: {broken:?}");
    }
    let established = scene.daemon.open_flows()?;
    let established = established
        .iter()
        .filter(|flow| flow.client.ip() == calm.v4 || flow.client.ip() == calm.v6);
    ensure!(
        established.count() == 2 * HELD,
        "the next daemon does not know the flows"
    );
    for storm in storms {
        let report = storm.stop();
        ensure!(
            report.failed.is_empty(),
            "{} opened, but {:?}",
            report.opened,
            report.failed
        );
    }
    let after = scene.daemon.stats()?;
    for (name, before) in before
        .virtual_servers
        .iter()
        .filter(|(name, _)| name.starts_with("smtps"))
    {
        let after = &after.virtual_servers[name];
        ensure!(
            after.total > before.total,
            "{name}: {before:?}, then {after:?}"
        );
        ensure!(
            after.packets_in > before.packets_in,
            "{name}: {before:?}, then {after:?}"
        );
    }
    held.into_iter().for_each(Held::close);
    wait_until(Duration::from_secs(15), "closed flows to go", || {
        scene
            .daemon
            .open_flows()
            .is_ok_and(|flows| flows.is_empty())
    })
}

#[test]
fn a_successor_takes_over_without_a_refused_connection() -> Result<()> {
    play_site(|scene| {
        let stormy = &scene.lab.clients[0].namespace;
        let mut storms = Vec::new();
        for family in Family::ALL {
            for port in [25, 465, 587] {
                let server = SocketAddr::new(family.virtual_address(), port);
                storms.push(Storm::start(stormy, server, 1)?);
            }
        }
        let pid = scene.daemon.id();
        for _ in 0..3 {
            scene.daemon.succeed()?;
            let opened: Vec<u64> = storms.iter().map(Storm::opened).collect();
            wait_until(
                Duration::from_secs(20),
                "connections with the successor",
                || {
                    storms
                        .iter()
                        .zip(&opened)
                        .all(|(storm, before)| storm.opened() > before + 100)
                },
            )?;
        }
        ensure!(scene.daemon.status()?.pid != pid, "the old one answers");
        for storm in storms {
            let report = storm.stop();
            ensure!(
                report.failed.is_empty(),
                "{} opened, but {:?}",
                report.opened,
                report.failed
            );
        }
        Ok(())
    })
}

#[test]
fn a_successor_that_cannot_start_harms_nobody() -> Result<()> {
    play_site(|scene| {
        let pid = scene.daemon.id();
        let config = Config::site(scene.lab, "tc", &scene.site.certificate);
        let output = daemon::refused_as(scene.lab, config.text(), |command| {
            let mut elsewhere = Command::new(command.get_program());
            let mut words = command.get_args();
            while let Some(word) = words.next() {
                elsewhere.arg(word);
                if word == "--admin" {
                    words.next();
                    elsewhere.arg("/proc/nowhere/admin.sock");
                }
            }
            elsewhere
        })?;
        ensure!(output.status.code() == Some(1), "{output:?}");
        for port in [25, 465] {
            let server = SocketAddr::new(Family::V4.virtual_address(), port);
            let storm = Storm::start(&scene.lab.clients[0].namespace, server, 1)?;
            wait_until(Duration::from_secs(20), "connections", || {
                storm.opened() > 300
            })?;
            let report = storm.stop();
            ensure!(report.failed.is_empty(), "{port}: {:?}", report.failed);
        }
        ensure!(scene.daemon.status()?.pid == pid, "somebody else answers");
        Ok(())
    })
}

#[test]
fn connections_that_end_without_a_daemon_are_forgotten_by_the_next() -> Result<()> {
    play_site(|scene| {
        let options = Options {
            mode: Mode::Implicit,
            ca: Some(scene.site.ca.clone()),
            ..Options::to((Family::V4.virtual_address(), 465).into())
        };
        let client = &scene.lab.clients[0].namespace;
        let held = client.enter(|| Held::open(&options, 10))?;
        scene.daemon.kill()?;
        held.close();
        // The members' last packets are on their way.
        pause(Duration::from_millis(200));
        scene.daemon.start_again()?;
        wait_until(Duration::from_secs(15), "ended flows to go", || {
            scene
                .daemon
                .open_flows()
                .is_ok_and(|flows| flows.is_empty())
        })?;
        for member in scene.daemon.members()? {
            ensure!(member.kernel.active == 0, "{member:?}");
        }
        Ok(())
    })
}

#[test]
fn flows_of_another_layout_go_on_beside() -> Result<()> {
    play_site(|scene| {
        let client = &scene.lab.clients[0].namespace;
        // Two tables do not know each other's SNAT ports; members of two families share none.
        let hold = |family: Family| {
            let options = Options {
                mode: Mode::Implicit,
                ca: Some(scene.site.ca.clone()),
                ..Options::to((family.virtual_address(), 465).into())
            };
            client.enter(|| Held::open(&options, 10))
        };
        let mut old = hold(Family::V4)?;
        scene.daemon.stop_for_restart()?;
        // As if the next version had another layout of its tables.
        let bpffs = daemon::bpffs(scene.lab);
        let own = format!("v{}", lb_common::layout::ABI_VERSION);
        std::fs::rename(bpffs.join(&own), bpffs.join("v0"))?;
        scene.daemon.start_again()?;
        scene.daemon.wait_for_checked()?;
        ensure!(bpffs.join(&own).exists() && bpffs.join("v0").exists());
        let mut new = hold(Family::V6)?;
        ensure!(
            scene.daemon.open_flows()?.len() == 10,
            "the new ones are not ours"
        );
        let text = Message::new("beside", 0, Sizes::Exactly(20_000), 1).text();
        for held in [&mut old, &mut new] {
            let broken = held.send_over_each(&text);
            ensure!(broken.is_empty(), "{broken:?}");
        }
        old.close();
        wait_until(Duration::from_secs(40), "the other layout to go", || {
            !bpffs.join("v0").exists()
        })?;
        let broken = new.send_over_each(&text);
        ensure!(broken.is_empty(), "{broken:?}");
        Ok(())
    })
}

#[test]
fn a_start_of_another_layout_that_fails_harms_no_flow() -> Result<()> {
    play_site(|scene| {
        let client = &scene.lab.clients[0].namespace;
        let options = Options {
            mode: Mode::Implicit,
            ca: Some(scene.site.ca.clone()),
            ..Options::to((Family::V4.virtual_address(), 465).into())
        };
        let mut open = client.enter(|| Held::open(&options, 10))?;
        scene.daemon.stop_for_restart()?;
        let bpffs = daemon::bpffs(scene.lab);
        let own = format!("v{}", lb_common::layout::ABI_VERSION);
        std::fs::rename(bpffs.join(&own), bpffs.join("v0"))?;
        let failed = scene
            .daemon
            .fail_beside(std::path::Path::new("/proc/nowhere/admin.sock"))?;
        ensure!(!failed.status.success(), "{failed:?}");
        ensure!(bpffs.join("v0").exists(), "the other layout is gone");
        ensure!(!bpffs.join(&own).exists(), "the failed one has left pins");
        let text = Message::new("failed-beside", 0, Sizes::Exactly(20_000), 1).text();
        let broken = open.send_over_each(&text);
        ensure!(broken.is_empty(), "{broken:?}");
        scene.daemon.start_again()?;
        let broken = open.send_over_each(&text);
        ensure!(broken.is_empty(), "{broken:?}");
        // A stop takes down what was there before it, too.
        scene.daemon.stop()?;
        ensure!(!daemon::has_pins(&bpffs), "something is still pinned");
        Ok(())
    })
}

/// A session within a message, which a drain waits for.
fn within_a_message(server: SocketAddr) -> Result<BufReader<TcpStream>> {
    let mut session = BufReader::new(TcpStream::connect(server)?);
    session.get_ref().set_read_timeout(Some(PATIENCE))?;
    let words = [
        "",
        "HELO client.lab.example\r\n",
        "MAIL FROM:<a@lab.example>\r\n",
        "RCPT TO:<inbox@lab.example>\r\n",
        "DATA\r\n",
    ];
    for word in words {
        session.get_ref().write_all(word.as_bytes())?;
        let mut reply = String::new();
        session.read_line(&mut reply)?;
        ensure!(reply.starts_with(['2', '3']), "{word:?}: {reply:?}");
    }
    session.get_ref().write_all(b"half a message\r\n")?;
    Ok(session)
}

#[test]
fn a_second_word_ends_the_drain_at_once() -> Result<()> {
    // The service manager's restart is overtaken by its stop.
    for first in [Signal::TERM, Signal::USR2] {
        play_site(|scene| {
            let server = SocketAddr::new(Family::V4.virtual_address(), 25);
            let client = &scene.lab.clients[0].namespace;
            let mut session = client.enter(|| within_a_message(server))?;
            scene.daemon.signal(first)?;
            wait_until(PATIENCE, "the drain to begin", || {
                scene.daemon.log().contains("stopping")
            })?;
            let began = Instant::now();
            scene.daemon.stop()?;
            let took = began.elapsed();
            // A drain would take thirty.
            ensure!(took < Duration::from_secs(8), "{took:?}");
            let mut last = String::new();
            session.read_line(&mut last)?;
            ensure!(last.starts_with("421 4.3.2 "), "{last:?}");
            let log = scene.daemon.log();
            ensure!(log.contains(" 1 were cut"), "{log}");
            ensure!(
                !daemon::has_pins(&daemon::bpffs(scene.lab)),
                "something is still pinned"
            );
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_stop_takes_everything_down() -> Result<()> {
    play_site(|scene| {
        scene.daemon.stop()?;
        let bpffs = daemon::bpffs(scene.lab);
        ensure!(!daemon::has_pins(&bpffs), "something is still pinned");
        let mut ip = Command::new("ip");
        let text = scene.lab.balancer.run(ip.args(["-oneline", "address"]))?;
        for family in Family::ALL {
            let address = family.virtual_address().to_string();
            ensure!(!text.contains(&format!("{address}/")), "{text}");
        }
        ensure!(
            !daemon::socket(scene.lab).exists(),
            "the admin socket is still there"
        );
        let server = SocketAddr::new(Family::V4.virtual_address(), 465);
        scene.lab.clients[0].namespace.enter(|| {
            let refused = TcpStream::connect_timeout(&server, Duration::from_secs(1));
            ensure!(refused.is_err(), "somebody still answers");
            Ok(())
        })
    })
}
