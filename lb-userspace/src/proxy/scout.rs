//! What the members of a pool announce, before a client is promised anything that they may have to keep.
//!
//! Members are asked in the background, by one task at a time, when a session comes and an answer is old. Sessions go by
//! the last answers and wait for none, but where there are none.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::watch,
    task::AbortHandle,
    time::timeout,
};

use super::{MemberSecurity, Service, upstream::Link};
use crate::{
    model::ProxyHeader,
    pool::{LiveMember, LivePool},
    smtp::{
        approach::{Approach, Next, Plan},
        capability::Offers,
        reply::{Reply, ReplyParser},
        timeouts::Timeouts,
    },
};

/// How old an answer is when the member is asked again.
const FRESH: Duration = Duration::from_secs(60);
/// How long a member that did not answer is left alone.
const SILENT: Duration = Duration::from_secs(10);
/// How old an answer may be that sessions go by, whatever became of later questions.
const KEPT: Duration = Duration::from_secs(10 * 60);
/// How long a session waits for an answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a member may take: some keep their greeting back to see who talks before it.
const LATE: Duration = Duration::from_secs(10);

/// The pool for clients that stay in plaintext.
#[derive(Debug)]
pub struct Fallback {
    pool: Arc<LivePool>,
    known: Arc<Known>,
    /// The last round of questions; it ends with the virtual server.
    round: Mutex<Option<AbortHandle>>,
}

