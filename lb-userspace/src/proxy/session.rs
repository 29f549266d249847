//! One client's connection from accept to its log line.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Instant,
};

use tokio::{net::TcpStream, sync::watch};

use super::{
    MemberSecurity, Security, Service,
    client::{ClientStream, Waiting},
    events::Events,
    live::{Live, Present},
    orders::{Control, Orders},
    pump::{Pump, Turn},
    upstream::Upstream,
};
use crate::{
    model::Name,
    smtp::{end::End, phase::Phase, session::Session, timeouts::Timeouts},
    telemetry::session::{SessionEnd, SessionSink, TlsFacts},
};

/// What all sessions of a worker share.
pub(super) struct Context {
    pub(super) live: Arc<Live>,
    pub(super) events: Arc<Events>,
    pub(super) log: Arc<dyn SessionSink>,
    pub(super) control: watch::Receiver<Orders>,
    pub(super) timeouts: Timeouts,
}

/// Serves a client to its end.
pub(super) async fn serve(
    context: Arc<Context>,
    service: Arc<Service>,
    tcp: TcpStream,
    peer: SocketAddr,
) {
    let present = context.live.enter(service.name.clone(), peer);
    service.cell.session_started();
    let mut serving = Serving {
        started: Instant::now(),
        member: None,
        tls: None,
        context,
        service,
        peer,
        present,
    };
    // Without it replies would wait for acknowledgements; a socket that refuses is about to fail anyway.
    let _ = tcp.set_nodelay(true);
    let mut client = ClientStream::Plain(tcp);
    if let Security::Implicit(tls) = &serving.service.client_tls {
        serving.present.entry.set_phase(Phase::Handshake);
        let limit = serving.context.timeouts.handshake;
        if let Err(end) = Box::pin(client.secure(tls, limit)).await {
            // Not TLS from the first byte on: nobody injected anything.
            let end = if end == End::StartTlsInjection {
                End::TlsFailed
            } else {
                end
            };
            return serving.end_before_dialogue(end);
        }
        serving.tls = client.tls();
    }
    let terms = serving.service.terms(peer);
    let timeouts = serving.context.timeouts;
    let offers = match &serving.service.plaintext {
        Some(fallback) => Some(Box::pin(fallback.offers(&serving.service, &timeouts)).await),
        None => None,
    };
    let session = Session::new(terms, timeouts, Instant::now()).limited_to(offers);
    let entry = serving.present.entry.clone();
    let cell = serving.service.cell;
    let mut pump = Box::new(Pump::new(session, client, timeouts, entry, cell));
    let end = serving.run(&mut pump).await;
    serving.finish(&mut pump, end);
    let last = std::mem::take(pump.session.to_client());
    // The place of the session is free; only the goodbye is left.
    drop(serving);
    Box::pin(pump.client.farewell(&last)).await;
}

/// A session being served; its end is counted and logged whatever happens.
struct Serving {
    context: Arc<Context>,
    service: Arc<Service>,
    peer: SocketAddr,
    present: Present,
    started: Instant,
    member: Option<(Name, SocketAddr)>,
    tls: Option<TlsFacts>,
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
        let before = tried.len();
        let pool = self.service.pool_for(&pump.session);
        let Context {
            events, timeouts, ..
        } = &*self.context;
        let connected = Upstream::connect(pool, &self.service, tried, timeouts, events).await;
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
        let own = upstream.link.own();
        pump.member = Some(upstream);
        pump.session.member_connected(own, Instant::now());
    }

    async fn secure_member(&mut self, pump: &mut Pump) {
        let limit = self.context.timeouts.member_handshake;
        let (Some(member), MemberSecurity::StartTls(tls)) =
            (&mut pump.member, &self.service.server_tls)
        else {
            return pump.session.member_insecure();
        };
        self.present.entry.set_phase(Phase::Handshake);
        match member.link.secure(tls, limit).await {
            Ok(()) => pump.session.member_secured(Instant::now()),
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
        match pump
            .client
            .secure(tls, self.context.timeouts.handshake)
            .await
        {
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
            starttls_offered: facts.starttls_offered,
            starttls_used: facts.starttls_used,
            helo: facts.helo.clone(),
            messages: facts.messages,
            recipients: facts.recipients,
            bytes_in: pump.moved.to_member,
            bytes_out: pump.moved.to_client,
            last_code: facts.last_code,
            phase: facts.ended_in.unwrap_or(Phase::Closing),
            ..self.blank(end)
        });
    }

    fn end_before_dialogue(&mut self, end: End) {
        self.report(self.blank(end));
    }

    fn blank(&self, end: End) -> SessionEnd {
        SessionEnd {
            id: self.present.id,
            virtual_server: self.service.name.clone(),
            client: self.peer,
            member: self.member.clone(),
            tls: self.tls,
            starttls_offered: false,
            starttls_used: false,
            helo: None,
            messages: 0,
            recipients: 0,
            bytes_in: 0,
            bytes_out: 0,
            duration: self.started.elapsed(),
            last_code: 0,
            end,
            phase: Phase::Handshake,
        }
    }

    fn report(&self, session: SessionEnd) {
        self.context.events.count_end(session.end);
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
        _: impl FnOnce(Arc<Context>, Arc<Service>, TcpStream, A) -> F,
    ) -> usize {
        size_of::<F>()
    }
    (size_of::<Pump>(), output(serve))
}
