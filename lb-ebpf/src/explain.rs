//! What would become of a connection: the path of [`crate::open`] that changes nothing.

use lb_common::{
    access::{self, Action, Event, Explanation, Guard, SourceKey},
    addr::Addr,
    reason::DropReason,
    service::{Config, Service},
};

use crate::{
    Frame, Packet, Tables,
    access::{Knock, guard},
    parse, service,
};

/// Looks at a SYN that nobody sent, and writes down what would become of it.
#[inline(always)]
pub fn explain<F: Frame, T: Tables>(frame: &mut F, tables: &T) {
    let mut found = Explanation {
        outcome: Explanation::NOTHING,
        reason: 0,
        rules: [0; 4],
        virtual_server: 0,
        member: 0,
        snat: Addr::UNSET,
        port: 0,
        within_rate: 1,
        slot: 0,
        pad: 0,
    };
    if let Ok(Some(packet)) = parse::packet(frame)
        && let Some(config) = tables.config()
        && let Some(service) = service::find(tables, config, &packet.key.dst, packet.key.dport)
    {
        look(frame, tables, config, &packet, service, &mut found);
    }
    tables.explain(&found);
}

#[inline(always)]
fn look<F: Frame, T: Tables>(
    frame: &F,
    tables: &T,
    config: &Config,
    packet: &Packet,
    service: &Service,
    found: &mut Explanation,
) {
    found.virtual_server = u32::from(service.virtual_server);
    found.outcome = match service.forward {
        Service::PASSTHROUGH => Explanation::PASSTHROUGH,
        _ => Explanation::PROXY,
    };
    if let Some(guard) = guard(tables, config, service.virtual_server) {
        let knock = Knock::new(frame, packet, service.virtual_server);
        if let Err(reason) = judge(tables, guard, &knock, found) {
            refuse(found, reason);
            return;
        }
    }
    found.member = tables.peek(service.pool);
    if found.member == 0 {
        refuse(found, DropReason::NoMember);
    } else if service.forward == Service::PASSTHROUGH && service.snat != Service::SNAT_NONE {
        found.snat = tables
            .member(found.member)
            .map_or(Addr::UNSET, |member| member.automap);
        if found.snat == Addr::UNSET {
            refuse(found, DropReason::NoSnatAddress);
        }
    }
}

fn refuse(found: &mut Explanation, reason: DropReason) {
    found.outcome = Explanation::REFUSED;
    found.reason = reason as u32;
}

/// As [`crate::access::judge`], but nothing is counted and nobody is told.
#[inline(never)]
fn judge<T: Tables>(
    tables: &T,
    guard: &Guard,
    knock: &Knock<'_>,
    found: &mut Explanation,
) -> Result<(), DropReason> {
    let mut reason = None;
    let policies = [
        (guard.enforced[0], Event::ENFORCED),
        (guard.enforced[1], Event::ENFORCED),
        (guard.staged[0], Event::STAGED),
        (guard.staged[1], Event::STAGED),
    ];
    let mut asked = [true; 2];
    for (place, (policy, kind)) in policies.into_iter().enumerate() {
        let kind = usize::from(kind) & 1;
        if policy == 0 || !asked[kind] {
            continue;
        }
        let rule = access::matching(tables, policy, &knock.arrival).unwrap_or(0);
        found.rules[place & 3] = rule;
        let action = tables
            .rule(rule)
            .map_or(Action::Drop as u8, |rule| rule.action);
        let action = Action::from_u8(action);
        asked[kind] = action == Action::Accept;
        if place < 2 {
            reason = match action {
                Action::Accept => None,
                Action::Drop => Some(DropReason::PolicyDrop),
                Action::RejectIcmp | Action::RejectRst => Some(DropReason::PolicyReject),
            };
        }
    }
    if let Some(reason) = reason {
        return Err(reason);
    }
    let source = SourceKey::new(&knock.arrival.source, knock.virtual_server);
    if guard.interval != 0 && !tables.within_rate(&source, guard.interval, guard.ahead, false) {
        found.within_rate = 0;
        return Err(DropReason::RateLimited);
    }
    Ok(())
}
