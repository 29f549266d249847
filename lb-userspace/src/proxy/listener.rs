//! The listening sockets of the workers.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
};

use socket2::{Domain, Protocol, Socket, Type};

/// Connections that may wait for accept, per socket; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// The listening sockets of one worker.
///
/// They are bound to loopback and a port of the kernel's choice. Clients never see that: `sk_lookup`
/// gives them connections to virtual addresses, which `getsockname` then shows.
#[derive(Debug)]
pub struct WorkerListeners {
    /// The core that the worker stays on.
    pub cpu: usize,
    /// For IPv4.
    pub v4: TcpListener,
    /// For IPv6; absent where the machine has none.
    pub v6: Option<TcpListener>,
}

/// Listening sockets for one worker on each of these cores.
///
/// # Errors
/// IPv4 loopback cannot be bound, or IPv6 fails for another reason than being switched off.
pub fn bind_listeners(cpus: &[usize]) -> io::Result<Vec<WorkerListeners>> {
    let worker = |cpu: &usize| {
        Ok(WorkerListeners {
            cpu: *cpu,
            v4: bind((Ipv4Addr::LOCALHOST, 0).into())?,
            v6: match bind((Ipv6Addr::LOCALHOST, 0).into()) {
                Err(error) if lacks_v6(&error) => None,
                bound => Some(bound?),
            },
        })
    };
    cpus.iter().map(worker).collect()
}

/// No `SO_REUSEPORT`: the steering program picks the socket, and a group would pick again.
fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn lacks_v6(error: &io::Error) -> bool {
    let number = error.raw_os_error();
    number == Some(libc::EAFNOSUPPORT) || number == Some(libc::EADDRNOTAVAIL)
}
