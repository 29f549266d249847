//! Versions, capacities and the shape rule of every record in a map.

/// Changes with any change of a record or a map; names the directory of the pins.
pub const ABI_VERSION: u32 = 1;

/// Members of all pools together. Number 0 means "none".
pub const MAX_MEMBERS: u32 = 1024;
/// Pools of one generation. Number 0 means "none".
pub const MAX_POOLS: u32 = 256;
/// Members of one pool.
pub const POOL_MEMBERS: usize = 64;
/// Virtual servers. Number 0 means "none".
pub const MAX_VIRTUAL_SERVERS: u32 = 1024;
/// Addresses, or prefixes, with a port that virtual servers take.
pub const MAX_PLACES: u32 = 4096;
/// Proxy workers, one per core.
pub const MAX_WORKERS: u32 = 64;
/// Two generations side by side: the one in use and the one being built.
pub const EPOCHS: u32 = 2;
/// Flow records that one run of the sweep program looks at.
pub const SWEEP: u32 = 32;
/// Passthrough flows tracked at once, unless configured.
pub const DEFAULT_FLOWS: u32 = 262_144;

/// Declares a record that lives in a map: `repr(C)`, its size and alignment stated, no hidden padding.
#[macro_export]
macro_rules! map_record {
    ($(#[$doc:meta])* $t:ident { $($(#[$fdoc:meta])* $f:ident: $ft:ty),* $(,)? } size $n:literal align $a:literal) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub struct $t { $($(#[$fdoc])* pub $f: $ft),* }
        const _: () = {
            assert!(
                size_of::<$t>() == $n && align_of::<$t>() == $a,
                concat!(stringify!($t), ": layout changed, bump ABI_VERSION")
            );
            assert!(0 $(+ size_of::<$ft>())* == $n, concat!(stringify!($t), ": hidden padding"));
        };
    };
}
