//! How long each wait may last.

use std::time::Duration;

/// The limits of one session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// A member's TCP handshake.
    pub connect: Duration,
    /// A member's greeting.
    pub greeting: Duration,
    /// The client's next command, from our last reply to its CRLF.
    pub command: Duration,
    /// A member's reply to MAIL, RCPT and whatever is not named here.
    pub reply: Duration,
    /// A member's reply to DATA.
    pub data_reply: Duration,
    /// [`DATA_BLOCK`] bytes of content from the client.
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
}

/// How much content must arrive within [`Timeouts::data_block`], in octets: a byte now and then is no progress.
pub const DATA_BLOCK: usize = 1024;

impl Timeouts {
    /// RFC 5321 §4.5.3.2, and what it leaves open.
    pub const DEFAULT: Self = Self {
        // A member in the same network answers in milliseconds; a lost SYN is repeated after 1 s and 3 s.
        connect: Duration::from_secs(5),
        // §4.5.3.2.1 gives 5 minutes to the client of ours: two members must fit into them.
        greeting: Duration::from_secs(2 * 60),
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
    };
}

impl Default for Timeouts {
    fn default() -> Self {
        Self::DEFAULT
    }
}
