//! What others ask of the daemon's main task, which does one thing after the other.

use std::{sync::Arc, time::Duration};

use tokio::sync::oneshot;

use crate::{
    admin::{Refusal, view::ReloadView},
    model::Name,
    pool::{Admin, LiveMember},
};

/// One thing to do.
pub(super) enum Order {
    /// Read the configuration again.
    Reload {
        /// Only say what would change.
        dry_run: bool,
        /// Who wants to know.
        reply: oneshot::Sender<Result<ReloadView, Refusal>>,
    },
    /// Set what the operator wants of a member.
    Member {
        /// Its pool.
        pool: String,
        /// Its name in the pool.
        member: String,
        /// What is wanted.
        admin: Admin,
        /// Until its connections are ended.
        deadline: Option<Duration>,
        /// Who wants to know.
        reply: oneshot::Sender<Result<(), Refusal>>,
    },
    /// A monitor has found a member down that was up.
    Fell(Name, Arc<LiveMember>),
}

/// Orders that may wait; beyond, who asks is told to try again.
pub(super) const WAITING: usize = 64;
