//! A generation come alive: its pools with counters, its services with certificates.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
    sync::Arc,
};

use super::{privilege, roster::Roster, running::Running};
use crate::{
    dataplane::{KernelPlane, Numbers},
    failure::{Exit, Failure, OrExit},
    model::{
        ClientTerms, ClientTls, Forward, Generation, Member, Name, Policy, Pool, ServerTerms,
        ServerTls, Snat, Terms, Verify, VirtualServer,
    },
    monitor::Target,
    pool::{Admin, LiveMember, LivePool},
    proxy::{Crowd, Fallback, MemberSecurity, Security, Service, Source, Sources},
    tls::{self, ListenerTls, Loaded, MemberTls, Roots},
};

/// What the files of a generation hold: certificates with keys, and authorities.
#[derive(Debug, Default)]
pub struct Certificates {
    by_name: HashMap<Name, Arc<Loaded>>,
    /// By path; the system's have none.
    roots: HashMap<Option<PathBuf>, Arc<Roots>>,
}

/// Reads every certificate, key and file of authorities that a virtual server uses; no key is touched that none does.
///
/// All faults come back together.
pub fn load_certificates(generation: &Generation) -> (Certificates, Vec<tls::Error>) {
    let mut loaded = Certificates::default();
    let mut faults = Vec::new();
    let used = || {
        generation
            .virtual_servers
            .iter()
            .map(|server| Used::by(server))
    };
    let names: BTreeSet<&Name> = used().flat_map(|used| used.certificates).collect();
    for name in names {
        match tls::load_certificate(&generation.certificates[name]) {
            Ok(certificate) => {
                loaded.by_name.insert(name.clone(), Arc::new(certificate));
            }
            Err(fault) => faults.push(fault),
        }
    }
    let roots: BTreeSet<Option<PathBuf>> = used().flat_map(|used| used.all_roots()).collect();
    for path in roots {
        match tls::load_roots(path.as_deref()) {
            Ok(roots) => {
                loaded.roots.insert(path, Arc::new(roots));
            }
            Err(fault) => faults.push(fault),
        }
    }
    (loaded, faults)
}

/// The files that a virtual server lives by.
#[derive(Default)]
struct Used<'g> {
    certificates: Vec<&'g Name>,
    /// Who vouches for members; nothing stands for the system's.
    roots: Vec<&'g Option<PathBuf>>,
    /// Who vouches for clients.
    client_roots: Vec<&'g PathBuf>,
}

impl<'g> Used<'g> {
    fn by(server: &'g VirtualServer) -> Self {
        let mut used = Self::default();
        let Forward::Proxy {
            client_tls,
            server_tls,
            ..
        } = &server.forward
        else {
            return used;
        };
        used.add_client(client_tls);
        used.add_server(server_tls);
        used
    }

    fn add_client(&mut self, tls: &'g ClientTls) {
        let Some(terms) = tls.terms() else { return };
        self.certificates.extend(&terms.certificates);
        self.client_roots.extend(terms.auth.roots());
    }

    fn add_server(&mut self, tls: &'g ServerTls) {
        let Some(terms) = tls.terms() else { return };
        self.certificates.extend(&terms.certificate);
        if let Verify::Full { roots } = &terms.verify {
            self.roots.push(roots);
        }
    }

    fn all_roots(&self) -> Vec<Option<PathBuf>> {
        let members = self.roots.iter().map(|path| (*path).clone());
        let clients = self.client_roots.iter().map(|path| Some((*path).clone()));
        members.chain(clients).collect()
    }

    /// Do both hold the same of these?
    fn is_same(&self, old: &Certificates, new: &Certificates) -> bool {
        let same = |name: &&Name| {
            let pair = old.by_name.get(*name).zip(new.by_name.get(*name));
            pair.is_some_and(|(old, new)| old.is_same(new))
        };
        let same_roots = |path: &Option<PathBuf>| {
            let pair = old.roots.get(path).zip(new.roots.get(path));
            pair.is_some_and(|(old, new)| old.is_same(new))
        };
        self.certificates.iter().all(same) && self.all_roots().iter().all(same_roots)
    }
}

impl Certificates {
    /// All that are in use, in no order.
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Loaded>> {
        self.by_name.values()
    }
}

/// The certificates that a virtual server shows, to clients or to members.
pub(super) fn names_of(server: &VirtualServer) -> Vec<&Name> {
    Used::by(server).certificates
}

/// What is allowed, but hardly meant, about certificates that were read.
pub fn certificate_warnings(certificates: &Certificates) -> Vec<String> {
    let mut warnings: Vec<_> = certificates
        .by_name
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
        let before = old.by_name.get(*name);
        before.is_some_and(|old| !old.is_same(loaded))
    };
    new.by_name
        .iter()
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
        let Forward::Proxy {
            client_tls,
            server_tls,
            xclient,
            terms,
        } = &server.forward
        else {
            continue;
        };
        let before = Before::of(server, old);
        let same_client = before.client_tls(client_tls, certificates);
        let same_server = before.server_tls(server_tls, certificates);
        let pool = &pools[&server.pool];
        let plaintext = client_tls.plaintext_pool().map(|name| &pools[name]);
        let policies = policies(generation, server);
        let same_sources =
            old.is_some_and(|old| old.generation.snat_pools == generation.snat_pools);
        if same_client.is_some()
            && same_server.is_some()
            && same_sources
            && let Some(same) = before.service(server, *xclient, pool, plaintext)
            && same.terms == *terms
            && same.sessions == sessions
            && same.policies == policies
        {
            services.push(same);
            continue;
        }
        let service = Service {
            name: server.name.clone(),
            at: server.at.clone(),
            client_tls: match same_client {
                Some(same) => same,
                None => security(server, client_tls, certificates)?,
            },
            server_tls: match same_server {
                Some(same) => same,
                None => member_security(server, server_tls, certificates)?,
            },
            xclient: *xclient,
            pool: pool.clone(),
            plaintext: plaintext.cloned().map(Fallback::new),
            cell: plane.service_cell(numbers.virtual_servers[&server.name]),
            terms: terms.clone(),
            sessions,
            source: source(generation, terms, sources),
            crowd: before.crowd(),
            policies,
        };
        services.push(Arc::new(service));
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

