//! Virtual addresses and forwarding of the box. What the admin has set up stays as it is.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::Path,
};

use anyhow::{Context as _, Result, bail};
use futures_util::TryStreamExt as _;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, CacheInfo,
};
use rtnetlink::Handle;

use super::{
    announce::Announcements,
    forwarding::{Forwarding, read},
    links::{LOOPBACK, check_interfaces},
    own_members, replies, routes,
    unmarked::Unmarked,
    views::own_address_towards,
};
use crate::model::{Forward, Generation};

/// Marks our addresses (`IFA_PROTO`, Linux 5.18): 'm' for mail. What an older kernel forgets is in [`Unmarked`].
const OURS: u8 = b'm';

/// The box's addresses, by netlink, and its forwarding.
pub struct Addresses {
    handle: Handle,
    forwarding: Forwarding,
    announcements: Announcements,
    unmarked: Unmarked,
}

/// What of ours is on the box at some moment, for [`Addresses::restore`].
#[derive(Debug)]
pub struct Present {
    addresses: Vec<(IpAddr, u32)>,
    routes: Vec<routes::Key>,
    replies: Vec<replies::Way>,
    /// Settings that were changed until then.
    forwarding: usize,
}

impl Addresses {
    /// Opens the netlink connection; needs a running tokio runtime. `state` is where changed settings are remembered.
    ///
    /// # Errors
    ///
    /// When the kernel has no netlink for us.
    pub fn open(state: &Path) -> Result<Self> {
        let (connection, handle, _) =
            rtnetlink::new_connection().context("cannot open a netlink socket")?;
        tokio::spawn(connection);
        Ok(Self {
            handle,
            forwarding: Forwarding::load(state),
            announcements: Announcements::default(),
            unmarked: Unmarked::load(state),
        })
    }

    /// Every interface of a VLAN, for [`super::KernelPlane::note_tagged`]; none where the kernel does not say.
    pub async fn tagged_interfaces(&self) -> Vec<(u32, u32)> {
        let found = super::trunks::list(&self.handle).await;
        found.unwrap_or_else(|error| {
            log::debug!("cannot list the interfaces of VLANs: {error:#}");
            Vec::new()
        })
    }

    /// Makes every virtual address of a generation local and answered for by ARP and NDP on the first client interface,
    /// every address of its SNAT pools on the first server interface, and every prefix local by a route. Replies of
    /// members to clients' addresses are brought to this box where sessions keep them.
    /// Others of ours stay until [`Self::prune`].
    ///
    /// # Errors
    ///
    /// When an address of a SNAT pool is the box's own already, or the kernel refuses an address.
    pub async fn add_all(&mut self, generation: &Generation) -> Result<()> {
        let wanted = self.wanted(generation).await?;
        let present = self.list().await?;
        if let Some(conflict) = self
            .conflicts(generation, &wanted, &present)
            .into_iter()
            .next()
        {
            bail!(conflict);
        }
        let loopback = self.index(LOOPBACK).await?;
        routes::add_all(&self.handle, generation, loopback).await?;
        replies::add_all(&self.handle, generation, loopback).await?;
        for message in &present {
            let preferred = self.is_ours(message) && !is_deprecated(message);
            if let Some(address) = address_of(message).filter(|it| preferred && it.is_ipv6()) {
                // A daemon before this one has added it.
                self.add(message.header.index, address, true)
                    .await
                    .with_context(|| format!("cannot change the address {address}"))?;
            }
        }
        let mut added = BTreeSet::new();
        for (&address, &index) in &wanted {
            let local = present.iter().any(|message| {
                address_of(message) == Some(address)
                    && (!self.is_ours(message) || message.header.index == index)
            });
            if !local {
                self.add(index, address, false)
                    .await
                    .with_context(|| format!("cannot add the address {address}"))?;
                self.announcements.add(address, index);
                added.insert((address, index));
            }
        }
        let present = match added.is_empty() {
            true => Vec::new(),
            false => self.list().await?,
        };
        for message in present.iter().filter(|message| !is_marked(message)) {
            if let Some((address, index)) = place_of(message).filter(|place| added.contains(place))
            {
                self.unmarked.add(address, index);
            }
        }
        Ok(())
    }

