//! Pools in the kernel's tables, once for each kind of SNAT they are used with, and where flows to each member come from.

use std::{
    collections::HashMap as Index,
    net::{IpAddr, SocketAddr, UdpSocket},
};

use anyhow::{Result, bail};
use lb_common::{
    addr::Addr,
    layout::{MAX_VIEWS, POOL_MEMBERS},
    pair,
    service::Pool,
};

use super::{
    ports::{LocalPorts, Ports},
    sys::Record,
    tables::{Numbers, Tables},
};
use crate::model::{Forward, Generation, Method, Name, Snat};

/// Of members with `snat = "automap"`: their source, and the own address that it was written for.
pub(super) type Automap = Index<SocketAddr, (u16, Option<IpAddr>)>;

/// The pools of a generation, written aside.
#[derive(Default)]
pub(super) struct Views {
    /// The index of each pool with a kind of SNAT.
    pub pools: Index<(Name, Option<Snat>), u32>,
    pub automap: Automap,
}

impl Tables {
    /// Writes every pool, once for each kind of SNAT it is used with.
    pub(super) fn write_pools(
        &mut self,
        generation: &Generation,
        numbers: &Numbers,
        epoch: u32,
        local_ports: &LocalPorts,
    ) -> Result<Views> {
        let mut views = Views::default();
        let mut index = 0;
        let mut sources = Index::new();
        for (turn, pool) in (1u32..).zip(generation.pools.values()) {
            let mut uses: Vec<Option<Snat>> = vec![None];
            for server in &generation.virtual_servers {
                if let Forward::Passthrough { snat, .. } = &server.forward
                    && server.pool == pool.name
                    && !uses.contains(&Some(snat.clone()))
                {
                    uses.push(Some(snat.clone()));
                }
            }
            for snat in uses {
                index += 1;
                if index >= MAX_VIEWS {
                    bail!("more than {} pools with a kind of SNAT each", MAX_VIEWS - 1);
                }
                let mut record = Pool {
                    method: match pool.method {
                        Method::LeastConnections => Pool::LEAST_CONNECTIONS,
                        Method::RoundRobin => Pool::ROUND_ROBIN,
                    },
                    count: pool.members.len().min(POOL_MEMBERS) as u32,
                    turn,
                    members: [0; POOL_MEMBERS],
                    sources: [0; POOL_MEMBERS],
                };
                for (place, member) in pool.members.iter().take(POOL_MEMBERS).enumerate() {
                    record.members[place] = numbers.members[&(pool.name.clone(), member.address)];
                    let Some(snat) = &snat else { continue };
                    let key = (
                        snat.clone(),
                        (*snat != Snat::None).then_some(member.address),
                    );
                    record.sources[place] = match sources.get(&key) {
                        Some(source) => *source,
                        None => {
                            let automap = &mut views.automap;
                            let member = member.address;
                            self.write_source(
                                generation,
                                epoch,
                                snat,
                                member,
                                local_ports,
                                automap,
                            )?
                        }
                    };
                    sources.insert(key, record.sources[place]);
                }
                let at = epoch * MAX_VIEWS + index;
                self.pools.set(at, Record(record), 0)?;
                views.pools.insert((pool.name.clone(), snat), at);
            }
        }
        for rest in index + 1..MAX_VIEWS {
            let at = epoch * MAX_VIEWS + rest;
            if self.pools.get(&at, 0)?.0.count == 0 {
                break;
            }
            let empty = Pool {
                method: 0,
                count: 0,
                turn: 0,
                members: [0; POOL_MEMBERS],
                sources: [0; POOL_MEMBERS],
            };
            self.pools.set(at, Record(empty), 0)?;
        }
        Ok(views)
    }

    /// Where flows to a member come from.
    fn write_source(
        &mut self,
        generation: &Generation,
        epoch: u32,
        snat: &Snat,
        member: SocketAddr,
        local_ports: &LocalPorts,
        automap: &mut Automap,
    ) -> Result<u16> {
        let to = (Addr::from(member.ip()), member.port().to_be());
        match snat {
            Snat::None => {
                let all = Ports::all();
                let lanes = pair::lanes(self.flows_max() as u32) as u16;
                let pairs: Vec<_> = (1..=lanes)
                    .map(|lane| ((Addr::UNSET, Addr::UNSET, lane), &all))
                    .collect();
                self.pairs.source(epoch, &pairs)
            }
            Snat::Automap => {
                let own = own_address_towards(member);
                let ports = own.map(|own| local_ports.automap(own));
                let pairs: Vec<_> = own
                    .iter()
                    .zip(&ports)
                    .map(|(own, ports)| ((Addr::from(*own), to.0, to.1), ports))
                    .collect();
                let source = self.pairs.source(epoch, &pairs)?;
                automap.insert(member, (source, own));
                Ok(source)
            }
            Snat::Pool(name) => {
                let pool = &generation.snat_pools[name];
                let ports = local_ports.pool(pool);
                let pairs: Vec<_> = pool
                    .addresses
                    .iter()
                    .filter(|address| address.is_ipv4() == member.is_ipv4())
                    .map(|address| ((Addr::from(*address), to.0, to.1), &ports))
                    .collect();
                self.pairs.source(epoch, &pairs)
            }
        }
    }

    /// Looks again which own address the box has on the way to a member.
    ///
    /// # Errors
    ///
    /// When a table refuses a record.
    pub(super) fn refresh_automap(&mut self, member: SocketAddr) -> Result<()> {
        let (Some((source, known)), Some(config), Some(local_ports)) = (
            self.automap.get(&member).copied(),
            self.config(),
            &self.local_ports,
        ) else {
            return Ok(());
        };
        let Some(own) = own_address_towards(member).filter(|own| Some(*own) != known) else {
            return Ok(());
        };
        let identity = (own.into(), member.ip().into(), member.port().to_be());
        let ports = local_ports.automap(own);
        // Replies have to be found before the first connection leaves.
        self.pairs.make(identity, &ports)?;
        self.let_through(own)?;
        self.pairs.enter(config.seed(), config.epoch, identity)?;
        self.pairs
            .write_source(u32::from(source), &[(identity, &ports)])?;
        self.pairs.changed();
        self.automap.insert(member, (source, Some(own)));
        log::info!("connections to {member} now come from {own}");
        Ok(())
    }
}

/// The address the kernel would use towards a member: connecting a UDP socket asks the routing table, and sends nothing.
pub(super) fn own_address_towards(member: SocketAddr) -> Option<IpAddr> {
    let any: SocketAddr = match member {
        SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        SocketAddr::V6(_) => ([0u16; 8], 0).into(),
    };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(member).ok()?;
    Some(socket.local_addr().ok()?.ip())
}
