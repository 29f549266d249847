//! TCP beneath TLS: large reads, and a look at the first bytes.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// Bytes asked of the kernel at once; the TLS library asks for 4 KiB.
const READ: usize = 64 * 1024;

thread_local! {
    /// One per worker: an idle connection holds no buffer.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ]);
}

/// A TCP stream that reads ahead.
#[derive(Debug)]
pub(super) struct Wire {
    tcp: TcpStream,
    ahead: Vec<u8>,
    at: usize,
}

impl Wire {
    pub(super) fn new(tcp: TcpStream) -> Self {
        Self {
            tcp,
            ahead: Vec::new(),
            at: 0,
        }
    }

    /// The stream whose bytes come next, unless some were read ahead.
    pub(super) fn waiting(&self) -> Result<&TcpStream, Ahead> {
        match self.at < self.ahead.len() {
            true => Err(Ahead),
            false => Ok(&self.tcp),
        }
    }

    /// Waits for the first bytes and says what they begin; they stay to be read.
    ///
    /// # Errors
    /// The stream broke, or ended first.
    pub(super) async fn opening(&mut self) -> io::Result<Opening> {
        let mut first = [0; OPENING];
        let mut have = 0;
        while have < first.len() {
            match self.tcp.read(&mut first[have..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => have += count,
            }
            let known = [HANDSHAKE, 3, first[2], first[3], first[4], CLIENT_HELLO];
            let known = &known[..have.min(6)];
            if first[..known.len()] != *known {
                return Ok(Opening::Other);
            }
        }
        self.ahead = first.to_vec();
        // A ClientHello may come in records so short that the version is not in the first.
        let whole = u16::from_be_bytes([first[3], first[4]]) >= VERSION_END;
        let version = [first[9], first[10]];
        match whole && version < TLS12 {
            true => Ok(Opening::OldTls(version)),
            false => Ok(Opening::Handshake),
        }
    }
}

/// Bytes were read and not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ahead;

/// What a stream begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opening {
    /// A TLS handshake.
    Handshake,
    /// A ClientHello for TLS 1.1 or older; its version.
    OldTls([u8; 2]),
    /// No TLS.
    Other,
}

/// The record header, the handshake header and the version (RFC 8446 §5.1, §4, §4.1.2), in octets.
const OPENING: usize = 5 + 4 + 2;
/// The handshake header and the version, in octets.
const VERSION_END: u16 = 4 + 2;
/// RFC 8446 §5.1, `ContentType`.
const HANDSHAKE: u8 = 22;
/// RFC 8446 §4, `HandshakeType`.
const CLIENT_HELLO: u8 = 1;
/// TLS 1.2 and, by its compatibility, 1.3.
const TLS12: [u8; 2] = [3, 3];

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.at < self.ahead.len() {
            let count = out.remaining().min(self.ahead.len() - self.at);
            out.put_slice(&self.ahead[self.at..self.at + count]);
            self.at += count;
            if self.at == self.ahead.len() {
                (self.ahead, self.at) = (Vec::new(), 0);
            }
            return Poll::Ready(Ok(()));
        }
        if out.remaining() >= READ {
            return Pin::new(&mut self.tcp).poll_read(cx, out);
        }
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            ready!(Pin::new(&mut self.tcp).poll_read(cx, &mut buffer))?;
            let (now, later) = buffer
                .filled()
                .split_at(out.remaining().min(buffer.filled().len()));
            out.put_slice(now);
            self.ahead = later.to_vec();
            Poll::Ready(Ok(()))
        })
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tcp).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}
