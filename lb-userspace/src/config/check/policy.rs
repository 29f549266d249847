//! `[policy.NAME]`: its sources read, its rules compiled, those that never match told.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read as _},
    path::Path,
    sync::Arc,
};

use lb_common::access::{CONDITIONAL, MAX_BOUNDS, MAX_POLICIES, MAX_RULES};

use super::{all, network::interfaces, reference};
use crate::{
    config::{
        diagnostic::{Faults, quoted},
        raw::{self, Raw, Verb, source},
        reader::Field,
    },
    model::{
        Guard, Name, Policy, Rule,
        compile::compile,
        policy::{Action, Range, SourceFile},
    },
};

/// Longest source file, bytes: the longest entries of a full table.
const MAX_SOURCE_FILE: u64 = 16 << 20;
/// Faults told of one source file: a file of another kind has one in every line.
const MOST_FAULTS: usize = 5;

/// Every policy, checked each by itself and against the tables of the kernel plane.
pub(super) fn policies(
    raw: &Raw<'_>,
    directory: &Path,
    faults: &mut Faults,
) -> Option<BTreeMap<Name, Arc<Policy>>> {
    let policies = all(raw
        .policies
        .iter()
        .map(|raw| policy(raw, directory, faults)))?;
    let (mut bounds, mut rules) = (0, 0);
    for (policy, raw) in policies.iter().zip(&raw.policies) {
        rules += policy.rules.len() + 1;
        let Ok(compiled) = compile(policy) else {
            faults.error(
                raw.name.at,
                &raw.object,
                "has too many rules with vlans, interfaces or a schedule",
                format!("{CONDITIONAL} is the most in one policy."),
                "Put rules of the same condition together; one rule takes any number of sources.",
            );
            continue;
        };
        bounds += compiled.bounds.len();
        shadowed(policy, raw, &compiled.shadowed, faults);
    }
    let counts = [
        ("policies", policies.len(), MAX_POLICIES as usize - 1),
        ("rules, defaults included,", rules, MAX_RULES as usize - 1),
        ("ranges of sources", bounds, MAX_BOUNDS as usize),
    ];
    for (what, count, most) in counts {
        if count > most {
            faults.error(
                raw.policies.first().map_or(0, |policy| policy.name.at),
                "the file",
                format!("has {count} {what} in its policies"),
                format!("{most} is the most."),
                "Share policies between virtual servers, and put sources of the same action into one rule.",
            );
        }
    }
    let named = |policy: Policy| (policy.name.clone(), Arc::new(policy));
    Some(policies.into_iter().map(named).collect())
}

fn shadowed(policy: &Policy, raw: &raw::Policy<'_>, found: &[(usize, usize)], faults: &mut Faults) {
    let rules = raw.rules.get().map_or(&[][..], Vec::as_slice);
    for (rule, by) in found {
        let (Some(raw), Some(earlier)) = (rules.get(rule - 1), policy.rules.get(by - 1)) else {
            continue;
        };
        faults.warning(
            raw.at,
            &raw.object,
            "can never match",
            format!(
                "Rule {} before it takes its connections.",
                quoted(&earlier.name)
            ),
            "Put it before that rule, narrow that rule, or remove it.",
        );
    }
}

fn policy(raw: &raw::Policy<'_>, directory: &Path, faults: &mut Faults) -> Option<Policy> {
    let mut names = BTreeSet::new();
    let rules = match &raw.rules {
        Field::Wrong => return None,
        Field::Absent => &[][..],
        Field::Is(rules) => &rules.value[..],
    };
    let rules = all(rules.iter().map(|raw| {
        if let Field::Is(name) = &raw.name
            && !names.insert(name.value)
        {
            faults.error(
                name.at,
                &raw.object,
                "has the name of a rule before it",
                "Counters and log lines could not tell them apart.",
                "Rename one of them.",
            );
            return None;
        }
        rule(raw, directory, faults)
    }));
    Some(Policy {
        name: raw.name.value.into(),
        default: *raw.default.get()?,
        log: raw.log.clone().or(false)?,
        rules: rules?,
    })
}

