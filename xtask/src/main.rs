//! The one door for people and CI: everything that is done to this repository is a verb here.
//!
//! A fresh machine needs `cargo xtask demo` and `cargo xtask test`, nothing by hand before them: each verb first lets
//! [`setup`] put in place what is missing.

mod bench;
mod build;
mod command;
mod debian;
mod demo;
mod install;
mod lint;
mod setup;
mod test;
mod toolchain;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Sets up, builds, shows, tests and installs smtplb.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Install what is missing: rust-src, bpf-linker, the test tools
    Setup(setup::Args),
    /// Build the daemon and the programs it loads into the kernel
    Build(build::Args),
    /// Carry real mail through both planes in a lab of namespaces and show what happened
    Demo(demo::Args),
    /// Run the tests; without a layer everything but long fuzzing
    Test(test::Args),
    /// Measure packets by test-run, or connections and bytes beside nftables and HAProxy
    Bench(bench::Args),
    /// Check format, lints and the rules of the source tree
    Lint(lint::Args),
    /// Install the binary, its configuration and its service units
    Install(install::InstallArgs),
    /// Take the service down and remove everything that `install` put in place
    Uninstall(install::UninstallArgs),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().verb {
        Verb::Setup(args) => setup::run(&args),
        Verb::Build(args) => build::run(&args),
        Verb::Demo(args) => demo::run(&args),
        Verb::Test(args) => test::run(&args),
        Verb::Bench(args) => bench::run(&args),
        Verb::Lint(args) => lint::run(&args),
        Verb::Install(args) => install::install(&args),
        Verb::Uninstall(args) => install::uninstall(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
