//! A policy made ready for one lookup: ranges of sources, and what holds in each; and the rules that never match.

use std::collections::BTreeSet;

use lb_common::access::{Bound, CONDITIONAL};

use super::policy::{Policy, Rule};

/// A policy's ranges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compiled {
    /// Sorted; the first begins at zero.
    pub bounds: Vec<Bound>,
    /// The rules that match at some places or times only, in order: which rule (1 is the first) each bit stands for.
    pub conditional: Vec<u16>,
    /// Enabled rules that never match (1 is the first), each with an earlier one that covers it at its first address.
    pub shadowed: Vec<(usize, usize)>,
}

/// More conditional rules than a policy can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooManyConditions;

/// A rule begins or ends to cover addresses.
struct Edge {
    at: u128,
    rule: usize,
    begins: bool,
}

/// Compiles a policy. Costs about n log n for n ranges of sources, and gives at most 2 n + 1 bounds.
///
/// # Errors
///
/// When more than [`CONDITIONAL`] rules are conditional.
pub fn compile(policy: &Policy) -> Result<Compiled, TooManyConditions> {
    let enabled = || (1..).zip(&policy.rules).filter(|(_, rule)| rule.enabled);
    let conditional: Vec<(usize, &Rule)> = enabled()
        .filter(|(_, rule)| !rule.is_unconditional())
        .collect();
    if conditional.len() > CONDITIONAL {
        return Err(TooManyConditions);
    }
    // Of each conditional rule, the earlier ones that match whenever it would.
    let wider: Vec<u64> = conditional
        .iter()
        .enumerate()
        .map(|(place, (_, rule))| {
            let wide = |(_, (_, other)): &(usize, &(usize, &Rule))| other.is_as_wide_as(rule);
            let earlier = conditional[..place].iter().enumerate();
            earlier
                .filter(wide)
                .fold(0, |bits, (bit, _)| bits | 1 << bit)
        })
        .collect();
    let bit_of = |rule: usize| conditional.iter().position(|(number, _)| *number == rule);
    let mut sweep = Sweep {
        always: BTreeSet::new(),
        sometimes: 0,
        matched: vec![false; policy.rules.len() + 1],
        coverer: vec![0; policy.rules.len() + 1],
    };
    let mut bounds: Vec<Bound> = Vec::new();
    let mut note = |at: u128, sweep: &mut Sweep| {
        let (rule, bits) = sweep.outcome(&conditional, &wider);
        if bounds
            .last()
            .is_some_and(|last| (last.rule as usize, last.conditional) == (rule, bits))
        {
            return;
        }
        bounds.push(Bound {
            high: (at >> 64) as u64,
            low: at as u64,
            conditional: bits,
            rule: rule as u32,
            pad: 0,
        });
    };
    let edges = edges(enabled());
    if edges.first().is_none_or(|edge| edge.at > 0) {
        note(0, &mut sweep);
    }
    for here in edges.chunk_by(|one, other| one.at == other.at) {
        for edge in here {
            match (bit_of(edge.rule), edge.begins) {
                (Some(bit), true) => sweep.sometimes |= 1 << bit,
                (Some(bit), false) => sweep.sometimes &= !(1 << bit),
                (None, true) => _ = sweep.always.insert(edge.rule),
                (None, false) => _ = sweep.always.remove(&edge.rule),
            }
        }
        note(here[0].at, &mut sweep);
        for edge in here.iter().filter(|edge| edge.begins) {
            if let Some(&first) = sweep.always.first().filter(|first| **first < edge.rule) {
                sweep.covered(edge.rule, first);
            }
        }
    }
    let shadowed = enabled()
        .filter(|(number, rule)| !sweep.matched[*number] && !rule.source.is_empty())
        .map(|(number, _)| (number, sweep.coverer[number]))
        .collect();
    Ok(Compiled {
        bounds,
        conditional: conditional
            .iter()
            .map(|(number, _)| *number as u16)
            .collect(),
        shadowed,
    })
}

fn edges<'r>(rules: impl Iterator<Item = (usize, &'r Rule)>) -> Vec<Edge> {
    let mut edges = Vec::new();
    for (rule, from) in rules {
        for range in from.source.iter() {
            edges.push(Edge {
                at: range.first,
                rule,
                begins: true,
            });
            if let Some(at) = range.last.checked_add(1) {
                edges.push(Edge {
                    at,
                    rule,
                    begins: false,
                });
            }
        }
    }
    edges.sort_unstable_by_key(|edge| edge.at);
    edges
}

/// What covers the addresses that the sweep has come to.
struct Sweep {
    /// Unconditional rules.
    always: BTreeSet<usize>,
    /// Conditional rules, by bit.
    sometimes: u64,
    /// By rule: may it match somewhere?
    matched: Vec<bool>,
    /// By rule: what covered it where it was met first; 0 for nothing.
    coverer: Vec<usize>,
}

