//! What is left of earlier generations, so that nobody new gets a number that is still counted under.
//!
//! A session keeps the virtual server and the pool that it began with, and may choose another member of that pool at any
//! time. While it has none, no counter tells of it.

use std::sync::{Arc, Weak};

use super::running::Running;
use crate::{dataplane::Held, pool::LivePool, proxy::Service};

/// Pools and services that a session may still have.
#[derive(Debug, Default)]
pub(super) struct Earlier {
    pools: Vec<Weak<LivePool>>,
    /// With the number of the virtual server.
    services: Vec<(Weak<Service>, u16)>,
}

impl Earlier {
    /// These are in use no more.
    pub(super) fn add(&mut self, running: &Running) {
        for pool in running.pools.values() {
            let pool = Arc::downgrade(pool);
            if !self.pools.iter().any(|known| known.ptr_eq(&pool)) {
                self.pools.push(pool);
            }
        }
        for service in &running.services {
            let number = running.numbers.virtual_servers[&service.name];
            let service = Arc::downgrade(service);
            if !self
                .services
                .iter()
                .any(|(known, _)| known.ptr_eq(&service))
            {
                self.services.push((service, number));
            }
        }
    }

    /// The numbers of those that somebody still has.
    pub(super) fn held(&mut self) -> Held {
        self.pools.retain(|pool| pool.strong_count() > 0);
        self.services
            .retain(|(service, _)| service.strong_count() > 0);
        let pools = self.pools.iter().filter_map(Weak::upgrade);
        Held {
            members: pools
                .flat_map(|pool| pool.members().iter().map(|it| it.id).collect::<Vec<_>>())
                .collect(),
            virtual_servers: self.services.iter().map(|(_, number)| *number).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use lb_common::stats::TrafficCell;

    use super::*;
    use crate::{
        dataplane::Numbers,
        model::{Method, Places, Sessions, Terms},
        pool::LiveMember,
        proxy::{MemberSecurity, Security, Source},
    };

    #[test]
    fn a_number_is_held_as_long_as_a_session_may_count_under_it() {
        let cell: &TrafficCell = Box::leak(Box::default());
        let address = "10.0.0.9:25".parse().unwrap();
        let member = Arc::new(LiveMember::new("m".into(), address, 7, true, cell));
        let pool = Arc::new(LivePool::new("p".into(), Method::RoundRobin, vec![member]));
        let service = Arc::new(Service {
            name: "s".into(),
            at: Places {
                address: "203.0.113.1".parse().unwrap(),
                length: 32,
                ports: vec![(25, 25)],
            },
            client_tls: Security::None,
            server_tls: MemberSecurity::None,
            xclient: false,
            plaintext: None,
            pool: pool.clone(),
            cell,
            terms: Terms::default(),
            sessions: Sessions::default(),
            source: Source::Own,
            crowd: Arc::default(),
            policies: Vec::new(),
        });
        let (generation, _) = crate::config::parse("smtplb.toml", "").unwrap();
        let running = Running {
            generation,
            numbers: Numbers {
                virtual_servers: [("s".into(), 5)].into(),
                ..Numbers::default()
            },
            pools: [("p".into(), pool)].into(),
            certificates: Default::default(),
            services: vec![service.clone()],
            sources: Arc::default(),
        };
        let mut earlier = Earlier::default();
        earlier.add(&running);
        earlier.add(&running);
        drop(running);
        let both = Held {
            members: [7].into(),
            virtual_servers: [5].into(),
        };
        assert_eq!(earlier.held(), both);
        let pool = service.pool.clone();
        drop(service);
        let members = Held {
            virtual_servers: [].into(),
            ..both
        };
        assert_eq!(earlier.held(), members);
        drop(pool);
        assert_eq!(earlier.held(), Held::default());
        assert!(earlier.pools.is_empty() && earlier.services.is_empty());
    }
}
