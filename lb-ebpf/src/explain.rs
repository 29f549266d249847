//! What would become of a connection: the path of [`crate::open`] that changes nothing.

use lb_common::{
    access::{Action, Explanation, Guard, SourceKey},
    addr::Addr,
    layout::POOL_MEMBERS,
    reason::DropReason,
    service::{Config, Service},
};

use crate::{
    Frame, Tables,
    access::{ACCEPTED, Knock, guard, reason},
    odd::check_vlan,
    opaque,
    parse::Deep,
    service,
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
    let mut room = Deep::default();
    if let Ok(Some(deep)) = frame.deep(&mut room)
        && let Some(config) = tables.config()
        && let Some(service) =
            service::find(tables, config, &deep.packet.key.dst, deep.packet.key.dport)
        // What is left of one that was removed takes nothing new.
        && service.forward != Service::GONE
    {
        // The record of the parser lies in a map, the frame is free again.
        let knock = Knock::new(frame, deep, service.virtual_server);
        look(tables, config, &knock, deep.link.vlan, service, &mut found);
    }
    tables.explain(&found);
}

#[inline(always)]
fn look<T: Tables>(
    tables: &T,
    config: &Config,
    knock: &Knock,
    vlan: u32,
    service: &Service,
    found: &mut Explanation,
) {
    found.virtual_server = u32::from(service.virtual_server);
    found.outcome = match service.forward {
        Service::PASSTHROUGH => Explanation::PASSTHROUGH,
        _ => Explanation::PROXY,
    };
    if let Err(reason) = check_vlan(tables, vlan) {
        refuse(found, reason);
        return;
    }
    if let Some(guard) = guard(tables, config, service.virtual_server)
        && let Err(reason) = judge(tables, guard, knock, found)
    {
        refuse(found, reason);
        return;
    }
    let chosen = tables.peek(service.pool);
    found.member = chosen & 0xffff;
    if found.member == 0 {
        refuse(found, DropReason::NoMember);
    } else if service.forward == Service::PASSTHROUGH && service.snat != Service::SNAT_NONE {
        // Of a SNAT pool the first: the daemon knows whose turn it is, and which ports are free.
        let pair = tables
            .pool(service.pool)
            .map(|pool| pool.sources[opaque::index::<POOL_MEMBERS>(u64::from(chosen >> 16))])
            .and_then(|source| tables.source(u32::from(source)))
            .filter(|source| source.count != 0)
            .and_then(|source| tables.pair(u32::from(source.pairs[0])));
        match pair {
            Some(pair) => found.snat = pair.source,
            None => refuse(found, DropReason::NoSnatAddress),
        }
    }
}

fn refuse(found: &mut Explanation, reason: DropReason) {
    found.outcome = Explanation::REFUSED;
    found.reason = reason as u32;
}

/// As [`crate::access::judge`], but nothing is counted and nobody is told.
#[inline(always)]
fn judge<T: Tables>(
    tables: &T,
    guard: &Guard,
    knock: &Knock,
    found: &mut Explanation,
) -> Result<(), DropReason> {
    tables.hold(knock);
    let mut action = ask(tables, guard.enforced[0], knock, &mut found.rules[0]);
    if action == ACCEPTED {
        action = ask(tables, guard.enforced[1], knock, &mut found.rules[1]);
    }
    if ask(tables, guard.staged[0], knock, &mut found.rules[2]) == ACCEPTED {
        ask(tables, guard.staged[1], knock, &mut found.rules[3]);
    }
    if action != ACCEPTED {
        return Err(reason(action as u8));
    }
    let source = SourceKey::new(&knock.arrival.source, knock.virtual_server);
    if guard.interval != 0 && !tables.within_rate(&source, guard.interval, guard.ahead, false) {
        found.within_rate = 0;
        return Err(DropReason::RateLimited);
    }
    Ok(())
}

/// What one policy says, and by which rule.
#[inline(always)]
fn ask<T: Tables>(tables: &T, policy: u32, knock: &Knock, rule: &mut u32) -> u32 {
    if policy == 0 {
        return ACCEPTED;
    }
    *rule = tables.match_rule(policy, knock);
    let found = tables.rule(*rule);
    found.map_or(Action::Drop as u32, |rule| u32::from(rule.action))
}
