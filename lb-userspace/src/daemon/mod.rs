//! Wires the rooms: start, the seconds between, stop.
//!
//! Start changes nothing until everything that can be wrong has been looked at; a start that fails afterwards takes back
//! what it did, unless an earlier daemon's work is there: that stays as it is.

mod answers;
mod firewall;
mod live;
mod privilege;

use std::{fs, io::Write as _, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use rustix::thread::sched_getaffinity;
use tokio::{
    net::UnixListener,
    signal::unix::{Signal, SignalKind, signal},
    time::{Instant, MissedTickBehavior, interval},
};

use self::answers::{Shared, lock};
pub use self::live::{certificate_warnings, load_certificates};
use crate::{
    admin, config,
    dataplane::{Addresses, FEW_FLOWS, KernelPlane, Remover, check_interfaces},
    failure::{Exit, Failure, OrExit as _},
    model::{Forward, Generation, Guard},
    monitor,
    proxy::{self, Proxy, Services, WorkerListeners},
    telemetry::session::StdoutLog,
};

/// How long sessions may go on after the daemon was told to stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the start waits for the first probes: a good member answers sooner.
const FIRST_PROBES: Duration = Duration::from_secs(2);
/// Seconds between looks at the box's own addresses towards the members.
const REFRESH: u32 = 10;

/// What the daemon is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunOptions {
    /// The configuration file.
    pub config: PathBuf,
    /// Where the admin socket is made.
    pub admin: PathBuf,
    /// Where the bpffs is, or is mounted.
    pub bpffs: PathBuf,
    /// What has to outlive the daemon.
    pub state: PathBuf,
    /// Log what the packet programs say.
    pub kernel_log: bool,
}

/// Runs the daemon until it is told to stop.
///
/// # Errors
///
/// With the exit code that says whose fault it is.
pub fn run(options: RunOptions) -> Result<(), Failure> {
    let level = env_logger::Env::default().default_filter_or("info");
    env_logger::Builder::from_env(level)
        .format_target(false)
        .init();
    let (generation, warnings) = config::load(&options.config)?;
    for warning in warnings {
        log::warn!("{warning}");
    }
    let (certificates, faults) = load_certificates(&generation);
    if !faults.is_empty() {
        let faults: Vec<_> = faults.iter().map(ToString::to_string).collect();
        return Err(anyhow::anyhow!("{}", faults.join("\n"))).or_exit(Exit::Config);
    }
    for warning in certificate_warnings(&certificates) {
        log::warn!("{warning}");
    }
    privilege::check().or_exit(Exit::Privilege)?;
    check_interfaces(&generation.network).or_exit(Exit::Config)?;
    privilege::raise_limits();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(serve(options, generation, &certificates))
}

/// Why the daemon ends, and so what it leaves behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stop {
    /// SIGTERM, SIGINT: everything goes.
    Down,
    /// SIGUSR2: the kernel plane goes on, for the next process.
    Leave,
    /// Another process has taken over already.
    Succeeded,
}

async fn serve(
    options: RunOptions,
    generation: Generation,
    certificates: &live::Certificates,
) -> Result<(), Failure> {
    let mut signals = Signals::new()?;
    let flows = match has_passthrough(&generation) {
        true => generation.network.max_flows,
        false => FEW_FLOWS,
    };
    let plane = KernelPlane::load(&options.bpffs, flows, options.kernel_log)?;
    let adopted = plane.adopted();
    let remover = plane.remover();
    let mut addresses = Addresses::open(&options.state)?;
    let started = start(
        &options,
        generation.clone(),
        certificates,
        plane,
        &mut addresses,
    );
    let (shared, listener) = match started.await {
        Ok(started) => started,
        Err(failure) => {
            if !adopted {
                take_back(&remover, &generation, &mut addresses).await;
            }
            return Err(failure);
        }
    };
    let events = shared.plane().take_events();
    if let Some(events) = events {
        tokio::spawn(firewall::log_events(shared.clone(), events));
    }
    tokio::spawn(admin::server::serve(listener, shared.clone()));
    say_ready(&shared);
    let stop = watch(&shared, &mut signals, options.kernel_log).await;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    end(stop, &options, &shared, &mut addresses, &mut signals).await;
    Ok(())
}

