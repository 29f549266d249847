//! A network namespace as a value, and work inside it.

use std::{
    fs::File,
    io::Write as _,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::{
    process::{Pid, Signal},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

/// Where `ip netns` keeps its names.
pub(super) const NAMES: &str = "/run/netns";

/// A machine of the lab. Ends with everything that runs in it when dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    handle: File,
    keep: bool,
}

impl Namespace {
    /// # Errors
    /// When `ip netns` fails.
    pub(crate) fn create(name: &str) -> Result<Self> {
        run(Command::new("ip").args(["netns", "add", name]))?;
        let path = Path::new(NAMES).join(name);
        let handle =
            File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        let namespace = Self {
            name: name.to_owned(),
            handle,
            keep: false,
        };
        namespace.ip(&["link set lo up".to_owned()])?;
        Ok(namespace)
    }

    /// As `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Leaves the namespace up when the value goes.
    pub(super) fn keep(&mut self) {
        self.keep = true;
    }

    /// Runs `work` on a thread of its own inside the namespace; sockets, threads and processes made there stay there.
    ///
    /// # Errors
    /// When the namespace cannot be entered, and what `work` returns. A panic of `work` goes on here.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(self.handle.as_fd(), Some(LinkNameSpaceType::Network))
                    .with_context(|| format!("cannot enter {}", self.name))?;
                work()
            });
            match inside.join() {
                Ok(outcome) => outcome,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Starts a program inside. It shares the mounts of this process, unlike under `ip netns exec`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        self.enter(|| {
            command
                .spawn()
                .with_context(|| format!("cannot start {}", command.get_program().display()))
        })
    }

    /// Runs a program inside to its end.
    ///
    /// # Errors
    /// When it cannot be started; how it ended is for the caller to judge.
    pub fn output(&self, command: &mut Command) -> Result<Output> {
        self.enter(|| {
            command
                .stdin(Stdio::null())
                .output()
                .with_context(|| format!("cannot start {}", command.get_program().display()))
        })
    }

    /// Runs a program inside, which has to end well, and returns its stdout.
    ///
    /// # Errors
    /// When it does not; quotes its stderr.
    pub fn run(&self, command: &mut Command) -> Result<String> {
        self.enter(|| run(command))
    }

    /// Runs lines of `ip` inside, all in one go.
    ///
    /// # Errors
    /// Quotes `ip` when a line fails.
    pub fn ip(&self, lines: &[String]) -> Result<()> {
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start ip")?;
        let mut stdin = child.stdin.take().context("no stdin")?;
        stdin.write_all(lines.join("\n").as_bytes())?;
        drop(stdin);
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success(),
            "{}: ip: {}\n{}",
            self.name,
            String::from_utf8_lossy(&output.stderr).trim(),
            lines.join("\n")
        );
        Ok(())
    }

    /// Ends every process inside, each by its id, without a chance to clean up.
    pub fn kill_processes(&self) {
        kill_processes(&self.name);
    }

    /// Writes a kernel setting of the namespace, such as `net/ipv4/ip_forward`.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        self.enter(|| {
            std::fs::write(Path::new("/proc/sys").join(name), value)
                .with_context(|| format!("cannot set {name} to {value}"))
        })
    }

    /// Reads a kernel setting of the namespace.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn read_sysctl(&self, name: &str) -> Result<String> {
        self.enter(|| {
            let path = PathBuf::from("/proc/sys").join(name);
            let value =
                std::fs::read_to_string(&path).with_context(|| format!("cannot read {name}"))?;
            Ok(value.trim().to_owned())
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if !self.keep {
            remove(&self.name);
        }
    }
}

/// Ends what runs in a namespace, each process by its id, and takes away its name.
pub(super) fn remove(name: &str) {
    kill_processes(name);
    let _ = Command::new("ip").args(["netns", "del", name]).output();
}

fn kill_processes(name: &str) {
    for pid in pids(name) {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
}

/// The processes inside, this one never among them.
fn pids(name: &str) -> Vec<Pid> {
    let Ok(output) = Command::new("ip").args(["netns", "pids", name]).output() else {
        return Vec::new();
    };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| Pid::from_raw(line.trim().parse().ok()?))
        .filter(|pid| *pid != rustix::process::getpid())
        .collect()
}

/// Runs a program that has to end well.
fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().display().to_string();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| anyhow!("cannot start {name}: {error}"))?;
    if !output.status.success() {
        let arguments: Vec<_> = command
            .get_args()
            .map(|word| word.to_string_lossy())
            .collect();
        bail!(
            "`{name} {}` ended with {}: {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
