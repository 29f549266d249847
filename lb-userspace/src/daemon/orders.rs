//! What others ask of the daemon's main task, which does one thing after the other.

use std::{sync::Arc, time::Duration};

use tokio::sync::oneshot;

use crate::{
    admin::{Refusal, RefusalKind, view::ReloadView},
    failure::{Exit, Failure},
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

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        let kind = match failure.code {
            Exit::Config => RefusalKind::Config,
            Exit::Privilege => RefusalKind::Privilege,
            Exit::Temporary => RefusalKind::Temporary,
            Exit::Ok | Exit::Failed | Exit::Usage | Exit::Unreachable => RefusalKind::Failed,
        };
        Self::new(kind, failure.to_string())
    }
}

/// Orders that may wait; beyond, who asks is told to try again.
pub(super) const WAITING: usize = 64;
