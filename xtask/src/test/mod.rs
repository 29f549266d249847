//! `cargo xtask test`: every layer of tests, and one total at the end.

mod kernels;
mod total;

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

use self::total::Total;
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
    /// Only tests whose name contains one of these; for `kernels`, versions such as 6.1
    filter: Vec<String>,
    /// `e2e`: every combination of offloads, not only the telling ones
    #[arg(long)]
    full: bool,
    /// `soak`, `fuzz`: for how long; without it `soak` takes 10 minutes, and `fuzz` as many inputs as take seconds
    #[arg(long, value_name = "N")]
    minutes: Option<u64>,
    /// Test the unoptimised daemon: quicker to build, slower to run
    #[arg(long)]
    dev: bool,
}

/// `soak` without `--minutes`.
const SOAK_MINUTES: u64 = 10;

/// Named after what a test of it needs; see `docs/testing.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Layer {
    /// Nothing but a compiler
    Unit,
    /// The kernel's test-run of the packet programs; root
    Prog,
    /// Mail servers and clients in namespaces; root
    E2e,
    /// Hostile bytes for every parser; seconds, or `--minutes`
    Fuzz,
    /// Older and newer kernels in emulated machines; root, minutes, only when asked for
    Kernels,
    /// Kill, upgrade, reload and attach anew under load, and a flood; root, minutes, only when asked for
    Soak,
}

impl Layer {
    /// What a run without a layer means.
    const ALL: [Self; 4] = [Self::Unit, Self::Fuzz, Self::Prog, Self::E2e];

    const fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Prog => "prog",
            Self::E2e => "e2e",
            Self::Fuzz => "fuzz",
            Self::Kernels => "kernels",
            Self::Soak => "soak",
        }
    }

    /// Layers that load programs into the kernel.
    const fn needs_root(self) -> bool {
        matches!(self, Self::Prog | Self::E2e | Self::Soak)
    }

    /// Layers that start the daemon.
    const fn needs_daemon(self) -> bool {
        matches!(self, Self::E2e | Self::Soak)
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
    if args.layer == Some(Layer::Kernels) {
        return kernels::run(&args.filter, !args.dev);
    }
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

    let outcome = run_layers(&run, args);
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
fn run_layers(layers: &[Layer], args: &Args) -> Outcome {
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
            match build::daemon(&tools, !args.dev) {
                Ok(path) => daemon = Some(path),
                Err(error) => {
                    outcome.failures.push(format!("{error:#}"));
                    break;
                }
            }
        }
        say("test", layer.name());
        match run_layer(&tools, layer, args, daemon.as_deref()) {
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
    args: &Args,
    daemon: Option<&Path>,
) -> Result<(Total, bool)> {
    let mut cargo = tools.cargo();
    cargo
        .args(["test", "--no-fail-fast"])
        .args(layer.arguments());
    if let Some(daemon) = daemon {
        cargo.env("SMTPLB_BIN", daemon);
    }
    if args.full {
        cargo.env("SMTPLB_FULL", "1");
    }
    if layer == Layer::Soak {
        cargo.env(
            "SMTPLB_SOAK_MINUTES",
            args.minutes.unwrap_or(SOAK_MINUTES).to_string(),
        );
    }
    if let (Layer::Fuzz, Some(minutes)) = (layer, args.minutes) {
        cargo.env("SMTPLB_FUZZ_MINUTES", minutes.to_string());
    }
    cargo.arg("--");
    if layer.needs_root() {
        // Each lab is a machine of its own, but they share the processors: side by side, deadlines would lie.
        cargo.arg("--test-threads=1");
    }
    if layer == Layer::Soak || (layer == Layer::Fuzz && args.minutes.is_some()) {
        // Minutes without a word would look like a hang.
        cargo.arg("--nocapture");
    }
    cargo.args(&args.filter);
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
