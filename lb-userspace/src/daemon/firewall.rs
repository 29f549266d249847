//! Policies while the daemon runs: events to the log, questions about them answered.

use std::{collections::HashMap, fs::File, path::PathBuf, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use lb_common::{
    access::{Action, Event},
    reason::DropReason,
};
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
    time::{ClockId, clock_gettime},
};
use tokio::time::{MissedTickBehavior, interval};

use super::running::Shared;
use crate::{
    admin::{
        Refusal, RefusalKind,
        view::{ExplanationView, PolicyView, RuleView, VerdictView},
    },
    dataplane::{self, Found, KernelPlane, Question},
    model::{Generation, Name},
    telemetry::firewall::FirewallEvent,
};

/// Between two looks at the ring: it holds the events of a second at the highest rate.
const BEAT: Duration = Duration::from_millis(100);

/// Below the state directory: who holds it reads.
const LOCK: &str = "firewall-log.lock";

/// Prints events until another daemon takes over.
///
/// Of two daemons side by side only one reads: each remembers its own place in the ring buffer, so it is opened when the
/// other has let go of the lock, which lies below `state`.
pub(super) async fn log_events(shared: Arc<Shared>, state: PathBuf) {
    let mut beat = interval(BEAT);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let path = state.join(LOCK);
    let lock = File::create(&path)
        .inspect_err(|error| log::warn!("cannot open {}: {error}", path.display()))
        .ok();
    while let Some(lock) = &lock
        && flock(lock, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK)
    {
        beat.tick().await;
        if !shared.plane().is_owner() {
            return;
        }
    }
    let opened = shared.plane().events();
    let mut ring = match opened {
        Ok(ring) => ring,
        Err(error) => {
            log::error!("no firewall log: {error:#}");
            return;
        }
    };
    loop {
        beat.tick().await;
        let (rules, owner) = {
            let plane = shared.plane();
            (plane.rule_names(), plane.is_owner())
        };
        if !owner {
            return;
        }
        let names = Names {
            rules,
            servers: shared
                .running()
                .numbers
                .virtual_servers
                .iter()
                .map(|(name, number)| (*number, name.clone()))
                .collect(),
            boot: boot(),
        };
        while let Some(item) = ring.next() {
            if let Some(event) = dataplane::event(&item) {
                shared.lines.say(names.line(&event));
            }
        }
    }
}

/// What the numbers of events stand for.
struct Names {
    rules: HashMap<u16, (Name, Name)>,
    servers: HashMap<u16, Name>,
    /// When the programs' clock began.
    boot: Timestamp,
}

impl Names {
    fn line(&self, event: &Event) -> FirewallEvent {
        let action = Action::from_u8(event.action);
        let word = match (event.kind, action) {
            (Event::STAGED, Action::Accept) => "would-accept",
            (Event::STAGED, Action::Drop) => "would-drop",
            (Event::STAGED, _) => "would-reject",
            (_, action) => action.word(),
        };
        let reason = match (event.kind, action) {
            (Event::LIMITED, _) => Some(DropReason::RateLimited),
            (Event::STAGED, _) | (_, Action::Accept) => None,
            (_, Action::Drop) => Some(DropReason::PolicyDrop),
            (_, Action::RejectIcmp) => Some(DropReason::PolicyReject),
            (_, Action::RejectRst) => Some(DropReason::PolicyReset),
        };
        let since = SignedDuration::from_nanos(event.time.cast_signed());
        FirewallEvent {
            date_time: self.boot.checked_add(since).unwrap_or(self.boot),
            action: word,
            drop_reason: reason.map(DropReason::word),
            source: event.source.to_socket_addr(event.sport),
            destination: event.destination.to_socket_addr(event.dport),
            rule: self.rules.get(&event.rule).cloned(),
            virtual_server: self
                .servers
                .get(&event.virtual_server)
                .cloned()
                .unwrap_or_else(|| format!("#{}", event.virtual_server).into()),
            interface: event.interface,
            vlan: event.vlan,
        }
    }
}

/// When the monotonic clock began.
fn boot() -> Timestamp {
    let since = clock_gettime(ClockId::Monotonic);
    let since = Duration::new(
        since.tv_sec.unsigned_abs(),
        since.tv_nsec.unsigned_abs() as u32,
    );
    let now = Timestamp::now();
    SignedDuration::try_from(since)
        .ok()
        .and_then(|since| now.checked_sub(since).ok())
        .unwrap_or(now)
}

