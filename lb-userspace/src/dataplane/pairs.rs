//! Pairs of SNAT address and member: their numbers, usable ports and the table that leads replies to them.
//!
//! A pair keeps its number, and so its flows, as long as it has any: from generation to generation and from daemon to
//! daemon. One that no generation uses and that carries nothing gives its number back.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{BuildHasher as _, Hasher as _, RandomState},
    sync::atomic::Ordering::SeqCst,
};

use anyhow::{Context, Result, bail};
use aya::{
    Ebpf,
    maps::{Array, Map, MapData},
};
use lb_common::{
    addr::Addr,
    index::{BY_KEY, Bucket, PAIR_BUCKETS, WAYS, pair_bucket},
    pair::{self, CHUNK, Chunk, MAX_SOURCES, Mark, PLACES, Pair, PortSet, SOURCE_PAIRS, Source},
    tcp::Phase,
};

use super::{
    loader,
    ports::Ports,
    sys::{self, Record},
    tables::mapped,
};

/// Seeds tried before the table of pairs is given up.
const SEEDS: u32 = 10_000;

/// What a pair is known by: SNAT address, member's address and port (network order). Lanes have their number as the port.
pub(super) type Identity = (Addr, Addr, u16);

/// The tables of pairs, open.
pub(super) struct Pairs {
    records: Array<MapData, [u8; size_of::<Pair>()]>,
    sources: Array<MapData, Record<Source>>,
    pairs: &'static [Pair],
    chunks: &'static [Chunk],
    index: &'static [Bucket],
    sets: &'static [PortSet],
    flows: &'static [lb_common::flow::Flow],
    /// Every pair that has a number, by what it is known by.
    numbers: BTreeMap<Identity, u16>,
    /// Pairs that the sources of the generation in use have: new flows may begin there.
    used: BTreeSet<u16>,
    /// The same of the generation that is being built.
    next_used: BTreeSet<u16>,
    /// Sources written for the generation that is being built.
    next_source: u32,
    /// Pairs of it with the ports that they get when it is in use.
    new_ports: Vec<(u16, u16)>,
}

/// How much of a pair is in use.
#[derive(Debug, Clone, Copy)]
pub struct PairUsage {
    /// The SNAT address; nothing where the client's address stays.
    pub source: Option<std::net::IpAddr>,
    /// The member.
    pub member: Option<std::net::SocketAddr>,
    /// Ports that carry a flow.
    pub used: u32,
    /// Ports whose flow has ended, and that rest.
    pub resting: u32,
    /// Ports that flows may have.
    pub usable: u32,
}

impl Pairs {
    /// Takes the tables out of the loaded object, and finds what earlier daemons left in them.
    ///
    /// # Errors
    ///
    /// When one is missing or cannot be mapped.
    pub(super) fn open(
        ebpf: &mut Ebpf,
        flows: &'static [lb_common::flow::Flow],
        keep: &mut Vec<MapData>,
    ) -> Result<Self> {
        let Map::Array(data) = loader::map(ebpf, "PAIRS")? else {
            bail!("PAIRS is no array");
        };
        let pairs: &[Pair] = sys::map_array(&data).context("cannot map PAIRS into memory")?;
        Ok(Self {
            records: Map::Array(data).try_into()?,
            sources: loader::map(ebpf, "SNAT_SOURCES")?.try_into()?,
            pairs,
            chunks: mapped(ebpf, "CHUNKS", keep)?,
            index: mapped(ebpf, "PAIR_INDEX", keep)?,
            sets: mapped(ebpf, "PORT_SETS", keep)?,
            flows,
            numbers: numbers_of(pairs),
            used: BTreeSet::new(),
            next_used: BTreeSet::new(),
            next_source: 1,
            new_ports: Vec::new(),
        })
    }

