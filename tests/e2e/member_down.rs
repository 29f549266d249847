//! A member that dies gets no new connection within one interval, in either plane; when it returns, it does.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use tests::{
    client::{Mode, Options, Storm},
    daemon::config::tag,
    lab::Family,
    mail::Sizes,
    sink::Event,
    wait::wait_until,
};

use crate::scene::{Scene, play_site};

/// The configured second, and what the probe and its report take.
const NOTICED: Duration = Duration::from_millis(1_800);

#[test]
fn nobody_is_sent_to_a_dead_member() -> Result<()> {
    play_site(|scene| {
        let host = &scene.lab.members[0];
        scene.site.members[0].crash(host)?;
        scene.daemon.wait_for_member("m1", "down", NOTICED)?;

        let storms = storms(scene)?;
        wait_until(Duration::from_secs(20), "connections without it", || {
            storms.iter().all(|storm| storm.opened() > 300)
        })?;
        for storm in storms {
            let report = storm.stop();
            ensure!(report.failed.is_empty(), "{report:?}");
        }
        let sent = send_everywhere(scene, "while-down")?;
        scene.check_balance(&sent)?;

        scene.site.members[0].revive(host, scene.lab.folder())?;
        scene.daemon.wait_for_member("m1", "up", NOTICED)?;
        let connects = || {
            let events = scene.site.members[0].events().unwrap_or_default();
            [25, 465].map(|port| {
                let at = |event: &&Event| matches!(event, Event::Connect { port: to, .. } if *to == port);
                events.iter().filter(at).count()
            })
        };
        let before = connects();
        let more = send_everywhere(scene, "after-return")?;
        wait_until(
            Duration::from_secs(5),
            "connections to the member that is back",
            || {
                connects()
                    .iter()
                    .zip(before)
                    .all(|(now, before)| *now > before + 2)
            },
        )?;
        let all: Vec<_> = sent.into_iter().chain(more).collect();
        scene.check_balance(&all)
    })
}

fn storms(scene: &Scene<'_>) -> Result<Vec<Storm>> {
    Family::ALL
        .map(|family| {
            let server = SocketAddr::new(family.virtual_address(), 465);
            Storm::start(&scene.lab.clients[0].namespace, server, 2)
        })
        .into_iter()
        .collect()
}

/// Through both planes; each message has to be taken at the first attempt.
fn send_everywhere(scene: &Scene<'_>, run: &str) -> Result<Vec<tests::client::Outcome>> {
    let mut sent = Vec::new();
    for family in Family::ALL {
        for (port, mode) in [
            (465, Mode::Implicit),
            (587, Mode::Starttls),
            (25, Mode::Plain),
        ] {
            let options = Options {
                mode,
                count: 30,
                sizes: Sizes::Exactly(3_000),
                run: format!("{run}-{port}-{}", tag(family)),
                concurrency: 3,
                per_session: 1,
                ..Options::to((family.virtual_address(), port).into())
            };
            sent.extend(scene.send(&scene.lab.clients[1], &options)?);
        }
    }
    Ok(sent)
}

#[test]
fn without_members_clients_are_told_so() -> Result<()> {
    play_site(|scene| {
        for (at, host) in scene.lab.members.iter().enumerate() {
            scene.site.members[at].crash(host)?;
        }
        for host in &scene.lab.members {
            scene.daemon.wait_for_member(&host.name, "down", NOTICED)?;
        }
        for family in Family::ALL {
            let options = Options::to((family.virtual_address(), 25).into());
            let client = &scene.lab.clients[0].namespace;
            let outcomes = client.enter(|| tests::client::send_all(&options))?;
            ensure!(!outcomes[0].ok);
            ensure!(outcomes[0].reply.contains("421"), "{}", outcomes[0].reply);
        }
        Ok(())
    })
}
