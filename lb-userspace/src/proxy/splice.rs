//! Octets that nobody looks at, from socket to socket by splice(2): they do not pass through this process.
//!
//! Between the sockets is a pipe of the kernel. A session has one only while octets lie in it, that is while its member does
//! not take them; an empty one serves the next session of the worker. Where none is to be had, as at the limit of
//! descriptors, or where the kernel refuses, nothing has moved and the octets go the usual way.

use std::{
    cell::Cell,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    task::{Context, Poll, ready},
};

use rustix::{
    io::retry_on_intr,
    pipe::{PipeFlags, SpliceFlags, pipe_with, splice},
};
use tokio::{io::Interest, net::TcpStream};

/// Fewer octets than this are read and written with what follows them: two system calls either way.
pub(super) const SPLICED_FROM: u64 = 64 * 1024;
/// Most octets in a pipe: it has 16 slots, and each holds a piece of what a socket has received, of up to 32 KiB.
const MOST: u64 = 256 * 1024;

thread_local! {
    /// One per worker.
    static SPARE: Cell<Option<Pipe>> = const { Cell::new(None) };
}

/// Pipes at once: no session may lack a descriptor because of them, and the kernel gives a user 1024 with all their slots
/// (`fs.pipe-user-pages-soft`).
const MOST_PIPES: usize = 128;

/// How many there are.
static PIPES: AtomicUsize = AtomicUsize::new(0);

/// Both ends; with octets in it, it is only good for who put them there.
#[derive(Debug)]
struct Pipe {
    out: OwnedFd,
    into: OwnedFd,
}

impl Pipe {
    fn take() -> Option<Self> {
        if let spare @ Some(_) = SPARE.take() {
            return spare;
        }
        if PIPES.load(Relaxed) >= MOST_PIPES {
            return None;
        }
        let (out, into) = pipe_with(PipeFlags::NONBLOCK | PipeFlags::CLOEXEC).ok()?;
        PIPES.fetch_add(1, Relaxed);
        Some(Self { out, into })
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        PIPES.fetch_sub(1, Relaxed);
    }
}

/// What a session has on its way from one socket to the other.
#[derive(Debug, Default)]
pub(super) struct Splice {
    pipe: Option<Pipe>,
    /// Octets in it: none without a pipe.
    held: usize,
}

type Taken = Poll<Option<usize>>;
type Count = Poll<io::Result<usize>>;

impl Splice {
    /// Does the receiver lack something?
    pub(super) fn holds(&self) -> bool {
        self.held > 0
    }

    /// Throws away what the receiver lacks; was there anything?
    pub(super) fn clear(&mut self) -> bool {
        std::mem::take(self).holds()
    }

    /// Takes at most so many octets from a socket, while none are held. `None` when they have to be read, as an end or an
    /// error has.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>, from: &TcpStream, most: u64) -> Taken {
        let Some(pipe) = Pipe::take() else {
            return Poll::Ready(None);
        };
        let (ready, most) = ((from, Interest::READABLE), most.min(MOST) as usize);
        match poll_move(cx, ready, (from, &pipe.into), most) {
            Poll::Ready(Ok(count @ 1..)) => {
                (self.pipe, self.held) = (Some(pipe), count);
                Poll::Ready(Some(count))
            }
            empty => {
                SPARE.set(Some(pipe));
                empty.map(|_| None)
            }
        }
    }

    /// Hands over what is held, as much as the socket takes: how many octets. An error is the receiver's.
    pub(super) fn poll_drain(&mut self, cx: &mut Context<'_>, to: &TcpStream) -> Count {
        let Some(pipe) = &self.pipe else {
            return Poll::Ready(Ok(0));
        };
        let ready = (to, Interest::WRITABLE);
        let count = ready!(poll_move(cx, ready, (&pipe.out, to), self.held))?;
        if count == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        #[cfg(test)]
        SPLICED.fetch_add(count, Relaxed);
        self.held -= count;
        if self.held == 0 {
            SPARE.set(self.pipe.take());
        }
        Poll::Ready(Ok(count))
    }
}

/// Octets that all sessions have handed over.
#[cfg(test)]
pub(super) static SPLICED: AtomicUsize = AtomicUsize::new(0);

/// Moves octets once the socket is ready. The pipe never is what is waited for: it is empty when it is filled, and holds
/// all that is asked of it when it is drained.
fn poll_move(
    cx: &mut Context<'_>,
    (socket, interest): (&TcpStream, Interest),
    (from, to): (impl AsFd, impl AsFd),
    most: usize,
) -> Count {
    loop {
        // Counts against the task's budget: nobody splices on and on while others wait.
        match interest.is_readable() {
            true => ready!(socket.poll_read_ready(cx))?,
            false => ready!(socket.poll_write_ready(cx))?,
        }
        let call = || splice(&from, None, &to, None, most, SpliceFlags::NONBLOCK);
        match socket.try_io(interest, || Ok(retry_on_intr(call)?)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            moved => return Poll::Ready(moved),
        }
    }
}
