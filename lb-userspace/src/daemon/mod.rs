//! Wires the rooms: start, the seconds between, reload, stop.
//!
//! Start changes nothing until everything that can be wrong has been looked at; a start that fails afterwards takes back
//! what it did. An earlier daemon's work, where it is there, stays as it was.

mod answers;
mod certificates;
mod earlier;
mod ending;
mod firewall;
mod flow_log;
mod live;
mod machine;
mod orders;
mod privilege;
mod reload;
mod roster;
mod running;
mod signals;
mod start;
mod turn;

use std::{fs, net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use lb_common::stats::TrafficCell;
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};

pub use self::live::{certificate_warnings, load_certificates};
use self::{
    earlier::Earlier,
    flow_log::FlowLog,
    machine::{cpus, is_alive},
    orders::Order,
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
    telemetry::lines::Lines,
};

/// How long the start waits for another one to end.
const START_TURN: Duration = Duration::from_secs(30);
/// How long the end waits for who reads the last lines of the log.
const LAST_LINES: Duration = Duration::from_secs(1);
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
    let output = |started: std::io::Result<Lines>| started.context("cannot write a log");
    let (out, err) = (
        output(Lines::start(std::io::stdout()))?,
        output(Lines::start(std::io::stderr()))?,
    );
    let level = env_logger::Env::default().default_filter_or("info");
    env_logger::Builder::from_env(level)
        .format_target(false)
        .target(env_logger::Target::Pipe(Box::new(err.clone())))
        .init();
    let ended = run_until_told(options, out.clone());
    out.finish(LAST_LINES);
    err.finish(LAST_LINES);
    ended
}

fn run_until_told(options: RunOptions, out: Lines) -> Result<(), Failure> {
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
    runtime.block_on(serve(options, generation, certificates, out))
}

async fn serve(
    options: RunOptions,
    generation: Generation,
    certificates: live::Certificates,
    out: Lines,
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
    let before = match adopted || beside {
        true => Some(addresses.present().await?),
        false => None,
    };
    let started = start::start(
        &options,
        generation.clone(),
        certificates,
        plane,
        &mut addresses,
        out,
    );
    let (shared, watches, orders, listener) = match started.await {
        Ok(started) => started,
        Err(failure) => {
            match before {
                // What was there is what another one lives by.
                Some(before) => {
                    let restored = addresses.restore(&before).await;
                    let removed = match adopted {
                        true => Ok(()),
                        false => remover.remove_own(),
                    };
                    for error in [restored.err(), removed.err()].into_iter().flatten() {
                        log::error!("after the failed start: {error:#}");
                    }
                }
                None => take_back(&remover, &generation, &mut addresses).await,
            }
            return Err(failure);
        }
    };
    tokio::spawn(firewall::log_events(shared.clone(), options.state.clone()));
    tokio::spawn(admin::server::serve(listener, shared.clone()));
    let flow_log = FlowLog::new(&options.state);
    let lingering = match adopted {
        true => start::left_behind(&shared),
        false => Vec::new(),
    };
    let mut lingering_snat: Vec<IpAddr> = match adopted {
        true => shared.plane().snat_addresses_in_use().into_iter().collect(),
        false => Vec::new(),
    };
    let configured = shared.running().generation.snat_addresses();
    lingering_snat.retain(|address| !configured.contains(address));
    let former = vec![Former {
        generation: shared.running().generation.clone(),
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
        earlier: Earlier::default(),
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
    /// What sessions may still have of them.
    earlier: Earlier,
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
    generation: Generation,
    /// It had an interface that the next has not: flows that began until this tick may need the programs there.
    until: Option<u32>,
}

fn say_ready(shared: &Shared) {
    let running = shared.running();
    let servers = &running.generation.virtual_servers;
    let passthrough = servers
        .iter()
        .filter(|server| matches!(server.forward, Forward::Passthrough { .. }))
        .count();
    shared.lines.say(format_args!(
        "serving {} virtual servers ({passthrough} passthrough, {} proxy), generation {}",
        servers.len(),
        servers.len() - passthrough,
        shared.plane().generation()
    ));
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
            if until_refresh == 0 {
                let tagged = self.addresses.tagged_interfaces().await;
                if let Err(error) = self.shared.plane().note_tagged(tagged) {
                    log::error!("{error:#}");
                }
            }
            self.tend(until_refresh == 0);
            self.addresses.announce().await;
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

    /// Ends: sessions first, then, if nobody else goes on, everything else. Told again, it waits for no session.
    async fn end(&mut self, mut stop: Stop, signals: &mut Signals) {
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
            let limit = self.shared.running().generation.session.drain;
            let cutter = proxy.cutter();
            let mut drained = tokio::task::spawn_blocking(move || proxy.drain(limit));
            let report = tokio::select! {
                report = &mut drained => report,
                again = signals.stop() => {
                    log::info!("told again: sessions are cut");
                    cutter.cut();
                    // A stop of the service may overtake its restart.
                    if again == Stop::Down {
                        stop = Stop::Down;
                    }
                    drained.await
                }
            };
            if let Ok(report) = report {
                log::info!(
                    "{} sessions ended in order, {} were cut",
                    report.finished,
                    report.cut
                );
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

/// Do packet programs have something to do: carry flows, judge connections to the proxy plane before they cost a socket, or
/// keep foreign VLANs from it? On loopback the steering program judges, and there are no tags.
fn needs_packets(generation: &Generation) -> bool {
    let network = &generation.network;
    let guarded = |guard: &Guard| *guard != Guard::default();
    has_passthrough(generation)
        || (network.client_interfaces.iter().any(|name| name != "lo")
            && (guarded(&network.guard)
                || !network.vlans.is_empty()
                || generation
                    .virtual_servers
                    .iter()
                    .any(|server| guarded(&server.guard))))
}
