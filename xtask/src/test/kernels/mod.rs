//! `cargo xtask test kernels`: the packet programs and a chosen few of the other tests, on other kernels.
//!
//! Each kernel runs in an emulated machine that sees this one's files, so that the very same binaries are tested. An
//! emulator is 10 to 25 times slower: deadlines are stretched, nothing is measured.

mod guest;
mod packages;

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::total::Total;
use crate::{
    build,
    command::{self, say},
    setup::{self, Need, Tools},
};

/// Boots, runs and powers off within this, or has failed.
const LIMIT: Duration = Duration::from_mins(60);
/// `SMTPLB_PATIENCE`: how many times longer than usual everything may take.
const PATIENCE: u32 = 15;

/// A kernel and what it has to show.
struct Case {
    version: &'static str,
    /// Every test of the packet programs, or none: where they cannot be loaded.
    prog: bool,
    e2e: &'static [&'static str],
}

const CASES: [Case; 3] = [
    // Below the floor: refused by name, and nothing is left behind.
    Case {
        version: "5.10",
        prog: false,
        e2e: &["refusal::every_kernel_is_served_or_refused_by_name"],
    },
    Case {
        version: "6.1",
        prog: true,
        e2e: SERVED,
    },
    Case {
        version: "6.12",
        prog: true,
        e2e: SERVED,
    },
];

/// Both planes, both hooks, and what happens to them when daemons and members die. The shortest of each subject.
const SERVED: &[&str] = &[
    "refusal::every_kernel_is_served_or_refused_by_name",
    "passthrough::two_arms_by_tc",
    "passthrough::two_arms_by_xdp",
    "proxy::what_is_announced_follows_the_policy",
    "proxy_protocol::haproxy_learns_every_client_by_generic_xdp",
    "policies::every_action_reaches_the_client_by_tc",
    "members::connections_without_snat_are_reset_on_both_sides",
    "reload::what_is_removed_takes_nothing_new_and_its_connections_go_on",
    "member_down::nobody_is_sent_to_a_dead_member",
    "survival::a_killed_daemon_harms_no_connection",
    "survival::a_successor_takes_over_without_a_refused_connection",
    "survival::a_stop_takes_everything_down",
];

/// Runs the tests on every kernel of the table, or on those that are named.
///
/// # Errors
/// When a version is not in the table, nothing can be built or fetched, or a test fails.
pub(super) fn run(versions: &[String], release: bool) -> Result<()> {
    let cases = chosen(versions)?;
    if !command::is_root() {
        bail!("the guests see this machine's files as root does: run it as root");
    }
    let tools = setup::ensure(Need::Kernels)?;
    let daemon = build::daemon(&tools, release)?;
    let [prog, e2e] = binaries(&tools)?;
    let cache = packages::Cache::open()?;
    let (mut lines, mut failures) = (Vec::new(), Vec::new());
    for case in cases {
        let began = Instant::now();
        let outcome = cache.kernel(case.version).and_then(|kernel| {
            say("kernels", format!("booting {}", kernel.release));
            let job = job(case, &daemon, &prog, &e2e);
            let mut total = Total::default();
            let code = guest::run(&kernel, &job, LIMIT, |line| {
                println!("[{}] {line}", case.version);
                if let Some(more) = Total::parse(line) {
                    total += more;
                }
            })?;
            Ok((kernel.release, total, code))
        });
        let seconds = began.elapsed().as_secs();
        match outcome {
            Ok((release, total, code)) => {
                lines.push(format!("{release}: {total} ({seconds} s)"));
                if code != 0 || total.failed > 0 || total.passed == 0 {
                    failures.push(format!("{release} failed"));
                }
            }
            Err(error) => {
                lines.push(format!("{}: not run ({seconds} s)", case.version));
                failures.push(format!("{}: {error:#}", case.version));
            }
        }
    }
    for line in lines {
        println!("{line}");
    }
    if !failures.is_empty() {
        bail!("{}", failures.join("; "));
    }
    Ok(())
}

fn chosen(versions: &[String]) -> Result<Vec<&'static Case>> {
    if versions.is_empty() {
        return Ok(CASES.iter().collect());
    }
    let find = |version: &String| {
        let known = CASES.map(|case| case.version).join(", ");
        CASES
            .iter()
            .find(|case| case.version == version)
            .with_context(|| format!("no kernel {version} here; there are {known}"))
    };
    versions.iter().map(find).collect()
}

/// A shell script; its exit code is 0 when every test passed.
fn job(case: &Case, daemon: &Path, prog: &Path, e2e: &Path) -> String {
    let mut job = String::from("uname -r\ncode=0\n");
    let _ = writeln!(
        job,
        "cd '{}'",
        command::repository().join("tests").display()
    );
    let _ = writeln!(
        job,
        "export SMTPLB_PATIENCE={PATIENCE} SMTPLB_BIN='{}' RUST_BACKTRACE=0",
        daemon.display()
    );
    if case.prog {
        let _ = writeln!(
            job,
            "'{}' --test-threads=1 --skip a_million || code=1",
            prog.display()
        );
    }
    if !case.e2e.is_empty() {
        let names = case.e2e.join(" ");
        let _ = writeln!(
            job,
            "'{}' --test-threads=1 --exact {names} || code=1",
            e2e.display()
        );
    }
    job.push_str("exit $code\n");
    job
}

/// The test programs, built; cargo says where.
fn binaries(tools: &Tools) -> Result<[PathBuf; 2]> {
    let mut cargo = tools.cargo();
    cargo
        .args([
            "test",
            "--package",
            "tests",
            "--test",
            "prog",
            "--test",
            "e2e",
            "--no-run",
        ])
        .arg("--message-format=json-render-diagnostics")
        .stdout(Stdio::piped());
    let output = cargo
        .output()
        .with_context(|| format!("cannot start `{}`", command::line(&cargo)))?;
    if !output.status.success() {
        bail!(
            "the tests do not build:\n{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    // What the tests start themselves.
    command::run(
        tools
            .cargo()
            .args(["build", "--package", "tests", "--bins"]),
    )?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let find = |name: &str| {
        said.lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .find(|message| message["target"]["name"] == name && message["executable"].is_string())
            .and_then(|message| Some(PathBuf::from(message["executable"].as_str()?)))
            .with_context(|| format!("cargo has built no {name}"))
    };
    Ok([find("prog")?, find("e2e")?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_kernel_is_named() {
        let error = chosen(&["2.6".to_owned()]).err().unwrap().to_string();
        assert_eq!(error, "no kernel 2.6 here; there are 5.10, 6.1, 6.12");
        assert_eq!(chosen(&["6.1".to_owned()]).unwrap()[0].version, "6.1");
    }
}
