//! Why the kernel plane did not carry a packet: counter, log word and doc entry at once.

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $number:literal $word:literal),* $(,)?) => {
        /// One reason. Numbers are never reused.
        #[repr(u32)]
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum DropReason { $($(#[$doc])* $name = $number),* }

        impl DropReason {
            /// Does the stack get the packet, so that it answers with RST or sees a packet that is not ours?
            #[inline(always)]
            pub const fn to_stack(self) -> bool {
                matches!(self, Self::Truncated | Self::NoMember | Self::NoFlow)
            }

            /// Does its sender get an answer that says so, ICMP or RST?
            #[inline(always)]
            pub const fn answered(self) -> bool {
                matches!(
                    self,
                    Self::TtlExceeded | Self::TooBig | Self::PolicyReject | Self::PolicyReset
                )
            }

            /// Is its sender told by RST that there is no connection? By the stack, which does not see frames with VLAN
            /// tags: there by the packet programs.
            #[inline(always)]
            pub const fn is_told(self) -> bool {
                matches!(self, Self::NoMember | Self::NoFlow)
            }

            /// Every reason, by number.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The word used in counters, logs and documents.
            pub const fn word(self) -> &'static str {
                match self { $(Self::$name => $word),* }
            }
        }
    };
}

reasons! {
    /// The packet ends inside a header.
    Truncated = 0 "truncated",
    /// No member of the pool is up; the client gets a RST.
    NoMember = 1 "no-member",
    /// Every flow record is in use by a live flow; the new connection is dropped and may be retried.
    FlowTableFull = 2 "flow-table-full",
    /// Every port of every SNAT address towards the member is in use; the new connection is dropped and may be retried.
    PortsExhausted = 3 "ports-exhausted",
    /// A packet for a virtual server that belongs to no flow; its sender gets a RST.
    NoFlow = 4 "no-flow",
    /// TTL or hop limit used up.
    TtlExceeded = 5 "ttl-exceeded",
    /// No route to the next hop, or a route that discards.
    NoRoute = 6 "no-route",
    /// Forwarding is switched off on the interface the packet came in by.
    ForwardingOff = 7 "forwarding-off",
    /// The packet does not fit the link it should leave by.
    TooBig = 8 "too-big",
    /// A table that must exist was not found; a fault in smtplb.
    Internal = 9 "internal",
    /// `snat = "automap"`, and the box has no address on the way to the member.
    NoSnatAddress = 10 "no-snat-address",
    /// A connection to a proxy virtual server while no proxy worker listens; the client gets a RST.
    NoWorker = 11 "no-worker",
    /// A tagged frame for a virtual server, of a VLAN that `vlans` does not name.
    ForeignVlan = 12 "foreign-vlan",
    /// An ICMP redirect about a flow: it would lead one end around the translation.
    IcmpRedirect = 13 "icmp-redirect",
    /// A packet that an ICMP error, or a RST behind VLAN tags, would have answered, but there were too many, or it is a fragment.
    NoAnswer = 14 "no-answer",
    /// A fragment of a flow's packet that came before the first; the stack got it, the sender repeats the segment.
    EarlyFragment = 15 "early-fragment",
    /// A policy drops the connection, and the client is told nothing.
    PolicyDrop = 16 "policy-drop",
    /// A policy rejects the connection; the client is told by ICMP.
    PolicyReject = 17 "policy-reject",
    /// A policy rejects the connection; the client is told by RST.
    PolicyReset = 18 "policy-reset",
    /// The client's network connects too often; the new connection is dropped and may be retried.
    RateLimited = 19 "rate-limited",
    /// A first packet while half-open connections have their share; it was answered with a SYN cookie, and the connection is made when the client brings it back.
    SynCookie = 20 "syn-cookie",
    /// A member's answer to a connection that a SYN cookie has opened, neither SYN and ACK nor RST.
    Unexpected = 21 "unexpected",
    /// The first packet of a connection was met on two processors at once, and this was the later one; the client repeats it.
    Raced = 22 "raced",
    /// A first fragment that ends within the TCP header, or IPv6 extension headers that do not end where they should, for a virtual address: what cannot be read cannot be judged.
    HiddenHeader = 23 "hidden-header",
}

/// Capacity of the counter array; room for reasons to come.
pub const MAX_REASONS: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_dense_and_words_unique() {
        for (number, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, number);
            assert!(
                DropReason::ALL[..number]
                    .iter()
                    .all(|other| other.word() != reason.word())
            );
        }
        assert!(DropReason::ALL.len() <= MAX_REASONS as usize);
    }
}
