//! Certificates good and bad.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use rcgen::{CertificateParams, KeyPair, PKCS_RSA_SHA256, SignatureAlgorithm, date_time_ymd};

use super::{certificate::load_at, *};
use crate::model::Certificate;

/// A certificate and its key in files that vanish with it.
pub(crate) struct Pair {
    pub(crate) certificate: rcgen::Certificate,
    directory: tempfile::TempDir,
}

impl Pair {
    pub(crate) fn new(names: &[&str]) -> Self {
        Self::of(names, &rcgen::PKCS_ECDSA_P256_SHA256, |_| {})
    }

    pub(crate) fn of(
        names: &[&str],
        kind: &'static SignatureAlgorithm,
        edit: impl FnOnce(&mut CertificateParams),
    ) -> Self {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        edit(&mut params);
        let key = KeyPair::generate_for(kind).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let pair = Self {
            certificate,
            directory: tempfile::tempdir().unwrap(),
        };
        fs::write(pair.path("chain.pem"), pair.certificate.pem()).unwrap();
        fs::write(pair.path("key.pem"), key.serialize_pem()).unwrap();
        pair
    }

    /// As the library wants it.
    pub(crate) fn certified(&self) -> rustls::sign::CertifiedKey {
        (*self.load().unwrap().key).clone()
    }

    /// The pin of its key.
    pub(crate) fn pin(&self) -> crate::model::Pin {
        super::member::pin_of(self.certificate.der()).unwrap()
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    fn model(&self, chain: &str, key: &str) -> Certificate {
        Certificate {
            name: "mail".into(),
            chain: self.path(chain),
            key: self.path(key),
        }
    }

    pub(crate) fn load(&self) -> Result<Loaded, Error> {
        load_certificate(&self.model("chain.pem", "key.pem"))
    }
}

/// The terms of a file that says nothing of them.
pub(crate) fn terms() -> ClientTerms {
    ClientTerms {
        certificates: Vec::new(),
        min_version: TlsVersion::V1_2,
        key_exchange: KeyExchange::ALL.to_vec(),
        auth: ClientAuth::None,
        unknown_name: UnknownName::Default,
    }
}

/// By these terms.
pub(crate) fn plain(certificates: &[Arc<Loaded>]) -> Result<ListenerTls, Error> {
    ListenerTls::new(&terms(), certificates, None)
}

fn fault(pair: &Pair, chain: &str, key: &str) -> Fault {
    load_certificate(&pair.model(chain, key)).unwrap_err().fault
}

#[test]
fn a_good_pair_loads_with_its_warnings() {
    let pair = Pair::new(&["MX.example", "*.mail.example"]);
    let loaded = pair.load().unwrap();
    assert_eq!(loaded.host_names, ["mx.example", "*.mail.example"]);
    assert!(
        loaded
            .warnings
            .iter()
            .any(|warning| warning.contains("self-signed"))
    );
    assert!(plain(&[Arc::new(loaded)]).is_ok());
    let rsa = Pair::of(&["mx.example"], &PKCS_RSA_SHA256, |_| {});
    assert!(rsa.load().is_ok());
}

#[test]
fn a_chain_in_disorder_and_a_name_that_is_missing_are_told() {
    let (pair, other) = (
        Pair::new(&["mx.example"]),
        Pair::of(&[], &rcgen::PKCS_ECDSA_P256_SHA256, |params| {
            params.distinguished_name = rcgen::DistinguishedName::new();
            params
                .distinguished_name
                .push(rcgen::DnType::OrganizationName, "x");
        }),
    );
    let warns = |pair: &Pair, word: &str| {
        let loaded = pair.load().unwrap();
        loaded.warnings.iter().any(|warning| warning.contains(word))
    };
    assert!(!warns(&pair, "chain") && !warns(&pair, "host name"));
    assert!(warns(&other, "host name"));
    let both = [&pair, &other].map(|pair| pair.certificate.pem()).concat();
    fs::write(pair.path("chain.pem"), both).unwrap();
    assert!(warns(&pair, "chain"));
}

#[test]
fn every_fault_is_named() {
    let pair = Pair::new(&["mx.example"]);
    let other = Pair::new(&["mx.example"]);
    fs::copy(other.path("key.pem"), pair.path("other.pem")).unwrap();
    assert_eq!(fault(&pair, "chain.pem", "other.pem"), Fault::KeyMismatch);
    assert_eq!(
        fault(&pair, "key.pem", "chain.pem"),
        Fault::NoCertificate { holds_key: true }
    );
    assert_eq!(
        fault(&pair, "chain.pem", "chain.pem"),
        Fault::NoKey {
            holds_certificate: true
        }
    );
    assert!(matches!(
        fault(&pair, "missing.pem", "key.pem"),
        Fault::Unreadable(_)
    ));
    assert!(matches!(fault(&pair, ".", "key.pem"), Fault::Unreadable(_)));

    fs::write(pair.path("empty"), "").unwrap();
    assert_eq!(
        fault(&pair, "empty", "key.pem"),
        Fault::NoCertificate { holds_key: false }
    );
    assert_eq!(
        fault(&pair, "chain.pem", "empty"),
        Fault::NoKey {
            holds_certificate: false
        }
    );

    let cut = fs::read_to_string(pair.path("chain.pem")).unwrap();
    fs::write(pair.path("cut"), &cut[..cut.len() / 2]).unwrap();
    assert!(matches!(fault(&pair, "cut", "key.pem"), Fault::NotPem(_)));
    fs::write(
        pair.path("junk"),
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    )
    .unwrap();
    assert!(matches!(
        fault(&pair, "junk", "key.pem"),
        Fault::BadCertificate(_)
    ));

    for text in [
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: x\n\nAAAA\n-----END RSA PRIVATE KEY-----\n",
    ] {
        fs::write(pair.path("encrypted"), text).unwrap();
        assert_eq!(fault(&pair, "chain.pem", "encrypted"), Fault::EncryptedKey);
    }
}

#[test]
fn a_certificate_is_good_in_its_time_only() {
    let pair = Pair::of(&["mx.example"], &rcgen::PKCS_ECDSA_P256_SHA256, |params| {
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2020, 12, 31);
    });
    let at = |seconds| {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        load_at(&pair.model("chain.pem", "key.pem"), now)
    };
    assert!(matches!(
        at(1_500_000_000).unwrap_err().fault,
        Fault::NotYetValid { .. }
    ));
    assert!(matches!(
        at(1_700_000_000).unwrap_err().fault,
        Fault::Expired { .. }
    ));
    assert!(at(1_590_000_000).is_ok());
    let soon = at(1_609_000_000).unwrap();
    assert!(
        soon.warnings
            .iter()
            .any(|warning| warning.contains("expires on"))
    );
}

#[test]
fn a_message_names_object_fault_consequence_and_remedy() {
    let pair = Pair::new(&["mx.example"]);
    let error = load_certificate(&pair.model("key.pem", "key.pem")).unwrap_err();
    let path = pair.path("key.pem");
    assert_eq!(
        error.to_string(),
        format!(
            "certificate \"mail\": {} holds a private key, but no certificate\n  Virtual servers that name it \
             cannot speak TLS.\n  `chain` and `key` may be swapped: `chain` takes the certificates.",
            path.display()
        )
    );
    assert_eq!(plain(&[]).unwrap_err().fault, Fault::NoneGiven);
}
