//! A session's way to a member that takes commands, while the pump goes on.

use std::{
    io,
    pin::Pin,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use super::{
    MemberSecurity,
    pump::Pump,
    session::Serving,
    upstream::{Origin, Upstream, introduction},
};
use crate::smtp::capability::Offers;

/// What a session does beside moving bytes. Boxed: an idle one need not hold the room for it.
pub(super) type Work = Pin<Box<dyn Future<Output = Done> + Send>>;

/// What became of it.
pub(super) enum Done {
    Sought(Sought),
    /// The member has shaken hands, or not.
    Secured(Upstream, io::Result<()>),
}

/// A search among the members that were not tried.
pub(super) struct Sought {
    /// What the other pool's members announce, where that had to be known.
    offers: Option<Arc<Offers>>,
    found: Option<Upstream>,
    tried: Vec<u16>,
    /// Somebody was not reached, or not asked.
    missed: bool,
    took: Duration,
}

impl Serving {
    /// Looks for a member beside those that were tried; `asks_fallback`: when the other pool has told what it can do.
    pub(super) fn seek(
        &mut self,
        pump: &mut Pump,
        mut tried: Vec<u16>,
        asks_fallback: bool,
    ) -> Work {
        if !tried.is_empty() {
            self.context.events.member_passed_over.fetch_add(1, Relaxed);
        }
        pump.release_member();
        self.member_id = None;
        let begun = Instant::now();
        pump.session.member_sought(begun);
        let (service, context) = (self.service.clone(), self.context.clone());
        let (client, switched) = (self.peer, pump.session.is_switched());
        let ends = (client, self.local);
        let version = service.terms.proxy_protocol;
        let header = introduction(version, ends, self.present.id, &pump.client);
        Box::pin(async move {
            let offers = match service.plaintext.as_ref().filter(|_| asks_fallback) {
                Some(fallback) => Some(fallback.offers(&service, &service.sessions.timeouts).await),
                None => None,
            };
            let pool = service.pool_for(switched);
            let origin = Origin {
                service: &service,
                client,
                header,
            };
            let before = tried.len();
            let found = Upstream::connect(pool, &mut tried, &origin, &context.events).await;
            let unreachable = tried.len() - before > usize::from(found.is_some());
            let unasked = found.is_none() && tried.len() < pool.members().len();
            Done::Sought(Sought {
                offers,
                found,
                tried,
                missed: unreachable || unasked,
                took: begun.elapsed(),
            })
        })
    }

    /// Takes what a search came to; returns who was tried.
    pub(super) fn sought(&mut self, pump: &mut Pump, sought: Sought) -> Vec<u16> {
        self.waits.connect.get_or_insert(sought.took);
        if let Some(offers) = sought.offers {
            pump.session.limit_to(offers);
        }
        if sought.missed {
            pump.session.member_missed();
        }
        match sought.found {
            Some(upstream) => self.connected(pump, upstream),
            None => {
                self.present.entry.set_member(None);
                pump.session.no_member();
            }
        }
        sought.tried
    }

    fn connected(&mut self, pump: &mut Pump, upstream: Upstream) {
        let member = upstream.lease.member();
        self.present.entry.set_member(Some(member.name.clone()));
        self.member = Some((member.name.clone(), member.address));
        self.member_id = Some(member.id);
        self.member_tls = upstream.link.tls();
        let own = upstream.link.own();
        self.snat = Some(own);
        self.waits.connected.get_or_insert_with(Instant::now);
        pump.member = Some(upstream);
        pump.session.member_connected(own, Instant::now());
    }

    pub(super) fn secure_member(&self, pump: &mut Pump) -> Option<Work> {
        let limit = self.service.sessions.timeouts.member_handshake;
        let (MemberSecurity::StartTls(tls), Some(mut member)) =
            (&self.service.server_tls, pump.member.take())
        else {
            pump.session.member_insecure();
            return None;
        };
        let tls = tls.clone();
        Some(Box::pin(async move {
            let result = member.link.secure(&tls, limit).await;
            Done::Secured(member, result)
        }))
    }

    pub(super) fn secured(&mut self, pump: &mut Pump, member: Upstream, result: io::Result<()>) {
        self.member_tls = member.link.tls();
        pump.member = Some(member);
        match result {
            Ok(()) => pump.session.member_secured(Instant::now()),
            Err(error) => {
                self.complain(pump, &error);
                pump.session.member_insecure();
            }
        }
    }

    pub(super) fn complain(&self, pump: &Pump, why: &dyn std::fmt::Display) {
        if let Some(member) = &pump.member {
            let member = member.lease.member();
            self.context.events.member_is_unfit(member, why);
        }
    }
}

/// The end of work; never, where there is none.
pub(super) async fn finished(work: &mut Option<Work>) -> Done {
    match work {
        Some(work) => work.await,
        None => std::future::pending().await,
    }
}
