//! What the reading verbs say to people.

use std::{collections::BTreeMap, fmt::Write};

use super::{
    table::{
        Column::{Left, Right},
        Table, printable,
    },
    units,
};
use crate::admin::view::{
    CertificateView, ExplanationView, FlowView, MemberView, PolicyView, PoolView, PortsView,
    SessionView, Stats, Status, Traffic, VirtualServerView,
};

const INDENT: &str = "  ";

pub(super) fn status(status: &Status) -> String {
    let mut out = format!(
        "smtplb {}, up {}, mode {}, generation {}, pid {}\n",
        status.version,
        units::duration(status.uptime_s),
        status.mode,
        status.generation,
        status.pid
    );
    let _ = writeln!(
        out,
        "\nkernel plane: {} of {} flows",
        status.kernel.flows, status.kernel.flows_max
    );
    for loss in &status.kernel.degraded {
        let _ = writeln!(out, "  degraded: {}", printable(&format!("no {loss}")));
    }
    if status.kernel.attachments.is_empty() {
        out.push_str("  no packet program attached\n");
    } else {
        let mut table = Table::new([Left("INTERFACE"), Left("HOOK"), Left("WHY")]);
        for at in &status.kernel.attachments {
            table.row([at.interface.clone(), at.hook.clone(), at.why.clone()]);
        }
        out.push_str(&table.render(INDENT));
    }
    let _ = match status.workers {
        0 => writeln!(out, "\nproxy plane: not in use"),
        1 => writeln!(out, "\nproxy plane: 1 worker"),
        count => writeln!(out, "\nproxy plane: {count} workers"),
    };
    out.push_str("\nvirtual servers\n");
    out.push_str(&server_table(&status.virtual_servers, INDENT));
    for pool in &status.pools {
        out.push('\n');
        out.push_str(&pool_section(pool));
    }
    out
}

pub(super) fn virtual_servers(servers: &[VirtualServerView]) -> String {
    server_table(servers, "")
}

pub(super) fn pools(pools: &[PoolView]) -> String {
    if pools.is_empty() {
        return "no pools\n".to_owned();
    }
    pools
        .iter()
        .map(pool_section)
        .collect::<Vec<_>>()
        .join("\n")
}

pub(super) fn certificates(certificates: &[CertificateView]) -> String {
    if certificates.is_empty() {
        return "no certificates\n".to_owned();
    }
    let mut table = Table::new([
        Left("NAME"),
        Left("KEY"),
        Left("ENDS"),
        Right("DAYS"),
        Left("USED BY"),
        Left("HOST NAMES"),
    ]);
    for one in certificates {
        table.row([
            one.name.clone(),
            one.key.clone(),
            one.not_after.clone(),
            one.days_left.to_string(),
            one.used_by.join(" "),
            one.host_names.join(" "),
        ]);
    }
    let mut text = table.render("");
    for one in certificates {
        for warning in &one.warnings {
            text.push_str(&format!(
                "warning: certificate \"{}\": {warning}\n",
                one.name
            ));
        }
    }
    text
}

pub(super) fn policies(policies: &[PolicyView]) -> String {
    super::policy::policies(policies)
}

pub(super) fn explanation(view: &ExplanationView) -> String {
    super::policy::explanation(view)
}

pub(super) fn members(members: &[MemberView]) -> String {
    if members.is_empty() {
        return "no members\n".to_owned();
    }
    let mut table = Table::new([
        Left("POOL"),
        Left("MEMBER"),
        Left("ADDRESS"),
        Left("STATE"),
        Right("FOR"),
        Right("FLOWS"),
        Right("SESSIONS"),
        Right("TOTAL"),
        Right("IN"),
        Right("OUT"),
        Left("REASON"),
    ]);
    for member in members {
        table.row([
            member.pool.clone(),
            member.name.clone(),
            member.address.to_string(),
            member.state.clone(),
            units::duration(member.state_s),
            member.kernel.active.to_string(),
            member.proxy.active.to_string(),
            member.traffic.total.to_string(),
            units::bytes(member.traffic.bytes_in),
            units::bytes(member.traffic.bytes_out),
            reason(member),
        ]);
    }
    table.render("")
}

pub(super) fn flows(flows: &[FlowView]) -> String {
    if flows.is_empty() {
        return "no flows\n".to_owned();
    }
    let mut table = Table::new([
        Left("VIRTUAL SERVER"),
        Left("CLIENT"),
        Left("ADDRESS"),
        Left("MEMBER"),
        Left("SNAT"),
        Left("PHASE"),
        Right("AGE"),
        Right("IDLE"),
        Right("IN"),
        Right("OUT"),
    ]);
    for flow in flows {
        table.row([
            flow.virtual_server.clone(),
            flow.client.to_string(),
            flow.address.to_string(),
            flow.member.to_string(),
            flow.snat.to_string(),
            flow.phase.clone(),
            units::duration(flow.age_s),
            units::duration(flow.idle_s),
            units::bytes(flow.bytes_in),
            units::bytes(flow.bytes_out),
        ]);
    }
    table.render("")
}