/// A virtual server of the same name in the generation before.
struct Before<'r>(Option<(&'r Running, &'r Forward, &'r Arc<Service>)>);

impl<'r> Before<'r> {
    fn of(server: &VirtualServer, old: Option<&'r Running>) -> Self {
        let find = |old: &'r Running| {
            let mut configured = old.generation.virtual_servers.iter();
            let before = configured.find(|known| known.name == server.name)?;
            let mut services = old.services.iter();
            let service = services.find(|service| service.name == server.name)?;
            Some((old, &before.forward, service))
        };
        Self(old.and_then(find))
    }

    /// Who is counted as its session, through every reload.
    fn crowd(&self) -> Arc<Crowd> {
        let known = self.0.map(|(_, _, service)| service.crowd.clone());
        known.unwrap_or_default()
    }

    /// It itself, if its addresses, its pools and XCLIENT are the same.
    fn service(
        &self,
        server: &VirtualServer,
        xclient: bool,
        pool: &Arc<LivePool>,
        plaintext: Option<&Arc<LivePool>>,
    ) -> Option<Arc<Service>> {
        let (_, _, service) = self.0?;
        let same_plaintext = match (&service.plaintext, plaintext) {
            (None, None) => true,
            (Some(before), Some(now)) => before.is_of(now),
            _ => false,
        };
        let same = service.at == server.at
            && service.xclient == xclient
            && Arc::ptr_eq(&service.pool, pool)
            && same_plaintext;
        same.then(|| service.clone())
    }

    /// Its TLS towards clients, if they notice no difference: its tickets stay good.
    fn client_tls(&self, tls: &ClientTls, certificates: &Certificates) -> Option<Security> {
        let (old, forward, service) = self.0?;
        let mut used = Used::default();
        used.add_client(tls);
        let same = matches!(forward, Forward::Proxy { client_tls, .. } if client_tls == tls)
            && used.is_same(&old.certificates, certificates);
        same.then(|| service.client_tls.clone())
    }

    /// Its TLS towards members, likewise.
    fn server_tls(&self, tls: &ServerTls, certificates: &Certificates) -> Option<MemberSecurity> {
        let (old, forward, service) = self.0?;
        let mut used = Used::default();
        used.add_server(tls);
        let same = matches!(forward, Forward::Proxy { server_tls, .. } if server_tls == tls)
            && used.is_same(&old.certificates, certificates);
        same.then(|| service.server_tls.clone())
    }
}

fn security(
    server: &VirtualServer,
    client_tls: &ClientTls,
    certificates: &Certificates,
) -> Result<Security, Failure> {
    let config = |terms: &ClientTerms| {
        let chosen: Vec<_> = terms
            .certificates
            .iter()
            .map(|name| certificates.by_name[name].clone())
            .collect();
        let roots = terms.auth.roots().map(|path| Some(path.clone()));
        let roots = roots.and_then(|path| certificates.roots.get(&path));
        let tls = ListenerTls::new(terms, &chosen, roots.map(|roots| &**roots));
        of_server(server, tls.map(Arc::new))
    };
    Ok(match client_tls {
        ClientTls::None => Security::None,
        ClientTls::Implicit(terms) => Security::Implicit(config(terms)?),
        ClientTls::StartTls { policy, terms, .. } => Security::StartTls {
            policy: *policy,
            tls: config(terms)?,
        },
    })
}

fn member_security(
    server: &VirtualServer,
    server_tls: &ServerTls,
    certificates: &Certificates,
) -> Result<MemberSecurity, Failure> {
    let config = |terms: &ServerTerms| {
        let roots = match &terms.verify {
            Verify::Full { roots } => certificates.roots.get(roots),
            Verify::Pinned(_) | Verify::None => None,
        };
        let own = terms.certificate.as_ref();
        let own = own.map(|name| &*certificates.by_name[name]);
        let tls = MemberTls::new(terms, roots.map(|roots| &**roots), own);
        of_server(server, tls.map(Arc::new))
    };
    Ok(match server_tls {
        ServerTls::None => MemberSecurity::None,
        ServerTls::Implicit(terms) => MemberSecurity::Implicit(config(terms)?),
        ServerTls::StartTls(terms) => MemberSecurity::StartTls(config(terms)?),
    })
}

fn of_server<T>(server: &VirtualServer, made: Result<T, tls::Error>) -> Result<T, Failure> {
    made.map_err(|error| anyhow::anyhow!("virtual server {:?}: {error}", server.name))
        .or_exit(Exit::Config)
}
