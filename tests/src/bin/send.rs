//! A client of the lab; see `tests::client`.

use std::{
    io::Write as _,
    process::ExitCode,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use clap::Parser;

/// Sends mail and prints what became of each message, one line of JSON each
#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    options: tests::client::Options,
}

fn main() -> anyhow::Result<ExitCode> {
    let failed = AtomicUsize::new(0);
    tests::client::send(&Cli::parse().options, |outcome| {
        failed.fetch_add(usize::from(!outcome.ok), Relaxed);
        if let Ok(line) = serde_json::to_string(&outcome) {
            // Who reads may have gone away; the mail goes on all the same.
            let _ = writeln!(std::io::stdout(), "{line}");
        }
    })?;
    Ok(if failed.into_inner() == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
