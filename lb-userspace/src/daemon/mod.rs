//! Wires the rooms: start, the seconds between, reload, stop.
//!
//! Start changes nothing until everything that can be wrong has been looked at; a start that fails afterwards takes back
//! what it did, unless an earlier daemon's work is there: that stays as it is.

mod answers;
mod certificates;
mod ending;
mod firewall;
mod flow_log;
mod live;
mod orders;
mod privilege;
mod reload;
mod roster;
mod running;
mod signals;
mod turn;

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use lb_common::stats::TrafficCell;
use rustix::thread::sched_getaffinity;
use tokio::{
    net::UnixListener,
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval},
};

pub use self::live::{certificate_warnings, load_certificates};
use self::{
    flow_log::FlowLog,
    orders::Order,
    roster::Roster,
    running::{Running, Shared, lock},
    signals::{Asked, Signals, Stop},
    turn::Turn,
};
use crate::{
    admin, config,
    dataplane::{Addresses, FEW_FLOWS, KernelPlane, Remover, check_interfaces},
    failure::{Exit, Failure, OrExit as _},
    model::{Forward, Generation, Guard},
    monitor::Watches,
    proxy::{self, Proxy, WorkerListeners},
    telemetry::session::StdoutLog,
};

/// How long sessions may go on after the daemon was told to stop.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the start waits for the first probes: a good member answers sooner.
const FIRST_PROBES: Duration = Duration::from_secs(2);
/// How long the start waits for another one to end.
const START_TURN: Duration = Duration::from_secs(30);
/// Flows looked at for addresses that go on after a start: those of prefixes may be many.
const LEFT_BEHIND: usize = 4096;
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
    runtime.block_on(serve(options, generation, certificates))
}

async fn serve(
    options: RunOptions,
    generation: Generation,
    certificates: live::Certificates,
) -> Result<(), Failure> {
    let mut signals = Signals::new()?;
    let turn = Turn::take(&options.state, START_TURN)
        .await
        .or_exit(Exit::Temporary)?;
    let flows = match has_passthrough(&generation) {
        true => generation.network.max_flows,
        false => FEW_FLOWS,
    };
    let plane = KernelPlane::load(&options.bpffs, flows, options.kernel_log)?;
    let (adopted, beside) = (plane.adopted(), plane.has_others());
    let remover = plane.remover();
    let mut addresses = Addresses::open(&options.state)?;
    let started = start(
        &options,
        generation.clone(),
        certificates,
        plane,
        &mut addresses,
    );
    let (shared, watches, orders, listener) = match started.await {
        Ok(started) => started,
        Err(failure) => {
            if beside && !adopted {
                // Addresses and forwarding are what the other layout lives by, too.
                if let Err(error) = remover.remove_own() {
                    log::error!("after the failed start: {error:#}");
                }
            } else if !adopted {
                take_back(&remover, &generation, &mut addresses).await;
            }
            return Err(failure);
        }
    };
    tokio::spawn(firewall::log_events(shared.clone(), options.state.clone()));
    tokio::spawn(admin::server::serve(listener, shared.clone()));
    let flow_log = FlowLog::new(&options.state);
    let lingering = match adopted {
        true => left_behind(&shared),
        false => Vec::new(),
    };
    let mut lingering_snat: Vec<IpAddr> = match adopted {
        true => shared.plane().snat_addresses_in_use().into_iter().collect(),
        false => Vec::new(),
    };
    let configured = shared.running().generation.snat_addresses();
    lingering_snat.retain(|address| !configured.contains(address));
    let former = vec![Former {
        running: shared.running(),
        until: None,
    }];
    let mut daemon = Daemon {
        options,
        shared,
        addresses,
        watches,
        orders,
        lingering,
        lingering_snat,
        former,
        pruned: false,
        flow_log,
    };
    daemon.let_go().await;
    drop(turn);
    say_ready(&daemon.shared);
    let stop = daemon.watch(&mut signals).await;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    daemon.end(stop, &mut signals).await;
    Ok(())
}

/// What the main task holds; it does one thing after the other.
struct Daemon {
    options: RunOptions,
    shared: Arc<Shared>,
    addresses: Addresses,
    watches: Watches,
    orders: mpsc::Receiver<Order>,
    /// Virtual servers that a reload has removed, whose connections go on.
    lingering: Vec<Lingering>,
    /// Addresses of SNAT pools that no virtual server uses any more, but connections do.
    lingering_snat: Vec<IpAddr>,
    /// Generations that something may be left of.
    former: Vec<Former>,
    /// Addresses that nothing needs any more were removed since the last flip.
    pruned: bool,
    flow_log: FlowLog,
}

/// A virtual server that takes nothing new, or nothing new this way.
struct Lingering {
    address: IpAddr,
    cell: &'static TrafficCell,
    /// It goes on in the proxy plane: only its flows are waited for.
    flows_alone: bool,
}

impl Lingering {
    fn goes_on(&self) -> bool {
        match self.flows_alone {
            true => self.cell.flows() > 0,
            false => self.cell.active() > 0,
        }
    }
}

