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
pub mod events;
mod listener;
mod live;
mod orders;
mod pump;
mod session;
#[cfg(test)]
mod tests;
mod upstream;
mod wire;
mod worker;

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, PoisonError, RwLock},
};

use lb_common::stats::TrafficCell;

pub use self::{
    listener::{WorkerListeners, bind_listeners},
    orders::{Control, Orders},
    worker::{DrainReport, Proxy},
};
use crate::{
    model::{Name, StartTls},
    pool::LivePool,
    smtp::session::ClientSecurity,
};

/// A virtual server of the proxy plane.
#[derive(Debug)]
pub struct Service {
    /// Its name in the configuration.
    pub name: Name,
    /// The virtual address and port.
    pub address: SocketAddr,
    /// TLS towards its clients.
    pub client_tls: Security,
    /// Who serves it.
    pub pool: Arc<LivePool>,
    /// Its counters.
    pub cell: &'static TrafficCell,
}

/// TLS towards clients, with what it takes.
#[derive(Debug, Clone)]
pub enum Security {
    /// Plain SMTP.
    None,
    /// TLS from the first byte (RFC 8314 §3.3).
    Implicit(Arc<rustls::ServerConfig>),
    /// RFC 3207.
    StartTls {
        /// May clients stay in plaintext?
        policy: StartTls,
        /// The terms.
        config: Arc<rustls::ServerConfig>,
    },
}

/// The virtual servers that are served now, found by the address that a client connected to.
#[derive(Debug, Default)]
pub struct Services(RwLock<Arc<HashMap<SocketAddr, Arc<Service>>>>);

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
        let by_address = services
            .into_iter()
            .map(|service| (canonical(service.address), service));
        let by_address = Arc::new(by_address.collect());
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = by_address;
    }

    /// The virtual server at a local address.
    pub fn find(&self, local: SocketAddr) -> Option<Arc<Service>> {
        let services = self.0.read().unwrap_or_else(PoisonError::into_inner);
        services.get(&canonical(local)).cloned()
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