    /// Begins a generation: pairs give their numbers back that no flow is bound to and that none of `sources`, those of
    /// the generation in use, has. New flows may begin at the others until the flip, so the next table leads to them, too.
    ///
    /// # Errors
    ///
    /// When the kernel refuses a record.
    pub(super) fn begin(&mut self, sources: &BTreeSet<u16>) -> Result<()> {
        // Another daemon may have made some, or given some back.
        self.numbers = numbers_of(self.pairs);
        self.used.clear();
        for index in sources {
            let source = self.sources.get(&u32::from(*index), 0)?.0;
            let count = source.count as usize;
            self.used.extend(source.pairs.iter().take(count));
        }
        let stale: Vec<_> = self
            .numbers
            .iter()
            .filter(|(identity, number)| {
                !self.used.contains(number) && !self.bound(**number) && identity.0 != Addr::UNSET
            })
            .map(|(identity, number)| (*identity, *number))
            .collect();
        for (identity, number) in stale {
            let empty = [0; size_of::<Pair>()];
            self.records.set(u32::from(number), empty, 0)?;
            self.numbers.remove(&identity);
        }
        self.next_source = 1;
        // Of one that came to nothing.
        self.next_used.clear();
        self.new_ports.clear();
        Ok(())
    }

    /// The generation is in use: its pairs have its ports.
    pub(super) fn flipped(&mut self) {
        self.used.clear();
        self.changed();
    }

    /// What was added to the generation in use is in use, too.
    pub(super) fn changed(&mut self) {
        self.used.append(&mut self.next_used);
        for (number, set) in std::mem::take(&mut self.new_ports) {
            self.change_ports(number, set);
        }
    }

    /// Does any flow, live or resting, belong to it?
    fn bound(&self, number: u16) -> bool {
        self.pairs[usize::from(number)].tops[Mark::Bound as usize].load(SeqCst) != 0
    }

