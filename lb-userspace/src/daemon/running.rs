//! What the daemon's tasks share: the generation in use with all that came alive from it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::Instant,
};

use tokio::sync::mpsc;

use super::{live::Certificates, orders::Order, roster::Roster};
use crate::{
    dataplane::{KernelPlane, Numbers},
    model::{Generation, Name},
    monitor::{Health, Observer, Target},
    pool::{LiveMember, LivePool},
    proxy::{Proxy, Service, Services, Sources},
    telemetry::lines::Lines,
};

/// A generation come alive. Replaced as a whole by a reload.
pub(super) struct Running {
    pub(super) generation: Generation,
    pub(super) numbers: Numbers,
    pub(super) pools: BTreeMap<Name, Arc<LivePool>>,
    pub(super) certificates: Certificates,
    pub(super) services: Vec<Arc<Service>>,
    /// Addresses of SNAT pools in the proxy plane; the same from generation to generation.
    pub(super) sources: Arc<Sources>,
}

impl Running {
    /// Every member with its pool's name.
    pub(super) fn members(&self) -> impl Iterator<Item = (&Name, &Arc<LiveMember>)> {
        self.pools
            .iter()
            .flat_map(|(name, pool)| pool.members().iter().map(move |member| (name, member)))
    }

    /// The members that no monitor watches: they are up.
    pub(super) fn unwatched(&self) -> impl Iterator<Item = &Arc<LiveMember>> {
        let pools = self.generation.pools.values();
        pools
            .filter(|pool| pool.monitor.is_none())
            .filter_map(|pool| self.pools.get(&pool.name))
            .flat_map(|pool| pool.members())
    }

    /// A member by its pool's name and its own.
    pub(super) fn member(&self, pool: &str, name: &str) -> Option<&Arc<LiveMember>> {
        let members = self.pools.get(pool)?.members();
        members.iter().find(|member| &*member.name == name)
    }

    /// May this member take new connections? The tables are filled from this.
    pub(super) fn takes_new(&self, number: u16) -> bool {
        self.members()
            .any(|(_, member)| member.id == number && member.takes_new())
    }
}

/// All that the daemon's tasks share.
pub(super) struct Shared {
    running: RwLock<Arc<Running>>,
    pub(super) started: Instant,
    plane: Mutex<KernelPlane>,
    pub(super) proxy: Mutex<Option<Proxy>>,
    pub(super) services: Arc<Services>,
    pub(super) health: Mutex<HashMap<u16, Finding>>,
    pub(super) roster: Mutex<Roster>,
    pub(super) orders: mpsc::Sender<Order>,
    /// Standard output.
    pub(super) lines: Lines,
}

/// What a member's monitor found last.
#[derive(Debug, Clone)]
pub(super) struct Finding {
    pub(super) reason: String,
    /// Since when the member is up, or down.
    pub(super) since: Instant,
}

/// A panic elsewhere must not take the plane down: what is behind the lock stays usable.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(
        running: Running,
        plane: KernelPlane,
        roster: Roster,
        orders: mpsc::Sender<Order>,
        lines: Lines,
    ) -> Self {
        Self {
            running: RwLock::new(Arc::new(running)),
            started: Instant::now(),
            plane: Mutex::new(plane),
            proxy: Mutex::new(None),
            services: Arc::default(),
            health: Mutex::default(),
            roster: Mutex::new(roster),
            orders,
            lines,
        }
    }

    /// The generation in use.
    pub(super) fn running(&self) -> Arc<Running> {
        let running = self.running.read();
        running.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on this one is in use.
    pub(super) fn set_running(&self, next: Arc<Running>) {
        *self.running.write().unwrap_or_else(PoisonError::into_inner) = next;
    }

    pub(super) fn plane(&self) -> MutexGuard<'_, KernelPlane> {
        lock(&self.plane)
    }

    /// Members whose first probe has not ended yet.
    pub(super) fn unprobed(&self, targets: &[u16]) -> usize {
        let health = lock(&self.health);
        let unknown = |number: &&u16| !health.contains_key(number);
        targets.iter().filter(unknown).count()
    }

    /// Tells the tables whether a member may take new connections, and by which address of ours it is reached.
    pub(super) fn write_member(&self, plane: &mut KernelPlane, pool: &Name, member: &LiveMember) {
        let written = plane.set_member(member.id, pool, member.address, member.takes_new());
        if let Err(error) = written {
            log::error!("member {pool}/{}: {error:#}", member.name);
        }
    }
}

impl Observer for Shared {
    fn probed(&self, target: &Target, health: &Health, changed: bool) {
        let member = &target.member;
        let mut found = lock(&self.health);
        let since = match found.get(&member.id) {
            Some(before) if !changed => before.since,
            _ => Instant::now(),
        };
        let reason = health.reason.clone();
        let first = found.insert(member.id, Finding { reason, since }).is_none();
        drop(found);
        if !changed && !first {
            return;
        }
        let word = if member.is_up() { "up" } else { "down" };
        log::info!(
            "member {}/{} is {word}: {}",
            target.pool,
            member.name,
            health.reason
        );
        let mut plane = self.plane();
        // Before this generation is in use, and after another daemon has taken over, the tables are not ours.
        if !plane.is_owner() {
            return;
        }
        self.write_member(&mut plane, &target.pool, member);
        if changed && !member.is_up() {
            // A full queue means that the main task is far behind; the next probe does not repeat this.
            let fell = Order::Fell(target.pool.clone(), member.clone());
            if self.orders.try_send(fell).is_err() {
                log::error!(
                    "member {}/{}: nobody heard that it is down",
                    target.pool,
                    member.name
                );
            }
        }
    }
}
