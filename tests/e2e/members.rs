//! drain, maint, ready: what they stop, what they end, and that clients may come back at once.

use std::{
    io::{ErrorKind, Read as _},
    net::{SocketAddr, TcpStream},
    process::Command,
    time::Duration,
};

use anyhow::{Result, ensure};
use tests::{
    client::{Held, Mode, Options, Storm},
    daemon::config::{Config, tag},
    lab::{Family, Lab, Plan},
    member::{Mta, Site},
    sink::Event,
    wait::wait_until,
};

use crate::scene::{Scene, play, play_site};

const PATIENCE: Duration = Duration::from_secs(30);

/// Idle connections through the kernel plane, as many to each member.
fn idle(scene: &Scene<'_>, family: Family, count: usize) -> Result<Vec<TcpStream>> {
    let server = SocketAddr::new(family.virtual_address(), 465);
    let client = &scene.lab.clients[0].namespace;
    client.enter(|| {
        let open = |_| {
            let tcp = TcpStream::connect_timeout(&server, Duration::from_secs(10))?;
            tcp.set_read_timeout(Some(PATIENCE))?;
            Ok(tcp)
        };
        (0..count).map(open).collect()
    })
}

/// Waits on each without a word: how many are reset, and how many stay.
fn resets(idle: &mut Vec<TcpStream>, expected: usize) -> Result<()> {
    let mut reset = 0;
    let waiting = std::mem::take(idle);
    for tcp in &waiting {
        tcp.set_read_timeout(Some(Duration::from_millis(10)))?;
    }
    let mut left = waiting;
    wait_until(PATIENCE, &format!("{expected} resets"), || {
        left.retain_mut(|tcp| match tcp.read(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                reset += 1;
                false
            }
            _ => true,
        });
        reset >= expected
    })?;
    ensure!(reset == expected, "{reset} resets");
    *idle = left;
    Ok(())
}

/// Established connections on port 465 of a member's machine.
fn sockets(scene: &Scene<'_>, member: usize) -> Result<usize> {
    let mut ss = Command::new("ss");
    ss.args(["-Htn", "state", "established", "sport", "=", ":465"]);
    let text = scene.lab.members[member].namespace.run(&mut ss)?;
    Ok(text.lines().count())
}

fn visits(scene: &Scene<'_>, member: usize) -> usize {
    let events = scene.site.members[member].events().unwrap_or_default();
    let connects = |event: &&Event| matches!(event, Event::Connect { .. });
    events.iter().filter(connects).count()
}

fn both(scene: &Scene<'_>, verb: &str, member: &str, rest: &[&str]) -> Result<()> {
    for family in ["v4", "v6"] {
        for pool in ["tls", "plain"] {
            let name = format!("{pool}-{family}/{member}");
            let words = [&[verb, name.as_str()], rest].concat();
            scene.daemon.good_verb(&words)?;
        }
    }
    Ok(())
}

