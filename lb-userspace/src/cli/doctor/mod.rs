//! `doctor`: what is wrong with this box, and what to do about it.

mod checks;
mod one_way;

use std::{fmt::Write as _, path::Path};

use serde::Serialize;

use self::checks::Box as TheBox;
use super::{
    Ended,
    args::{Format, Paths},
    read,
};
use crate::{
    admin::{
        client::{Client, ClientError},
        view::Status,
    },
    config,
    failure::{Exit, Failure},
};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// As it should be.
    Ok,
    /// Something is less than it could be.
    Warning,
    /// It could not be looked at.
    Unknown,
    /// It does not work like this.
    Wrong,
}

/// What one look has found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    /// What was looked at.
    check: String,
    level: Level,
    /// What is there.
    found: String,
    /// What to do; absent when nothing is.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn new(check: &str, level: Level, found: impl Into<String>, remedy: &str) -> Self {
        Self {
            check: check.to_owned(),
            level,
            found: found.into(),
            remedy: (!remedy.is_empty()).then(|| remedy.to_owned()),
        }
    }

    fn ok(check: &str, found: impl Into<String>) -> Self {
        Self::new(check, Level::Ok, found, "")
    }
}

/// `doctor`.
pub(super) fn doctor(paths: &Paths, format: Format) -> Result<Ended, Failure> {
    let mut findings = Vec::new();
    let loaded = config::load(&paths.config);
    let mut code = Exit::Ok;
    let generation = match loaded {
        Ok((generation, _)) => {
            findings.push(Finding::ok(
                "configuration",
                paths.config.display().to_string(),
            ));
            Some(generation)
        }
        Err(error) => {
            let said = error.to_string();
            code = Failure::from(error).code;
            findings.push(Finding::new(
                "configuration",
                Level::Wrong,
                said.lines().next().unwrap_or_default(),
                "`smtplb check` tells all of it. What follows looks at no interface and no member.",
            ));
            None
        }
    };
    let the_box = TheBox::new(Path::new("/"));
    findings.extend(the_box.kernel(&crate::dataplane::features()));
    findings.extend(the_box.process());
    findings.push(checks::bpffs(&paths.bpffs));
    findings.push(checks::state(&paths.state));
    findings.extend(the_box.system());
    if let Some(generation) = &generation {
        findings.extend(the_box.network(generation));
    }
    let status = Client::new(&paths.admin).status();
    if let (Some(generation), Ok(status)) = (&generation, &status) {
        findings.extend(one_way::members(generation, status));
    }
    findings.push(daemon(status));
    let worst = findings.iter().map(|finding| finding.level).max();
    code = match (code, worst) {
        (Exit::Ok, Some(Level::Wrong)) => Exit::Failed,
        (Exit::Ok, Some(Level::Unknown)) => Exit::Privilege,
        (code, _) => code,
    };
    let out = match format.json {
        true => read::json(&findings)?,
        false => text(&findings),
    };
    Ok(Ended {
        code: code.code(),
        out,
        ..Ended::default()
    })
}

/// That none runs is no fault: doctor is for the time before, too.
fn daemon(status: Result<Status, ClientError>) -> Finding {
    match status {
        Ok(status) if status.kernel.degraded.is_empty() => Finding::ok(
            "daemon",
            format!(
                "serves generation {}, process {}",
                status.generation, status.pid
            ),
        ),
        Ok(status) => Finding::new(
            "daemon",
            Level::Warning,
            status
                .kernel
                .degraded
                .iter()
                .map(|loss| format!("no {loss}"))
                .collect::<Vec<_>>()
                .join("; "),
            "Use a newer kernel, or the service as it is installed.",
        ),
        Err(error) => {
            let (level, remedy) = match error {
                ClientError::Unreachable { .. } => (Level::Ok, ""),
                ClientError::Denied { .. } => (
                    Level::Unknown,
                    "Look as root, or as the user that it runs as.",
                ),
                _ => (
                    Level::Warning,
                    "Look at its log; restart it after an upgrade.",
                ),
            };
            let said = error.to_string();
            let first = said.lines().next().unwrap_or_default();
            Finding::new("daemon", level, first, remedy)
        }
    }
}

fn text(findings: &[Finding]) -> String {
    let mut out = String::new();
    for finding in findings {
        let word = match finding.level {
            Level::Ok => "ok     ",
            Level::Warning => "warning",
            Level::Unknown => "unknown",
            Level::Wrong => "WRONG  ",
        };
        let _ = writeln!(out, "{word}  {}: {}", finding.check, finding.found);
        if let Some(remedy) = &finding.remedy {
            let _ = writeln!(out, "         {remedy}");
        }
    }
    let count = |level: Level| {
        findings
            .iter()
            .filter(|finding| finding.level == level)
            .count()
    };
    let _ = writeln!(
        out,
        "{} looked at: {} wrong, {} not known, {} warnings",
        findings.len(),
        count(Level::Wrong),
        count(Level::Unknown),
        count(Level::Warning)
    );
    out
}