    /// Removes addresses of ours that a generation does not have, save those that `lingering` connections use,
    /// and the ways back of replies, save those of members that are `reached` from clients' addresses; false when some
    /// of these stay for that reason alone.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub async fn prune(
        &mut self,
        generation: &Generation,
        lingering: &[IpAddr],
        reached: &[SocketAddr],
    ) -> Result<bool> {
        let wanted = self.wanted(generation).await?;
        routes::prune(&self.handle, generation, lingering).await?;
        let complete = replies::prune(&self.handle, generation, reached).await?;
        for message in self.list().await? {
            let Some(address) = address_of(&message).filter(|_| self.is_ours(&message)) else {
                continue;
            };
            // One of ours on another interface is from an earlier configuration.
            let used = wanted.get(&address) == Some(&message.header.index);
            if !used && !lingering.contains(&address) {
                self.delete(address, message).await?;
            }
        }
        Ok(complete)
    }

    /// Tells neighbours of addresses that were added, for the next few seconds; to be called once a second.
    pub async fn announce(&mut self) {
        self.announcements.tell(&self.handle).await;
    }

    /// The virtual addresses and those of SNAT pools, and the index of the interface where each lives.
    async fn wanted(&self, generation: &Generation) -> Result<BTreeMap<IpAddr, u32>> {
        let network = &generation.network;
        let virtual_addresses = generation
            .virtual_servers
            .iter()
            .filter(|server| !server.at.is_prefix())
            .map(|server| server.at.address)
            .filter(|address| !address.is_loopback());
        let mut wanted = BTreeMap::new();
        for (interface, addresses) in [
            (
                network.client_interfaces.first(),
                virtual_addresses.collect::<BTreeSet<_>>(),
            ),
            (
                network.server_interfaces.first(),
                generation.snat_addresses(),
            ),
        ] {
            let index = match interface {
                Some(interface) if !addresses.is_empty() => self.index(interface).await?,
                _ => 0,
            };
            wanted.extend(addresses.into_iter().map(|address| (address, index)));
        }
        Ok(wanted)
    }

    /// Removes every address of ours.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub async fn remove(&mut self) -> Result<()> {
        replies::remove(&self.handle).await?;
        routes::remove(&self.handle).await?;
        for message in self.list().await? {
            if let Some(address) = address_of(&message).filter(|_| self.is_ours(&message)) {
                self.delete(address, message).await?;
            }
        }
        Ok(())
    }

    /// What of ours is there now.
    ///
    /// # Errors
    ///
    /// When the kernel does not tell it.
    pub async fn present(&self) -> Result<Present> {
        let ours = self.list().await?.into_iter();
        let ours = ours.filter(|message| self.is_ours(message));
        Ok(Present {
            addresses: ours.filter_map(|message| place_of(&message)).collect(),
            routes: routes::present(&self.handle).await?,
            replies: replies::present(&self.handle).await?,
            forwarding: self.forwarding.count(),
        })
    }

    /// Takes back what was added and changed since.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub async fn restore(&mut self, before: &Present) -> Result<()> {
        self.forwarding.restore_since(before.forwarding);
        replies::remove_others(&self.handle, &before.replies).await?;
        routes::remove_others(&self.handle, &before.routes).await?;
        for message in self.list().await? {
            let place = place_of(&message).filter(|_| self.is_ours(&message));
            if let Some(place) = place.filter(|place| !before.addresses.contains(place)) {
                self.delete(place.0, message).await?;
            }
        }
        Ok(())
    }

    /// Switches forwarding on for the interfaces that passthrough flows cross, and remembers where it was off.
    ///
    /// Per interface, never for the whole box. Where IPv6 router advertisements were accepted, they still are.
    ///
    /// # Errors
    ///
    /// When it is off and cannot be switched on.
    pub fn enable_forwarding(&mut self, generation: &Generation) -> Result<()> {
        let mut families: Vec<&str> = Vec::new();
        for server in &generation.virtual_servers {
            if matches!(server.forward, Forward::Passthrough { .. }) {
                families.push(if server.at.address.is_ipv4() {
                    "ipv4"
                } else {
                    "ipv6"
                });
            }
        }
        families.sort_unstable();
        families.dedup();
        let network = &generation.network;
        for family in families {
            for interface in network
                .client_interfaces
                .iter()
                .chain(&network.server_interfaces)
            {
                if family == "ipv6" && read(&conf(family, interface, "accept_ra")) == "1" {
                    self.forwarding
                        .set(&conf(family, interface, "accept_ra"), "2")?;
                }
                let local = conf(family, interface, "accept_local");
                if interface == LOOPBACK && read(&local) == "0" {
                    // Replies to clients on the box come from a virtual address, which is the box's own (IPv4 only).
                    self.forwarding.set(&local, "1")?;
                }
                let switch = conf(family, interface, "forwarding");
                if read(&switch) == "0" {
                    self.forwarding.set(&switch, "1")?;
                    log::info!("forwarding of {family} on {interface} was off, switched on");
                }
            }
        }
        Ok(())
    }

    /// How many settings were changed until now, for [`Self::restore_forwarding_since`].
    pub fn forwarding(&self) -> usize {
        self.forwarding.count()
    }

    /// Sets back what was changed since there were so many.
    pub fn restore_forwarding_since(&mut self, count: usize) {
        self.forwarding.restore_since(count);
    }

    /// Sets forwarding back to what it was.
    pub fn restore_forwarding(&mut self) {
        self.forwarding.restore();
    }

    /// Adds an address, or with `again` says anew what holds for one that is there.
    async fn add(&self, index: u32, address: IpAddr, again: bool) -> Result<()> {
        let length = if address.is_ipv4() { 32 } else { 128 };
        let mut request = self.handle.address().add(index, address, length);
        let attributes = &mut request.message_mut().attributes;
        attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(OURS)));
        if address.is_ipv6() {
            // A virtual address is ours by configuration; waiting a second for duplicates would refuse clients.
            attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            // Its 128 bits would make it the source of whatever the box sends (RFC 6724 §5, rule 8); a deprecated one
            // serves who asks for it, and nobody else where there is another (rule 3).
            let mut lifetimes = CacheInfo::default();
            (lifetimes.ifa_preferred, lifetimes.ifa_valid) = (0, u32::MAX);
            attributes.push(AddressAttribute::CacheInfo(lifetimes));
        }
        let request = if again { request.replace() } else { request };
        Ok(request.execute().await?)
    }

    /// What the box's own addresses forbid. An address of a SNAT pool is refused, since connections of the box would share
    /// its ports, unless it stands alone on the interface where it belongs, as we would add it, and the box does not come
    /// from it itself.
    fn conflicts(
        &self,
        generation: &Generation,
        wanted: &BTreeMap<IpAddr, u32>,
        present: &[AddressMessage],
    ) -> Vec<String> {
        let own = || present.iter().filter(|message| !self.is_ours(message));
        let pools = generation.snat_pools.values();
        let addresses =
            pools.flat_map(|pool| pool.addresses.iter().map(move |address| (pool, *address)));
        let used = generation.snat_addresses();
        let used = addresses.filter(|(_, address)| used.contains(address));
        // The box's first address stands alone on many a cloud machine, and is its own all the same.
        let members = generation.pools.values().flat_map(|pool| &pool.members);
        let sources: BTreeSet<_> = members
            .filter_map(|member| own_address_towards(member.address))
            .collect();
        let taken = used.filter(|(_, address)| {
            let length = if address.is_ipv4() { 32 } else { 128 };
            own().any(|message| {
                let header = &message.header;
                let placed = header.prefix_len == length
                    && wanted.get(address) == Some(&header.index)
                    && !sources.contains(address);
                address_of(message) == Some(*address) && !placed
            })
        });
        let mut found: Vec<_> = taken
        .map(|(pool, address)| {
            format!(
                "SNAT pool {:?} has {address}, which is an address of the box itself\n  \
                 Connections of the box would share its ports. Take an address that serves nothing else, \
                 or snat = \"automap\".",
                pool.name
            )
        })
        .collect();
        let own: Vec<_> = own().filter_map(address_of).collect();
        found.extend(routes::conflicts(generation, &own));
        found.extend(own_members::conflicts(generation, &own));
        found
    }

    async fn delete(&mut self, address: IpAddr, message: AddressMessage) -> Result<()> {
        let index = message.header.index;
        self.announcements.forget(address, index);
        self.handle.address().del(message).execute().await?;
        self.unmarked.remove(address, index);
        Ok(())
    }

    fn is_ours(&self, message: &AddressMessage) -> bool {
        let known = |address| self.unmarked.holds(address, message.header.index);
        is_marked(message) || address_of(message).is_some_and(known)
    }

    async fn index(&self, interface: &str) -> Result<u32> {
        let link = self
            .handle
            .link()
            .get()
            .match_name(interface.to_owned())
            .execute()
            .try_next()
            .await?
            .with_context(|| format!("there is no interface {interface}"))?;
        Ok(link.header.index)
    }

    async fn list(&self) -> Result<Vec<AddressMessage>> {
        Ok(self.handle.address().get().execute().try_collect().await?)
    }
}

