//! TLS on both sides: certificates, which of them answers, whom we trust, and the terms.

mod certificate;
mod error;
mod member;
mod resolver;
mod roots;

use std::sync::Arc;

use rustls::{
    ServerConfig,
    crypto::{CryptoProvider, aws_lc_rs},
    server::NoServerSessionStorage,
    version::{TLS12, TLS13},
};

pub use self::{
    certificate::{Loaded, load_certificate},
    error::{Error, Fault},
    member::MemberTls,
    roots::{Roots, load_roots},
};

/// What a client that offers protocols must offer (RFC 7301; rule against cross-protocol attacks).
pub const ALPN: &[u8] = b"smtp";

/// Session tickets per TLS 1.3 handshake: a mail client comes back one connection at a time.
const TICKETS: usize = 1;

/// The terms for the clients of one virtual server, shared by all its workers.
///
/// TLS 1.2 and 1.3, the post-quantum hybrid first, stateless tickets under keys of this
/// configuration's own that change by themselves, no early data. The first certificate answers
/// where the client names none that we have.
///
/// # Errors
/// There is no certificate, or the library cannot set up.
pub fn server_config(certificates: &[Arc<Loaded>]) -> Result<Arc<ServerConfig>, Error> {
    let resolver = resolver::BySni::new(certificates)?;
    let setup = |error: rustls::Error| Error::setup(&error);
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&TLS13, &TLS12])
        .map_err(setup)?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.ticketer = aws_lc_rs::Ticketer::new().map_err(setup)?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = TICKETS;
    config.max_early_data_size = 0;
    config.send_half_rtt_data = false;
    Ok(Arc::new(config))
}

/// The algorithms, passed by hand: nothing depends on which provider a process installed first.
fn provider() -> CryptoProvider {
    use aws_lc_rs::kx_group::{SECP256R1, SECP384R1, X25519, X25519MLKEM768};
    CryptoProvider {
        kx_groups: vec![X25519MLKEM768, X25519, SECP256R1, SECP384R1],
        ..aws_lc_rs::default_provider()
    }
}

#[cfg(test)]
pub(crate) mod tests;
