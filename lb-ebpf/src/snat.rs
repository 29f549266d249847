//! What the member takes for the client, and the key that leads its replies back.

use lb_common::{
    addr::Addr,
    flow::{FlowKey, Hit},
    reason::DropReason,
    service::Service,
    tcp::Direction,
};

use crate::{Packet, Tables, atomic};

/// How many ports are tried before a new flow is refused.
const TRIES: u32 = 32;
/// Distance between ports in turn: a prime, so that the turns go through the whole range, and in no obvious order.
const STRIDE: u32 = 7919;

/// Chooses the source towards the member, inserts the key of its replies, and notes in the record what packets of both
/// directions will say.
#[inline(always)]
pub(crate) fn bind<T: Tables>(
    tables: &T,
    service: &Service,
    packet: &Packet,
    number: u32,
    slot: u32,
) -> Result<FlowKey, DropReason> {
    let member = tables.member(number).ok_or(DropReason::Internal)?;
    let mut reply = FlowKey {
        src: member.address,
        dst: packet.key.src,
        sport: member.port,
        dport: packet.key.sport,
    };
    if service.snat == Service::SNAT_NONE {
        if !tables.insert(&reply, Hit::new(slot, Direction::Reverse)) {
            return Err(DropReason::PortsExhausted);
        }
    } else {
        if member.automap == Addr::UNSET {
            return Err(DropReason::NoSnatAddress);
        }
        let port = tables.bind_port(number, slot);
        if port == 0 {
            return Err(DropReason::PortsExhausted);
        }
        reply.dst = member.automap;
        reply.dport = port as u16;
    }
    tables.write_leave(slot, Direction::Forward, &reply);
    tables.write_leave(slot, Direction::Reverse, &packet.key);
    Ok(reply)
}

/// Finds a port of the box's own address that no flow to this member uses, and inserts the key of the replies to it. The
/// port in network order, or 0 when every try met one in use.
///
/// Ports are taken round the whole range, so that one rests as long as can be: the member may hold its last connection
/// in TIME-WAIT for a minute (RFC 9293 §3.6.1). A port whose flow has expired is taken from it, daemon or not.
#[inline(always)]
pub(crate) fn port<T: Tables>(tables: &T, number: u32, slot: u32) -> u32 {
    let (Some(config), Some(member), Some(allocation)) =
        (tables.config(), tables.member(number), tables.allocation())
    else {
        return 0;
    };
    let mut reply = FlowKey {
        src: member.address,
        dst: member.automap,
        sport: member.port,
        dport: 0,
    };
    let hit = Hit::new(slot, Direction::Reverse);
    let count = u32::from(config.port_count);
    let turn = atomic::draw(&allocation.port);
    for step in 0..TRIES {
        let place = turn.wrapping_add(step).checked_rem(count).unwrap_or(0);
        let offset = (place * STRIDE).checked_rem(count).unwrap_or(0);
        reply.dport = config.port_low.wrapping_add(offset as u16).to_be();
        if tables.insert(&reply, hit) {
            return u32::from(reply.dport);
        }
        if let Some(other) = tables.hit(&reply)
            && tables.reclaim(other.slot())
            && tables.insert(&reply, hit)
        {
            return u32::from(reply.dport);
        }
    }
    0
}
