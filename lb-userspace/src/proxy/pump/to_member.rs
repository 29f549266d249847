//! What goes to the member.

use std::{
    io::IoSlice,
    pin::Pin,
    task::{Context, Poll},
    time::Instant,
};

use tokio::io::AsyncWrite as _;

use super::{
    super::{client::ClientStream, splice::SPLICED_FROM},
    Pump, take_front,
};

impl Pump {
    /// Does the member lack what was taken from the client?
    pub(super) fn member_lacks(&mut self) -> bool {
        let unsent = self.member_unflushed || self.splice.holds();
        unsent || self.member_deaf || !self.session.to_member().is_empty()
    }

    /// Moves octets of a chunk past the machine, which only counts them, while the member lacks nothing. `None` when the
    /// client has to be read.
    pub(super) fn splice_chunk(&mut self, cx: &mut Context<'_>) -> Option<bool> {
        let left = self.session.unseen();
        let (ClientStream::Plain(client), Some(member)) = (&self.client, &self.member) else {
            return None;
        };
        if left < SPLICED_FROM || self.member_deaf || member.link.plain().is_none() {
            return None;
        }
        let Poll::Ready(filled) = self.splice.poll_fill(cx, client, left) else {
            return Some(false);
        };
        self.session.take_unseen(filled?, Instant::now());
        self.send_to_member(cx);
        Some(true)
    }

    /// Hands over what is held of a chunk; true when something moved.
    fn send_spliced(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        while self.splice.holds() {
            let member = self.member.as_ref();
            let Some(tcp) = member.and_then(|member| member.link.plain()) else {
                self.splice.clear();
                break;
            };
            match self.splice.poll_drain(cx, tcp) {
                Poll::Ready(Ok(count)) => {
                    self.moved.to_member += count as u64;
                    self.stalls.member_took();
                    moved = true;
                }
                Poll::Ready(Err(_)) => return self.deafen_member(),
                Poll::Pending => break,
            }
        }
        moved
    }

    /// It has closed, or its connection broke. A refusal may have come before that: it is lost when that is read, too.
    fn deafen_member(&mut self) -> bool {
        self.member_deaf = true;
        self.member_unflushed = false;
        self.splice.clear();
        self.session.to_member().clear();
        true
    }

    /// Sends what is queued for the member and content behind it; queues what it does not take.
    pub(super) fn pass(&mut self, cx: &mut Context<'_>, verbatim: &[u8]) {
        let mut sent = 0;
        while sent < verbatim.len() {
            let Some(member) = self.member.as_mut().filter(|_| !self.member_deaf) else {
                self.session.to_member().clear();
                return;
            };
            let queue = self.session.to_member();
            let parts = [IoSlice::new(queue), IoSlice::new(&verbatim[sent..])];
            match Pin::new(&mut member.link).poll_write_vectored(cx, &parts) {
                Poll::Ready(Ok(count)) => {
                    self.member_unflushed = true;
                    let queued = count.min(queue.len());
                    queue.drain(..queued);
                    sent += count - queued;
                    self.moved.to_member += count as u64;
                }
                Poll::Ready(Err(_)) => {
                    self.deafen_member();
                    return;
                }
                Poll::Pending => {
                    queue.extend_from_slice(&verbatim[sent..]);
                    return;
                }
            }
        }
        self.send_to_member(cx);
    }

    pub(super) fn send_to_member(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = self.send_spliced(cx);
        if self.splice.holds() {
            return moved;
        }
        while !self.session.to_member().is_empty() {
            let Some(member) = self.member.as_mut().filter(|_| !self.member_deaf) else {
                self.session.to_member().clear();
                break;
            };
            let queue = self.session.to_member();
            match Pin::new(&mut member.link).poll_write(cx, queue) {
                Poll::Ready(Ok(count)) => {
                    take_front(queue, count);
                    self.member_unflushed = true;
                    self.moved.to_member += count as u64;
                    self.stalls.member_took();
                    moved = true;
                }
                Poll::Ready(Err(_)) => return self.deafen_member(),
                Poll::Pending => break,
            }
        }
        if self.member_unflushed {
            let flushed = match &mut self.member {
                Some(member) => Pin::new(&mut member.link).poll_flush(cx),
                None => Poll::Ready(Ok(())),
            };
            match flushed {
                Poll::Ready(Ok(())) => self.member_unflushed = false,
                Poll::Ready(Err(_)) => return self.deafen_member(),
                Poll::Pending => {}
            }
        }
        moved
    }
}
