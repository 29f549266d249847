//! What can be asked of the admin API, and where; server and client share it.

/// A resource of the admin API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// [`super::view::Status`]
    Status,
    /// A list of [`super::view::VirtualServerView`]
    VirtualServers,
    /// A list of [`super::view::PoolView`]
    Pools,
    /// A list of [`super::view::MemberView`], pool after pool
    Members,
    /// A list of [`super::view::FlowView`]
    Flows,
    /// A list of [`super::view::SessionView`]
    Sessions,
    /// [`super::view::Stats`]
    Stats,
    /// [`super::view::ConfigView`]
    Config,
    /// [`super::view::CountView`]
    FlowCount,
    /// A list of [`super::view::PolicyView`]
    Policies,
    /// A list of [`super::view::CertificateView`]
    Certificates,
    /// [`super::view::ExplanationView`]. Query: [`super::view::Question`].
    Explain,
}

/// What the admin API can be told to do, by POST.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Read the configuration again: [`super::view::ReloadView`]. Query: `dry_run=1`.
    Reload,
    /// Set what is wanted of a member: [`super::view::MemberView`]. Query: `member`, `state`, `deadline_ms`.
    Member,
}

impl Action {
    /// Its path.
    pub fn path(self) -> &'static str {
        match self {
            Self::Reload => "/v1/reload",
            Self::Member => "/v1/members",
        }
    }

    /// The action at `path`, if there is one.
    pub fn at(path: &str) -> Option<Self> {
        [Self::Reload, Self::Member]
            .into_iter()
            .find(|action| action.path() == path)
    }
}

/// The header that tells where the next portion of a list begins.
pub const NEXT: &str = "smtplb-next";

impl Route {
    /// Every resource.
    pub const ALL: [Self; 12] = [
        Self::Status,
        Self::VirtualServers,
        Self::Pools,
        Self::Members,
        Self::Flows,
        Self::Sessions,
        Self::Stats,
        Self::Config,
        Self::FlowCount,
        Self::Policies,
        Self::Certificates,
        Self::Explain,
    ];

    /// Its path. The version moves when a field changes its meaning or goes away, not when one is added.
    pub fn path(self) -> &'static str {
        match self {
            Self::Status => "/v1/status",
            Self::VirtualServers => "/v1/virtual-servers",
            Self::Pools => "/v1/pools",
            Self::Members => "/v1/members",
            Self::Flows => "/v1/flows",
            Self::Sessions => "/v1/sessions",
            Self::Stats => "/v1/stats",
            Self::Config => "/v1/config",
            Self::FlowCount => "/v1/flows/count",
            Self::Policies => "/v1/policies",
            Self::Certificates => "/v1/certificates",
            Self::Explain => "/v1/explain",
        }
    }

    /// The resource at `path`, if there is one.
    pub fn at(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|route| route.path() == path)
    }
}
