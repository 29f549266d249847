//! Who may open a connection: policies in force and staged, and the rate of a source. Asked once, for the first packet.

use lb_common::{
    access::{self, Action, Arrival, Event, Guard, SourceKey, Spending},
    flow::FlowKey,
    layout::MAX_VIRTUAL_SERVERS,
    reason::DropReason,
    service::Config,
    vlan::outer,
};

use crate::{Frame, Tables, parse::Deep, tables::Access};

/// A connection that somebody wants to open.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Knock {
    /// Addresses and ports.
    pub(crate) key: FlowKey,
    /// Where it comes in.
    pub(crate) arrival: Arrival,
    /// Number of the virtual server.
    pub(crate) virtual_server: u16,
}

impl Knock {
    /// From a packet and where it was met.
    #[inline(always)]
    pub(crate) fn new<F: Frame>(frame: &F, deep: &Deep, virtual_server: u16) -> Self {
        let key = deep.packet.key;
        let arrival = Arrival {
            source: key.src,
            interface: frame.ingress(),
            vlan: outer(deep.link.vlan) as u16,
        };
        Self {
            key,
            arrival,
            virtual_server,
        }
    }
}

/// What guards a virtual server; `None` when nothing does.
#[inline(always)]
pub(crate) fn guard<'a, T: Tables>(
    tables: &'a T,
    config: &Config,
    virtual_server: u16,
) -> Option<&'a Guard> {
    tables
        .guard(config.epoch * MAX_VIRTUAL_SERVERS + u32::from(virtual_server))
        .filter(|guard| !guard.is_open())
}

/// Lets a connection pass.
///
/// # Errors
///
/// Why it is refused.
#[inline(always)]
pub(crate) fn admit<F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    config: &Config,
    deep: &Deep,
    virtual_server: u16,
) -> Result<(), DropReason> {
    let Some(guard) = guard(tables, config, virtual_server) else {
        return Ok(());
    };
    let knock = Knock::new(frame, deep, virtual_server);
    match judge(tables, guard, &knock) {
        ACCEPTED => Ok(()),
        LIMITED => Err(DropReason::RateLimited),
        action => Err(reason(action as u8)),
    }
}

/// Why an action that refuses does.
#[inline(always)]
pub(crate) const fn reason(action: u8) -> DropReason {
    match Action::from_u8(action) {
        Action::RejectIcmp => DropReason::PolicyReject,
        Action::RejectRst => DropReason::PolicyReset,
        _ => DropReason::PolicyDrop,
    }
}

/// What [`judge`] says beside the actions that refuse.
pub(crate) const ACCEPTED: u32 = Action::Accept as u32;
pub(crate) const LIMITED: u32 = 16;

/// Asks the policies and the rate, counts and reports: [`ACCEPTED`], [`LIMITED`] or an [`Action`] that refuses.
///
/// A function of its own: its event needs stack.
#[inline(never)]
pub(crate) fn judge<T: Tables>(tables: &T, guard: &Guard, knock: &Knock) -> u32 {
    tables.hold(knock);
    let mut action = tables.ask(guard.enforced[0], Event::ENFORCED, knock);
    if action == ACCEPTED {
        action = tables.ask(guard.enforced[1], Event::ENFORCED, knock);
    }
    if tables.ask(guard.staged[0], Event::STAGED, knock) == ACCEPTED {
        tables.ask(guard.staged[1], Event::STAGED, knock);
    }
    if action != ACCEPTED || guard.interval == 0 {
        return action;
    }
    let source = SourceKey::new(&knock.arrival.source, knock.virtual_server);
    if tables.within_rate(&source, guard.interval, guard.ahead, true) {
        return ACCEPTED;
    }
    report(tables, knock, 0, Action::Drop as u8, Event::LIMITED);
    LIMITED
}

/// What one policy says; its rule counts, and reports itself where it is logged.
#[inline(always)]
pub(crate) fn ask<T: Access>(tables: &T, policy: u32, kind: u8, knock: &Knock) -> u32 {
    if policy == 0 {
        return ACCEPTED;
    }
    let found = access::matching(tables, policy, &knock.arrival);
    // A policy that cannot be read is a fault of ours, and lets nobody in.
    let Some(rule) = found.and_then(|index| tables.rule(index)) else {
        tables.count_drop(DropReason::Internal);
        return Action::Drop as u32;
    };
    tables.count_rule(u32::from(rule.number), kind == Event::STAGED);
    if rule.log != 0 {
        report(tables, knock, rule.number, rule.action, kind);
    }
    u32::from(rule.action)
}

/// Tells userspace, as far as this CPU's budget goes.
#[inline(never)]
fn report<T: Access>(tables: &T, knock: &Knock, rule: u16, action: u8, kind: u8) {
    if !tables.spend(Spending::Events) {
        return;
    }
    tables.announce(&Event {
        time: tables.clock(),
        source: knock.key.src,
        destination: knock.key.dst,
        sport: knock.key.sport,
        dport: knock.key.dport,
        rule,
        virtual_server: knock.virtual_server,
        action,
        kind,
        vlan: knock.arrival.vlan,
        interface: knock.arrival.interface,
    });
}
