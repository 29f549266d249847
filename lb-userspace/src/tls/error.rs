//! What is wrong with a certificate, its key, or the set of them.

use std::{fmt, path::PathBuf};

use crate::model::Name;

/// A fault that keeps a virtual server from speaking TLS: which object, what, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// The certificate's name in the configuration; absent where none is to blame.
    pub certificate: Option<Name>,
    /// The file at fault.
    pub path: Option<PathBuf>,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The file cannot be read.
    Unreadable(String),
    /// The file is far too large for PEM.
    TooLarge,
    /// The file is broken PEM.
    NotPem(String),
    /// No `CERTIFICATE` block; does it hold a key instead?
    NoCertificate { holds_key: bool },
    /// No private key block; does it hold a certificate instead?
    NoKey { holds_certificate: bool },
    /// The key is protected by a passphrase.
    EncryptedKey,
    /// The key is of a kind that we cannot use.
    UnusableKey(String),
    /// The first certificate is not X.509.
    BadCertificate(String),
    /// The key belongs to another certificate.
    KeyMismatch,
    /// Its time is over: since when, and by how many days.
    Expired { since: String },
    /// Its time has not come.
    NotYetValid { from: String },
    /// A file of authorities without one.
    NoRoot,
    /// One of its authorities cannot be one.
    BadRoot,
    /// The system trusts nobody.
    NoSystemRoots,
    /// A virtual server without certificates.
    NoneGiven,
    /// The TLS library refuses to set up.
    Setup(String),
}

impl Error {
    pub(super) fn setup(error: &rustls::Error) -> Self {
        Self {
            certificate: None,
            path: None,
            fault: Fault::Setup(error.to_string()),
        }
    }

    pub(super) fn none_given() -> Self {
        Self {
            certificate: None,
            path: None,
            fault: Fault::NoneGiven,
        }
    }
}

impl Fault {
    fn remedy(&self) -> &'static str {
        match self {
            Self::Unreadable(_) => "Check the path and that the daemon's user may read the file.",
            Self::TooLarge => "Name the PEM file itself.",
            Self::NotPem(_) => "Write the file anew; it may have been cut or edited.",
            Self::NoCertificate { holds_key: true } => {
                "`chain` and `key` may be swapped: `chain` takes the certificates."
            }
            Self::NoCertificate { .. } => {
                "Put the server's certificate first and the intermediates behind it, as PEM."
            }
            Self::NoKey {
                holds_certificate: true,
            } => "`chain` and `key` may be swapped: `key` takes the private key.",
            Self::NoKey { .. } => "Give the private key as PEM: PKCS#8, SEC1 or PKCS#1.",
            Self::EncryptedKey => {
                "Store it without a passphrase (`openssl pkey -in KEY -out PLAIN`), readable by the daemon only."
            }
            Self::UnusableKey(_) => {
                "Use an ECDSA key (P-256, P-384) or an RSA key of 2048 bits or more."
            }
            Self::BadCertificate(_) => "Ask the issuer for the certificate as PEM once more.",
            Self::KeyMismatch => {
                "Find the key that the certificate was requested with, or request a new pair."
            }
            Self::Expired { .. } => {
                "Renew the certificate; check this machine's clock if that is wrong."
            }
            Self::NotYetValid { .. } => {
                "Wait for its first day; check this machine's clock if that is wrong."
            }
            Self::NoRoot => "Put the certificates of the authorities into it, as PEM.",
            Self::BadRoot => {
                "Take the certificate that is none out, or ask its issuer for it once more."
            }
            Self::NoSystemRoots => {
                "Install the system's collection of authorities (ca-certificates), or name a file in `server_roots`."
            }
            Self::NoneGiven => "Name at least one in `certificates`.",
            Self::Setup(_) => "This build of the daemon cannot work; please report it.",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable(why) => write!(f, "cannot be read: {why}"),
            Self::TooLarge => write!(f, "is too large to be PEM"),
            Self::NotPem(why) => write!(f, "is broken PEM: {why}"),
            Self::NoCertificate { holds_key: true } => {
                write!(f, "holds a private key, but no certificate")
            }
            Self::NoCertificate { .. } => write!(f, "holds no certificate"),
            Self::NoKey {
                holds_certificate: true,
            } => {
                write!(f, "holds a certificate, but no private key")
            }
            Self::NoKey { .. } => write!(f, "holds no private key"),
            Self::EncryptedKey => write!(
                f,
                "is protected by a passphrase, and nobody is there to type it"
            ),
            Self::UnusableKey(why) => write!(f, "holds a key that cannot be used: {why}"),
            Self::BadCertificate(why) => write!(f, "starts with a broken certificate: {why}"),
            Self::KeyMismatch => write!(f, "is not the key of the certificate"),
            Self::Expired { since } => write!(f, "has expired on {since}"),
            Self::NotYetValid { from } => write!(f, "is not valid before {from}"),
            Self::NoRoot => write!(f, "holds no certificate of an authority"),
            Self::BadRoot => write!(f, "holds a certificate that cannot be an authority's"),
            Self::NoSystemRoots => write!(f, "the system trusts no authority"),
            Self::NoneGiven => write!(f, "no certificate is given"),
            Self::Setup(why) => write!(f, "TLS cannot be set up: {why}"),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = &self.certificate {
            write!(f, "certificate \"{name}\": ")?;
        }
        if let Some(path) = &self.path {
            write!(f, "{} ", path.display())?;
        }
        let consequence = "Virtual servers that name it cannot speak TLS.";
        write!(
            f,
            "{}\n  {consequence}\n  {}",
            self.fault,
            self.fault.remedy()
        )
    }
}

impl std::error::Error for Error {}
