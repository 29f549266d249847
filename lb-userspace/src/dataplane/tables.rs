//! A generation in the kernel's tables: built aside, then flipped; numbers of members and virtual servers are kept.

use std::{
    collections::{BTreeSet, HashMap as Index, HashSet},
    hash::{BuildHasher as _, Hasher as _, RandomState},
    net::{IpAddr, SocketAddr},
    sync::atomic::Ordering::Relaxed,
};

use anyhow::{Context, Result, bail};
use aya::{
    Ebpf,
    maps::{Array, Map, MapData, MapInfo, PerCpuArray},
};
use lb_common::{
    addr::Addr,
    flow::Flow,
    layout::{MAX_MEMBERS, MAX_POOLS, MAX_VIEWS, MAX_VIRTUAL_SERVERS, VLAN_WORDS},
    member::Member,
    pair::{Allocation, CHUNK},
    reason::DropReason,
    service::{Config, Pool, Service},
    stats::TrafficCell,
};

use super::{
    flows::FlowTable,
    loader,
    pairs::{PairUsage, Pairs},
    ports::LocalPorts,
    services::{self, Placed, Services},
    sys::{self, Record},
    views::Automap,
};
use crate::model::{Forward, Generation, Name, Snat};

/// Half-open flows at once, at most: a busy mail host has some hundred, a flood fills any number.
const MAX_HALF_OPEN: u32 = 16_384;

/// The tables, open.
pub(super) struct Tables {
    config: Array<MapData, Record<Config>>,
    services: Services,
    pub pools: Array<MapData, Record<Pool>>,
    members: Array<MapData, Record<Member>>,
    vlans: Array<MapData, u64>,
    drops: PerCpuArray<MapData, u64>,
    /// Counters of members, by number.
    pub member_cells: &'static [TrafficCell],
    /// Counters of virtual servers, by number.
    pub service_cells: &'static [TrafficCell],
    flows: &'static [Flow],
    allocation: &'static [Allocation],
    /// Where SNAT ports and flow records come from.
    pub pairs: Pairs,
    /// Buckets of the table of flows.
    flow_buckets: u32,
    /// Of the generation in use.
    pub automap: Automap,
    /// What the box itself uses.
    pub local_ports: Option<LocalPorts>,
    /// Programs that are loaded later still name these.
    _mapped: Vec<MapData>,
}

/// The numbers that a generation's objects have in the tables.
#[derive(Debug, Default, Clone)]
pub struct Numbers {
    /// By pool name and member address.
    pub members: Index<(Name, SocketAddr), u16>,
    /// By virtual server name.
    pub virtual_servers: Index<Name, u16>,
}

/// Numbers that something out of the tables' sight may still count under.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Held {
    /// Of members.
    pub members: BTreeSet<u16>,
    /// Of virtual servers.
    pub virtual_servers: BTreeSet<u16>,
}

/// A generation in the tables that is not in use yet.
pub(super) struct Built {
    /// What the programs will go by.
    config: Config,
    automap: Automap,
    local_ports: LocalPorts,
}

impl Tables {
    /// Takes the tables out of the loaded object.
    ///
    /// # Errors
    ///
    /// When one is missing or cannot be mapped.
    pub(super) fn open(ebpf: &mut Ebpf) -> Result<Self> {
        let mut keep = Vec::new();
        let flows = mapped(ebpf, "FLOWS", &mut keep)?;
        let index = loader::map(ebpf, "FLOW_INDEX")?;
        let Map::Array(index) = index else {
            bail!("FLOW_INDEX is no array");
        };
        let info: MapInfo = index.info()?;
        keep.push(index);
        Ok(Self {
            pairs: Pairs::open(ebpf, flows, &mut keep)?,
            flow_buckets: info.max_entries(),
            automap: Automap::new(),
            local_ports: None,
            flows,
            config: loader::map(ebpf, "CONFIG")?.try_into()?,
            services: Services::open(ebpf)?,
            pools: loader::map(ebpf, "POOLS")?.try_into()?,
            members: loader::map(ebpf, "MEMBERS")?.try_into()?,
            vlans: loader::map(ebpf, "VLANS")?.try_into()?,
            drops: loader::map(ebpf, "DROPS")?.try_into()?,
            member_cells: mapped(ebpf, "MEMBER_CELLS", &mut keep)?,
            service_cells: mapped(ebpf, "SERVICE_CELLS", &mut keep)?,
            allocation: mapped(ebpf, "ALLOCATION", &mut keep)?,
            _mapped: keep,
        })
    }

