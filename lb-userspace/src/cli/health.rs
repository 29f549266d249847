//! `health`: one line for a monitoring system, by the convention of monitoring plugins.

use std::{collections::BTreeMap, fmt::Write, time::Duration};

use serde::Serialize;

use super::table::printable;
use crate::admin::{
    client::{Client, ClientError},
    view::Status,
};

/// What the plugin ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
#[repr(u8)]
pub(super) enum State {
    Ok = 0,
    Warning = 1,
    Critical = 2,
    Unknown = 3,
}

/// Shorter than the ten seconds that schedulers commonly give a plugin.
const DEADLINE: Duration = Duration::from_secs(8);

/// The verdict, as `--json` prints it.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Health {
    /// In capitals, as in the line.
    pub(super) state: State,
    /// What is wrong, or that nothing is.
    pub(super) summary: String,
    /// Numbers with their upper limit, by name; none when the daemon cannot be asked.
    pub(super) perfdata: BTreeMap<&'static str, Number>,
}

/// A value of the perfdata.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Number {
    pub(super) value: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) max: Option<u64>,
}

/// Asks the daemon; that it cannot be asked is a verdict too.
pub(super) fn ask(client: &Client) -> Health {
    judge(client.clone().with_deadline(DEADLINE).status())
}

impl Health {
    /// `SMTPLB STATE: summary | perfdata`
    pub(super) fn line(&self) -> String {
        let state = match self.state {
            State::Ok => "OK",
            State::Warning => "WARNING",
            State::Critical => "CRITICAL",
            State::Unknown => "UNKNOWN",
        };
        // A bar would begin the perfdata.
        let summary = printable(&self.summary).replace('|', "/");
        let mut line = format!("SMTPLB {state}: {summary}");
        let mut separator = " |";
        for (name, number) in &self.perfdata {
            let _ = write!(line, "{separator} {name}={}", number.value);
            if let Some(max) = number.max {
                let _ = write!(line, ";;;0;{max}");
            }
            separator = "";
        }
        line.push('\n');
        line
    }
}

fn judge(answer: Result<Status, ClientError>) -> Health {
    let status = match answer {
        Ok(status) => status,
        Err(error) => {
            // The first line says what; the remedy below it has no place here.
            let said = error.to_string();
            return Health {
                state: State::Unknown,
                summary: said.lines().next().unwrap_or_default().to_owned(),
                perfdata: BTreeMap::new(),
            };
        }
    };

    let servers_down: Vec<_> = status
        .virtual_servers
        .iter()
        .filter(|server| server.state != "up")
        .map(|server| server.name.as_str())
        .collect();
    let members = || status.pools.iter().flat_map(|pool| &pool.members);
    let members_down: Vec<_> = members()
        .filter(|member| member.state == "down")
        .map(|member| format!("{}/{}", member.pool, member.name))
        .collect();
    let members_up = members().filter(|member| member.state == "up").count();

    let mut wrong = Vec::new();
    if !servers_down.is_empty() {
        wrong.push(format!("no member up for {}", servers_down.join(", ")));
    }
    if !members_down.is_empty() {
        wrong.push(format!("down: {}", members_down.join(", ")));
    }
    let state = match (servers_down.is_empty(), members_down.is_empty()) {
        (false, _) => State::Critical,
        (true, false) => State::Warning,
        (true, true) => State::Ok,
    };
    let summary = if wrong.is_empty() {
        format!(
            "{} virtual servers, {members_up} of {} members up",
            status.virtual_servers.len(),
            members().count()
        )
    } else {
        wrong.join("; ")
    };

    let sessions = members().map(|member| member.proxy.active).sum();
    let number = |value: usize, max: usize| Number {
        value: value as u64,
        max: Some(max as u64),
    };
    let servers = status.virtual_servers.len();
    let perfdata = BTreeMap::from([
        (
            "flows",
            Number {
                value: status.kernel.flows,
                max: Some(status.kernel.flows_max),
            },
        ),
        (
            "members_down",
            number(members_down.len(), members().count()),
        ),
        ("members_up", number(members_up, members().count())),
        (
            "sessions",
            Number {
                value: sessions,
                max: None,
            },
        ),
        (
            "virtual_servers_up",
            number(servers - servers_down.len(), servers),
        ),
    ]);
    Health {
        state,
        summary,
        perfdata,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::{Source, sample::FakeSource};

    fn healthy() -> Status {
        let mut status = FakeSource.status();
        for member in status.pools.iter_mut().flat_map(|pool| &mut pool.members) {
            member.state = "up".into();
        }
        status
    }

    #[test]
    fn ok_when_all_are_up() {
        let health = judge(Ok(healthy()));
        assert_eq!(health.state, State::Ok);
        assert_eq!(
            health.line(),
            "SMTPLB OK: 2 virtual servers, 3 of 3 members up | flows=2;;;0;1048576 members_down=0;;;0;3 \
             members_up=3;;;0;3 sessions=3 virtual_servers_up=2;;;0;2\n"
        );
    }

    #[test]
    fn a_member_that_is_still_checked_is_no_fault() {
        let mut status = healthy();
        status.pools[0].members[0].state = "checking".into();
        assert_eq!(judge(Ok(status)).state, State::Ok);
    }

    #[test]
    fn warning_when_a_member_is_down() {
        let health = judge(Ok(FakeSource.status()));
        assert_eq!(health.state, State::Warning);
        assert!(
            health
                .line()
                .starts_with("SMTPLB WARNING: down: msa/msa2 | ")
        );
    }

    #[test]
    fn critical_when_a_virtual_server_has_nobody() {
        let mut status = FakeSource.status();
        status.virtual_servers[1].state = "down".into();
        status.pools[0].members[0].state = "down".into();
        let health = judge(Ok(status));
        assert_eq!(health.state, State::Critical);
        assert!(health.line().starts_with(
            "SMTPLB CRITICAL: no member up for submission6; down: msa/msa1, msa/msa2 | "
        ));
    }

    #[test]
    fn unknown_when_nobody_answers() {
        let dir = tempfile::tempdir().unwrap();
        let health = ask(&Client::new(&dir.path().join("admin.sock")));
        assert_eq!(health.state, State::Unknown);
        let line = health.line();
        assert!(
            line.starts_with("SMTPLB UNKNOWN: no daemon answers on "),
            "{line}"
        );
        assert_eq!(line.lines().count(), 1);
        assert!(!line.contains('|'));
    }

    #[test]
    fn names_cannot_forge_perfdata() {
        let mut status = FakeSource.status();
        status.pools[0].members[1].name = "x|y\n".into();
        let line = judge(Ok(status)).line();
        assert_eq!(line.matches('|').count(), 1);
        assert_eq!(line.lines().count(), 1);
    }
}
