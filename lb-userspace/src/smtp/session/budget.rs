//! What a session may spend without delivering anything.

use crate::smtp::{
    command::{Chunk, Verb},
    timeouts::DATA_BLOCK,
};

/// Commands that we or the member could not make sense of, per session.
pub(super) const MAX_ERRORS: u32 = 20;
/// Commands that move no message, between two messages.
pub(super) const MAX_IDLE: u32 = 100;
/// Recipients, DATA and chunks that the member refused, between two messages: somebody is guessing addresses.
pub(super) const MAX_REFUSED: u32 = 200;
/// Recipients that the member did not want yet, between two messages: greylisting does that to every one of several
/// long lists.
pub(super) const MAX_DEFERRED: u32 = 1000;

/// A session's account.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Budget {
    errors: u32,
    idle: u32,
    refused: u32,
    deferred: u32,
}

impl Budget {
    /// A command was refused here.
    pub(super) fn error(&mut self) {
        self.errors += 1;
    }

    /// A command goes to the member.
    pub(super) fn command(&mut self, verb: Verb) {
        if !matches!(verb, Verb::Rcpt | Verb::Data | Verb::Bdat | Verb::Quit) {
            self.idle += 1;
        }
    }

    /// A chunk goes to the member. So little of a message is no progress, not by a command of its own, either.
    pub(super) fn chunk(&mut self, chunk: Chunk) {
        if chunk.size == 0 || !chunk.last && chunk.size < DATA_BLOCK as u64 {
            self.idle += 1;
        }
    }

    /// The member answered a command.
    pub(super) fn answered(&mut self, verb: Verb, code: u16) {
        match verb {
            // Of one message many may be on their way before the first is refused.
            Verb::Bdat if code >= 400 => self.refused += 1,
            _ if (500..=504).contains(&code) => self.errors += 1,
            Verb::Rcpt if code >= 500 => self.refused += 1,
            Verb::Rcpt if code >= 400 => self.deferred += 1,
            Verb::Data if code >= 400 => self.refused += 1,
            _ => {}
        }
    }

    /// The member accepted a message.
    pub(super) fn delivered(&mut self) {
        (self.idle, self.refused, self.deferred) = (0, 0, 0);
    }

    /// Is any of it used up?
    pub(super) fn is_spent(&self) -> bool {
        self.errors > MAX_ERRORS
            || self.idle > MAX_IDLE
            || self.refused > MAX_REFUSED
            || self.deferred > MAX_DEFERRED
    }
}