fn rule(raw: &raw::Rule<'_>, directory: &Path, faults: &mut Faults) -> Option<Rule> {
    let named = raw.source_file.get().map(|path| SourceFile {
        path: directory.join(path),
        beside: Range::merged(raw.source.get().cloned().unwrap_or_default()).into(),
    });
    let source = match (&raw.source, &raw.source_file) {
        (Field::Absent, Field::Absent) => Some(vec![Range::ALL]),
        (Field::Is(ranges), Field::Absent) => Some(ranges.value.clone()),
        (listed, Field::Is(path)) => {
            let read = source_file(raw, &directory.join(path.value), faults);
            match listed {
                Field::Wrong => None,
                Field::Absent => read,
                Field::Is(ranges) => read.map(|mut read| {
                    read.extend(&ranges.value);
                    read
                }),
            }
        }
        _ => None,
    };
    let action = match (raw.action.get(), &raw.reject_with) {
        (Some(Verb::Reject), with) => with.clone().or(Action::RejectIcmp),
        (verb, Field::Is(with)) => {
            if verb.is_some() {
                faults.error(
                    with.at,
                    &raw.object,
                    "has reject_with without action = \"reject\"",
                    "It would reject nothing.",
                    "Remove it, or set action = \"reject\".",
                );
            }
            None
        }
        (Some(Verb::Accept), _) => Some(Action::Accept),
        (Some(Verb::Drop), _) => Some(Action::Drop),
        (None, _) => None,
    };
    let names = interfaces(&raw.interfaces, "interfaces", &raw.object, faults);
    let schedule = match &raw.schedule {
        Field::Absent => Some(None),
        Field::Wrong => None,
        Field::Is(schedule) => Some(Some(schedule.value.clone())),
    };
    Some(Rule {
        name: (*raw.name.get()?).into(),
        enabled: raw.enabled.clone().or(true)?,
        source: Range::merged(source?).into(),
        source_file: named,
        vlans: raw.vlans.clone().or(Vec::new())?,
        interfaces: names?,
        schedule: schedule?,
        action: action?,
        log: raw.log.clone().or(false)?,
    })
}

/// Reads one entry per line; `#` begins a comment.
fn source_file(raw: &raw::Rule<'_>, path: &Path, faults: &mut Faults) -> Option<Vec<Range>> {
    let at = match &raw.source_file {
        Field::Is(path) => path.at,
        _ => raw.at,
    };
    let nothing = "The rule would match nothing.";
    let text = match read(path) {
        Ok(text) => text,
        Err(error) => {
            faults.error(
                at,
                &raw.object,
                format!(
                    "has a source_file that cannot be read: {}: {error}",
                    path.display()
                ),
                nothing,
                "Check the path and its permissions.",
            );
            return None;
        }
    };
    let (mut ranges, mut wrong) = (Vec::new(), 0);
    for (line, text) in (1..).zip(text.lines()) {
        let text = text.split('#').next().unwrap_or_default();
        for entry in text.split_whitespace() {
            match source::range(entry) {
                Ok(range) => ranges.push(range),
                Err(fault) => {
                    wrong += 1;
                    if wrong <= MOST_FAULTS {
                        faults.error(
                            at,
                            &raw.object,
                            format!(
                                "has a fault in {}:{line}: {}, which {fault}",
                                path.display(),
                                quoted(entry)
                            ),
                            "It would match nothing, or too much.",
                            "Write one address, prefix or range per line; `#` begins a comment.",
                        );
                    }
                }
            }
        }
    }
    if ranges.is_empty() && wrong == 0 {
        faults.warning(
            at,
            &raw.object,
            format!("has no entry in {}", path.display()),
            nothing,
            "Fill the file, or disable the rule.",
        );
    }
    (wrong == 0).then_some(ranges)
}

fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?
        .take(MAX_SOURCE_FILE + 1)
        .read_to_string(&mut text)?;
    if text.len() as u64 > MAX_SOURCE_FILE {
        return Err(io::Error::other(format!(
            "is longer than {} MiB",
            MAX_SOURCE_FILE >> 20
        )));
    }
    Ok(text)
}

/// What is bound to a virtual server, or to the network.
pub(super) fn guard(
    raw: &raw::Guard<'_>,
    policies: &[&str],
    object: &str,
    faults: &mut Faults,
) -> Option<Guard> {
    let mut find = |field: &Field<&str>, consequence| match field {
        Field::Absent => Some(None),
        Field::Wrong => None,
        Field::Is(given) => {
            let names = policies.iter().copied();
            reference(given, "policy", names, object, consequence, faults).map(Some)
        }
    };
    let policy = find(&raw.policy, "It would be open to everybody.");
    let staged = find(&raw.staged, "Nothing would be counted.");
    let rate = match &raw.rate {
        Field::Absent => Some(None),
        Field::Wrong => None,
        Field::Is(rate) => Some(Some(rate.value)),
    };
    Some(Guard {
        policy: policy?,
        staged: staged?,
        rate: rate?,
    })
}
