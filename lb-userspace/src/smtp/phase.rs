//! Where a session is.

/// Where a session is, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// The header of a balancer in front of us is awaited.
    ProxyHeader,
    /// The greeting is kept back.
    Pregreet,
    /// A TLS handshake.
    Handshake,
    /// A member is being connected.
    Connect,
    /// The member's greeting is awaited.
    Greeting,
    /// Between messages.
    Command,
    /// STARTTLS was said.
    StartTls,
    /// In an AUTH exchange.
    Auth,
    /// Behind MAIL.
    Mail,
    /// In a message.
    Data,
    /// In a chunk of a message.
    Bdat,
    /// The member's verdict on a message is awaited.
    EndOfData,
    /// Last bytes are on their way.
    Closing,
}

impl Phase {
    /// Every phase there is, in the order of their numbers.
    pub const ALL: [Self; 13] = [
        Self::ProxyHeader,
        Self::Pregreet,
        Self::Handshake,
        Self::Connect,
        Self::Greeting,
        Self::Command,
        Self::StartTls,
        Self::Auth,
        Self::Mail,
        Self::Data,
        Self::Bdat,
        Self::EndOfData,
        Self::Closing,
    ];

    /// The phase of a number that was made with `as u8`.
    pub fn from_number(number: u8) -> Self {
        Self::ALL
            .get(usize::from(number))
            .copied()
            .unwrap_or(Self::Closing)
    }

    /// The word in logs and views.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ProxyHeader => "proxy-header",
            Self::Pregreet => "pregreet",
            Self::Handshake => "handshake",
            Self::Connect => "connect",
            Self::Greeting => "greeting",
            Self::Command => "command",
            Self::StartTls => "starttls",
            Self::Auth => "auth",
            Self::Mail => "mail",
            Self::Data => "data",
            Self::Bdat => "bdat",
            Self::EndOfData => "end-of-data",
            Self::Closing => "closing",
        }
    }
}
