//! One client's connection from accept to its log line.

use std::{
    net::{IpAddr, SocketAddr},
    pin::pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use tokio::{net::TcpStream, sync::watch};

use super::{
    Security, Service, Services,
    client::{ClientStream, Waiting},
    crowd::Crowd,
    entry::{Places, Refused},
    events::Events,
    live::{Live, Present},
    orders::{Control, Orders},
    pump::{Pump, Turn},
    search::{Done, finished},
};
use crate::{
    model::Name,
    smtp::{
        end::End,
        phase::Phase,
        session::{ClientSecurity, Session},
    },
    telemetry::session::{SessionEnd, SessionSink, TlsFacts},
};

/// What all sessions of a worker share.
pub(super) struct Context {
    pub(super) live: Arc<Live>,
    pub(super) services: Arc<Services>,
    pub(super) events: Arc<Events>,
    pub(super) log: Arc<dyn SessionSink>,
    pub(super) control: watch::Receiver<Orders>,
    /// The sessions of all workers.
    pub(super) crowd: Arc<Crowd>,
}

/// Serves a client to its end.
pub(super) async fn serve(
    context: Arc<Context>,
    service: Arc<Service>,
    generation: u64,
    tcp: TcpStream,
    (local, peer): (SocketAddr, SocketAddr),
) {
    let live = context.live.clone();
    let present = live.enter(service.name.clone(), peer);
    service.cell.session_started();
    // Kept until the last bytes are gone: goodbyes take memory, too.
    let mut places = Places::take(&context, &service);
    let serving = Serving {
        started: Instant::now(),
        generation,
        member: None,
        member_id: None,
        member_tls: None,
        snat: None,
        tls: None,
        early: false,
        waits: Waits::default(),
        reported: false,
        context,
        service,
        local,
        peer,
        present,
    };
    let mut dialogue = Dialogue {
        serving,
        pump: None,
    };
    // Without it replies would wait for acknowledgements; a socket that refuses is about to fail anyway.
    let _ = tcp.set_nodelay(true);
    let mut client = ClientStream::Plain(tcp);
    let entered = match &mut places {
        Ok(places) => Box::pin(dialogue.serving.enter(&mut client, places)).await,
        Err(refused) => Err(*refused),
    };
    let security = match entered {
        Ok(security) => security,
        Err(mut refused) => {
            if let Security::Implicit(_) = dialogue.serving.service.client_tls {
                // Words in clear would be no TLS.
                refused.reply = None;
            }
            refused.say(&client);
            dialogue.serving.end_before_dialogue(refused);
            let _parting = live.part();
            drop(dialogue);
            return Box::pin(client.hear_out()).await;
        }
    };
    dialogue.begin(client, security);
    let Some(mut pump) = dialogue.run(security).await else {
        return;
    };
    let last = std::mem::take(pump.session.to_client());
    // The place of the session is free; only the goodbye is left.
    let _parting = live.part();
    drop(dialogue);
    Box::pin(pump.client.farewell(&last)).await;
}

/// A session with what its report has to tell of the dialogue.
struct Dialogue {
    serving: Serving,
    /// From the end of the way in until the report.
    pump: Option<Box<Pump>>,
}

impl Dialogue {
    fn begin(&mut self, client: ClientStream, security: ClientSecurity) {
        let serving = &mut self.serving;
        serving.waits.entry = serving.started.elapsed();
        let service = &serving.service;
        let timeouts = service.sessions.timeouts;
        let terms = service.dialogue(serving.peer, security);
        let session = Session::new(terms, timeouts, Instant::now());
        let entry = serving.present.entry.clone();
        let mut pump = Box::new(Pump::new(session, client, timeouts, entry, service.cell));
        pump.watch_early = service.terms.pregreet.is_some() && !serving.early;
        self.pump = Some(pump);
    }

    /// Serves it to its end, which is reported; what is left is to say goodbye.
    async fn run(&mut self, security: ClientSecurity) -> Option<Box<Pump>> {
        let end = self.serving.run(self.pump.as_mut()?, security).await;
        let mut pump = self.pump.take()?;
        self.serving.finish(&mut pump, end);
        Some(pump)
    }
}

impl Drop for Dialogue {
    /// Dropped within the dialogue, with its runtime. After a panic nobody knows what the pump holds.
    fn drop(&mut self) {
        if let Some(mut pump) = self.pump.take().filter(|_| !std::thread::panicking()) {
            let end = pump.abandon();
            self.serving.finish(&mut pump, end);
        }
    }
}

/// A session being served; its end is counted and logged whatever happens.
pub(super) struct Serving {
    pub(super) context: Arc<Context>,
    pub(super) service: Arc<Service>,
    /// What the client connected to.
    pub(super) local: SocketAddr,
    /// The client, as a header in front may have told.
    pub(super) peer: SocketAddr,
    pub(super) present: Present,
    /// It talked before it was greeted.
    pub(super) early: bool,
    pub(super) tls: Option<TlsFacts>,
    started: Instant,
    generation: u64,
    /// The last one.
    pub(super) member: Option<(Name, SocketAddr)>,
    /// The one that the session has, also while they shake hands.
    pub(super) member_id: Option<u16>,
    pub(super) member_tls: Option<TlsFacts>,
    pub(super) snat: Option<IpAddr>,
    pub(super) waits: Waits,
    reported: bool,
}

/// How long a session waited until its client was greeted.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Waits {
    /// From accept until members were looked for.
    entry: Duration,
    /// Until the first of them was connected.
    pub(super) connect: Option<Duration>,
    /// When it was.
    pub(super) connected: Option<Instant>,
}

