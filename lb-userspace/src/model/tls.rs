//! TLS on both sides of a proxy virtual server.

use std::{fmt, path::PathBuf};

use super::Name;

/// `virtual_server.client_tls`, with the terms it takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientTls {
    /// Plain SMTP.
    None,
    /// TLS from the first byte.
    Implicit(ClientTerms),
    /// STARTTLS (RFC 3207).
    StartTls {
        /// May clients stay in plaintext?
        policy: StartTls,
        /// Who serves those that do; absent: the same pool. Only with [`StartTls::Allow`].
        plaintext_pool: Option<Name>,
        /// The terms for those that do not.
        terms: ClientTerms,
    },
}

impl ClientTls {
    /// The terms, where there is TLS.
    pub const fn terms(&self) -> Option<&ClientTerms> {
        match self {
            Self::None => None,
            Self::Implicit(terms) | Self::StartTls { terms, .. } => Some(terms),
        }
    }
}

impl ClientTls {
    /// Who serves clients that stay in plaintext, if others do.
    pub const fn plaintext_pool(&self) -> Option<&Name> {
        match self {
            Self::StartTls { plaintext_pool, .. } => plaintext_pool.as_ref(),
            Self::None | Self::Implicit(_) => None,
        }
    }
}

/// `virtual_server.starttls`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartTls {
    /// Mail commands before TLS get 530 5.7.0.
    Require,
    /// Clients may stay in plaintext.
    Allow,
}

/// What clients are offered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientTerms {
    /// Never empty; the first is the default, the rest are found by SNI.
    pub certificates: Vec<Name>,
    /// Older versions are refused.
    pub min_version: TlsVersion,
    /// Never empty; in order of preference, but one whose share the client has sent along saves a round trip.
    pub key_exchange: Vec<KeyExchange>,
    /// Must clients show certificates?
    pub auth: ClientAuth,
    /// What becomes of those who ask for a name that no certificate is for.
    pub unknown_name: UnknownName,
}

/// `virtual_server.client_tls_min`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    /// RFC 5246.
    V1_2,
    /// RFC 8446.
    V1_3,
}

/// A way to agree on keys, of `virtual_server.key_exchange`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyExchange {
    /// X25519 and ML-KEM-768 together, safe from quantum computers; TLS 1.3 only.
    X25519MlKem768,
    /// RFC 7748.
    X25519,
    /// NIST P-256.
    Secp256r1,
    /// NIST P-384.
    Secp384r1,
}

impl KeyExchange {
    /// All there are, in the order of the default.
    pub const ALL: [Self; 4] = [
        Self::X25519MlKem768,
        Self::X25519,
        Self::Secp256r1,
        Self::Secp384r1,
    ];

    /// The word in the file.
    pub const fn word(self) -> &'static str {
        match self {
            Self::X25519MlKem768 => "x25519mlkem768",
            Self::X25519 => "x25519",
            Self::Secp256r1 => "secp256r1",
            Self::Secp384r1 => "secp384r1",
        }
    }
}

/// `virtual_server.client_auth`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientAuth {
    /// They are not asked for one.
    None,
    /// They may come without one; a certificate that is shown has to be good.
    Request {
        /// Who vouches for it; PEM.
        roots: PathBuf,
    },
    /// They may not.
    Require {
        /// Who vouches for it; PEM.
        roots: PathBuf,
    },
}

impl ClientAuth {
    /// Who vouches for clients.
    pub const fn roots(&self) -> Option<&PathBuf> {
        match self {
            Self::None => None,
            Self::Request { roots } | Self::Require { roots } => Some(roots),
        }
    }
}

/// `virtual_server.unknown_name`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownName {
    /// They get the first certificate.
    Default,
    /// They get the alert `unrecognized_name` (RFC 6066 §3).
    Refuse,
}

/// `virtual_server.server_tls`, with the terms it takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerTls {
    /// Plain SMTP.
    None,
    /// TLS from the first byte.
    Implicit(ServerTerms),
    /// STARTTLS (RFC 3207); a member without it does not serve.
    StartTls(ServerTerms),
}

impl ServerTls {
    /// The terms, where there is TLS.
    pub const fn terms(&self) -> Option<&ServerTerms> {
        match self {
            Self::None => None,
            Self::Implicit(terms) | Self::StartTls(terms) => Some(terms),
        }
    }

    /// The word in the file.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Implicit(_) => "implicit",
            Self::StartTls(_) => "starttls",
        }
    }
}

/// What members must show, and what they are shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerTerms {
    /// How a member proves who it is.
    pub verify: Verify,
    /// The name asked for by SNI, and under [`Verify::Full`] to be in the certificate; absent: the member's address.
    pub name: Option<String>,
    /// Shown to members that ask for a certificate.
    pub certificate: Option<Name>,
}

/// `virtual_server.server_verify`, with the keys that belong to each choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verify {
    /// By a chain to one of these roots, and by name.
    Full {
        /// PEM; absent: the system's.
        roots: Option<PathBuf>,
    },
    /// By its key, whoever issued the certificate.
    Pinned(Vec<Pin>),
    /// Not at all.
    None,
}

/// The SHA-256 of a SubjectPublicKeyInfo (RFC 7469 §2.4).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Pin(pub [u8; 32]);

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

impl Pin {
    /// From its 44 characters of base64.
    pub fn from_base64(text: &str) -> Option<Self> {
        let digits = text.strip_suffix('=')?.as_bytes();
        if digits.len() != 43 {
            return None;
        }
        let mut pin = [0; 32];
        let (mut bits, mut held, mut at) = (0_u32, 0, 0);
        for digit in digits {
            let value = BASE64.iter().position(|known| known == digit)?;
            bits = bits << 6 | value as u32;
            held += 6;
            if held >= 8 {
                held -= 8;
                pin[at] = (bits >> held) as u8;
                bits &= (1 << held) - 1;
                at += 1;
            }
        }
        // Two bits are left over: another spelling of the same pin is a slip.
        (bits == 0).then_some(Self(pin))
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for three in self.0.chunks(3) {
            let whole = three
                .iter()
                .chain(&[0, 0])
                .take(3)
                .fold(0_usize, |whole, byte| whole << 8 | usize::from(*byte));
            for digit in 0..=three.len() {
                let value = whole >> (18 - 6 * digit) & 63;
                write!(f, "{}", char::from(BASE64[value]))?;
            }
        }
        f.write_str("=")
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_written_as_they_are_read() {
        for (byte, text) in [
            (0x00, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="),
            (0xff, "//////////////////////////////////////////8="),
            (0x2c, "LCwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCwsLCw="),
        ] {
            assert_eq!(Pin::from_base64(text), Some(Pin([byte; 32])), "{text}");
            assert_eq!(Pin([byte; 32]).to_string(), text);
        }
        for text in [
            "",
            "=",
            "AAAA",
            "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
            "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAB=",
            "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA-=",
        ] {
            assert_eq!(Pin::from_base64(text), None, "{text}");
        }
    }
}
