//! The daemon's answers to the admin API.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    sync::atomic::Ordering::Relaxed,
    time::Duration,
};

use lb_common::{access::Spending, stats::TrafficCell, tcp};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::{mpsc::error::TrySendError, oneshot};

use super::{
    certificates,
    ending::seconds_until,
    firewall,
    orders::Order,
    roster,
    running::{Running, Shared, lock},
};
use crate::{
    admin::{
        FlowPage, MemberOrder, Refusal, RefusalKind, Source,
        query::{FlowQuery, PAGE},
        view::{
            CertificateView, ConfigView, ExplanationView, FlowView, KernelView, MemberView,
            PolicyView, PoolView, PortsView, Question, ReloadView, SessionView, Stats, Status,
            Traffic, VirtualServerView,
        },
    },
    dataplane::{FlowSnapshot, FlowTable, KernelPlane},
    model::{ClientTls, Forward, Method, Mode, Name, StartTls, show},
    pool::{Admin, LiveMember, LivePool},
    proxy::Proxy,
};

/// Records that are looked at for one answer; beyond, the next portion goes on.
const LOOKS: u32 = 1 << 20;

impl Shared {
    fn member_views(
        &self,
        running: &Running,
        name: &Name,
        pool: &LivePool,
        carried: &Carried,
    ) -> Vec<MemberView> {
        let members = pool.members().iter();
        members
            .map(|member| self.member_view(running, name, member, carried))
            .collect()
    }

    fn member_view(
        &self,
        running: &Running,
        pool: &Name,
        member: &LiveMember,
        carried: &Carried,
    ) -> MemberView {
        let configured = running.generation.pools.get(pool);
        let monitored = configured.is_some_and(|pool| pool.monitor.is_some());
        let found = lock(&self.health).get(&member.id).cloned();
        let found = found.filter(|_| monitored);
        let entry = lock(&self.roster).get(pool, &member.name);
        let state = state_word(member, monitored && found.is_none());
        let since = || {
            let since = found.as_ref().map_or(self.started, |found| found.since);
            since.elapsed().as_secs()
        };
        let kernel = kernel_traffic(member.counters(), carried.members.get(&member.id));
        let proxy = proxy_traffic(member.counters());
        MemberView {
            pool: pool.to_string(),
            name: member.name.to_string(),
            address: member.address,
            state: state.to_owned(),
            state_s: match state {
                "maint" | "drain" => roster::now().saturating_sub(entry.since),
                _ => since(),
            },
            admin: entry.admin.word().to_owned(),
            deadline_s: entry.deadline.map(seconds_until),
            reason: found.map(|found| found.reason),
            traffic: sum(kernel, proxy),
            kernel,
            proxy,
        }
    }

    fn virtual_server_views(
        running: &Running,
        plane: &KernelPlane,
        carried: &Carried,
    ) -> Vec<VirtualServerView> {
        let view = |server: &Arc<crate::model::VirtualServer>| {
            let number = running.numbers.virtual_servers[&server.name];
            let cell = plane.service_cell(number);
            let up = running.pools[&server.pool]
                .members()
                .iter()
                .any(|member| member.takes_new());
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
        let servers = running.generation.virtual_servers.iter();
        servers.map(view).collect()
    }

    /// The plane is not held while flows are read: there may be millions.
    fn flow_table(&self) -> FlowTable {
        self.plane().flow_table()
    }

    /// Has the main task do something, and waits for its answer.
    fn order<T>(
        &self,
        order: impl FnOnce(oneshot::Sender<Result<T, Refusal>>) -> Order,
    ) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.orders.try_send(order(reply)).map_err(|error| {
            Refusal::new(
                RefusalKind::Temporary,
                match error {
                    TrySendError::Full(_) => "too much is asked at once; try again",
                    TrySendError::Closed(_) => "the daemon is ending",
                },
            )
        })?;
        answer
            .blocking_recv()
            .unwrap_or_else(|_| Err(Refusal::failed("the daemon is ending")))
    }
}

/// One word for the operator's will and the monitor's findings. In maintenance nobody probes; a member that is down
/// takes nothing whether it is drained or not.
fn state_word(member: &LiveMember, unknown: bool) -> &'static str {
    match (member.admin(), member.is_up()) {
        (Admin::Maint, _) => "maint",
        (_, false) if unknown => "checking",
        (_, false) => "down",
        (Admin::Drain, true) => "drain",
        (Admin::Ready, true) => "up",
    }
}

