//! `cargo xtask build`: the daemon, with the programs for the kernel inside it.

use std::path::PathBuf;

use anyhow::Result;

use crate::{
    command::{self, say},
    setup::{self, Need, Tools},
};

/// `cargo xtask build`
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Optimised, as it is installed
    #[arg(long)]
    release: bool,
}

/// `cargo xtask build`
///
/// # Errors
/// When setup or the build fails.
pub(crate) fn run(args: &Args) -> Result<()> {
    let tools = setup::ensure(Need::Build)?;
    let binary = daemon(&tools, args.release)?;
    say("build", binary.display().to_string());
    Ok(())
}

/// Builds the daemon and returns where it is.
///
/// # Errors
/// When the build fails.
pub(crate) fn daemon(tools: &Tools, release: bool) -> Result<PathBuf> {
    let mut cargo = tools.cargo();
    cargo.args(["build", "--package", "lb-userspace"]);
    if release {
        cargo.arg("--release");
    }
    command::run(&mut cargo)?;
    let profile = if release { "release" } else { "debug" };
    Ok(command::target_dir().join(profile).join("smtplb"))
}
