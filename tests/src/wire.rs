//! A connection that is plain or TLS, and says which.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    ops::{Deref, DerefMut},
    path::Path,
    sync::Arc,
};

use anyhow::{Context, Result};
use rustls::{
    ClientConfig, ClientConnection, ConnectionCommon, RootCertStore, ServerConfig,
    ServerConnection, SideData, StreamOwned,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};

use crate::mail::digest;

/// What the handshake came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// `TLSv1.3`
    pub version: String,
    /// `TLS13_AES_256_GCM_SHA384`
    pub suite: String,
    /// SHA-256 of the certificate that the other side showed, hexadecimal.
    pub peer_certificate: Option<String>,
}

trait Duplex: Read + Write + Send {}
impl<T: Read + Write + Send> Duplex for T {}

/// One connection.
pub struct Wire {
    tcp: TcpStream,
    stream: Box<dyn Duplex>,
    tls: Option<Tls>,
}

impl Wire {
    /// As it was accepted or connected.
    ///
    /// # Errors
    /// When the system has no more file descriptors.
    pub fn plain(tcp: TcpStream) -> io::Result<Self> {
        tcp.set_nodelay(true)?;
        Ok(Self {
            stream: Box::new(tcp.try_clone()?),
            tcp,
            tls: None,
        })
    }

    /// What the handshake came to, once there was one.
    pub fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    /// The socket below.
    pub fn socket(&self) -> &TcpStream {
        &self.tcp
    }

    /// Shakes hands as the client.
    ///
    /// # Errors
    /// When the handshake fails.
    pub fn connect_tls(self, config: &Arc<ClientConfig>, name: &str) -> Result<Self> {
        let name = ServerName::try_from(name.to_owned())?;
        let connection = ClientConnection::new(Arc::clone(config), name)?;
        self.shake(connection)
    }

    /// Shakes hands as the server.
    ///
    /// # Errors
    /// When the handshake fails.
    pub fn accept_tls(self, config: &Arc<ServerConfig>) -> Result<Self> {
        let connection = ServerConnection::new(Arc::clone(config))?;
        self.shake(connection)
    }

    fn shake<C, S>(self, mut connection: C) -> Result<Self>
    where
        C: DerefMut + Deref<Target = ConnectionCommon<S>> + Send + 'static,
        S: SideData,
    {
        let mut tcp = self.tcp.try_clone()?;
        while connection.is_handshaking() {
            connection.complete_io(&mut tcp).context("TLS handshake")?;
        }
        let tls = Tls {
            version: connection
                .protocol_version()
                .and_then(|version| Some(version.as_str()?.replace('_', ".")))
                .unwrap_or_default(),
            suite: connection
                .negotiated_cipher_suite()
                .and_then(|suite| suite.suite().as_str())
                .unwrap_or_default()
                .to_owned(),
            peer_certificate: connection
                .peer_certificates()
                .and_then(|chain| chain.first())
                .map(|leaf| digest::sha256(leaf)),
        };
        Ok(Self {
            tcp: self.tcp,
            stream: Box::new(StreamOwned::new(connection, tcp)),
            tls: Some(tls),
        })
    }
}

impl Read for Wire {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// A client that trusts the lab's authority and nobody else.
///
/// # Errors
/// When the authority's file is not there.
pub fn client_config(ca: &Path) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(ca)? {
        roots.add(certificate)?;
    }
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// A server with one certificate.
///
/// # Errors
/// When the files are not there or do not belong together.
pub fn server_config(chain: &Path, key: &Path) -> Result<Arc<ServerConfig>> {
    let key = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("cannot read {}", key.display()))?;
    let config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(certificates(chain)?, key)?;
    Ok(Arc::new(config))
}

/// SHA-256 of the first certificate of a file, as [`Tls::peer_certificate`] shows it.
///
/// # Errors
/// When the file holds no certificate.
pub fn fingerprint(chain: &Path) -> Result<String> {
    let chain = certificates(chain)?;
    let leaf = chain.first().context("no certificate in the file")?;
    Ok(digest::sha256(leaf))
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect)
        .with_context(|| format!("cannot read {}", file.display()))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}
