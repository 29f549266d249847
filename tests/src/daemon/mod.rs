//! smtplb in the box of a lab: started, asked, killed, started again.

pub mod config;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use aya::util::KernelVersion;
use lb_userspace::admin::view::{FlowView, MemberView, Stats, Status};
use rustix::process::Signal;
use serde::de::DeserializeOwned;

use crate::{
    lab::Lab,
    process::Process,
    wait::{wait_for, wait_until},
};

/// How long the daemon may take to serve, the first loading of its programs included.
const START: Duration = Duration::from_secs(20);

/// A daemon in the box. Takes everything down when dropped.
#[derive(Debug)]
pub struct Daemon<'lab> {
    lab: &'lab Lab,
    process: Process,
}

impl<'lab> Daemon<'lab> {
    /// Writes the configuration, starts the daemon and waits until it serves.
    ///
    /// # Errors
    /// When it does not; quotes its log.
    pub fn start(lab: &'lab Lab, config: &str) -> Result<Self> {
        Self::start_as(lab, config, |command| command)
    }

    /// As [`Self::start`], with a wrapper around the daemon's command.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_as(
        lab: &'lab Lab,
        config: &str,
        wrap: impl FnOnce(Command) -> Command,
    ) -> Result<Self> {
        let path = config_path(lab);
        fs::write(&path, config).with_context(|| format!("cannot write {}", path.display()))?;
        let mut daemon = Self {
            lab,
            process: spawn(lab, wrap(command(lab)?))?,
        };
        daemon.wait_for_serving(0)?;
        Ok(daemon)
    }

    /// Starts the next daemon after this one has ended.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_again(&mut self) -> Result<()> {
        let said = self.process.log().len();
        self.process = spawn(self.lab, command(self.lab)?)?;
        self.wait_for_serving(said)
    }

    /// Starts the next daemon beside this one, and waits until that one has gone by itself.
    ///
    /// # Errors
    /// As [`Self::start`], and when the old one does not go, or not well.
    pub fn succeed(&mut self) -> Result<()> {
        let said = self.process.log().len();
        let next = spawn(self.lab, command(self.lab)?)?;
        let mut old = std::mem::replace(&mut self.process, next);
        self.wait_for_serving(said)?;
        let status = old.wait(Duration::from_secs(20))?;
        if !status.success() {
            bail!("the old daemon ended with {status}:\n{}", old.log());
        }
        Ok(())
    }

    /// Starts two next daemons at the same moment, and waits until one of them alone is left.
    ///
    /// # Errors
    /// When another than the last one is left, or one does not end well.
    pub fn succeed_twice_at_once(&mut self) -> Result<()> {
        let said = self.process.log().len();
        let mut next = [
            spawn(self.lab, command(self.lab)?)?,
            spawn(self.lab, command(self.lab)?)?,
        ];
        let served = |log: &str| log[said..].matches("serving ").count() == 2;
        wait_until(START, "both to have served", || served(&self.process.log()))?;
        let pid = self.status()?.pid;
        if next[0].id() == pid {
            next.swap(0, 1);
        }
        let [mut gone, stays] = next;
        if stays.id() != pid {
            bail!("a third one answers");
        }
        let mut old = std::mem::replace(&mut self.process, stays);
        for process in [&mut old, &mut gone] {
            let status = process.wait(Duration::from_secs(20))?;
            if !status.success() {
                bail!("a daemon ended with {status}:\n{}", process.log());
            }
        }
        Ok(())
    }

    /// Starts a next daemon beside this one, with another admin socket, which has to fail.
    ///
    /// # Errors
    /// When it serves instead, or does not end.
    pub fn fail_beside(&self, admin: &Path) -> Result<Output> {
        let mut command = command(self.lab)?;
        let mut arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        if let Some(place) = arguments.iter().position(|word| word == "--admin") {
            arguments[place + 1] = admin.into();
        }
        command = Command::new(program()?);
        command.args(arguments);
        run_to_its_end(self.lab, command)
    }

    fn wait_for_serving(&mut self, from: usize) -> Result<()> {
        self.process.wait_for_line(START, from, "serving").map(drop)
    }

    /// `kill -9`
    ///
    /// # Errors
    /// When it has ended already.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill()
    }

    /// Ends it as a service manager's stop does: everything is taken down.
    ///
    /// # Errors
    /// When it does not end, or not well.
    pub fn stop(&mut self) -> Result<()> {
        let status = self.process.terminate()?;
        if !status.success() {
            bail!("the daemon ended with {status}:\n{}", self.process.log());
        }
        Ok(())
    }

    /// Ends it as a service manager's restart does: the kernel plane goes on.
    ///
    /// # Errors
    /// When it does not end, or not well.
    pub fn stop_for_restart(&mut self) -> Result<()> {
        self.process.signal(Signal::USR2)?;
        let status = self.process.wait(Duration::from_secs(10))?;
        if !status.success() {
            bail!("the daemon ended with {status}:\n{}", self.process.log());
        }
        Ok(())
    }

    /// Writes another configuration where the daemon looks for it; it does not look by itself.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn reconfigure(&self, config: &str) -> Result<()> {
        // As editors do it: whoever reads sees the old file or the new one.
        let path = config_path(self.lab);
        let aside = path.with_extension("new");
        fs::write(&aside, config)?;
        Ok(fs::rename(&aside, &path)?)
    }

    /// Runs a verb to its end, with the options of this daemon; how it ended is for the caller to judge.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn verb(&self, words: &[&str]) -> Result<Output> {
        let mut command = Command::new(program()?);
        command.args(words);
        add_paths(&mut command, self.lab);
        self.lab.balancer.output(&mut command)
    }

    /// As [`Self::verb`], which has to end well; what it said.
    ///
    /// # Errors
    /// When it does not; quotes its stderr.
    pub fn good_verb(&self, words: &[&str]) -> Result<String> {
        let output = self.verb(words)?;
        if !output.status.success() {
            bail!(
                "`smtplb {}` ended with {}: {}",
                words.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// Lets it run on when the value goes.
    pub fn keep(&mut self) {
        self.process.keep();
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Everything that it has logged.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Waits until it has logged this.
    ///
    /// # Errors
    /// Quotes the log when it does not.
    pub fn wait_for_log(&self, words: &str) -> Result<()> {
        wait_until(START, words, || self.log().contains(words)).with_context(|| self.log())
    }

    /// `smtplb status --json`
    ///
    /// # Errors
    /// When the daemon does not answer, or not as agreed.
    pub fn status(&self) -> Result<Status> {
        self.ask(&["status"])
    }

    /// `smtplb show members --json`
    ///
    /// # Errors
    /// As [`Self::status`].
    pub fn members(&self) -> Result<Vec<MemberView>> {
        self.ask(&["show", "members"])
    }

    /// `smtplb show flows --json`, without those that have ended and are only remembered for stray packets.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub fn open_flows(&self) -> Result<Vec<FlowView>> {
        let mut flows: Vec<FlowView> = self.ask(&["show", "flows"])?;
        flows.retain(|flow| flow.phase != "closing" && flow.phase != "reset");
        Ok(flows)
    }

    /// `smtplb stats --json`
    ///
    /// # Errors
    /// As [`Self::status`].
    pub fn stats(&self) -> Result<Stats> {
        self.ask(&["stats"])
    }

    /// What a person wants to see when a test failed: states, flows and counters, as the daemon tells them.
    pub fn report(&self) -> String {
        let verbs: [&[&str]; 4] = [
            &["status"],
            &["show", "flows"],
            &["show", "sessions"],
            &["stats"],
        ];
        verbs
            .iter()
            .map(|verb| {
                let said = match self.run(verb, &[]) {
                    Ok(text) => String::from_utf8_lossy(&text).trim_end().to_owned(),
                    Err(error) => format!("{error:#}"),
                };
                format!("── smtplb {}\n{said}\n", verb.join(" "))
            })
            .collect()
    }

    fn ask<T: DeserializeOwned>(&self, verb: &[&str]) -> Result<T> {
        let said = self.run(verb, &["--json"])?;
        serde_json::from_slice(&said).with_context(|| {
            format!(
                "`smtplb {}`: {}",
                verb.join(" "),
                String::from_utf8_lossy(&said)
            )
        })
    }

    fn run(&self, verb: &[&str], flags: &[&str]) -> Result<Vec<u8>> {
        let output = Command::new(program()?)
            .args(verb)
            .args(flags)
            .arg("--admin")
            .arg(socket(self.lab))
            .output()
            .context("cannot start smtplb")?;
        if !output.status.success() {
            bail!(
                "`smtplb {}` ended with {}: {}",
                verb.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(output.stdout)
    }

    /// Waits until every member with this name, in whatever pool, has this state.
    ///
    /// # Errors
    /// When it does not get there within `limit`.
    pub fn wait_for_member(&self, name: &str, state: &str, limit: Duration) -> Result<()> {
        wait_until(limit, &format!("member {name} to be {state}"), || {
            self.members().is_ok_and(|members| {
                let mut named = members
                    .iter()
                    .filter(|member| member.name == name)
                    .peekable();
                named.peek().is_some() && named.all(|member| member.state == state)
            })
        })
    }

    /// Waits until no member is being checked for the first time any more.
    ///
    /// # Errors
    /// When that takes too long.
    pub fn wait_for_checked(&self) -> Result<()> {
        wait_until(Duration::from_secs(10), "every member to be up", || {
            self.members()
                .is_ok_and(|members| members.iter().all(|member| member.state == "up"))
        })
    }
}

/// The smtplb to test: `SMTPLB_BIN`, or the release build beside these tests.
///
/// # Errors
/// When there is none.
pub fn program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("SMTPLB_BIN") {
        return Ok(PathBuf::from(path));
    }
    let own = std::env::current_exe().context("cannot tell which program this is")?;
    own.ancestors()
        .map(|folder| folder.join("release/smtplb"))
        .find(|path| path.is_file())
        .context(
            "smtplb has not been built: `cargo xtask build --release`, or name it in SMTPLB_BIN",
        )
}

/// Runs the daemon to its end, for configurations and places that it refuses.
///
/// # Errors
/// When it serves instead, or does not end.
pub fn refused(lab: &Lab, config: &str) -> Result<Output> {
    refused_as(lab, config, |command| command)
}

/// As [`refused`], with a wrapper around the daemon's command.
///
/// # Errors
/// As [`refused`].
pub fn refused_as(
    lab: &Lab,
    config: &str,
    wrap: impl FnOnce(Command) -> Command,
) -> Result<Output> {
    fs::write(config_path(lab), config)?;
    run_to_its_end(lab, wrap(command(lab)?))
}

fn run_to_its_end(lab: &Lab, mut command: Command) -> Result<Output> {
    command
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let mut child = lab.balancer.spawn(&mut command)?;
    let ended = wait_for(START, "smtplb to refuse", || {
        child.try_wait().ok().flatten()
    });
    if ended.is_err() {
        child.kill()?;
    }
    let output = child.wait_with_output()?;
    ended.with_context(|| String::from_utf8_lossy(&output.stdout).into_owned())?;
    Ok(output)
}

fn spawn(lab: &Lab, mut command: Command) -> Result<Process> {
    let log = lab.folder().join("smtplb.log");
    Process::spawn(&lab.balancer, "smtplb", &log, &mut command)
}

fn command(lab: &Lab) -> Result<Command> {
    let mut command = Command::new(program()?);
    command.arg("run");
    add_paths(&mut command, lab);
    Ok(command)
}

/// The options that tell one daemon from another.
fn add_paths(command: &mut Command, lab: &Lab) {
    for (flag, path) in [
        ("--config", config_path(lab)),
        ("--admin", socket(lab)),
        ("--bpffs", bpffs(lab)),
        ("--state", lab.folder().join("state")),
    ] {
        command.arg(flag).arg(path);
    }
}

fn config_path(lab: &Lab) -> PathBuf {
    lab.folder().join("smtplb.toml")
}

/// What `status` has to call the TC hook on this kernel.
pub fn tc_hook() -> &'static str {
    let version = KernelVersion::current();
    match version.is_ok_and(|version| version >= KernelVersion::new(6, 6, 0)) {
        true => "tcx",
        false => "clsact",
    }
}

/// The admin socket of a lab's daemon.
pub fn socket(lab: &Lab) -> PathBuf {
    lab.folder().join("admin.sock")
}

/// Where the daemon pins its programs and tables.
pub fn bpffs(lab: &Lab) -> PathBuf {
    lab.folder().join("bpf")
}

/// Whether anything is pinned in a bpffs; the kernel's own two files for debugging do not count.
pub fn has_pins(bpffs: &Path) -> bool {
    fs::read_dir(bpffs).is_ok_and(|entries| {
        entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .any(|name| !name.ends_with(".debug"))
    })
}
