//! Sockets and the clock around the pure parts: one task per member.

use std::{sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::AbortHandle,
    time::{Instant, sleep_until, timeout_at},
};

use super::{
    Health, Observer, Target,
    dialogue::{Probe, Step},
    schedule::{Schedule, seed},
};

/// The members that are watched, each by a task of its own, until it is dropped.
///
/// Each is probed at once, then every interval of its monitor, never twice at the same time. A member's state is
/// set before the observer hears of it.
pub struct Watches {
    observer: Arc<dyn Observer>,
    watched: Vec<(Target, AbortHandle)>,
}

impl Watches {
    /// Nobody yet.
    pub fn new(observer: Arc<dyn Observer>) -> Self {
        Self {
            observer,
            watched: Vec::new(),
        }
    }

    /// Watches these from now on, and nobody else. A member that was watched in the same way does not notice.
    ///
    /// Needs a running runtime.
    pub fn set(&mut self, targets: Vec<Target>) {
        let mut before = std::mem::take(&mut self.watched);
        for target in targets {
            let same = before.iter().position(|(old, _)| is_same(old, &target));
            let watch = match same {
                Some(at) => before.swap_remove(at).1,
                None => tokio::spawn(watch(target.clone(), self.observer.clone())).abort_handle(),
            };
            self.watched.push((target, watch));
        }
        for (_, watch) in before {
            watch.abort();
        }
    }
}

impl Drop for Watches {
    fn drop(&mut self) {
        self.set(Vec::new());
    }
}

fn is_same(old: &Target, new: &Target) -> bool {
    Arc::ptr_eq(&old.member, &new.member) && old.monitor == new.monitor && old.pool == new.pool
}

async fn watch(target: Target, observer: Arc<dyn Observer>) {
    let address = target.member.address.to_string();
    let seed = seed(&[&target.pool, &target.member.name, &address]);
    let schedule = Schedule::new(&target.monitor, seed, Instant::now().into_std());
    let mut schedule = schedule.knowing(target.known);
    loop {
        sleep_until(schedule.due().into()).await;
        let health = probe(&target).await;
        let up = schedule.ended(health.up, Instant::now().into_std());
        let changed = target.member.set_up(up);
        observer.probed(&target, &health, changed);
    }
}

/// Asks once. The time limit holds for all of it, connect included.
async fn probe(target: &Target) -> Health {
    let limit: Duration = target.monitor.timeout;
    let started = Instant::now();
    let deadline = started + limit;
    let probe = Probe::new(&target.monitor.probe, started.into_std());
    let connect = TcpStream::connect(target.member.address);
    let mut stream = match timeout_at(deadline, connect).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return probe.refused(&error),
        Err(_) => return probe.timed_out(limit),
    };
    let mut step = probe.connected(Instant::now().into_std());
    let mut buffer = [0; 1024];
    loop {
        let probe = match step {
            Step::Done(health) => return health,
            Step::Wait(probe) => probe,
            Step::Send(probe, bytes) => {
                match timeout_at(deadline, stream.write_all(&bytes)).await {
                    Ok(Ok(())) => probe,
                    Ok(Err(error)) => return probe.closed(Some(&error)),
                    Err(_) => return probe.timed_out(limit),
                }
            }
        };
        step = match timeout_at(deadline, stream.read(&mut buffer)).await {
            Ok(Ok(0)) => Step::Done(probe.closed(None)),
            Ok(Ok(length)) => probe.received(&buffer[..length], Instant::now().into_std()),
            Ok(Err(error)) => Step::Done(probe.closed(Some(&error))),
            Err(_) => Step::Done(probe.timed_out(limit)),
        };
    }
}

#[cfg(test)]
mod tests;