impl Serving {
    async fn run(&mut self, pump: &mut Pump, security: ClientSecurity) -> End {
        let mut control = self.context.control.clone();
        let mut heeded = control.borrow().number();
        heed(control.borrow_and_update().all, &mut pump.session);
        let mut asks_fallback = self.service.fallback(security).is_some();
        let mut tried = Vec::new();
        let mut work = None;
        loop {
            // The pump goes on whatever else is waited for: it hears the client hang up, and knows the deadlines.
            let turn = tokio::select! {
                biased;
                turn = pump.turn() => turn,
                done = finished(&mut work) => {
                    work = None;
                    match done {
                        Done::Sought(sought) => tried = self.sought(pump, sought),
                        Done::Secured(member, result) => self.secured(pump, member, result),
                    }
                    let order = control.borrow().heed(self.member_id, &mut heeded);
                    heed(order, &mut pump.session);
                    continue;
                }
                Ok(()) = control.changed() => {
                    let order = control.borrow_and_update().heed(self.member_id, &mut heeded);
                    heed(order, &mut pump.session);
                    continue;
                }
            };
            match turn {
                Turn::Connect { afresh } => {
                    if afresh {
                        tried.clear();
                    }
                    let asks_fallback = std::mem::take(&mut asks_fallback);
                    work = Some(self.seek(pump, std::mem::take(&mut tried), asks_fallback));
                }
                Turn::Early => {
                    let orders = (&mut control, self.member_id, &mut heeded);
                    let talking = Box::pin(self.early_talker());
                    let (talked, order) = listening(orders, Control::Drain, talking).await;
                    if matches!(talked, Some(Err(refused)) if refused.end == End::Pregreet) {
                        pump.session.refuse_early_talker();
                    }
                    heed(order, &mut pump.session);
                }
                Turn::SecureMember => work = self.secure_member(pump),
                Turn::Complain(fault) => self.complain(pump, &fault),
                Turn::StartTls => {
                    let orders = (&mut control, self.member_id, &mut heeded);
                    // A client whose handshake breaks might come back without TLS: a drain is heeded behind it.
                    let securing = Box::pin(self.start_tls(pump));
                    let (_, order) = listening(orders, Control::Cut, securing).await;
                    heed(order, &mut pump.session);
                }
                Turn::Close(end) => return end,
            }
        }
    }

    async fn start_tls(&mut self, pump: &mut Pump) {
        let Security::StartTls { tls, .. } = &self.service.client_tls else {
            return;
        };
        pump.flush_client().await;
        match pump.client.waiting() {
            Waiting::Nothing => {}
            // Which bytes, nobody needs to know: one is a violation.
            Waiting::Bytes => _ = pump.session.handle_client(&[0], Instant::now()),
            Waiting::End => pump.session.client_closed(Instant::now()),
        }
        if !pump.session.open_border(Instant::now()) {
            return;
        }
        pump.flush_client().await;
        if !pump.session.awaits_handshake() {
            // It did not take the 220.
            return;
        }
        self.present.entry.set_phase(Phase::Handshake);
        let limit = self.service.sessions.timeouts.handshake;
        match pump.client.secure(tls, limit).await {
            Ok(()) => {
                self.tls = pump.client.tls();
                pump.session.tls_established(Instant::now());
            }
            Err(end) => pump.session.tls_failed(end),
        }
    }

