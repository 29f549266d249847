//! The member's bytes.

use std::time::Instant;

use super::{Action, Client, ClientSecurity, Expect, Hello, Member, Pending, Session};
use crate::{
    model::StartTls,
    smtp::{
        body::Body,
        capability::{Capabilities, Filter},
        command::Verb,
        end::End,
        reply::{Local, Reply, ReplyParser},
    },
};

const NO_MEMBER: Local = Local::new(421, "4.3.2", "No mail server available");
const LOST: Local = Local::new(421, "4.4.2", "Connection to the mail server was lost");
const LOST_IN_MESSAGE: Local = Local::new(451, "4.4.2", "Connection to the mail server was lost");
const GOODBYE: Local = Local::new(221, "2.0.0", "Bye");

impl Session {
    /// The member that was asked for is connected.
    pub fn member_connected(&mut self, now: Instant) {
        if self.member == Member::Absent {
            self.replies = ReplyParser::new();
            self.member = Member::Greeting {
                relay: self.facts.last_code == 0,
            };
            self.rest(now);
        }
    }

    /// A member could not be connected, or was not to be asked now.
    pub fn member_missed(&mut self) {
        self.member_missed = true;
    }

    /// No member is left.
    ///
    /// The client hears what the last of them said; a permanent refusal only where all agree on it.
    pub fn no_member(&mut self) {
        let unheard = self.facts.last_code == 0;
        let refusal = self.refusal.take();
        match refusal.filter(|reply| unheard && (reply.is_transient() || !self.member_missed)) {
            Some(reply) => {
                self.pass(&reply);
                self.close_now(None, End::NoMember);
            }
            None => self.close_now(Some(NO_MEMBER), End::NoMember),
        }
    }

    /// Takes bytes from the member.
    pub fn handle_member(&mut self, input: &[u8], now: Instant) {
        let mut input = input;
        while matches!(self.member, Member::Greeting { .. } | Member::Ready) {
            match self.replies.push(std::mem::take(&mut input)) {
                Ok(None) => break,
                Ok(Some(reply)) => self.take_reply(&reply, now),
                Err(_) => self.lose_member(End::MemberProtocol),
            }
        }
        self.settle(now);
    }

    /// The member closed, or its connection broke.
    pub fn member_closed(&mut self, now: Instant) {
        match self.member {
            Member::Greeting { .. } | Member::Ready => self.lose_member(End::MemberClosed),
            Member::Absent | Member::Gone => {}
        }
        self.settle(now);
    }

    /// The member did not take our bytes in time.
    pub fn member_stuck(&mut self) {
        self.lose_member(End::SendTimeout);
    }

    /// Another member, before anything of the client's reached this one, which may have refused.
    pub(super) fn pass_over(&mut self, refusal: Option<&Reply>) {
        match refusal {
            Some(reply) if !self.refusal.as_ref().is_some_and(Reply::is_transient) => {
                self.refusal = Some(reply.clone());
            }
            Some(_) => {}
            None => self.member_missed = true,
        }
        self.member = Member::Absent;
        self.actions.push_back(Action::Connect);
    }

    fn take_reply(&mut self, reply: &Reply, now: Instant) {
        if let Member::Greeting { relay } = self.member {
            return self.take_greeting(reply, relay, now);
        }
        match self.queue.pop_front() {
            Some(Pending::Member(expect)) => self.take_answer(expect, reply),
            // A reply to nothing: every later one would answer the wrong command.
            Some(Pending::Local(..)) | None => return self.lose_member(End::MemberProtocol),
        }
        self.rest(now);
        self.flush_local();
    }

    fn take_greeting(&mut self, reply: &Reply, relay: bool, now: Instant) {
        if reply.code != 220 || self.replies.has_rest() {
            let refuses = reply.code >= 400 && !self.replies.has_rest();
            return self.pass_over(refuses.then_some(reply));
        }
        self.member = Member::Ready;
        self.refusal = None;
        if relay {
            self.greeted = true;
            self.pass(reply);
        }
        self.rest(now);
    }

