//! Which certificate answers a client.

use std::{collections::HashMap, sync::Arc};

use rustls::{
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

use super::{Loaded, error::Error};

/// By the name the client asks for (RFC 6066 §3), then by what it can verify; the first is the default.
#[derive(Debug)]
pub(super) struct BySni {
    all: Vec<Arc<CertifiedKey>>,
    /// Lower case, without trailing dot; wildcards as `.example.org`. ECDSA and RSA may share a name.
    by_name: HashMap<String, Vec<Arc<CertifiedKey>>>,
}

impl BySni {
    pub(super) fn new(certificates: &[Arc<Loaded>]) -> Result<Self, Error> {
        if certificates.is_empty() {
            return Err(Error::none_given());
        }
        let mut by_name: HashMap<String, Vec<_>> = HashMap::new();
        for certificate in certificates {
            for name in &certificate.host_names {
                let name = name.strip_prefix('*').unwrap_or(name);
                by_name
                    .entry(normal(name))
                    .or_default()
                    .push(certificate.key.clone());
            }
        }
        let all = certificates
            .iter()
            .map(|certificate| certificate.key.clone())
            .collect();
        Ok(Self { all, by_name })
    }

    /// Is a certificate for this name?
    pub(super) fn knows(&self, name: &str) -> bool {
        self.named(name).is_some()
    }

    /// The certificates for a name, best first; an unknown name gets the default.
    fn candidates(&self, name: Option<&str>) -> &[Arc<CertifiedKey>] {
        let named = name.and_then(|name| self.named(name));
        named.unwrap_or(&self.all)
    }

    fn named(&self, name: &str) -> Option<&[Arc<CertifiedKey>]> {
        let name = normal(name);
        let parent = || {
            name.find('.')
                .and_then(|dot| self.by_name.get(&name[dot..]))
        };
        let found = self.by_name.get(&name).or_else(parent);
        found.map(Vec::as_slice)
    }
}

impl ResolvesServerCert for BySni {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let candidates = self.candidates(hello.server_name());
        let usable =
            |key: &&Arc<CertifiedKey>| key.key.choose_scheme(hello.signature_schemes()).is_some();
        // Where none fits, the library says so to the client.
        candidates
            .iter()
            .find(usable)
            .or(candidates.first())
            .cloned()
    }
}

fn normal(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::super::tests::Pair;
    use super::*;

    #[test]
    fn names_are_matched_whole_then_by_wildcard_then_by_default() {
        let pair = |names: &[&str]| Arc::new(Pair::new(names).load().unwrap());
        let certificates = [
            pair(&["first.example"]),
            pair(&["mx.example", "*.wild.example"]),
            pair(&["*.example"]),
        ];
        let resolver = BySni::new(&certificates).unwrap();
        let found = |name| {
            let key = &resolver.candidates(name)[0];
            certificates
                .iter()
                .position(|certificate| Arc::ptr_eq(&certificate.key, key))
                .unwrap()
        };
        assert_eq!(found(None), 0);
        assert_eq!(found(Some("unknown.org")), 0);
        assert_eq!(found(Some("localhost")), 0);
        assert_eq!(found(Some("MX.Example.")), 1);
        assert_eq!(found(Some("a.wild.example")), 1);
        assert_eq!(found(Some("a.b.wild.example")), 0);
        assert_eq!(found(Some("other.example")), 2);
    }
}
