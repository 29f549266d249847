//! What goes to the member.

use std::{
    io::IoSlice,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::AsyncWrite as _;

use super::{Pump, take_front};

impl Pump {
    /// Sends what is queued for the member and content behind it; queues what it does not take.
    pub(super) fn pass(&mut self, cx: &mut Context<'_>, verbatim: &[u8]) {
        let mut sent = 0;
        while sent < verbatim.len() {
            let Some(member) = &mut self.member else {
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
                Poll::Ready(Err(_)) => return self.lose_member(),
                Poll::Pending => {
                    queue.extend_from_slice(&verbatim[sent..]);
                    return;
                }
            }
        }
        self.send_to_member(cx);
    }

    pub(super) fn send_to_member(&mut self, cx: &mut Context<'_>) -> bool {
        let mut moved = false;
        while !self.session.to_member().is_empty() {
            let Some(member) = &mut self.member else {
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
                Poll::Ready(Err(_)) => {
                    self.lose_member();
                    return true;
                }
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
                Poll::Ready(Err(_)) => {
                    self.lose_member();
                    return true;
                }
                Poll::Pending => {}
            }
        }
        moved
    }
}