/// Everything from a loaded plane to one that serves. What can fail comes before the flip: until then, an earlier daemon
/// that still lives goes on undisturbed.
async fn start(
    options: &RunOptions,
    generation: Generation,
    certificates: &live::Certificates,
    plane: KernelPlane,
    addresses: &mut Addresses,
) -> Result<(Arc<Shared>, UnixListener), Failure> {
    let numbers = plane.number(&generation)?;
    if !plane.other_owner().is_some_and(is_alive) {
        plane.forget_sessions();
    }
    let pools = live::pools(&generation, &numbers, &plane);
    let services = live::services(&generation, &numbers, &plane, &pools, certificates)?;
    let listeners = match services.is_empty() {
        true => Vec::new(),
        false => proxy::bind_listeners(&cpus()).context("cannot open the proxy's listeners")?,
    };
    let targets = live::targets(&generation, &pools);
    let shared = Arc::new(Shared::new(generation, numbers, pools, plane));
    probe(&shared, targets).await;
    addresses.apply(&shared.generation).await?;
    addresses.enable_forwarding(&shared.generation)?;
    attach(&shared)?;
    let listener = admin::server::bind(&options.admin)
        .and_then(UnixListener::from_std)
        .with_context(|| format!("cannot open the admin socket {}", options.admin.display()))?;
    apply(&shared, services, listeners)?;
    log::debug!("configuration {} is in use", options.config.display());
    Ok((shared, listener))
}

/// Starts the monitors, and waits a moment for their first findings.
async fn probe(shared: &Arc<Shared>, targets: Vec<monitor::Target>) {
    let numbers: Vec<u16> = targets.iter().map(|target| target.member.id).collect();
    if numbers.is_empty() {
        return;
    }
    tokio::spawn(monitor::run(targets, shared.clone()));
    let deadline = Instant::now() + FIRST_PROBES;
    let mut beat = interval(Duration::from_millis(5));
    while shared.unprobed(&numbers) > 0 && Instant::now() < deadline {
        beat.tick().await;
    }
}

/// Swaps the packet programs in place, or attaches them; without a generation they pass everything.
fn attach(shared: &Shared) -> Result<(), Failure> {
    let mut plane = shared.plane();
    match needs_packets(&shared.generation) {
        true => plane.attach(&shared.generation)?,
        false => plane.detach_packets(&shared.generation)?,
    }
    Ok(())
}

/// Starts the proxy, takes the steering over and flips the tables.
fn apply(
    shared: &Arc<Shared>,
    services: Vec<proxy::Service>,
    listeners: Vec<WorkerListeners>,
) -> Result<(), Failure> {
    let handles: Vec<_> = listeners
        .iter()
        .map(|worker| {
            Ok((
                worker.v4.try_clone()?,
                worker.v6.as_ref().map(|v6| v6.try_clone()).transpose()?,
            ))
        })
        .collect::<std::io::Result<_>>()
        .context("cannot share the proxy's listeners")?;
    if !listeners.is_empty() {
        let services = Arc::new(Services::new(services));
        let proxy = Proxy::start(services, listeners, Arc::new(StdoutLog))
            .context("cannot start the proxy")?;
        *lock(&shared.proxy) = Some(proxy);
    }
    let mut plane = shared.plane();
    let workers = handles.len() as u32;
    plane.steer(&handles)?;
    plane.apply(
        &shared.generation,
        &shared.numbers,
        |number| shared.is_up(number),
        workers,
    )?;
    // A probe may have ended between the two.
    refresh(shared, &mut plane);
    Ok(())
}

fn say_ready(shared: &Shared) {
    let servers = &shared.generation.virtual_servers;
    let passthrough = servers
        .iter()
        .filter(|server| matches!(server.forward, Forward::Passthrough { .. }))
        .count();
    let line = format!(
        "serving {} virtual servers ({passthrough} passthrough, {} proxy), generation {}",
        servers.len(),
        servers.len() - passthrough,
        shared.plane().generation()
    );
    let mut out = std::io::stdout().lock();
    // A closed standard output is no reason to end.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
}

/// The seconds between: expired flows go, own addresses are looked at, until something ends it.
async fn watch(shared: &Shared, signals: &mut Signals, kernel_log: bool) -> Stop {
    let mut logger = match kernel_log {
        true => shared
            .plane()
            .log_lines()
            .inspect_err(|error| log::error!("no log lines from the packet programs: {error:#}"))
            .ok(),
        false => None,
    };
    let mut second = interval(Duration::from_secs(1));
    second.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut until_refresh = REFRESH;
    loop {
        tokio::select! {
            stop = signals.stop() => return stop,
            _ = second.tick() => {}
        }
        if let Some(logger) = &mut logger {
            logger.flush();
        }
        let mut plane = shared.plane();
        if !plane.is_owner() {
            return Stop::Succeeded;
        }
        if let Err(error) = plane.tell_time(jiff::Timestamp::now()) {
            log::error!("{error:#}");
        }
        if has_passthrough(&shared.generation) {
            if let Err(error) = plane.sweep() {
                log::error!("{error:#}");
            }
            until_refresh -= 1;
            if until_refresh == 0 {
                until_refresh = REFRESH;
                refresh(shared, &mut plane);
            }
        }
    }
}