#[test]
fn a_drained_member_gets_nothing_new_and_its_connections_end_at_the_deadline() -> Result<()> {
    play_site(|scene| {
        for family in Family::ALL {
            let mut idle = idle(scene, family, 12)?;
            wait_until(PATIENCE, "connections at the member", || {
                sockets(scene, 0).is_ok_and(|count| count == 4)
            })?;
            both(scene, "drain", "m1", &[])?;
            wait_until(PATIENCE, "the word", || {
                let members = scene.daemon.members().unwrap_or_default();
                members
                    .iter()
                    .all(|member| (member.state == "drain") == (member.name == "m1"))
            })?;
            let probes = scene.daemon.members()?;
            ensure!(probes.iter().all(|member| member.reason.is_some()));
            // Monitors go on: only what is no probe may not arrive.
            let server = SocketAddr::new(family.virtual_address(), 465);
            let storm = Storm::start(&scene.lab.clients[1].namespace, server, 2)?;
            wait_until(PATIENCE, "connections to the others", || {
                storm.opened() > 300
            })?;
            let report = storm.stop();
            ensure!(report.failed.is_empty(), "{:?}", report.failed);
            let tls = format!("tls-{}", tests::daemon::config::tag(family));
            let total = |name: &str| {
                let members = scene.daemon.members().unwrap_or_default();
                let mut found = members.into_iter();
                found
                    .find(|member| member.pool == tls && member.name == name)
                    .map(|member| member.kernel)
            };
            ensure!(total("m1").is_some_and(|kernel| kernel.total == 4 && kernel.active == 4));
            // The busier of the two gets fewer, but all went to these.
            let taken = [total("m2"), total("m3")].map(|kernel| kernel.map_or(0, |k| k.total));
            ensure!(taken.iter().all(|taken| *taken > 4), "{taken:?}");
            ensure!(taken.iter().sum::<u64>() >= 8 + 300, "{taken:?}");

            both(scene, "drain", "m1", &["--deadline", "1s"])?;
            resets(&mut idle, 4)?;
            wait_until(PATIENCE, "the member's sockets to go", || {
                sockets(scene, 0).is_ok_and(|count| count == 0)
            })?;
            ensure!(idle.len() == 8, "the others stay");
            // Who comes back is served at once.
            idle.extend(self::idle(scene, family, 4)?);
            ensure!(sockets(scene, 0)? == 0, "it got something new");
            both(scene, "ready", "m1", &[])?;
            scene.daemon.wait_for_member("m1", "up", PATIENCE)?;
            drop(idle);
            wait_until(PATIENCE, "every connection to end", || {
                scene
                    .daemon
                    .members()
                    .is_ok_and(|members| members.iter().all(|member| member.kernel.active == 0))
            })?;
        }
        Ok(())
    })
}

#[test]
fn maintenance_ends_connections_at_once_and_nobody_probes() -> Result<()> {
    play_site(|scene| {
        let mut idle = idle(scene, Family::V4, 6)?;
        let options = Options {
            mode: Mode::Starttls,
            ca: Some(scene.site.ca.clone()),
            ..Options::to((Family::V4.virtual_address(), 587).into())
        };
        let client = &scene.lab.clients[0].namespace;
        let mut sessions = client.enter(|| Held::open(&options, 6))?;
        both(scene, "maint", "m2", &[])?;
        resets(&mut idle, 2)?;
        ensure!(sockets(scene, 1)? == 0);
        let ended = sessions.broken();
        ensure!(ended.len() == 2, "{ended:?}");
        ensure!(ended.iter().all(|said| said.contains("421")), "{ended:?}");
        scene.daemon.wait_for_member("m2", "maint", PATIENCE)?;
        // A probe that was on its way may still arrive.
        let mut seen = visits(scene, 1);
        let mut quiet = 0;
        wait_until(PATIENCE, "two intervals without a probe", || {
            tests::wait::pause(Duration::from_millis(100));
            let now = visits(scene, 1);
            quiet = if now == seen { quiet + 1 } else { 0 };
            seen = now;
            quiet >= 25
        })?;
        both(scene, "ready", "m2", &[])?;
        scene.daemon.wait_for_member("m2", "up", PATIENCE)
    })
}

/// Without SNAT the member's reset comes from the client's address, which is no address of the box.
#[test]
fn connections_without_snat_are_reset_on_both_sides() -> Result<()> {
    let config = |lab: &Lab, _: &Site| {
        let mut config = Config::new(lab, "tc");
        for family in Family::ALL {
            let name = format!("tls-{}", tag(family));
            config.pool(lab, &name, family, 465, None);
            config.passthrough(&name, family.virtual_address(), 465, &name, "none");
        }
        config
    };
    play(Plan::TWO_ARM, Mta::Sink, config, |scene| {
        for family in Family::ALL {
            let mut idle = idle(scene, family, 6)?;
            wait_until(PATIENCE, "connections at the member", || {
                sockets(scene, 0).is_ok_and(|count| count == 2)
            })?;
            let member = format!("tls-{}/m1", tag(family));
            scene
                .daemon
                .good_verb(&["drain", &member, "--deadline", "0s"])?;
            resets(&mut idle, 2)?;
            wait_until(PATIENCE, "the member's sockets to go", || {
                sockets(scene, 0).is_ok_and(|count| count == 0)
            })?;
            scene.daemon.good_verb(&["ready", &member])?;
        }
        Ok(())
    })
}

