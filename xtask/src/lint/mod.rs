//! `cargo xtask lint`: what a reviewer should not have to say.

mod layers;
mod tree;

use anyhow::{Result, bail};

use crate::{
    command::{self, say},
    setup::{self, Need, Tools},
};

/// `cargo xtask lint`
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only the rules of the source tree: quick, nothing is compiled
    #[arg(long)]
    tree: bool,
}

/// A check that runs a tool, and what it is called.
type Check = (&'static str, fn(&Tools) -> Result<()>);

const CHECKS: [Check; 3] = [
    ("format", format),
    ("clippy", clippy),
    ("clippy of the kernel plane", clippy_bpf),
];

/// `cargo xtask lint`
///
/// # Errors
/// When any check finds something; all of them run.
pub(crate) fn run(args: &Args) -> Result<()> {
    let mut failed = Vec::new();
    let faults = tree::faults(&command::repository())?;
    for fault in &faults {
        eprintln!("{fault}");
    }
    if !faults.is_empty() {
        failed.push(format!("{} faults in the source tree", faults.len()));
    }
    if !args.tree {
        let tools = setup::ensure(Need::Lint)?;
        for (name, check) in CHECKS {
            say("lint", name);
            if let Err(error) = check(&tools) {
                failed.push(format!("{name}: {error:#}"));
            }
        }
    }
    if failed.is_empty() {
        say("lint", "nothing to complain about");
        return Ok(());
    }
    bail!("{}", failed.join("\n"))
}

fn format(_: &Tools) -> Result<()> {
    command::run(command::cargo().args(["fmt", "--all", "--check"]))
}

fn clippy(tools: &Tools) -> Result<()> {
    command::run(
        tools
            .cargo()
            .args(["clippy", "--workspace", "--all-targets", "--quiet"])
            .args(["--", "-D", "warnings"]),
    )
}

/// The programs again, as they are built for the kernel: the host build leaves their thin ends out.
fn clippy_bpf(tools: &Tools) -> Result<()> {
    command::run(
        tools
            .cargo()
            .args([
                "clippy",
                "--package",
                "lb-ebpf",
                "--features",
                "bpf",
                "--quiet",
            ])
            .args(["--target", "bpfel-unknown-none", "-Z", "build-std=core"])
            .arg("--target-dir")
            .arg(command::target_dir().join("lint-bpf"))
            .args(["--", "-D", "warnings"])
            // Build-std is not stable; this lets the stable compiler do it for this child alone.
            .env("RUSTC_BOOTSTRAP", "1"),
    )
}
