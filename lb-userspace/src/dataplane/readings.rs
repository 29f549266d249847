//! What the kernel plane has counted, and what it holds.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use anyhow::Result;
use lb_common::reason::DropReason;

use super::{FlowEnds, KernelPlane, PairUsage};

impl KernelPlane {
    /// Opens the ring buffer of ended flows. Only one process may read it at a time.
    ///
    /// # Errors
    ///
    /// When it cannot be mapped.
    pub fn flow_ends(&self) -> Result<FlowEnds> {
        FlowEnds::open(&self.pins)
    }

    /// Ends of flows that found the ring buffer full, ever.
    pub fn flow_ends_lost(&self) -> u64 {
        self.lost.get(&0, 0).map_or(0, |cpus| cpus.iter().sum())
    }

    /// SNAT ports in use, by address and member.
    pub fn ports(&self) -> Vec<PairUsage> {
        self.tables.usage()
    }

    /// How many connections were refused for want of ports or records since this was last asked, by reason.
    pub fn exhausted(&mut self) -> Vec<(DropReason, u64)> {
        let mut found = Vec::new();
        for (reason, count) in self.tables.drops() {
            let seen = match reason {
                DropReason::PortsExhausted => &mut self.exhausted[0],
                DropReason::FlowTableFull => &mut self.exhausted[1],
                _ => continue,
            };
            let before = std::mem::replace(seen, count);
            if count > before {
                found.push((reason, count - before));
            }
        }
        found
    }

    /// SNAT addresses that connections use.
    pub fn snat_addresses_in_use(&self) -> BTreeSet<IpAddr> {
        let used = self.ports().into_iter().filter(|usage| usage.used > 0);
        used.filter_map(|usage| usage.source).collect()
    }

    /// Chunks of flow records that belong to an address and member, and all of them.
    pub fn chunks(&self) -> (u64, u64) {
        self.tables.pairs.chunks()
    }

    /// Half-open flows.
    pub fn embryonic(&self) -> u32 {
        self.tables.embryonic()
    }

    /// How many flows fit.
    pub fn flows_max(&self) -> u64 {
        self.tables.flows_max()
    }

    /// What was not carried, by reason.
    pub fn drops(&self) -> BTreeMap<String, u64> {
        self.tables
            .drops()
            .into_iter()
            .map(|(reason, count)| (reason.word().to_owned(), count))
            .collect()
    }
}
