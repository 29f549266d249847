//! The signals that the daemon listens to.

use anyhow::{Context as _, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Why the daemon ends, and so what it leaves behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stop {
    /// SIGTERM, SIGINT: everything goes.
    Down,
    /// SIGUSR2: the kernel plane goes on, for the next process.
    Leave,
    /// Another process has taken over already.
    Succeeded,
}

/// What a signal asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Asked {
    /// To end.
    Stop(Stop),
    /// SIGHUP: to read the configuration again.
    Reload,
}

/// All of them, listened to.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    leave: Signal,
    reload: Signal,
}

impl Signals {
    /// Listens from now on.
    pub(super) fn new() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            leave: listen(SignalKind::user_defined2())?,
            reload: listen(SignalKind::hangup())?,
        })
    }

    /// The next one.
    pub(super) async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::Stop(Stop::Down),
            _ = self.interrupt.recv() => Asked::Stop(Stop::Down),
            _ = self.leave.recv() => Asked::Stop(Stop::Leave),
            _ = self.reload.recv() => Asked::Reload,
        }
    }

    /// The next one that asks to end.
    pub(super) async fn stop(&mut self) -> Stop {
        loop {
            if let Asked::Stop(stop) = self.next().await {
                return stop;
            }
        }
    }
}
