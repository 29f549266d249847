//! One session: the machine between a client and its member.
//!
//! Inputs are bytes, ends of streams, what became of a connect or a handshake, and time. Outputs are
//! two byte queues, content that goes on as it came, and [`Action`]s. No socket, no clock.
//!
//! ```text
//! member:  Absent ──member_connected──▶ Greeting ──220──▶ Preparing ──▶ Ready ──first command──▶ Preparing: XCLIENT
//!             ▲  ◀──refused, late, not 220──┘◀──no TLS────────┘              │ lost: 4yz to the client, close
//!             └────────── border, when MAIL or AUTH came before it; the switch to the pool for plaintext
//! client:  Command ──DATA, 354──▶ Content ──CRLF.CRLF──▶ Command
//!             ├──BDAT──▶ Chunk ──size octets──▶ Command
//!             ├──334──▶ Exchange ──other reply──▶ Command
//!             ├──STARTTLS──▶ Border(Asked) ──220──▶ Border(Open) ──tls_established──▶ Command
//!             └──refusal with content on its way──▶ Discard ──its end──▶ Command, or closed
//! ```

mod border;
mod budget;
mod client;
mod member;
mod switch;
#[cfg(test)]
mod tests;
mod waits;

use std::{collections::VecDeque, ops::Range, time::Instant};

use self::{budget::Budget, switch::Switch};
use super::{
    approach::{Approach, Fault, Plan},
    body::Body,
    capability::Capabilities,
    command::{Command, Verb},
    end::End,
    line::Lines,
    phase::Phase,
    reply::{Local, Reply, ReplyParser},
    timeouts::Timeouts,
};
use crate::model::{LineEndings, StartTls};

/// TLS towards the client, as far as the dialogue cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientSecurity {
    /// Never.
    None,
    /// From the first byte; the machine starts behind the handshake.
    Implicit,
    /// By STARTTLS (RFC 3207).
    StartTls(StartTls),
}

/// What holds for all members that a session may get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// TLS towards the client.
    pub client: ClientSecurity,
    /// What a member goes through before it serves.
    pub plan: Plan,
    /// Members are spoken to in TLS, and their names are proven.
    pub member_verified: bool,
    /// Clients that stay in plaintext go to another pool.
    pub switches: bool,
    /// What becomes of bare CRs and LFs in content.
    pub line_endings: LineEndings,
    /// Recipients of a transaction; 0: as many as the member takes.
    pub max_recipients: u32,
}

impl From<ClientSecurity> for Terms {
    fn from(client: ClientSecurity) -> Self {
        Self {
            client,
            plan: Plan::default(),
            member_verified: false,
            switches: false,
            line_endings: LineEndings::Strict,
            max_recipients: 0,
        }
    }
}

/// What the machine asks of its shell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Drop the member, if any, say [`Session::member_sought`], and connect one of the pool that [`Session::is_switched`]
    /// tells of, `afresh` any, else one that was not tried: [`Session::member_connected`] or [`Session::no_member`] answers.
    Connect { afresh: bool },
    /// Send what is queued, offer what the client sent meanwhile, then [`Session::open_border`].
    StartTls,
    /// Shake hands with the member: [`Session::member_secured`] or [`Session::member_insecure`] answers.
    SecureMember,
    /// A member does not serve, and the operator should know why; [`Action::Connect`] follows.
    Complain(Fault),
    /// Break the member's connection at once; it must not see an end of data.
    AbortMember,
    /// Send what is queued for the client and close both sides.
    Close(End),
}

/// What became of bytes from the client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// How many were taken. The rest is offered again, with what follows, after the next input of any kind.
    pub consumed: usize,
    /// Which of these go to the member as they are, behind [`Session::to_member`].
    pub verbatim: Range<usize>,
}

/// Facts of a session for its log line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// The client's name for itself, as it said it last.
    pub helo: Option<Box<[u8]>>,
    /// Messages that the member accepted.
    pub messages: u32,
    /// Recipients that the member accepted.
    pub recipients: u32,
    /// Messages whose line ends were mended on their way to the member, whatever it said to them.
    pub normalized: u32,
    /// The code of the last reply to the client; 0 before the first.
    pub last_code: u16,
    /// Was STARTTLS in an EHLO reply?
    pub starttls_offered: bool,
    /// Did the client ask for it, and get it?
    pub starttls_used: bool,
    /// Where the session was when it was decided that it ends.
    pub ended_in: Option<Phase>,
}

