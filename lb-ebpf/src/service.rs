//! What a packet's addresses say: a virtual server, or a pair whose member answers.

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    addr::Addr,
    flow::FlowKey,
    index::{BY_KEY, SERVICE_WAYS, WAYS, pair_bucket, service_bucket},
    pair::{PLACES, slot},
    service::{Config, PrefixKey, Service},
    tcp::{Direction, Phase},
};

use crate::{Tables, index};

/// The virtual server of an address and port (network order): the one with this very address, else the one with the
/// longest prefix.
#[inline(always)]
pub(crate) fn find<'a, T: Tables>(
    tables: &'a T,
    config: &Config,
    address: &Addr,
    port: u16,
) -> Option<&'a Service> {
    let bucket = service_bucket(config.seed(), config.epoch, address, port);
    let bucket = tables.service_bucket(bucket)?;
    for place in 0..SERVICE_WAYS {
        let entry = &bucket.entries[place];
        if entry.used == 0 {
            break;
        }
        if entry.port == port && entry.address == *address {
            return Some(&entry.service);
        }
    }
    if config.prefixes == 0 {
        return None;
    }
    tables.prefix(&PrefixKey {
        epoch: config.epoch as u16,
        port,
        address: *address,
    })
}

/// The slot of the flow that a member's packet belongs to; 0 for none.
#[inline(always)]
pub(crate) fn reply<T: Tables>(tables: &T, config: &Config, key: &FlowKey) -> u32 {
    let number = pair(tables, config, &key.dst, key);
    if number != 0 {
        return of_pair(tables, number, key);
    }
    if config.by_key != 0 && pair(tables, config, &Addr::UNSET, key) == BY_KEY {
        return index::find(tables, config, key, Direction::Reverse);
    }
    0
}

/// The pair of a SNAT address and the member that a packet comes from; 0 for none.
#[inline(always)]
fn pair<T: Tables>(tables: &T, config: &Config, source: &Addr, key: &FlowKey) -> u32 {
    let (bucket, tag) = pair_bucket(config.seed(), config.epoch, source, &key.src, key.sport);
    let Some(bucket) = tables.pair_bucket(bucket) else {
        return 0;
    };
    for place in 0..WAYS {
        let entry = bucket.entries[place].load(Relaxed);
        if entry == 0 {
            return 0;
        }
        if entry >> 16 == tag {
            return entry & 0xffff;
        }
    }
    0
}

/// The slot of a port of a pair; 0 where the packet is none of its flow.
#[inline(always)]
fn of_pair<T: Tables>(tables: &T, number: u32, key: &FlowKey) -> u32 {
    let Some(pair) = tables.pair(number) else {
        return 0;
    };
    let port = u16::from_be(key.dport);
    let chunk = pair.chunks[port as usize / 64 & (PLACES - 1)].load(Relaxed);
    let slot = slot(chunk, port);
    let Some(flow) = tables.flow(slot) else {
        return 0;
    };
    let phase = flow.phase.load(Relaxed);
    if phase == Phase::Free as u32
        || phase == Phase::Claimed as u32
        || !index::matches(&flow.route, Direction::Reverse, key)
    {
        return 0;
    }
    slot
}
