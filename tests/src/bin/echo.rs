//! A member of the lab that sends back what it gets; see `tests::echo`.

use std::{net::SocketAddr, process::ExitCode};

use clap::Parser;

/// Sends back what it gets
#[derive(Debug, Parser)]
struct Cli {
    /// Where to listen
    #[arg(required = true)]
    addresses: Vec<SocketAddr>,
}

fn main() -> ExitCode {
    match tests::echo::serve(&Cli::parse().addresses) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("echo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