/// The machine.
#[derive(Debug)]
pub struct Session {
    security: ClientSecurity,
    plan: Box<Plan>,
    member_verified: bool,
    line_endings: LineEndings,
    max_recipients: u32,
    timeouts: Timeouts,
    tls: bool,
    client: Client,
    member: Member,
    /// How far the present member has come, until there is nothing left to do.
    approach: Option<Box<Approach>>,
    /// A command that waits for the member to be prepared.
    held: Option<Box<Held>>,
    /// The member has heard an EHLO or HELO of the client.
    member_greeted: bool,
    /// That was before the border: the next may be one too many for it.
    stale: bool,
    /// The EHLO that may have been.
    again: Option<Box<Held>>,
    switch: Switch,
    lines: Lines,
    replies: ReplyParser,
    /// How members greeted that did not want the session.
    refusal: Option<Box<Reply>>,
    /// Some member was not asked, or its answer was none: another time it may serve.
    member_missed: bool,
    /// What the client's next replies are, in order.
    queue: VecDeque<Pending>,
    /// The last command must be answered before the next is read.
    hold: bool,
    /// Bytes of the client were left behind at the last offer.
    backlog: bool,
    /// DATA was refused, and nobody has looked whether its content is on its way.
    data_refused: bool,
    /// DATA was refused, and no line came since.
    behind_refusal: bool,
    /// The greeting was queued, and nobody has looked who did not wait for it.
    greeted: bool,
    client_eof: bool,
    draining: bool,
    hello: Option<Hello>,
    capabilities: Capabilities,
    /// MAIL was accepted and its message has not ended.
    transaction: bool,
    /// Its recipients that the member accepted.
    recipients: u32,
    /// BDAT was sent and LAST was not answered yet.
    chunked: bool,
    /// Not all of the present content goes on as it came.
    mended: bool,
    /// The member knows more of this client than its name.
    tainted: bool,
    /// The last action was [`Action::Close`].
    closed: bool,
    budget: Budget,
    facts: Facts,
    to_client: Vec<u8>,
    to_member: Vec<u8>,
    actions: VecDeque<Action>,
    /// Since when the present wait lasts.
    since: Instant,
    /// Since when a member is sought that takes commands.
    sought: Option<Instant>,
    /// Content since then, in octets.
    progress: usize,
}

/// What the client is doing.
#[derive(Debug)]
enum Client {
    /// Commands.
    Command,
    /// An AUTH exchange (RFC 4954 §4): the next line is a response, not a command.
    Exchange,
    /// Content behind 354.
    Content(Body),
    /// Octets behind BDAT.
    Chunk(u64),
    /// Content that nobody wants; what follows its end.
    Discard(Body, Option<(Local, End)>),
    /// Octets behind a BDAT that was refused here.
    DiscardChunk(u64),
    /// Between STARTTLS and TLS.
    Border(Border),
    /// Nothing more is heard.
    Closed,
}

/// How far the way into TLS is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Border {
    /// Earlier commands are still unanswered.
    Asked,
    /// All is answered but STARTTLS.
    Due,
    /// 220 is out.
    Open,
}

/// How far the member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Member {
    /// A connection was asked for.
    Absent,
    /// Connected; does the client await this greeting, too?
    Greeting { relay: bool },
    /// Between its greeting and dialogue.
    Preparing,
    /// In dialogue.
    Ready,
    /// Not needed any more.
    Gone,
}

/// A command of the client that is not sent yet.
#[derive(Debug)]
struct Held {
    line: Vec<u8>,
    verb: Verb,
}

impl Held {
    fn arguments(&self) -> &[u8] {
        Self::arguments_of(&self.line)
    }

    fn arguments_of(line: &[u8]) -> &[u8] {
        Command::parse(line).map_or(&[], |command| command.arguments)
    }
}

/// How the client introduced itself since the border.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hello {
    Ehlo,
    Helo,
}

/// A reply that is due to the client.
#[derive(Debug)]
enum Pending {
    /// The member's next.
    Member(Expect),
    /// Ours, and whether the session ends with it.
    Local(Local, Option<End>),
}

/// What the member was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    Command(Verb),
    EndOfData,
    Chunk { last: bool },
    Exchange,
}

