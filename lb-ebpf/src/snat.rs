//! What the member takes for the client, and the key that leads its replies back.

use lb_common::{
    addr::Addr,
    flow::{FlowKey, Hit},
    reason::DropReason,
    service::Service,
    tcp::Direction,
};

use crate::{Packet, Tables};

/// How many ports are tried before a new flow is refused.
const TRIES: u32 = 32;
/// Distance between tried ports: a prime, so that the tries of one flow differ and those of its neighbours do too.
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
#[inline(always)]
pub(crate) fn port<T: Tables>(tables: &T, number: u32, slot: u32) -> u32 {
    let (Some(config), Some(member)) = (tables.config(), tables.member(number)) else {
        return 0;
    };
    let mut reply = FlowKey {
        src: member.address,
        dst: member.automap,
        sport: member.port,
        dport: 0,
    };
    let mut offset = tables.random();
    for _ in 0..TRIES {
        offset = offset
            .checked_rem(u32::from(config.port_count))
            .unwrap_or(0);
        reply.dport = config.port_low.wrapping_add(offset as u16).to_be();
        if tables.insert(&reply, Hit::new(slot, Direction::Reverse)) {
            return u32::from(reply.dport);
        }
        offset += STRIDE;
    }
    0
}
