//! The main job, shown; see `tests::demo`. Started by `cargo xtask demo`.

use std::process::ExitCode;

use clap::Parser;

/// Carries real mail through both planes and shows what happened
#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    options: tests::demo::Options,
}

fn main() -> ExitCode {
    match tests::demo::run(&Cli::parse().options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
