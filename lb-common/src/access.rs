//! Who may connect: policies compiled for one lookup, and their evaluation.
//!
//! The sources that a policy names cut the address space into ranges. Each range knows the first rule that always
//! matches there, and as one bit each the rules before it that match only on some interfaces or VLANs, or at some times.
//! So a verdict costs one search among the ranges, however many rules and prefixes there are.

use crate::{addr::Addr, map_record};

/// Policies of one generation. Number 0 means "none".
pub const MAX_POLICIES: u32 = 64;
/// Rules of all policies of one generation, the default of each included. Number 0 means "none".
pub const MAX_RULES: u32 = 2048;
/// Ranges of all policies of one generation: 100,000 prefixes make at most 200,001.
pub const MAX_BOUNDS: u32 = 262_144;
/// Rules of one policy that match on some interfaces or VLANs only, or at some times.
pub const CONDITIONAL: usize = 64;
/// Interfaces and VLANs that policies of one generation name, counted once for each policy.
pub const MAX_CONDITIONS: u32 = 2048;
/// Sources (IPv4 /24, IPv6 /64) whose connection rate is remembered; the one that was quiet longest makes room.
pub const MAX_SOURCES: u32 = 65_536;
/// Steps of a search among [`MAX_BOUNDS`].
const STEPS: u32 = MAX_BOUNDS.ilog2() + 1;

map_record!(
    /// Where a range of source addresses begins, and what holds until the next one.
    Bound {
        /// Upper half of the first address, host order; IPv4 as IPv4-mapped.
        high: u64,
        /// Lower half.
        low: u64,
        /// Rules before `rule` that may match here, by their bit in [`Policy::conditional`].
        conditional: u64,
        /// The first rule that always matches here, counted from the policy's default, which is 0.
        rule: u32,
        /// Unused.
        pad: u32,
    } size 32 align 8
);

map_record!(
    /// A policy.
    Policy {
        /// Index of its first range, epoch included.
        bounds: u32,
        /// How many ranges; never 0.
        count: u32,
        /// Index of its default among the rules, epoch included; its rules follow.
        rules: u32,
        /// [`Policy::INTERFACES`], [`Policy::VLANS`].
        flags: u32,
        /// Conditional rules that match on an interface which no rule names.
        elsewhere: u64,
        /// Conditional rules that match on a VLAN which no rule names, and without one.
        untagged: u64,
        /// Which rule each bit stands for, in order.
        conditional: [u16; CONDITIONAL],
    } size 160 align 8
);

impl Policy {
    /// A rule names interfaces.
    pub const INTERFACES: u32 = 1;
    /// A rule names VLANs.
    pub const VLANS: u32 = 2;
}

map_record!(
    /// A rule, or the default of a policy.
    Rule {
        /// Of policy and rule by name: tells the same rule in another generation.
        hash: u64,
        /// Where it counts.
        number: u16,
        /// [`Action`].
        action: u8,
        /// Are matches logged? 0 or 1.
        log: u8,
        /// Unused.
        pad: u32,
    } size 16 align 8
);

/// What a rule does with a connection.
#[repr(u8)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub enum Action {
    /// Carried.
    Accept = 0,
    /// Dropped without a word.
    Drop = 1,
    /// Answered by ICMP, administratively prohibited (RFC 1812 §5.2.7.1, RFC 4443 §3.1).
    RejectIcmp = 2,
    /// Answered by RST.
    RejectRst = 3,
}

impl Action {
    /// From its number; an unknown one drops.
    #[inline(always)]
    pub const fn from_u8(number: u8) -> Self {
        match number {
            0 => Self::Accept,
            2 => Self::RejectIcmp,
            3 => Self::RejectRst,
            _ => Self::Drop,
        }
    }

    /// The word in configuration, counters and logs.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Accept => "accept",
            Self::Drop => "drop",
            Self::RejectIcmp | Self::RejectRst => "reject",
        }
    }
}

map_record!(
    /// What guards a virtual server, by its number.
    Guard {
        /// Policies in force, in order: of the network, of the virtual server. Index, epoch included; 0 for none.
        enforced: [u32; 2],
        /// Policies that are only counted, likewise.
        staged: [u32; 2],
        /// Between two connections of one source at the allowed rate, nanoseconds; 0 without a limit.
        interval: u64,
        /// How far a source may be ahead of that rate, nanoseconds.
        ahead: u64,
    } size 32 align 8
);

impl Guard {
    /// Nothing guards it.
    pub const OPEN: Self = Self {
        enforced: [0; 2],
        staged: [0; 2],
        interval: 0,
        ahead: 0,
    };

