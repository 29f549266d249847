//! The client's bytes.

use std::time::Instant;

use super::{
    Action, Border, Client, ClientSecurity, Expect, MAX_QUEUE, Member, Pending, Session, Taken,
};
use crate::{
    model::{LineEndings, StartTls},
    smtp::{
        body::{Body, Found},
        capability::is_carried,
        command::{Command, Verb},
        end::End,
        line::Line,
        reply::Local,
        timeouts::DATA_BLOCK,
    },
};

const BAD_LINE: Local = Local::new(500, "5.5.2", "Bare CR, bare LF or NUL in a command");
const BAD_VERB: Local = Local::new(500, "5.5.2", "Command not recognized");
const LONG_LINE: Local = Local::new(500, "5.5.2", "Line too long");
const BAD_CHUNK: Local = Local::new(501, "5.5.4", "BDAT needs a size");
const NO_CHUNKING: Local = Local::new(503, "5.5.1", "CHUNKING is not offered");
const TLS_FIRST: Local = Local::new(530, "5.7.0", "Must issue a STARTTLS command first");
const NO_MAIL: Local = Local::new(503, "5.5.1", "Send MAIL first");
const HELLO_FIRST: Local = Local::new(503, "5.5.1", "Send EHLO first");
const FORGED: Local = Local::new(550, "5.7.1", "Not accepted from a client");
/// RFC 8689 §4.2.4: the way to the member cannot keep the promise.
const NOT_CARRIED: Local = Local::new(530, "5.7.30", "REQUIRETLS is not supported on this path");
/// RFC 4954 §4.
const NO_MECHANISM: Local = Local::new(504, "5.5.4", "Mechanism is not supported on this path");
const UNCARRIED: Local = Local::new(502, "5.5.1", "Command not implemented");
const BAD_EXCHANGE: Local = Local::new(501, "5.5.2", "Malformed authentication response");
const BAD_CONTENT: Local = Local::new(
    554,
    "5.6.0",
    "Message refused: bare CR, bare LF or NUL in its content",
);
/// RFC 5321 §4.5.3.1.10: the client sends the message to those that it has, and to the others in another transaction.
const TOO_MANY: Local = Local::new(452, "4.5.3", "Too many recipients");
const SPENT: Local = Local::new(421, "4.7.0", "Too many errors");

impl Session {
    /// Takes bytes from the client.
    pub fn handle_client(&mut self, input: &[u8], now: Instant) -> Taken {
        let mut at = 0;
        let mut verbatim = 0..0;
        let mut mended = false;
        while at < input.len() && verbatim.is_empty() && !mended {
            let rest = &input[at..];
            let used = match &mut self.client {
                Client::Command | Client::Exchange => {
                    let Some(used) = self.take_line(rest, now) else {
                        break;
                    };
                    used
                }
                Client::Content(_) => {
                    let (used, clean) = self.take_content(rest, now);
                    verbatim = at..at + clean;
                    // What was written in its place has to go before more is.
                    mended = clean < used && matches!(self.client, Client::Content(_));
                    used
                }
                Client::Chunk(left) => {
                    let used = rest.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    self.take_octets(used, now);
                    verbatim = at..at + used;
                    used
                }
                Client::DiscardChunk(left) => {
                    let used = rest.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    *left -= used as u64;
                    if *left == 0 {
                        self.client = Client::Command;
                    }
                    self.advance(used, now);
                    used
                }
                Client::Discard(body, end) => {
                    let (used, ended) = body.discard(rest);
                    if ended {
                        match end.take() {
                            Some((reply, end)) => self.finish(reply, end),
                            None => self.client = Client::Command,
                        }
                        self.rest(now);
                    } else {
                        self.advance(used, now);
                    }
                    used
                }
                Client::Border(Border::Asked | Border::Due) => {
                    self.refuse_injection();
                    rest.len()
                }
                Client::Border(Border::Open) => {
                    // Too late for words: the client waits for our ServerHello.
                    self.close_now(None, End::StartTlsInjection);
                    rest.len()
                }
                Client::Closed => rest.len(),
            };
            at += used;
            self.flush_local();
        }
        self.backlog = at < input.len();
        self.settle(now);
        Taken {
            consumed: at,
            verbatim,
        }
    }

    /// How many octets of the present chunk may go to the member without being offered here; 0 outside of a chunk, and
    /// while other bytes have to go first.
    pub fn unseen(&self) -> u64 {
        match self.client {
            Client::Chunk(left) if !self.backlog && self.to_member.is_empty() => left,
            _ => 0,
        }
    }

    /// So many of [`Self::unseen`] were taken from the client.
    pub fn take_unseen(&mut self, octets: usize, now: Instant) {
        self.take_octets(octets, now);
        self.settle(now);
    }

    /// Octets of a chunk came in.
    fn take_octets(&mut self, octets: usize, now: Instant) {
        if let Client::Chunk(left) = &mut self.client {
            *left = left.saturating_sub(octets as u64);
            if *left == 0 {
                self.client = Client::Command;
            }
        }
        self.advance(octets, now);
    }