    fn epoch(&self, epoch: u32) -> &'static [Bucket] {
        let from = ((epoch & 1) * PAIR_BUCKETS) as usize;
        &self.index[from..from + PAIR_BUCKETS as usize]
    }

    /// Writes a source: its pairs are found or made. Those that are found keep their ports until [`Self::flipped`].
    ///
    /// # Errors
    ///
    /// When there are too many sources or pairs.
    pub(super) fn source(&mut self, epoch: u32, pairs: &[(Identity, &Ports)]) -> Result<u16> {
        let index = self.next_source;
        if index >= MAX_SOURCES {
            bail!(
                "more than {} members with a kind of SNAT each",
                MAX_SOURCES - 1
            );
        }
        self.next_source += 1;
        let index = (epoch & 1) * MAX_SOURCES + index;
        self.write_source(index, pairs)?;
        Ok(index as u16)
    }

    /// Writes a source anew.
    ///
    /// # Errors
    ///
    /// When there are too many pairs.
    pub(super) fn write_source(&mut self, index: u32, pairs: &[(Identity, &Ports)]) -> Result<()> {
        let mut source = Source {
            count: pairs.len().min(SOURCE_PAIRS) as u32,
            pairs: [0; 2 * SOURCE_PAIRS],
        };
        let numbers: Vec<u16> = pairs
            .iter()
            .take(SOURCE_PAIRS)
            .map(|(identity, ports)| self.pair(*identity, ports))
            .collect::<Result<_>>()?;
        for (to, number) in source.pairs.iter_mut().zip(numbers.iter().cycle()) {
            *to = *number;
        }
        self.sources.set(index, Record(source), 0)?;
        Ok(())
    }

    /// Makes a pair if it is not there.
    ///
    /// # Errors
    ///
    /// When there are too many.
    pub(super) fn make(&mut self, identity: Identity, ports: &Ports) -> Result<()> {
        self.pair(identity, ports).map(drop)
    }

    /// The number of a pair: the one it has, else a free one.
    fn pair(&mut self, identity: Identity, ports: &Ports) -> Result<u16> {
        let set = self.set(ports)?;
        let known = self.numbers.get(&identity).copied();
        // Another daemon's start that came to nothing may have given it back.
        let is_its =
            |number: &u16| sys::identity(&self.pairs[usize::from(*number)]) == (identity, true);
        if let Some(number) = known.filter(is_its) {
            self.next_used.insert(number);
            self.new_ports.push((number, set));
            return Ok(number);
        }
        let number = (1..self.pairs.len().min(BY_KEY as usize))
            .map(|number| number as u16)
            .find(|number| {
                !sys::identity(&self.pairs[usize::from(*number)]).1
            })
            .with_context(|| {
                format!(
                    "more than {} pairs of SNAT address and member; a higher max_flows makes room for more",
                    self.pairs.len() - 1
                )
            })?;
        let image = sys::pair_image(identity, u32::from(set), &ports.0);
        self.records.set(u32::from(number), image, 0)?;
        self.numbers.insert(identity, number);
        self.next_used.insert(number);
        Ok(number)
    }

    /// The number of a set of ports: the one it has, else one that no pair uses.
    fn set(&self, ports: &Ports) -> Result<u16> {
        let same = |set: &PortSet| {
            let words = set.words.iter().map(|word| word.load(SeqCst));
            words.eq(ports.0.iter().copied())
        };
        if let Some(number) = self.sets.iter().skip(1).position(same) {
            return Ok(number as u16 + 1);
        }
        let numbers = self.numbers.values();
        let now = numbers.map(|number| self.pairs[usize::from(*number)].ports.load(SeqCst));
        let next = self.new_ports.iter().map(|(_, set)| u32::from(*set));
        let used: BTreeSet<u32> = now.chain(next).collect();
        let free = (1..self.sets.len())
            .find(|number| !used.contains(&(*number as u32)))
            .with_context(|| format!("more than {} sets of SNAT ports", self.sets.len() - 1))?;
        for (to, word) in self.sets[free].words.iter().zip(ports.0.iter()) {
            to.store(*word, SeqCst);
        }
        Ok(free as u16)
    }

    /// Other ports than before: flows on ports that are no longer usable go on, and nobody gets these ports again.
    fn change_ports(&self, number: u16, set: u16) {
        let pair = &self.pairs[usize::from(number)];
        let before = pair.ports.swap(u32::from(set), SeqCst) as usize;
        if before == usize::from(set) {
            return;
        }
        for place in 0..PLACES {
            let old = self.sets[before].words[place].load(SeqCst);
            let new = self.sets[usize::from(set)].words[place].load(SeqCst);
            if old == new {
                continue;
            }
            let bound = pair.chunks[place].load(SeqCst);
            if bound == 0 {
                mark(pair, Mark::Unbound, place, new != 0);
                continue;
            }
            let chunk = &self.chunks[bound as usize];
            chunk.free.fetch_and(new, SeqCst);
            chunk.resting.fetch_and(new, SeqCst);
            for at in 0..CHUNK {
                let flow = &self.flows[(bound * CHUNK + at) as usize];
                let added = new & !old & 1 << at;
                if flow.phase.load(SeqCst) == Phase::Free as u32 {
                    chunk.free.fetch_or(added, SeqCst);
                }
            }
            mark(pair, Mark::Free, place, chunk.free.load(SeqCst) != 0);
        }
    }

    /// Builds the table of pairs for a generation, and tells its seed, which `fits` elsewhere too. `by_key`: members whose
    /// replies come with the client's address.
    ///
    /// # Errors
    ///
    /// When no seed is found for which no bucket overflows.
    pub(super) fn build_index(
        &self,
        epoch: u32,
        by_key: &BTreeSet<(Addr, u16)>,
        fits: impl Fn(u64) -> bool,
    ) -> Result<u64> {
        let entries: Vec<(Identity, u32)> = self
            .numbers
            .iter()
            .filter(|(identity, _)| identity.0 != Addr::UNSET)
            .map(|(identity, number)| (*identity, u32::from(*number)))
            .chain(
                by_key
                    .iter()
                    .map(|(member, port)| ((Addr::UNSET, *member, *port), BY_KEY)),
            )
            .collect();
        let random = RandomState::new();
        for attempt in 0..SEEDS {
            let mut hasher = random.build_hasher();
            hasher.write_u32(attempt);
            let seed = hasher.finish();
            let Some(table) = arrange(seed, epoch, &entries).filter(|_| fits(seed)) else {
                continue;
            };
            for (bucket, entries) in self.epoch(epoch).iter().zip(table) {
                for (cell, entry) in bucket.entries.iter().zip(entries) {
                    cell.store(entry, SeqCst);
                }
            }
            return Ok(seed);
        }
        bail!(
            "no table holds {} pairs of SNAT address and member",
            entries.len()
        )
    }

    /// The SNAT addresses of all pairs.
    pub(super) fn sources(&self) -> impl Iterator<Item = Addr> {
        let sources = self.numbers.keys().map(|(source, ..)| *source);
        sources.filter(|source| *source != Addr::UNSET)
    }

    /// Enters a pair into the table in use.
    ///
    /// # Errors
    ///
    /// When its bucket has no place for it; the next generation finds another seed.
    pub(super) fn enter(&self, seed: u64, epoch: u32, identity: Identity) -> Result<()> {
        let number = u32::from(self.numbers[&identity]);
        let (source, member, port) = identity;
        let (bucket, tag) = pair_bucket(seed, epoch, &source, &member, port);
        let entry = tag << 16 | number;
        for cell in &self.index[bucket as usize].entries {
            match cell.load(SeqCst) {
                0 => {
                    cell.store(entry, SeqCst);
                    return Ok(());
                }
                found if found == entry => return Ok(()),
                found if found >> 16 == tag => {
                    // Its pair has given its number back since the table was built, or it is another's.
                    let pair = self.pairs.get((found & 0xffff) as usize);
                    let live = pair.map(sys::identity).filter(|(_, known)| *known);
                    if live.is_some_and(|((source, member, port), _)| {
                        pair_bucket(seed, epoch, &source, &member, port) == (bucket, tag)
                    }) {
                        break;
                    }
                    cell.store(entry, SeqCst);
                    return Ok(());
                }
                _ => {}
            }
        }
        bail!("the table of pairs has no place for {:?}", source.to_ip())
    }

    /// Address and port that the next connection from a source would get: a source that has the pair `like`, when its
    /// turn is `turn`. `None`: every port is in use, and a connection finds one only where another yields.
    pub(super) fn next(&self, like: &Identity, epoch: u32, turn: u32) -> Option<(Addr, u16)> {
        let number = self.numbers.get(like)?;
        let indices = (epoch & 1) * MAX_SOURCES..((epoch & 1) + 1) * MAX_SOURCES;
        let source = indices
            .filter_map(|index| Some(self.sources.get(&index, 0).ok()?.0))
            .find(|source| source.pairs[..source.count as usize].contains(number))?;
        let start = pair::first(turn, source.count) as usize;
        let pairs = source.pairs[start..].iter().take(source.count as usize);
        let mut kinds = [Mark::Free, Mark::Resting].into_iter();
        kinds.find_map(|kind| {
            pairs.clone().find_map(|number| {
                let pair = &self.pairs[usize::from(*number)];
                let port = self.port(pair, kind)?;
                Some((sys::identity(pair).0.0, port))
            })
        })
    }

    /// The port of a pair that the programs would come to first.
    fn port(&self, pair: &Pair, kind: Mark) -> Option<u16> {
        let cursor = pair.cursor.load(SeqCst) as usize;
        let bound = (0..=PLACES).find_map(|step| {
            let place = (cursor / CHUNK as usize + step) % PLACES;
            let chunk = pair.chunks[place].load(SeqCst) as usize;
            let chunk = self.chunks.get(chunk).filter(|_| chunk != 0)?;
            let ports = match kind {
                Mark::Resting => chunk.resting.load(SeqCst),
                _ => chunk.free.load(SeqCst),
            };
            // At its own place the cursor has passed the lower ones; they come last.
            let ahead = match step {
                0 => ports & u64::MAX << (cursor % CHUNK as usize),
                _ => ports,
            };
            lowest_port(place, ahead)
        });
        if bound.is_some() || kind == Mark::Resting {
            return bound;
        }
        let set = self.sets.get(pair.ports.load(SeqCst) as usize)?;
        let unbound = |place: &usize| pair.chunks[*place].load(SeqCst) == 0;
        (0..PLACES)
            .filter(unbound)
            .find_map(|place| lowest_port(place, set.words[place].load(SeqCst)))
    }

    /// Do flows of lanes live?
    pub(super) fn lanes_bound(&self) -> bool {
        let lanes = self.numbers.iter();
        lanes
            .filter(|(identity, _)| identity.0 == Addr::UNSET)
            .any(|(_, number)| self.bound(*number))
    }

    /// How many ports the pair of the next generation with the fewest will have; nothing where every client keeps its
    /// address. Those that only earlier flows are bound to do not count: nothing begins there.
    pub(super) fn fewest_ports(&self) -> Option<u32> {
        let changed: BTreeMap<_, _> = self.new_ports.iter().copied().collect();
        let with_address = self.next_used.iter().filter(|number| {
            let ((source, ..), _) = sys::identity(&self.pairs[usize::from(**number)]);
            source != Addr::UNSET
        });
        with_address
            .map(|number| match changed.get(number) {
                Some(set) => usable(&self.sets[usize::from(*set)]),
                None => usable(self.set_of(*number)),
            })
            .min()
    }

    fn set_of(&self, number: u16) -> &'static PortSet {
        let set = self.pairs[usize::from(number)].ports.load(SeqCst);
        &self.sets[set as usize % self.sets.len()]
    }

    /// How much is in use of every pair where new flows may begin, or that has flows.
    pub(super) fn usage(&self) -> Vec<PairUsage> {
        self.numbers
            .iter()
            .filter(|(_, number)| self.used.contains(number) || self.bound(**number))
            .map(|((source, member, port), number)| {
                let pair = &self.pairs[usize::from(*number)];
                let set = self.set_of(*number);
                let mut usage = PairUsage {
                    source: (*source != Addr::UNSET).then(|| source.to_ip()),
                    member: (*source != Addr::UNSET).then(|| member.to_socket_addr(*port)),
                    used: 0,
                    resting: 0,
                    usable: usable(set),
                };
                for (place, bound) in pair.chunks.iter().enumerate() {
                    let bound = bound.load(SeqCst) as usize;
                    let Some(chunk) = self.chunks.get(bound).filter(|_| bound != 0) else {
                        continue;
                    };
                    let resting = chunk.resting.load(SeqCst);
                    let usable = set.words[place].load(SeqCst);
                    usage.resting += resting.count_ones();
                    usage.used += (usable & !chunk.free.load(SeqCst) & !resting).count_ones();
                }
                usage
            })
            .collect()
    }

    /// Chunks bound to a pair, and all of them.
    pub(super) fn chunks(&self) -> (u64, u64) {
        let bound = |chunk: &&Chunk| chunk.pair.load(SeqCst) != 0;
        (
            self.chunks.iter().filter(bound).count() as u64,
            self.chunks.len() as u64 - 1,
        )
    }
}

