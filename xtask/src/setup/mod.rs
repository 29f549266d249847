//! Puts in place what a verb needs; quick and silent when nothing is missing.

mod linker;
mod mtas;
mod packages;
mod smoke;

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};

use crate::{
    command::{self, say},
    toolchain::Toolchain,
};

/// `cargo xtask setup`
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only what building needs, not the programs that demo and test run
    #[arg(long)]
    build_only: bool,
    /// What a verb needs that few ask for
    more: Option<More>,
}

/// What is not installed with the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum More {
    /// `cargo xtask test kernels`
    Kernels,
    /// `cargo xtask bench link`
    Bench,
}

/// Who asks, and so what has to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// Building the daemon and its programs.
    Build,
    /// Building, rustfmt and clippy.
    Lint,
    /// Building, and the mail servers and clients of the lab.
    Lab,
    /// The lab, and what boots other kernels.
    Kernels,
    /// The lab, and what smtplb is measured beside.
    Bench,
}

/// What the other verbs take from setup.
#[derive(Debug)]
pub(crate) struct Tools {
    /// The BPF linker, proven to work with this compiler.
    pub(crate) bpf_linker: PathBuf,
    /// Whether it is where the build looks for it anyway.
    is_usual: bool,
}

impl Tools {
    /// A cargo that builds the eBPF programs with the proven linker.
    pub(crate) fn cargo(&self) -> Command {
        let mut cargo = command::cargo();
        // Only where it is needed: the build would start anew each time the variable comes or goes.
        if !self.is_usual {
            cargo.env("SMTPLB_BPF_LINKER", &self.bpf_linker);
        }
        cargo
    }
}

/// `cargo xtask setup`
///
/// # Errors
/// When something is missing and cannot be installed; the message says what to do by hand.
pub(crate) fn run(args: &Args) -> Result<()> {
    let need = match args.more {
        _ if args.build_only => Need::Build,
        None => Need::Lab,
        Some(More::Kernels) => Need::Kernels,
        Some(More::Bench) => Need::Bench,
    };
    let tools = ensure(need)?;
    if !args.build_only {
        ensure(Need::Lint)?;
    }
    say(
        "setup",
        format!("all there; BPF linker: {}", tools.bpf_linker.display()),
    );
    Ok(())
}

/// Installs what is missing for `need`.
///
/// # Errors
/// As [`run`].
pub(crate) fn ensure(need: Need) -> Result<Tools> {
    packages::ensure(need)?;
    if matches!(need, Need::Lab | Need::Kernels) {
        mtas::ensure()?;
    }
    let toolchain = Toolchain::detect()?;
    if !toolchain.has_rust_src() {
        component(
            &toolchain,
            "rust-src",
            "the programs for the kernel are built with their own `core`",
        )?;
        if !toolchain.has_rust_src() {
            // rustup goes by its records, and cannot mend what was deleted under it.
            bail!(
                "rustup takes rust-src for installed, but its files are gone from {}: reinstall the toolchain",
                toolchain.sysroot.display()
            );
        }
    }
    if need == Need::Lint {
        for (program, name) in [("cargo-fmt", "rustfmt"), ("cargo-clippy", "clippy")] {
            if !toolchain.sysroot.join("bin").join(program).is_file() {
                component(&toolchain, name, "`cargo xtask lint` runs it")?;
            }
        }
    }
    let bpf_linker = linker::ensure(&toolchain)?;
    Ok(Tools {
        is_usual: bpf_linker == toolchain.linker(),
        bpf_linker,
    })
}

fn component(toolchain: &Toolchain, name: &str, why: &str) -> Result<()> {
    if command::find("rustup").is_none() {
        bail!(
            "{name} is missing from {} ({why}), and there is no rustup to add it: install your distribution's package for it",
            toolchain.sysroot.display()
        );
    }
    say("setup", format!("adding {name}: {why}"));
    command::run(&mut rustup(&["component", "add", name]))
}

/// stdout belongs to the verb that asked.
fn rustup(arguments: &[&str]) -> Command {
    let mut rustup = Command::new("rustup");
    rustup.args(arguments).stdout(std::io::stderr());
    rustup
}

/// Makes the tools directory and keeps others out of it until the returned file is dropped.
fn lock(toolchain: &Toolchain) -> Result<fs::File> {
    let dir = &toolchain.tools;
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let path = dir.join(".lock");
    let file =
        fs::File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    file.lock()
        .with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}