impl Source for Shared {
    fn status(&self) -> Status {
        let running = self.running();
        let carried = Carried::by(self.flow_table().all());
        let plane = self.plane();
        let workers = super::start::workers(self);
        let pools = running.pools.iter().map(|(name, pool)| PoolView {
            name: name.to_string(),
            method: method_word(running.generation.pools[name].method).to_owned(),
            monitor: running.generation.pools[name]
                .monitor
                .as_ref()
                .map(ToString::to_string),
            members: self.member_views(&running, name, pool, &carried),
        });
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            generation: u64::from(plane.generation()),
            mode: match running.generation.mode {
                Mode::Mixed => "mixed",
                Mode::PassthroughOnly => "passthrough-only",
            }
            .to_owned(),
            uptime_s: self.started.elapsed().as_secs(),
            kernel: KernelView {
                attachments: plane.attachments().to_vec(),
                flows: carried.flows,
                flows_max: plane.flows_max(),
                degraded: plane.degraded(),
            },
            workers,
            virtual_servers: Self::virtual_server_views(&running, &plane, &carried),
            pools: pools.collect(),
        }
    }

    fn flows(&self, query: &FlowQuery) -> Result<FlowPage, Refusal> {
        let running = self.running();
        let wanted = Wanted::by(query, &running)?;
        let names = virtual_server_names(&running);
        let now = now_tick();
        let limit = query.limit.unwrap_or(PAGE).min(PAGE) as usize;
        let table = self.flow_table();
        let end = query.after.saturating_add(LOOKS);
        let mut page = FlowPage::default();
        let mut chosen = table
            .range(query.after..end)
            .filter(|flow| wanted.takes(flow));
        for flow in chosen.by_ref().take(limit) {
            page.next = Some(flow.slot + 1);
            page.flows.push(flow_view(&flow, &names, now));
        }
        if page.flows.len() < limit {
            page.next = Some(end);
        }
        page.next = page.next.filter(|next| *next < table.used());
        Ok(page)
    }

    fn count_flows(&self, query: &FlowQuery) -> Result<u64, Refusal> {
        let wanted = Wanted::by(query, &self.running())?;
        let flows = self.flow_table().range(query.after..u32::MAX);
        Ok(flows.filter(|flow| wanted.takes(flow)).count() as u64)
    }

    fn config(&self) -> ConfigView {
        let generation = u64::from(self.plane().generation());
        ConfigView {
            generation,
            text: show::text(&self.running().generation),
        }
    }

    fn reload(&self, dry_run: bool) -> Result<ReloadView, Refusal> {
        self.order(|reply| Order::Reload { dry_run, reply })
    }

    fn set_member(&self, order: &MemberOrder) -> Result<MemberView, Refusal> {
        self.order(|reply| Order::Member {
            pool: order.pool.clone(),
            member: order.member.clone(),
            admin: order.admin,
            deadline: order.deadline,
            reply,
        })?;
        let running = self.running();
        let name = running.pools.get_key_value(order.pool.as_str());
        let member = running.member(&order.pool, &order.member);
        let (Some((pool, _)), Some(member)) = (name, member) else {
            return Err(Refusal::unknown("the member has just been removed"));
        };
        let carried = Carried::by(self.flow_table().all());
        Ok(self.member_view(&running, pool, member, &carried))
    }

    fn sessions(&self) -> Vec<SessionView> {
        lock(&self.proxy)
            .as_ref()
            .map_or_else(Vec::new, Proxy::sessions)
    }

    fn stats(&self) -> Stats {
        let running = self.running();
        let carried = Carried::by(self.flow_table().all());
        let plane = self.plane();
        let virtual_servers = Self::virtual_server_views(&running, &plane, &carried)
            .into_iter()
            .map(|view| (view.name, view.traffic));
        let members = running.pools.iter().flat_map(|(name, pool)| {
            self.member_views(&running, name, pool, &carried)
                .into_iter()
                .map(|view| (format!("{}/{}", view.pool, view.name), view.traffic))
        });
        let proxy = lock(&self.proxy);
        let mut events = proxy.as_ref().map_or_else(BTreeMap::new, Proxy::events);
        let suppressed = plane.refused(Spending::Events);
        events.insert("firewall-events-suppressed".to_owned(), suppressed);
        events.insert("lines-left-out".to_owned(), self.lines.left_out());
        Stats {
            drops: plane.drops(),
            events,
            virtual_servers: virtual_servers.collect(),
            members: members.collect(),
            flow_records: flow_records(&plane),
            snat_ports: snat_ports(&plane),
        }
    }

    fn policies(&self) -> Vec<PolicyView> {
        firewall::policies(&self.running().generation, &self.plane())
    }

    fn certificates(&self) -> Vec<CertificateView> {
        certificates::views(&self.running())
    }

    fn explain(&self, question: &Question) -> Result<ExplanationView, Refusal> {
        firewall::explain(self, question)
    }
}

