//! The machine of a session in a shell of memory: bytes of a client in pieces, and a member that answers.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
    time::Instant,
};

use lb_userspace::smtp::{
    end::End,
    session::{Action, Facts, Session, Terms},
    timeouts::Timeouts,
};

/// The box's address towards the member.
const OWN: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Somebody behind the machine.
pub(crate) trait Member {
    /// What it says first, in pieces.
    fn greet(&mut self) -> Vec<Vec<u8>>;
    /// What it answers to bytes, in pieces.
    fn hear(&mut self, bytes: &[u8]) -> Vec<Vec<u8>>;
}

/// What came of a session.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// All that the client was sent.
    pub(crate) to_client: Vec<u8>,
    /// All that the member was sent.
    pub(crate) to_member: Vec<u8>,
    pub(crate) end: Option<End>,
    pub(crate) facts: Facts,
    pub(crate) aborted: bool,
    /// Most bytes that waited in the machine for anybody.
    pub(crate) most: usize,
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outcome")
            .field("to_client", &String::from_utf8_lossy(&self.to_client))
            .field("to_member", &String::from_utf8_lossy(&self.to_member))
            .field("end", &self.end)
            .field("facts", &self.facts)
            .field("aborted", &self.aborted)
            .finish_non_exhaustive()
    }
}

/// Plays a whole session: the pieces one after the other, then the end of the client's stream.
pub(crate) fn play<M: Member>(
    terms: impl Into<Terms>,
    pieces: &[&[u8]],
    member: &mut M,
    eof: bool,
) -> Outcome {
    let now = Instant::now();
    let mut shell = Shell {
        session: Session::new(terms, Timeouts::DEFAULT, now),
        now,
        member,
        left: pieces.iter().map(|piece| piece.len()).sum(),
        connected: false,
        backlog: Vec::new(),
        outcome: Outcome {
            to_client: Vec::new(),
            to_member: Vec::new(),
            end: None,
            facts: Facts::default(),
            aborted: false,
            most: 0,
        },
    };
    shell.turn();
    for piece in pieces {
        shell.left -= piece.len();
        shell.backlog.extend_from_slice(piece);
        shell.offer();
    }
    if eof && shell.outcome.end.is_none() {
        shell.session.client_closed(now);
        shell.offer();
    }
    shell.outcome.facts = shell.session.facts().clone();
    shell.outcome
}

struct Shell<'a, M> {
    session: Session,
    now: Instant,
    member: &'a mut M,
    /// Bytes of the client that are still on their way.
    left: usize,
    connected: bool,
    backlog: Vec<u8>,
    outcome: Outcome,
}

impl<M: Member> Shell<'_, M> {
    /// Offers what is there until nothing more is taken.
    fn offer(&mut self) {
        loop {
            let taken = self.session.handle_client(&self.backlog, self.now);
            let verbatim = self.backlog[taken.verbatim].to_vec();
            self.backlog.drain(..taken.consumed);
            self.look_behind_refusal();
            self.pass(&verbatim);
            let stuck = taken.consumed == 0 && !self.turn();
            if stuck || self.outcome.end.is_some() {
                return;
            }
            if self.backlog.is_empty() && !self.turn() {
                return;
            }
        }
    }

    fn look_behind_refusal(&mut self) {
        if self.session.is_data_refused() && self.left + self.backlog.len() > 0 {
            self.session.content_follows();
        }
    }

    /// Carries out what the machine wants; did anything happen?
    fn turn(&mut self) -> bool {
        let mut moved = false;
        loop {
            self.pass(&[]);
            let Some(action) = self.session.poll_action() else {
                return moved;
            };
            moved = true;
            match action {
                // The second connection is to nobody: one member is enough for a test.
                Action::Connect { .. } if self.connected => self.session.no_member(),
                Action::Connect { .. } => {
                    self.connected = true;
                    self.session.member_connected(OWN, self.now);
                    for piece in self.member.greet() {
                        self.session.handle_member(&piece, self.now);
                    }
                }
                Action::StartTls if self.backlog.is_empty() => {
                    if self.session.open_border(self.now) {
                        self.session.tls_established(self.now);
                    }
                }
                // The next offer shows the machine what came behind STARTTLS.
                Action::StartTls => return true,
                // These members speak in clear.
                Action::SecureMember => self.session.member_insecure(),
                Action::Complain(_) => {}
                Action::AbortMember => self.outcome.aborted = true,
                Action::Close(end) => self.outcome.end = Some(end),
            }
        }
    }

    /// Queues go where they belong, and answers come back.
    fn pass(&mut self, verbatim: &[u8]) {
        let mut verbatim = verbatim;
        loop {
            let waiting = self
                .session
                .to_member()
                .len()
                .max(self.session.to_client().len());
            self.outcome.most = self.outcome.most.max(waiting);
            self.outcome.to_client.append(self.session.to_client());
            let mut sent = std::mem::take(self.session.to_member());
            sent.extend_from_slice(std::mem::take(&mut verbatim));
            if sent.is_empty() {
                return;
            }
            self.outcome.to_member.extend_from_slice(&sent);
            for piece in self.member.hear(&sent) {
                self.session.handle_member(&piece, self.now);
                self.look_behind_refusal();
            }
        }
    }
}
