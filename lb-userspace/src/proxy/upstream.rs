//! The member's end: plain or TLS, behind one face.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::atomic::Ordering::Relaxed,
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    MemberSecurity, Service,
    client::{ClientStream, agreed},
    events::Events,
    header,
    source::{self, Use},
};
use crate::{
    model::ProxyHeader,
    pool::{Lease, LivePool},
    telemetry::session::{SessionId, TlsFacts},
    tls::MemberTls,
};

/// Bytes that TLS may hold for a member that does not take them: two records, so that content goes in large writes.
const UNSENT: usize = 32 * 1024;

/// A connection to a member, and the place at it. Dropped, it is reset: whatever a member has seen
/// of a message then, it cannot take its end for the end of data.
#[derive(Debug)]
pub(super) struct Upstream {
    pub(super) link: Link,
    pub(super) lease: Lease,
    orderly: bool,
}

/// For whom a member is connected.
pub(super) struct Origin<'a> {
    pub(super) service: &'a Service,
    pub(super) client: SocketAddr,
    /// What members are told of it first, where they want to know: [`introduction`].
    pub(super) header: Option<Vec<u8>>,
}

/// A connection to a member.
#[derive(Debug)]
pub(super) struct Link {
    stream: Stream,
    address: SocketAddr,
    /// Given back with it.
    _source: Option<Use>,
}

#[derive(Debug)]
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
    /// The handshake failed.
    Gone,
}

impl Upstream {
    /// Connects the best member that was not tried yet, and else the next; with implicit TLS, one that proves who it is.
    pub(super) async fn connect(
        pool: &LivePool,
        tried: &mut Vec<u16>,
        origin: &Origin<'_>,
        events: &Events,
    ) -> Option<Self> {
        let timeouts = &origin.service.sessions.timeouts;
        while let Some(lease) = pool.select(tried) {
            tried.push(lease.member().id);
            let mut link = match Link::open(lease.member().address, origin).await {
                Some(link) => link,
                None => {
                    events.member_connect_failed.fetch_add(1, Relaxed);
                    continue;
                }
            };
            if let MemberSecurity::Implicit(tls) = &origin.service.server_tls
                && let Err(error) = link.secure(tls, timeouts.member_handshake).await
            {
                events.member_is_unfit(lease.member(), &error);
                continue;
            }
            return Some(Self {
                link,
                lease,
                orderly: false,
            });
        }
        None
    }

    /// Closes in order.
    pub(super) fn close(mut self) {
        self.orderly = true;
        if let Stream::Tls(stream) = &mut self.link.stream {
            // A goodbye that does not go out at once is not worth waiting for.
            let mut cx = Context::from_waker(Waker::noop());
            let _ = Pin::new(stream).poll_shutdown(&mut cx);
        }
    }
}

impl Link {
    /// What was agreed with the member.
    pub(super) fn tls(&self) -> Option<TlsFacts> {
        match &self.stream {
            Stream::Tls(stream) => agreed(stream.get_ref().1),
            Stream::Plain(_) | Stream::Gone => None,
        }
    }

    /// Connects a member for a client, and tells it who that is where it wants to know.
    pub(super) async fn open(address: SocketAddr, origin: &Origin<'_>) -> Option<Self> {
        let connect = source::connect(address, &origin.service.source, origin.client.ip());
        let limit = origin.service.sessions.timeouts.connect;
        Self::prepared(address, limit, connect, origin.header.as_deref()).await
    }

    /// Connects a member for the box itself.
    pub(super) async fn open_own(
        address: SocketAddr,
        header: ProxyHeader,
        limit: Duration,
    ) -> Option<Self> {
        let connect = source::connect_own(address);
        let header = header::own(header);
        Self::prepared(address, limit, connect, header.as_deref()).await
    }

