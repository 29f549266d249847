//! What the members of a pool announce, before a client is promised anything that they may have to keep.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::{Mutex, OwnedMutexGuard},
    time::timeout,
};

use super::{MemberSecurity, Service, upstream::Link};
use crate::{
    pool::{LiveMember, LivePool},
    smtp::{
        approach::{Approach, Next, Plan},
        capability::Offers,
        reply::{Reply, ReplyParser},
    },
};

/// How long an answer counts.
const FRESH: Duration = Duration::from_secs(60);
/// How long none does: a client waits for its greeting each time one is asked for.
const SILENT: Duration = Duration::from_secs(10);
/// How long a member may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// The pool for clients that stay in plaintext.
#[derive(Debug)]
pub struct Fallback {
    pool: Arc<LivePool>,
    known: Arc<Mutex<Known>>,
}

/// By the member's number; nothing where it did not answer.
type Known = HashMap<u16, (Instant, Option<Offers>)>;

impl Fallback {
    /// This pool, of which nothing is known yet.
    pub fn new(pool: Arc<LivePool>) -> Self {
        Self {
            pool,
            known: Arc::default(),
        }
    }

    /// The pool.
    pub fn pool(&self) -> &LivePool {
        &self.pool
    }

    /// Is it this one?
    pub fn is_of(&self, pool: &Arc<LivePool>) -> bool {
        Arc::ptr_eq(&self.pool, pool)
    }

    /// What all members announce that a session may get. Asks those of whom too little is known; other sessions wait
    /// for the same answer.
    pub(super) async fn offers(&self, service: &Arc<Service>) -> Arc<Offers> {
        let mut known = self.known.clone().lock_owned().await;
        let now = Instant::now();
        let members = || self.pool.members().iter().filter(|it| it.takes_new());
        let stale = |member: &&Arc<LiveMember>| {
            known.get(&member.id).is_none_or(|(asked, offers)| {
                now - *asked > if offers.is_some() { FRESH } else { SILENT }
            })
        };
        let asked: Vec<_> = members().filter(stale).cloned().collect();
        if !asked.is_empty() {
            // Not of this session's: if it ended with it, clients that hang up would keep the others waiting.
            let asking = tokio::spawn(ask_all(service.clone(), asked, known, now));
            let Ok(answered) = asking.await else {
                return Arc::default();
            };
            known = answered;
        }
        known.retain(|id, _| self.pool.members().iter().any(|member| member.id == *id));
        let mut offers = members().filter_map(|member| known.get(&member.id)?.1.as_ref());
        let first = offers.next().cloned().unwrap_or_default();
        Arc::new(offers.fold(first, |all, next| all.and(next)))
    }
}

async fn ask_all(
    service: Arc<Service>,
    members: Vec<Arc<LiveMember>>,
    mut known: OwnedMutexGuard<Known>,
    now: Instant,
) -> OwnedMutexGuard<Known> {
    let answers = members.iter().map(|member| {
        let answer = ask(member, &service);
        async { timeout(PATIENCE, answer).await.ok().flatten() }
    });
    for (member, answer) in members.iter().zip(join_all(answers).await) {
        known.insert(member.id, (now, answer));
    }
    known
}

/// A member's reply to EHLO, behind TLS where that is what members are spoken to in.
async fn ask(member: &LiveMember, service: &Service) -> Option<Offers> {
    let timeouts = &service.sessions.timeouts;
    let mut link = Link::open_own(member.address, service).await?;
    let plan = Plan {
        starttls: matches!(service.server_tls, MemberSecurity::StartTls(_)),
        xclient: None,
    };
    if let MemberSecurity::Implicit(tls) = &service.server_tls {
        link.secure(tls, timeouts.member_handshake).await.ok()?;
    }
    let own = match link.own().to_canonical() {
        std::net::IpAddr::V4(own) => format!("[{own}]"),
        std::net::IpAddr::V6(own) => format!("[IPv6:{own}]"),
    };
    let mut approach = Approach::new(plan, link.own());
    let mut out = Vec::new();
    loop {
        let (reply, rest) = read(&mut link).await?;
        let mut next = approach.take(&reply, rest, None, &mut out);
        if let (Next::Secure, MemberSecurity::StartTls(tls)) = (next, &service.server_tls) {
            link.secure(tls, timeouts.member_handshake).await.ok()?;
            next = approach.secured();
        }
        match next {
            Next::Reply => {}
            Next::Ready => approach.probe(own.as_bytes(), &mut out),
            Next::Answered => {
                let _ = link.write_all(b"QUIT\r\n").await;
                let _ = link.flush().await;
                return (reply.code == 250).then(|| Offers::of(&reply));
            }
            Next::Secure | Next::Fault(_) => return None,
        }
        link.write_all(&out).await.ok()?;
        link.flush().await.ok()?;
        out.clear();
    }
}

/// The next reply, and whether more came with it.
async fn read(link: &mut Link) -> Option<(Reply, bool)> {
    let mut parser = ReplyParser::new();
    let mut buffer = [0; 2048];
    loop {
        let count = link.read(&mut buffer).await.ok()?;
        if count == 0 {
            return None;
        }
        if let Some(reply) = parser.push(&buffer[..count]).ok()? {
            return Some((reply, parser.has_rest()));
        }
    }
}