    /// Is there anything to look at?
    #[inline(always)]
    pub const fn is_open(&self) -> bool {
        self.enforced[0] | self.enforced[1] | self.staged[0] | self.staged[1] == 0
            && self.interval == 0
    }
}

map_record!(
    /// An interface or VLAN that a policy names.
    PlaceKey {
        /// Index of the policy, epoch included.
        policy: u32,
        /// Interface index, or VLAN with [`PlaceKey::VLAN`] set.
        place: u32,
    } size 8 align 4
);

impl PlaceKey {
    /// Told from interface indices, which are positive `i32`.
    pub const VLAN: u32 = 1 << 31;
}

map_record!(
    /// How often a rule has matched.
    RuleCell {
        /// In a policy in force.
        hits: u64,
        /// In a staged policy.
        staged: u64,
    } size 16 align 8
);

map_record!(
    /// Whose connection rate: a network at a virtual server.
    SourceKey {
        /// IPv4: the /24 and a mark; IPv6: the /64. Network order.
        network: [u32; 2],
        /// Number of the virtual server.
        virtual_server: u16,
        /// 4 or 6.
        family: u16,
    } size 12 align 4
);

impl SourceKey {
    /// The network of a source address.
    #[inline(always)]
    pub const fn new(source: &Addr, virtual_server: u16) -> Self {
        if source.is_v4() {
            Self {
                network: [source.0[3] & 0xffff_ff00_u32.to_be(), 0],
                virtual_server,
                family: 4,
            }
        } else {
            Self {
                network: [source.0[0], source.0[1]],
                virtual_server,
                family: 6,
            }
        }
    }
}

map_record!(
    /// A firewall event, as the programs report it.
    Event {
        /// Monotonic time, nanoseconds.
        time: u64,
        /// The client.
        source: Addr,
        /// The virtual address.
        destination: Addr,
        /// The client's port, network order.
        sport: u16,
        /// The virtual port, network order.
        dport: u16,
        /// Where the rule counts; 0 when no rule but a limit decided.
        rule: u16,
        /// Number of the virtual server.
        virtual_server: u16,
        /// [`Action`].
        action: u8,
        /// [`Event::ENFORCED`], [`Event::STAGED`] or [`Event::LIMITED`].
        kind: u8,
        /// VLAN identifier; 0 without a tag.
        vlan: u16,
        /// Index of the interface it came in by.
        interface: u32,
    } size 56 align 8
);

impl Event {
    /// A rule decided.
    pub const ENFORCED: u8 = 0;
    /// A rule of a staged policy would have decided.
    pub const STAGED: u8 = 1;
    /// The source connects too often.
    pub const LIMITED: u8 = 2;
}

map_record!(
    /// What `smtplb explain` is told, about a connection that was not made.
    Explanation {
        /// What was found; [`Explanation::NOTHING`] and so on.
        outcome: u32,
        /// The drop reason that a connection would meet, with [`Explanation::REFUSED`].
        reason: u32,
        /// Rules that would match, as indices, epoch included; 0 for none: in force, then staged.
        rules: [u32; 4],
        /// Number of the virtual server.
        virtual_server: u32,
        /// Number of the member.
        member: u32,
        /// The source address that the member would see; unset when the choice is made later.
        snat: Addr,
        /// The lowest port it would be, network order; 0 when the choice is made later.
        port: u32,
        /// Is the source within its connection rate? 0 or 1.
        within_rate: u32,
        /// Slot of the flow that the packet belongs to already; 0 for none.
        slot: u32,
        /// Unused.
        pad: u32,
    } size 64 align 4
);

impl Explanation {
    /// No virtual server has the address and port.
    pub const NOTHING: u32 = 0;
    /// A passthrough virtual server would carry it.
    pub const PASSTHROUGH: u32 = 1;
    /// A proxy virtual server would take it.
    pub const PROXY: u32 = 2;
    /// It would be refused.
    pub const REFUSED: u32 = 3;
}

map_record!(
    /// A budget that one CPU spends.
    Budget {
        /// When the next piece is due, nanoseconds.
        due: u64,
        /// How often it was used up.
        refused: u64,
    } size 16 align 8
);

/// What a CPU has a budget for; the index of its record.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Spending {
    /// Events for the firewall log.
    Events = 0,
}

impl Spending {
    /// Number of budgets.
    pub const COUNT: u32 = 1;
    /// Between two of a kind at the sustained rate: a thousand a second.
    pub const INTERVAL: u64 = 1_000_000;
    /// How far a CPU may be ahead: two hundred at once.
    pub const AHEAD: u64 = 200 * Self::INTERVAL;
}

/// Where a connection comes in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Arrival {
    /// The client.
    pub source: Addr,
    /// Index of the interface.
    pub interface: u32,
    /// Outermost VLAN identifier; 0 without a tag.
    pub vlan: u16,
}

