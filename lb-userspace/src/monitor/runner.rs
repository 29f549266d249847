//! Sockets and the clock around the pure parts: one task per member.

use std::{future, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep_until, timeout_at},
};

use super::{
    Health, Observer, Target,
    dialogue::{Probe, Step},
    schedule::{Schedule, seed},
};

/// Watches the members until it is dropped.
///
/// Each is probed at once, then every interval of its monitor, never twice at the same time. A member's state is
/// set before the observer hears of it.
pub async fn run(targets: Vec<Target>, observer: Arc<dyn Observer>) {
    let mut watches = JoinSet::new();
    for target in targets {
        watches.spawn(watch(target, observer.clone()));
    }
    while let Some(ended) = watches.join_next().await {
        // A watch has no end of its own: its observer has panicked, and the member keeps its last state.
        if let Err(error) = ended {
            log::error!("a member is no longer watched: {error}");
        }
    }
    future::pending().await
}

async fn watch(target: Target, observer: Arc<dyn Observer>) {
    let address = target.member.address.to_string();
    let seed = seed(&[&target.pool, &target.member.name, &address]);
    let mut schedule = Schedule::new(&target.monitor, seed, Instant::now().into_std());
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