/// The pairs that have a number.
fn numbers_of(pairs: &[Pair]) -> BTreeMap<Identity, u16> {
    let numbered = (0u16..).zip(pairs).skip(1);
    numbered
        .filter_map(|(number, pair)| {
            let (identity, known) = sys::identity(pair);
            known.then_some((identity, number))
        })
        .collect()
}

fn arrange(seed: u64, epoch: u32, entries: &[(Identity, u32)]) -> Option<Vec<[u32; WAYS]>> {
    let mut table = vec![[0; WAYS]; PAIR_BUCKETS as usize];
    for ((source, member, port), number) in entries {
        let (bucket, tag) = pair_bucket(seed, epoch, source, member, *port);
        let bucket = &mut table[(bucket % PAIR_BUCKETS) as usize];
        // Two with the same tag could not be told apart.
        if bucket.iter().any(|entry| *entry != 0 && entry >> 16 == tag) {
            return None;
        }
        *bucket.iter_mut().find(|entry| **entry == 0)? = tag << 16 | number;
    }
    Some(table)
}

fn usable(set: &PortSet) -> u32 {
    let words = set.words.iter();
    words.map(|word| word.load(SeqCst).count_ones()).sum()
}

/// The lowest of the ports of a place.
fn lowest_port(place: usize, ports: u64) -> Option<u16> {
    let port = place as u32 * CHUNK + ports.trailing_zeros();
    (ports != 0).then_some(port as u16)
}

fn mark(pair: &Pair, kind: Mark, place: usize, on: bool) {
    let (word, top) = (
        &pair.words[kind as usize][place / 64],
        &pair.tops[kind as usize],
    );
    if on {
        word.fetch_or(1 << (place % 64), SeqCst);
        top.fetch_or(1 << (place / 64), SeqCst);
    } else {
        word.fetch_and(!(1 << (place % 64)), SeqCst);
    }
}
