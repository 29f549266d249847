//! The proxy plane: sockets around `smtp/` and `tls/`.
//!
//! ```text
//! listener ─ worker (one thread and runtime per core) ─ accept ─ session ─┬─ client   plain or TLS
//!                                                                        ├─ pump     moves bytes through smtp::session
//!                                                                        └─ upstream the member
//! ```
//!
//! No rule of SMTP lives here; the machine in `smtp::session` decides, this room obeys.

mod client;
mod crowd;
mod entry;
pub mod events;
pub mod header;
mod listener;
mod live;
mod orders;
mod pump;
mod scout;
mod search;
mod session;
mod sockopt;
mod source;
mod splice;
mod stall;
#[cfg(test)]
mod tests;
mod upstream;
mod wire;
mod worker;

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use lb_common::stats::TrafficCell;

pub use self::{
    crowd::Crowd,
    listener::{WorkerListeners, bind_listeners},
    orders::{Control, Orders},
    scout::Fallback,
    source::{Source, SourcePool, Sources},
    worker::{Cutter, DrainReport, Proxy},
};
use crate::{
    model::{self, Name, Places, Policy, Sessions, StartTls},
    pool::LivePool,
    smtp::{
        approach::Plan,
        session::{ClientSecurity, Terms},
    },
    tls::{ListenerTls, MemberTls},
};

/// A virtual server of the proxy plane.
#[derive(Debug)]
pub struct Service {
    /// Its name in the configuration.
    pub name: Name,
    /// Its addresses and ports.
    pub at: Places,
    /// TLS towards its clients.
    pub client_tls: Security,
    /// TLS towards its members.
    pub server_tls: MemberSecurity,
    /// Are members told by XCLIENT who the client is?
    pub xclient: bool,
    /// Who serves it.
    pub pool: Arc<LivePool>,
    /// Who serves clients that stay in plaintext, if others do.
    pub plaintext: Option<Fallback>,
    /// Its counters.
    pub cell: &'static TrafficCell,
    /// What it has beside TLS.
    pub terms: model::Terms,
    /// What holds for its sessions as for all.
    pub sessions: Sessions,
    /// Whose address its members see.
    pub source: Source,
    /// Its sessions; the same from generation to generation.
    pub crowd: Arc<Crowd>,
    /// Who may connect, in the order in which they are asked: for clients that a PROXY protocol header names. Packets
    /// are judged before they get here.
    pub policies: Vec<Arc<Policy>>,
}

/// TLS towards clients, with what it takes.
#[derive(Debug, Clone)]
pub enum Security {
    /// Plain SMTP.
    None,
    /// TLS from the first byte (RFC 8314 §3.3).
    Implicit(Arc<ListenerTls>),
    /// RFC 3207.
    StartTls {
        /// May clients stay in plaintext?
        policy: StartTls,
        /// The terms.
        tls: Arc<ListenerTls>,
    },
}

/// TLS towards members, with what it takes.
#[derive(Debug, Clone)]
pub enum MemberSecurity {
    /// Plain SMTP.
    None,
    /// TLS from the first byte.
    Implicit(Arc<MemberTls>),
    /// RFC 3207.
    StartTls(Arc<MemberTls>),
}

/// The virtual servers that are served now, found by the address that a client connected to.
#[derive(Debug, Default)]
pub struct Services {
    found: RwLock<Arc<Found>>,
    /// The number of the generation that they are of.
    generation: AtomicU64,
}

/// Single addresses apart, since there are most; prefixes with the longest first.
#[derive(Debug, Default)]
struct Found {
    hosts: HashMap<SocketAddr, Arc<Service>>,
    prefixes: Vec<Arc<Service>>,
    /// Addresses of virtual servers that are no prefixes, and of members.
    taken: HashSet<IpAddr>,
}

impl Services {
    /// These virtual servers.
    pub fn new(services: impl IntoIterator<Item = Arc<Service>>) -> Self {
        let new = Self::default();
        new.replace(services);
        new
    }

    /// Serves these from now on; sessions that run keep what they started with.
    ///
    /// Of two with the same address the last counts.
    pub fn replace(&self, services: impl IntoIterator<Item = Arc<Service>>) {
        let mut found = Found::default();
        for service in services {
            let fallback = service.plaintext.as_ref().map(Fallback::pool);
            let pools = [&*service.pool].into_iter().chain(fallback);
            let members = pools.flat_map(LivePool::members);
            let members = members.map(|member| member.address.ip().to_canonical());
            found.taken.extend(members);
            if service.at.is_prefix() {
                found.prefixes.push(service);
                continue;
            }
            found.taken.insert(service.at.address.to_canonical());
            for port in service.at.each_port() {
                let address = SocketAddr::new(service.at.address, port);
                found.hosts.insert(canonical(address), service.clone());
            }
        }
        found
            .prefixes
            .sort_by_key(|service| std::cmp::Reverse(service.at.length));
        *self.found.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(found);
    }

    /// Which generation is in use, for the session log.
    pub fn set_generation(&self, generation: u64) {
        self.generation.store(generation, Relaxed);
    }

    fn generation(&self) -> u64 {
        self.generation.load(Relaxed)
    }

    /// Is it the address of a virtual server or of a member? No client has it.
    fn have(&self, address: IpAddr) -> bool {
        let found = self.found.read().unwrap_or_else(PoisonError::into_inner);
        let address = address.to_canonical();
        let mut prefixes = found.prefixes.iter();
        found.taken.contains(&address) || prefixes.any(|service| service.at.holds(address))
    }

    /// The virtual server at a local address.
    pub fn find(&self, local: SocketAddr) -> Option<Arc<Service>> {
        let found = self.found.read().unwrap_or_else(PoisonError::into_inner);
        let local = canonical(local);
        let mut prefixes = found.prefixes.iter();
        found
            .hosts
            .get(&local)
            .or_else(|| prefixes.find(|service| service.at.serves(local)))
            .cloned()
    }
}

impl Service {
    /// Who serves a session; `switched`: of a client that stays in plaintext.
    fn pool_for(&self, switched: bool) -> &LivePool {
        match &self.plaintext {
            Some(fallback) if switched => fallback.pool(),
            _ => &self.pool,
        }
    }

    /// The other pool, for a client that may still stay in plaintext: who comes in TLS from the first byte has chosen.
    fn fallback(&self, security: ClientSecurity) -> Option<&Fallback> {
        let chooses = matches!(security, ClientSecurity::StartTls(_));
        self.plaintext.as_ref().filter(|_| chooses)
    }

    /// What the dialogue with a client and its members has to heed; `security`: how it goes into the dialogue.
    fn dialogue(&self, client: SocketAddr, security: ClientSecurity) -> Terms {
        Terms {
            client: security,
            plan: Plan {
                starttls: matches!(self.server_tls, MemberSecurity::StartTls(_)),
                xclient: self.xclient.then_some(client),
            },
            switches: self.fallback(security).is_some(),
            line_endings: self.terms.line_endings,
            max_recipients: self.sessions.max_recipients,
            member_verified: match &self.server_tls {
                MemberSecurity::None => false,
                MemberSecurity::Implicit(tls) | MemberSecurity::StartTls(tls) => {
                    tls.verifies_name()
                }
            },
        }
    }
}

impl Security {
    fn for_dialogue(&self) -> ClientSecurity {
        match self {
            Self::None => ClientSecurity::None,
            Self::Implicit(_) => ClientSecurity::Implicit,
            Self::StartTls { policy, .. } => ClientSecurity::StartTls(*policy),
        }
    }
}

/// IPv4 as IPv4, and no scope or flow label: addresses as a configuration writes them.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
