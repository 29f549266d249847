//! Live members: which of them may take the next session, and how busy each is.
//!
//! Counters are shared with the kernel plane, so that both planes choose by the same numbers.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering::Relaxed},
    },
};

use lb_common::{layout::POOL_MEMBERS, stats::TrafficCell};

use crate::model::{Method, Name};

/// A pool that serves: the members of one [`crate::model::Pool`] with their state.
#[derive(Debug)]
pub struct LivePool {
    name: Name,
    method: Method,
    members: Vec<Arc<LiveMember>>,
    turn: AtomicUsize,
}

/// A member that serves.
#[derive(Debug)]
pub struct LiveMember {
    /// Unique in its pool.
    pub name: Name,
    /// Where it listens.
    pub address: SocketAddr,
    /// Its number in the tables of the kernel plane.
    pub id: u16,
    up: AtomicBool,
    admin: AtomicU8,
    cell: &'static TrafficCell,
}

/// What the operator wants of a member, whatever its monitor finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Admin {
    /// It serves.
    #[default]
    Ready = 0,
    /// Nothing new; what is there ends by itself, or at a deadline.
    Drain = 1,
    /// Nothing new, what is there is ended, and nobody probes it.
    Maint = 2,
}

impl Admin {
    /// The word in commands, views and the state file.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Drain => "drain",
            Self::Maint => "maint",
        }
    }

    /// From its word.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Ready, Self::Drain, Self::Maint]
            .into_iter()
            .find(|admin| admin.word() == word)
    }
}

/// A place at a member, given back when dropped.
#[derive(Debug)]
pub struct Lease {
    member: Arc<LiveMember>,
}

impl LivePool {
    /// A pool of these members.
    pub fn new(name: Name, method: Method, members: Vec<Arc<LiveMember>>) -> Self {
        Self {
            name,
            method,
            members,
            turn: AtomicUsize::new(0),
        }
    }

    /// The pool's name.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Its members, in the order of the file.
    pub fn members(&self) -> &[Arc<LiveMember>] {
        &self.members
    }

    /// Takes a place at the best member that takes new sessions and was not `tried` yet.
    ///
    /// Members that cannot be taken are left out before the turn is counted: the one behind a dead member would
    /// otherwise get its part as well.
    pub fn select(&self, tried: &[u16]) -> Option<Lease> {
        let fit = self.fit(tried);
        let count = fit.count_ones() as usize;
        if count == 0 {
            return None;
        }
        let start = self.turn.fetch_add(1, Relaxed) % count;
        let in_turn = (0..self.members.len().min(POOL_MEMBERS))
            .filter(|number| fit & (1 << number) != 0)
            .cycle()
            .skip(start)
            .take(count)
            .map(|number| &self.members[number]);
        let chosen = match self.method {
            Method::RoundRobin => in_turn.into_iter().next(),
            // The first of equals, so that the turn spreads ties.
            Method::LeastConnections => in_turn.min_by_key(|member| member.cell.active()),
        }?;
        chosen.cell.session_started();
        Some(Lease {
            member: chosen.clone(),
        })
    }

    /// One bit for each member that may be taken now.
    fn fit(&self, tried: &[u16]) -> u64 {
        const { assert!(POOL_MEMBERS <= u64::BITS as usize, "a bit per member") };
        debug_assert!(self.members.len() <= POOL_MEMBERS);
        let numbered = self.members.iter().take(POOL_MEMBERS).enumerate();
        numbered
            .filter(|(_, member)| member.takes_new() && !tried.contains(&member.id))
            .fold(0, |fit, (number, _)| fit | (1 << number))
    }
}

impl LiveMember {
    /// A member that starts in the given state and counts in `cell`.
    pub fn new(
        name: Name,
        address: SocketAddr,
        id: u16,
        up: bool,
        cell: &'static TrafficCell,
    ) -> Self {
        Self {
            name,
            address,
            id,
            up: AtomicBool::new(up),
            admin: AtomicU8::new(Admin::Ready as u8),
            cell,
        }
    }

    /// Does its monitor find it good?
    pub fn is_up(&self) -> bool {
        self.up.load(Relaxed)
    }

    /// May it take new connections? Its monitor and the operator both have to want it.
    pub fn takes_new(&self) -> bool {
        self.is_up() && self.admin() == Admin::Ready
    }

    /// What the operator wants of it.
    pub fn admin(&self) -> Admin {
        match self.admin.load(Relaxed) {
            0 => Admin::Ready,
            1 => Admin::Drain,
            _ => Admin::Maint,
        }
    }

    /// Sets what the operator wants of it.
    pub fn set_admin(&self, admin: Admin) {
        self.admin.store(admin as u8, Relaxed);
    }

    /// Sets what its monitor found; true when that is news.
    pub fn set_up(&self, up: bool) -> bool {
        self.up.swap(up, Relaxed) != up
    }

    /// Its counters, of both planes.
    pub fn counters(&self) -> &'static TrafficCell {
        self.cell
    }
}

impl Lease {
    /// The member this place is at.
    pub fn member(&self) -> &Arc<LiveMember> {
        &self.member
    }

    /// Counts bytes moved for a session: from the client to the member, and back.
    pub fn count_bytes(&self, to_member: u64, to_client: u64) {
        self.member.cell.count_session_bytes(to_member, to_client);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.member.cell.session_ended();
    }
}

#[cfg(test)]
mod tests;
