//! A program that runs in the lab, its log, and its end: always by its own id.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};

use crate::{
    lab::Namespace,
    wait::{wait_for, wait_until},
};

/// How long a program may take to obey SIGTERM.
const GRACE: Duration = Duration::from_secs(10);

/// A running program. Told to end, then made to, when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    keep: bool,
}

impl Process {
    /// Starts a program in a namespace; what it says goes to `log`, behind what is there.
    ///
    /// # Errors
    /// When the log or the program cannot be opened.
    pub fn spawn(
        namespace: &Namespace,
        name: &str,
        log: &Path,
        command: &mut Command,
    ) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot open {}", log.display()))?;
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file);
        let child = namespace.spawn(command)?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
            keep: false,
        })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has said.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Lets it run on when the value goes.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Waits for a line of the log behind its first `from` bytes.
    ///
    /// # Errors
    /// When the program ends before, or `limit` is over; quotes the log.
    pub fn wait_for_line(&mut self, limit: Duration, from: usize, start: &str) -> Result<String> {
        let log = self.log.clone();
        let what = format!("{} to say `{start}`", self.name);
        let found = wait_for(limit, &what, || {
            let ended = self.child.try_wait().ok().flatten();
            let text = fs::read_to_string(&log).unwrap_or_default();
            let line = text
                .get(from..)
                .unwrap_or_default()
                .lines()
                .find(|line| line.starts_with(start))
                .map(str::to_owned);
            match (line, ended) {
                (Some(line), _) => Some(Ok(line)),
                (None, Some(status)) => Some(Err(status)),
                (None, None) => None,
            }
        });
        match found {
            Ok(Ok(line)) => Ok(line),
            Ok(Err(status)) => bail!("{} ended with {status}:\n{}", self.name, self.log()),
            Err(error) => Err(error.context(format!("{}:\n{}", self.name, self.log()))),
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.context("no process id")?;
        rustix::process::kill_process(pid, signal)
            .with_context(|| format!("cannot signal {}", self.name))
    }

    /// Ends it without a chance to clean up, as `kill -9` does.
    ///
    /// # Errors
    /// When it cannot be signalled.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(Signal::KILL)?;
        self.child.wait()?;
        Ok(())
    }

    /// Asks it to end and waits until it has.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        self.signal(Signal::TERM)?;
        self.wait(GRACE)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        wait_for(limit, &what, || self.child.try_wait().ok().flatten())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if self.terminate().is_err() {
            let _ = self.kill();
        }
    }
}

/// A program of this crate: cargo puts it beside the tests, or one folder above them.
///
/// # Errors
/// When it has not been built.
pub fn own_program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot tell which program this is")?;
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} has not been built: `cargo build -p tests --bins`"))
}

/// Waits until something accepts connections.
///
/// # Errors
/// When nothing does within `limit`.
pub fn wait_for_listener(
    namespace: &Namespace,
    address: std::net::SocketAddr,
    limit: Duration,
) -> Result<()> {
    namespace.enter(|| {
        wait_until(limit, &format!("a listener on {address}"), || {
            std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
        })
    })
}