/// What a start on this box would refuse in a generation for the addresses that the box has; nothing where the box has
/// other interfaces, and so is another one.
///
/// # Errors
///
/// When the kernel does not tell its addresses.
pub fn address_conflicts(generation: &Generation) -> Result<Vec<String>> {
    if check_interfaces(&generation.network).is_err() {
        return Ok(Vec::new());
    }
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build()?.block_on(async {
        let addresses = Addresses::open(Path::new(""))?;
        let wanted = addresses.wanted(generation).await?;
        Ok(addresses.conflicts(generation, &wanted, &addresses.list().await?))
    })
}

fn conf(family: &str, interface: &str, name: &str) -> String {
    format!("/proc/sys/net/{family}/conf/{interface}/{name}")
}

fn is_marked(message: &AddressMessage) -> bool {
    message
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, AddressAttribute::Protocol(protocol) if u8::from(*protocol) == OURS))
}

fn is_deprecated(message: &AddressMessage) -> bool {
    message
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, AddressAttribute::Flags(flags) if flags.contains(AddressFlags::Deprecated)))
}

/// Its address and the index of its interface.
fn place_of(message: &AddressMessage) -> Option<(IpAddr, u32)> {
    address_of(message).map(|address| (address, message.header.index))
}

fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    let mut found = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => return Some(*address),
            AddressAttribute::Address(address) => found = Some(*address),
            _ => {}
        }
    }
    found
}
