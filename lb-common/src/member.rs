//! Members as the kernel plane sees them.

use crate::{addr::Addr, map_record};

map_record!(
    /// One member, by number. Rewritten in place when its state changes.
    Member {
        /// Where it listens.
        address: Addr,
        /// Port, network order.
        port: u16,
        /// May it take new flows? 0 or 1.
        available: u16,
        /// Distinguishes members with the same address in different pools.
        pool_hash: u32,
    } size 24 align 4
);