#[test]
fn sessions_of_a_drained_member_end_between_messages() -> Result<()> {
    play_site(|scene| {
        let options = Options::to((Family::V4.virtual_address(), 25).into());
        let client = &scene.lab.clients[0].namespace;
        let mut sessions = client.enter(|| Held::open(&options, 6))?;
        scene
            .daemon
            .good_verb(&["drain", "plain-v4/m3", "--deadline", "0s"])?;
        let ended = sessions.broken();
        ensure!(ended.len() == 2, "{ended:?}");
        ensure!(
            ended
                .iter()
                .all(|said| said.contains("421") && said.contains("4.3.2")),
            "{ended:?}"
        );
        Ok(())
    })
}

#[test]
fn states_outlive_reload_restart_and_crash() -> Result<()> {
    play_site(|scene| {
        scene
            .daemon
            .good_verb(&["drain", "tls-v4/m1", "--deadline", "1h"])?;
        scene.daemon.good_verb(&["maint", "plain-v6/m3"])?;
        let check = |scene: &Scene<'_>, when: &str| -> Result<()> {
            let members = scene.daemon.members()?;
            for member in members {
                let expected = match (member.pool.as_str(), member.name.as_str()) {
                    ("tls-v4", "m1") => "drain",
                    ("plain-v6", "m3") => "maint",
                    _ => "ready",
                };
                ensure!(member.admin == expected, "{when}: {member:?}");
                let left = member.deadline_s;
                ensure!(
                    expected != "drain" || left.is_some_and(|left| (3000..=3600).contains(&left)),
                    "{when}: {left:?}"
                );
            }
            Ok(())
        };
        check(scene, "at once")?;
        scene.daemon.good_verb(&["reload"])?;
        check(scene, "after a reload")?;
        scene.daemon.stop_for_restart()?;
        scene.daemon.start_again()?;
        check(scene, "after a restart")?;
        scene.daemon.kill()?;
        scene.daemon.start_again()?;
        check(scene, "after a crash")?;
        let before = scene.daemon.members()?;
        let total = |members: &[lb_userspace::admin::view::MemberView]| -> u64 {
            members
                .iter()
                .filter(|member| member.admin != "ready")
                .map(|member| member.traffic.total)
                .sum()
        };
        for (family, port) in [(Family::V4, 465), (Family::V6, 25)] {
            let server = SocketAddr::new(family.virtual_address(), port);
            let storm = Storm::start(&scene.lab.clients[1].namespace, server, 1)?;
            wait_until(PATIENCE, "connections", || storm.opened() > 100)?;
            ensure!(storm.stop().failed.is_empty());
        }
        ensure!(total(&before) == total(&scene.daemon.members()?));
        let unknown = scene.daemon.verb(&["drain", "tls-v4/m9"])?;
        ensure!(unknown.status.code() == Some(1), "{unknown:?}");
        let said = String::from_utf8_lossy(&unknown.stderr).into_owned();
        ensure!(said.contains("tls-v4/m1"), "{said}");
        Ok(())
    })
}

#[test]
fn connections_of_a_member_that_falls_silent_end_where_that_is_wanted() -> Result<()> {
    let wants = |text: &str| text.replace("[pool.tls-v4]", "[pool.tls-v4]\non_down = \"reset\"");
    play(
        Plan::TWO_ARM,
        Mta::Sink,
        |lab, site| Config::site(lab, "tc", &site.certificate),
        |scene| {
            let text = Config::site(scene.lab, "tc", &scene.site.certificate);
            scene.daemon.reconfigure(&wants(text.text()))?;
            scene.daemon.good_verb(&["reload"])?;
            let mut wanted = idle(scene, Family::V4, 6)?;
            let mut left = idle(scene, Family::V6, 6)?;
            let silent = &scene.lab.members[0].namespace;
            let link = "link set eth0 down".to_owned();
            silent.ip(&[link])?;
            resets(&mut wanted, 2)?;
            scene.daemon.wait_for_member("m1", "down", PATIENCE)?;
            resets(&mut left, 0)?;
            ensure!(left.len() == 6);
            Ok(())
        },
    )
}
