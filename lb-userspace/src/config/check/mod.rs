//! Objects against each other: references, limits, contradictions. What passes becomes the model.

mod capacity;
mod client_address;
mod network;
mod policy;
mod pool;
mod session;
mod snat;
mod tls;
mod virtual_server;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use super::{
    DEFAULT_HELO,
    diagnostic::{Faults, did_you_mean, quoted},
    raw::{self, Plane, ProbeKind, Raw},
    reader::{At, Field},
};
use crate::model::{Certificate, Generation, Log, Mode, Monitor, Name, Probe, policy::Range};

/// `monitor.interval`.
const DEFAULT_INTERVAL: Duration = Duration::from_secs(30);
/// `monitor.timeout`: three intervals and a second, as mail servers greet late under load.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(91);

/// `log.flows_per_second`: what a disk and a reader take without noticing.
const DEFAULT_FLOWS_PER_SECOND: u32 = 1000;

/// What the objects of a file may refer to.
struct Known<'r, 'd> {
    /// Every pool by its name.
    pools: BTreeMap<&'d str, &'r raw::Pool<'d>>,
    snat_pools: BTreeMap<&'d str, &'r raw::SnatPool<'d>>,
    monitors: BTreeSet<&'d str>,
    certificates: BTreeSet<&'d str>,
    policies: Vec<&'d str>,
    /// The first virtual server on each address, prefix length and port.
    addresses: BTreeMap<(IpAddr, u8, u16), &'r raw::VirtualServer<'d>>,
    /// The first virtual server on each address and prefix length, whatever its port.
    networks: BTreeMap<(IpAddr, u8), &'r raw::VirtualServer<'d>>,
    /// The first virtual server that names each pool.
    served: BTreeMap<&'d str, &'r raw::VirtualServer<'d>>,
    /// The first that passes packets on to each pool.
    passed: BTreeMap<&'d str, &'r raw::VirtualServer<'d>>,
}

/// Builds the model. Nothing only where a fault has been noted.
pub(super) fn generation(
    raw: Raw<'_>,
    directory: &Path,
    faults: &mut Faults,
) -> Option<Generation> {
    let known = Known::new(&raw);
    let mode = raw.mode.clone().or(Mode::Mixed);
    let network = network::network(&raw, &known, faults);
    let log = log(&raw.log);
    let virtual_servers = all(raw.virtual_servers.iter().map(|server| {
        virtual_server::virtual_server(server, mode, &known, directory, faults).map(Arc::new)
    }));
    let pools = all(raw.pools.iter().map(|pool| {
        let pool = pool::pool(pool, &known, faults)?;
        Some((pool.name.clone(), Arc::new(pool)))
    }));
    let monitors = all(raw.monitors.iter().map(|raw| {
        let monitor = monitor(raw, faults)?;
        Some((monitor.name.clone(), Arc::new(monitor)))
    }));
    let policies = policy::policies(&raw, directory, faults);
    let certificates = all(raw.certificates.iter().map(|raw| {
        let certificate = certificate(raw, directory)?;
        Some((certificate.name.clone(), Arc::new(certificate)))
    }));
    let mut addresses = BTreeMap::new();
    let snat_pools = all(raw.snat_pools.iter().map(|pool| {
        let pool = snat::pool(pool, &raw, &mut addresses, faults)?;
        Some((pool.name.clone(), Arc::new(pool)))
    }));
    let timeouts = snat::timeouts(&raw.timeouts);
    let session = session::sessions(&raw.session, faults);
    session::planes(&raw, faults);
    virtual_server::limit(&raw, faults);
    pool::limits(&raw, faults);
    advise(&raw, &known, faults);
    client_address::advise(&raw, &known, faults);
    let generation = Generation {
        mode: mode?,
        network: network?,
        log: log?,
        virtual_servers: virtual_servers?,
        pools: pools?.into_iter().collect(),
        monitors: monitors?.into_iter().collect(),
        policies: policies?,
        certificates: certificates?.into_iter().collect(),
        snat_pools: snat_pools?.into_iter().collect(),
        timeouts: timeouts?,
        session: session?,
    };
    capacity::capacity(&raw, &generation, faults);
    Some(generation)
}

