//! `cargo xtask demo`: builds the daemon and the lab's programs, then hands over to the demo itself.

use std::{os::unix::process::CommandExt, process::Command};

use anyhow::{Context, Result, bail};

use crate::{
    build,
    command::{self, say},
    setup::{self, Need},
};

/// `cargo xtask demo`
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What plays the members: `sink` (our own) or `postfix`
    #[arg(long, default_value = "sink", value_parser = ["sink", "postfix"])]
    mta: String,
    /// Print what happened as JSON
    #[arg(long)]
    json: bool,
    /// Leave the lab up and say how to enter it
    #[arg(long)]
    keep: bool,
    /// Take down what `--keep` left
    #[arg(long, conflicts_with_all = ["json", "keep"])]
    clean: bool,
}

/// `cargo xtask demo`
///
/// # Errors
/// When this is not root, or setup or a build fails. The demo's own outcome is its exit code.
pub(crate) fn run(args: &Args) -> Result<()> {
    if !command::is_root() {
        bail!(
            "the demo makes network namespaces and loads programs into the kernel: run it as root"
        );
    }
    let tools = setup::ensure(Need::Lab)?;
    say("demo", "building the daemon and the lab");
    let daemon = build::daemon(&tools, true)?;
    command::run(
        tools
            .cargo()
            .args(["build", "--package", "tests", "--bins"]),
    )?;
    let mut demo = Command::new(command::target_dir().join("debug/smtplb-demo"));
    demo.env("SMTPLB_BIN", daemon).args(["--mta", &args.mta]);
    for (wanted, flag) in [
        (args.json, "--json"),
        (args.keep, "--keep"),
        (args.clean, "--clean"),
    ] {
        if wanted {
            demo.arg(flag);
        }
    }
    // In place of this process, so that signals and the exit code are the demo's own.
    let error = demo.exec();
    Err(error).with_context(|| format!("cannot start `{}`", command::line(&demo)))
}
