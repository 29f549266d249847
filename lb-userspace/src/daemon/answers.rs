//! The daemon's answers to the admin API.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use lb_common::{access::Spending, stats::TrafficCell, tcp};
use rustix::time::{ClockId, clock_gettime};

use super::firewall;
use crate::{
    admin::{
        Source,
        view::{
            ExplanationView, FlowView, KernelView, MemberView, PolicyView, PoolView, Question,
            SessionView, Stats, Status, Traffic, VirtualServerView,
        },
    },
    dataplane::{FlowSnapshot, KernelPlane, Numbers},
    model::{ClientTls, Forward, Generation, Method, Mode, Name, StartTls},
    monitor::{Health, Observer, Target},
    pool::LivePool,
    proxy::Proxy,
};

/// All that the daemon's tasks share.
pub(super) struct Shared {
    pub(super) generation: Generation,
    pub(super) numbers: Numbers,
    pub(super) pools: BTreeMap<Name, Arc<LivePool>>,
    pub(super) started: Instant,
    plane: Mutex<KernelPlane>,
    pub(super) proxy: Mutex<Option<Proxy>>,
    health: Mutex<HashMap<u16, String>>,
}

/// A panic elsewhere must not take the plane down: what is behind the lock stays usable.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(
        generation: Generation,
        numbers: Numbers,
        pools: BTreeMap<Name, Arc<LivePool>>,
        plane: KernelPlane,
    ) -> Self {
        Self {
            generation,
            numbers,
            pools,
            started: Instant::now(),
            plane: Mutex::new(plane),
            proxy: Mutex::new(None),
            health: Mutex::new(HashMap::new()),
        }
    }

    pub(super) fn plane(&self) -> MutexGuard<'_, KernelPlane> {
        lock(&self.plane)
    }

    /// Members whose first probe has not ended yet.
    pub(super) fn unprobed(&self, targets: &[u16]) -> usize {
        let health = lock(&self.health);
        targets
            .iter()
            .filter(|number| !health.contains_key(number))
            .count()
    }

    /// Is this member up? The tables are filled from this.
    pub(super) fn is_up(&self, number: u16) -> bool {
        self.pools
            .values()
            .flat_map(|pool| pool.members())
            .any(|member| member.id == number && member.is_up())
    }

    fn member_views(&self, name: &Name, pool: &LivePool, carried: &Carried) -> Vec<MemberView> {
        let monitored = self.generation.pools[name].monitor.is_some();
        let health = lock(&self.health);
        let view = |member: &Arc<crate::pool::LiveMember>| {
            let reason = health.get(&member.id).cloned();
            let state = match (member.is_up(), monitored && reason.is_none()) {
                (true, _) => "up",
                (false, true) => "checking",
                (false, false) => "down",
            };
            let kernel = kernel_traffic(member.counters(), carried.members.get(&member.id));
            let proxy = proxy_traffic(member.counters());
            MemberView {
                pool: name.to_string(),
                name: member.name.to_string(),
                address: member.address,
                state: state.to_owned(),
                reason,
                traffic: sum(kernel, proxy),
                kernel,
                proxy,
            }
        };
        pool.members().iter().map(view).collect()
    }

    fn virtual_server_views(
        &self,
        plane: &KernelPlane,
        carried: &Carried,
    ) -> Vec<VirtualServerView> {
        let view = |server: &Arc<crate::model::VirtualServer>| {
            let number = self.numbers.virtual_servers[&server.name];
            let cell = plane.service_cell(number);
            let up = self.pools[&server.pool]
                .members()
                .iter()
                .any(|member| member.is_up());
            VirtualServerView {
                name: server.name.to_string(),
                address: server.at.to_string(),
                forward: forward_word(&server.forward).to_owned(),
                client_tls: tls_word(&server.forward).map(str::to_owned),
                pool: server.pool.to_string(),
                state: if up { "up" } else { "down" }.to_owned(),
                traffic: sum(
                    kernel_traffic(cell, carried.virtual_servers.get(&number)),
                    proxy_traffic(cell),
                ),
            }
        };
        self.generation.virtual_servers.iter().map(view).collect()
    }
}

