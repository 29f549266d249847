//! The client's end: plain or TLS, behind one face.

use std::{
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use rustls::{CommonState, HandshakeKind, ProtocolVersion, server::Acceptor};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};
use tokio_rustls::{LazyConfigAcceptor, TlsAcceptor, server::TlsStream};

use super::{
    header::Secured,
    wire::{Ahead, Opening, Wire},
};
use crate::{smtp::end::End, telemetry::session::TlsFacts, tls::ListenerTls};

/// How long the last bytes may take, and how long we hear a client out that still sends: closing
/// before that would reset the connection and could destroy our last reply on its way.
const FAREWELL: Duration = Duration::from_secs(5);
/// A client that is silent for so long has heard.
const SILENCE: Duration = Duration::from_secs(2);
/// A client that sends and sends.
const HEARING: Duration = Duration::from_secs(30);

/// Bytes that TLS may hold for a client that does not take them: replies are short.
const UNSENT: usize = 8 * 1024;

/// A client's connection.
#[derive(Debug)]
pub(super) enum ClientStream {
    Plain(TcpStream),
    Tls(Box<TlsStream<Wire>>),
    /// The handshake failed; what is left to be heard out.
    Gone(Option<Box<Wire>>),
}

/// What is already known of bytes that the client has sent and we have not read.
pub(super) enum Waiting {
    Nothing,
    Bytes,
    End,
}

impl ClientStream {
    /// Looks past what the runtime has noticed so far.
    pub(super) fn waiting(&self) -> Waiting {
        let tcp = match self {
            Self::Plain(tcp) => tcp,
            Self::Tls(stream) => match stream.get_ref().0.waiting() {
                Ok(tcp) => tcp,
                Err(Ahead) => return Waiting::Bytes,
            },
            Self::Gone(_) => return Waiting::End,
        };
        match SockRef::from(tcp).peek(&mut [MaybeUninit::uninit()]) {
            Ok(0) => Waiting::End,
            Ok(_) => Waiting::Bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Waiting::Nothing,
            Err(_) => Waiting::End,
        }
    }

    /// Reads until the buffer is nearly full or nothing more is there: TLS gives one record at a time.
    pub(super) fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let mut buffer = ReadBuf::new(buffer);
        ready!(Pin::new(&mut *self).poll_read(cx, &mut buffer))?;
        let batches = matches!(self, Self::Tls(_));
        let mut before = 0;
        while batches && buffer.filled().len() > before && buffer.remaining() > 0 {
            before = buffer.filled().len();
            // An end or an error shows again at the next read.
            let _ = Pin::new(&mut *self).poll_read(cx, &mut buffer);
        }
        Poll::Ready(Ok(buffer.filled().len()))
    }

    /// Shakes hands; on failure nothing is left but to close.
    pub(super) async fn secure(&mut self, tls: &ListenerTls, limit: Duration) -> Result<(), End> {
        let Self::Plain(tcp) = std::mem::replace(self, Self::Gone(None)) else {
            return Err(End::TlsFailed);
        };
        match timeout(limit, handshake(tcp, tls)).await {
            Ok(Ok(stream)) => {
                let mut stream = Box::new(stream);
                let (wire, connection) = stream.get_mut();
                wire.end_handshake();
                connection.set_buffer_limit(Some(UNSENT));
                *self = Self::Tls(stream);
                Ok(())
            }
            Ok(Err((end, wire))) => {
                *self = Self::Gone(wire.map(Box::new));
                Err(end)
            }
            Err(_) => Err(End::TlsTimeout),
        }
    }

    /// How many bytes TLS has taken and not sent; they are thrown away.
    #[cfg(test)]
    pub(super) fn unsent(&mut self) -> usize {
        let mut bytes = Vec::new();
        if let Self::Tls(stream) = self {
            while stream.get_ref().1.wants_write() {
                stream.get_mut().1.write_tls(&mut bytes).unwrap();
            }
        }
        bytes.len()
    }

    /// What was agreed.
    pub(super) fn tls(&self) -> Option<TlsFacts> {
        let Self::Tls(stream) = self else { return None };
        agreed(stream.get_ref().1)
    }

    /// Calls `then` with all that members may be told of the client's TLS.
    pub(super) fn with_secured<T>(&self, then: impl FnOnce(Option<&Secured<'_>>) -> T) -> T {
        let (Self::Tls(stream), Some(facts)) = (self, self.tls()) else {
            return then(None);
        };
        let (_, connection) = stream.get_ref();
        let leaf = connection.peer_certificates().and_then(<[_]>::first);
        let parsed = leaf.and_then(|leaf| x509_parser::parse_x509_certificate(leaf).ok());
        let mut names = parsed
            .iter()
            .flat_map(|(_, leaf)| leaf.subject().iter_common_name());
        then(Some(&Secured {
            version: facts.version,
            suite: facts.suite,
            certificate: leaf.is_some(),
            resumed: connection.handshake_kind() == Some(HandshakeKind::Resumed),
            common_name: names.next().and_then(|name| name.as_str().ok()),
            alpn: connection.alpn_protocol(),
            authority: connection.server_name(),
        }))
    }

    /// Closes behind the alert of a handshake that failed: a reset must not overtake it.
    pub(super) async fn hear_out(&mut self) {
        let Self::Gone(wire) = self else { return };
        let Some(mut wire) = wire.take() else { return };
        let hearing = async {
            let _ = wire.shutdown().await;
            let mut heard = [0; 1024];
            while wire.read(&mut heard).await.is_ok_and(|count| count > 0) {}
        };
        let _ = timeout(SILENCE, hearing).await;
    }

    /// Sends the last bytes, closes our side and hears the client out.
    pub(super) async fn farewell(&mut self, bytes: &[u8]) {
        if let Self::Gone(_) = self {
            return self.hear_out().await;
        }
        let last = async {
            self.write_all(bytes).await?;
            self.shutdown().await
        };
        if !matches!(timeout(FAREWELL, last).await, Ok(Ok(()))) {
            return;
        }
        let until = Instant::now() + HEARING;
        let mut heard = [0; 4096];
        while Instant::now() < until {
            match timeout_at(until.min(Instant::now() + SILENCE), self.read(&mut heard)).await {
                Ok(Ok(1..)) => {}
                _ => return,
            }
        }
    }
}

