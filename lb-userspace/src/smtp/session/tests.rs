//! The machine against scripted peers.

mod border;
mod dialogue;
mod endings;
mod hostile;
mod introduction;
mod limits;
mod random;

use std::{
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use super::{Action, ClientSecurity, Session, Terms};
use crate::{
    model::StartTls,
    smtp::{
        approach::{Fault, Plan},
        end::End,
        phase::Phase,
        timeouts::Timeouts,
    },
};

pub(super) const REQUIRE: ClientSecurity = ClientSecurity::StartTls(StartTls::Require);
pub(super) const ALLOW: ClientSecurity = ClientSecurity::StartTls(StartTls::Allow);

/// The box towards its members.
pub(super) const OWN: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));

/// An EHLO reply of a member that can do a lot.
pub(super) const CAPABLE: &str = "250-mx1\r\n250-PIPELINING\r\n250-CHUNKING\r\n250-AUTH PLAIN\r\n\
    250-STARTTLS\r\n250-XCLIENT NAME\r\n250 SIZE 1000\r\n";

/// A machine, what came out of it, and a clock that stands still unless told.
pub(super) struct Lab {
    pub(super) session: Session,
    pub(super) now: Instant,
    pub(super) client: Vec<u8>,
    pub(super) member: Vec<u8>,
    pub(super) connects: usize,
    pub(super) aborted: bool,
    pub(super) end: Option<End>,
    pub(super) border: bool,
    pub(super) securing: bool,
    pub(super) complaint: Option<Fault>,
    backlog: Vec<u8>,
}

impl Lab {
    /// A machine whose member is connected and has not spoken.
    pub(super) fn silent(terms: impl Into<Terms>) -> Self {
        let now = Instant::now();
        let mut lab = Self {
            session: Session::new(terms, Timeouts::DEFAULT, now),
            now,
            client: Vec::new(),
            member: Vec::new(),
            connects: 0,
            aborted: false,
            end: None,
            border: false,
            securing: false,
            complaint: None,
            backlog: Vec::new(),
        };
        lab.turn();
        lab.session.member_connected(OWN, now);
        lab
    }

    /// A machine behind the greeting.
    pub(super) fn new(terms: impl Into<Terms>) -> Self {
        let mut lab = Self::silent(terms);
        lab.says("220 mx1 ESMTP\r\n");
        assert_eq!(lab.heard(), "220 mx1 ESMTP\r\n");
        lab
    }

    /// A machine behind EHLO.
    pub(super) fn greeted(security: ClientSecurity) -> Self {
        let mut lab = Self::new(security);
        lab.ehlo();
        lab
    }

    /// The client says EHLO and the capable member answers.
    pub(super) fn ehlo(&mut self) {
        self.sends("EHLO c.example\r\n");
        assert_eq!(self.reached(), "EHLO c.example\r\n");
        self.says(CAPABLE);
        assert!(self.heard().starts_with("250-mx1\r\n"));
    }

    /// The client sends in one read.
    pub(super) fn sends(&mut self, bytes: impl AsRef<[u8]>) {
        self.backlog.extend_from_slice(bytes.as_ref());
        self.offer();
    }

    /// The member sends in one read.
    pub(super) fn says(&mut self, bytes: impl AsRef<[u8]>) {
        self.session.handle_member(bytes.as_ref(), self.now);
        self.offer();
    }

    /// Time passes.
    pub(super) fn wait(&mut self, time: Duration) {
        self.now += time;
        self.session.handle_timeout(self.now);
        self.turn();
    }

    /// What the client was sent since the last call.
    pub(super) fn heard(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.client)).into_owned()
    }

    /// What the member was sent since the last call.
    pub(super) fn reached(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.member)).into_owned()
    }

    /// One exchange: what the client sends reaches the member as it is, and so does the reply.
    pub(super) fn exchange(&mut self, command: &str, reply: &str) {
        self.sends(command);
        assert_eq!(self.reached(), command);
        self.says(reply);
        assert_eq!(self.heard(), reply);
    }

    /// One command that is answered here and reaches nobody.
    pub(super) fn refused(&mut self, command: &str, reply: &str) {
        self.sends(command);
        let heard = self.heard();
        assert!(heard.starts_with(reply), "{command:?} got {heard:?}");
        assert_eq!(self.reached(), "");
    }

    /// The client opens its side of the border and comes out in TLS.
    pub(super) fn cross(&mut self) {
        self.sends("STARTTLS\r\n");
        assert!(self.border, "no border");
        assert!(self.session.open_border(self.now));
        self.turn();
        assert!(self.heard().starts_with("220 "));
        self.session.tls_established(self.now);
        self.turn();
    }

    pub(super) fn phase(&self) -> Phase {
        self.session.phase()
    }

    /// Does what the shell does.
    pub(super) fn offer(&mut self) {
        loop {
            self.turn();
            let taken = self.session.handle_client(&self.backlog, self.now);
            self.member.append(self.session.to_member());
            self.member.extend_from_slice(&self.backlog[taken.verbatim]);
            self.backlog.drain(..taken.consumed);
            if taken.consumed == 0 || self.backlog.is_empty() {
                break;
            }
        }
        self.turn();
    }

    fn turn(&mut self) {
        self.client.append(self.session.to_client());
        self.member.append(self.session.to_member());
        while let Some(action) = self.session.poll_action() {
            match action {
                Action::Connect { .. } => self.connects += 1,
                Action::StartTls => self.border = true,
                Action::SecureMember => self.securing = true,
                Action::Complain(fault) => self.complaint = Some(fault),
                Action::AbortMember => self.aborted = true,
                Action::Close(end) => self.end = Some(end),
            }
        }
    }
}