/// The compiled policies: maps in the kernel, plain memory in tests.
pub trait Policies {
    /// A policy by index.
    fn policy(&self, index: u32) -> Option<&Policy>;
    /// A range by index.
    fn bound(&self, index: u32) -> Option<&Bound>;
    /// Which conditional rules of a policy have their time now.
    fn scheduled(&self, policy: u32) -> u64;
    /// Which conditional rules of a policy match at a place that it names.
    fn place(&self, key: &PlaceKey) -> Option<u64>;

    /// The same number, of which the optimiser knows nothing: it would drop a bound that the verifier asks for.
    #[inline(always)]
    fn opaque(&self, number: u32) -> u32 {
        number
    }

    /// [`search`], behind a call that the verifier checks once.
    #[inline(always)]
    fn search(&self, first: u32, count: u32, high: u64, low: u64) -> u32
    where
        Self: Sized,
    {
        search(self, first, count, high, low)
    }
}

/// The rule of a policy that matches first, as an index, epoch included; `None` without such a policy.
#[inline(always)]
pub fn matching<T: Policies>(tables: &T, index: u32, arrival: &Arrival) -> Option<u32> {
    let policy = tables.policy(index)?;
    let (high, low) = split(&arrival.source);
    let bound = tables.bound(tables.search(policy.bounds, policy.count, high, low))?;
    let mut open = bound.conditional;
    if open != 0 {
        open &= tables.scheduled(index);
        if policy.flags & Policy::INTERFACES != 0 {
            let place = arrival.interface;
            let key = PlaceKey {
                policy: index,
                place,
            };
            open &= tables.place(&key).unwrap_or(policy.elsewhere);
        }
        if policy.flags & Policy::VLANS != 0 {
            let place = PlaceKey::VLAN | arrival.vlan as u32;
            let key = PlaceKey {
                policy: index,
                place,
            };
            open &= tables.place(&key).unwrap_or(policy.untagged);
        }
    }
    let rule = match open {
        0 => bound.rule,
        _ => u32::from(
            policy.conditional[tables.opaque(open.trailing_zeros()) as usize & (CONDITIONAL - 1)],
        ),
    };
    Some(policy.rules.wrapping_add(rule))
}

/// The index of the last of `count` ranges that begins at or before an address. The first begins at zero.
#[inline(always)]
pub fn search<T: Policies>(tables: &T, first: u32, count: u32, high: u64, low: u64) -> u32 {
    let (mut at, mut count) = (first, count);
    for _ in 0..STEPS {
        if count <= 1 {
            break;
        }
        let half = count >> 1;
        if let Some(bound) = tables.bound(at.wrapping_add(half))
            && (bound.high < high || (bound.high == high && bound.low <= low))
        {
            at = at.wrapping_add(half);
        }
        count -= half;
    }
    at
}

/// The halves of an address in host order.
#[inline(always)]
pub const fn split(address: &Addr) -> (u64, u64) {
    let words = &address.0;
    (
        (u32::from_be(words[0]) as u64) << 32 | u32::from_be(words[1]) as u64,
        (u32::from_be(words[2]) as u64) << 32 | u32::from_be(words[3]) as u64,
    )
}

/// What a source's connection does to its rate (GCRA): when its next one is due, or `None` when it comes too early.
///
/// `due` is what the last one came to, `now` the time, both nanoseconds.
#[inline(always)]
pub const fn admit(due: u64, now: u64, interval: u64, ahead: u64) -> Option<u64> {
    let due = if due > now { due } else { now };
    if due - now > ahead {
        return None;
    }
    Some(due + interval)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_gets_its_burst_and_then_its_rate() {
        // 10 per second, 3 at once.
        let (interval, ahead) = (100, 200);
        let mut due = 0;
        let mut admitted = Vec::new();
        for now in (1000..1500).step_by(10) {
            if let Some(next) = admit(due, now, interval, ahead) {
                due = next;
                admitted.push(now);
            }
        }
        assert_eq!(admitted, [1000, 1010, 1020, 1100, 1200, 1300, 1400]);
    }

    #[test]
    fn networks_of_both_families_never_meet() {
        let key = |text: &str| {
            let address: std::net::IpAddr = text.parse().unwrap();
            SourceKey::new(&address.into(), 1)
        };
        assert_eq!(key("192.0.2.1"), key("192.0.2.254"));
        assert_ne!(key("192.0.2.1"), key("192.0.3.1"));
        assert_eq!(key("2001:db8::1"), key("2001:db8::ffff:0:0:1"));
        assert_ne!(key("2001:db8::1"), key("2001:db8:0:1::1"));
        assert_ne!(key("192.0.2.1"), key("c000:0200::"));
    }
}
