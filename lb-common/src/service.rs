//! Virtual servers and pools as the kernel plane sees them.

use crate::{
    addr::Addr,
    index::HASH_KEYS,
    layout::POOL_MEMBERS,
    map_record,
    tcp::{LIMITS, Limit, Phase, RESET_LIMIT},
};

map_record!(
    /// What is looked up when no virtual server has the very address: the longest prefix of these bits wins. The first
    /// 32 always count.
    PrefixKey {
        /// Which of the generations side by side: 0 or 1.
        epoch: u16,
        /// Port, network order.
        port: u16,
        /// The virtual address.
        address: Addr,
    } size 20 align 4
);

map_record!(
    /// A virtual server.
    Service {
        /// Index of its pool, with the SNAT it is used with, in the pool table; epoch included.
        pool: u32,
        /// Its number, for flows and counters.
        virtual_server: u16,
        /// [`Service::PASSTHROUGH`] or [`Service::PROXY`].
        forward: u8,
        /// [`Service::SNAT_NONE`], [`Service::SNAT_AUTOMAP`] or [`Service::SNAT_POOL`].
        snat: u8,
        /// [`Service::PROXY_HEADER`], or nothing.
        flags: u32,
    } size 12 align 4
);

impl Service {
    /// The kernel plane carries it.
    pub const PASSTHROUGH: u8 = 1;
    /// It is steered to the proxy plane.
    pub const PROXY: u8 = 2;
    /// It is gone from the configuration: its flows go on, new ones find nothing.
    pub const GONE: u8 = 3;
    /// As [`Self::PROXY`], and flows of a time when the kernel plane carried it go on.
    pub const PROXY_AFTER: u8 = 4;
    /// The member sees the client's address.
    pub const SNAT_NONE: u8 = 0;
    /// The member sees the box's own address.
    pub const SNAT_AUTOMAP: u8 = 1;
    /// The member sees an address of a SNAT pool.
    pub const SNAT_POOL: u8 = 2;
    /// A PROXY protocol header tells the member who the client is.
    pub const PROXY_HEADER: u32 = 1;
}

map_record!(
    /// A pool: who may be chosen, and how, and where flows to each member come from.
    Pool {
        /// [`Pool::LEAST_CONNECTIONS`] or [`Pool::ROUND_ROBIN`].
        method: u32,
        /// How many entries of `members` count.
        count: u32,
        /// Index of its turn counter; the same in every generation.
        turn: u32,
        /// Numbers of its members.
        members: [u16; POOL_MEMBERS],
        /// By place in `members`: its [`crate::pair::Source`], epoch included.
        sources: [u16; POOL_MEMBERS],
    } size 268 align 4
);

impl Pool {
    /// The member with the fewest connections of both planes.
    pub const LEAST_CONNECTIONS: u32 = 0;
    /// Each in turn.
    pub const ROUND_ROBIN: u32 = 1;
}

map_record!(
    /// What holds for every packet. One record; replacing it flips the generation.
    ///
    /// Replaced twice, first all but the epoch and then the epoch alone: a program may see half of a change.
    Config {
        /// Which of the generations side by side is in use: 0 or 1.
        epoch: u32,
        /// Number of the generation in use, noted in new flows.
        generation: u32,
        /// How many chunks of flow records exist, chunk 0 (unused) included.
        chunks: u32,
        /// Buckets of the table of flows, less one.
        flow_mask: u32,
        /// Half-open flows at once; beyond it clients get SYN cookies.
        embryonic: u32,
        /// Does any virtual server leave the client's address? Then replies are looked up by it too.
        by_key: u32,
        /// Idle limits in ticks, by [`crate::tcp::Limit`].
        limits: [u32; LIMITS],
        /// Proxy workers that hold a listener in the steering table.
        workers: u32,
        /// Process id of the daemon that wrote this.
        owner: u32,
        /// A random number of that daemon: process ids repeat, in containers above all.
        instance: u32,
        /// Do virtual servers on prefixes exist? 0 or 1.
        prefixes: u32,
        /// Seeds of the tables of virtual servers and pairs, by epoch.
        seeds: [u64; 2],
        /// What flows are hashed by; never changed while there is a table of flows.
        hash: [u64; HASH_KEYS],
        /// What SYN cookies are signed with; never changed while there is a table of flows.
        cookie: [u64; 2],
        /// A bit for each address, by its hash, that packets of ours go to.
        filter: [u64; FILTER],
    } size 232 align 8
);

/// Words of [`Config::filter`].
const FILTER: usize = 8;

impl Config {
    /// May a packet to this address be ours? With a handful of addresses it says yes to one in a hundred others, with some
    /// hundred to most.
    #[inline(always)]
    pub const fn concerns(&self, to: &Addr) -> bool {
        let (word, bit) = Self::filtered(to);
        self.filter[word] & bit != 0
    }

    /// Packets to this address are ours.
    pub const fn let_through(&mut self, to: &Addr) {
        let (word, bit) = Self::filtered(to);
        self.filter[word] |= bit;
    }

    /// Packets to any address may be ours.
    pub const fn let_all_through(&mut self) {
        self.filter = [u64::MAX; FILTER];
    }

    #[inline(always)]
    const fn filtered(to: &Addr) -> (usize, u64) {
        let words = to.0[3] as u64 | ((to.0[0] ^ to.0[1]) as u64) << 32;
        let hash = (words ^ words >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((hash >> 55) as usize & (FILTER - 1), 1 << (hash >> 58))
    }

    /// The seed of the tables in use.
    #[inline(always)]
    pub const fn seed(&self) -> u64 {
        self.seeds[self.epoch as usize & 1]
    }

    /// Idle limit of a phase in ticks.
    #[inline(always)]
    pub const fn idle_limit(&self, phase: Phase) -> u32 {
        match phase {
            Phase::Free | Phase::Claimed | Phase::Forgotten => u32::MAX,
            Phase::Syn => self.limits[Limit::Syn as usize],
            Phase::Established => self.limits[Limit::Established as usize],
            Phase::FinClient | Phase::FinMember => self.limits[Limit::HalfClosed as usize],
            Phase::Closing => self.limits[Limit::Closing as usize],
            Phase::Reset => RESET_LIMIT,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config {
            epoch: 0,
            generation: 1,
            chunks: 0,
            flow_mask: 0,
            embryonic: 0,
            by_key: 0,
            limits: [0; LIMITS],
            workers: 0,
            owner: 0,
            instance: 0,
            prefixes: 0,
            seeds: [0; 2],
            hash: [0; HASH_KEYS],
            cookie: [0; 2],
            filter: [0; FILTER],
        }
    }

    #[test]
    fn the_filter_lets_through_what_it_was_told_and_little_else() {
        let mut config = config();
        let v4 = |host: u32| Addr::from(core::net::Ipv4Addr::from(0x0a48_0000 + host));
        let v6 = |host: u16| Addr::from(core::net::Ipv6Addr::new(0xfd72, 0, 0, 0, 0, 0, 0, host));
        for host in 0..4 {
            config.let_through(&v4(host));
            config.let_through(&v6(host as u16));
        }
        assert!((0..4).all(|host| config.concerns(&v4(host)) && config.concerns(&v6(host as u16))));
        let others = (4..4096).filter(|host| config.concerns(&v4(*host))).count();
        assert!(others < 200, "{others} of 4092 others");
        config.let_all_through();
        assert!((0..4096).all(|host| config.concerns(&v4(host))));
    }
}