pub(super) fn sessions(sessions: &[SessionView]) -> String {
    if sessions.is_empty() {
        return "no sessions\n".to_owned();
    }
    let mut table = Table::new([
        Left("ID"),
        Left("VIRTUAL SERVER"),
        Left("CLIENT"),
        Left("MEMBER"),
        Left("PHASE"),
        Right("AGE"),
    ]);
    for session in sessions {
        table.row([
            session.id.clone(),
            session.virtual_server.clone(),
            session.client.to_string(),
            session.member.clone().unwrap_or_else(|| "-".to_owned()),
            session.phase.clone(),
            units::duration(session.age_s),
        ]);
    }
    table.render("")
}

pub(super) fn stats(stats: &Stats) -> String {
    [
        counter_section("refused or dropped by the kernel plane", &stats.drops),
        counter_section("events of sessions and steering", &stats.events),
        traffic_section("virtual servers", "VIRTUAL SERVER", &stats.virtual_servers),
        traffic_section("members", "MEMBER", &stats.members),
        counter_section("flow records", &stats.flow_records),
        ports_section(&stats.snat_ports),
    ]
    .join("\n")
}

fn ports_section(of: &BTreeMap<String, PortsView>) -> String {
    let title = "ports of SNAT addresses towards members";
    if of.is_empty() {
        return format!("{title}\n  none\n");
    }
    let mut table = Table::new([
        Left("ADDRESS AND MEMBER"),
        Right("USED"),
        Right("RESTING"),
        Right("USABLE"),
    ]);
    for (ends, ports) in of {
        table.row([
            ends.clone(),
            ports.used.to_string(),
            ports.resting.to_string(),
            ports.usable.to_string(),
        ]);
    }
    format!("{title}\n{}", table.render(INDENT))
}

fn server_table(servers: &[VirtualServerView], indent: &str) -> String {
    if servers.is_empty() {
        return format!("{indent}no virtual servers\n");
    }
    let mut table = Table::new([
        Left("NAME"),
        Left("ADDRESS"),
        Left("STATE"),
        Left("FORWARD"),
        Left("CLIENT TLS"),
        Left("POOL"),
        Right("ACTIVE"),
        Right("TOTAL"),
        Right("IN"),
        Right("OUT"),
    ]);
    for server in servers {
        table.row([
            server.name.clone(),
            server.address.clone(),
            server.state.clone(),
            server.forward.clone(),
            server.client_tls.clone().unwrap_or_else(|| "-".to_owned()),
            server.pool.clone(),
            server.traffic.active.to_string(),
            server.traffic.total.to_string(),
            units::bytes(server.traffic.bytes_in),
            units::bytes(server.traffic.bytes_out),
        ]);
    }
    table.render(indent)
}

fn pool_section(pool: &PoolView) -> String {
    let up = pool
        .members
        .iter()
        .filter(|member| member.state == "up")
        .count();
    let monitor = match &pool.monitor {
        Some(monitor) => format!("monitor {}", printable(monitor)),
        None => "no monitor".to_owned(),
    };
    let mut out = format!(
        "pool {}: {up} of {} members up, {}, {monitor}\n",
        printable(&pool.name),
        pool.members.len(),
        printable(&pool.method)
    );
    let mut table = Table::new([
        Left("MEMBER"),
        Left("ADDRESS"),
        Left("STATE"),
        Right("FOR"),
        Right("ACTIVE"),
        Right("TOTAL"),
        Right("IN"),
        Right("OUT"),
        Left("REASON"),
    ]);
    for member in &pool.members {
        table.row([
            member.name.clone(),
            member.address.to_string(),
            member.state.clone(),
            units::duration(member.state_s),
            member.traffic.active.to_string(),
            member.traffic.total.to_string(),
            units::bytes(member.traffic.bytes_in),
            units::bytes(member.traffic.bytes_out),
            reason(member),
        ]);
    }
    out.push_str(&table.render(INDENT));
    out
}

/// What the monitor found last, or in how long the operator wants the connections ended.
fn reason(member: &MemberView) -> String {
    let found = member.reason.clone().unwrap_or_else(|| "-".to_owned());
    match (member.admin.as_str(), member.deadline_s) {
        ("ready" | "", _) | (_, None) => found,
        (_, Some(0)) => "connections are ended".to_owned(),
        (_, Some(left)) => format!("connections end in {}", units::duration(left)),
    }
}

fn counter_section(title: &str, counters: &BTreeMap<String, u64>) -> String {
    let mut table = Table::new([Left("NAME"), Right("COUNT")]);
    let counted = counters.iter().filter(|(_, count)| **count > 0);
    let mut any = false;
    for (name, count) in counted {
        any = true;
        table.row([name.clone(), count.to_string()]);
    }
    let body = if any {
        table.render(INDENT)
    } else {
        "  none\n".to_owned()
    };
    format!("{title}\n{body}")
}

fn traffic_section(title: &str, header: &'static str, of: &BTreeMap<String, Traffic>) -> String {
    if of.is_empty() {
        return format!("{title}\n  none\n");
    }
    let mut table = Table::new([
        Left(header),
        Right("ACTIVE"),
        Right("TOTAL"),
        Right("IN"),
        Right("OUT"),
        Right("PACKETS IN"),
        Right("PACKETS OUT"),
    ]);
    for (name, traffic) in of {
        table.row([
            name.clone(),
            traffic.active.to_string(),
            traffic.total.to_string(),
            units::bytes(traffic.bytes_in),
            units::bytes(traffic.bytes_out),
            traffic.packets_in.to_string(),
            traffic.packets_out.to_string(),
        ]);
    }
    format!("{title}\n{}", table.render(INDENT))
}
