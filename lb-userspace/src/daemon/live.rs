//! A generation come alive: its pools with counters, its services with certificates.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use crate::{
    dataplane::{KernelPlane, Numbers},
    failure::{Exit, Failure, OrExit},
    model::{ClientTls, Forward, Generation, Name, VirtualServer},
    monitor::Target,
    pool::{LiveMember, LivePool},
    proxy::{Security, Service},
    tls::{self, Loaded},
};

/// Certificates by name.
pub type Certificates = HashMap<Name, Arc<Loaded>>;

/// Reads every certificate and key that a virtual server uses; no key is touched that none does.
///
/// All faults come back together.
pub fn load_certificates(generation: &Generation) -> (Certificates, Vec<tls::Error>) {
    let mut loaded = Certificates::new();
    let mut faults = Vec::new();
    let used: BTreeSet<&Name> = generation
        .virtual_servers
        .iter()
        .flat_map(|server| match &server.forward {
            Forward::Proxy {
                client_tls:
                    ClientTls::Implicit { certificates } | ClientTls::StartTls { certificates, .. },
            } => certificates.as_slice(),
            _ => &[],
        })
        .collect();
    for name in used {
        match tls::load_certificate(&generation.certificates[name]) {
            Ok(certificate) => {
                loaded.insert(name.clone(), Arc::new(certificate));
            }
            Err(fault) => faults.push(fault),
        }
    }
    (loaded, faults)
}

/// What is allowed, but hardly meant, about certificates that were read.
pub fn certificate_warnings(certificates: &Certificates) -> Vec<String> {
    let mut warnings: Vec<_> = certificates
        .values()
        .flat_map(|loaded| {
            loaded
                .warnings
                .iter()
                .map(|warning| format!("certificate \"{}\": {warning}", loaded.name))
        })
        .collect();
    warnings.sort();
    warnings
}

/// The pools of a generation. A monitored member starts as the tables of an earlier daemon know it, else down until its
/// first probe has ended.
pub(super) fn pools(
    generation: &Generation,
    numbers: &Numbers,
    plane: &KernelPlane,
) -> BTreeMap<Name, Arc<LivePool>> {
    let live = |(name, pool): (&Name, &Arc<crate::model::Pool>)| {
        let members = pool.members.iter().map(|member| {
            let number = numbers.members[&(name.clone(), member.address)];
            let up = pool.monitor.is_none()
                || (plane.adopted() && plane.available(number) == Some(true));
            let cell = plane.member_cell(number);
            Arc::new(LiveMember::new(
                member.name.clone(),
                member.address,
                number,
                up,
                cell,
            ))
        });
        let pool = LivePool::new(name.clone(), pool.method, members.collect());
        (name.clone(), Arc::new(pool))
    };
    generation.pools.iter().map(live).collect()
}

/// What the monitors watch.
pub(super) fn targets(
    generation: &Generation,
    pools: &BTreeMap<Name, Arc<LivePool>>,
) -> Vec<Target> {
    let mut targets = Vec::new();
    for (name, pool) in &generation.pools {
        let Some(monitor) = pool
            .monitor
            .as_ref()
            .and_then(|name| generation.monitors.get(name))
        else {
            continue;
        };
        for member in pools[name].members() {
            targets.push(Target {
                pool: name.clone(),
                member: member.clone(),
                monitor: monitor.clone(),
            });
        }
    }
    targets
}

/// What the proxy plane serves.
///
/// # Errors
///
/// When a certificate does not make a TLS configuration; [`Exit::Config`].
pub(super) fn services(
    generation: &Generation,
    numbers: &Numbers,
    plane: &KernelPlane,
    pools: &BTreeMap<Name, Arc<LivePool>>,
    certificates: &Certificates,
) -> Result<Vec<Service>, Failure> {
    let mut services = Vec::new();
    for server in &generation.virtual_servers {
        let Forward::Proxy { client_tls } = &server.forward else {
            continue;
        };
        services.push(Service {
            name: server.name.clone(),
            at: server.at.clone(),
            client_tls: security(server, client_tls, certificates)?,
            pool: pools[&server.pool].clone(),
            cell: plane.service_cell(numbers.virtual_servers[&server.name]),
        });
    }
    Ok(services)
}

fn security(
    server: &VirtualServer,
    client_tls: &ClientTls,
    certificates: &Certificates,
) -> Result<Security, Failure> {
    let config = |names: &[Name]| {
        let chosen: Vec<_> = names
            .iter()
            .map(|name| certificates[name].clone())
            .collect();
        tls::server_config(&chosen)
            .map_err(|error| anyhow::anyhow!("virtual server {:?}: {error}", server.name))
            .or_exit(Exit::Config)
    };
    Ok(match client_tls {
        ClientTls::None => Security::None,
        ClientTls::Implicit { certificates } => Security::Implicit(config(certificates)?),
        ClientTls::StartTls {
            policy,
            certificates,
        } => Security::StartTls {
            policy: *policy,
            config: config(certificates)?,
        },
    })
}
