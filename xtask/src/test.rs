//! `cargo xtask test`: every layer of tests, and one total at the end.

use std::{
    fmt,
    io::{BufRead as _, BufReader, Write as _},
    ops::AddAssign,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::{
    build,
    command::{self, say},
    setup::{self, Need, Tools},
};

/// `cargo xtask test`
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// One layer; without it every layer
    layer: Option<Layer>,
    /// Only tests whose name contains this
    filter: Option<String>,
    /// Test the unoptimised daemon: quicker to build, slower to run
    #[arg(long)]
    dev: bool,
}

/// Named after what a test of it needs; see `docs/testing.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Layer {
    /// Nothing but a compiler
    Unit,
    /// The kernel's test-run of the packet programs; root
    Prog,
    /// Mail servers and clients in namespaces; root
    E2e,
    /// Hostile bytes for every parser; short here, endless under its own tools
    Fuzz,
}

impl Layer {
    const ALL: [Self; 4] = [Self::Unit, Self::Fuzz, Self::Prog, Self::E2e];

    const fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Prog => "prog",
            Self::E2e => "e2e",
            Self::Fuzz => "fuzz",
        }
    }

    /// Layers that load programs into the kernel.
    const fn needs_root(self) -> bool {
        matches!(self, Self::Prog | Self::E2e)
    }

    /// Layers that start the daemon.
    const fn needs_daemon(self) -> bool {
        matches!(self, Self::E2e)
    }

    /// Whether there is anything to run: unit tests are everywhere, the others in a folder of `tests/`.
    fn exists(self) -> bool {
        let main = command::repository()
            .join("tests")
            .join(self.name())
            .join("main.rs");
        self == Self::Unit || main.is_file()
    }

    fn arguments(self) -> Vec<&'static str> {
        match self {
            Self::Unit => vec!["--workspace", "--lib", "--bins"],
            layer => vec!["--package", "tests", "--test", layer.name()],
        }
    }
}

/// `cargo xtask test`
///
/// # Errors
/// When a test fails, a build fails, or a layer cannot run here.
pub(crate) fn run(args: &Args) -> Result<()> {
    let layers: Vec<Layer> = args
        .layer
        .map_or_else(|| Layer::ALL.to_vec(), |layer| vec![layer]);
    let layers: Vec<Layer> = layers.into_iter().filter(|layer| layer.exists()).collect();
    if layers.is_empty() {
        bail!("this layer has no tests yet");
    }
    let root = command::is_root();
    let (run, refused): (Vec<_>, Vec<_>) = layers
        .into_iter()
        .partition(|layer| root || !layer.needs_root());

    let outcome = run_layers(&run, args.filter.as_deref(), !args.dev);
    let mut total = outcome.total;
    let mut failures = outcome.failures;
    for layer in refused {
        say("test", format!("{}: not run, it needs root", layer.name()));
        failures.push(format!("{} needs root", layer.name()));
        total.skipped += 1;
    }
    println!("{total}");
    if !failures.is_empty() {
        bail!("{}", failures.join("; "));
    }
    Ok(())
}

#[derive(Debug, Default)]
struct Outcome {
    total: Total,
    failures: Vec<String>,
}

/// Goes on after a failure, so that one run shows all of them.
fn run_layers(layers: &[Layer], filter: Option<&str>, release: bool) -> Outcome {
    let mut outcome = Outcome::default();
    if layers.is_empty() {
        return outcome;
    }
    let needs_lab = layers.iter().any(|layer| layer.needs_root());
    let need = if needs_lab { Need::Lab } else { Need::Build };
    let tools = match setup::ensure(need) {
        Ok(tools) => tools,
        Err(error) => {
            outcome.failures.push(format!("{error:#}"));
            return outcome;
        }
    };
    let mut daemon = None;
    for &layer in layers {
        if layer.needs_daemon() && daemon.is_none() {
            match build::daemon(&tools, release) {
                Ok(path) => daemon = Some(path),
                Err(error) => {
                    outcome.failures.push(format!("{error:#}"));
                    break;
                }
            }
        }
        say("test", layer.name());
        match run_layer(&tools, layer, filter, daemon.as_deref()) {
            Ok((total, true)) => outcome.total += total,
            Ok((total, false)) => {
                outcome.total += total;
                // A layer that did not build is a failure too, though no test of it ran.
                outcome.total.failed += u64::from(total.failed == 0);
                outcome.failures.push(format!("{} failed", layer.name()));
            }
            Err(error) => {
                outcome.total.failed += 1;
                outcome
                    .failures
                    .push(format!("{}: {error:#}", layer.name()));
            }
        }
    }
    outcome
}

fn run_layer(
    tools: &Tools,
    layer: Layer,
    filter: Option<&str>,
    daemon: Option<&Path>,
) -> Result<(Total, bool)> {
    let mut cargo = tools.cargo();
    cargo
        .args(["test", "--no-fail-fast"])
        .args(layer.arguments());
    if let Some(daemon) = daemon {
        cargo.env("SMTPLB_BIN", daemon);
    }
    cargo.arg("--");
    if layer.needs_root() {
        // Each lab is a machine of its own, but they share the processors: side by side, deadlines would lie.
        cargo.arg("--test-threads=1");
    }
    cargo.args(filter);
    watch(&mut cargo)
}

/// Passes the runner's output on and adds up its closing lines.
fn watch(cargo: &mut Command) -> Result<(Total, bool)> {
    let mut child = cargo
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", command::line(cargo)))?;
    let stdout = child.stdout.take().context("no stdout")?;
    let mut total = Total::default();
    let mut out = std::io::stdout().lock();
    for line in BufReader::new(stdout).split(b'\n') {
        let mut line = line?;
        if let Some(more) = std::str::from_utf8(&line).ok().and_then(Total::parse) {
            total += more;
        }
        line.push(b'\n');
        out.write_all(&line)?;
        out.flush()?;
    }
    Ok((total, child.wait()?.success()))
}

/// What the runner counted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Total {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Total {
    /// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; …`; any other line is none.
    fn parse(line: &str) -> Option<Self> {
        let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
        let count = |word: &str| {
            counts
                .split("; ")
                .find_map(|part| part.strip_suffix(word)?.trim_end().parse().ok())
        };
        Some(Self {
            passed: count("passed")?,
            failed: count("failed")?,
            skipped: count("ignored")?,
        })
    }
}

impl AddAssign for Total {
    fn add_assign(&mut self, more: Self) {
        self.passed += more.passed;
        self.failed += more.failed;
        self.skipped += more.skipped;
    }
}

impl fmt::Display for Total {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_up_the_closing_lines() {
        let line = "test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.01s";
        let mut total = Total::parse(line).unwrap();
        total +=
            Total::parse("test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured").unwrap();
        assert_eq!(total.to_string(), "7 passed, 2 failed, 1 skipped");
    }

    #[test]
    fn other_lines_count_nothing() {
        assert_eq!(Total::parse("test result::parses ... ok"), None);
        assert_eq!(Total::parse("running 3 tests"), None);
    }
}
