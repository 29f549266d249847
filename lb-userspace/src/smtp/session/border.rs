//! The border between plaintext and TLS (RFC 3207 §4).

use std::time::Instant;

use super::{Action, Border, Client, ClientSecurity, Hello, Session};
use crate::smtp::{capability::Capabilities, end::End, line::Lines, reply::Local};

const READY: Local = Local::new(220, "2.0.0", "Ready to start TLS");
const ALREADY: Local = Local::new(503, "5.5.1", "TLS is already in use");
const NOT_OFFERED: Local = Local::new(502, "5.5.1", "STARTTLS is not offered");
const EHLO_FIRST: Local = Local::new(503, "5.5.1", "Send EHLO first");
const NO_PARAMETERS: Local = Local::new(501, "5.5.4", "STARTTLS takes no parameters");
const INJECTION: Local = Local::new(554, "5.5.1", "Protocol error: data behind STARTTLS");

impl Session {
    /// Says 220: whatever the client sends from here on is TLS. False when it is not to be.
    ///
    /// The shell calls it when it has seen that nothing arrived behind STARTTLS so far; what arrives
    /// later and is no ClientHello, it must not take for one.
    pub fn open_border(&mut self, now: Instant) -> bool {
        if !matches!(self.client, Client::Border(Border::Due)) {
            return false;
        }
        self.say(READY);
        self.client = Client::Border(Border::Open);
        self.rest(now);
        true
    }

    /// Is it the client's turn to shake hands?
    pub fn awaits_handshake(&self) -> bool {
        matches!(self.client, Client::Border(Border::Open))
    }

    /// The client's TLS is established: everything said before is forgotten (RFC 3207 §4.2).
    pub fn tls_established(&mut self, now: Instant) {
        if !matches!(self.client, Client::Border(Border::Open)) {
            return;
        }
        self.tls = true;
        let switched = self.is_switched();
        self.switch.close();
        self.facts.starttls_used = true;
        self.client = Client::Command;
        self.lines = Lines::default();
        self.hello = None;
        self.capabilities = Capabilities::default();
        self.end_transaction();
        if std::mem::take(&mut self.chunked) {
            // An orderly end within a message could be taken for its end.
            self.actions.push_back(Action::AbortMember);
        }
        self.rest(now);
        if std::mem::take(&mut self.tainted) || switched {
            // RSET would clear the envelope but no AUTH state: only a new connection knows nothing. And it may be a member
            // for clients that stay in plaintext.
            self.renew_member();
        } else {
            self.stale = self.member_greeted;
        }
        self.settle(now);
    }

    /// The handshake failed; the shell knows why.
    pub fn tls_failed(&mut self, end: End) {
        self.close_now(None, end);
    }

    /// Is the client in plaintext where it could be in TLS?
    pub(super) fn is_before_border(&self) -> bool {
        matches!(self.security, ClientSecurity::StartTls(_)) && !self.tls
    }

    /// Did the client cross the border and not introduce itself again?
    pub(super) fn is_unintroduced(&self) -> bool {
        self.facts.starttls_used && self.hello.is_none()
    }

    /// The client said STARTTLS; `alone` says that nothing came with it.
    pub(super) fn starttls(&mut self, arguments: &[u8], alone: bool) {
        match self.security {
            _ if self.tls => return self.refuse(ALREADY),
            ClientSecurity::None => return self.refuse(NOT_OFFERED),
            ClientSecurity::Implicit | ClientSecurity::StartTls(_) => {}
        }
        if self.hello != Some(Hello::Ehlo) {
            self.refuse(EHLO_FIRST);
        } else if !arguments.is_empty() {
            self.refuse(NO_PARAMETERS);
        } else {
            self.client = Client::Border(Border::Asked);
            if !alone {
                self.refuse_injection();
            }
        }
    }

    /// Bytes came between STARTTLS and the handshake.
    pub(super) fn refuse_injection(&mut self) {
        self.finish(INJECTION, End::StartTlsInjection);
    }
}