impl Sweep {
    /// The first unconditional rule here (0 for the default), and the bits of conditional rules that may come first.
    fn outcome(&mut self, conditional: &[(usize, &Rule)], wider: &[u64]) -> (usize, u64) {
        let first = self.always.first().copied().unwrap_or(0);
        let mut bits = 0;
        for (bit, (rule, _)) in conditional.iter().enumerate() {
            if self.sometimes & 1 << bit == 0 {
                continue;
            }
            let by = bits & wider[bit];
            if first != 0 && *rule > first {
                continue;
            }
            if by != 0 {
                self.covered(*rule, conditional[by.trailing_zeros() as usize].0);
            } else {
                bits |= 1 << bit;
                self.matched[*rule] = true;
            }
        }
        self.matched[first] = true;
        (first, bits)
    }

    fn covered(&mut self, rule: usize, by: usize) {
        if self.coverer[rule] == 0 {
            self.coverer[rule] = by;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use jiff::tz::TimeZone;
    use lb_common::access::{self, Action, Arrival, PlaceKey, Policies};

    use super::*;
    use crate::model::policy::{Range, Schedule};

    /// A policy in plain memory, laid out as the kernel's tables are.
    struct Memory {
        policy: access::Policy,
        bounds: Vec<Bound>,
        scheduled: u64,
        places: Vec<(u32, u64)>,
    }

    impl Memory {
        fn new(policy: &Policy, scheduled: bool) -> Self {
            let compiled = compile(policy).unwrap();
            let rules: Vec<&Rule> = compiled
                .conditional
                .iter()
                .map(|number| &policy.rules[usize::from(*number) - 1])
                .collect();
            let bits = |test: &dyn Fn(&Rule) -> bool| {
                rules
                    .iter()
                    .enumerate()
                    .filter(|(_, rule)| test(rule))
                    .fold(0, |bits, (bit, _)| bits | 1u64 << bit)
            };
            let mut record = access::Policy {
                bounds: 0,
                count: compiled.bounds.len() as u32,
                rules: 100,
                flags: access::Policy::INTERFACES | access::Policy::VLANS,
                elsewhere: bits(&|rule| rule.interfaces.is_empty()),
                untagged: bits(&|rule| rule.vlans.is_empty()),
                conditional: [0; CONDITIONAL],
            };
            record.conditional[..compiled.conditional.len()].copy_from_slice(&compiled.conditional);
            let interfaces = (1..=3u32).map(|index| {
                let name = format!("eth{index}");
                (
                    index,
                    bits(&|rule| rule.interfaces.is_empty() || rule.interfaces.contains(&name)),
                )
            });
            let vlans = (1..=3u16).map(|vlan| {
                let bits = bits(&|rule| rule.vlans.is_empty() || rule.vlans.contains(&vlan));
                (PlaceKey::VLAN | u32::from(vlan), bits)
            });
            Self {
                places: interfaces.chain(vlans).collect(),
                policy: record,
                scheduled: bits(&|rule| scheduled || rule.schedule.is_none()),
                bounds: compiled.bounds,
            }
        }

        fn matching(&self, source: u128, interface: u32, vlan: u16) -> usize {
            let words = [96, 64, 32, 0].map(|shift| ((source >> shift) as u32).to_be());
            let arrival = Arrival {
                source: lb_common::addr::Addr(words),
                interface,
                vlan,
            };
            access::matching(self, 1, &arrival).unwrap() as usize - 100
        }
    }

    impl Policies for Memory {
        fn policy(&self, index: u32) -> Option<&access::Policy> {
            (index == 1).then_some(&self.policy)
        }

        fn bound(&self, index: u32) -> Option<&Bound> {
            self.bounds.get(index as usize)
        }

        fn scheduled(&self, _: u32) -> u64 {
            self.scheduled
        }

        fn place(&self, key: &PlaceKey) -> Option<u64> {
            self.places
                .iter()
                .find(|(place, _)| *place == key.place)
                .map(|(_, bits)| *bits)
        }
    }

    /// The meaning of a policy, word for word: the first rule that matches, 0 for the default.
    fn naive(policy: &Policy, scheduled: bool, source: u128, interface: u32, vlan: u16) -> usize {
        let matches = |rule: &Rule| {
            rule.enabled
                && rule
                    .source
                    .iter()
                    .any(|range| (range.first..=range.last).contains(&source))
                && (rule.interfaces.is_empty()
                    || rule.interfaces.contains(&format!("eth{interface}")))
                && (rule.vlans.is_empty() || rule.vlans.contains(&vlan))
                && (rule.schedule.is_none() || scheduled)
        };
        policy
            .rules
            .iter()
            .position(matches)
            .map_or(0, |place| place + 1)
    }

    /// Xorshift: the same numbers on every run.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % bound
        }

        /// A few addresses that are near each other, at the ends of the space, and of both families.
        fn address(&mut self) -> u128 {
            let low = u128::from(self.below(24));
            match self.below(5) {
                0 => 0xffff_0a00_0000 + low,
                1 => 0xffff_ffff_ffff - low,
                2 => (0x2001_0db8 << 96) + low,
                3 => u128::MAX - low,
                _ => low,
            }
        }

        fn rule(&mut self, number: u64) -> Rule {
            let source = (0..self.below(4)).map(|_| {
                let (one, other) = (self.address(), self.address());
                match self.below(3) {
                    0 => Range {
                        first: one,
                        last: one,
                    },
                    _ => Range {
                        first: one.min(other),
                        last: one.max(other),
                    },
                }
            });
            let source = match source.collect::<Vec<_>>() {
                none if none.is_empty() => vec![Range::ALL],
                some => Range::merged(some),
            };
            let condition = self.below(6);
            Rule {
                name: format!("rule{number}").into(),
                enabled: self.below(5) != 0,
                source: source.into(),
                source_file: None,
                vlans: if condition == 0 {
                    vec![1 + self.below(3) as u16]
                } else {
                    Vec::new()
                },
                interfaces: if condition == 1 {
                    vec![format!("eth{}", 1 + self.below(3))]
                } else {
                    Vec::new()
                },
                schedule: (condition == 2).then(|| Schedule {
                    days: 127,
                    times: vec![(0, 1)],
                    zone: TimeZone::UTC,
                }),
                action: Action::Drop,
                log: false,
            }
        }
    }

