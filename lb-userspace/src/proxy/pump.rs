//! Moves bytes between the client, the machine and the member: one poll function, no tasks, and no
//! buffer that an idle session would hold.

mod to_member;

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead as _, AsyncWrite as _, ReadBuf},
    time::{Sleep, sleep_until},
};

use lb_common::stats::TrafficCell;

use super::{
    client::{ClientStream, Waiting},
    live::Entry,
    splice::Splice,
    stall::{Held, Stalls, Stuck},
    upstream::Upstream,
};
use crate::smtp::{
    approach::Fault,
    end::End,
    session::{Action, Session},
    timeouts::Timeouts,
};

/// Most bytes of a client handled at once: several TLS records, one write to the member.
const CLIENT_READ: usize = 64 * 1024;
/// Most bytes of a member read at once.
const MEMBER_READ: usize = 16 * 1024;
/// Replies that may wait for a client that does not read; the member waits beyond.
const MAX_UNREAD: usize = 8 * 1024;
/// Bytes moved before the counters are told.
const COUNT_EVERY: u64 = 64 * 1024;
/// What a drained queue may keep for the next bytes.
const KEPT: usize = 512;

thread_local! {
    /// One per worker.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; CLIENT_READ]);
}

/// One session's ends and its machine.
#[derive(Debug)]
pub(super) struct Pump {
    pub(super) session: Session,
    pub(super) client: ClientStream,
    pub(super) member: Option<Upstream>,
    pub(super) moved: Moved,
    /// How long a peer may leave our bytes.
    send: Duration,
    /// Octets of a chunk, on their way to the member ahead of all that is queued for it.
    splice: Splice,
    /// Bytes of the client that the machine left behind.
    backlog: Vec<u8>,
    backlog_at: usize,
    client_ended: bool,
    unflushed: bool,
    /// TLS towards the member holds what its socket did not take.
    member_unflushed: bool,
    /// The member takes nothing any more; what it has said is still to be heard.
    member_deaf: bool,
    stalls: Stalls,
    timer: Pin<Box<Sleep>>,
    armed: Instant,
    entry: Arc<Entry>,
    cell: &'static TrafficCell,
    counted: Moved,
    /// When the client's greeting was queued.
    pub(super) greeted: Option<Instant>,
    /// Is a client looked at that talks before?
    pub(super) watch_early: bool,
}

/// Bytes of SMTP that reached their peer.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Moved {
    pub(super) to_member: u64,
    pub(super) to_client: u64,
}

impl Moved {
    fn all(self) -> u64 {
        self.to_member + self.to_client
    }
}

/// What the pump cannot do alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// Any member, or one that was not tried.
    Connect {
        afresh: bool,
    },
    StartTls,
    /// The client did not wait for its greeting, which is queued.
    Early,
    SecureMember,
    Complain(Fault),
    Close(End),
}

impl Pump {
    pub(super) fn new(
        session: Session,
        client: ClientStream,
        timeouts: Timeouts,
        entry: Arc<Entry>,
        cell: &'static TrafficCell,
    ) -> Self {
        let armed = Instant::now() + timeouts.command;
        Self {
            session,
            client,
            member: None,
            moved: Moved::default(),
            send: timeouts.send,
            splice: Splice::default(),
            backlog: Vec::new(),
            backlog_at: 0,
            client_ended: false,
            unflushed: false,
            member_unflushed: false,
            member_deaf: false,
            stalls: Stalls::default(),
            timer: Box::pin(sleep_until(armed.into())),
            armed,
            entry,
            cell,
            counted: Moved::default(),
            greeted: None,
            watch_early: false,
        }
    }

    /// Moves bytes until something else is due. Safe to drop at any await.
    pub(super) async fn turn(&mut self) -> Turn {
        poll_fn(|cx| self.poll_turn(cx)).await
    }