/// A generation that is in use no more.
struct Former {
    running: Arc<Running>,
    /// It had an interface that the next has not: flows that began until this tick may need the programs there.
    until: Option<u32>,
}

type Started = (Arc<Shared>, Watches, mpsc::Receiver<Order>, UnixListener);

/// Everything from a loaded plane to one that serves. What can fail comes before the flip: until then, an earlier daemon
/// that still lives goes on undisturbed.
async fn start(
    options: &RunOptions,
    generation: Generation,
    certificates: live::Certificates,
    plane: KernelPlane,
    addresses: &mut Addresses,
) -> Result<Started, Failure> {
    let numbers = plane.number(&generation)?;
    if !plane.other_owner().is_some_and(is_alive) {
        plane.forget_sessions();
    }
    let roster = Roster::load(&options.state);
    let pools = live::pools(&generation, &numbers, &plane, &roster, None);
    let services = live::services(&generation, &numbers, &plane, &pools, &certificates, None)?;
    let listeners = match services.is_empty() {
        true => Vec::new(),
        false => proxy::bind_listeners(&cpus()).context("cannot open the proxy's listeners")?,
    };
    let targets = live::targets(&generation, &pools, |_| false);
    let running = Running {
        generation,
        numbers,
        pools,
        certificates,
        services,
    };
    let (sender, orders) = mpsc::channel(orders::WAITING);
    let shared = Arc::new(Shared::new(running, plane, roster, sender));
    let mut watches = Watches::new(shared.clone());
    let numbers: Vec<u16> = targets.iter().map(|target| target.member.id).collect();
    watches.set(targets);
    first_probes(&shared, &numbers).await;
    let running = shared.running();
    addresses.add_all(&running.generation).await?;
    addresses.enable_forwarding(&running.generation)?;
    if needs_packets(&running.generation) {
        shared.plane().attach(&running.generation)?;
    }
    let listener = admin::server::bind(&options.admin)
        .and_then(UnixListener::from_std)
        .with_context(|| format!("cannot open the admin socket {}", options.admin.display()))?;
    heed_roster(&shared, &options.state, &mut watches);
    apply(&shared, listeners)?;
    lock(&shared.roster).forget_others(&running.generation);
    log::debug!("configuration {} is in use", options.config.display());
    Ok((shared, watches, orders, listener))
}

async fn first_probes(shared: &Shared, numbers: &[u16]) {
    let deadline = Instant::now() + FIRST_PROBES;
    let mut beat = interval(Duration::from_millis(5));
    while shared.unprobed(numbers) > 0 && Instant::now() < deadline {
        beat.tick().await;
    }
}

/// What was said of members to the earlier daemon while this one started holds here, too.
fn heed_roster(shared: &Shared, state: &Path, watches: &mut Watches) {
    let running = shared.running();
    let roster = Roster::load(state);
    let mut changed = false;
    for (pool, member) in running.members() {
        let admin = roster.get(pool, &member.name).admin;
        changed |= member.admin() != admin;
        member.set_admin(admin);
    }
    *lock(&shared.roster) = roster;
    if changed {
        let probed: Vec<u16> = lock(&shared.health).keys().copied().collect();
        let known = |number: u16| probed.contains(&number);
        watches.set(live::targets(&running.generation, &running.pools, known));
    }
}

/// What an earlier daemon's flows still need: those of virtual servers that this configuration does not pass through.
fn left_behind(shared: &Shared) -> Vec<Lingering> {
    let running = shared.running();
    let numbers = &running.numbers.virtual_servers;
    let servers = || running.generation.virtual_servers.iter();
    let known: Vec<u16> = servers().map(|server| numbers[&server.name]).collect();
    let passed: Vec<u16> = servers()
        .filter(|server| matches!(server.forward, Forward::Passthrough { .. }))
        .map(|server| numbers[&server.name])
        .collect();
    let plane = shared.plane();
    let flows = plane.flow_table().all().filter(|flow| !flow.phase.ended());
    let left: BTreeSet<(u16, IpAddr)> = flows
        .filter(|flow| !passed.contains(&flow.virtual_server))
        .map(|flow| (flow.virtual_server, flow.route.address().0.to_ip()))
        .take(LEFT_BEHIND)
        .collect();
    left.into_iter()
        .map(|(number, address)| Lingering {
            address,
            cell: plane.service_cell(number),
            flows_alone: known.contains(&number),
        })
        .filter(Lingering::goes_on)
        .collect()
}

/// Starts the proxy, takes the steering over and flips the tables.
fn apply(shared: &Arc<Shared>, listeners: Vec<WorkerListeners>) -> Result<(), Failure> {
    let running = shared.running();
    shared.services.replace(running.services.iter().cloned());
    start_proxy(shared, listeners)?;
    let workers = workers(shared);
    let mut plane = shared.plane();
    plane.apply(
        &running.generation,
        &running.numbers,
        |number| running.takes_new(number),
        workers,
    )?;
    // A probe may have ended between the two.
    refresh(shared, &running, &mut plane);
    Ok(())
}

