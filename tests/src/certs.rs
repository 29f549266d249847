//! The lab's certificate authority.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, RsaKeySize,
};

/// The name clients expect, whoever ends the TLS.
pub const MAIL_NAME: &str = "mail.lab.example";

/// What kind of key a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// P-256
    Ecdsa,
    /// 2048 bits
    Rsa,
}

/// Where a certificate and its key lie, both PEM.
#[derive(Debug, Clone)]
pub struct CertFiles {
    /// The certificate.
    pub chain: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// One authority for everything in a lab.
#[derive(Debug)]
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: PathBuf,
}

impl Authority {
    /// Makes an authority that keeps its files in `folder`.
    ///
    /// # Errors
    /// When no key can be made or no file written.
    pub fn new(folder: &Path) -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(DnType::CommonName, "lab authority");
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        let authority = Self {
            issuer,
            folder: folder.to_owned(),
        };
        fs::write(authority.ca(), authority.issuer.pem())
            .context("cannot write the authority's certificate")?;
        Ok(authority)
    }

    /// The authority's own certificate, PEM.
    pub fn ca(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    /// Issues a certificate for [`MAIL_NAME`], with `owner` as its common name and a second name.
    ///
    /// # Errors
    /// When no key can be made or no file written.
    pub fn issue(&self, owner: &str, kind: KeyKind) -> Result<CertFiles> {
        let key = match kind {
            KeyKind::Ecdsa => KeyPair::generate()?,
            KeyKind::Rsa => KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, RsaKeySize::_2048)?,
        };
        let mut params =
            CertificateParams::new([MAIL_NAME.to_owned(), format!("{owner}.lab.example")])?;
        params.distinguished_name.push(DnType::CommonName, owner);
        let certificate = params.signed_by(&key, &self.issuer)?;
        let suffix = match kind {
            KeyKind::Ecdsa => "",
            KeyKind::Rsa => "-rsa",
        };
        let files = CertFiles {
            chain: self.folder.join(format!("{owner}{suffix}.pem")),
            key: self.folder.join(format!("{owner}{suffix}.key")),
        };
        fs::write(&files.chain, certificate.pem()).context("cannot write a certificate")?;
        fs::write(&files.key, key.serialize_pem()).context("cannot write a key")?;
        // Mail servers refuse a key that others may read.
        fs::set_permissions(&files.key, fs::Permissions::from_mode(0o600))?;
        Ok(files)
    }
}
