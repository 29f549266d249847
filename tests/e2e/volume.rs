//! A thousand messages of mixed sizes, 1 kB to 25 MB, through each port and family: none lost, none altered.

use anyhow::{Result, ensure};
use tests::{
    client::{Mode, Options},
    daemon::config::tag,
    lab::Family,
    mail::{LARGEST, Sizes},
};

use crate::scene::play_site;

fn thousand(port: u16, modes: &[Mode]) -> Result<()> {
    play_site(|scene| {
        let mut sent = Vec::new();
        for family in Family::ALL {
            for mode in modes {
                let options = Options {
                    mode: *mode,
                    count: 1000 / modes.len(),
                    sizes: Sizes::Mixed,
                    seed: u64::from(port),
                    run: format!("{port}-{mode:?}-{}", tag(family)),
                    concurrency: 4,
                    per_session: 5,
                    pipelining: true,
                    ..Options::to((family.virtual_address(), port).into())
                };
                sent.extend(scene.send(&scene.lab.clients[0], &options)?);
            }
        }
        ensure!(sent.len() == 2000);
        ensure!(sent.iter().any(|outcome| outcome.size == LARGEST as u64));
        ensure!(sent.iter().any(|outcome| outcome.size == 1_000));
        ensure!(
            sent.iter().all(|outcome| outcome.attempts == 1),
            "nothing is tried twice"
        );
        scene.check_balance(&sent)
    })
}

#[test]
fn a_thousand_through_465() -> Result<()> {
    thousand(465, &[Mode::Implicit])
}

#[test]
fn a_thousand_through_587() -> Result<()> {
    thousand(587, &[Mode::Starttls])
}

#[test]
fn a_thousand_through_25() -> Result<()> {
    thousand(25, &[Mode::Plain, Mode::Starttls])
}