impl<'r, 'd> Known<'r, 'd> {
    fn new(raw: &'r Raw<'d>) -> Self {
        let mut known = Self {
            pools: raw
                .pools
                .iter()
                .map(|pool| (pool.name.value, pool))
                .collect(),
            snat_pools: raw
                .snat_pools
                .iter()
                .map(|pool| (pool.name.value, pool))
                .collect(),
            monitors: raw
                .monitors
                .iter()
                .map(|monitor| monitor.name.value)
                .collect(),
            certificates: raw
                .certificates
                .iter()
                .map(|certificate| certificate.name.value)
                .collect(),
            policies: raw
                .policies
                .iter()
                .map(|policy| policy.name.value)
                .collect(),
            addresses: BTreeMap::new(),
            networks: BTreeMap::new(),
            served: BTreeMap::new(),
            passed: BTreeMap::new(),
        };
        for server in &raw.virtual_servers {
            for place in server.places() {
                known.addresses.entry(place).or_insert(server);
            }
            if let Some(network) = server.address.get() {
                known.networks.entry(*network).or_insert(server);
            }
            if let (Some(Plane::Passthrough), Some(pool)) =
                (server.forward.get(), server.pool.get())
            {
                known.passed.entry(pool).or_insert(server);
            }
            let pools = [&server.pool, &server.client.plaintext_pool];
            for pool in pools.into_iter().filter_map(Field::get) {
                known.served.entry(pool).or_insert(server);
            }
        }
        known
    }

    /// The virtual server that takes connections to an address.
    fn server_at(&self, address: SocketAddr) -> Option<&'r raw::VirtualServer<'d>> {
        networks_of(address.ip()).find_map(|(network, length)| {
            let place = (network, length, address.port());
            self.addresses.get(&place).copied()
        })
    }

    /// The first virtual server that has an address, whatever its port.
    fn server_on(&self, address: IpAddr) -> Option<&'r raw::VirtualServer<'d>> {
        networks_of(address).find_map(|network| self.networks.get(&network).copied())
    }
}

/// Every prefix that holds an address, the longest first.
fn networks_of(address: IpAddr) -> impl Iterator<Item = (IpAddr, u8)> {
    let host = if address.is_ipv4() { 32 } else { 128 };
    (0..=host).rev().map(move |length| {
        let network = Range::prefix(address, length).first;
        let words = [96, 64, 32, 0].map(|shift| ((network >> shift) as u32).to_be());
        (lb_common::addr::Addr(words).to_ip(), length)
    })
}

fn log(raw: &raw::Log) -> Option<Log> {
    Some(Log {
        flows: raw.flows.clone().or(true)?,
        flows_per_second: raw.flows_per_second.clone().or(DEFAULT_FLOWS_PER_SECOND)?,
    })
}

fn monitor(raw: &raw::Monitor<'_>, faults: &mut Faults) -> Option<Monitor> {
    let probe = match (raw.kind.get()?, &raw.helo) {
        (ProbeKind::Smtp, helo) => Probe::Smtp {
            helo: helo.clone().or(DEFAULT_HELO)?.to_owned(),
        },
        (ProbeKind::Tcp, Field::Absent) => Probe::Tcp,
        (ProbeKind::Tcp, Field::Wrong) => return None,
        (ProbeKind::Tcp, Field::Is(helo)) => {
            faults.error(
                helo.at,
                &raw.object,
                "has helo, which has no meaning with type = \"tcp\"",
                "A tcp monitor says nothing to the member.",
                "Remove it, or set type = \"smtp\".",
            );
            return None;
        }
    };
    Some(Monitor {
        name: raw.name.value.into(),
        probe,
        interval: raw.interval.clone().or(DEFAULT_INTERVAL)?,
        timeout: raw.timeout.clone().or(DEFAULT_TIMEOUT)?,
        rise: raw.rise.clone().or(1)?,
        fall: raw.fall.clone().or(1)?,
    })
}

