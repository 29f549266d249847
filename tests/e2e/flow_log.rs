//! Every passthrough connection is logged at its end, and those that live can be listed by what they are.

use std::{
    io::Write as _,
    net::{SocketAddr, TcpStream},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lb_userspace::admin::view::FlowView;
use tests::{
    client::{Held, Mode, Options, Storm},
    daemon::{Daemon, config::Config},
    lab::{Family, Lab, Plan},
    mail::Sizes,
    member::{Mta, Site},
    wait::{wait_for, wait_until},
};

use crate::scene::{Scene, play_site};

const PATIENCE: Duration = Duration::from_secs(30);

/// The lines of the flow log that hold all of these.
fn lines(scene: &Scene<'_>, words: &[&str]) -> Vec<String> {
    let log = scene.daemon.log();
    log.lines()
        .filter(|line| line.starts_with("flow ") && words.iter().all(|word| line.contains(word)))
        .map(str::to_owned)
        .collect()
}

/// The number behind `key=` in a line.
fn number(line: &str, key: &str) -> Result<u64> {
    let value = line
        .split(' ')
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    Ok(value
        .with_context(|| format!("no {key}: {line}"))?
        .parse()?)
}

#[test]
fn each_connection_is_logged_with_what_it_was() -> Result<()> {
    play_site(|scene| {
        for family in Family::ALL {
            let options = Options {
                mode: Mode::Implicit,
                sizes: Sizes::Exactly(50_000),
                ..Options::to((family.virtual_address(), 465).into())
            };
            scene.send(&scene.lab.clients[0], &options)?;
            let client = format!("client={}", scene.lab.clients[0].address(family));
            let client = client.replace("client=fd", "client=[fd");
            let line = wait_for(PATIENCE, "the line", || {
                lines(scene, &[&client, "end=closed"]).pop()
            })?;
            ensure!(number(&line, "bytes_in")? > 50_000, "{line}");
            ensure!(number(&line, "bytes_out")? > 500, "{line}");
            ensure!(number(&line, "packets_in")? > 5, "{line}");
            ensure!(number(&line, "packets_out")? > 5, "{line}");
            ensure!(line.contains(" virtual_server=smtps-"), "{line}");
            ensure!(
                line.contains(" member=m") && line.contains(" snat="),
                "{line}"
            );
            ensure!(line.ends_with(" end=closed phase=closing"), "{line}");
        }
        let server = SocketAddr::new(Family::V4.virtual_address(), 465);
        let port = scene.lab.clients[1].namespace.enter(|| {
            let mut tcp = TcpStream::connect(server)?;
            tcp.write_all(b"no TLS at all")?;
            rustix::net::sockopt::set_socket_linger(&tcp, Some(Duration::ZERO))?;
            Ok(tcp.local_addr()?.port())
        })?;
        let client = format!("client={}:{port}", scene.lab.clients[1].v4);
        wait_until(PATIENCE, "the reset one", || {
            let reset = lines(scene, &[&client, " end=reset-by-"]);
            // The member may answer the nonsense before the client gives up.
            reset.len() == 1 || lines(scene, &[&client, "end=closed"]).len() == 1
        })
    })
}

#[test]
fn what_ends_without_a_daemon_is_logged_by_the_next() -> Result<()> {
    play_site(|scene| {
        let options = Options {
            mode: Mode::Implicit,
            ca: Some(scene.site.ca.clone()),
            ..Options::to((Family::V4.virtual_address(), 465).into())
        };
        let client = &scene.lab.clients[0].namespace;
        let held = client.enter(|| Held::open(&options, 7))?;
        scene.daemon.kill()?;
        let before = lines(scene, &[]).len();
        held.close();
        scene.daemon.start_again()?;
        wait_until(PATIENCE, "seven lines", || {
            lines(scene, &["end=closed"]).len() == before + 7
        })?;
        // Two daemons side by side: each end is logged once.
        let held = client.enter(|| Held::open(&options, 5))?;
        let before = lines(scene, &[]).len();
        scene.daemon.succeed()?;
        held.close();
        wait_until(PATIENCE, "five lines more", || {
            lines(scene, &["end=closed"]).len() == before + 5
        })
    })
}

#[test]
fn what_ends_with_the_kernel_plane_is_logged_too() -> Result<()> {
    play_site(|scene| {
        let options = Options {
            mode: Mode::Implicit,
            ca: Some(scene.site.ca.clone()),
            ..Options::to((Family::V6.virtual_address(), 465).into())
        };
        let client = &scene.lab.clients[0].namespace;
        let _held = client.enter(|| Held::open(&options, 4))?;
        scene.daemon.stop()?;
        let stopped = lines(scene, &["end=stopped", "phase=established"]);
        ensure!(stopped.len() == 4, "{stopped:?}");
        Ok(())
    })
}

/// Gives the daemon a standard output that is read up to the first line, and then no more.
fn without_a_reader(smtplb: Command) -> Command {
    let mut shell = Command::new("bash");
    shell
        .arg("-c")
        .arg("exec \"$0\" \"$@\" > >(read -r line; echo \"$line\"; exec sleep infinity)");
    shell.arg(smtplb.get_program()).args(smtplb.get_args());
    shell
}

#[test]
fn a_reader_that_stands_still_holds_nothing_up() -> Result<()> {
    Lab::run(Plan::TWO_ARM, |lab| {
        let site = Site::start(lab, Mta::Sink)?;
        let config = Config::site(lab, "tc", &site.certificate);
        let mut daemon = Daemon::start_as(lab, config.text(), without_a_reader)?;
        let server = SocketAddr::new(Family::V4.virtual_address(), 465);
        let storm = Storm::start(&lab.clients[0].namespace, server, 2)?;
        // A line has some 250 bytes, a pipe holds 64 KiB: it is full four times.
        wait_until(PATIENCE, "a thousand connections", || {
            let stats = daemon.stats();
            stats.is_ok_and(|stats| stats.virtual_servers["smtps-v4"].total > 1000)
        })?;
        let report = storm.stop();
        ensure!(report.opened > 1000, "{report:?}");
        daemon.good_verb(&["reload"])?;
        daemon.good_verb(&["status"])?;
        daemon.stop()
    })
}

#[test]
fn a_storm_is_not_logged_beyond_its_bound() -> Result<()> {
    play_site(|scene| {
        let site = Config::site(scene.lab, "tc", &scene.site.certificate);
        let limited = |log: &str| format!("{}\n[log]\n{log}\n", site.text());
        scene
            .daemon
            .reconfigure(&limited("flows_per_second = 10"))?;
        scene.daemon.good_verb(&["reload"])?;
        let server = SocketAddr::new(Family::V4.virtual_address(), 465);
        let storm = Storm::start(&scene.lab.clients[0].namespace, server, 2)?;
        wait_until(PATIENCE, "word of what is not logged", || {
            let log = scene.daemon.log();
            log.contains("ended flows were not logged: more than flows_per_second = 10")
        })?;
        let opened = storm.opened();
        ensure!(lines(scene, &[]).len() as u64 + 100 < opened.max(1000) || opened < 500);
        scene.daemon.reconfigure(&limited("flows = false"))?;
        scene.daemon.good_verb(&["reload"])?;
        // One look may have been under way.
        tests::wait::pause(Duration::from_millis(500));
        let before = lines(scene, &[]).len();
        let opened = storm.opened();
        wait_until(PATIENCE, "more connections", || {
            storm.opened() > opened + 300
        })?;
        storm.stop();
        ensure!(lines(scene, &[]).len() == before, "it is not switched off");
        Ok(())
    })
}

#[test]
fn flows_are_listed_by_what_they_are() -> Result<()> {
    play_site(|scene| {
        let mut held = Vec::new();
        for (client, count) in [(0, 9), (1, 6)] {
            for family in Family::ALL {
                let options = Options {
                    mode: Mode::Implicit,
                    ca: Some(scene.site.ca.clone()),
                    ..Options::to((family.virtual_address(), 465).into())
                };
                let client = &scene.lab.clients[client].namespace;
                held.push(client.enter(|| Held::open(&options, count))?);
            }
        }
        let count = |words: &[&str]| -> Result<usize> {
            let words = [&["show", "flows", "--phase", "established"], words].concat();
            let listed = scene
                .daemon
                .good_verb(&[&words[..], &["--json"]].concat())?;
            let flows: Vec<FlowView> = serde_json::from_str(&listed)?;
            let counted = scene
                .daemon
                .good_verb(&[&words[..], &["--count"]].concat())?;
            if !words.contains(&"--limit") {
                ensure!(counted.trim() == flows.len().to_string(), "{counted}");
            }
            Ok(flows.len())
        };
        let first = scene.lab.clients[0].v4.to_string();
        ensure!(count(&[])? == 30);
        ensure!(count(&["smtps-v4"])? == 15);
        ensure!(count(&["--virtual-server", "smtps-v6"])? == 15);
        ensure!(count(&["--member", "tls-v4/m2"])? == 5);
        ensure!(count(&["--client", &first])? == 9);
        ensure!(count(&["--client", "10.71.0.0/24"])? == 15);
        ensure!(count(&["--client", "fd71::/64"])? == 15);
        ensure!(count(&["--client", &first, "--virtual-server", "smtps-v6"])? == 0);
        ensure!(count(&["--limit", "7"])? == 7);
        let text = scene.daemon.good_verb(&["show", "flows", "--limit", "3"])?;
        ensure!(text.lines().count() == 4, "{text}");
        for (words, code) in [
            (&["show", "flows", "--member", "tls-v4/m9"][..], 1),
            (&["show", "flows", "nothing"], 1),
            (&["show", "flows", "--client", "host"], 2),
            (&["show", "members", "--count"], 2),
        ] {
            let output = scene.daemon.verb(words)?;
            ensure!(output.status.code() == Some(code), "{words:?}: {output:?}");
        }
        Ok(())
    })
}