    async fn prepared(
        address: SocketAddr,
        limit: Duration,
        connect: impl Future<Output = io::Result<(TcpStream, Option<Use>)>>,
        header: Option<&[u8]>,
    ) -> Option<Self> {
        let opened = async {
            let (mut tcp, source) = connect.await?;
            tcp.set_nodelay(true)?;
            if let Some(header) = header {
                tcp.write_all(header).await?;
            }
            Ok::<_, io::Error>(Self {
                stream: Stream::Plain(tcp),
                address,
                _source: source,
            })
        };
        timeout(limit, opened).await.ok()?.ok()
    }

    /// Shakes hands; on failure nothing is left but to drop it.
    pub(super) async fn secure(&mut self, tls: &MemberTls, limit: Duration) -> io::Result<()> {
        let Stream::Plain(tcp) = std::mem::replace(&mut self.stream, Stream::Gone) else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let name = tls.name_of(self.address.ip());
        let handshake = TlsConnector::from(tls.config.clone()).connect(name, tcp);
        let stream = timeout(limit, handshake).await.map_err(|_| {
            io::Error::new(io::ErrorKind::TimedOut, format!("no TLS within {limit:?}"))
        })??;
        let mut stream = Box::new(stream);
        stream.get_mut().1.set_buffer_limit(Some(UNSENT));
        self.stream = Stream::Tls(stream);
        Ok(())
    }

    /// How many bytes TLS has taken and not sent; they are thrown away.
    #[cfg(test)]
    pub(super) fn unsent(&mut self) -> usize {
        let mut bytes = Vec::new();
        if let Stream::Tls(stream) = &mut self.stream {
            while stream.get_ref().1.wants_write() {
                stream.get_mut().1.write_tls(&mut bytes).unwrap();
            }
        }
        bytes.len()
    }

    /// The box's address towards the member.
    pub(super) fn own(&self) -> IpAddr {
        let own = self.tcp().and_then(|tcp| tcp.local_addr().ok());
        own.map_or(Ipv4Addr::UNSPECIFIED.into(), |own| own.ip())
    }

    /// The stream, if what is written to it goes out as it is.
    pub(super) fn plain(&self) -> Option<&TcpStream> {
        match &self.stream {
            Stream::Plain(tcp) => Some(tcp),
            Stream::Tls(_) | Stream::Gone => None,
        }
    }

    fn tcp(&self) -> Option<&TcpStream> {
        match &self.stream {
            Stream::Plain(tcp) => Some(tcp),
            Stream::Tls(stream) => Some(stream.get_ref().0),
            Stream::Gone => None,
        }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if let (false, Some(tcp)) = (self.orderly, self.link.tcp()) {
            // A stream that is gone already needs no reset.
            let _ = tcp.set_zero_linger();
        }
    }
}

/// What a member is told of a client first: who it is, what it connected to, and its TLS.
pub(super) fn introduction(
    version: ProxyHeader,
    (client, local): (SocketAddr, SocketAddr),
    id: SessionId,
    stream: &ClientStream,
) -> Option<Vec<u8>> {
    match version {
        ProxyHeader::None => None,
        ProxyHeader::V1 => Some(header::v1(client, local)),
        ProxyHeader::V2 => {
            let id = id.to_string();
            let written = |secured: Option<&header::Secured<'_>>| {
                header::v2(&header::Client {
                    source: client,
                    destination: local,
                    unique_id: &id,
                    secured,
                })
            };
            Some(stream.with_secured(written))
        }
    }
}

impl AsyncRead for Link {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(tcp) => Pin::new(tcp).poll_read(cx, out),
            Stream::Tls(stream) => Pin::new(stream).poll_read(cx, out),
            Stream::Gone => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

impl AsyncWrite for Link {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Stream::Plain(tcp) => Pin::new(tcp).poll_write(cx, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Gone => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().stream {
            Stream::Plain(tcp) => Pin::new(tcp).poll_write_vectored(cx, parts),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
            Stream::Gone => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Gone => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Gone => Poll::Ready(Ok(())),
        }
    }
}
