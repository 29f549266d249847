//! TLS towards members.

use std::{net::IpAddr, sync::Arc};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error as TlsError, OtherError,
    SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature,
        verify_tls13_signature,
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
    sign::SingleCertAndKey,
    version::{TLS12, TLS13},
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

use super::{Loaded, Roots, error::Error, provider};
use crate::model::{Pin, ServerTerms, Verify};

/// The terms towards the members of one virtual server, shared by all its workers.
#[derive(Debug)]
pub struct MemberTls {
    /// TLS 1.2 and 1.3; a session may be resumed with the member it was made with.
    pub config: Arc<ClientConfig>,
    name: Option<ServerName<'static>>,
    verifies_name: bool,
}

impl MemberTls {
    /// By what the configuration says, with the files it names.
    ///
    /// # Errors
    /// The library cannot set up.
    pub fn new(
        terms: &ServerTerms,
        roots: Option<&Roots>,
        certificate: Option<&Loaded>,
    ) -> Result<Self, Error> {
        let provider = Arc::new(provider());
        let verifier = verifier(&terms.verify, roots, &provider)?;
        let setup = |error: TlsError| Error::setup(&error);
        let builder = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13, &TLS12])
            .map_err(setup)?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let config = match certificate {
            None => builder.with_no_client_auth(),
            Some(own) => {
                let own = SingleCertAndKey::from((*own.key).clone());
                builder.with_client_cert_resolver(Arc::new(own))
            }
        };
        let name = match &terms.name {
            Some(name) => Some(
                ServerName::try_from(name.clone())
                    .map_err(|error| setup(TlsError::General(error.to_string())))?,
            ),
            None => None,
        };
        Ok(Self {
            config: Arc::new(config),
            name,
            verifies_name: matches!(terms.verify, Verify::Full { .. }),
        })
    }

    /// The name that a member at this address has to prove.
    pub fn name_of(&self, address: IpAddr) -> ServerName<'static> {
        match &self.name {
            Some(name) => name.clone(),
            None => ServerName::IpAddress(address.into()),
        }
    }

    /// Is it proven that the member bears the name (RFC 8689 §4.2.1)?
    pub fn verifies_name(&self) -> bool {
        self.verifies_name
    }
}

fn verifier(
    verify: &Verify,
    roots: Option<&Roots>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ServerCertVerifier>, Error> {
    let pins = match (verify, roots) {
        (Verify::Full { .. }, Some(roots)) => {
            let builder =
                WebPkiServerVerifier::builder_with_provider(roots.store.clone(), provider.clone());
            let built = builder.build();
            return Ok(built.map_err(|error| Error::setup(&TlsError::General(error.to_string())))?);
        }
        // Without authorities nobody passes.
        (Verify::Full { .. }, None) => Some(Vec::new()),
        (Verify::Pinned(pins), _) => Some(pins.clone()),
        (Verify::None, _) => None,
    };
    let algorithms = provider.signature_verification_algorithms;
    Ok(Arc::new(ByKey { pins, algorithms }))
}

/// Takes certificates for their keys alone, or as they come; the member still proves that it has the key.
#[derive(Debug)]
struct ByKey {
    /// Absent: any.
    pins: Option<Vec<Pin>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for ByKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let Some(pins) = &self.pins else {
            return Ok(ServerCertVerified::assertion());
        };
        let found = pin_of(end_entity).ok_or(CertificateError::BadEncoding)?;
        match pins.contains(&found) {
            true => Ok(ServerCertVerified::assertion()),
            false => {
                let error: Box<dyn std::error::Error + Send + Sync> =
                    format!("its key {found} is none of the pinned ones").into();
                Err(CertificateError::Other(OtherError(Arc::from(error))).into())
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The pin of a certificate's key; nothing where it is no certificate.
pub(super) fn pin_of(certificate: &[u8]) -> Option<Pin> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let sha256 = aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256
        .tls13()?
        .common
        .hash_provider;
    let digest = sha256.hash(certificate.public_key().raw);
    Some(Pin(digest.as_ref().try_into().ok()?))
}
