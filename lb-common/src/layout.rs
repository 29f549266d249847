//! Versions, capacities and the shape rule of every record in a map.

/// Changes with any change of a record or a map; names the directory of the pins.
pub const ABI_VERSION: u32 = 5;

/// Members of all pools together. Number 0 means "none".
pub const MAX_MEMBERS: u32 = 1024;
/// Pools of one generation. Number 0 means "none".
pub const MAX_POOLS: u32 = 256;
/// Pools of one generation with each kind of SNAT they are used with. Number 0 means "none".
pub const MAX_VIEWS: u32 = 512;
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
/// Flow records that one run of the sweep program looks at: a chunk.
pub const SWEEP: u32 = crate::pair::CHUNK;
/// Flows that one run of the ending program ends.
pub const ENDS: u32 = 64;
/// Passthrough flows tracked at once, unless configured.
pub const DEFAULT_FLOWS: u32 = 262_144;

/// Programs that take over a packet from the one that met it first; the index into the jump table of a hook.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Jump {
    /// The first packet of a connection.
    Open = 0,
    /// A packet of a flow whose sequence numbers are shifted.
    Shift = 1,
    /// An ICMP error.
    Icmp = 2,
    /// Fragments, extension headers and VLAN tags.
    Odd = 3,
    /// A first packet that is answered with a SYN cookie.
    Bake = 4,
    /// A packet of no flow that may bring one back.
    Redeem = 5,
    /// A packet to answer with an ICMP error of our own.
    Answer = 8,
}

impl Jump {
    /// Every one, by index.
    pub const ALL: [Self; 7] = [
        Self::Open,
        Self::Shift,
        Self::Icmp,
        Self::Odd,
        Self::Bake,
        Self::Redeem,
        Self::Answer,
    ];

    /// Does everything else work on a kernel that refuses its program?
    pub const fn is_optional(self) -> bool {
        !matches!(self, Self::Open)
    }

    /// The first word of its program's name.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Shift => "shift",
            Self::Icmp => "icmp",
            Self::Odd => "odd",
            Self::Bake => "bake",
            Self::Redeem => "redeem",
            Self::Answer => "answer",
        }
    }
}

/// Fragmented packets under way at once.
pub const FRAGMENTED: u32 = 8192;
/// Fragments that came before the first of their packet, remembered at once.
pub const EARLY: u32 = 1024;
/// Words of the table of VLANs.
pub const VLAN_WORDS: u32 = 4096 / 64;

/// Capacity of a jump table; room for programs to come.
pub const MAX_JUMPS: u32 = 16;

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
