//! What a packet's addresses say: a virtual server, or a pair whose member answers.

use core::sync::atomic::Ordering::Relaxed;

use lb_common::{
    addr::Addr,
    flow::FlowKey,
    index::{BY_KEY, SERVICE_WAYS, ServiceEntry, pair_bucket, service_bucket},
    pair::{PLACES, slot},
    service::{Config, PrefixKey, Service},
    tcp::{Direction, Phase},
};

use crate::{
    Tables, index,
    opaque::{self, opaque},
};

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
        if same(entry, address, port) {
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

/// One chain of differences: the verifier would follow every branch of a comparison.
#[inline(always)]
fn same(entry: &ServiceEntry, address: &Addr, port: u16) -> bool {
    let mut different = u32::from(entry.port ^ port);
    for word in 0..4 {
        different |= entry.address.0[word] ^ address.0[word];
    }
    opaque(u64::from(different)) == 0
}

/// The slot of the flow that a member's packet belongs to, 0 for none; or true where only the flow's own key can tell.
#[inline(always)]
pub(crate) fn reply<T: Tables>(tables: &T, config: &Config, key: &FlowKey) -> (u32, bool) {
    let number = pair(tables, config, &key.dst, key);
    if number != 0 {
        let slot = of_pair(tables, number, key);
        if slot != 0 || config.by_key == 0 {
            return (slot, false);
        }
    }
    let by_key = config.by_key != 0 && pair(tables, config, &Addr::UNSET, key) == BY_KEY;
    (0, by_key)
}

/// The pair of a SNAT address and the member that a packet comes from; 0 for none.
#[inline(always)]
fn pair<T: Tables>(tables: &T, config: &Config, source: &Addr, key: &FlowKey) -> u32 {
    let (bucket, tag) = pair_bucket(config.seed(), config.epoch, source, &key.src, key.sport);
    let Some(bucket) = tables.pair_bucket(bucket) else {
        return 0;
    };
    // Nearly every bucket that a packet of others leads to is empty.
    if bucket.entries[0].load(Relaxed) == 0 {
        return 0;
    }
    match index::equal(bucket, 16, tag) {
        0 => 0,
        found => index::entry(bucket, found) & 0xffff,
    }
}

/// The slot of a port of a pair; 0 where the packet is none of its flow.
#[inline(always)]
fn of_pair<T: Tables>(tables: &T, number: u32, key: &FlowKey) -> u32 {
    let Some(pair) = tables.pair(number) else {
        return 0;
    };
    let port = u16::from_be(key.dport);
    let chunk = pair.chunks[opaque::index::<PLACES>(u64::from(port / 64))].load(Relaxed);
    let slot = slot(chunk, port);
    let Some(flow) = tables.flow(slot) else {
        return 0;
    };
    if !Phase::is_live(flow.phase.load(Relaxed))
        || !index::matches(&flow.route, Direction::Reverse, key)
    {
        return 0;
    }
    slot
}