/// Why a handshake failed, and the connection where an alert is on its way.
type Failed = (End, Option<Wire>);

async fn handshake(tcp: TcpStream, tls: &ListenerTls) -> Result<TlsStream<Wire>, Failed> {
    let mut wire = Wire::new(tcp);
    match wire.opening().await {
        Ok(Opening::Handshake) => {}
        Ok(Opening::OldTls([major, minor])) => {
            // The library calls this a handshake failure; the client can learn more (RFC 8446 §6.2).
            return Err(refuse(wire, [major, minor], PROTOCOL_VERSION).await);
        }
        // No words: the other side waits for TLS, or is no client at all.
        Ok(Opening::Other) => return Err((End::StartTlsInjection, None)),
        Err(_) => return Err((End::ClientClosed, None)),
    }
    let config = tls.config.clone();
    let accept = if tls.is_strict() {
        let mut opened = LazyConfigAcceptor::new(Acceptor::default(), wire);
        let opened = match (&mut opened).await {
            Ok(opened) => opened,
            Err(_) => return Err((End::TlsFailed, opened.take_io())),
        };
        if tls.refuses(opened.client_hello().server_name()) {
            return Err(refuse(opened.io, [3, 3], UNRECOGNIZED_NAME).await);
        }
        opened.into_stream(config)
    } else {
        TlsAcceptor::from(config).accept(wire)
    };
    let accepted = accept.into_fallible().await;
    accepted.map_err(|(_, wire)| (End::TlsFailed, Some(wire)))
}

/// RFC 8446 §6.2.
const PROTOCOL_VERSION: u8 = 70;
/// RFC 6066 §3.
const UNRECOGNIZED_NAME: u8 = 112;

/// Sends a fatal alert in clear.
async fn refuse(mut wire: Wire, version: [u8; 2], alert: u8) -> Failed {
    let [major, minor] = version;
    let _ = wire.write_all(&[21, major, minor, 0, 2, 2, alert]).await;
    (End::TlsFailed, Some(wire))
}

/// What the sides of a connection have agreed on.
pub(super) fn agreed(connection: &CommonState) -> Option<TlsFacts> {
    let version = match connection.protocol_version()? {
        ProtocolVersion::TLSv1_2 => "TLSv1.2",
        ProtocolVersion::TLSv1_3 => "TLSv1.3",
        _ => "unknown",
    };
    let suite = connection
        .negotiated_cipher_suite()?
        .suite()
        .as_str()
        .unwrap_or("unknown");
    Some(TlsFacts { version, suite })
}

impl AsyncRead for ClientStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_read(cx, out),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, out),
            Self::Gone(_) => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Gone(_) => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
            Self::Gone(_) => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Gone(_) => Poll::Ready(Ok(())),
        }
    }
}
