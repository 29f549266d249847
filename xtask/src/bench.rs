//! `cargo xtask bench`: builds what is measured and what measures, optimised, then hands over to it.

use std::process::Command;

use anyhow::{Result, bail};

use crate::{
    build,
    command::{self, say},
    setup::{self, Need},
};

/// `cargo xtask bench`
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Nanoseconds per packet, by the kernel's test-run; root
    Kernel(Options),
    /// Connections and bytes end to end in namespaces, beside nftables and HAProxy; root
    Link(Options),
}

/// Handed on as they are; `--help` says what there is.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
struct Options {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

/// `cargo xtask bench`
///
/// # Errors
/// When this is not root, setup or a build fails, or the measurement does.
pub(crate) fn run(args: &Args) -> Result<()> {
    if !command::is_root() {
        bail!(
            "a bench makes network namespaces and loads programs into the kernel: run it as root"
        );
    }
    let (name, options, need) = match &args.what {
        What::Kernel(options) => ("kernel", options, Need::Build),
        What::Link(options) => ("link", options, Need::Bench),
    };
    let tools = setup::ensure(need)?;
    say("bench", "building");
    let daemon = build::daemon(&tools, true)?;
    // The bench itself waits for the kernel; the clients and members of the lab do not.
    let mut cargo = tools.cargo();
    command::run(cargo.args(["build", "--release", "--package", "tests", "--bins"]))?;
    let mut bench = Command::new(command::target_dir().join("release/smtplb-bench"));
    bench.env("SMTPLB_BIN", daemon).arg(name);
    command::run(bench.args(&options.options))
}