/// Starts the proxy's workers, if there are to be any, and steers to them.
fn start_proxy(shared: &Shared, listeners: Vec<WorkerListeners>) -> Result<(), Failure> {
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
        let proxy = Proxy::start(shared.services.clone(), listeners, Arc::new(StdoutLog))
            .context("cannot start the proxy")?;
        *lock(&shared.proxy) = Some(proxy);
    }
    shared.plane().steer(&handles)?;
    Ok(())
}

fn workers(shared: &Shared) -> u32 {
    lock(&shared.proxy)
        .as_ref()
        .map_or(0, |proxy| proxy.workers() as u32)
}

fn say_ready(shared: &Shared) {
    let running = shared.running();
    let servers = &running.generation.virtual_servers;
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

/// The box's own address towards a member may have changed with its routes, and the interfaces that rules name.
fn refresh(shared: &Shared, running: &Running, plane: &mut KernelPlane) {
    if let Err(error) = plane.refresh_places() {
        log::error!("{error:#}");
    }
    for (pool, member) in running.members() {
        shared.write_member(plane, pool, member);
    }
}

impl Daemon {
    /// The seconds between: expired flows go, own addresses are looked at, orders are carried out, until something
    /// ends it.
    async fn watch(&mut self, signals: &mut Signals) -> Stop {
        let mut logger = match self.options.kernel_log {
            true => self
                .shared
                .plane()
                .log_lines()
                .inspect_err(|error| {
                    log::error!("no log lines from the packet programs: {error:#}")
                })
                .ok(),
            false => None,
        };
        let mut second = interval(Duration::from_secs(1));
        second.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut tenth = interval(flow_log::PERIOD);
        tenth.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut until_refresh = REFRESH;
        loop {
            tokio::select! {
                asked = signals.next() => match asked {
                    Asked::Stop(stop) => return stop,
                    Asked::Reload => {
                        self.reload_by_signal().await;
                        continue;
                    }
                },
                Some(order) = self.orders.recv() => {
                    self.obey(order).await;
                    continue;
                }
                _ = tenth.tick() => {
                    self.flow_log.read(&self.shared);
                    continue;
                }
                _ = second.tick() => {}
            }
            if let Some(logger) = &mut logger {
                logger.flush();
            }
            if !self.shared.plane().is_owner() {
                self.flow_log.give_up();
                return Stop::Succeeded;
            }
            until_refresh -= 1;
            self.tend(until_refresh == 0);
            self.let_go().await;
            self.end_due().await;
            if until_refresh == 0 {
                until_refresh = REFRESH;
            }
        }
    }

    /// What every second needs; `thorough`: what every tenth one does.
    fn tend(&self, thorough: bool) {
        let running = self.shared.running();
        let mut plane = self.shared.plane();
        if thorough {
            plane.tend_others();
        }
        if let Err(error) = plane.tell_time(jiff::Timestamp::now()) {
            log::error!("{error:#}");
        }
        if !has_passthrough(&running.generation) && self.former.is_empty() {
            if thorough && let Err(error) = plane.refresh_places() {
                log::error!("{error:#}");
            }
            return;
        }
        if let Err(error) = plane.sweep() {
            log::error!("{error:#}");
        }
        if thorough {
            for (reason, count) in plane.exhausted() {
                log::warn!("{count} new connections refused: {}", reason.word());
            }
            refresh(&self.shared, &running, &mut plane);
        }
    }

    /// Carries out what somebody asked for.
    async fn obey(&mut self, order: Order) {
        // Who asked may have gone; the work is done all the same.
        match order {
            Order::Reload { dry_run, reply } => {
                let _ = reply.send(self.reload(dry_run).await);
            }
            Order::Member {
                pool,
                member,
                admin,
                deadline,
                reply,
            } => {
                let _ = reply.send(self.set_admin(&pool, &member, admin, deadline).await);
            }
            Order::Fell(pool, member) => self.member_fell(&pool, &member).await,
        }
    }

    /// Ends: sessions first, then, if nobody else goes on, everything else.
    async fn end(&mut self, stop: Stop, signals: &mut Signals) {
        log::info!(
            "{}",
            match stop {
                Stop::Down => "stopping",
                Stop::Leave => "stopping; the kernel plane goes on",
                Stop::Succeeded => "another process has taken over; ending",
            }
        );
        let proxy = lock(&self.shared.proxy).take();
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
        if stop == Stop::Down && self.shared.plane().is_owner() {
            self.flow_log.read_last(&self.shared);
            self.take_down().await;
        }
    }

    async fn take_down(&mut self) {
        let remover = self.shared.plane().remover();
        if let Err(error) = remover.remove(&self.shared.running().generation) {
            log::error!("{error:#}");
        }
        self.addresses.restore_forwarding();
        if let Err(error) = self.addresses.remove().await {
            log::error!("cannot remove the virtual addresses: {error:#}");
        }
        let _ = fs::remove_file(&self.options.admin);
    }
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

fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "smtplb")
}
