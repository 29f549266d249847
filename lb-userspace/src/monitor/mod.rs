//! Monitors: is a member fit to take clients?
//!
//! `schedule` says when to probe and what a row of results means, `dialogue` what to say and what to expect;
//! both are pure. `runner` owns the sockets and the clock.

pub mod dialogue;
mod runner;
pub mod schedule;

use std::sync::Arc;

pub use runner::Watches;

use crate::{
    model::{Monitor, Name},
    pool::LiveMember,
};

/// What one probe found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// Was this probe good? The member's own state follows after `rise` or `fall` of them.
    pub up: bool,
    /// In words, e.g. `greeting 220 in 3 ms` or `EHLO: 451 try later`: printable ASCII, at most
    /// [`dialogue::LONGEST_REASON`] characters.
    pub reason: String,
}

/// A member and who watches it.
#[derive(Debug, Clone)]
pub struct Target {
    /// The pool it is a member of.
    pub pool: Name,
    /// The member, whose state is set.
    pub member: Arc<LiveMember>,
    /// The monitor of its pool.
    pub monitor: Arc<Monitor>,
    /// What is known of the member already; without it the first probe decides alone.
    pub known: Option<bool>,
}

/// Who wants to know.
pub trait Observer: Send + Sync + 'static {
    /// A probe has ended. `changed`: it has just turned the member's state, which is already set.
    fn probed(&self, target: &Target, health: &Health, changed: bool);
}
