//! What the member takes for the client, and the key that leads its replies back.

use lb_common::{
    addr::Addr,
    flow::{FlowKey, Hit},
    member::Member,
    reason::DropReason,
    service::{Config, Service},
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
    config: &Config,
    service: &Service,
    packet: &Packet,
    member: &Member,
    slot: u32,
) -> Result<FlowKey, DropReason> {
    let mut reply = FlowKey {
        src: member.address,
        dst: packet.key.src,
        sport: member.port,
        dport: packet.key.sport,
    };
    let hit = Hit::new(slot, Direction::Reverse);
    if service.snat == Service::SNAT_NONE {
        if !tables.insert(&reply, hit) {
            return Err(DropReason::PortsExhausted);
        }
    } else {
        if member.automap == Addr::UNSET {
            return Err(DropReason::NoSnatAddress);
        }
        reply.dst = member.automap;
        let count = u32::from(config.port_count);
        let mut offset = tables.random();
        let mut bound = false;
        for _ in 0..TRIES {
            offset = offset.checked_rem(count).ok_or(DropReason::Internal)?;
            reply.dport = (config.port_low.wrapping_add(offset as u16)).to_be();
            if tables.insert(&reply, hit) {
                bound = true;
                break;
            }
            offset += STRIDE;
        }
        if !bound {
            return Err(DropReason::PortsExhausted);
        }
    }
    tables.write_leave(slot, Direction::Forward, &reply);
    tables.write_leave(slot, Direction::Reverse, &packet.key);
    Ok(reply)
}
