//! The service unit leaves the daemon few privileges; they have to be enough.

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};
use tests::{
    client::{Mode, Options},
    daemon::{self, Daemon, config::Config},
    lab::{Family, Lab, Plan},
    member::{Mta, Site},
};

use crate::scene::Scene;

#[test]
fn the_capabilities_of_the_unit_are_enough() -> Result<()> {
    Lab::run(Plan::TWO_ARM, |lab| {
        let site = Site::start(lab, Mta::Sink)?;
        // As the mount unit does it: the daemon may not mount.
        let bpffs = daemon::bpffs(lab);
        fs::create_dir(&bpffs)?;
        let mount = Command::new("mount")
            .args(["-t", "bpf", "bpf"])
            .arg(&bpffs)
            .status()?;
        ensure!(mount.success(), "cannot mount a bpffs");

        let config = Config::site(lab, "tc", &site.certificate);
        let bounds = format!("--bounding-set=-all,{}", capabilities()?);
        let daemon = Daemon::start_as(lab, config.text(), |smtplb| {
            let mut setpriv = Command::new("setpriv");
            setpriv.args([&bounds, "--no-new-privs", "--"]);
            setpriv.arg(smtplb.get_program()).args(smtplb.get_args());
            setpriv
        })?;
        daemon.wait_for_checked()?;
        let mut scene = Scene { lab, site, daemon };
        let mut sent = Vec::new();
        for family in Family::ALL {
            for (port, mode) in [
                (465, Mode::Implicit),
                (587, Mode::Starttls),
                (25, Mode::Plain),
            ] {
                let options = Options {
                    mode,
                    count: 5,
                    run: format!("{family:?}-{port}"),
                    ..Options::to((family.virtual_address(), port).into())
                };
                sent.extend(scene.send(&lab.clients[0], &options)?);
            }
        }
        scene.check_balance(&sent)?;
        scene.daemon.stop()?;
        ensure!(!daemon::has_pins(&bpffs), "something is still pinned");
        Ok(())
    })
}

/// What the unit grants, as setpriv writes it: `+bpf,+net_admin`.
fn capabilities() -> Result<String> {
    let unit = fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../deploy/smtplb.service"
    ))?;
    let granted = unit
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .context("the unit bounds no capabilities")?;
    let names: Vec<String> = granted
        .split_whitespace()
        .map(|name| format!("+{}", name.trim_start_matches("CAP_").to_lowercase()))
        .collect();
    Ok(names.join(","))
}
