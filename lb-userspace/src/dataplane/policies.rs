//! Policies in the kernel's tables: compiled aside with their generation, then looked after as time goes by.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap as Index},
    sync::{Arc, atomic::Ordering::Relaxed},
};

use anyhow::{Context, Result, anyhow, bail};
use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData, PerCpuArray, PerCpuValues},
    util::nr_cpus,
};
use jiff::Timestamp;
use lb_common::{
    access::{
        self, Budget, CONDITIONAL, Explanation, Guard, MAX_BOUNDS, MAX_CONDITIONS, MAX_POLICIES,
        MAX_RULES, PlaceKey, RuleCell, Spending,
    },
    layout::{EPOCHS, MAX_VIRTUAL_SERVERS},
};
use rustix::net::{AddressFamily, SocketType, netdevice::name_to_index, socket};

use super::{
    loader,
    sys::{self, BoundCell, Record},
    tables::{Numbers, mapped},
    trunks::{self, Tagged},
};
use crate::model::{
    Generation, Name, Policy, Rule,
    compile::compile,
    policy::{Action, DEFAULT_RULE},
};

/// The tables of policies, open.
pub(super) struct PolicyTables {
    guards: Array<MapData, Record<Guard>>,
    policies: Array<MapData, Record<access::Policy>>,
    rules: Array<MapData, Record<access::Rule>>,
    bounds: &'static [BoundCell],
    scheduled: Array<MapData, u64>,
    conditions: HashMap<MapData, Record<PlaceKey>, u64>,
    judged: HashMap<MapData, u32, u32>,
    cells: PerCpuArray<MapData, Record<RuleCell>>,
    budgets: PerCpuArray<MapData, Record<Budget>>,
    explanation: Array<MapData, Record<Explanation>>,
    /// Programs that are loaded later still name these.
    _mapped: Vec<MapData>,
    /// What this daemon has filled in.
    filled: Vec<Filled>,
    /// Interfaces with a packet program, and those of VLANs.
    attached: Vec<u32>,
    tagged: Vec<Tagged>,
    /// Do programs go by what this daemon has filled in?
    in_use: bool,
}

/// A policy of the generation in use.
struct Filled {
    /// Its index, epoch included.
    index: u32,
    policy: Arc<Policy>,
    /// Index of its default among the rules.
    rules: u32,
    /// Where each rule counts, the default first.
    numbers: Vec<u16>,
    /// Its conditional rules, by bit.
    conditional: Vec<u16>,
    /// What the programs were told of the time.
    scheduled: u64,
}

/// The policies of a generation that may come into use.
pub(super) struct FilledPolicies(Vec<Filled>);

impl Filled {
    fn bits(&self, test: impl Fn(&Rule) -> bool) -> u64 {
        let rules = self.conditional.iter().enumerate();
        rules
            .filter(|(_, rule)| test(&self.policy.rules[usize::from(**rule) - 1]))
            .fold(0, |bits, (bit, _)| bits | 1 << bit)
    }

    fn scheduled_at(&self, now: Timestamp) -> u64 {
        self.bits(|rule| rule.schedule.as_ref().is_none_or(|time| time.holds(now)))
    }

    /// The name of a rule by its place, the default first.
    fn rule_name(&self, place: usize) -> &str {
        match place.checked_sub(1) {
            None => DEFAULT_RULE,
            Some(place) => &self.policy.rules[place].name,
        }
    }
}

/// How often a rule has matched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleCount {
    /// Its policy.
    pub policy: Name,
    /// Its name; the last of a policy is its default.
    pub rule: Name,
    /// In force, and staged.
    pub hits: [u64; 2],
    /// Has it its time now?
    pub in_time: bool,
}

