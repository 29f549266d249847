//! A certificate chain and its key, read and checked.

use std::{
    fs, io,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::{
    Error as TlsError, InconsistentKeys,
    crypto::aws_lc_rs,
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{Error as PemError, PemObject},
    },
    sign::CertifiedKey,
};
use x509_parser::{
    certificate::X509Certificate, extensions::GeneralName, prelude::FromDer, public_key::PublicKey,
    time::ASN1Time,
};

use super::{
    error::{Error, Fault},
    member::pin_of,
};
use crate::model::{Certificate, Name, Pin};

/// Largest PEM file read, in bytes: a hundred certificates fit.
const MAX_FILE: u64 = 1 << 20;

/// A certificate below this remaining life is worth a warning.
const SOON: Duration = Duration::from_secs(14 * 24 * 3600);

/// A certificate that can be used.
#[derive(Debug)]
pub struct Loaded {
    /// Its name in the configuration.
    pub name: Name,
    /// Host names it is good for, in lower case; `*.` stands for one label.
    pub host_names: Vec<String>,
    /// The kind of its key, for people.
    pub key_kind: String,
    /// Its key's, as members' are told by.
    pub pin: Option<Pin>,
    /// Its last moment.
    pub not_after: SystemTime,
    /// What an operator should know: self-signed, soon over, key readable by all.
    pub warnings: Vec<String>,
    pub(super) key: Arc<CertifiedKey>,
}

impl Loaded {
    /// Would a client see no difference? The key belongs to the certificate, so the chain says it all.
    pub fn is_same(&self, other: &Self) -> bool {
        self.key.cert == other.key.cert
    }
}

/// Reads a chain and its key and checks that they can be used now.
///
/// # Errors
/// The first fault found, with its file and a remedy.
pub fn load_certificate(certificate: &Certificate) -> Result<Loaded, Error> {
    load_at(certificate, SystemTime::now())
}

pub(super) fn load_at(certificate: &Certificate, now: SystemTime) -> Result<Loaded, Error> {
    let fault = |path: &Path| {
        let (certificate, path) = (Some(certificate.name.clone()), Some(path.to_owned()));
        move |fault| Error {
            certificate,
            path,
            fault,
        }
    };
    let (chain, leaf) = read_chain(&certificate.chain, now).map_err(fault(&certificate.chain))?;
    let key = read_key(&certificate.key).map_err(fault(&certificate.key))?;
    let pin = chain.first().and_then(|leaf| pin_of(leaf));
    let key = pair(chain, &key).map_err(fault(&certificate.key))?;
    let mut warnings = leaf.warnings;
    if is_readable_by_all(&certificate.key) {
        let path = certificate.key.display();
        warnings.push(format!(
            "the private key {path} is readable by every user: chmod 600 it"
        ));
    }
    Ok(Loaded {
        name: certificate.name.clone(),
        host_names: leaf.host_names,
        key_kind: leaf.key_kind,
        pin,
        not_after: leaf.not_after,
        warnings,
        key: Arc::new(key),
    })
}

/// What the first certificate says.
struct Leaf {
    host_names: Vec<String>,
    key_kind: String,
    not_after: SystemTime,
    warnings: Vec<String>,
}

fn read_chain(path: &Path, now: SystemTime) -> Result<(Vec<CertificateDer<'static>>, Leaf), Fault> {
    let pem = read(path)?;
    let chain = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|error| Fault::NotPem(error.to_string()))?;
    let Some(first) = chain.first() else {
        let holds_key = PrivateKeyDer::from_pem_slice(&pem).is_ok() || is_encrypted(&pem);
        return Err(Fault::NoCertificate { holds_key });
    };
    let mut leaf = read_leaf(first, now)?;
    if !is_in_order(&chain) {
        leaf.warnings.push(
            "its chain does not lead from each certificate to its issuer: clients may not be able to verify it"
                .to_owned(),
        );
    }
    Ok((chain, leaf))
}

