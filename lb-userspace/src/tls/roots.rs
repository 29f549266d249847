//! The authorities that others' certificates are verified by.

use std::{path::Path, sync::Arc};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};

use super::{
    certificate::read,
    error::{Error, Fault},
};

/// Trusted authorities.
#[derive(Debug)]
pub struct Roots {
    pub(super) store: Arc<RootCertStore>,
    certificates: Vec<CertificateDer<'static>>,
}

impl Roots {
    /// Would the same certificates pass?
    pub fn is_same(&self, other: &Self) -> bool {
        self.certificates == other.certificates
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.certificates.len()
    }

    fn of(certificates: Vec<CertificateDer<'static>>) -> Self {
        let mut store = RootCertStore::empty();
        // One that is no authority can vouch for nobody; the system's collection may hold some.
        store.add_parsable_certificates(certificates.iter().cloned());
        Self {
            store: Arc::new(store),
            certificates,
        }
    }
}

/// Reads the authorities of a PEM file, or those that the system trusts.
///
/// # Errors
/// There is none, or one of the file's cannot be read.
pub fn load_roots(path: Option<&Path>) -> Result<Roots, Error> {
    let fault = |fault| Error {
        certificate: None,
        path: path.map(Path::to_owned),
        fault,
    };
    let Some(file) = path else {
        let roots = Roots::of(rustls_native_certs::load_native_certs().certs);
        return match roots.store.is_empty() {
            true => Err(fault(Fault::NoSystemRoots)),
            false => Ok(roots),
        };
    };
    let pem = read(file).map_err(fault)?;
    let certificates = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
    let certificates = certificates.map_err(|error| fault(Fault::NotPem(error.to_string())))?;
    if certificates.is_empty() {
        return Err(fault(Fault::NoRoot));
    }
    let roots = Roots::of(certificates);
    match roots.store.len() == roots.count() {
        true => Ok(roots),
        false => Err(fault(Fault::BadRoot)),
    }
}