impl PolicyTables {
    pub(super) fn open(ebpf: &mut Ebpf) -> Result<Self> {
        let mut keep = Vec::new();
        Ok(Self {
            guards: loader::map(ebpf, "GUARDS")?.try_into()?,
            policies: loader::map(ebpf, "POLICIES")?.try_into()?,
            rules: loader::map(ebpf, "RULES")?.try_into()?,
            bounds: mapped(ebpf, "BOUNDS", &mut keep)?,
            scheduled: loader::map(ebpf, "SCHEDULED")?.try_into()?,
            conditions: loader::map(ebpf, "CONDITIONS")?.try_into()?,
            judged: loader::map(ebpf, "JUDGED")?.try_into()?,
            cells: loader::map(ebpf, "RULE_CELLS")?.try_into()?,
            budgets: loader::map(ebpf, "BUDGETS")?.try_into()?,
            explanation: loader::map(ebpf, "EXPLANATION")?.try_into()?,
            _mapped: keep,
            filled: Vec::new(),
            attached: Vec::new(),
            tagged: Vec::new(),
            in_use: false,
        })
    }

    /// Goes on with what another load of the same tables has filled in.
    pub(super) fn take_over(&mut self, other: &mut Self) {
        self.filled = std::mem::take(&mut other.filled);
        self.attached = std::mem::take(&mut other.attached);
        self.tagged = std::mem::take(&mut other.tagged);
        self.in_use = other.in_use;
    }

    /// Fills in a generation's policies, and what they guard, for an epoch that is not in use.
    ///
    /// # Errors
    ///
    /// When they do not fit, or a table refuses a record; the epoch in use stays as it is.
    pub(super) fn fill(
        &mut self,
        generation: &Generation,
        numbers: &Numbers,
        epoch: u32,
    ) -> Result<FilledPolicies> {
        let known = self.known_rules(epoch ^ 1)?;
        let mut taken: Vec<bool> = vec![false; (EPOCHS * MAX_RULES) as usize];
        for number in known.values() {
            taken[usize::from(*number)] = true;
        }
        let mut free = (1..taken.len() as u16).filter(|number| !taken[usize::from(*number)]);
        let (mut bound, mut rule) = (0, 1);
        let mut filled = Vec::new();
        if generation.policies.len() as u32 >= MAX_POLICIES {
            bail!("more than {} policies", MAX_POLICIES - 1);
        }
        for (place, policy) in (1..).zip(generation.policies.values()) {
            let compiled = compile(policy)
                .map_err(|_| anyhow!("policy {:?} has too many conditional rules", policy.name))?;
            let count = compiled.bounds.len() as u32;
            let rules = policy.rules.len() as u32 + 1;
            if bound + count > MAX_BOUNDS || rule + rules > MAX_RULES {
                bail!("the policies do not fit the tables of the kernel plane");
            }
            let first = epoch * MAX_BOUNDS + bound;
            for (cell, from) in self.bounds[first as usize..].iter().zip(&compiled.bounds) {
                cell.set(from);
            }
            let mut entry = Filled {
                index: epoch * MAX_POLICIES + place,
                policy: policy.clone(),
                rules: epoch * MAX_RULES + rule,
                numbers: Vec::new(),
                conditional: compiled.conditional,
                scheduled: 0,
            };
            self.fill_rules(&mut entry, &known, &mut free)?;
            self.fill_policy(&mut entry, first, count)?;
            bound += count;
            rule += rules;
            filled.push(entry);
        }
        for unused in rule..MAX_RULES {
            self.rules
                .set(epoch * MAX_RULES + unused, Record(NO_RULE), 0)?;
        }
        self.fill_places(&filled, epoch)?;
        self.fill_guards(generation, numbers, &filled, epoch)?;
        Ok(FilledPolicies(filled))
    }

    /// What was filled in is in use now.
    pub(super) fn flipped(&mut self, filled: FilledPolicies) {
        self.filled = filled.0;
        if std::mem::replace(&mut self.in_use, true) || self.attached.is_empty() {
            return;
        }
        // Those that only an earlier daemon had.
        if let Err(error) = self.fill_judged() {
            log::error!("{error:#}");
        }
    }

    /// Where the rules of an epoch count, by their hash.
    fn known_rules(&self, epoch: u32) -> Result<Index<u64, u16>> {
        let mut known = Index::new();
        for index in 1..MAX_RULES {
            let rule = self.rules.get(&(epoch * MAX_RULES + index), 0)?.0;
            if rule.hash != 0 {
                known.insert(rule.hash, rule.number);
            }
        }
        Ok(known)
    }

