//! How many sessions there are, and how many of each source network: what limits count.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Sessions, by source network. One belongs to a virtual server, and one to all of them.
#[derive(Debug, Default)]
pub struct Crowd(Mutex<Count>);

#[derive(Debug, Default)]
struct Count {
    all: u32,
    /// At most as many as there are sessions.
    sources: HashMap<IpAddr, u32>,
}

/// A session's place, given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    crowd: Arc<Crowd>,
    source: Option<IpAddr>,
}

/// The limit is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Full;

impl Crowd {
    /// Takes a place, unless there are `most` already.
    pub(super) fn enter(self: &Arc<Self>, most: u32) -> Result<Place, Full> {
        let mut count = self.count();
        if count.all >= most {
            return Err(Full);
        }
        count.all += 1;
        drop(count);
        Ok(Place {
            crowd: self.clone(),
            source: None,
        })
    }

    fn count(&self) -> MutexGuard<'_, Count> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Counts the session among those of its network, unless there are `most` already. Once for each place.
    pub(super) fn belong(&mut self, client: IpAddr, most: u32) -> Result<(), Full> {
        debug_assert!(self.source.is_none());
        let source = network(client);
        let mut count = self.crowd.count();
        let there = count.sources.entry(source).or_default();
        if *there >= most {
            return Err(Full);
        }
        *there += 1;
        self.source = Some(source);
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut count = self.crowd.count();
        count.all -= 1;
        let Some(source) = self.source else { return };
        if let Some(there) = count.sources.get_mut(&source) {
            *there -= 1;
            if *there == 0 {
                count.sources.remove(&source);
            }
        }
    }
}

/// The network that a client's limits are counted by: a /24 of IPv4, a /64 of IPv6.
fn network(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V4(address) => Ipv4Addr::from_bits(address.to_bits() & !0xff).into(),
        IpAddr::V6(address) => {
            Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_limited_and_come_back() {
        let crowd = Arc::new(Crowd::default());
        let first = crowd.enter(2).unwrap();
        let second = crowd.enter(2).unwrap();
        assert_eq!(crowd.enter(2).unwrap_err(), Full);
        drop(first);
        let third = crowd.enter(2).unwrap();
        assert!(crowd.enter(2).is_err());
        drop((second, third));
        assert_eq!(crowd.count().all, 0);
    }

    #[test]
    fn each_network_has_its_own_limit() {
        let crowd = Arc::new(Crowd::default());
        let enter = |client: &str| {
            let mut place = crowd.enter(100).unwrap();
            place.belong(client.parse().unwrap(), 2).map(|()| place)
        };
        let four = [enter("192.0.2.1").unwrap(), enter("192.0.2.255").unwrap()];
        assert_eq!(enter("::ffff:192.0.2.7").unwrap_err(), Full);
        let _other = enter("192.0.3.1").unwrap();
        let six = [
            enter("2001:db8::1").unwrap(),
            enter("2001:db8::ffff:1").unwrap(),
        ];
        assert!(enter("2001:db8::2").is_err());
        let _next = enter("2001:db8:0:1::").unwrap();
        drop(four);
        enter("192.0.2.9").unwrap();
        drop(six);
        assert_eq!(
            crowd.count().sources.len(),
            2,
            "no network without a session"
        );
        assert_eq!(crowd.count().all, 2);
    }
}