    fn take_answer(&mut self, expect: Expect, reply: &Reply) {
        let last_asked = self.queue.is_empty();
        if last_asked {
            self.hold = false;
        }
        if reply.code == 421 {
            self.pass(reply);
            return self.close_now(None, End::MemberUnavailable);
        }
        match expect {
            Expect::Command(verb) => self.take_command_answer(verb, reply),
            Expect::Exchange => self.take_auth_answer(reply),
            Expect::EndOfData => self.end_message(reply),
            Expect::Chunk { last } => {
                let early = last_asked && matches!(self.client, Client::Chunk(_));
                if reply.code < 400 && (early || !reply.is_positive()) {
                    return self.lose_member(End::MemberProtocol);
                }
                if last {
                    self.end_message(reply);
                } else {
                    self.pass(reply);
                }
            }
        }
    }

    fn take_command_answer(&mut self, verb: Verb, reply: &Reply) {
        self.budget.answered(verb, reply.code);
        match verb {
            Verb::Data => return self.take_data_answer(reply),
            Verb::Auth | Verb::Other => return self.take_auth_answer(reply),
            _ if (300..400).contains(&reply.code) => {
                return self.lose_member(End::MemberProtocol);
            }
            Verb::Ehlo if reply.is_positive() => return self.take_ehlo_answer(reply),
            _ => {}
        }
        self.pass(reply);
        let done = reply.is_positive();
        match verb {
            Verb::Helo if done => {
                self.hello = Some(Hello::Helo);
                self.capabilities = Capabilities::default();
                self.transaction = false;
            }
            Verb::Mail if done => self.transaction = true,
            Verb::Rcpt if done => self.facts.recipients += 1,
            Verb::Rset => {
                self.transaction = false;
                self.chunked = self.awaits_chunk();
            }
            Verb::Quit => self.close_now(None, End::Quit),
            _ => {}
        }
    }

    fn take_ehlo_answer(&mut self, reply: &Reply) {
        let offer_starttls = self.is_before_border();
        let required = self.security == ClientSecurity::StartTls(StartTls::Require);
        let filter = Filter {
            offer_starttls,
            hide_auth: required && !self.tls,
            carries_requiretls: false,
        };
        self.capabilities = Capabilities::of(reply);
        self.hello = Some(Hello::Ehlo);
        self.transaction = false;
        self.facts.starttls_offered |= offer_starttls;
        filter.write(reply, &mut self.to_client);
        self.facts.last_code = reply.code;
    }

    fn take_data_answer(&mut self, reply: &Reply) {
        if reply.code != 354 && reply.code < 400 {
            // Neither a yes nor a no: the client might send content, and we take it for commands.
            return self.lose_member(End::MemberProtocol);
        }
        self.pass(reply);
        if reply.code == 354 {
            self.client = Client::Content(Body::default());
        } else {
            self.refuse_data(self.backlog);
        }
    }

    fn take_auth_answer(&mut self, reply: &Reply) {
        match reply.code {
            334 => self.client = Client::Exchange,
            300..400 => return self.lose_member(End::MemberProtocol),
            _ => {}
        }
        self.pass(reply);
    }

    fn end_message(&mut self, reply: &Reply) {
        if (300..400).contains(&reply.code) {
            return self.lose_member(End::MemberProtocol);
        }
        self.pass(reply);
        self.transaction = false;
        self.chunked = self.awaits_chunk();
        if reply.is_positive() {
            self.facts.messages += 1;
            self.budget.delivered();
        }
    }

    /// Was BDAT sent behind what is answered now? It begins a message that is not over.
    fn awaits_chunk(&self) -> bool {
        let mut asked = self.queue.iter();
        asked.any(|pending| matches!(pending, Pending::Member(Expect::Chunk { .. })))
    }

    /// The member's own words.
    fn pass(&mut self, reply: &Reply) {
        self.to_client.extend_from_slice(reply.raw());
        self.facts.last_code = reply.code;
    }

    /// The member is lost: before its greeting the next is tried, later the client is told.
    fn lose_member(&mut self, end: End) {
        if matches!(self.member, Member::Greeting { .. }) {
            return self.pass_over(None);
        }
        let reply = if self.is_within_message() || self.awaits(Expect::EndOfData) {
            LOST_IN_MESSAGE
        } else if self.awaits(Expect::Command(Verb::Quit)) {
            return self.close_now(Some(GOODBYE), End::Quit);
        } else {
            LOST
        };
        self.close_now(Some(reply), end);
    }
}
