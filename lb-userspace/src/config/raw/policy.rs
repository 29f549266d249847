//! `[policy.NAME]`, its rules, and what binds them to a virtual server.

use super::source;
use crate::{
    config::{
        diagnostic::{Faults, quoted},
        phrase::check_name,
        reader::{At, Field, Section},
    },
    model::policy::{Action, DEFAULT_RULE, Range, Rate, Schedule},
};

/// One policy.
pub(in crate::config) struct Policy<'d> {
    pub(in crate::config) name: At<&'d str>,
    pub(in crate::config) object: String,
    pub(in crate::config) default: Field<Action>,
    pub(in crate::config) log: Field<bool>,
    pub(in crate::config) rules: Field<Vec<Rule<'d>>>,
}

/// `[[policy.NAME.rule]]`.
pub(in crate::config) struct Rule<'d> {
    pub(in crate::config) object: String,
    pub(in crate::config) at: usize,
    pub(in crate::config) name: Field<&'d str>,
    pub(in crate::config) enabled: Field<bool>,
    pub(in crate::config) source: Field<Vec<Range>>,
    pub(in crate::config) source_file: Field<&'d str>,
    pub(in crate::config) vlans: Field<Vec<u16>>,
    pub(in crate::config) interfaces: Field<Vec<At<&'d str>>>,
    pub(in crate::config) action: Field<Verb>,
    pub(in crate::config) reject_with: Field<Action>,
    pub(in crate::config) log: Field<bool>,
    pub(in crate::config) schedule: Field<Schedule>,
}

/// `action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::config) enum Verb {
    Accept,
    Drop,
    Reject,
}

/// `policy`, `staged_policy` and `connection_rate`.
pub(in crate::config) struct Guard<'d> {
    pub(in crate::config) policy: Field<&'d str>,
    pub(in crate::config) staged: Field<&'d str>,
    pub(in crate::config) rate: Field<Rate>,
}

impl<'d> Guard<'d> {
    /// Nothing is bound; `wrong` where nothing could be read either.
    pub(super) fn none() -> Self {
        Self {
            policy: Field::Absent,
            staged: Field::Absent,
            rate: Field::Absent,
        }
    }

    /// Reads the names of policies.
    pub(super) fn read(section: &mut Section<'d, '_>, faults: &mut Faults) -> Self {
        Self {
            policy: section.string("policy", "policy = \"edge\"", faults),
            staged: section.string("staged_policy", "staged_policy = \"next\"", faults),
            rate: Field::Absent,
        }
    }
}

pub(super) fn read<'d>(
    name: At<&'d str>,
    mut section: Section<'d, '_>,
    faults: &mut Faults,
) -> Policy<'d> {
    let default = section.choice(
        "default",
        &[("accept", Action::Accept), ("deny", Action::Drop)],
        &[],
        faults,
    );
    let default = section.required(
        default,
        "default",
        "It would be open what becomes of connections that no rule matches.",
        "default = \"accept\"",
        faults,
    );
    let log = section.switch("log", faults);
    let example = format!("[[policy.{}.rule]]", name.value);
    let rules = section.list("rule", &example, faults).and_then(|list| {
        let rules = list.value.into_iter();
        Some(
            rules
                .map(|section| rule(name.value, section, faults))
                .collect(),
        )
    });
    let object = section.object.clone();
    section.finish(faults);
    Policy {
        name,
        object,
        default,
        log,
        rules,
    }
}

fn rule<'d>(policy: &str, mut section: Section<'d, '_>, faults: &mut Faults) -> Rule<'d> {
    let name = section.string("name", "name = \"bad-net\"", faults);
    if let Field::Is(name) = &name {
        section.object = format!("rule {} of policy {}", quoted(name.value), quoted(policy));
        check_name(name, &section.object, faults);
        if name.value == DEFAULT_RULE {
            faults.error(
                name.at,
                &section.object,
                "has the name that stands for connections without a rule",
                "Counters and log lines could not tell the two apart.",
                "Rename it.",
            );
        }
    }
    let name = section.required(
        name,
        "name",
        "Counters and log lines could not name it.",
        "name = \"bad-net\"",
        faults,
    );
    let enabled = section.switch("enabled", faults);
    let source = source::read(&mut section, faults);
    let source_file = section.string(
        "source_file",
        "source_file = \"/etc/smtplb/bad.txt\"",
        faults,
    );
    let vlans = section.integers("vlans", 1..=4094, "vlans = [10, 20]", faults);
    let vlans = vlans.and_then(|list| {
        let numbers = list.value.iter();
        numbers.map(|vlan| u16::try_from(vlan.value).ok()).collect()
    });
    let interfaces = section.strings("interfaces", "interfaces = [\"eth0\"]", faults);
    let action = section.choice(
        "action",
        &[
            ("accept", Verb::Accept),
            ("drop", Verb::Drop),
            ("reject", Verb::Reject),
        ],
        &[],
        faults,
    );
    let action = section.required(
        action,
        "action",
        "It would be open what becomes of the connections it matches.",
        "action = \"drop\"",
        faults,
    );
    let reject_with = section.choice(
        "reject_with",
        &[("icmp", Action::RejectIcmp), ("rst", Action::RejectRst)],
        &[],
        faults,
    );
    let log = section.switch("log", faults);
    let schedule = source::schedule(&mut section, faults);
    let (object, at) = (section.object.clone(), section.at);
    section.finish(faults);
    Rule {
        object,
        at,
        name,
        enabled,
        source,
        source_file,
        vlans,
        interfaces,
        action,
        reject_with,
        log,
        schedule,
    }
}
