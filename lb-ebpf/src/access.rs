//! Who may open a connection: policies in force and staged, and the rate of a source. Asked once, for the first packet.

use lb_common::{
    access::{self, Action, Arrival, Event, Guard, SourceKey, Spending},
    flow::FlowKey,
    layout::MAX_VIRTUAL_SERVERS,
    reason::DropReason,
    service::Config,
};

use crate::{Egress, Frame, Packet, Tables, Verdict, answer};

/// A connection that somebody wants to open.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Knock<'a> {
    /// Addresses and ports.
    pub(crate) key: &'a FlowKey,
    /// Where it comes in.
    pub(crate) arrival: Arrival,
    /// Number of the virtual server.
    pub(crate) virtual_server: u16,
}

impl<'a> Knock<'a> {
    /// From a packet and where it was met.
    #[inline(always)]
    pub(crate) fn new<F: Frame>(frame: &F, packet: &'a Packet, virtual_server: u16) -> Self {
        let arrival = Arrival {
            source: packet.key.src,
            interface: frame.interface(),
            vlan: vlan(frame, packet),
        };
        Self {
            key: &packet.key,
            arrival,
            virtual_server,
        }
    }
}

/// The outermost VLAN of a packet; 0 without a tag.
#[inline(always)]
fn vlan<F: Frame>(frame: &F, packet: &Packet) -> u16 {
    match frame.vlan() {
        0 if packet.l3 > ETHERNET => {
            u16::from_be(frame.load(ETHERNET).unwrap_or_default()) & VLAN_ID
        }
        vlan => vlan & VLAN_ID,
    }
}

/// Length of an Ethernet header without tags, bytes.
const ETHERNET: usize = 14;
/// The identifier in a tag (IEEE 802.1Q).
const VLAN_ID: u16 = 0x0fff;

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

/// Lets a connection pass, or refuses it: `Ok(None)` when it may go on, else what becomes of its packet.
///
/// # Errors
///
/// Why it is dropped.
#[inline(always)]
pub(crate) fn admit<F: Frame, T: Tables>(
    frame: &mut F,
    tables: &T,
    config: &Config,
    packet: &Packet,
    virtual_server: u16,
    egress: &mut Egress,
) -> Result<Option<Verdict>, DropReason> {
    let Some(guard) = guard(tables, config, virtual_server) else {
        return Ok(None);
    };
    let knock = Knock::new(frame, packet, virtual_server);
    let action = match judge(tables, guard, &knock) {
        ACCEPTED => return Ok(None),
        LIMITED => return Err(DropReason::RateLimited),
        action => Action::from_u8(action as u8),
    };
    if action == Action::Drop {
        return Err(DropReason::PolicyDrop);
    }
    // An answer that cannot be given leaves a connection that is dropped.
    if action == Action::RejectIcmp && !tables.spend(Spending::Answers) {
        return Err(DropReason::PolicyReject);
    }
    answer::reject(frame, packet, action, egress)?;
    tables.count_drop(DropReason::PolicyReject);
    Ok(Some(Verdict::Send))
}

/// What [`judge`] says beside the actions that refuse.
pub(crate) const ACCEPTED: u32 = Action::Accept as u32;
pub(crate) const LIMITED: u32 = 16;

/// Asks the policies and the rate, counts and reports: [`ACCEPTED`], [`LIMITED`] or an [`Action`] that refuses.
///
/// A function of its own: its event needs stack.
#[inline(never)]
pub(crate) fn judge<T: Tables>(tables: &T, guard: &Guard, knock: &Knock<'_>) -> u32 {
    let mut action = ask(tables, guard.enforced[0], Event::ENFORCED, knock);
    if action == ACCEPTED {
        action = ask(tables, guard.enforced[1], Event::ENFORCED, knock);
    }
    if ask(tables, guard.staged[0], Event::STAGED, knock) == ACCEPTED {
        ask(tables, guard.staged[1], Event::STAGED, knock);
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
#[inline(never)]
fn ask<T: Tables>(tables: &T, policy: u32, kind: u8, knock: &Knock<'_>) -> u32 {
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
fn report<T: Tables>(tables: &T, knock: &Knock<'_>, rule: u16, action: u8, kind: u8) {
    if !tables.spend(Spending::Events) {
        return;
    }
    tables.report(&Event {
        time: tables.now(),
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