    /// Was DATA just refused? The shell then looks for bytes of the client, before it sends the
    /// refusal: such bytes are no answer to it, and [`Session::content_follows`].
    pub fn is_data_refused(&mut self) -> bool {
        std::mem::take(&mut self.data_refused)
    }

    /// What the client sends next is content that nobody wants.
    pub fn content_follows(&mut self) {
        if matches!(self.client, Client::Command) {
            // Lines behind it are commands again.
            self.behind_refusal = false;
            self.client = Client::Discard(Body::default(), None);
        }
    }

    /// DATA must end a group (RFC 2920 §3.1): what came behind it is content, not commands.
    pub(super) fn refuse_data(&mut self, content: bool) {
        match content {
            true => self.content_follows(),
            false => (self.data_refused, self.behind_refusal) = (true, true),
        }
    }

    /// The client will send no more, or is gone.
    pub fn client_closed(&mut self, now: Instant) {
        self.client_eof = true;
        match self.client {
            Client::Content(_) | Client::Chunk(_) if !self.backlog => {
                self.close_now(None, End::ClientAborted);
            }
            Client::Border(_) => self.close_now(None, End::ClientClosed),
            _ => self.settle(now),
        }
    }

    /// The client's connection broke: nothing can be said to it any more.
    pub fn client_broken(&mut self) {
        let end = if self.has_open_message() {
            End::ClientAborted
        } else {
            End::ClientClosed
        };
        self.close_now(None, end);
    }

    /// The client did not take our bytes in time.
    pub fn client_stuck(&mut self) {
        self.close_now(None, End::SendTimeout);
    }

    /// A reply of ours, in its turn.
    pub(super) fn refuse(&mut self, reply: Local) {
        self.budget.error();
        self.queue.push_back(Pending::Local(reply, None));
        self.check_budget();
    }

    /// A reply of ours, in its turn, that ends the session.
    pub(super) fn finish(&mut self, reply: Local, end: End) {
        self.note_end();
        self.client = Client::Closed;
        self.queue.push_back(Pending::Local(reply, Some(end)));
    }

    fn check_budget(&mut self) {
        if self.budget.is_spent() && !matches!(self.client, Client::Closed) {
            self.finish(SPENT, End::TooManyErrors);
        }
    }

    /// `None` while no command may be read.
    fn take_line(&mut self, rest: &[u8], now: Instant) -> Option<usize> {
        let full = self.queue.len() >= MAX_QUEUE;
        if self.hold || full || self.member != Member::Ready || self.is_last_message() {
            let early_hello = !self.tls && self.lines.is_at_start() && rest.starts_with(&[0x16, 3]);
            if early_hello && self.queue.is_empty() {
                self.close_now(None, End::ClientHelloInClear);
            }
            return None;
        }
        let exchange = matches!(self.client, Client::Exchange);
        let (used, line) = self.lines.next(rest, exchange);
        let alone = used == rest.len();
        match line {
            None => return Some(used),
            Some(Line::ClientHello) if !self.tls => self.close_now(None, End::ClientHelloInClear),
            Some(Line::TooLong) => self.finish(LONG_LINE, End::LineTooLong),
            Some(Line::ClientHello | Line::BareControl) if exchange => {
                self.finish(BAD_EXCHANGE, End::ClientProtocol);
            }
            Some(Line::ClientHello | Line::BareControl) => self.refuse(BAD_LINE),
            Some(Line::Complete(line)) if exchange => {
                self.client = Client::Command;
                self.forward(&line, Expect::Exchange, true);
            }
            Some(Line::Complete(line)) => {
                let behind_refusal = std::mem::take(&mut self.behind_refusal);
                match Command::parse(&line) {
                    Ok(command) => self.take_command(&line, command, alone),
                    Err(_) if behind_refusal && is_field(&line) => self.content_follows(),
                    Err(_) => self.refuse(BAD_VERB),
                }
            }
        }
        self.rest(now);
        Some(used)
    }