impl Source for Shared {
    fn status(&self) -> Status {
        let plane = self.plane();
        let flows = plane.flows();
        let carried = Carried::by(&flows);
        let workers = lock(&self.proxy)
            .as_ref()
            .map_or(0, |proxy| proxy.workers() as u32);
        let pools = self.pools.iter().map(|(name, pool)| PoolView {
            name: name.to_string(),
            method: method_word(self.generation.pools[name].method).to_owned(),
            monitor: self.generation.pools[name]
                .monitor
                .as_ref()
                .map(ToString::to_string),
            members: self.member_views(name, pool, &carried),
        });
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            generation: u64::from(plane.generation()),
            mode: match self.generation.mode {
                Mode::Mixed => "mixed",
                Mode::PassthroughOnly => "passthrough-only",
            }
            .to_owned(),
            uptime_s: self.started.elapsed().as_secs(),
            kernel: KernelView {
                attachments: plane.attachments().to_vec(),
                flows: flows.len() as u64,
                flows_max: plane.flows_max(),
            },
            workers,
            virtual_servers: self.virtual_server_views(&plane, &carried),
            pools: pools.collect(),
        }
    }

    fn flows(&self) -> Vec<FlowView> {
        let names: HashMap<u16, String> = self
            .numbers
            .virtual_servers
            .iter()
            .map(|(name, number)| (*number, name.to_string()))
            .collect();
        let now = now_tick();
        let flows = self.plane().flows();
        flows
            .iter()
            .map(|flow| flow_view(flow, &names, now))
            .collect()
    }

    fn sessions(&self) -> Vec<SessionView> {
        lock(&self.proxy)
            .as_ref()
            .map_or_else(Vec::new, Proxy::sessions)
    }

    fn stats(&self) -> Stats {
        let plane = self.plane();
        let carried = Carried::by(&plane.flows());
        let virtual_servers = self
            .virtual_server_views(&plane, &carried)
            .into_iter()
            .map(|view| (view.name, view.traffic));
        let members = self.pools.iter().flat_map(|(name, pool)| {
            self.member_views(name, pool, &carried)
                .into_iter()
                .map(|view| (format!("{}/{}", view.pool, view.name), view.traffic))
        });
        let proxy = lock(&self.proxy);
        let mut events = proxy.as_ref().map_or_else(BTreeMap::new, Proxy::events);
        let suppressed = plane.refused(Spending::Events);
        events.insert("firewall-events-suppressed".to_owned(), suppressed);
        Stats {
            drops: plane.drops(),
            events,
            virtual_servers: virtual_servers.collect(),
            members: members.collect(),
        }
    }

    fn policies(&self) -> Vec<PolicyView> {
        firewall::policies(&self.generation, &self.plane())
    }

    fn explain(&self, question: &Question) -> Result<ExplanationView, String> {
        firewall::explain(self, question)
    }
}

impl Observer for Shared {
    fn probed(&self, target: &Target, health: &Health, changed: bool) {
        let member = &target.member;
        let first = lock(&self.health)
            .insert(member.id, health.reason.clone())
            .is_none();
        if changed || first {
            let word = if member.is_up() { "up" } else { "down" };
            log::info!(
                "member {}/{} is {word}: {}",
                target.pool,
                member.name,
                health.reason
            );
            let mut plane = self.plane();
            // Before this generation is in use, and after another daemon has taken over, the tables are not ours.
            if !plane.is_owner() {
                return;
            }
            let written = plane.set_member(member.id, &target.pool, member.address, member.is_up());
            if let Err(error) = written {
                log::error!("member {}/{}: {error:#}", target.pool, member.name);
            }
        }
    }
}

/// What live flows have carried so far, by owner; ended ones are in the cells already.
#[derive(Default)]
struct Carried {
    members: HashMap<u16, Traffic>,
    virtual_servers: HashMap<u16, Traffic>,
}

