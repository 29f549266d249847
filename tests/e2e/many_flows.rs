//! A million connections in the tables of a running daemon: what it tells of them, and what that costs it.

use std::{
    collections::HashSet,
    fs,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tests::{
    bench::population::{self, Population},
    daemon,
    wait::wait_until,
};

const MILLION: u32 = 1 << 20;
const TABLE: u32 = MILLION + MILLION / 4;
const MEMBERS: u16 = 32;
/// What the daemon may need for its answers, in KiB: far less than a million lines.
const ANSWERS: u64 = 16 * 1024;

/// A daemon that took over what another one left.
struct Heir<'a> {
    child: Child,
    folder: &'a Path,
}

impl<'a> Heir<'a> {
    fn start(folder: &'a Path, bpffs: &Path, config: &str) -> Result<Self> {
        fs::write(folder.join("smtplb.toml"), config)?;
        let log = fs::File::create(folder.join("log"))?;
        let child = Command::new(daemon::program()?)
            .arg("run")
            .arg("--config")
            .arg(folder.join("smtplb.toml"))
            .arg("--admin")
            .arg(folder.join("admin.sock"))
            .arg("--bpffs")
            .arg(bpffs)
            .arg("--state")
            .arg(folder.join("state"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start smtplb")?;
        let heir = Self { child, folder };
        wait_until(Duration::from_secs(30), "the daemon to serve", || {
            heir.ask(&["status"]).is_ok()
        })
        .with_context(|| fs::read_to_string(folder.join("log")).unwrap_or_default())?;
        Ok(heir)
    }

    fn ask(&self, words: &[&str]) -> Result<String> {
        let output = Command::new(daemon::program()?)
            .args(words)
            .arg("--admin")
            .arg(self.folder.join("admin.sock"))
            .output()?;
        ensure!(output.status.success(), "{words:?}: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    }

    fn count(&self, filter: &[&str]) -> Result<u32> {
        let words = [&["show", "flows", "--count"], filter].concat();
        Ok(self.ask(&words)?.trim().parse()?)
    }

    /// Memory of its own, in KiB: the tables are the kernel's.
    fn memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"))
            .context("no RssAnon")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }
}

impl Drop for Heir<'_> {
    fn drop(&mut self) {
        // The tables stay, for whoever has made them.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_million_are_taken_over_counted_and_listed_in_little_memory() -> Result<()> {
    population::alone(|| {
        let table = format!("attach = \"tc\"\nmax_flows = {TABLE}");
        let config = population::config(MEMBERS, "automap", &table);
        let mut site = Population::new(&config, TABLE, MILLION)?;
        site.open(0..MILLION)?;
        let folder = tempfile::tempdir()?;
        let heir = Heir::start(folder.path(), site.leave(), &config)?;
        let before = heir.memory()?;

        ensure!(heir.count(&[])? == MILLION, "{} flows", heir.count(&[])?);
        let of_member = heir.count(&["--member", "mx/m7"])?;
        ensure!(of_member == MILLION / u32::from(MEMBERS), "{of_member}");
        // Four connections of each client.
        let of_network = heir.count(&["--client", "10.64.9.0/24"])?;
        ensure!(of_network == 4 * 256, "{of_network}");
        ensure!(heir.count(&["--phase", "syn"])? == 0, "half-open ones");

        let all = heir.ask(&["show", "flows"])?;
        let lines: HashSet<_> = all.lines().skip(1).collect();
        ensure!(lines.len() == MILLION as usize, "{} lines", lines.len());
        let some = heir.ask(&["show", "flows", "--limit", "20", "--json"])?;
        let some: Vec<Value> = serde_json::from_str(&some)?;
        ensure!(some.len() == 20, "{} in place of 20", some.len());
        let status: Value = serde_json::from_str(&heir.ask(&["status", "--json"])?)?;
        ensure!(status["kernel"]["flows"] == MILLION, "{status}");

        let after = heir.memory()?;
        println!("{before} KiB before, {after} KiB after");
        ensure!(after <= before + ANSWERS, "{before} KiB, then {after} KiB");
        Ok(())
    })
}