/// What live flows have carried so far, by owner; ended ones are in the cells already.
#[derive(Default)]
struct Carried {
    /// How many there are.
    flows: u64,
    members: HashMap<u16, Traffic>,
    virtual_servers: HashMap<u16, Traffic>,
}

impl Carried {
    fn by(flows: impl Iterator<Item = FlowSnapshot>) -> Self {
        let mut carried = Self::default();
        for flow in flows {
            carried.flows += 1;
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

/// Which flows a query chooses, in numbers.
struct Wanted {
    virtual_server: Option<u16>,
    member: Option<u16>,
    client: Option<crate::admin::query::Net>,
    phase: Option<tcp::Phase>,
}

impl Wanted {
    fn by(query: &FlowQuery, running: &Running) -> Result<Self, Refusal> {
        let servers = &running.numbers.virtual_servers;
        let virtual_server = query.virtual_server.as_deref().map(|name| {
            servers.get(name).copied().ok_or_else(|| {
                unknown(
                    "virtual server",
                    name,
                    servers.keys().map(ToString::to_string),
                )
            })
        });
        let member = query.member.as_deref().map(|name| {
            let found = name
                .split_once('/')
                .and_then(|(pool, member)| running.member(pool, member));
            let known = running
                .members()
                .map(|(pool, member)| format!("{pool}/{}", member.name));
            found
                .map(|member| member.id)
                .ok_or_else(|| unknown("member", name, known))
        });
        let phase = query.phase.as_deref().map(|word| {
            let phases = || (1..=6).map(tcp::Phase::from_u32);
            phases().find(|phase| phase.word() == word).ok_or_else(|| {
                unknown("phase", word, phases().map(|phase| phase.word().to_owned()))
            })
        });
        Ok(Self {
            virtual_server: virtual_server.transpose()?,
            member: member.transpose()?,
            client: query.client,
            phase: phase.transpose()?,
        })
    }

    fn takes(&self, flow: &FlowSnapshot) -> bool {
        let client = || flow.route.client().0.to_ip();
        self.virtual_server
            .is_none_or(|number| flow.virtual_server == number)
            && self.member.is_none_or(|number| flow.member == number)
            && self.phase.is_none_or(|phase| flow.phase == phase)
            && self.client.is_none_or(|net| net.contains(client()))
    }
}

fn unknown(kind: &str, name: &str, known: impl Iterator<Item = String>) -> Refusal {
    let mut known: Vec<_> = known.collect();
    known.sort();
    let known = match known.is_empty() {
        true => "none".to_owned(),
        false => known.join(", "),
    };
    Refusal::unknown(format!(
        "no {kind} is named \"{name}\"\n  The daemon knows: {known}."
    ))
}

fn virtual_server_names(running: &Running) -> HashMap<u16, String> {
    let numbers = running.numbers.virtual_servers.iter();
    numbers
        .map(|(name, number)| (*number, name.to_string()))
        .collect()
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
pub(super) fn now_tick() -> u32 {
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
    let Forward::Proxy { client_tls, .. } = forward else {
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

fn flow_records(plane: &KernelPlane) -> BTreeMap<String, u64> {
    let (bound, all) = plane.chunks();
    [
        ("half-open", u64::from(plane.embryonic())),
        ("chunks", bound),
        ("chunks-max", all),
    ]
    .map(|(name, count)| (name.to_owned(), count))
    .into()
}

fn snat_ports(plane: &KernelPlane) -> BTreeMap<String, PortsView> {
    let usage = plane.ports().into_iter().filter_map(|usage| {
        let view = PortsView {
            used: usage.used,
            resting: usage.resting,
            usable: usage.usable,
        };
        Some((format!("{} > {}", usage.source?, usage.member?), view))
    });
    usage.collect()
}
