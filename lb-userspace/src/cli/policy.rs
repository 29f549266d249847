//! Policies and explanations, for people.

use std::{fmt::Write as _, net::SocketAddr};

use super::table::{
    Column::{Left, Right},
    Table, printable,
};
use crate::admin::view::{ExplanationView, PolicyView, RuleView};

/// `show policy`.
pub(super) fn policies(policies: &[PolicyView]) -> String {
    if policies.is_empty() {
        return "no policies\n".to_owned();
    }
    let sections: Vec<_> = policies.iter().map(section).collect();
    sections.join("\n")
}

fn section(policy: &PolicyView) -> String {
    let bound = |to: &[String]| match to {
        [] => "nothing".to_owned(),
        names => printable(&names.join(", ")),
    };
    let mut out = format!(
        "policy {}: in force for {}, staged for {}\n",
        printable(&policy.name),
        bound(&policy.enforced_by),
        bound(&policy.staged_by)
    );
    let mut table = Table::new([
        Left("RULE"),
        Left("ACTION"),
        Right("RANGES"),
        Left("WHERE"),
        Left("STATE"),
        Left("LOG"),
        Right("HITS"),
        Right("WOULD HIT"),
    ]);
    for rule in &policy.rules {
        table.row([
            rule.name.clone(),
            rule.action.clone(),
            rule.ranges.to_string(),
            place(rule),
            match (rule.enabled, rule.in_time) {
                (false, _) => "disabled",
                (_, false) => "out of time",
                _ => "on",
            }
            .to_owned(),
            if rule.log { "yes" } else { "no" }.to_owned(),
            rule.hits.to_string(),
            rule.staged_hits.to_string(),
        ]);
    }
    out.push_str(&table.render("  "));
    out
}

fn place(rule: &RuleView) -> String {
    let vlans = rule.vlans.iter().map(|vlan| format!("vlan {vlan}"));
    let places: Vec<_> = rule.interfaces.iter().cloned().chain(vlans).collect();
    match places.is_empty() {
        true => "any".to_owned(),
        false => places.join(", "),
    }
}

/// `explain`.
pub(super) fn explanation(view: &ExplanationView) -> String {
    let mut out = format!(
        "{} -> {} by {}",
        view.from,
        view.to,
        printable(&view.interface)
    );
    // Writing to a string cannot fail.
    if let Some(vlan) = view.vlan {
        let _ = write!(out, ", vlan {vlan}");
    }
    let _ = match (&view.reason, view.verdict.as_str()) {
        (Some(reason), verdict) => writeln!(out, ": {verdict}, {reason}"),
        (None, "no-virtual-server") => writeln!(out, ": no virtual server is there"),
        (None, verdict) => writeln!(out, ": {verdict}"),
    };
    if let (Some(server), Some(forward)) = (&view.virtual_server, &view.forward) {
        let _ = writeln!(out, "  virtual server  {} ({forward})", printable(server));
    }
    for rule in &view.rules {
        let kind = if rule.staged {
            "staged policy "
        } else {
            "policy        "
        };
        let (policy, name) = (printable(&rule.policy), printable(&rule.rule));
        let _ = writeln!(out, "  {kind}  {policy}, rule {name}: {}", rule.action);
    }
    if let Some(pool) = &view.pool {
        let _ = writeln!(out, "  pool            {}", printable(pool));
    }
    if let (Some(member), Some(address)) = (&view.member, view.member_address) {
        let _ = writeln!(out, "  member          {} ({address})", printable(member));
    }
    if let (Some(snat), Some(port)) = (view.snat, view.snat_port) {
        let _ = writeln!(out, "  SNAT            {}", SocketAddr::new(snat, port));
    }
    if let Some(phase) = &view.flow {
        let _ = writeln!(
            out,
            "  flow            {}: this client has it open already, and no rule is asked",
            printable(phase)
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::view::VerdictView;

    #[test]
    fn an_explanation_reads_from_the_verdict_down() {
        let mut view = ExplanationView {
            from: "198.51.100.7:40000".parse().unwrap(),
            to: "203.0.113.10:465".parse().unwrap(),
            interface: "eth0".into(),
            vlan: Some(10),
            verdict: "carried".into(),
            reason: None,
            virtual_server: Some("smtps".into()),
            forward: Some("passthrough".into()),
            rules: vec![VerdictView {
                policy: "next".into(),
                rule: "default".into(),
                action: "drop".into(),
                staged: true,
            }],
            pool: Some("tls".into()),
            member: Some("tls/m1".into()),
            member_address: Some("10.0.0.11:465".parse().unwrap()),
            snat: Some("10.0.0.1".parse().unwrap()),
            snat_port: Some(1024),
            flow: None,
        };
        let expected = "198.51.100.7:40000 -> 203.0.113.10:465 by eth0, vlan 10: carried\n  \
            virtual server  smtps (passthrough)\n  \
            staged policy   next, rule default: drop\n  \
            pool            tls\n  \
            member          tls/m1 (10.0.0.11:465)\n  \
            SNAT            10.0.0.1:1024\n";
        assert_eq!(explanation(&view), expected);
        view.flow = Some("established".into());
        assert!(explanation(&view).ends_with(
            "\n  flow            established: this client has it open already, and no rule is asked\n"
        ));
        (view.verdict, view.reason) = ("refused".into(), Some("policy-drop".into()));
        assert!(explanation(&view).starts_with(
            "198.51.100.7:40000 -> 203.0.113.10:465 by eth0, vlan 10: refused, policy-drop\n"
        ));
    }
}