    fn policy(rules: Vec<Rule>) -> Policy {
        Policy {
            name: "edge".into(),
            default: Action::Accept,
            log: false,
            rules,
        }
    }

    #[test]
    fn the_compiled_policy_means_what_its_rules_say() {
        let mut random = Random(0x5eed);
        for _ in 0..300 {
            let count = random.below(12);
            let policy = policy((0..count).map(|number| random.rule(number)).collect());
            let shadowed = compile(&policy).unwrap().shadowed;
            for scheduled in [false, true] {
                let memory = Memory::new(&policy, scheduled);
                for _ in 0..400 {
                    let (source, interface, vlan) = (
                        random.address(),
                        random.below(5) as u32,
                        random.below(5) as u16,
                    );
                    let expected = naive(&policy, scheduled, source, interface, vlan);
                    assert_eq!(
                        memory.matching(source, interface, vlan),
                        expected,
                        "{source:x} {interface} {vlan} {policy:#?}"
                    );
                    assert!(
                        shadowed.iter().all(|(rule, _)| *rule != expected),
                        "{expected} {policy:#?}"
                    );
                }
            }
            for (rule, by) in shadowed {
                assert!(0 < by && by < rule, "{rule} by {by}: {policy:#?}");
            }
        }
    }

    #[test]
    fn a_rule_behind_a_wider_one_is_shadowed() {
        let mut random = Random(1);
        let mut rules: Vec<Rule> = (0..6).map(|number| random.rule(number)).collect();
        let net = |low: u128, high: u128| -> std::sync::Arc<[Range]> {
            vec![Range {
                first: low,
                last: high,
            }]
            .into()
        };
        for rule in &mut rules {
            (rule.enabled, rule.vlans, rule.interfaces, rule.schedule) =
                (true, vec![], vec![], None);
        }
        rules[0].source = net(10, 19);
        rules[1].source = net(20, 29);
        rules[2].source = net(12, 27); // by both together
        rules[3].source = net(12, 30); // 30 is left
        rules[3].vlans = vec![1, 2];
        rules[4].source = net(25, 30);
        rules[4].vlans = vec![2]; // the rule before it is wider
        rules[5].source = net(25, 30);
        let found = compile(&policy(rules.clone())).unwrap().shadowed;
        assert_eq!(found, [(3, 1), (5, 2)]);
        rules[0].enabled = false;
        assert_eq!(compile(&policy(rules)).unwrap().shadowed, [(5, 2)]);
    }

    #[test]
    fn a_hundred_thousand_prefixes_stay_within_their_bounds() {
        let every_other = |start: u128| -> Vec<Range> {
            (0..50_000)
                .map(|place| start + 2 * place)
                .map(|at| Range {
                    first: at,
                    last: at,
                })
                .collect()
        };
        let mut random = Random(2);
        let mut rules = vec![random.rule(0), random.rule(1)];
        for (rule, start) in rules.iter_mut().zip([0xffff_0a00_0000, 0x2001_0db8 << 96]) {
            *rule = Rule {
                enabled: true,
                source: every_other(start).into(),
                vlans: vec![],
                interfaces: vec![],
                schedule: None,
                ..rule.clone()
            };
        }
        let policy = policy(rules);
        let started = Instant::now();
        let compiled = compile(&policy).unwrap();
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "{:?}",
            started.elapsed()
        );
        assert_eq!(compiled.bounds.len(), 200_001);
        assert!(compiled.bounds.len() <= access::MAX_BOUNDS as usize);
    }
}