    fn take_command(&mut self, line: &[u8], command: Command<'_>, alone: bool) {
        let verb = command.verb;
        let required = self.security == ClientSecurity::StartTls(StartTls::Require);
        let refusal = match verb {
            Verb::StartTls => return self.starttls(command.arguments, alone),
            Verb::Http => return self.finish(BAD_VERB, End::ClientProtocol),
            Verb::Forged => Some(FORGED),
            Verb::Uncarried => Some(UNCARRIED),
            _ if required && !self.tls && !verb.is_served_before_tls() => Some(TLS_FIRST),
            Verb::Ehlo | Verb::Helo => None,
            _ if self.is_unknown_to_member(verb) => Some(HELLO_FIRST),
            _ if !verb.is_served_before_tls() && self.is_unintroduced() => Some(HELLO_FIRST),
            Verb::Mail if command.has_parameter(b"REQUIRETLS") && !self.carries_requiretls() => {
                Some(NOT_CARRIED)
            }
            Verb::Auth if !is_carried(command.mechanism()) => Some(NO_MECHANISM),
            Verb::Bdat if self.switch.is_open() => Some(NO_MAIL),
            Verb::Bdat if !self.capabilities.chunking => Some(NO_CHUNKING),
            _ => None,
        };
        if verb == Verb::Bdat {
            return self.take_bdat(command, refusal);
        }
        if let Some(refusal) = refusal {
            self.refuse(refusal);
            if verb == Verb::Data {
                self.refuse_data(!alone);
            }
            return;
        }
        if verb == Verb::Rcpt && self.is_full() {
            self.budget.answered(verb, TOO_MANY.code);
            self.queue.push_back(Pending::Local(TOO_MANY, None));
            return self.check_budget();
        }
        self.budget.command(verb);
        self.check_budget();
        if matches!(self.client, Client::Closed) {
            return;
        }
        match verb {
            Verb::Ehlo | Verb::Helo => self.remember(command.arguments),
            Verb::Noop | Verb::Quit | Verb::Help | Verb::Lookup | Verb::Rset => {}
            _ => self.tainted = true,
        }
        if !self.switches(line, verb) {
            self.send(line, verb);
        }
    }

    /// Octets follow the line, whoever answers it.
    fn take_bdat(&mut self, command: Command<'_>, refusal: Option<Local>) {
        let Ok(chunk) = command.chunk() else {
            // Nobody knows where the next command starts.
            return self.finish(refusal.unwrap_or(BAD_CHUNK), End::ClientProtocol);
        };
        if let Some(refusal) = refusal {
            self.refuse(refusal);
            if chunk.size > 0 && matches!(self.client, Client::Command) {
                self.client = Client::DiscardChunk(chunk.size);
            }
            return;
        }
        self.budget.chunk(chunk);
        self.check_budget();
        if matches!(self.client, Client::Closed) {
            return;
        }
        self.tainted = true;
        self.chunked = true;
        chunk.write(&mut self.to_member);
        self.queue
            .push_back(Pending::Member(Expect::Chunk { last: chunk.last }));
        self.hold = !self.capabilities.pipelining;
        if chunk.size > 0 {
            self.client = Client::Chunk(chunk.size);
        }
    }

    pub(super) fn forward(&mut self, line: &[u8], expect: Expect, hold: bool) {
        self.to_member.extend_from_slice(line);
        self.to_member.extend_from_slice(b"\r\n");
        self.queue.push_back(Pending::Member(expect));
        // Only the answers tell how much room is left, and whether this begins another transaction.
        self.hold = hold || self.is_full();
    }

    /// Has the transaction its recipients, or will have, if the member accepts all that it was asked for?
    fn is_full(&self) -> bool {
        let most = self.max_recipients as usize;
        let rcpt = |it: &&Pending| matches!(it, Pending::Member(Expect::Command(Verb::Rcpt)));
        most > 0 && self.recipients as usize + self.queue.iter().filter(rcpt).count() >= most
    }

    fn take_content(&mut self, rest: &[u8], now: Instant) -> (usize, usize) {
        let Client::Content(body) = &mut self.client else {
            return (0, 0);
        };
        let before = *body;
        let mut scan = body.scan(rest);
        if scan.found != Found::BareControl {
            if before.holds_cr() {
                self.to_member.push(b'\r');
            }
        } else if self.line_endings == LineEndings::Normalize {
            *body = before;
            scan = body.mend(rest, &mut self.to_member);
            self.mended = true;
        }
        match scan.found {
            Found::Nothing => self.advance(scan.used, now),
            Found::End => {
                self.client = Client::Command;
                self.facts.normalized += u32::from(std::mem::take(&mut self.mended));
                self.queue.push_back(Pending::Member(Expect::EndOfData));
                self.hold = true;
                self.rest(now);
            }
            Found::BareControl => {
                // The member must not take what it has for a message.
                let body = *body;
                self.client = Client::Discard(body, Some((BAD_CONTENT, End::BareControl)));
                self.member = Member::Gone;
                self.to_member.clear();
                self.actions.push_back(Action::AbortMember);
                self.rest(now);
            }
        }
        (scan.used, scan.clean)
    }

    /// Content came in: enough of it starts the wait anew.
    fn advance(&mut self, octets: usize, now: Instant) {
        self.progress += octets;
        if self.progress >= DATA_BLOCK {
            self.rest(now);
        }
    }

    fn remember(&mut self, name: &[u8]) {
        // RFC 1035 §2.3.4 bounds names; an address literal or a lie needs no more.
        self.facts.helo = Some(name[..name.len().min(255)].into());
    }
}

/// Is it a header field (RFC 5322 §2.2), as a message begins with?
fn is_field(line: &[u8]) -> bool {
    let name = line
        .iter()
        .position(|byte| !byte.is_ascii_graphic() || *byte == b':');
    name.is_some_and(|at| at > 0 && line[at] == b':')
}
