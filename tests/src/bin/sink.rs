//! A member of the lab; see `tests::sink`.

use clap::Parser;

/// Takes mail and writes down what it got
#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    options: tests::sink::Options,
}

fn main() -> anyhow::Result<()> {
    tests::sink::serve(Cli::parse().options)
}