    /// What the programs go by now; `None` before the first generation.
    pub(super) fn config(&self) -> Option<Config> {
        self.config
            .get(&0, 0)
            .ok()
            .map(|record| record.0)
            .filter(|config| config.generation != 0)
    }

    /// Finds a number for every member and virtual server: the one it had, else one that nobody uses and that is not
    /// `held`.
    ///
    /// # Errors
    ///
    /// When there are more of them than numbers.
    pub(super) fn number(&self, generation: &Generation, held: &Held) -> Result<Numbers> {
        let mut numbers = Numbers::default();
        let epoch = self.config().map_or(0, |config| config.epoch as u16);
        let mut known_members = Index::new();
        for number in 1..MAX_MEMBERS {
            let record = self.members.get(&number, 0)?.0;
            if record.port != 0 {
                known_members.insert(
                    (record.pool_hash, record.address.to_socket_addr(record.port)),
                    number as u16,
                );
            }
        }
        let known_services = self.known_services(epoch)?;
        // What the generation in use names keeps its number until the next but one.
        let in_use = self.members_in_use(u32::from(epoch));
        let mut taken_members: Vec<u16> = in_use;
        let mut fresh = Vec::new();
        for pool in generation.pools.values() {
            for member in &pool.members {
                match known_members.get(&(pool_hash(&pool.name), member.address)) {
                    Some(number) => {
                        taken_members.push(*number);
                        numbers
                            .members
                            .insert((pool.name.clone(), member.address), *number);
                    }
                    None => fresh.push((pool.name.clone(), member.address)),
                }
            }
        }
        taken_members.extend(&held.members);
        let mut free = (1..MAX_MEMBERS as u16)
            .filter(|number| !taken_members.contains(number) && idle(self.member_cells, *number));
        for key in fresh {
            let number = free
                .next()
                .with_context(|| format!("more than {} members in all", MAX_MEMBERS - 1))?;
            reset(&self.member_cells[usize::from(number)]);
            numbers.members.insert(key, number);
        }
        let known = known_services.values().copied();
        let taken: Vec<u16> = known.chain(held.virtual_servers.iter().copied()).collect();
        // A virtual server that was split keeps its number once.
        let mut given = HashSet::new();
        let mut fresh = Vec::new();
        for server in &generation.virtual_servers {
            let mut ports = server.at.each_port();
            let known = ports.find_map(|port| {
                let number = known_services.get(&(server.at.address, server.at.length, port))?;
                given.insert(*number).then_some(*number)
            });
            match known {
                Some(number) => {
                    numbers.virtual_servers.insert(server.name.clone(), number);
                }
                None => fresh.push(server.name.clone()),
            }
        }
        let mut free = (1..MAX_VIRTUAL_SERVERS as u16)
            .filter(|number| !taken.contains(number) && idle(self.service_cells, *number));
        for name in fresh {
            let number = free.next().with_context(|| {
                format!("more than {} virtual servers", MAX_VIRTUAL_SERVERS - 1)
            })?;
            reset(&self.service_cells[usize::from(number)]);
            numbers.virtual_servers.insert(name, number);
        }
        Ok(numbers)
    }

    fn members_in_use(&self, epoch: u32) -> Vec<u16> {
        self.pools_of(epoch)
            .flat_map(|pool| pool.members)
            .filter(|number| *number != 0)
            .collect()
    }

    /// Where new flows to the members of an epoch's pools come from.
    fn sources_in_use(&self, epoch: u32) -> BTreeSet<u16> {
        self.pools_of(epoch)
            .flat_map(|pool| pool.sources)
            .filter(|source| *source != 0)
            .collect()
    }

    fn pools_of(&self, epoch: u32) -> impl Iterator<Item = Pool> {
        let pools = (1..MAX_VIEWS).map(move |pool| epoch * MAX_VIEWS + pool);
        pools.filter_map(|pool| Some(self.pools.get(&pool, 0).ok()?.0))
    }