/// The box's own address towards a member may have changed with its routes, and the interfaces that rules name.
fn refresh(shared: &Shared, plane: &mut KernelPlane) {
    if let Err(error) = plane.refresh_places() {
        log::error!("{error:#}");
    }
    for (name, pool) in &shared.pools {
        for member in pool.members() {
            if let Err(error) = plane.set_member(member.id, name, member.address, member.is_up()) {
                log::error!("member {name}/{}: {error:#}", member.name);
            }
        }
    }
}

/// Ends: sessions first, then, if nobody else goes on, everything else.
async fn end(
    stop: Stop,
    options: &RunOptions,
    shared: &Arc<Shared>,
    addresses: &mut Addresses,
    signals: &mut Signals,
) {
    log::info!(
        "{}",
        match stop {
            Stop::Down => "stopping",
            Stop::Leave => "stopping; the kernel plane goes on",
            Stop::Succeeded => "another process has taken over; ending",
        }
    );
    let proxy = lock(&shared.proxy).take();
    if let Some(proxy) = proxy {
        proxy.stop_accepting();
        let drained = tokio::task::spawn_blocking(move || proxy.drain(DRAIN_TIMEOUT));
        tokio::select! {
            report = drained => if let Ok(report) = report {
                log::info!("{} sessions ended in order, {} were cut", report.finished, report.cut);
            },
            _ = signals.stop() => log::info!("told again: sessions are cut"),
        }
    }
    if stop == Stop::Down && shared.plane().is_owner() {
        take_down(options, shared, addresses).await;
    }
}

async fn take_down(options: &RunOptions, shared: &Shared, addresses: &mut Addresses) {
    let remover = shared.plane().remover();
    if let Err(error) = remover.remove(&shared.generation) {
        log::error!("{error:#}");
    }
    addresses.restore_forwarding();
    if let Err(error) = addresses.remove().await {
        log::error!("cannot remove the virtual addresses: {error:#}");
    }
    let _ = fs::remove_file(&options.admin);
}

/// After a failed start: as if it had never been tried.
async fn take_back(remover: &Remover, generation: &Generation, addresses: &mut Addresses) {
    addresses.restore_forwarding();
    let removed = addresses.remove().await;
    let cleared = remover.remove(generation);
    for error in [removed.err(), cleared.err()].into_iter().flatten() {
        log::error!("after the failed start: {error:#}");
    }
}

fn has_passthrough(generation: &Generation) -> bool {
    generation
        .virtual_servers
        .iter()
        .any(|server| matches!(server.forward, Forward::Passthrough { .. }))
}

/// Do packet programs have something to do: carry flows, or judge connections to the proxy plane before they cost a
/// socket? On loopback the steering program judges.
fn needs_packets(generation: &Generation) -> bool {
    let network = &generation.network;
    let guarded = |guard: &Guard| *guard != Guard::default();
    has_passthrough(generation)
        || (network.client_interfaces.iter().any(|name| name != "lo")
            && (guarded(&network.guard)
                || generation
                    .virtual_servers
                    .iter()
                    .any(|server| guarded(&server.guard))))
}

/// The cores this process may run on.
fn cpus() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(None) else {
        return vec![0];
    };
    let most = lb_common::layout::MAX_WORKERS as usize;
    (0..rustix::thread::CpuSet::MAX_CPU)
        .filter(|cpu| set.is_set(*cpu))
        .take(most)
        .collect()
}

/// Is this the process id of a running smtplb?
fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "smtplb")
}

/// The signals that end the daemon.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    leave: Signal,
    reload: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            leave: listen(SignalKind::user_defined2())?,
            reload: listen(SignalKind::hangup())?,
        })
    }

    async fn stop(&mut self) -> Stop {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return Stop::Down,
                _ = self.interrupt.recv() => return Stop::Down,
                _ = self.leave.recv() => return Stop::Leave,
                _ = self.reload.recv() => log::warn!(
                    "SIGHUP: reload is not supported yet; start a new process, it takes over without a gap"
                ),
            }
        }
    }
}