/// `show policy`.
pub(super) fn policies(generation: &Generation, plane: &KernelPlane) -> Vec<PolicyView> {
    let counts = plane.rule_counts();
    let bound = |to: &Name, staged: bool| {
        let network = [("network", &generation.network.guard)];
        let servers = generation.virtual_servers.iter();
        let servers = servers.map(|server| (&*server.name, &server.guard));
        network
            .into_iter()
            .chain(servers)
            .filter(|(_, guard)| match staged {
                true => guard.staged.as_ref() == Some(to),
                false => guard.policy.as_ref() == Some(to),
            })
            .map(|(name, _)| name.to_owned())
            .collect()
    };
    let view = |policy: &Arc<crate::model::Policy>| {
        let rules = counts.iter().filter(|count| count.policy == policy.name);
        let rules = rules.map(|count| {
            let rule = policy.rules.iter().find(|rule| rule.name == count.rule);
            RuleView {
                name: count.rule.to_string(),
                enabled: rule.is_none_or(|rule| rule.enabled),
                action: rule
                    .map_or(policy.default, |rule| rule.action)
                    .word()
                    .to_owned(),
                ranges: rule.map_or(1, |rule| rule.source.len() as u64),
                vlans: rule.map_or_else(Vec::new, |rule| rule.vlans.clone()),
                interfaces: rule.map_or_else(Vec::new, |rule| rule.interfaces.clone()),
                in_time: count.in_time,
                log: rule.map_or(policy.log, |rule| rule.log),
                hits: count.hits[0],
                staged_hits: count.hits[1],
            }
        });
        PolicyView {
            name: policy.name.to_string(),
            enforced_by: bound(&policy.name, false),
            staged_by: bound(&policy.name, true),
            rules: rules.collect(),
        }
    };
    generation.policies.values().map(view).collect()
}

/// `explain`.
///
/// # Errors
///
/// In words for the user.
pub(super) fn explain(
    shared: &Shared,
    question: &crate::admin::view::Question,
) -> Result<ExplanationView, Refusal> {
    let running = shared.running();
    let generation = &running.generation;
    let first = generation.network.client_interfaces.first();
    let interface = question.interface.as_ref().or(first);
    let interface =
        interface.ok_or_else(|| Refusal::unknown("no client interface is configured; name one"))?;
    let asked = Question {
        from: question.from,
        to: question.to,
        interface: interface.clone(),
        vlan: question.vlan,
    };
    if asked.from.is_ipv4() != asked.to.is_ipv4() {
        return Err(Refusal::new(
            RefusalKind::Request,
            "the two addresses are of different families",
        ));
    }
    if !dataplane::has_interface(&asked.interface) {
        return Err(Refusal::unknown(format!(
            "there is no interface {}",
            asked.interface
        )));
    }
    let table = shared.plane().flow_table();
    let found = match Found::open(table, &asked) {
        Some(open) => Ok(open),
        None => shared.plane().explain(&asked),
    };
    let found = found.map_err(|error| Refusal::failed(format!("{error:#}")))?;
    let numbers = &running.numbers;
    let server = generation.virtual_servers.iter().find(|server| {
        found.virtual_server != 0 && numbers.virtual_servers[&server.name] == found.virtual_server
    });
    let member = running.pools.iter().find_map(|(pool, live)| {
        let members = live.members().iter();
        let member = members
            .clone()
            .find(|member| found.member != 0 && member.id == found.member)?;
        Some((format!("{pool}/{}", member.name), member.address))
    });
    let verdicts = found.rules.iter().enumerate().filter_map(|(place, rule)| {
        let (policy, rule, action) = rule.as_ref()?;
        Some(VerdictView {
            policy: policy.to_string(),
            rule: rule.to_string(),
            action: action.word().to_owned(),
            staged: place >= 2,
        })
    });
    let verdict = match (server, found.refused) {
        (None, _) => "no-virtual-server",
        (_, Some(_)) => "refused",
        _ => "carried",
    };
    Ok(ExplanationView {
        from: question.from,
        to: question.to,
        interface: asked.interface,
        vlan: question.vlan,
        verdict: verdict.to_owned(),
        reason: found.refused.map(|reason| reason.word().to_owned()),
        virtual_server: server.map(|server| server.name.to_string()),
        forward: server.map(|server| super::answers::forward_word(&server.forward).to_owned()),
        rules: verdicts.collect(),
        pool: server.map(|server| server.pool.to_string()),
        member: member.as_ref().map(|member| member.0.clone()),
        member_address: member.map(|member| member.1),
        snat: found.snat.map(|source| source.ip()),
        snat_port: found.snat.map(|source| source.port()),
        flow: found.flow.map(|phase| phase.word().to_owned()),
    })
}
