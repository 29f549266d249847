//! The admin API on a unix socket.

pub mod client;
pub mod query;
pub mod route;
pub mod server;
pub mod socket;
pub mod view;

#[cfg(test)]
pub(crate) mod sample;

use std::{fmt, time::Duration};

use crate::pool::Admin;

/// Where the answers come from; the daemon implements it. Called where it may block.
pub trait Source: Send + Sync + 'static {
    /// `GET /v1/status`
    fn status(&self) -> view::Status;
    /// `GET /v1/flows`: as many as fit one answer.
    ///
    /// # Errors
    ///
    /// When the query names what is not there.
    fn flows(&self, query: &query::FlowQuery) -> Result<FlowPage, Refusal>;
    /// `GET /v1/flows/count`
    ///
    /// # Errors
    ///
    /// As [`Self::flows`].
    fn count_flows(&self, query: &query::FlowQuery) -> Result<u64, Refusal>;
    /// `GET /v1/sessions`
    fn sessions(&self) -> Vec<view::SessionView>;
    /// `GET /v1/stats`
    fn stats(&self) -> view::Stats;
    /// `GET /v1/config`
    fn config(&self) -> view::ConfigView;
    /// `GET /v1/policies`
    fn policies(&self) -> Vec<view::PolicyView>;
    /// `GET /v1/certificates`
    fn certificates(&self) -> Vec<view::CertificateView>;
    /// `GET /v1/explain`
    ///
    /// # Errors
    ///
    /// When it names what is not there.
    fn explain(&self, question: &view::Question) -> Result<view::ExplanationView, Refusal>;
    /// `POST /v1/reload`
    ///
    /// # Errors
    ///
    /// When the file has faults, or cannot be put to use; then nothing has changed.
    fn reload(&self, dry_run: bool) -> Result<view::ReloadView, Refusal>;
    /// `POST /v1/members`
    ///
    /// # Errors
    ///
    /// When there is no such member, or its state cannot be kept.
    fn set_member(&self, order: &MemberOrder) -> Result<view::MemberView, Refusal>;
}

/// A portion of the flows.
#[derive(Debug, Default)]
pub struct FlowPage {
    /// Flows that the query chooses.
    pub flows: Vec<view::FlowView>,
    /// What to ask for next; nothing when these were the last.
    pub next: Option<u32>,
}

/// What the operator wants of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberOrder {
    /// Its pool.
    pub pool: String,
    /// Its name in the pool.
    pub member: String,
    /// What is wanted.
    pub admin: Admin,
    /// Until its connections are ended.
    pub deadline: Option<Duration>,
}

/// Why something that was asked for was not done; nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Whose fault it is.
    pub kind: RefusalKind,
    /// What is wrong, and what to do.
    pub message: String,
}

/// Whose fault a refusal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusalKind {
    /// The configuration, or a file that it names.
    Config,
    /// It names what is not there.
    Unknown,
    /// The request itself.
    Request,
    /// A privilege is missing.
    Privilege,
    /// It may work when tried again.
    Temporary,
    /// Ours, or the system's.
    Failed,
}

impl RefusalKind {
    /// Each with the status of its answer (RFC 9110 §15).
    pub const ALL: [(Self, u16); 6] = [
        (Self::Config, 422),
        (Self::Unknown, 404),
        (Self::Request, 400),
        (Self::Privilege, 403),
        (Self::Temporary, 503),
        (Self::Failed, 500),
    ];

    /// The status of the answer.
    pub fn status(self) -> u16 {
        Self::ALL
            .into_iter()
            .find(|(kind, _)| *kind == self)
            .map_or(500, |(_, status)| status)
    }

    /// From the status of the answer.
    pub fn from_status(status: u16) -> Self {
        Self::ALL
            .into_iter()
            .find(|(_, known)| *known == status)
            .map_or(Self::Failed, |(kind, _)| kind)
    }
}

impl Refusal {
    /// It names what is not there.
    pub fn unknown(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::Unknown, message)
    }

    /// Ours, or the system's fault.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::Failed, message)
    }

    /// Of a kind.
    pub fn new(kind: RefusalKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}
