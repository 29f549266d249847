//! Whose address members see.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

use super::sockopt;

/// Whose address the members of a virtual server see.
#[derive(Debug, Clone)]
pub enum Source {
    /// The box's own, as its routes choose it.
    Own,
    /// One of these, in turn.
    Pool(Arc<SourcePool>),
    /// The client's; replies have to find back to this box.
    Client(Arc<Reached>),
}

/// Addresses of a SNAT pool.
#[derive(Debug)]
pub struct SourcePool {
    addresses: Vec<Arc<SourceAddress>>,
    turn: AtomicUsize,
}

/// One address, and how many connections use it.
#[derive(Debug)]
pub(super) struct SourceAddress {
    address: IpAddr,
    used: AtomicUsize,
}

/// The addresses of all SNAT pools that ever served: connections keep the one they have through every reload.
#[derive(Debug, Default)]
pub struct Sources {
    known: Mutex<HashMap<IpAddr, Arc<SourceAddress>>>,
    reached: Arc<Reached>,
}

/// How many connections from clients' addresses each member has.
#[derive(Debug, Default)]
pub struct Reached(Mutex<HashMap<SocketAddr, usize>>);

/// A connection's use of an address, given back when dropped.
#[derive(Debug)]
pub(super) enum Use {
    Pool(Arc<SourceAddress>),
    Client(Arc<Reached>, SocketAddr),
}

impl Sources {
    /// A pool of these addresses; one that another pool has is the same.
    pub fn pool(&self, addresses: &[IpAddr]) -> Arc<SourcePool> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, source| source.used.load(Relaxed) > 0 || Arc::strong_count(source) > 1);
        let addresses = addresses.iter().map(|&address| {
            let new = || {
                let used = AtomicUsize::new(0);
                Arc::new(SourceAddress { address, used })
            };
            known.entry(address).or_insert_with(new).clone()
        });
        Arc::new(SourcePool {
            addresses: addresses.collect(),
            turn: AtomicUsize::new(0),
        })
    }

    /// The clients' own addresses.
    pub fn clients(&self) -> Source {
        Source::Client(self.reached.clone())
    }

    /// Members that have connections from clients' addresses.
    pub fn reached(&self) -> Vec<SocketAddr> {
        self.reached.count().keys().copied().collect()
    }

    /// Addresses that connections use.
    pub fn in_use(&self) -> Vec<IpAddr> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let used = known.values().filter(|it| it.used.load(Relaxed) > 0);
        used.map(|source| source.address).collect()
    }
}

impl Reached {
    fn count(&self) -> MutexGuard<'_, HashMap<SocketAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SourcePool {
    /// Those of a family, beginning with the one whose turn it is.
    fn in_turn(&self, v4: bool) -> impl Iterator<Item = &Arc<SourceAddress>> {
        let fit = move |source: &&Arc<SourceAddress>| source.address.is_ipv4() == v4;
        let count = self.addresses.iter().filter(fit).count();
        let start = self
            .turn
            .fetch_add(1, Relaxed)
            .checked_rem(count)
            .unwrap_or(0);
        let turning = self.addresses.iter().filter(fit).cycle();
        turning.skip(start).take(count)
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        match self {
            Self::Pool(source) => _ = source.used.fetch_sub(1, Relaxed),
            Self::Client(reached, member) => {
                let mut count = reached.count();
                if let Some(there) = count.get_mut(member) {
                    *there -= 1;
                    if *there == 0 {
                        count.remove(member);
                    }
                }
            }
        }
    }
}

/// Connects a member.
///
/// # Errors
/// What the kernel says; of a pool, of the last address that was tried.
pub(super) async fn connect(
    member: SocketAddr,
    source: &Source,
    client: IpAddr,
) -> io::Result<(TcpStream, Option<Use>)> {
    match source {
        Source::Own => Ok((TcpStream::connect(member).await?, None)),
        Source::Client(reached) => {
            *reached.count().entry(member).or_default() += 1;
            let used = Use::Client(reached.clone(), member);
            let socket = socket(member)?;
            match member.is_ipv4() {
                true => socket.set_ip_transparent_v4(true)?,
                false => socket.set_ip_transparent_v6(true)?,
            }
            Ok((bound(socket, client, member).await?, Some(used)))
        }
        Source::Pool(pool) => {
            let mut last = io::ErrorKind::AddrNotAvailable.into();
            for address in pool.in_turn(member.is_ipv4()) {
                address.used.fetch_add(1, Relaxed);
                let used = Use::Pool(address.clone());
                match bound(socket(member)?, address.address, member).await {
                    Ok(tcp) => return Ok((tcp, Some(used))),
                    // No port is free, or the address has gone: the next one has ports of its own.
                    Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => last = error,
                    Err(error) => return Err(error),
                }
            }
            Err(last)
        }
    }
}

