//! Virtual servers and pools as the kernel plane sees them.

use crate::{addr::Addr, layout::POOL_MEMBERS, map_record};

map_record!(
    /// What a packet's destination is looked up by.
    ServiceKey {
        /// The virtual address.
        address: Addr,
        /// Port, network order.
        port: u16,
        /// Which of the generations side by side: 0 or 1.
        epoch: u16,
    } size 20 align 4
);

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
        /// Index of its pool in the pool table, epoch included.
        pool: u32,
        /// Its number, for flows and counters.
        virtual_server: u16,
        /// [`Service::PASSTHROUGH`] or [`Service::PROXY`].
        forward: u8,
        /// [`Service::SNAT_NONE`] or [`Service::SNAT_AUTOMAP`].
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
    /// The member sees the client's address.
    pub const SNAT_NONE: u8 = 0;
    /// The member sees the box's own address.
    pub const SNAT_AUTOMAP: u8 = 1;
    /// A PROXY protocol header tells the member who the client is.
    pub const PROXY_HEADER: u32 = 1;
}

map_record!(
    /// A pool: who may be chosen, and how.
    Pool {
        /// [`Pool::LEAST_CONNECTIONS`] or [`Pool::ROUND_ROBIN`].
        method: u32,
        /// How many entries of `members` count.
        count: u32,
        /// Index of its turn counter; the same in every generation.
        turn: u32,
        /// Numbers of its members.
        members: [u16; POOL_MEMBERS],
    } size 140 align 4
);

impl Pool {
    /// The member with the fewest connections of both planes.
    pub const LEAST_CONNECTIONS: u32 = 0;
    /// Each in turn.
    pub const ROUND_ROBIN: u32 = 1;
}

map_record!(
    /// What holds for every packet. One record; replacing it flips the generation.
    Config {
        /// Which of the generations side by side is in use: 0 or 1.
        epoch: u32,
        /// Lowest SNAT port, host order.
        port_low: u16,
        /// How many SNAT ports follow from there; never 0 once configured.
        port_count: u16,
        /// Number of the generation in use, noted in new flows.
        generation: u32,
        /// How many flow records exist, record 0 (unused) included.
        flows: u32,
        /// Proxy workers that hold a listener in the steering table.
        workers: u32,
        /// Process id of the daemon that wrote this.
        owner: u32,
        /// A random number of that daemon: process ids repeat, in containers above all.
        instance: u32,
        /// Do virtual servers on prefixes exist? 0 or 1.
        prefixes: u32,
    } size 32 align 4
);