    /// The state that the programs know of a member; `None` for a number that was never written.
    pub(super) fn available(&self, number: u16) -> Option<bool> {
        let record = self.members.get(&u32::from(number), 0).ok()?.0;
        (record.port != 0).then_some(record.available != 0)
    }

    /// The epoch that the next generation is built in.
    pub(super) fn next_epoch(&self) -> u32 {
        self.config().map_or(0, |config| config.epoch ^ 1)
    }

    /// Builds a generation aside, in the epoch that is not in use: all that can be too much is found here. Until
    /// [`Self::flip`] nothing goes by it.
    ///
    /// # Errors
    ///
    /// When a table has no room, or refuses a record.
    pub(super) fn build(
        &mut self,
        generation: &Generation,
        numbers: &Numbers,
        config: Config,
    ) -> Result<Built> {
        let built = self.build_aside(generation, numbers, config);
        if built.is_err() {
            // Pairs that it has made are needed by nobody.
            self.pairs
                .begin(&self.sources_in_use(self.next_epoch() ^ 1))?;
        }
        built
    }

    fn build_aside(
        &mut self,
        generation: &Generation,
        numbers: &Numbers,
        mut config: Config,
    ) -> Result<Built> {
        let old = self.config();
        let in_use = old.map_or(1, |old| old.epoch);
        let epoch = in_use ^ 1;
        if generation.pools.len() as u32 >= MAX_POOLS {
            bail!("more than {} pools", MAX_POOLS - 1);
        }
        let before = match old {
            Some(_) => self.services.read(in_use)?,
            None => Vec::new(),
        };
        self.pairs.begin(&self.sources_in_use(in_use))?;
        let local_ports = LocalPorts::read(generation);
        let views = self.write_pools(generation, numbers, epoch, &local_ports)?;
        let mut placed = Vec::new();
        for server in &generation.virtual_servers {
            let (forward, snat) = match &server.forward {
                Forward::Passthrough { snat, .. } => (Service::PASSTHROUGH, Some(snat.clone())),
                Forward::Proxy { .. } => (Service::PROXY, None),
            };
            let service = Service {
                virtual_server: numbers.virtual_servers[&server.name],
                forward,
                snat: match &snat {
                    None | Some(Snat::None) => Service::SNAT_NONE,
                    Some(Snat::Automap) => Service::SNAT_AUTOMAP,
                    Some(Snat::Pool(_)) => Service::SNAT_POOL,
                },
                pool: views.pools[&(server.pool.clone(), snat)],
                flags: if matches!(
                    server.forward,
                    Forward::Passthrough {
                        proxy_protocol: true,
                        ..
                    }
                ) {
                    Service::PROXY_HEADER
                } else {
                    0
                },
            };
            placed.extend(server.at.each_port().map(|port| Placed {
                at: (server.at.address, server.at.length, port),
                service,
            }));
        }
        self.keep_gone(&before, &mut placed);
        let by_key = self.members_by_key(generation)?;
        config.seeds = old.map_or([0; 2], |old| old.seeds);
        config.hash = old.map_or_else(|| std::array::from_fn(|_| random()), |old| old.hash);
        // Both tables go by one seed.
        let fits = |seed| services::fits(seed, epoch, &placed);
        let seed = self.pairs.build_index(epoch, &by_key, fits)?;
        config.seeds[epoch as usize] = seed;
        self.services.write(seed, epoch, &placed)?;
        config.prefixes = u32::from(services::any_prefix(&placed));
        config.by_key = u32::from(!by_key.is_empty());
        self.write_filter(&mut config, &placed);
        config.generation = old.map_or(1, |old| old.generation + 1);
        config.chunks = (self.flows.len() as u32) / CHUNK;
        config.flow_mask = self.flow_buckets - 1;
        config.cookie = old.map_or_else(|| std::array::from_fn(|_| random()), |old| old.cookie);
        // Half of the records, and of the ports of any pair: the others stay free for connections that are really opened.
        let scarcest = self.pairs.fewest_ports().unwrap_or(u32::MAX);
        config.embryonic = (scarcest.min(self.flows_max() as u32) / 2).clamp(1, MAX_HALF_OPEN);
        config.epoch = epoch;
        Ok(Built {
            config,
            automap: views.automap,
            local_ports,
        })
    }

