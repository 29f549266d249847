//! Why a session ended.

use std::fmt;

/// Why a session ended: a word of the session log, and where it is an anomaly, the name of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum End {
    /// The client said QUIT.
    Quit,
    /// The client closed between commands.
    ClientClosed,
    /// The client vanished within a message, or before it was answered; its member saw the connection break.
    ClientAborted,
    /// The member closed, or died.
    MemberClosed,
    /// The member said 421.
    MemberUnavailable,
    /// The member sent what is not SMTP, or a reply to nothing.
    MemberProtocol,
    /// The member did not answer in time.
    MemberTimeout,
    /// No member could be reached in time, or none wanted the session.
    NoMember,
    /// The client sent bytes between STARTTLS and its ClientHello (CVE-2011-0411).
    StartTlsInjection,
    /// The TLS handshake failed.
    TlsFailed,
    /// The TLS handshake took too long.
    TlsTimeout,
    /// A ClientHello where SMTP was due.
    ClientHelloInClear,
    /// A command line beyond its bound.
    LineTooLong,
    /// The session's budget of errors or idle commands is used up.
    TooManyErrors,
    /// A BDAT that does not say how many octets follow, or a broken line in an AUTH exchange.
    ClientProtocol,
    /// A bare CR, a bare LF or NUL within a message.
    BareControl,
    /// The client sent no command in time.
    CommandTimeout,
    /// The client's content did not come in time.
    DataTimeout,
    /// A peer did not take our bytes in time.
    SendTimeout,
    /// The daemon stops.
    Drained,
    /// The daemon stopped within a message.
    Cut,
    /// There are as many sessions as there may be, of all or of the virtual server.
    TooManySessions,
    /// There are as many sessions as there may be of the client's network.
    TooManyOfSource,
    /// A policy denies the client that a PROXY protocol header names.
    Denied,
    /// A balancer in front of us sent no PROXY protocol header, or a malformed one, or one that names nobody who can be
    /// its client.
    BadProxyHeader,
    /// The client talked before it was greeted.
    Pregreet,
}

/// Who ended a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Party {
    /// The client, by QUIT or by its connection.
    Client,
    /// The member.
    Member,
    /// This box: a rule, a limit or an order.
    Proxy,
}

impl Party {
    /// The word in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Member => "member",
            Self::Proxy => "proxy",
        }
    }
}

impl End {
    /// Every reason there is, in the order of their numbers.
    pub const ALL: [Self; 26] = [
        Self::Quit,
        Self::ClientClosed,
        Self::ClientAborted,
        Self::MemberClosed,
        Self::MemberUnavailable,
        Self::MemberProtocol,
        Self::MemberTimeout,
        Self::NoMember,
        Self::StartTlsInjection,
        Self::TlsFailed,
        Self::TlsTimeout,
        Self::ClientHelloInClear,
        Self::LineTooLong,
        Self::TooManyErrors,
        Self::ClientProtocol,
        Self::BareControl,
        Self::CommandTimeout,
        Self::DataTimeout,
        Self::SendTimeout,
        Self::Drained,
        Self::Cut,
        Self::TooManySessions,
        Self::TooManyOfSource,
        Self::Denied,
        Self::BadProxyHeader,
        Self::Pregreet,
    ];

    /// The word in logs and counters.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Quit => "quit",
            Self::ClientClosed => "client-closed",
            Self::ClientAborted => "client-aborted",
            Self::MemberClosed => "member-closed",
            Self::MemberUnavailable => "member-unavailable",
            Self::MemberProtocol => "member-protocol",
            Self::MemberTimeout => "member-timeout",
            Self::NoMember => "no-member",
            Self::StartTlsInjection => "starttls-injection",
            Self::TlsFailed => "tls-failed",
            Self::TlsTimeout => "tls-timeout",
            Self::ClientHelloInClear => "client-hello-in-clear",
            Self::LineTooLong => "line-too-long",
            Self::TooManyErrors => "too-many-errors",
            Self::ClientProtocol => "client-protocol",
            Self::BareControl => "bare-control",
            Self::CommandTimeout => "command-timeout",
            Self::DataTimeout => "data-timeout",
            Self::SendTimeout => "send-timeout",
            Self::Drained => "drained",
            Self::Cut => "cut",
            Self::TooManySessions => "too-many-sessions",
            Self::TooManyOfSource => "too-many-of-source",
            Self::Denied => "denied",
            Self::BadProxyHeader => "bad-proxy-header",
            Self::Pregreet => "pregreet",
        }
    }

    /// Who ended it.
    pub const fn by(self) -> Party {
        match self {
            Self::Quit | Self::ClientClosed | Self::ClientAborted => Party::Client,
            Self::MemberClosed | Self::MemberUnavailable => Party::Member,
            _ => Party::Proxy,
        }
    }

    /// May the member be told goodbye, or must it see the connection break?
    ///
    /// Within a message an orderly end could be taken for the end of data.
    pub const fn aborts_member(self) -> bool {
        !matches!(
            self,
            Self::Quit | Self::ClientClosed | Self::CommandTimeout | Self::Drained | Self::Pregreet
        )
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