    fn finish(&mut self, pump: &mut Pump, end: End) {
        // What is queued now goes out with the goodbye.
        pump.moved.to_client += pump.session.to_client().len() as u64;
        pump.count();
        pump.release_member();
        let facts = pump.session.facts();
        self.report(SessionEnd {
            greeting: self
                .waits
                .connected
                .zip(pump.greeted)
                .map(|(connected, greeted)| greeted.saturating_duration_since(connected)),
            starttls_offered: facts.starttls_offered,
            starttls_used: facts.starttls_used,
            helo: facts.helo.clone(),
            messages: facts.messages,
            recipients: facts.recipients,
            normalized: facts.normalized,
            bytes_in: pump.moved.to_member,
            bytes_out: pump.moved.to_client,
            last_code: facts.last_code,
            phase: facts.ended_in.unwrap_or(Phase::Closing),
            ..self.blank(end)
        });
    }

    fn end_before_dialogue(&mut self, refused: Refused) {
        let phase = self.present.entry.phase();
        self.report(SessionEnd {
            phase,
            last_code: refused.reply.map_or(0, |reply| reply.code),
            ..self.blank(refused.end)
        });
    }

    fn blank(&self, end: End) -> SessionEnd {
        SessionEnd {
            id: self.present.id,
            generation: self.generation,
            virtual_server: self.service.name.clone(),
            client: self.peer,
            local: self.local,
            member: self.member.clone(),
            snat: self.snat,
            wait: self.waits.entry,
            connect: self.waits.connect,
            greeting: None,
            early: self.early,
            tls: self.tls,
            member_tls: self.member_tls,
            starttls_offered: false,
            starttls_used: false,
            helo: None,
            messages: 0,
            recipients: 0,
            normalized: 0,
            bytes_in: 0,
            bytes_out: 0,
            duration: self.started.elapsed(),
            last_code: 0,
            end,
            phase: Phase::Handshake,
        }
    }

    fn report(&mut self, session: SessionEnd) {
        self.reported = true;
        let events = &self.context.events;
        events.count_end(session.end);
        let normalized = u64::from(session.normalized);
        events.message_normalized.fetch_add(normalized, Relaxed);
        self.context.log.session_ended(&session);
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if !self.reported {
            let end = match std::thread::panicking() {
                true => End::Cut,
                false => End::Drained,
            };
            let phase = self.present.entry.phase();
            self.report(SessionEnd {
                phase,
                ..self.blank(end)
            });
        }
        self.service.cell.session_ended();
    }
}

/// Does something beside which orders are heard, and gives it up when one goes as far as `until`; what came of it, and the
/// furthest order.
async fn listening<T>(
    (control, member, heeded): (&mut watch::Receiver<Orders>, Option<u16>, &mut u64),
    until: Control,
    work: impl Future<Output = T>,
) -> (Option<T>, Control) {
    let (mut work, mut order) = (pin!(work), Control::Run);
    while order < until {
        tokio::select! {
            biased;
            done = &mut work => return (Some(done), order),
            Ok(()) = control.changed() => {
                order = order.max(control.borrow_and_update().heed(member, heeded));
            }
        }
    }
    (None, order)
}

fn heed(state: Control, session: &mut Session) {
    match state {
        Control::Run | Control::StopAccepting => {}
        Control::Drain => session.drain(Instant::now()),
        Control::Cut => session.cut(),
    }
}

/// What a session takes besides its stream, in bytes: the pump, and the future that owns it.
#[cfg(test)]
pub(super) fn sizes() -> (usize, usize) {
    fn output<A, F: Future>(
        _: impl FnOnce(Arc<Context>, Arc<Service>, u64, TcpStream, A) -> F,
    ) -> usize {
        size_of::<F>()
    }
    (size_of::<Pump>(), output(serve))
}
