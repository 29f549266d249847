//! The verbs that tell the daemon to do something, and those that show what it would do.

use std::fmt::Write as _;

use super::{
    args::{Format, MemberArgs},
    read,
    table::printable,
    units,
};
use crate::{
    admin::{
        client::Client,
        route::Route,
        view::{ConfigView, MemberView, ReloadView},
    },
    failure::Failure,
    pool::Admin,
};

/// `reload [--dry-run]` and `config diff`.
pub(super) fn reload(client: &Client, dry_run: bool, format: Format) -> Result<String, Failure> {
    read::render(format, &client.reload(dry_run)?, reloaded)
}

/// `config show`.
pub(super) fn config_show(client: &Client, format: Format) -> Result<String, Failure> {
    let config: ConfigView = client.get(Route::Config)?;
    read::render(format, &config, |config| {
        format!("# generation {}\n{}", config.generation, config.text)
    })
}

/// `drain`, `maint`, `ready`.
pub(super) fn member(client: &Client, admin: Admin, args: &MemberArgs) -> Result<String, Failure> {
    let member = client.set_member(&args.member, admin, args.deadline)?;
    read::render(args.format, &member, set)
}

fn reloaded(view: &ReloadView) -> String {
    let mut out = String::new();
    for change in &view.changes {
        let _ = writeln!(
            out,
            "{:8} {}",
            printable(&change.change),
            printable(&change.object)
        );
        for detail in &change.details {
            let _ = writeln!(out, "           {}", printable(detail));
        }
    }
    for warning in &view.warnings {
        let _ = writeln!(out, "{warning}");
    }
    let _ = match (view.applied, view.changes.is_empty()) {
        (true, _) => writeln!(out, "generation {} is in use", view.generation),
        (false, true) => writeln!(out, "the file says what is in use"),
        (false, false) => writeln!(
            out,
            "nothing was changed; generation {} stays in use",
            view.generation
        ),
    };
    out
}

fn set(member: &MemberView) -> String {
    let mut out = format!(
        "{}/{} is {}",
        printable(&member.pool),
        printable(&member.name),
        printable(&member.state)
    );
    if member.state != member.admin && member.admin != "ready" {
        let _ = write!(out, " and set to {}", printable(&member.admin));
    }
    let _ = write!(out, ", {} connections", member.traffic.active);
    if let Some(left) = member.deadline_s.filter(|left| *left > 0) {
        let _ = write!(out, ", which end in {}", units::duration(left));
    }
    out.push('\n');
    out
}
