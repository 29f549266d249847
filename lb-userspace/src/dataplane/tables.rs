//! A generation in the kernel's tables: built aside, then flipped; numbers of members and virtual servers are kept.

use std::{
    collections::{BTreeSet, HashMap as Index, HashSet},
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::atomic::Ordering::Relaxed,
};

use anyhow::{Context, Result, bail};
use aya::{
    Ebpf,
    maps::{
        Array, HashMap, Map, MapData, PerCpuArray,
        lpm_trie::{Key, LpmTrie},
    },
};
use lb_common::{
    addr::Addr,
    flow::Flow,
    layout::{MAX_MEMBERS, MAX_POOLS, MAX_VIRTUAL_SERVERS, POOL_MEMBERS, VLAN_WORDS},
    member::Member,
    reason::DropReason,
    service::{Config, Pool, PrefixKey, Service, ServiceKey},
    stats::TrafficCell,
};

use super::{
    flows::FlowTable,
    loader,
    sys::{self, Allocation, Record},
};
use crate::model::{Forward, Generation, Method, Name, Places, Snat};

/// The tables, open.
pub(super) struct Tables {
    config: Array<MapData, Record<Config>>,
    services: HashMap<MapData, Record<ServiceKey>, Record<Service>>,
    prefixes: LpmTrie<MapData, Record<PrefixKey>, Record<Service>>,
    pools: Array<MapData, Record<Pool>>,
    members: Array<MapData, Record<Member>>,
    vlans: Array<MapData, u64>,
    drops: PerCpuArray<MapData, u64>,
    /// Counters of members, by number.
    pub member_cells: &'static [TrafficCell],
    /// Counters of virtual servers, by number.
    pub service_cells: &'static [TrafficCell],
    flows: &'static [Flow],
    allocation: &'static [Allocation],
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

impl Tables {
    /// Takes the tables out of the loaded object.
    ///
    /// # Errors
    ///
    /// When one is missing or cannot be mapped.
    pub(super) fn open(ebpf: &mut Ebpf) -> Result<Self> {
        let mut keep = Vec::new();
        Ok(Self {
            config: loader::map(ebpf, "CONFIG")?.try_into()?,
            services: loader::map(ebpf, "SERVICES")?.try_into()?,
            prefixes: loader::map(ebpf, "PREFIXES")?.try_into()?,
            pools: loader::map(ebpf, "POOLS")?.try_into()?,
            members: loader::map(ebpf, "MEMBERS")?.try_into()?,
            vlans: loader::map(ebpf, "VLANS")?.try_into()?,
            drops: loader::map(ebpf, "DROPS")?.try_into()?,
            member_cells: mapped(ebpf, "MEMBER_CELLS", &mut keep)?,
            service_cells: mapped(ebpf, "SERVICE_CELLS", &mut keep)?,
            flows: mapped(ebpf, "FLOWS", &mut keep)?,
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

    /// Finds a number for every member and virtual server: the one it had, else one that nobody uses.
    ///
    /// # Errors
    ///
    /// When there are more of them than numbers.
    pub(super) fn number(&self, generation: &Generation) -> Result<Numbers> {
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
        let known_services = self.known_services(epoch);
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
        let mut free = (1..MAX_MEMBERS as u16)
            .filter(|number| !taken_members.contains(number) && idle(self.member_cells, *number));
        for key in fresh {
            let number = free
                .next()
                .with_context(|| format!("more than {} members in all", MAX_MEMBERS - 1))?;
            reset(&self.member_cells[usize::from(number)]);
            numbers.members.insert(key, number);
        }
        let taken: Vec<u16> = known_services.values().copied().collect();
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
        let pools =
            (1..MAX_POOLS).filter_map(|pool| self.pools.get(&(epoch * MAX_POOLS + pool), 0).ok());
        pools
            .flat_map(|pool| pool.0.members)
            .filter(|number| *number != 0)
            .collect()
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

    /// Builds a generation aside and flips to it.
    ///
    /// # Errors
    ///
    /// When a table refuses a record; the generation in use stays in use.
    pub(super) fn apply(
        &mut self,
        generation: &Generation,
        numbers: &Numbers,
        up: impl Fn(u16) -> bool,
        mut config: Config,
    ) -> Result<()> {
        let epoch = self.next_epoch();
        if generation.pools.len() as u32 >= MAX_POOLS {
            bail!("more than {} pools", MAX_POOLS - 1);
        }
        self.clear_services(epoch)?;
        let mut pool_index = Index::new();
        for (turn, pool) in (1u32..).zip(generation.pools.values()) {
            let mut record = Pool {
                method: match pool.method {
                    Method::LeastConnections => Pool::LEAST_CONNECTIONS,
                    Method::RoundRobin => Pool::ROUND_ROBIN,
                },
                count: pool.members.len().min(POOL_MEMBERS) as u32,
                turn,
                members: [0; POOL_MEMBERS],
            };
            for (place, member) in record.members.iter_mut().zip(&pool.members) {
                let number = numbers.members[&(pool.name.clone(), member.address)];
                *place = number;
                self.write_member(number, &pool.name, member.address, up(number))?;
            }
            let index = epoch * MAX_POOLS + turn;
            self.pools.set(index, Record(record), 0)?;
            pool_index.insert(pool.name.clone(), index);
        }
        for server in &generation.virtual_servers {
            let (forward, snat) = match &server.forward {
                Forward::Passthrough {
                    snat: Snat::None, ..
                } => (Service::PASSTHROUGH, Service::SNAT_NONE),
                Forward::Passthrough {
                    snat: Snat::Automap,
                    ..
                } => (Service::PASSTHROUGH, Service::SNAT_AUTOMAP),
                Forward::Proxy { .. } => (Service::PROXY, Service::SNAT_NONE),
            };
            let service = Service {
                pool: pool_index[&server.pool],
                virtual_server: numbers.virtual_servers[&server.name],
                forward,
                snat,
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
            for port in server.at.each_port() {
                self.add_service(&server.at, port, epoch as u16, service)?;
            }
            config.prefixes |= u32::from(server.at.is_prefix());
        }
        self.write_vlans(&generation.network.vlans)?;
        config.epoch = epoch;
        config.generation = self.config().map_or(1, |old| old.generation + 1);
        config.flows = self.flows.len() as u32;
        self.config.set(0, Record(config), 0)?;
        Ok(())
    }

    /// Makes an address or prefix with a port lead to a virtual server.
    fn add_service(&mut self, at: &Places, port: u16, epoch: u16, service: Service) -> Result<()> {
        let (address, port) = (Addr::from(at.address), port.to_be());
        if at.is_prefix() {
            let key = prefix_key(epoch, port, address, at.length);
            self.prefixes.insert(&key, Record(service), 0)?;
        } else {
            let key = ServiceKey {
                address,
                port,
                epoch,
            };
            self.services.insert(Record(key), Record(service), 0)?;
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

    /// Forgets the virtual servers of an epoch.
    fn clear_services(&mut self, epoch: u32) -> Result<()> {
        let stale: Vec<_> = self
            .services
            .keys()
            .flatten()
            .filter(|key| u32::from(key.0.epoch) == epoch)
            .collect();
        for key in stale {
            self.services.remove(&key)?;
        }
        let stale: Vec<_> = self
            .prefixes
            .keys()
            .flatten()
            .filter(|key| u32::from(key.data().0.epoch) == epoch)
            .collect();
        for key in stale {
            self.prefixes.remove(&key)?;
        }
        Ok(())
    }

    /// The number of each virtual server in use, by its addresses, prefix lengths and ports.
    fn known_services(&self, epoch: u16) -> Index<(IpAddr, u8, u16), u16> {
        let mut known = Index::new();
        for (key, service) in self.services.iter().flatten() {
            let (key, service) = (key.0, service.0);
            if key.epoch == epoch {
                let address = key.address.to_ip();
                let length = if address.is_ipv4() { 32 } else { 128 };
                known.insert(
                    (address, length, u16::from_be(key.port)),
                    service.virtual_server,
                );
            }
        }
        for (key, service) in self.prefixes.iter().flatten() {
            let (bits, key) = (key.prefix_len() - EXACT_BITS, key.data().0);
            if key.epoch == epoch {
                let address = key.address.to_ip();
                let length = if address.is_ipv4() { bits - 96 } else { bits };
                let place = (address, length as u8, u16::from_be(key.port));
                known.insert(place, service.0.virtual_server);
            }
        }
        known
    }

    /// Writes what a monitor found, and the box's own address on the way to the member.
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
            automap: own_address_towards(address).map_or(Addr::UNSET, Addr::from),
            port: address.port().to_be(),
            available: u16::from(up),
            pool_hash: pool_hash(pool),
        };
        self.members.set(u32::from(number), Record(record), 0)?;
        Ok(())
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
        self.flows.len() as u64 - 1
    }
}

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

/// Bits of a [`PrefixKey`] that always count: epoch and port.
const EXACT_BITS: u32 = 32;

fn prefix_key(epoch: u16, port: u16, address: Addr, length: u8) -> Key<Record<PrefixKey>> {
    let mapped = if address.is_v4() { 96 } else { 0 };
    let key = PrefixKey {
        epoch,
        port,
        address,
    };
    Key::new(EXACT_BITS + mapped + u32::from(length), Record(key))
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

/// The address the kernel would use towards a member: connecting a UDP socket asks the routing table, and sends nothing.
fn own_address_towards(member: SocketAddr) -> Option<IpAddr> {
    let any: SocketAddr = match member {
        SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        SocketAddr::V6(_) => ([0u16; 8], 0).into(),
    };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(member).ok()?;
    Some(socket.local_addr().ok()?.ip())
}