    /// Flips to the generation that was built last. From here on, what the generation in use goes by changes.
    ///
    /// # Errors
    ///
    /// When a table refuses a record.
    pub(super) fn flip(
        &mut self,
        generation: &Generation,
        numbers: &Numbers,
        up: impl Fn(u16) -> bool,
        built: Built,
    ) -> Result<()> {
        let mut config = built.config;
        let epoch = config.epoch;
        for pool in generation.pools.values() {
            for member in &pool.members {
                let number = numbers.members[&(pool.name.clone(), member.address)];
                self.write_member(number, &pool.name, member.address, up(number))?;
            }
        }
        // Twice: a program that sees half of the first change goes by the tables in use, and of the second there is no
        // half.
        if let Some(old) = self.config() {
            config.epoch = old.epoch;
            self.config.set(0, Record(config), 0)?;
        }
        self.write_vlans(&generation.network.vlans)?;
        config.epoch = epoch;
        self.config.set(0, Record(config), 0)?;
        self.pairs.flipped();
        self.automap = built.automap;
        self.local_ports = Some(built.local_ports);
        Ok(())
    }

    /// Says to which addresses packets go that may be ours.
    fn write_filter(&self, config: &mut Config, placed: &[Placed]) {
        config.filter = Default::default();
        if config.prefixes != 0 || config.by_key != 0 {
            return config.let_all_through();
        }
        for Placed {
            at: (address, ..), ..
        } in placed
        {
            config.let_through(&(*address).into());
        }
        self.pairs
            .sources()
            .for_each(|source| config.let_through(&source));
    }

    /// Packets to this address are ours, too.
    pub(super) fn let_through(&mut self, address: IpAddr) -> Result<()> {
        if let Some(mut config) = self.config() {
            config.let_through(&address.into());
            self.config.set(0, Record(config), 0)?;
        }
        Ok(())
    }

    /// Says which VLANs clients may use. No frame of a VLAN that was and stays allowed is dropped meanwhile.
    fn write_vlans(&mut self, vlans: &BTreeSet<u16>) -> Result<()> {
        let mut words = [0u64; VLAN_WORDS as usize];
        for vlan in vlans {
            words[usize::from(vlan >> 6)] |= 1 << (vlan & 63);
        }
        if vlans.is_empty() {
            self.vlans.set(VLAN_WORDS, 0, 0)?;
        }
        for (index, word) in (0..).zip(words) {
            self.vlans.set(index, word, 0)?;
        }
        if !vlans.is_empty() {
            self.vlans.set(VLAN_WORDS, 1, 0)?;
        }
        Ok(())
    }

    /// Virtual servers of the generation in use that are gone from the next: as long as they carry flows, packets of
    /// these still have to be found.
    fn keep_gone(&self, before: &[Placed], placed: &mut Vec<Placed>) {
        for old in before {
            if old.service.forward == Service::PROXY {
                continue;
            }
            let cell = &self.service_cells[usize::from(old.service.virtual_server)];
            let carries =
                cell.flows_active.load(Relaxed) != 0 || old.service.forward == Service::PASSTHROUGH;
            let next = placed.iter_mut().find(|next| next.at == old.at);
            match next {
                Some(next) if next.service.forward == Service::PROXY && carries => {
                    next.service.forward = Service::PROXY_AFTER;
                }
                None if carries => {
                    let mut gone = *old;
                    gone.service.forward = Service::GONE;
                    placed.push(gone);
                }
                _ => {}
            }
        }
    }

    /// Members whose replies come with the client's address.
    fn members_by_key(&self, generation: &Generation) -> Result<BTreeSet<(Addr, u16)>> {
        let mut members = BTreeSet::new();
        for server in &generation.virtual_servers {
            if let Forward::Passthrough {
                snat: Snat::None, ..
            } = server.forward
            {
                for member in &generation.pools[&server.pool].members {
                    members.insert((member.address.ip().into(), member.address.port().to_be()));
                }
            }
        }
        // Of an earlier generation: any member may have been one.
        if self.pairs.lanes_bound() {
            for number in 1..MAX_MEMBERS {
                let record = self.members.get(&number, 0)?.0;
                if record.port != 0 {
                    members.insert((record.address, record.port));
                }
            }
        }
        Ok(members)
    }