impl Carried {
    fn by(flows: &[FlowSnapshot]) -> Self {
        let mut carried = Self::default();
        for flow in flows {
            for traffic in [
                carried.members.entry(flow.member).or_default(),
                carried
                    .virtual_servers
                    .entry(flow.virtual_server)
                    .or_default(),
            ] {
                traffic.bytes_in += flow.bytes[0];
                traffic.bytes_out += flow.bytes[1];
                traffic.packets_in += flow.packets[0];
                traffic.packets_out += flow.packets[1];
            }
        }
        carried
    }
}

fn kernel_traffic(cell: &TrafficCell, live: Option<&Traffic>) -> Traffic {
    let live = live.copied().unwrap_or_default();
    Traffic {
        active: cell.flows_active.load(Relaxed),
        total: cell.flows_total.load(Relaxed),
        bytes_in: cell.flow_bytes_in.load(Relaxed) + live.bytes_in,
        bytes_out: cell.flow_bytes_out.load(Relaxed) + live.bytes_out,
        packets_in: cell.flow_packets_in.load(Relaxed) + live.packets_in,
        packets_out: cell.flow_packets_out.load(Relaxed) + live.packets_out,
    }
}

fn proxy_traffic(cell: &TrafficCell) -> Traffic {
    Traffic {
        active: cell.sessions_active.load(Relaxed),
        total: cell.sessions_total.load(Relaxed),
        bytes_in: cell.session_bytes_in.load(Relaxed),
        bytes_out: cell.session_bytes_out.load(Relaxed),
        packets_in: 0,
        packets_out: 0,
    }
}

fn sum(one: Traffic, other: Traffic) -> Traffic {
    Traffic {
        active: one.active + other.active,
        total: one.total + other.total,
        bytes_in: one.bytes_in + other.bytes_in,
        bytes_out: one.bytes_out + other.bytes_out,
        packets_in: one.packets_in + other.packets_in,
        packets_out: one.packets_out + other.packets_out,
    }
}

fn flow_view(flow: &FlowSnapshot, names: &HashMap<u16, String>, now: u32) -> FlowView {
    let socket = |(address, port): (lb_common::addr::Addr, u16)| address.to_socket_addr(port);
    // Two clocks a moment apart: a flow from the future is of now.
    let since =
        |tick: u32| (u64::from(now.saturating_sub(tick)) << tcp::TICK_SHIFT) / 1_000_000_000;
    FlowView {
        virtual_server: names
            .get(&flow.virtual_server)
            .cloned()
            .unwrap_or_else(|| format!("#{}", flow.virtual_server)),
        client: socket(flow.route.client()),
        address: socket(flow.route.address()),
        member: socket(flow.route.member()),
        snat: socket(flow.route.snat()),
        phase: flow.phase.word().to_owned(),
        age_s: since(flow.created),
        idle_s: since(flow.last_seen),
        bytes_in: flow.bytes[0],
        bytes_out: flow.bytes[1],
        packets_in: flow.packets[0],
        packets_out: flow.packets[1],
    }
}

/// The tick of now, by the clock that the programs read.
fn now_tick() -> u32 {
    let now = clock_gettime(ClockId::Monotonic);
    let now = Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32);
    tcp::tick(now.as_nanos() as u64)
}

pub(super) fn forward_word(forward: &Forward) -> &'static str {
    match forward {
        Forward::Passthrough { .. } => "passthrough",
        Forward::Proxy { .. } => "proxy",
    }
}

fn tls_word(forward: &Forward) -> Option<&'static str> {
    let Forward::Proxy { client_tls } = forward else {
        return None;
    };
    Some(match client_tls {
        ClientTls::None => "none",
        ClientTls::Implicit { .. } => "implicit",
        ClientTls::StartTls {
            policy: StartTls::Require,
            ..
        } => "starttls-require",
        ClientTls::StartTls {
            policy: StartTls::Allow,
            ..
        } => "starttls-allow",
    })
}

fn method_word(method: Method) -> &'static str {
    match method {
        Method::LeastConnections => "least-connections",
        Method::RoundRobin => "round-robin",
    }
}