    fn fill_rules(
        &mut self,
        entry: &mut Filled,
        known: &Index<u64, u16>,
        free: &mut impl Iterator<Item = u16>,
    ) -> Result<()> {
        let policy = entry.policy.clone();
        let default = (policy.default, policy.log);
        let rules = policy.rules.iter().map(|rule| (rule.action, rule.log));
        for (place, (action, log)) in (0..).zip([default].into_iter().chain(rules)) {
            let hash = hash(&policy.name, entry.rule_name(place as usize));
            let number = match known.get(&hash) {
                Some(number) => *number,
                None => {
                    let number = free.next().context("more rules than can be counted")?;
                    self.reset(number)?;
                    number
                }
            };
            entry.numbers.push(number);
            let record = access::Rule {
                hash,
                number,
                action: action as u8,
                log: u8::from(log),
                pad: 0,
            };
            self.rules.set(entry.rules + place, Record(record), 0)?;
        }
        Ok(())
    }

    fn reset(&mut self, number: u16) -> Result<()> {
        let cpus = nr_cpus().map_err(|(_, error)| error)?;
        let zero = RuleCell { hits: 0, staged: 0 };
        let zeros = PerCpuValues::try_from(vec![Record(zero); cpus])?;
        Ok(self.cells.set(u32::from(number), zeros, 0)?)
    }

    fn fill_policy(&mut self, entry: &mut Filled, bounds: u32, count: u32) -> Result<()> {
        entry.scheduled = entry.scheduled_at(Timestamp::now());
        self.scheduled.set(entry.index, entry.scheduled, 0)?;
        let all = entry.bits(|_| true);
        let elsewhere = entry.bits(|rule| rule.interfaces.is_empty());
        let untagged = entry.bits(|rule| rule.vlans.is_empty());
        let mut record = access::Policy {
            bounds,
            count,
            rules: entry.rules,
            flags: 0,
            elsewhere,
            untagged,
            conditional: [0; CONDITIONAL],
        };
        if elsewhere != all {
            record.flags |= access::Policy::INTERFACES;
        }
        if untagged != all {
            record.flags |= access::Policy::VLANS;
        }
        record.conditional[..entry.conditional.len()].copy_from_slice(&entry.conditional);
        self.policies.set(entry.index, Record(record), 0)?;
        Ok(())
    }

    /// What the policies of an epoch say of interfaces and VLANs.
    fn fill_places(&mut self, filled: &[Filled], epoch: u32) -> Result<()> {
        let wanted = places(filled);
        if wanted.len() as u32 > MAX_CONDITIONS {
            bail!("the policies name more than {MAX_CONDITIONS} interfaces and VLANs");
        }
        let of_epoch = epoch * MAX_POLICIES..(epoch + 1) * MAX_POLICIES;
        let present: Vec<_> = self.conditions.keys().flatten().collect();
        for key in present {
            let index = (key.0.policy, key.0.place);
            if of_epoch.contains(&key.0.policy) && !wanted.contains_key(&index) {
                self.conditions.remove(&key)?;
            }
        }
        for ((policy, place), bits) in wanted {
            self.conditions
                .insert(Record(PlaceKey { policy, place }), bits, 0)?;
        }
        Ok(())
    }

    fn fill_guards(
        &mut self,
        generation: &Generation,
        numbers: &Numbers,
        filled: &[Filled],
        epoch: u32,
    ) -> Result<()> {
        let index = |name: &Option<Name>| {
            let found = name
                .as_ref()
                .map(|name| filled.iter().find(|entry| entry.policy.name == *name));
            found.flatten().map_or(0, |entry| entry.index)
        };
        let network = &generation.network.guard;
        let mut guards = vec![Guard::OPEN; MAX_VIRTUAL_SERVERS as usize];
        for server in &generation.virtual_servers {
            let own = &server.guard;
            let number = numbers.virtual_servers[&server.name];
            guards[usize::from(number)] = Guard {
                enforced: [index(&network.policy), index(&own.policy)],
                staged: [index(&network.staged), index(&own.staged)],
                interval: own.rate.map_or(0, |rate| rate.interval),
                ahead: own.rate.map_or(0, |rate| {
                    rate.interval
                        .saturating_mul(u64::from(rate.burst.saturating_sub(1)))
                }),
            };
        }
        for (number, guard) in (epoch * MAX_VIRTUAL_SERVERS..).zip(guards) {
            self.guards.set(number, Record(guard), 0)?;
        }
        Ok(())
    }

