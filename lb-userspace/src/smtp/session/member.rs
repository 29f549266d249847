//! The member's bytes.

use std::{net::IpAddr, time::Instant};

use super::{Action, Client, ClientSecurity, Expect, Held, Hello, Member, Pending, Session};
use crate::{
    model::StartTls,
    smtp::{
        approach::{Approach, Next},
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
    ///
    /// `own`: the box's address towards it.
    pub fn member_connected(&mut self, own: IpAddr, now: Instant) {
        if self.member == Member::Absent {
            self.replies = ReplyParser::new();
            self.approach = Some(Box::new(Approach::new(*self.plan, own)));
            (self.member_greeted, self.stale) = (false, false);
            self.switch.member_connected();
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
    /// The client hears what the last of them said, for its greeting or for the answer to its EHLO; a permanent refusal
    /// only where all agree on it.
    pub fn no_member(&mut self) {
        let held = self.held.as_deref().map(|held| held.verb);
        let awaited = self.facts.last_code == 0 || matches!(held, Some(Verb::Ehlo | Verb::Helo));
        let refusal = self.refusal.take();
        match refusal.filter(|reply| awaited && (reply.is_transient() || !self.member_missed)) {
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
        while matches!(
            self.member,
            Member::Greeting { .. } | Member::Preparing | Member::Ready
        ) && !self.is_securing()
        {
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
            Member::Greeting { .. } | Member::Preparing | Member::Ready => {
                self.lose_member(End::MemberClosed);
            }
            Member::Absent | Member::Gone => {}
        }
        self.settle(now);
    }

    /// The handshake with the member is done; its certificate is what it has to be.
    pub fn member_secured(&mut self, now: Instant) {
        if let Some(approach) = self.approach.as_mut().filter(|it| it.is_securing()) {
            // Capabilities and whatever else came in clear are worth nothing now.
            self.replies = ReplyParser::new();
            let next = approach.secured();
            self.follow(next, now);
        }
        self.settle(now);
    }

    /// The handshake with the member has failed: never in plaintext, but elsewhere.
    pub fn member_insecure(&mut self) {
        if self.is_securing() {
            self.pass_over(None);
        }
    }

    pub(super) fn is_securing(&self) -> bool {
        self.approach.as_ref().is_some_and(|it| it.is_securing())
    }

    /// The member did not take our bytes in time.
    pub fn member_stuck(&mut self) {
        self.lose_member(End::SendTimeout);
    }

    /// Another member, before anything of the client's reached this one, which may have refused.
    pub(super) fn pass_over(&mut self, refusal: Option<&Reply>) {
        match refusal {
            Some(reply)
                if !self
                    .refusal
                    .as_ref()
                    .is_some_and(|known| known.is_transient()) =>
            {
                self.refusal = Some(Box::new(reply.clone()));
            }
            Some(_) => {}
            None => self.member_missed = true,
        }
        self.member = Member::Absent;
        self.approach = None;
        self.to_member.clear();
        self.actions.push_back(Action::Connect { afresh: false });
    }

    /// A member greets: its words are the client's now. Of the others it is known whether they might serve later.
    fn forget_refusal(&mut self) {
        let refusal = self.refusal.take();
        self.member_missed |= refusal.is_some_and(|reply| reply.is_transient());
    }

    fn take_reply(&mut self, reply: &Reply, now: Instant) {
        if matches!(self.member, Member::Greeting { .. } | Member::Preparing) {
            return self.take_preparation(reply, now);
        }
        match self.queue.pop_front() {
            Some(Pending::Member(expect)) => self.take_answer(expect, reply),
            // A reply to nothing: every later one would answer the wrong command.
            Some(Pending::Local(..)) | None => return self.lose_member(End::MemberProtocol),
        }
        self.rest(now);
        self.flush_local();
    }

    fn take_preparation(&mut self, reply: &Reply, now: Instant) {
        let rest = self.replies.has_rest();
        let Some(approach) = &mut self.approach else {
            return;
        };
        let hello = self.switch.due().or(self.held.as_deref());
        let hello = hello.map(|hello| (hello.verb, hello.arguments()));
        let next = approach.take(reply, rest, hello, &mut self.to_member);
        match (self.member, next) {
            (_, Next::Fault(fault)) if fault.is_refusal() => {
                return self.pass_over((reply.code >= 400).then_some(reply));
            }
            (Member::Greeting { relay }, _) if !matches!(next, Next::Fault(_)) => {
                self.forget_refusal();
                if relay {
                    // Whatever is still to be settled with the member: nothing in it depends on that.
                    self.greeted = true;
                    self.pass(reply);
                }
            }
            _ => {}
        }
        if next == Next::Answered && self.switch.due().is_some() {
            let next = self.replayed(reply);
            return self.follow(next, now);
        }
        self.follow(next, now);
        if next == Next::Answered {
            self.answer_held(reply);
        }
    }

    fn follow(&mut self, next: Next, now: Instant) {
        self.member = Member::Preparing;
        self.rest(now);
        match next {
            Next::Reply => {}
            Next::Secure => self.actions.push_back(Action::SecureMember),
            Next::Ready if self.replays() => {}
            Next::Ready | Next::Answered => {
                self.member = Member::Ready;
                self.sought = None;
                self.approach.take_if(|approach| !approach.has_more());
                if next == Next::Ready
                    && let Some(held) = self.held.take()
                {
                    self.send(&held.line, held.verb);
                }
            }
            Next::Fault(fault) => {
                self.actions.push_back(Action::Complain(fault));
                self.pass_over(None);
            }
        }
    }

    /// The member said without XCLIENT what the client wants to hear.
    fn answer_held(&mut self, reply: &Reply) {
        if let Some(held) = self.held.take() {
            self.take_command_answer(held.verb, reply);
        }
    }

    /// Sends a command to the member, once that knows who speaks.
    pub(super) fn send(&mut self, line: &[u8], verb: Verb) {
        if matches!(verb, Verb::Ehlo | Verb::Helo) {
            self.member_greeted = true;
            self.switch.ask(line, verb);
            let held = || {
                let line = line.to_vec();
                Some(Box::new(Held { line, verb }))
            };
            if let Some(approach) = self.approach.as_mut().filter(|it| it.has_more()) {
                self.held = held();
                let name = Held::arguments_of(line);
                approach.probe(name, &mut self.to_member);
                self.member = Member::Preparing;
                return;
            }
            if std::mem::take(&mut self.stale) {
                self.again = held();
            }
        }
        // What is to be answered by one member must not be overtaken by the switch to another.
        let hold = !(verb.may_be_followed() && self.capabilities.pipelining);
        self.forward(line, Expect::Command(verb), hold || self.switch.is_open());
    }

    /// Must the client introduce itself before this, since the member has to hear who it is, or the one of the other
    /// pool that this leads to?
    pub(super) fn is_unknown_to_member(&self, verb: Verb) -> bool {
        let idle = matches!(verb, Verb::Noop | Verb::Rset | Verb::Help | Verb::Quit);
        let unknown = self.approach.as_ref().is_some_and(|it| it.has_more());
        !idle && (unknown || self.plan.xclient.is_some() && self.switch.is_nameless())
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
                self.budget.answered(Verb::Bdat, reply.code);
                if last {
                    self.end_message(reply);
                } else {
                    self.pass(reply);
                }
            }
        }
    }

    fn take_command_answer(&mut self, verb: Verb, reply: &Reply) {
        if let Some(again) = self.again.take()
            && reply.is_permanent()
        {
            // Some know one EHLO per connection, and STARTTLS was ours, not theirs.
            self.held = Some(again);
            return self.renew_member();
        }
        self.budget.answered(verb, reply.code);
        if matches!(verb, Verb::Ehlo | Verb::Helo) {
            self.switch.answered(reply.is_positive());
        }
        match verb {
            Verb::Data => return self.take_data_answer(reply),
            Verb::Auth | Verb::Other => return self.take_auth_answer(reply),
            _ if (300..400).contains(&reply.code) => {
                return self.lose_member(End::MemberProtocol);
            }
            Verb::Ehlo if reply.is_positive() => return self.take_ehlo_answer(reply),
            Verb::Helo if reply.is_positive() => return self.take_helo_answer(reply),
            _ => {}
        }
        self.pass(reply);
        let done = reply.is_positive();
        match verb {
            Verb::Mail if done => (self.transaction, self.recipients) = (true, 0),
            Verb::Rcpt if done => {
                self.facts.recipients += 1;
                self.recipients += 1;
            }
            Verb::Rset if done => {
                self.end_transaction();
                self.chunked = self.awaits_chunk();
            }
            Verb::Quit => self.close_now(None, End::Quit),
            _ => {}
        }
    }

    fn take_ehlo_answer(&mut self, reply: &Reply) {
        let offer_starttls = self.is_before_border();
        let required = self.security == ClientSecurity::StartTls(StartTls::Require);
        let also = self.switch.offers();
        let filter = Filter {
            also: also.as_deref(),
            offer_starttls,
            hide_auth: required && !self.tls,
            carries_requiretls: self.carries_requiretls(),
        };
        self.capabilities = Capabilities::of(reply);
        self.hello = Some(Hello::Ehlo);
        self.end_transaction();
        self.facts.starttls_offered |= offer_starttls;
        filter.write(reply, &mut self.to_client);
        self.facts.last_code = reply.code;
    }

    /// A list behind the first line is for those who know EHLO, and nobody has filtered it.
    fn take_helo_answer(&mut self, reply: &Reply) {
        let name = reply.lines().next().unwrap_or_default();
        let code = format!("{} ", reply.code);
        self.to_client.extend_from_slice(code.as_bytes());
        self.to_client.extend_from_slice(name);
        self.to_client.extend_from_slice(b"\r\n");
        self.facts.last_code = reply.code;
        self.hello = Some(Hello::Helo);
        self.capabilities = Capabilities::default();
        self.end_transaction();
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
        self.end_transaction();
        self.chunked = self.awaits_chunk();
        if reply.is_positive() {
            self.facts.messages += 1;
            self.budget.delivered();
        }
    }

    pub(super) fn end_transaction(&mut self) {
        (self.transaction, self.recipients) = (false, 0);
    }

    /// Was BDAT sent behind what is answered now? It begins a message that is not over.
    fn awaits_chunk(&self) -> bool {
        let mut asked = self.queue.iter();
        asked.any(|pending| matches!(pending, Pending::Member(Expect::Chunk { .. })))
    }

    /// RFC 8689 §4.2.1: both ways are TLS, and the member's name is proven.
    pub(super) fn carries_requiretls(&self) -> bool {
        self.tls && self.member_verified
    }

    /// The member's own words.
    fn pass(&mut self, reply: &Reply) {
        self.to_client.extend_from_slice(reply.raw());
        self.facts.last_code = reply.code;
    }

    /// The member is lost: before its greeting the next is tried, later the client is told.
    fn lose_member(&mut self, end: End) {
        if matches!(self.member, Member::Greeting { .. } | Member::Preparing) {
            return self.pass_over(None);
        }
        if self.awaits(Expect::Command(Verb::Quit)) {
            return self.close_now(Some(GOODBYE), End::Quit);
        }
        // Before it has said 354 to DATA, there is no message.
        let begun = self.is_within_message() || self.chunked || self.awaits(Expect::EndOfData);
        let reply = if begun { LOST_IN_MESSAGE } else { LOST };
        self.close_now(Some(reply), end);
    }
}