/// Commands that may be on their way to the member, replies that may wait: beyond, the client waits.
const MAX_QUEUE: usize = 64;

impl Session {
    /// A machine that waits for its first member.
    pub fn new(terms: impl Into<Terms>, timeouts: Timeouts, now: Instant) -> Self {
        let Terms {
            client: security,
            plan,
            member_verified,
            switches,
            line_endings,
            max_recipients,
        } = terms.into();
        Self {
            security,
            plan: Box::new(plan),
            member_verified,
            line_endings,
            max_recipients,
            timeouts,
            tls: security == ClientSecurity::Implicit,
            client: Client::Command,
            member: Member::Absent,
            approach: None,
            held: None,
            member_greeted: false,
            stale: false,
            again: None,
            switch: Switch::new(switches),
            lines: Lines::default(),
            replies: ReplyParser::new(),
            refusal: None,
            member_missed: false,
            queue: VecDeque::new(),
            hold: false,
            backlog: false,
            data_refused: false,
            behind_refusal: false,
            greeted: false,
            client_eof: false,
            draining: false,
            hello: None,
            capabilities: Capabilities::default(),
            transaction: false,
            recipients: 0,
            chunked: false,
            mended: false,
            tainted: false,
            closed: false,
            budget: Budget::default(),
            facts: Facts::default(),
            to_client: Vec::new(),
            to_member: Vec::new(),
            actions: VecDeque::from([Action::Connect { afresh: true }]),
            since: now,
            sought: None,
            progress: 0,
        }
    }

    /// What the shell must do next.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Bytes for the client; the shell takes from it what it could send.
    pub fn to_client(&mut self) -> &mut Vec<u8> {
        &mut self.to_client
    }

    /// Bytes for the member; the shell takes from it what it could send.
    pub fn to_member(&mut self) -> &mut Vec<u8> {
        &mut self.to_member
    }

    /// What the log line will say.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Is the client's TLS established?
    pub fn is_tls(&self) -> bool {
        self.tls
    }

    /// Was the greeting just queued? The shell may look for bytes of the client before it sends it.
    pub fn is_greeted(&mut self) -> bool {
        std::mem::take(&mut self.greeted)
    }

    /// The client did not wait for its greeting, and shall not have it.
    pub fn refuse_early_talker(&mut self) {
        self.to_client.clear();
        self.close_now(Some(EARLY), End::Pregreet);
    }

    /// The daemon stops: the session ends as soon as no message is in the way.
    pub fn drain(&mut self, now: Instant) {
        self.draining = true;
        self.settle(now);
    }

    /// The daemon stops now.
    pub fn cut(&mut self) {
        self.close_now(Some(SHUTDOWN), self.cut_short());
    }

    /// As [`Self::cut`], where nobody is left to tell the client.
    pub fn abandon(&mut self) {
        self.close_now(None, self.cut_short());
    }

    fn cut_short(&self) -> End {
        match self.has_open_message() {
            true => End::Cut,
            false => End::Drained,
        }
    }

    /// Where the dialogue is, in a word for people.
    pub fn phase(&self) -> Phase {
        match (&self.client, self.member) {
            (Client::Closed, _) => Phase::Closing,
            (Client::Border(_), _) => Phase::StartTls,
            (_, Member::Absent) => Phase::Connect,
            _ if self.is_securing() => Phase::Handshake,
            (_, Member::Greeting { .. } | Member::Preparing) => Phase::Greeting,
            (Client::Content(_) | Client::Discard(..), _) => Phase::Data,
            (Client::Chunk(_) | Client::DiscardChunk(_), _) => Phase::Bdat,
            (Client::Exchange, _) => Phase::Auth,
            (Client::Command, _) if self.awaits(Expect::EndOfData) => Phase::EndOfData,
            (Client::Command, _) if self.transaction => Phase::Mail,
            (Client::Command, _) => Phase::Command,
        }
    }

    /// Sends a reply of ours now: whatever was due before it has been said.
    fn say(&mut self, reply: Local) {
        // HELO says that the client knows no extensions; who has not said anything may know this one.
        let enhanced = self.hello != Some(Hello::Helo) || reply.code == 421;
        reply.write(&mut self.to_client, enhanced);
        self.facts.last_code = reply.code;
    }

