//! A lab with mail servers on its members and smtplb in its box.

use std::time::Duration;

use anyhow::{Result, ensure};
use tests::{
    client::{self, Options, Outcome},
    daemon::{Daemon, config::Config},
    lab::{Host, Lab, Plan},
    member::{Mta, Site},
    verify::Balance,
    wait::wait_until,
};

/// What a test works with.
pub(crate) struct Scene<'a> {
    pub(crate) lab: &'a Lab,
    pub(crate) site: Site,
    pub(crate) daemon: Daemon<'a>,
}

/// Builds it, runs the test, and shows the site when that fails.
pub(crate) fn play(
    plan: Plan,
    mta: Mta,
    config: impl FnOnce(&Lab, &Site) -> Config,
    test: impl FnOnce(&mut Scene<'_>) -> Result<()>,
) -> Result<()> {
    Lab::run(plan, |lab| {
        let site = Site::start(lab, mta)?;
        let daemon = Daemon::start(lab, config(lab, &site).text())?;
        daemon.wait_for_checked()?;
        let mut scene = Scene { lab, site, daemon };
        test(&mut scene).inspect_err(|_| eprintln!("{}", scene.daemon.report()))
    })
}

/// The usual one: 465 through the kernel by TC, 587 and 25 through the proxy, to sinks.
pub(crate) fn play_site(test: impl FnOnce(&mut Scene<'_>) -> Result<()>) -> Result<()> {
    play(
        Plan::TWO_ARM,
        Mta::Sink,
        |lab, site| Config::site(lab, "tc", &site.certificate),
        test,
    )
}

impl Scene<'_> {
    /// Sends from a client; everything has to be taken.
    pub(crate) fn send(&self, from: &Host, options: &Options) -> Result<Vec<Outcome>> {
        let options = Options {
            ca: Some(self.site.ca.clone()),
            ..options.clone()
        };
        let sent = from.namespace.enter(|| client::send_all(&options))?;
        for outcome in &sent {
            ensure!(
                outcome.ok,
                "{} to {}: {}",
                outcome.id,
                options.server,
                outcome.reply
            );
        }
        Ok(sent)
    }

    /// Waits until everything is delivered, then compares.
    pub(crate) fn check_balance(&self, sent: &[Outcome]) -> Result<()> {
        let balance = || {
            self.site
                .arrivals()
                .map(|arrivals| Balance::of(sent, &arrivals))
        };
        let _ = wait_until(Duration::from_secs(30), "delivery", || {
            balance().is_ok_and(|balance| balance.is_even())
        });
        balance()?.check()
    }
}