    /// The number of each virtual server in use, by its addresses, prefix lengths and ports.
    fn known_services(&self, epoch: u16) -> Result<Index<(IpAddr, u8, u16), u16>> {
        let placed = self.services.read(u32::from(epoch))?.into_iter();
        Ok(placed
            .map(|placed| (placed.at, placed.service.virtual_server))
            .collect())
    }

    /// Writes what a monitor found.
    ///
    /// # Errors
    ///
    /// When the table refuses the record.
    pub(super) fn write_member(
        &mut self,
        number: u16,
        pool: &Name,
        address: SocketAddr,
        up: bool,
    ) -> Result<()> {
        let record = Member {
            address: address.ip().into(),
            port: address.port().to_be(),
            available: u16::from(up),
            pool_hash: pool_hash(pool),
        };
        self.members.set(u32::from(number), Record(record), 0)?;
        Ok(())
    }

    /// How much of every pair is in use.
    pub(super) fn usage(&self) -> Vec<PairUsage> {
        self.pairs.usage()
    }

    /// What the next connection to a member would come from, one of whose SNAT addresses is `like`; `None`: every port is
    /// in use.
    pub(super) fn next_source(&self, member: u16, like: Addr) -> Option<SocketAddr> {
        let record = self.members.get(&u32::from(member), 0).ok()?.0;
        let turn = self.allocation[0].turn.load(Relaxed);
        let identity = (like, record.address, record.port);
        let (address, port) = self.pairs.next(&identity, self.config()?.epoch, turn)?;
        Some(SocketAddr::new(address.to_ip(), port))
    }

    /// How often a packet or connection was not carried, by reason.
    pub(super) fn drops(&self) -> Vec<(DropReason, u64)> {
        DropReason::ALL
            .iter()
            .map(|reason| {
                let count = self
                    .drops
                    .get(&(*reason as u32), 0)
                    .map_or(0, |cpus| cpus.iter().sum());
                (*reason, count)
            })
            .collect()
    }

    /// The flow records, for whoever reads them beside the programs.
    pub(super) fn flow_table(&self) -> FlowTable {
        FlowTable::new(self.flows, self.allocation)
    }

    /// How many flow records there are.
    pub(super) fn flows_max(&self) -> u64 {
        self.flows.len() as u64 - u64::from(CHUNK)
    }

    /// Half-open flows now.
    pub(super) fn embryonic(&self) -> u32 {
        self.allocation[0].embryonic.load(Relaxed)
    }
}

fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// Maps an array into memory.
///
/// # Errors
///
/// When it is missing or cannot be mapped.
pub(super) fn mapped<T: sys::Shared>(
    ebpf: &mut Ebpf,
    name: &str,
    keep: &mut Vec<MapData>,
) -> Result<&'static [T]> {
    let Map::Array(data) = loader::map(ebpf, name)? else {
        bail!("{name} is no array");
    };
    let array = sys::map_array(&data).with_context(|| format!("cannot map {name} into memory"))?;
    keep.push(data);
    Ok(array)
}

/// Nobody counts there now.
fn idle(cells: &[TrafficCell], number: u16) -> bool {
    cells[usize::from(number)].active() == 0
}

fn reset(cell: &TrafficCell) {
    for counter in [
        &cell.flows_active,
        &cell.flows_total,
        &cell.flow_bytes_in,
        &cell.flow_bytes_out,
        &cell.flow_packets_in,
        &cell.flow_packets_out,
        &cell.sessions_active,
        &cell.sessions_total,
        &cell.session_bytes_in,
        &cell.session_bytes_out,
    ] {
        counter.store(0, Relaxed);
    }
}

/// Tells pools apart in the member table (FNV-1a, 32 bits).
fn pool_hash(name: &Name) -> u32 {
    name.bytes().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}
