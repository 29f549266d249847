//! One client's connection from accept to its log line.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use tokio::{net::TcpStream, sync::watch};

use super::{
    MemberSecurity, Security, Service, Services,
    client::{ClientStream, Waiting},
    crowd::Crowd,
    entry::{Places, Refused},
    events::Events,
    live::{Live, Present},
    orders::{Control, Orders},
    pump::{Pump, Turn},
    upstream::{Origin, Upstream},
};
use crate::{
    model::Name,
    smtp::{end::End, phase::Phase, session::Session},
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
    let present = context.live.enter(service.name.clone(), peer);
    service.cell.session_started();
    // Kept until the last bytes are gone: goodbyes take memory, too.
    let mut places = Places::take(&context, &service);
    let mut serving = Serving {
        started: Instant::now(),
        generation,
        member: None,
        member_tls: None,
        snat: None,
        tls: None,
        early: false,
        waits: Waits::default(),
        context,
        service,
        local,
        peer,
        present,
    };
    // Without it replies would wait for acknowledgements; a socket that refuses is about to fail anyway.
    let _ = tcp.set_nodelay(true);
    let mut client = ClientStream::Plain(tcp);
    let entered = match &mut places {
        Ok(places) => Box::pin(serving.enter(&mut client, places)).await,
        Err(refused) => Err(*refused),
    };
    let security = match entered {
        Ok(security) => security,
        Err(mut refused) => {
            if let Security::Implicit(_) = serving.service.client_tls {
                // Words in clear would be no TLS.
                refused.reply = None;
            }
            refused.say(&client);
            serving.end_before_dialogue(refused);
            drop(serving);
            return Box::pin(client.hear_out()).await;
        }
    };
    serving.waits.entry = serving.started.elapsed();
    let offers = match serving.service.fallback(security) {
        Some(fallback) => {
            let service = &*serving.service;
            Some(Box::pin(fallback.offers(service, &service.sessions.timeouts)).await)
        }
        None => None,
    };
    let timeouts = serving.service.sessions.timeouts;
    let terms = serving.service.dialogue(serving.peer, security);
    let session = Session::new(terms, timeouts, Instant::now()).limited_to(offers);
    let entry = serving.present.entry.clone();
    let cell = serving.service.cell;
    let mut pump = Box::new(Pump::new(session, client, timeouts, entry, cell));
    pump.watch_early = serving.service.terms.pregreet.is_some() && !serving.early;
    let end = serving.run(&mut pump).await;
    serving.finish(&mut pump, end);
    let last = std::mem::take(pump.session.to_client());
    // The place of the session is free; only the goodbye is left.
    drop(serving);
    Box::pin(pump.client.farewell(&last)).await;
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
    member: Option<(Name, SocketAddr)>,
    member_tls: Option<TlsFacts>,
    snat: Option<IpAddr>,
    waits: Waits,
}

/// How long a session waited until its client was greeted.
#[derive(Debug, Clone, Copy, Default)]
struct Waits {
    /// From accept until members were looked for.
    entry: Duration,
    /// Until the first of them was connected.
    connect: Option<Duration>,
    /// When it was.
    connected: Option<Instant>,
}

impl Serving {
    async fn run(&mut self, pump: &mut Pump) -> End {
        let mut control = self.context.control.clone();
        let mut tried = Vec::new();
        let mut heeded = control.borrow().number();
        heed(control.borrow_and_update().all, &mut pump.session);
        loop {
            let turn = tokio::select! {
                biased;
                turn = pump.turn() => turn,
                Ok(()) = control.changed() => {
                    let member = pump.member.as_ref().map(|member| member.lease.member().id);
                    let order = control.borrow_and_update().heed(member, &mut heeded);
                    heed(order, &mut pump.session);
                    continue;
                }
            };
            match turn {
                // Boxed: an idle session need not hold the room for what it did at its start.
                Turn::Connect { afresh } => {
                    if afresh {
                        tried.clear();
                    }
                    Box::pin(self.connect(pump, &mut tried)).await;
                }
                Turn::Early => {
                    if Box::pin(self.early_talker()).await.is_err() {
                        pump.session.refuse_early_talker();
                    }
                }
                Turn::SecureMember => Box::pin(self.secure_member(pump)).await,
                Turn::Complain(fault) => self.complain(pump, &fault),
                Turn::StartTls => Box::pin(self.start_tls(pump)).await,
                Turn::Close(end) => return end,
            }
        }
    }

    async fn connect(&mut self, pump: &mut Pump, tried: &mut Vec<u16>) {
        if !tried.is_empty() {
            self.context.events.member_passed_over.fetch_add(1, Relaxed);
        }
        pump.release_member();
        self.present.entry.set_phase(Phase::Connect);
        let begun = Instant::now();
        let before = tried.len();
        let pool = self.service.pool_for(&pump.session);
        let origin = Origin {
            service: &self.service,
            client: self.peer,
            local: self.local,
            id: self.present.id,
            stream: &pump.client,
        };
        let connected = Upstream::connect(pool, tried, &origin, &self.context.events).await;
        self.waits.connect.get_or_insert_with(|| begun.elapsed());
        let unreachable = tried.len() - before > usize::from(connected.is_some());
        if unreachable || (connected.is_none() && tried.len() < pool.members().len()) {
            pump.session.member_missed();
        }
        let Some(upstream) = connected else {
            self.present.entry.set_member(None);
            return pump.session.no_member();
        };
        let member = upstream.lease.member();
        self.present.entry.set_member(Some(member.name.clone()));
        self.member = Some((member.name.clone(), member.address));
        self.member_tls = upstream.link.tls();
        let own = upstream.link.own();
        self.snat = Some(own);
        self.waits.connected.get_or_insert_with(Instant::now);
        pump.member = Some(upstream);
        pump.session.member_connected(own, Instant::now());
    }

    async fn secure_member(&mut self, pump: &mut Pump) {
        let limit = self.service.sessions.timeouts.member_handshake;
        let (Some(member), MemberSecurity::StartTls(tls)) =
            (&mut pump.member, &self.service.server_tls)
        else {
            return pump.session.member_insecure();
        };
        self.present.entry.set_phase(Phase::Handshake);
        match member.link.secure(tls, limit).await {
            Ok(()) => {
                self.member_tls = member.link.tls();
                pump.session.member_secured(Instant::now());
            }
            Err(error) => {
                self.complain(pump, &error);
                pump.session.member_insecure();
            }
        }
    }

    fn complain(&self, pump: &Pump, why: &dyn std::fmt::Display) {
        if let Some(member) = &pump.member {
            let member = member.lease.member();
            self.context.events.member_is_unfit(member, why);
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

    fn report(&self, session: SessionEnd) {
        let events = &self.context.events;
        events.count_end(session.end);
        let normalized = u64::from(session.normalized);
        events.message_normalized.fetch_add(normalized, Relaxed);
        self.context.log.session_ended(&session);
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.service.cell.session_ended();
    }
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
