//! The verbs that ask the daemon: `status`, `show`, `stats`.

use anyhow::anyhow;
use serde::Serialize;

use super::{
    args::{Format, Kind},
    text,
};
use crate::{
    admin::{
        RefusalKind,
        client::{Client, ClientError},
        view::{Question, Status},
    },
    failure::{Exit, Failure, OrExit},
};

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let code = match error {
            ClientError::Unreachable { .. } => Exit::Unreachable,
            ClientError::Denied { .. } => Exit::Privilege,
            ClientError::Late { .. } => Exit::Temporary,
            ClientError::Answer { .. } => Exit::Failed,
            ClientError::Refused(ref refusal) => match refusal.kind {
                RefusalKind::Config => Exit::Config,
                RefusalKind::Privilege => Exit::Privilege,
                RefusalKind::Temporary => Exit::Temporary,
                RefusalKind::Unknown | RefusalKind::Request | RefusalKind::Failed => Exit::Failed,
            },
        };
        Self::new(code, error)
    }
}

/// `status`.
pub(super) fn status(client: &Client, format: Format) -> Result<String, Failure> {
    render(format, &client.status()?, text::status)
}

/// `stats`.
pub(super) fn stats(client: &Client, format: Format) -> Result<String, Failure> {
    render(format, &client.stats()?, text::stats)
}

/// `explain`.
pub(super) fn explain(
    client: &Client,
    question: &Question,
    format: Format,
) -> Result<String, Failure> {
    render(format, &client.explain(question)?, text::explanation)
}

/// `show KIND [NAME]`.
pub(super) fn show(
    client: &Client,
    kind: Kind,
    name: Option<&str>,
    format: Format,
) -> Result<String, Failure> {
    match kind {
        Kind::VirtualServers => {
            let mut servers = client.status()?.virtual_servers;
            if let Some(name) = name {
                let known = servers.iter().map(|server| server.name.clone()).collect();
                servers.retain(|server| server.name == name);
                found(&servers, "virtual server", name, known)?;
            }
            render(format, &servers, |servers| text::virtual_servers(servers))
        }
        Kind::Pools => {
            let mut pools = client.status()?.pools;
            if let Some(name) = name {
                let known = pools.iter().map(|pool| pool.name.clone()).collect();
                pools.retain(|pool| pool.name == name);
                found(&pools, "pool", name, known)?;
            }
            render(format, &pools, |pools| text::pools(pools))
        }
        Kind::Members => {
            let mut members = client.status()?.into_members();
            if let Some(name) = name {
                let known = members
                    .iter()
                    .map(|member| format!("{}/{}", member.pool, member.name))
                    .collect();
                members.retain(|member| {
                    member.pool == name
                        || name
                            .strip_prefix(member.pool.as_str())
                            .and_then(|rest| rest.strip_prefix('/'))
                            .is_some_and(|rest| rest == member.name)
                });
                found(&members, "pool or member", name, known)?;
            }
            render(format, &members, |members| text::members(members))
        }
        // Listed portion by portion: see `flows`.
        Kind::Flows => Ok(String::new()),
        Kind::Policy => {
            let mut policies = client.policies()?;
            if let Some(name) = name {
                let known = policies.iter().map(|policy| policy.name.clone()).collect();
                policies.retain(|policy| policy.name == name);
                found(&policies, "policy", name, known)?;
            }
            render(format, &policies, |policies| text::policies(policies))
        }
        Kind::Certificates => {
            let mut certificates = client.certificates()?;
            if let Some(name) = name {
                let known = certificates.iter().map(|one| one.name.clone()).collect();
                certificates.retain(|one| one.name == name);
                found(&certificates, "certificate", name, known)?;
            }
            render(format, &certificates, |all| text::certificates(all))
        }
        Kind::Sessions => {
            let mut sessions = client.sessions()?;
            if let Some(name) = name {
                sessions.retain(|session| session.virtual_server == name);
                if sessions.is_empty() {
                    known_server(client.status()?, name)?;
                }
            }
            render(format, &sessions, |sessions| text::sessions(sessions))
        }
    }
}

/// No flow of a virtual server is an answer; no such virtual server is a mistake.
fn known_server(status: Status, name: &str) -> Result<(), Failure> {
    let known: Vec<_> = status
        .virtual_servers
        .into_iter()
        .map(|server| server.name)
        .collect();
    let hits: Vec<_> = known
        .iter()
        .filter(|known| *known == name)
        .cloned()
        .collect();
    found(&hits, "virtual server", name, known)
}

fn found<T>(hits: &[T], kind: &str, name: &str, known: Vec<String>) -> Result<(), Failure> {
    if !hits.is_empty() {
        return Ok(());
    }
    let known = if known.is_empty() {
        "none".to_owned()
    } else {
        known.join(", ")
    };
    Err(Failure::new(
        Exit::Failed,
        anyhow!("no {kind} is named \"{name}\"\n  The daemon knows: {known}."),
    ))
}

/// Both forms of an answer come from the same value, so that they cannot disagree.
pub(super) fn render<T: Serialize>(
    format: Format,
    value: &T,
    text: impl FnOnce(&T) -> String,
) -> Result<String, Failure> {
    if format.json {
        json(value)
    } else {
        Ok(text(value))
    }
}

/// Pretty, and ending in a line feed.
pub(super) fn json(value: &impl Serialize) -> Result<String, Failure> {
    let mut out = serde_json::to_string_pretty(value).or_exit(Exit::Failed)?;
    out.push('\n');
    Ok(out)
}