    /// Tells the programs which rules have their time now.
    ///
    /// # Errors
    ///
    /// When a table refuses a record.
    pub(super) fn tell_time(&mut self, now: Timestamp) -> Result<()> {
        for entry in &mut self.filled {
            let scheduled = entry.scheduled_at(now);
            if scheduled != entry.scheduled {
                self.scheduled.set(entry.index, scheduled, 0)?;
                entry.scheduled = scheduled;
                log::info!(
                    "policy {:?}: the rules in their time have changed",
                    entry.policy.name
                );
            }
        }
        Ok(())
    }

    /// Looks up the interfaces that rules name: one that was made anew has another index.
    ///
    /// # Errors
    ///
    /// When a table refuses a record.
    pub(super) fn refresh_places(&mut self) -> Result<()> {
        let filled = std::mem::take(&mut self.filled);
        let epoch = filled.first().map(|entry| entry.index / MAX_POLICIES);
        let done = epoch.map_or(Ok(()), |epoch| self.fill_places(&filled, epoch));
        self.filled = filled;
        done
    }

    /// Says which interfaces have a packet program that judges.
    ///
    /// # Errors
    ///
    /// When the table refuses a record.
    pub(super) fn set_judged<'i>(
        &mut self,
        interfaces: impl Iterator<Item = &'i str>,
    ) -> Result<()> {
        self.attached = interfaces.filter_map(interface_index).collect();
        self.fill_judged()
    }

    /// Says which interfaces are of VLANs.
    ///
    /// # Errors
    ///
    /// When the table refuses a record.
    pub(super) fn set_tagged(&mut self, tagged: Vec<Tagged>) -> Result<()> {
        if self.tagged == tagged {
            return Ok(());
        }
        self.tagged = tagged;
        self.fill_judged()
    }

    /// The interfaces that are judged by a packet program, by index.
    pub(super) fn judged(&self) -> BTreeSet<u32> {
        self.judged.keys().flatten().collect()
    }

    /// Has these judged as they were before, and no others.
    ///
    /// # Errors
    ///
    /// When the table refuses one.
    pub(super) fn restore_judged(&mut self, before: &BTreeSet<u32>) -> Result<()> {
        for index in &self.judged() - before {
            self.judged.remove(&index)?;
        }
        for index in before {
            self.judged.insert(index, 1, 0)?;
        }
        Ok(())
    }

    fn fill_judged(&mut self) -> Result<()> {
        let above = trunks::above(&self.attached, &self.tagged);
        let stale: Vec<u32> = self.judged.keys().flatten().collect();
        for index in stale {
            // Until the flip, an earlier daemon's programs judge where they did.
            if self.in_use && !self.attached.contains(&index) && !above.contains(&index) {
                self.judged.remove(&index)?;
            }
        }
        for index in &self.attached {
            self.judged.insert(index, 1, 0)?;
        }
        // Where the table is full, the rest is judged twice.
        let full = above
            .iter()
            .find(|index| self.judged.insert(*index, 1, 0).is_err());
        if full.is_some() {
            log::warn!(
                "there are {} interfaces of VLANs on client interfaces, more than can be noted: policies and rates count \
                 some connections to proxy virtual servers twice",
                above.len()
            );
        }
        Ok(())
    }

    /// Every rule of every policy, with its counters.
    pub(super) fn counts(&self) -> Vec<RuleCount> {
        let count = |entry: &Filled, place: usize| {
            let number = u32::from(entry.numbers[place]);
            let cells = self.cells.get(&number, 0);
            let sum = |field: fn(&RuleCell) -> u64| {
                let cells = cells.as_ref().ok();
                cells.map_or(0, |cells| cells.iter().map(|cell| field(&cell.0)).sum())
            };
            let rule = place.checked_sub(1).map(|place| &entry.policy.rules[place]);
            let schedule = rule.and_then(|rule| rule.schedule.as_ref());
            RuleCount {
                policy: entry.policy.name.clone(),
                rule: entry.rule_name(place).into(),
                hits: [sum(|cell| cell.hits), sum(|cell| cell.staged)],
                in_time: schedule.is_none_or(|time| time.holds(Timestamp::now())),
            }
        };
        let places = |entry: &Filled| (1..entry.numbers.len()).chain([0]).collect::<Vec<_>>();
        let entries = self.filled.iter();
        entries
            .flat_map(|entry| {
                places(entry)
                    .into_iter()
                    .map(move |place| count(entry, place))
            })
            .collect()
    }

    /// Names of policy and rule by the number that an event carries.
    pub(super) fn names(&self) -> Index<u16, (Name, Name)> {
        let name = |entry: &Filled, place: usize| {
            let names = (entry.policy.name.clone(), entry.rule_name(place).into());
            (entry.numbers[place], names)
        };
        let entries = self.filled.iter();
        entries
            .flat_map(|entry| (0..entry.numbers.len()).map(move |place| name(entry, place)))
            .collect()
    }

    /// Names of policy and rule, and what it does, by the index that an explanation carries.
    pub(super) fn rule_at(&self, index: u32) -> Option<(Name, Name, Action)> {
        self.filled.iter().find_map(|entry| {
            let place = index.checked_sub(entry.rules)? as usize;
            (place < entry.numbers.len()).then(|| {
                let action = match place.checked_sub(1) {
                    None => entry.policy.default,
                    Some(place) => entry.policy.rules[place].action,
                };
                (
                    entry.policy.name.clone(),
                    entry.rule_name(place).into(),
                    action,
                )
            })
        })
    }

    /// How often a budget was used up.
    pub(super) fn refused(&self, what: Spending) -> u64 {
        let budgets = self.budgets.get(&(what as u32), 0);
        budgets.map_or(0, |budgets| {
            budgets.iter().map(|budget| budget.0.refused).sum()
        })
    }

    /// What `explain_tc` has written.
    ///
    /// # Errors
    ///
    /// When the table cannot be read.
    pub(super) fn explanation(&self) -> Result<Explanation> {
        Ok(self.explanation.get(&0, 0)?.0)
    }
}

