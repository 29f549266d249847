//! How the proxy plane meets clients and members, TLS left aside: `[session]`, and keys of proxy virtual servers.

use std::{net::IpAddr, time::Duration};

use super::{
    Snat,
    policy::{self, Range},
};

/// `[session]`: what holds for every session of the proxy plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sessions {
    /// How long each wait may last.
    pub timeouts: SessionTimeouts,
    /// How long sessions may go on after the daemon was told to stop (`drain_timeout`).
    pub drain: Duration,
    /// Sessions at once, of all virtual servers (`max_sessions`); with what one may hold it bounds the memory.
    pub max: u32,
    /// Recipients of one transaction (`max_recipients`); 0: as many as the member takes.
    pub max_recipients: u32,
}

impl Default for Sessions {
    fn default() -> Self {
        Self {
            timeouts: SessionTimeouts::DEFAULT,
            drain: Duration::from_secs(30),
            max: 50_000,
            // RFC 5321 §4.5.3.1.8 asks for 100 at least; no common server takes more than this unless told.
            max_recipients: 1000,
        }
    }
}

/// The limits of one session's waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionTimeouts {
    /// A member's TCP handshake.
    pub connect: Duration,
    /// A member's greeting.
    pub greeting: Duration,
    /// Finding a member, all that are tried together: from the first connect until one takes commands.
    pub find_member: Duration,
    /// The client's next command, from our last reply to its CRLF.
    pub command: Duration,
    /// A member's reply to MAIL, RCPT and whatever is not named here.
    pub reply: Duration,
    /// A member's reply to DATA.
    pub data_reply: Duration,
    /// [`crate::smtp::timeouts::DATA_BLOCK`] bytes of content from the client.
    pub data_block: Duration,
    /// A member's reply to the end of data.
    pub data_end: Duration,
    /// The client's TLS handshake, from our 220 or from accept.
    pub handshake: Duration,
    /// A member's TLS handshake.
    pub member_handshake: Duration,
    /// Bytes that a peer with a closed window does not take.
    pub send: Duration,
    /// Content behind a DATA that was refused.
    pub discard: Duration,
    /// The PROXY protocol header of a balancer in front of us.
    pub proxy_header: Duration,
}

impl SessionTimeouts {
    /// RFC 5321 §4.5.3.2, and what it leaves open.
    pub const DEFAULT: Self = Self {
        // A member in the same network answers in milliseconds; a lost SYN is repeated after 1 s and 3 s.
        connect: Duration::from_secs(5),
        greeting: Duration::from_secs(2 * 60),
        // §4.5.3.2.1 gives 5 minutes to the client of ours, and it has waited for us before: two members that are silent
        // fit into them.
        find_member: Duration::from_secs(4 * 60),
        // §4.5.3.2.7.
        command: Duration::from_secs(5 * 60),
        // §4.5.3.2.2 and §4.5.3.2.3.
        reply: Duration::from_secs(5 * 60),
        // §4.5.3.2.4.
        data_reply: Duration::from_secs(2 * 60),
        // §4.5.3.2.5.
        data_block: Duration::from_secs(3 * 60),
        // §4.5.3.2.6.
        data_end: Duration::from_secs(10 * 60),
        // Three round trips of the slowest link, and a slow machine's arithmetic.
        handshake: Duration::from_secs(30),
        // A member is near; the next one may be quicker.
        member_handshake: Duration::from_secs(10),
        // §4.5.3.2.5: a block that cannot be sent.
        send: Duration::from_secs(3 * 60),
        // What was on its way when the refusal was sent.
        discard: Duration::from_secs(30),
        // It comes with the first packet; the specification asks for 3 s at least, a lost SYN's time.
        proxy_header: Duration::from_secs(5),
    };
}

impl Default for SessionTimeouts {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What a proxy virtual server has beside its TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms {
    /// Whose address the members see.
    pub snat: Snat,
    /// What tells the members who the client is.
    pub proxy_protocol: ProxyHeader,
    /// Who may tell us (`accept_proxy_from`); sorted and disjoint.
    pub accept_proxy_from: Vec<Range>,
    /// How long a ClientHello in place of waiting for the greeting is awaited.
    pub detect_implicit_tls: Option<Duration>,
    /// What becomes of clients that talk before they are greeted.
    pub pregreet: Option<Pregreet>,
    /// What becomes of bare CRs and LFs in content.
    pub line_endings: LineEndings,
    /// Its sessions at once; absent: as many as there may be of all.
    pub max_sessions: Option<u32>,
    /// Those of one source network (IPv4 /24, IPv6 /64).
    pub max_sessions_per_source: Option<u32>,
}

impl Default for Terms {
    fn default() -> Self {
        Self {
            snat: Snat::Automap,
            proxy_protocol: ProxyHeader::None,
            accept_proxy_from: Vec::new(),
            detect_implicit_tls: None,
            pregreet: None,
            line_endings: LineEndings::Strict,
            max_sessions: None,
            max_sessions_per_source: None,
        }
    }
}

impl Terms {
    /// Does a connection from here begin with a PROXY protocol header?
    pub fn trusts(&self, peer: IpAddr) -> bool {
        let number = policy::number(peer);
        let behind = self
            .accept_proxy_from
            .partition_point(|range| range.last < number);
        self.accept_proxy_from
            .get(behind)
            .is_some_and(|range| range.first <= number)
    }
}

/// `virtual_server.proxy_protocol` of the proxy plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyHeader {
    /// Nothing.
    None,
    /// A line of text.
    V1,
    /// The binary header, with what is known of the client's TLS.
    V2,
}

/// `virtual_server.line_endings`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineEndings {
    /// A message with a bare CR or LF is refused.
    Strict,
    /// It reaches the member with CRLF in their place, or a space.
    Normalize,
}

/// `virtual_server.pregreet`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pregreet {
    /// How long the greeting is kept back at least, from accept.
    pub wait: Duration,
    /// What becomes of who does not wait.
    pub action: PregreetAction,
}

/// `pregreet.action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PregreetAction {
    /// It is noted in the session log.
    Log,
    /// It is noted, and the greeting comes so much later.
    Delay(Duration),
    /// It is told 554 and closed.
    Reject,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trust_ends_at_the_edges_of_a_prefix() {
        let prefix = |text: &str, length| Range::prefix(text.parse().unwrap(), length);
        let terms = Terms {
            accept_proxy_from: Range::merged(vec![
                prefix("10.1.0.0", 16),
                prefix("192.0.2.7", 32),
                prefix("2001:db8::", 64),
            ]),
            ..Terms::default()
        };
        for (peer, trusted) in [
            ("10.0.255.255", false),
            ("10.1.0.0", true),
            ("10.1.255.255", true),
            ("10.2.0.0", false),
            ("192.0.2.6", false),
            ("192.0.2.7", true),
            ("192.0.2.8", false),
            ("2001:db8::ffff", true),
            ("2001:db8:0:1::", false),
            ("::", false),
        ] {
            assert_eq!(terms.trusts(peer.parse().unwrap()), trusted, "{peer}");
        }
        assert!(!Terms::default().trusts("10.1.0.0".parse().unwrap()));
    }
}
