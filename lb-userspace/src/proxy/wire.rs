//! TCP beneath TLS: large reads, and a look at the first bytes.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
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
    haste: Haste,
}

/// How soon bytes have to leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Haste {
    /// At once: the handshake was not answered yet.
    Asked,
    /// At once, until the client has sent its last flight of TLS 1.3.
    Answered,
    /// What follows it are tickets, for which nobody waits: they may leave with the next words. Where none come, the
    /// kernel sends them after the time of a retransmission (`MSG_MORE`; 200 ms and a round trip).
    Unhurried,
    /// At once: the handshake is over.
    Shaken,
}

impl Wire {
    pub(super) fn new(tcp: TcpStream) -> Self {
        Self {
            tcp,
            ahead: Vec::new(),
            at: 0,
            haste: Haste::Asked,
        }
    }

    /// Every write leaves at once from here on.
    pub(super) fn end_handshake(&mut self) {
        self.haste = Haste::Shaken;
    }

    /// The stream whose bytes come next, unless some were read ahead.
    pub(super) fn waiting(&self) -> Result<&TcpStream, Ahead> {
        match self.at < self.ahead.len() {
            true => Err(Ahead),
            false => Ok(&self.tcp),
        }
    }

    /// Reads some more ahead; 0 at the end.
    fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            ready!(Pin::new(&mut self.tcp).poll_read(cx, &mut buffer))?;
            self.ahead.extend_from_slice(buffer.filled());
            Poll::Ready(Ok(buffer.filled().len()))
        })
    }

    /// Waits for the first bytes and says what they begin; they stay to be read.
    ///
    /// # Errors
    /// The stream broke, or ended first.
    pub(super) async fn opening(&mut self) -> io::Result<Opening> {
        let mut first = [0; OPENING];
        while self.ahead.len() < first.len() {
            if poll_fn(|cx| self.poll_ahead(cx)).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let have = self.ahead.len().min(first.len());
            first[..have].copy_from_slice(&self.ahead[..have]);
            let known = [HANDSHAKE, 3, first[2], first[3], first[4], CLIENT_HELLO];
            let known = &known[..have.min(6)];
            if first[..known.len()] != *known {
                return Ok(Opening::Other);
            }
        }
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
const APPLICATION_DATA: u8 = 23;
/// RFC 8446 §4, `HandshakeType`.
const CLIENT_HELLO: u8 = 1;
/// TLS 1.2 and, by its compatibility, 1.3.
const TLS12: [u8; 2] = [3, 3];

/// Does what a client sends begin with an encrypted record (RFC 8446 §5.2)? In a handshake only the last flight of TLS 1.3
/// does, behind a `change_cipher_spec` that some send (§D.4). Where a read begins within a record, it may seem so: one in
/// 2^24 does, and costs that client a moment.
fn is_last_flight(bytes: &[u8]) -> bool {
    let bytes = bytes.strip_prefix(&[20, 3, 3, 0, 1, 1]).unwrap_or(bytes);
    bytes.starts_with(&[APPLICATION_DATA, 3, 3])
}

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
            if self.haste == Haste::Answered && is_last_flight(buffer.filled()) {
                self.haste = Haste::Unhurried;
            }
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
        if self.haste == Haste::Unhurried {
            let more = || SockRef::from(&self.tcp).send_vectored_with_flags(parts, libc::MSG_MORE);
            loop {
                ready!(self.tcp.poll_write_ready(cx))?;
                match self.tcp.try_io(Interest::WRITABLE, more) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    sent => return Poll::Ready(sent),
                }
            }
        }
        let sent = ready!(Pin::new(&mut self.tcp).poll_write_vectored(cx, parts))?;
        if self.haste == Haste::Asked {
            self.haste = Haste::Answered;
        }
        Poll::Ready(Ok(sent))
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

#[cfg(test)]
mod tests {
    use super::is_last_flight;

    #[test]
    fn only_the_last_flight_of_tls13_begins_encrypted() {
        let spec = [20, 3, 3, 0, 1, 1];
        let with = |record: u8| [&spec[..], &[record, 3, 3, 0, 9]].concat();
        assert!(is_last_flight(&[23, 3, 3, 0, 9]));
        assert!(is_last_flight(&with(23)));
        // ClientHello, the last flights of TLS 1.2, a second ClientHello (RFC 8446 §4.1.2), an alert, an end.
        for bytes in [
            &[22, 3, 1, 2, 0][..],
            &with(22),
            &spec,
            &[21, 3, 3, 0, 2],
            &[],
        ] {
            assert!(!is_last_flight(bytes), "{bytes:?}");
        }
        // The second segment of a long ClientHello.
        assert!(!is_last_flight(&[23, 0x41, 0x99]));
    }
}
