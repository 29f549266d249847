//! The tables that lead an address and port to a virtual server: one of very addresses, one of prefixes.

use std::net::IpAddr;

use anyhow::{Context, Result};
use aya::{
    Ebpf,
    maps::{
        Array, MapData,
        lpm_trie::{Key, LpmTrie},
    },
};
use lb_common::{
    addr::Addr,
    index::{SERVICE_BUCKETS, SERVICE_WAYS, ServiceBucket, ServiceEntry, service_bucket},
    service::{PrefixKey, Service},
};

use super::{loader, sys::Record};

/// Bits of a [`PrefixKey`] that always count: epoch and port.
const EXACT_BITS: u32 = 32;

/// Where a virtual server is, and what it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Placed {
    /// Address, prefix length, and port in host order.
    pub at: (IpAddr, u8, u16),
    /// What packets there find.
    pub service: Service,
}

impl Placed {
    fn is_prefix(&self) -> bool {
        let (address, length, _) = self.at;
        length < if address.is_ipv4() { 32 } else { 128 }
    }

    fn entry(&self) -> ServiceEntry {
        ServiceEntry {
            address: self.at.0.into(),
            port: self.at.2.to_be(),
            used: 1,
            service: self.service,
        }
    }

    fn prefix_key(&self, epoch: u32) -> Key<Record<PrefixKey>> {
        let (address, length, port) = self.at;
        let mapped = if address.is_ipv4() { 96 } else { 0 };
        let key = PrefixKey {
            epoch: epoch as u16,
            port: port.to_be(),
            address: address.into(),
        };
        Key::new(EXACT_BITS + mapped + u32::from(length), Record(key))
    }
}

/// Both tables, open.
pub(super) struct Services {
    exact: Array<MapData, Record<ServiceBucket>>,
    prefixes: LpmTrie<MapData, Record<PrefixKey>, Record<Service>>,
}

impl Services {
    /// Takes the tables out of the loaded object.
    ///
    /// # Errors
    ///
    /// When one is missing.
    pub(super) fn open(ebpf: &mut Ebpf) -> Result<Self> {
        Ok(Self {
            exact: loader::map(ebpf, "SERVICES")?.try_into()?,
            prefixes: loader::map(ebpf, "PREFIXES")?.try_into()?,
        })
    }

    /// What an epoch's tables lead to.
    ///
    /// # Errors
    ///
    /// When the kernel refuses to tell.
    pub(super) fn read(&self, epoch: u32) -> Result<Vec<Placed>> {
        let mut found = Vec::new();
        for bucket in 0..SERVICE_BUCKETS {
            let bucket = self.exact.get(&(epoch * SERVICE_BUCKETS + bucket), 0)?.0;
            for entry in bucket.entries.into_iter().filter(|entry| entry.used != 0) {
                let address = entry.address.to_ip();
                let length = if address.is_ipv4() { 32 } else { 128 };
                found.push(Placed {
                    at: (address, length, u16::from_be(entry.port)),
                    service: entry.service,
                });
            }
        }
        for (key, service) in self.prefixes.iter().flatten() {
            let (bits, key) = (key.prefix_len() - EXACT_BITS, key.data().0);
            if u32::from(key.epoch) != epoch {
                continue;
            }
            let address = key.address.to_ip();
            let length = if address.is_ipv4() { bits - 96 } else { bits };
            found.push(Placed {
                at: (address, length as u8, u16::from_be(key.port)),
                service: service.0,
            });
        }
        Ok(found)
    }

    /// Writes an epoch's tables.
    ///
    /// # Errors
    ///
    /// When the kernel refuses a record, or the seed does not fit.
    pub(super) fn write(&mut self, seed: u64, epoch: u32, all: &[Placed]) -> Result<()> {
        let table = arrange(seed, epoch, all).context("no table holds so many virtual servers")?;
        for (at, bucket) in (epoch * SERVICE_BUCKETS..).zip(table) {
            if self.exact.get(&at, 0)?.0 != bucket {
                self.exact.set(at, Record(bucket), 0)?;
            }
        }
        let stale: Vec<_> = self
            .prefixes
            .keys()
            .flatten()
            .filter(|key| u32::from(key.data().0.epoch) == epoch)
            .collect();
        for key in stale {
            self.prefixes.remove(&key)?;
        }
        for placed in all.iter().filter(|placed| placed.is_prefix()) {
            self.prefixes
                .insert(&placed.prefix_key(epoch), Record(placed.service), 0)?;
        }
        Ok(())
    }
}

/// Does every bucket hold what a seed puts into it?
pub(super) fn fits(seed: u64, epoch: u32, all: &[Placed]) -> bool {
    arrange(seed, epoch, all).is_some()
}

/// Is any of them on a prefix?
pub(super) fn any_prefix(all: &[Placed]) -> bool {
    all.iter().any(Placed::is_prefix)
}

/// The table of very addresses; nothing where a bucket overflows.
fn arrange(seed: u64, epoch: u32, all: &[Placed]) -> Option<Vec<ServiceBucket>> {
    let vacant = ServiceEntry {
        address: Addr::UNSET,
        port: 0,
        used: 0,
        service: Service {
            pool: 0,
            virtual_server: 0,
            forward: 0,
            snat: 0,
            flags: 0,
        },
    };
    let empty = ServiceBucket {
        entries: [vacant; SERVICE_WAYS],
    };
    let mut table = vec![empty; SERVICE_BUCKETS as usize];
    for placed in all.iter().filter(|placed| !placed.is_prefix()) {
        let entry = placed.entry();
        let bucket = service_bucket(seed, epoch, &entry.address, entry.port) % SERVICE_BUCKETS;
        let bucket = &mut table[bucket as usize];
        *bucket.entries.iter_mut().find(|other| other.used == 0)? = entry;
    }
    Some(table)
}