impl Fallback {
    /// This pool, of which nothing is known yet.
    pub fn new(pool: Arc<LivePool>) -> Self {
        Self {
            pool,
            known: Arc::default(),
            round: Mutex::default(),
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

    /// What all members announce that a session may get.
    pub(super) async fn offers(&self, service: &Service, timeouts: &Timeouts) -> Arc<Offers> {
        let answered = async {
            let mut asking = self.known.asking.subscribe();
            loop {
                self.refresh(service, timeouts);
                if !self.known.is_awaited(&self.numbers(), Instant::now()) {
                    return;
                }
                // The sender is ours.
                let _ = asking.wait_for(|asking| !asking).await;
            }
        };
        // Too late is as good as no answer.
        let _ = timeout(PATIENCE, answered).await;
        Arc::new(self.known.offers(&self.numbers(), Instant::now()))
    }

    /// Asks in the background whom it is time to ask, unless somebody does.
    fn refresh(&self, service: &Service, timeouts: &Timeouts) {
        let now = Instant::now();
        let due = self.members().filter(|it| self.known.is_due(it.id, now));
        let due: Vec<_> = due.cloned().collect();
        if due.is_empty() {
            return;
        }
        let Some(round) = Round::begin(&self.known) else {
            return;
        };
        let terms = Terms {
            server_tls: service.server_tls.clone(),
            header: service.terms.proxy_protocol,
            timeouts: *timeouts,
        };
        let task = tokio::spawn(async move {
            let asked = due.iter().map(|member| async {
                let mut asking = pin!(timeout(LATE, ask(member, &terms)));
                let answer = match timeout(PATIENCE, &mut asking).await {
                    Ok(answer) => answer,
                    Err(_) => {
                        // Sessions go on without.
                        round.0.learn(member.id, now, None);
                        asking.await
                    }
                };
                let answer = answer.ok().flatten();
                let at = if answer.is_some() {
                    now
                } else {
                    Instant::now()
                };
                round.0.learn(member.id, at, answer);
            });
            join_all(asked).await;
        });
        *locked(&self.round) = Some(task.abort_handle());
    }

    fn members(&self) -> impl Iterator<Item = &Arc<LiveMember>> {
        self.pool.members().iter().filter(|it| it.takes_new())
    }

    fn numbers(&self) -> Vec<u16> {
        self.members().map(|member| member.id).collect()
    }
}

impl Drop for Fallback {
    fn drop(&mut self) {
        if let Some(round) = locked(&self.round).take() {
            round.abort();
        }
    }
}

/// What the members have said so far, by their numbers.
#[derive(Debug, Default)]
struct Known {
    members: Mutex<HashMap<u16, Answer>>,
    asking: watch::Sender<bool>,
}

/// What became of questions to a member.
#[derive(Debug)]
struct Answer {
    asked: Instant,
    failed: bool,
    /// The last one, and when it was asked for.
    offers: Option<(Instant, Offers)>,
}

impl Answer {
    fn usable(&self, now: Instant) -> Option<&Offers> {
        let (at, offers) = self.offers.as_ref()?;
        (now.saturating_duration_since(*at) <= KEPT).then_some(offers)
    }
}

impl Known {
    fn learn(&self, member: u16, asked: Instant, answer: Option<Offers>) {
        let mut members = locked(&self.members);
        let before = members.remove(&member).and_then(|before| before.offers);
        let failed = answer.is_none();
        let offers = answer.map(|offers| (asked, offers)).or(before);
        members.insert(
            member,
            Answer {
                asked,
                failed,
                offers,
            },
        );
    }

    /// Is it time to ask a member?
    fn is_due(&self, member: u16, now: Instant) -> bool {
        locked(&self.members).get(&member).is_none_or(|answer| {
            let rest = if answer.failed { SILENT } else { FRESH };
            now.saturating_duration_since(answer.asked) > rest
        })
    }

    /// Has a session to wait? For a member that nobody has asked yet; and where no answer counts any more, because
    /// nobody asked for a while.
    fn is_awaited(&self, of: &[u16], now: Instant) -> bool {
        let members = locked(&self.members);
        let answers: Vec<_> = of.iter().filter_map(|id| members.get(id)).collect();
        let old = |answer: &&Answer| now.saturating_duration_since(answer.asked) > FRESH;
        let nothing = answers.iter().all(|answer| answer.usable(now).is_none());
        answers.len() < of.len() || nothing && answers.iter().any(old)
    }

    /// What these announce, all of them of whom anything is known.
    fn offers(&self, of: &[u16], now: Instant) -> Offers {
        let members = locked(&self.members);
        let mut offers = of.iter().filter_map(|id| members.get(id)?.usable(now));
        let first = offers.next().cloned().unwrap_or_default();
        offers.fold(first, |all, next| all.and(next))
    }
}

/// While it lives, nobody else asks.
struct Round(Arc<Known>);

impl Round {
    fn begin(known: &Arc<Known>) -> Option<Self> {
        let free = |asking: &mut bool| !std::mem::replace(asking, true);
        let begun = known.asking.send_if_modified(free);
        begun.then(|| Self(known.clone()))
    }
}

impl Drop for Round {
    fn drop(&mut self) {
        self.0.asking.send_replace(false);
    }
}

/// What it takes to ask; a task must not hold the virtual server itself.
struct Terms {
    server_tls: MemberSecurity,
    header: ProxyHeader,
    timeouts: Timeouts,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A member's reply to EHLO, behind TLS where that is what members are spoken to in.
async fn ask(member: &LiveMember, terms: &Terms) -> Option<Offers> {
    let limits = &terms.timeouts;
    let mut link = Link::open_own(member.address, terms.header, limits.connect).await?;
    let plan = Plan {
        starttls: matches!(terms.server_tls, MemberSecurity::StartTls(_)),
        xclient: None,
    };
    if let MemberSecurity::Implicit(tls) = &terms.server_tls {
        link.secure(tls, limits.member_handshake).await.ok()?;
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
        if let (Next::Secure, MemberSecurity::StartTls(tls)) = (next, &terms.server_tls) {
            link.secure(tls, limits.member_handshake).await.ok()?;
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

#[cfg(test)]
impl Fallback {
    /// Makes everything that is known so much older.
    pub(super) fn age(&self, by: Duration) {
        for answer in locked(&self.known.members).values_mut() {
            answer.asked -= by;
            if let Some((at, _)) = &mut answer.offers {
                *at -= by;
            }
        }
    }

    pub(super) fn is_asking(&self) -> bool {
        *self.known.asking.borrow()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offers(words: &str) -> Offers {
        let mut parser = ReplyParser::new();
        let text = format!("250-mx\r\n250-{words}\r\n250 HELP\r\n");
        Offers::of(&parser.push(text.as_bytes()).unwrap().unwrap())
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn an_answer_is_renewed_and_kept_while_nobody_answers() {
        let (known, start) = (Known::default(), Instant::now());
        let all = [1];
        assert!(known.is_due(1, start) && known.is_awaited(&all, start));
        known.learn(1, start, Some(offers("DSN")));
        let at = start + FRESH;
        assert!(!known.is_due(1, at) && !known.is_awaited(&all, at));
        let at = at + SECOND;
        assert!(known.is_due(1, at) && !known.is_awaited(&all, at));

        let mut at = at;
        while at <= start + KEPT {
            known.learn(1, at, None);
            assert_eq!(known.offers(&all, at), offers("DSN"));
            assert!(!known.is_due(1, at + SILENT), "asked too soon");
            at += SILENT + SECOND;
            assert!(known.is_due(1, at) && !known.is_awaited(&all, at));
        }
        // Nothing is known any more, and sessions do not wait for who does not answer.
        known.learn(1, at, None);
        assert_eq!(known.offers(&all, at), Offers::default());
        assert!(!known.is_awaited(&all, at + FRESH));
        // Unless nobody has asked for a while.
        assert!(known.is_awaited(&all, at + FRESH + SECOND));
        known.learn(1, at, Some(offers("SIZE 1")));
        assert_eq!(known.offers(&all, at), offers("SIZE 1"));
    }

    #[test]
    fn a_virtual_server_without_sessions_is_asked_for_when_one_comes() {
        let (known, start) = (Known::default(), Instant::now());
        known.learn(1, start, Some(offers("DSN")));
        assert!(!known.is_awaited(&[1], start + KEPT));
        let late = start + KEPT + SECOND;
        assert!(known.is_awaited(&[1], late) && known.is_due(1, late));
        assert_eq!(known.offers(&[1], late), Offers::default());
    }

    #[test]
    fn a_member_that_was_never_asked_is_waited_for_and_a_dead_one_is_not() {
        let (known, now) = (Known::default(), Instant::now());
        known.learn(1, now, Some(offers("DSN")));
        assert!(known.is_awaited(&[1, 2], now) && !known.is_awaited(&[1], now));
        known.learn(2, now, None);
        assert!(!known.is_awaited(&[1, 2], now + KEPT));
        assert_eq!(known.offers(&[1, 2], now), offers("DSN"));
        known.learn(2, now, Some(offers("SIZE 1")));
        assert_eq!(
            known.offers(&[1, 2], now),
            offers("SIZE 1").and(&offers("DSN"))
        );
        // No member, no wait.
        assert!(!known.is_awaited(&[], now));
    }

    #[test]
    fn one_round_at_a_time_and_one_that_is_dropped_is_over() {
        let known = Arc::default();
        let round = Round::begin(&known).unwrap();
        assert!(Round::begin(&known).is_none());
        drop(round);
        assert!(Round::begin(&known).is_some());
    }
}
