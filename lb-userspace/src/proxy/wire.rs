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

    /// Waits for the first bytes: do they begin a handshake record (RFC 8446 §5.1)?
    ///
    /// # Errors
    /// The stream broke, or ended first.
    pub(super) async fn starts_with_handshake(&mut self) -> io::Result<bool> {
        let mut first = [0; 2];
        let mut have = 0;
        while have < first.len() {
            match self.tcp.read(&mut first[have..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => have += count,
            }
            if first[0] != 0x16 {
                return Ok(false);
            }
        }
        self.ahead = first.to_vec();
        Ok(first[1] == 3)
    }
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