/// A place of the table that no rule has.
const NO_RULE: access::Rule = access::Rule {
    hash: 0,
    number: 0,
    action: Action::Drop as u8,
    log: 0,
    pad: 0,
};

/// Which conditional rules match at each interface and VLAN that policies name.
fn places(filled: &[Filled]) -> BTreeMap<(u32, u32), u64> {
    let mut places = BTreeMap::new();
    for entry in filled {
        let rules = || entry.policy.rules.iter();
        for name in rules().flat_map(|rule| &rule.interfaces) {
            // One that is not there matches nothing, until it comes.
            let Some(index) = interface_index(name) else {
                continue;
            };
            let bits =
                entry.bits(|rule| rule.interfaces.is_empty() || rule.interfaces.contains(name));
            places.insert((entry.index, index), bits);
        }
        for vlan in rules().flat_map(|rule| &rule.vlans) {
            let bits = entry.bits(|rule| rule.vlans.is_empty() || rule.vlans.contains(vlan));
            places.insert((entry.index, PlaceKey::VLAN | u32::from(*vlan)), bits);
        }
    }
    places
}

/// The index of an interface; `None` when there is none of this name.
pub(super) fn interface_index(name: &str) -> Option<u32> {
    let socket = socket(AddressFamily::UNIX, SocketType::DGRAM, None).ok()?;
    name_to_index(socket, name).ok()
}

/// Tells rules apart (FNV-1a, 64 bits); never 0.
fn hash(policy: &str, rule: &str) -> u64 {
    let bytes = policy.bytes().chain([0]).chain(rule.bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash.max(1)
}

impl BoundCell {
    /// Writes a range; nobody looks at it before its generation is in use.
    fn set(&self, bound: &access::Bound) {
        let words = [
            bound.high,
            bound.low,
            bound.conditional,
            sys::two_words(bound.rule, bound.pad),
        ];
        for (cell, word) in self.0.iter().zip(words) {
            cell.store(word, Relaxed);
        }
    }
}