/// Is each certificate issued by the next (RFC 5246 §7.4.2)?
fn is_in_order(chain: &[CertificateDer<'_>]) -> bool {
    let parsed = chain.iter().map(|der| X509Certificate::from_der(der));
    let Ok(parsed) = parsed.collect::<Result<Vec<_>, _>>() else {
        return false;
    };
    let mut pairs = parsed.windows(2);
    pairs.all(|pair| pair[0].1.issuer() == pair[1].1.subject())
}

fn read_leaf(der: &[u8], now: SystemTime) -> Result<Leaf, Fault> {
    let broken = |error: &dyn std::fmt::Display| Fault::BadCertificate(error.to_string());
    let (_, leaf) = X509Certificate::from_der(der).map_err(|error| broken(&error))?;
    let validity = leaf.validity();
    let (from, until) = (moment(validity.not_before), moment(validity.not_after));
    if now < from {
        return Err(Fault::NotYetValid {
            from: validity.not_before.to_string(),
        });
    }
    if now > until {
        return Err(Fault::Expired {
            since: validity.not_after.to_string(),
        });
    }
    let mut warnings = Vec::new();
    if leaf.subject() == leaf.issuer() {
        warnings.push("it is self-signed: clients that verify will refuse it".to_owned());
    }
    let host_names = host_names(&leaf);
    if host_names.is_empty() {
        warnings.push("it is for no host name: no client that verifies takes it".to_owned());
    }
    if until < now + SOON {
        warnings.push(format!("it expires on {}", validity.not_after));
    }
    Ok(Leaf {
        host_names,
        key_kind: key_kind(&leaf),
        not_after: until,
        warnings,
    })
}

fn key_kind(leaf: &X509Certificate<'_>) -> String {
    let key = leaf.public_key();
    match key.parsed() {
        Ok(PublicKey::RSA(rsa)) => format!("RSA, {} bits", rsa.key_size()),
        Ok(PublicKey::EC(point)) => format!("ECDSA, {} bits", point.key_size()),
        _ => "other".to_owned(),
    }
}

/// Names of the subject alternative name (RFC 6125 §6.4), else the common name.
fn host_names(leaf: &X509Certificate<'_>) -> Vec<String> {
    let alternative = leaf.subject_alternative_name().ok().flatten();
    let names = alternative
        .iter()
        .flat_map(|extension| &extension.value.general_names);
    let mut names: Vec<String> = names
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
            _ => None,
        })
        .collect();
    if names.is_empty() {
        let common = leaf
            .subject()
            .iter_common_name()
            .filter_map(|name| name.as_str().ok());
        names.extend(common.map(str::to_ascii_lowercase));
    }
    names
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, Fault> {
    let pem = read(path)?;
    if is_encrypted(&pem) {
        return Err(Fault::EncryptedKey);
    }
    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| match error {
        PemError::NoItemsFound => {
            let holds_certificate = CertificateDer::from_pem_slice(&pem).is_ok();
            Fault::NoKey { holds_certificate }
        }
        error => Fault::NotPem(error.to_string()),
    })
}

fn pair(
    chain: Vec<CertificateDer<'static>>,
    key: &PrivateKeyDer<'_>,
) -> Result<CertifiedKey, Fault> {
    let unusable = |error: TlsError| Fault::UnusableKey(error.to_string());
    let key = CertifiedKey::new(
        chain,
        aws_lc_rs::sign::any_supported_type(key).map_err(unusable)?,
    );
    match key.keys_match() {
        // Unknown: the key cannot tell; the handshake will.
        Ok(()) | Err(TlsError::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(key),
        Err(TlsError::InconsistentKeys(_)) => Err(Fault::KeyMismatch),
        Err(error) => Err(Fault::UnusableKey(error.to_string())),
    }
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, Fault> {
    let unreadable = |error: io::Error| Fault::Unreadable(error.to_string());
    if fs::metadata(path).map_err(unreadable)?.len() > MAX_FILE {
        return Err(Fault::TooLarge);
    }
    fs::read(path).map_err(unreadable)
}

/// PKCS#8 says so in its label, the older formats in a header.
fn is_encrypted(pem: &[u8]) -> bool {
    let marks: [&[u8]; 2] = [
        b"-----BEGIN ENCRYPTED PRIVATE KEY-----",
        b"Proc-Type: 4,ENCRYPTED",
    ];
    pem.split(|byte| *byte == b'\n')
        .any(|line| marks.contains(&line.trim_ascii()))
}

fn is_readable_by_all(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|data| data.permissions().mode() & 0o004 != 0)
}

fn moment(time: ASN1Time) -> SystemTime {
    let seconds = Duration::from_secs(time.timestamp().unsigned_abs());
    if time.timestamp() < 0 {
        UNIX_EPOCH - seconds
    } else {
        UNIX_EPOCH + seconds
    }
}
