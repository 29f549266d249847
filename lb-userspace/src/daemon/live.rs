//! A generation come alive: its pools with counters, its services with certificates.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use super::{privilege, roster::Roster, running::Running};
use crate::{
    dataplane::{KernelPlane, Numbers},
    failure::{Exit, Failure, OrExit},
    model::{
        ClientTls, Forward, Generation, Member, Name, Policy, Pool, Snat, Terms, VirtualServer,
    },
    monitor::Target,
    pool::{Admin, LiveMember, LivePool},
    proxy::{Security, Service, Source, Sources},
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
                ..
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

/// Certificates that both have, under the same name, with other content.
pub(super) fn renewed(old: &Certificates, new: &Certificates) -> BTreeSet<Name> {
    let other = |(name, loaded): &(&Name, &Arc<Loaded>)| {
        old.get(*name).is_some_and(|old| !old.is_same(loaded))
    };
    new.iter()
        .filter(other)
        .map(|(name, _)| name.clone())
        .collect()
}

/// The pools of a generation.
///
/// What is the same in the generation before it comes alive no second time: pools keep their turns, members their
/// states. A member that moves its name keeps its state, too. Of the others, a monitored one starts as the tables of an
/// earlier daemon know it, else down until its first probe has ended.
pub(super) fn pools(
    generation: &Generation,
    numbers: &Numbers,
    plane: &KernelPlane,
    roster: &Roster,
    old: Option<&Running>,
) -> BTreeMap<Name, Arc<LivePool>> {
    let member = |pool: &Pool, member: &Member| {
        let number = numbers.members[&(pool.name.clone(), member.address)];
        let admin = roster.get(&pool.name, &member.name).admin;
        let before = old
            .and_then(|old| old.pools.get(&pool.name))
            .and_then(|pool| pool.members().iter().find(|known| known.id == number));
        if let Some(before) = before
            && before.name == member.name
        {
            // Without a monitor it is up from the flip on, not before: the old generation may stay.
            return before.clone();
        }
        let up = pool.monitor.is_none()
            || match before {
                Some(before) => before.is_up(),
                None => old.is_none() && plane.adopted() && plane.available(number) == Some(true),
            };
        let cell = plane.member_cell(number);
        let live = LiveMember::new(member.name.clone(), member.address, number, up, cell);
        live.set_admin(admin);
        Arc::new(live)
    };
    let live = |(name, pool): (&Name, &Arc<Pool>)| {
        let members: Vec<_> = pool
            .members
            .iter()
            .map(|known| member(pool, known))
            .collect();
        let same = old
            .and_then(|old| Some((old.pools.get(name)?, old.generation.pools.get(name)?)))
            .filter(|(_, before)| before.method == pool.method)
            .filter(|(live, _)| {
                let pairs = live.members().iter().zip(&members);
                live.members().len() == members.len()
                    && pairs.into_iter().all(|(a, b)| Arc::ptr_eq(a, b))
            });
        let live = match same {
            Some((live, _)) => live.clone(),
            None => Arc::new(LivePool::new(name.clone(), pool.method, members)),
        };
        (name.clone(), live)
    };
    generation.pools.iter().map(live).collect()
}

/// What the monitors watch: nobody in maintenance. `known`: whose state is known already.
pub(super) fn targets(
    generation: &Generation,
    pools: &BTreeMap<Name, Arc<LivePool>>,
    known: impl Fn(u16) -> bool,
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
            if member.admin() != Admin::Maint {
                targets.push(Target {
                    pool: name.clone(),
                    member: member.clone(),
                    monitor: monitor.clone(),
                    known: known(member.id).then(|| member.is_up()),
                });
            }
        }
    }
    targets
}

/// What the proxy plane serves. What is the same in the generation before is the same service: its TLS tickets stay
/// good.
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
    sources: &Sources,
    old: Option<&Running>,
) -> Result<Vec<Arc<Service>>, Failure> {
    let mut services = Vec::new();
    let mut servers = generation.virtual_servers.iter();
    let sessions = match servers.any(|server| matches!(server.forward, Forward::Proxy { .. })) {
        true => privilege::fit(generation.session),
        false => generation.session,
    };
    for server in &generation.virtual_servers {
        let Forward::Proxy { client_tls, terms } = &server.forward else {
            continue;
        };
        let pool = pools[&server.pool].clone();
        let policies = policies(generation, server);
        let known = old.and_then(|old| {
            let mut services = old.services.iter();
            services.find(|service| service.name == server.name)
        });
        let before = old.and_then(|old| same_tls(old, server, client_tls, certificates));
        let service = match before {
            Some(before)
                if before.name == server.name
                    && before.at == server.at
                    && before.terms == *terms
                    && before.sessions == sessions
                    && before.policies == policies
                    && old
                        .is_some_and(|old| old.generation.snat_pools == generation.snat_pools)
                    && Arc::ptr_eq(&before.pool, &pool) =>
            {
                before
            }
            before => Arc::new(Service {
                terms: terms.clone(),
                sessions,
                source: source(generation, terms, sources),
                crowd: known.map(|known| known.crowd.clone()).unwrap_or_default(),
                policies,
                name: server.name.clone(),
                at: server.at.clone(),
                client_tls: match before {
                    Some(before) => before.client_tls.clone(),
                    None => security(server, client_tls, certificates)?,
                },
                pool,
                cell: plane.service_cell(numbers.virtual_servers[&server.name]),
            }),
        };
        services.push(service);
    }
    Ok(services)
}

/// Whose address the members of a virtual server see.
fn source(generation: &Generation, terms: &Terms, sources: &Sources) -> Source {
    match &terms.snat {
        Snat::Automap => Source::Own,
        Snat::None => sources.clients(),
        Snat::Pool(name) => Source::Pool(sources.pool(&generation.snat_pools[name].addresses)),
    }
}

/// The policies in force that guard a virtual server, in the order in which they are asked.
fn policies(generation: &Generation, server: &VirtualServer) -> Vec<Arc<Policy>> {
    let guards = [&generation.network.guard, &server.guard];
    let names = guards.into_iter().filter_map(|guard| guard.policy.as_ref());
    names
        .map(|name| generation.policies[name].clone())
        .collect()
}

/// The service of the same name in the generation before, if its clients notice no difference in TLS.
fn same_tls(
    old: &Running,
    server: &VirtualServer,
    client_tls: &ClientTls,
    certificates: &Certificates,
) -> Option<Arc<Service>> {
    let mut configured = old.generation.virtual_servers.iter();
    let before = configured.find(|known| known.name == server.name)?;
    let Forward::Proxy {
        client_tls: tls_before,
        ..
    } = &before.forward
    else {
        return None;
    };
    let names: &[Name] = match client_tls {
        ClientTls::None => &[],
        ClientTls::Implicit { certificates } | ClientTls::StartTls { certificates, .. } => {
            certificates
        }
    };
    let same_certificates = names.iter().all(|name| {
        let pair = old.certificates.get(name).zip(certificates.get(name));
        pair.is_some_and(|(old, new)| old.is_same(new))
    });
    if tls_before != client_tls || !same_certificates {
        return None;
    }
    let mut services = old.services.iter();
    services
        .find(|service| service.name == server.name)
        .cloned()
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
