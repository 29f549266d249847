//! Measurements; see `tests::bench`. Started by `cargo xtask bench`.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use serde::Serialize;
use tests::bench::{kernel, link};

/// Measures smtplb
#[derive(Debug, Parser)]
enum Cli {
    /// Nanoseconds per packet, by the kernel's test-run
    Kernel(kernel::Options),
    /// Connections and bytes end to end, beside nftables and HAProxy
    Link(link::Options),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse() {
        Cli::Kernel(options) => {
            kernel::run(options).and_then(|report| show(&report, options.json, report.text()))
        }
        Cli::Link(options) => {
            link::run(options).and_then(|report| show(&report, options.json, report.text()))
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn show(report: &impl Serialize, json: bool, text: String) -> Result<()> {
    match json {
        true => println!("{}", serde_json::to_string_pretty(report)?),
        false => print!("{text}"),
    }
    Ok(())
}
