//! The sessions of a worker, for those who ask.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use tokio::sync::Notify;

use crate::{
    admin::view::SessionView, model::Name, smtp::phase::Phase, telemetry::session::SessionId,
};

/// Sessions that run.
#[derive(Debug, Default)]
pub(super) struct Live {
    sessions: Mutex<HashMap<SessionId, Arc<Entry>>>,
    /// Sessions that are over, and whose clients have not heard so yet.
    partings: AtomicUsize,
    left: Notify,
}

/// What others may see of a session.
#[derive(Debug)]
pub(super) struct Entry {
    virtual_server: Name,
    client: Mutex<SocketAddr>,
    since: Instant,
    phase: AtomicU8,
    member: Mutex<Option<Name>>,
}

/// A session's place in the list, left when dropped.
#[derive(Debug)]
pub(super) struct Present {
    pub(super) id: SessionId,
    pub(super) entry: Arc<Entry>,
    live: Arc<Live>,
}

/// A client that is told goodbye.
#[derive(Debug)]
pub(super) struct Parting(Arc<Live>);

impl Live {
    /// A session begins.
    pub(super) fn enter(self: &Arc<Self>, virtual_server: Name, client: SocketAddr) -> Present {
        let id = next_id();
        let entry = Arc::new(Entry {
            virtual_server,
            client: Mutex::new(client),
            since: Instant::now(),
            phase: AtomicU8::new(Phase::Connect as u8),
            member: Mutex::new(None),
        });
        lock(&self.sessions).insert(id, entry.clone());
        Present {
            id,
            entry,
            live: self.clone(),
        }
    }

    /// A session ends with what is left to be said.
    pub(super) fn part(self: &Arc<Self>) -> Parting {
        self.partings.fetch_add(1, Relaxed);
        Parting(self.clone())
    }

    /// Waits until none is left.
    pub(super) async fn emptied(&self) {
        self.wait_until(|| lock(&self.sessions).is_empty()).await;
    }

    /// Waits until nobody is told goodbye any more.
    pub(super) async fn parted(&self) {
        self.wait_until(|| self.partings.load(Relaxed) == 0).await;
    }

    async fn wait_until(&self, done: impl Fn() -> bool) {
        loop {
            let left = self.left.notified();
            if done() {
                return;
            }
            left.await;
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        lock(&self.sessions).len()
    }

    /// All of them, in no order.
    pub(super) fn views(&self) -> Vec<SessionView> {
        let sessions = lock(&self.sessions);
        let view = |(id, entry): (&SessionId, &Arc<Entry>)| SessionView {
            id: id.to_string(),
            virtual_server: entry.virtual_server.to_string(),
            client: *lock(&entry.client),
            member: lock(&entry.member).as_ref().map(ToString::to_string),
            phase: entry.phase().as_str().to_owned(),
            age_s: entry.since.elapsed().as_secs(),
        };
        sessions.iter().map(view).collect()
    }
}

impl Entry {
    pub(super) fn phase(&self) -> Phase {
        Phase::from_number(self.phase.load(Relaxed))
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Relaxed);
    }

    /// A header has told who the client is.
    pub(super) fn set_client(&self, client: SocketAddr) {
        *lock(&self.client) = client;
    }

    pub(super) fn set_member(&self, member: Option<Name>) {
        *lock(&self.member) = member;
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        lock(&self.live.sessions).remove(&self.id);
        self.live.left.notify_waiters();
    }
}

impl Drop for Parting {
    fn drop(&mut self) {
        self.0.partings.fetch_sub(1, Relaxed);
        self.0.left.notify_waiters();
    }
}

/// Counts up from the second in which the process began: no number comes back after a restart.
fn next_id() -> SessionId {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static FIRST: std::sync::LazyLock<u64> = std::sync::LazyLock::new(|| {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        now.as_secs() << 28
    });
    SessionId(*FIRST + NEXT.fetch_add(1, Relaxed))
}

/// A panic elsewhere leaves the list as usable as before.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