/// Is it an address of this box?
pub(super) fn is_own(address: IpAddr) -> bool {
    let binds = |address: IpAddr| {
        let socket = datagram(address)?;
        socket.bind(&SocketAddr::new(address, 0).into())
    };
    match address {
        // Unlike bind, it does not heed net.ipv4.ip_nonlocal_bind.
        IpAddr::V4(v4) => {
            let chosen = datagram(address).and_then(|socket| socket.set_multicast_if_v4(&v4));
            chosen.is_ok()
        }
        // With net.ipv6.ip_nonlocal_bind anything binds, RFC 6666's nobody, too: then it tells nothing.
        IpAddr::V6(_) => binds(address).is_ok() && binds(NOBODY).is_err(),
    }
}

/// RFC 6666: the prefix of what is to be discarded.
const NOBODY: IpAddr = IpAddr::V6(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 1));

fn datagram(address: IpAddr) -> io::Result<Socket> {
    let domain = Domain::for_address(SocketAddr::new(address, 0));
    Socket::new(domain, Type::DGRAM, None)
}

/// Connects a member for the box itself, from its own address.
///
/// # Errors
/// What the kernel says.
pub(super) async fn connect_own(member: SocketAddr) -> io::Result<(TcpStream, Option<Use>)> {
    connect(member, &Source::Own, member.ip()).await
}

fn socket(member: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(member),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )?;
    // The port is chosen when the other end is known: one port then serves every member at once.
    sockopt::choose_port_late(&socket)?;
    Ok(socket)
}

async fn bound(socket: Socket, address: IpAddr, member: SocketAddr) -> io::Result<TcpStream> {
    socket.bind(&SocketAddr::new(address, 0).into())?;
    let socket = TcpSocket::from_std_stream(socket.into());
    socket.connect(member).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_take_turns_within_their_family() {
        let sources = Sources::default();
        let [a, b, six] = ["127.0.0.2", "127.0.0.3", "::1"].map(address);
        let pool = sources.pool(&[a, six, b]);
        let mut firsts = Vec::new();
        for _ in 0..4 {
            let all: Vec<_> = pool.in_turn(true).map(|it| it.address).collect();
            assert_eq!(all.len(), 2);
            firsts.push(all[0]);
        }
        assert_eq!(firsts, [a, b, a, b]);
        assert_eq!(pool.in_turn(false).count(), 1);
        assert_eq!(sources.pool(&[a]).in_turn(false).count(), 0);
    }

    #[test]
    fn the_box_knows_its_own_addresses() {
        for own in ["127.0.0.1", "127.1.2.3", "::1"] {
            assert!(is_own(address(own)), "{own}");
        }
        for other in ["192.0.2.1", "2001:db8::1", "100::1"] {
            assert!(!is_own(address(other)), "{other}");
        }
    }

    #[tokio::test]
    async fn a_connection_comes_from_the_pool_and_its_address_is_in_use() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let member = listener.local_addr().unwrap();
        let sources = Sources::default();
        let pool = Source::Pool(sources.pool(&["127.0.0.2", "127.0.0.3"].map(address)));
        let mut open = Vec::new();
        for _ in 0..4 {
            let (tcp, used) = connect(member, &pool, address("192.0.2.1")).await.unwrap();
            let (_, peer) = listener.accept().unwrap();
            assert_eq!(peer, tcp.local_addr().unwrap());
            open.push((peer.ip(), tcp, used));
        }
        let from = |text: &str| open.iter().filter(|it| it.0 == address(text)).count();
        assert_eq!((from("127.0.0.2"), from("127.0.0.3")), (2, 2));
        assert_eq!(sources.in_use().len(), 2);
        drop(pool);
        assert_eq!(sources.in_use().len(), 2, "connections outlive their pool");
        drop(open);
        assert_eq!(sources.in_use(), [] as [IpAddr; 0]);
    }

    #[tokio::test]
    async fn an_address_that_cannot_be_had_is_passed_over() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let member = listener.local_addr().unwrap();
        let sources = Sources::default();
        // TEST-NET-1 is nobody's own.
        let both = Source::Pool(sources.pool(&["192.0.2.1", "127.0.0.2"].map(address)));
        for _ in 0..2 {
            let (tcp, _) = connect(member, &both, address("127.0.0.1")).await.unwrap();
            assert_eq!(tcp.local_addr().unwrap().ip(), address("127.0.0.2"));
        }
        let none = Source::Pool(sources.pool(&[address("192.0.2.1")]));
        let error = connect(member, &none, address("127.0.0.1"))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
        assert_eq!(sources.in_use(), [] as [IpAddr; 0]);
    }
}
