//! TLS on both sides: certificates, which of them answers, whom we trust, and the terms.

mod certificate;
mod error;
mod member;
mod resolver;
mod roots;

use std::sync::Arc;

use rustls::{
    RootCertStore, ServerConfig,
    crypto::{
        CryptoProvider, SupportedKxGroup,
        aws_lc_rs::{
            self,
            kx_group::{SECP256R1, SECP384R1, X25519, X25519MLKEM768},
        },
    },
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    version::{TLS12, TLS13},
};

use self::resolver::BySni;

pub use self::{
    certificate::{Loaded, load_certificate},
    error::{Error, Fault},
    member::MemberTls,
    roots::{Roots, load_roots},
};
use crate::model::{ClientAuth, ClientTerms, KeyExchange, TlsVersion, UnknownName};

/// What a client that offers protocols must offer (RFC 7301; rule against cross-protocol attacks).
pub const ALPN: &[u8] = b"smtp";

/// Session tickets per TLS 1.3 handshake: a mail client comes back one connection at a time.
const TICKETS: usize = 1;

/// The terms for the clients of one virtual server, shared by all its workers.
#[derive(Debug)]
pub struct ListenerTls {
    /// As the library wants them.
    pub config: Arc<ServerConfig>,
    /// Who is refused for the name it asks for.
    strict: Option<Arc<BySni>>,
}

impl ListenerTls {
    /// By what the configuration says, with the files it names.
    ///
    /// TLS 1.2 and 1.3, stateless tickets under keys of this configuration's own that change by themselves, no early
    /// data. The first certificate answers where the client names none that we have.
    ///
    /// # Errors
    /// There is no certificate, or the library cannot set up.
    pub fn new(
        terms: &ClientTerms,
        certificates: &[Arc<Loaded>],
        roots: Option<&Roots>,
    ) -> Result<Self, Error> {
        let resolver = Arc::new(BySni::new(certificates)?);
        let setup = |error: rustls::Error| Error::setup(&error);
        let provider = Arc::new(CryptoProvider {
            kx_groups: terms
                .key_exchange
                .iter()
                .map(|group| by_word(*group))
                .collect(),
            ..provider()
        });
        let versions: &[_] = match terms.min_version {
            TlsVersion::V1_2 => &[&TLS13, &TLS12],
            TlsVersion::V1_3 => &[&TLS13],
        };
        let verifier = client_verifier(&terms.auth, roots, &provider)?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(setup)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(resolver.clone());
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.ticketer = aws_lc_rs::Ticketer::new().map_err(setup)?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = TICKETS;
        config.max_early_data_size = 0;
        config.send_half_rtt_data = false;
        Ok(Self {
            config: Arc::new(config),
            strict: (terms.unknown_name == UnknownName::Refuse).then_some(resolver),
        })
    }

    /// Has the ClientHello to be looked at before the handshake?
    pub fn is_strict(&self) -> bool {
        self.strict.is_some()
    }

    /// Is a client refused that asks for this name? Who asks for none is not.
    pub fn refuses(&self, name: Option<&str>) -> bool {
        match (&self.strict, name) {
            (Some(resolver), Some(name)) => !resolver.knows(name),
            _ => false,
        }
    }
}

fn client_verifier(
    auth: &ClientAuth,
    roots: Option<&Roots>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, Error> {
    // Without authorities nobody could pass, and the builder says so.
    let store = roots.map_or_else(
        || Arc::new(RootCertStore::empty()),
        |roots| roots.store.clone(),
    );
    let builder = WebPkiClientVerifier::builder_with_provider(store, provider.clone());
    let built = match auth {
        ClientAuth::None => return Ok(WebPkiClientVerifier::no_client_auth()),
        ClientAuth::Request { .. } => builder.allow_unauthenticated().build(),
        ClientAuth::Require { .. } => builder.build(),
    };
    built.map_err(|error| Error::setup(&rustls::Error::General(error.to_string())))
}

fn by_word(group: KeyExchange) -> &'static dyn SupportedKxGroup {
    match group {
        KeyExchange::X25519MlKem768 => X25519MLKEM768,
        KeyExchange::X25519 => X25519,
        KeyExchange::Secp256r1 => SECP256R1,
        KeyExchange::Secp384r1 => SECP384R1,
    }
}

/// The algorithms, passed by hand: nothing depends on which provider a process installed first.
fn provider() -> CryptoProvider {
    CryptoProvider {
        kx_groups: KeyExchange::ALL.map(by_word).to_vec(),
        ..aws_lc_rs::default_provider()
    }
}

#[cfg(test)]
pub(crate) mod tests;
