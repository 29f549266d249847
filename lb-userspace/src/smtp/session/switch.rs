//! Clients that stay in plaintext get a member of another pool, at their first mail command: it is connected, hears the
//! client's EHLO again, then the command. Until then they were promised nothing that it lacks.

use std::sync::Arc;

use super::{Action, Held, Session};
use crate::smtp::{
    approach::{Fault, Next},
    capability::{Capabilities, Offers},
    command::Verb,
    reply::Reply,
};

/// How far it is; nothing where there is no other pool, or the client is in TLS.
#[derive(Debug)]
pub(super) struct Switch(Option<Box<Way>>);

#[derive(Debug, Default)]
struct Way {
    /// The client has decided.
    done: bool,
    /// What all members of the other pool announce.
    offers: Option<Arc<Offers>>,
    /// How the client introduced itself, since a member accepted it.
    hello: Option<Held>,
    /// How it does now; no member has answered.
    asked: Option<Held>,
    /// The other member has to hear it.
    due: bool,
}

impl Switch {
    pub(super) fn new(open: bool) -> Self {
        Self(open.then(Box::default))
    }

    /// May the client still choose?
    pub(super) fn is_open(&self) -> bool {
        self.0.as_ref().is_some_and(|way| !way.done)
    }

    /// The client is in TLS.
    pub(super) fn close(&mut self) {
        self.0 = None;
    }

    /// What the client may be promised; before it is known, nothing.
    pub(super) fn offers(&self) -> Option<Arc<Offers>> {
        let way = self.0.as_ref().filter(|way| !way.done)?;
        Some(way.offers.clone().unwrap_or_default())
    }

    /// A member was connected.
    pub(super) fn member_connected(&mut self) {
        if let Some(way) = &mut self.0 {
            way.due = way.done && way.hello.is_some();
        }
    }

    /// The introduction that the member has to hear before anything else.
    pub(super) fn due(&self) -> Option<&Held> {
        let way = self.0.as_ref().filter(|way| way.due)?;
        way.hello.as_ref()
    }

    /// The client introduces itself.
    pub(super) fn ask(&mut self, line: &[u8], verb: Verb) {
        if let Some(way) = self.0.as_mut().filter(|way| !way.done) {
            let line = line.to_vec();
            way.asked = Some(Held { line, verb });
        }
    }

    /// The member has answered: what it refused changes nothing (RFC 5321 §4.1.4), and no other shall hear it.
    pub(super) fn answered(&mut self, accepted: bool) {
        if let Some(way) = &mut self.0 {
            let asked = way.asked.take();
            way.hello = asked.filter(|_| accepted).or(way.hello.take());
        }
    }

    /// May the client still choose, and would the other member not hear who it is?
    pub(super) fn is_nameless(&self) -> bool {
        let way = self.0.as_ref().filter(|way| !way.done);
        way.is_some_and(|way| way.hello.is_none())
    }
}

impl Session {
    /// Is a member of the pool for plaintext wanted?
    pub fn is_switched(&self) -> bool {
        self.switch.0.as_ref().is_some_and(|way| way.done)
    }

    /// Every member of that pool announces this.
    pub fn limit_to(&mut self, offers: Arc<Offers>) {
        if let Some(way) = &mut self.switch.0 {
            way.offers = Some(offers);
        }
    }

    /// Does this command decide that the client stays in plaintext? It is held until the other member is ready.
    pub(super) fn switches(&mut self, line: &[u8], verb: Verb) -> bool {
        let Some(way) = self.switch.0.as_mut().filter(|way| !way.done) else {
            return false;
        };
        if verb.is_served_before_tls() {
            return false;
        }
        way.done = true;
        let line = line.to_vec();
        self.held = Some(Box::new(Held { line, verb }));
        self.renew_member();
        true
    }

    /// Begins to tell the member what the client said to the one before; false when nothing is left to tell.
    pub(super) fn replays(&mut self) -> bool {
        let (Some(hello), Some(approach)) = (self.switch.due(), &mut self.approach) else {
            return false;
        };
        match approach.has_more() {
            true => approach.probe(hello.arguments(), &mut self.to_member),
            false => approach.replay(&hello.line, &mut self.to_member),
        }
        self.member_greeted = true;
        true
    }

    /// The member has heard it; one that refuses it would refuse all that follows.
    pub(super) fn replayed(&mut self, reply: &Reply) -> Next {
        if reply.code != 250 {
            return Next::Fault(Fault::Hello);
        }
        let verb = self.switch.due().map(|hello| hello.verb);
        if let Some(way) = &mut self.switch.0 {
            way.due = false;
        }
        self.capabilities = match verb {
            Some(Verb::Ehlo) => Capabilities::of(reply),
            _ => Capabilities::default(),
        };
        Next::Ready
    }

    /// Another connection to a member, unseen by the client.
    pub(super) fn renew_member(&mut self) {
        self.member = super::Member::Absent;
        self.approach = None;
        self.stale = false;
        self.sought = None;
        // All are asked again.
        (self.refusal, self.member_missed) = (None, false);
        self.replies = crate::smtp::reply::ReplyParser::new();
        self.to_member.clear();
        self.actions.push_back(Action::Connect { afresh: true });
    }
}