    /// Closes at once, whatever else was due.
    fn close_now(&mut self, reply: Option<Local>, end: End) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        self.note_end();
        if let Some(reply) = reply.filter(|_| !matches!(self.client, Client::Border(Border::Open)))
        {
            self.say(reply);
        }
        let aborted = self.actions.contains(&Action::AbortMember);
        self.actions.clear();
        // What it was to have and has not would be missing from what it takes for the whole.
        let lacks = self.has_open_message() || !self.to_member.is_empty();
        if aborted || end.aborts_member() || lacks {
            self.actions.push_back(Action::AbortMember);
        }
        self.queue.clear();
        self.held = None;
        self.client = Client::Closed;
        self.member = Member::Gone;
        self.to_member.clear();
        self.actions.push_back(Action::Close(end));
    }

    /// It is decided that the session ends.
    fn note_end(&mut self) {
        let phase = self.phase();
        self.facts.ended_in.get_or_insert(phase);
    }

    /// Does what no input asks for but the state allows now; every input ends here.
    fn settle(&mut self, now: Instant) {
        self.flush_local();
        if self.client_eof && !self.backlog && self.is_within_message() {
            return self.close_now(None, End::ClientAborted);
        }
        if !self.queue.is_empty() {
            return;
        }
        if self.draining && self.seeks_member() && matches!(self.client, Client::Command) {
            // Whatever the client has sent by now, no member has heard of it.
            return self.close_now(Some(SHUTDOWN), End::Drained);
        }
        if self.held.is_some() {
            return;
        }
        if self.draining && self.is_between_messages() && (self.backlog || !self.client_eof) {
            // The same is true of what was left behind: a client that always has more to say would never be between two.
            return self.close_now(Some(SHUTDOWN), End::Drained);
        }
        if self.backlog {
            return;
        }
        match &self.client {
            Client::Border(Border::Asked) => {
                self.client = Client::Border(Border::Due);
                self.actions.push_back(Action::StartTls);
                self.rest(now);
            }
            Client::Closed | Client::Border(_) => {}
            _ if self.client_eof => self.close_now(None, End::ClientClosed),
            _ => {}
        }
    }

    /// Is there neither a message nor a part of a command? What was asked before is answered.
    fn is_between_messages(&self) -> bool {
        let commands = matches!(self.client, Client::Command);
        commands && !self.transaction && self.lines.is_at_start()
    }

    /// Does the session end with a message that has come whole? No command behind it is heard.
    fn is_last_message(&self) -> bool {
        let ends = |pending: &Pending| {
            let Pending::Member(expect) = pending else {
                return false;
            };
            matches!(expect, Expect::EndOfData | Expect::Chunk { last: true })
        };
        self.draining && self.queue.iter().any(ends)
    }

    /// Sends our own replies that are next in turn.
    fn flush_local(&mut self) {
        while let Some(&Pending::Local(reply, end)) = self.queue.front() {
            self.queue.pop_front();
            match end {
                None => self.say(reply),
                Some(end) => return self.close_now(Some(reply), end),
            }
        }
    }

    /// Has the session no member yet that takes commands?
    fn seeks_member(&self) -> bool {
        use Member::{Absent, Greeting, Preparing};
        matches!(self.member, Absent | Greeting { .. } | Preparing)
    }

    fn awaits(&self, expect: Expect) -> bool {
        matches!(self.queue.front(), Some(Pending::Member(front)) if *front == expect)
    }

    /// Is there a message that the member has begun to take and not answered yet?
    fn has_open_message(&self) -> bool {
        let mut asked = self.queue.iter();
        let awaited = asked.any(|pending| {
            let Pending::Member(expect) = pending else {
                return false;
            };
            matches!(expect, Expect::EndOfData | Expect::Command(Verb::Data))
        });
        self.is_within_message() || self.chunked || awaited
    }

    /// Would the member take an orderly end of its connection for the end of a message?
    fn is_within_message(&self) -> bool {
        matches!(self.client, Client::Content(_) | Client::Chunk(_))
    }
}

/// The daemon stops.
pub const SHUTDOWN: Local = Local::new(421, "4.3.2", "Service is shutting down");
/// The client did not wait for the greeting (RFC 5321 §4.3.1).
pub const EARLY: Local = Local::new(554, "5.5.1", "Protocol error: talked before the greeting");