fn certificate(raw: &raw::Certificate<'_>, directory: &Path) -> Option<Certificate> {
    Some(Certificate {
        name: raw.name.value.into(),
        chain: directory.join(raw.chain.get()?),
        key: directory.join(raw.key.get()?),
    })
}

/// Warns of what is accepted but hardly meant.
fn advise(raw: &Raw<'_>, known: &Known<'_, '_>, faults: &mut Faults) {
    if raw.virtual_servers.is_empty() {
        faults.warning(
            0,
            "the file",
            "has no virtual server",
            "smtplb would run and carry nothing.",
            "Add a table `[virtual_server.NAME]`.",
        );
    }
    for pool in &raw.pools {
        if !known.served.contains_key(pool.name.value) {
            unused(&pool.name, &pool.object, "virtual server", faults);
        } else if let Field::Absent = pool.monitor {
            faults.warning(
                pool.name.at,
                &pool.object,
                "has no monitor",
                "Its members count as up, even one that is dead.",
                "Add a key `monitor` that names a `[monitor.NAME]`.",
            );
        }
    }
    advise_policies(raw, faults);
    let monitors: BTreeSet<_> = raw
        .pools
        .iter()
        .filter_map(|pool| pool.monitor.get())
        .collect();
    for monitor in &raw.monitors {
        if !monitors.contains(&monitor.name.value) {
            unused(&monitor.name, &monitor.object, "pool", faults);
        }
    }
    let used: BTreeSet<_> = raw
        .virtual_servers
        .iter()
        .filter_map(|server| server.snat.get())
        .collect();
    for pool in &raw.snat_pools {
        if !used.contains(&pool.name.value) {
            unused(&pool.name, &pool.object, "virtual server", faults);
        }
    }
    let certificates: BTreeSet<_> = raw
        .virtual_servers
        .iter()
        .flat_map(tls::certificates_named)
        .collect();
    for certificate in &raw.certificates {
        if !certificates.contains(&certificate.name.value) {
            unused(
                &certificate.name,
                &certificate.object,
                "virtual server",
                faults,
            );
        }
    }
}

/// Warns of policies that guard nothing.
fn advise_policies(raw: &Raw<'_>, faults: &mut Faults) {
    let servers = raw.virtual_servers.iter().map(|server| &server.guard);
    let used: BTreeSet<_> = servers
        .chain([&raw.network.guard])
        .flat_map(|guard| [guard.policy.get(), guard.staged.get()])
        .flatten()
        .collect();
    for policy in &raw.policies {
        if !used.contains(&policy.name.value) {
            unused(&policy.name, &policy.object, "virtual server", faults);
        }
    }
}

fn unused(name: &At<&str>, object: &str, user: &str, faults: &mut Faults) {
    faults.warning(
        name.at,
        object,
        format!("is not used by any {user}"),
        "It has no effect.",
        format!("Name it in a {user}, or remove it."),
    );
}

/// The name of an object that another one refers to.
fn reference<'n>(
    given: &At<&str>,
    kind: &str,
    names: impl IntoIterator<Item = &'n str> + Clone,
    object: &str,
    consequence: &str,
    faults: &mut Faults,
) -> Option<Name> {
    if names.clone().into_iter().any(|name| name == given.value) {
        return Some(given.value.into());
    }
    let guess = did_you_mean(given.value, names);
    faults.error(
        given.at,
        object,
        format!(
            "names the {kind} {}, which does not exist{guess}",
            quoted(given.value)
        ),
        consequence,
        format!("Correct the name, or add a table `[{kind}.NAME]`."),
    );
    None
}

/// Goes through all of them, so that all their faults are noted, before it gives up on any.
fn all<T>(items: impl Iterator<Item = Option<T>>) -> Option<Vec<T>> {
    let items: Vec<_> = items.collect();
    items.into_iter().collect()
}