    /// Sends what is queued for the client, within the time for sending.
    pub(super) async fn flush_client(&mut self) {
        let limit = self.send;
        let flushed = poll_fn(|cx| {
            self.send_to_client(cx);
            if self.session.to_client().is_empty() && !self.unflushed {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        });
        if tokio::time::timeout(limit, flushed).await.is_err() {
            self.session.client_stuck();
        }
    }

    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Turn> {
        loop {
            let mut moved = self.send_to_member(cx);
            while let Some(action) = self.session.poll_action() {
                match action {
                    Action::Connect { afresh } => return Poll::Ready(Turn::Connect { afresh }),
                    Action::StartTls => return Poll::Ready(Turn::StartTls),
                    Action::SecureMember => return Poll::Ready(Turn::SecureMember),
                    Action::Complain(fault) => return Poll::Ready(Turn::Complain(fault)),
                    Action::AbortMember => self.abort_member(),
                    Action::Close(end) => return Poll::Ready(Turn::Close(end)),
                }
            }
            moved |= self.send_to_client(cx);
            self.note_stalls();
            moved |= self.read_member(cx);
            if self.session.is_greeted() {
                self.greeted = Some(Instant::now());
                if self.watch_early && self.talks_early() {
                    return Poll::Ready(Turn::Early);
                }
            }
            moved |= self.read_client(cx);
            if !moved && !self.expire(cx) {
                self.entry.set_phase(self.session.phase());
                if self.moved.all() >= self.counted.all() + COUNT_EVERY {
                    self.count();
                }
                return Poll::Pending;
            }
        }
    }

    fn talks_early(&self) -> bool {
        let plain = matches!(self.client, ClientStream::Plain(_));
        let held = self.backlog_at < self.backlog.len();
        plain && (held || matches!(self.client.waiting(), Waiting::Bytes))
    }

    fn read_client(&mut self, cx: &mut Context<'_>) -> bool {
        if self.member_lacks() || self.session.to_client().len() > MAX_UNREAD {
            return false;
        }
        if self.backlog_at < self.backlog.len() {
            let backlog = std::mem::take(&mut self.backlog);
            let used = self.offer(cx, &backlog[self.backlog_at..]);
            self.backlog_at += used;
            if self.backlog_at < backlog.len() {
                self.backlog = backlog;
            } else {
                self.backlog_at = 0;
            }
            return used > 0;
        }
        if self.client_ended {
            return false;
        }
        if let Some(moved) = self.splice_chunk(cx) {
            return moved;
        }
        SCRATCH.with_borrow_mut(|scratch| match self.client.poll_fill(cx, scratch) {
            Poll::Pending => false,
            Poll::Ready(Ok(0)) => {
                self.client_ended = true;
                self.session.client_closed(Instant::now());
                true
            }
            Poll::Ready(Ok(count)) => {
                let used = self.offer(cx, &scratch[..count]);
                self.backlog = scratch[used..count].to_vec();
                self.backlog_at = 0;
                true
            }
            Poll::Ready(Err(error)) => {
                self.client_ended = true;
                if error.kind() == io::ErrorKind::UnexpectedEof {
                    // TLS without a goodbye: no more than FIN says.
                    self.session.client_closed(Instant::now());
                } else {
                    self.session.client_broken();
                }
                true
            }
        })
    }

    /// What has arrived by now, the client sent before it could hear that its DATA is refused.
    fn look_behind_refusal(&mut self) {
        if self.session.is_data_refused() && matches!(self.client.waiting(), Waiting::Bytes) {
            self.session.content_follows();
        }
    }

    /// Offers bytes to the machine as long as it takes them and the member takes what comes of it.
    fn offer(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> usize {
        let mut used = 0;
        while used < bytes.len() {
            let taken = self.session.handle_client(&bytes[used..], Instant::now());
            let verbatim = &bytes[used..][taken.verbatim];
            used += taken.consumed;
            self.pass(cx, verbatim);
            self.look_behind_refusal();
            if taken.consumed == 0 || !self.session.to_member().is_empty() || self.member_unflushed
            {
                break;
            }
        }
        used
    }

    fn send_to_client(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        while !self.session.to_client().is_empty() {
            let queue = self.session.to_client();
            match Pin::new(&mut self.client).poll_write(cx, queue) {
                Poll::Ready(Ok(count)) => {
                    take_front(queue, count);
                    self.moved.to_client += count as u64;
                    self.unflushed = true;
                    self.stalls.client_took();
                    moved = true;
                }
                Poll::Ready(Err(_)) => return self.lose_client(),
                Poll::Pending => break,
            }
        }
        if self.unflushed {
            match Pin::new(&mut self.client).poll_flush(cx) {
                Poll::Ready(Ok(())) => self.unflushed = false,
                Poll::Ready(Err(_)) => return self.lose_client(),
                Poll::Pending => {}
            }
        }
        moved
    }

    fn read_member(&mut self, cx: &mut Context<'_>) -> bool {
        if self.session.to_client().len() > MAX_UNREAD {
            return false;
        }
        SCRATCH.with_borrow_mut(|scratch| {
            let Some(member) = &mut self.member else {
                return false;
            };
            let mut buffer = ReadBuf::new(&mut scratch[..MEMBER_READ]);
            match Pin::new(&mut member.link).poll_read(cx, &mut buffer) {
                Poll::Pending => return false,
                Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {
                    self.session.handle_member(buffer.filled(), Instant::now());
                    self.look_behind_refusal();
                }
                Poll::Ready(_) => self.lose_member(),
            }
            true
        })
    }

    /// Tells the counters what was moved since they were told last.
    pub(super) fn count(&mut self) {
        let to_member = self.moved.to_member - self.counted.to_member;
        let to_client = self.moved.to_client - self.counted.to_client;
        self.counted = self.moved;
        self.cell.count_session_bytes(to_member, to_client);
        if let Some(member) = &self.member {
            member.lease.count_bytes(to_member, to_client);
        }
    }

    /// Lets the member go in order.
    pub(super) fn release_member(&mut self) {
        self.count();
        self.member_unflushed = false;
        // A member that lacks octets of a chunk must not see an orderly end.
        let whole = !self.splice.clear();
        if let Some(member) = self.member.take().filter(|_| whole) {
            member.close();
        }
    }

    /// Ends the session where it stands, when nobody goes on with it: what is queued reaches nobody.
    pub(super) fn abandon(&mut self) -> End {
        self.session.abandon();
        self.session.to_client().clear();
        loop {
            match self.session.poll_action() {
                Some(Action::Close(end)) => return end,
                Some(Action::AbortMember) => self.abort_member(),
                Some(_) => {}
                None => return End::Cut,
            }
        }
    }

    fn abort_member(&mut self) {
        self.count();
        self.member = None;
        self.member_unflushed = false;
        self.member_deaf = false;
        self.splice.clear();
        // Whoever comes next must not hear what was meant for another.
        self.session.to_member().clear();
    }

    fn lose_member(&mut self) {
        self.abort_member();
        self.session.member_closed(Instant::now());
    }

    fn lose_client(&mut self) -> bool {
        self.session.to_client().clear();
        self.unflushed = false;
        self.client_ended = true;
        self.session.client_broken();
        true
    }

    fn note_stalls(&mut self) {
        let held = Held {
            for_client: !self.session.to_client().is_empty() || self.unflushed,
            for_member: self.member_lacks(),
            unread: self.session.to_client().len() > MAX_UNREAD,
        };
        if self.stalls.note(held, self.session.awaits_member()) {
            self.session.unblocked(Instant::now());
        }
    }

    /// Whether a limit has passed and something came of it.
    fn expire(&mut self, cx: &mut Context<'_>) -> bool {
        let stuck = self.stalls.due(self.send);
        let own = match self.stalls.excuse() {
            true => self.session.search_deadline(),
            false => self.session.deadline(),
        };
        let first = stuck.map(|(due, _)| due).into_iter().chain(own).min();
        let Some(due) = first else { return false };
        loop {
            if due < self.armed || self.timer.is_elapsed() {
                self.timer.as_mut().reset(due.into());
                self.armed = due;
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return false;
            }
            let now = Instant::now();
            if now < due {
                continue;
            }
            match stuck.filter(|(due, _)| *due <= now) {
                None => self.session.handle_timeout(now),
                Some((_, Stuck::Member)) => {
                    self.abort_member();
                    self.session.member_stuck();
                }
                Some((_, Stuck::Client)) => self.session.client_stuck(),
            }
            return true;
        }
    }
}

fn take_front(queue: &mut Vec<u8>, count: usize) {
    if count < queue.len() {
        queue.drain(..count);
    } else if queue.capacity() > KEPT {
        *queue = Vec::new();
    } else {
        queue.clear();
    }
}
