//! The validated, immutable configuration: a generation.
//!
//! Built by `config/`; nothing in here can contradict itself, and nothing in here does I/O.

pub mod compile;
pub mod diff;
pub mod policy;
pub mod session;
pub mod show;
mod tls;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use self::policy::Range;
pub use self::{
    policy::{Guard, Policy, Rule},
    session::{LineEndings, ProxyHeader, Sessions, Terms},
    tls::{
        ClientAuth, ClientTerms, ClientTls, KeyExchange, Pin, ServerTerms, ServerTls, StartTls,
        TlsVersion, UnknownName, Verify,
    },
};

/// The name of a configured object, unique within its kind.
pub type Name = Arc<str>;

/// One numbered configuration, complete and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// Which planes may run.
    pub mode: Mode,
    /// Interfaces and hooks of the kernel plane.
    pub network: Network,
    /// What is logged.
    pub log: Log,
    /// In the order of the file.
    pub virtual_servers: Vec<Arc<VirtualServer>>,
    /// Every pool, used or not.
    pub pools: BTreeMap<Name, Arc<Pool>>,
    /// Every monitor, used or not.
    pub monitors: BTreeMap<Name, Arc<Monitor>>,
    /// Every SNAT pool, used or not.
    pub snat_pools: BTreeMap<Name, Arc<SnatPool>>,
    /// How long passthrough flows may idle.
    pub timeouts: Timeouts,
    /// What holds for every session.
    pub session: Sessions,
    /// Every policy, used or not.
    pub policies: BTreeMap<Name, Arc<Policy>>,
    /// Where certificates and keys lie; the files are read by `tls/`.
    pub certificates: BTreeMap<Name, Arc<Certificate>>,
}

impl Generation {
    /// The addresses of the SNAT pools that virtual servers use.
    pub fn snat_addresses(&self) -> BTreeSet<IpAddr> {
        let pools = self.virtual_servers.iter().filter_map(|server| {
            let (Forward::Passthrough { snat, .. }
            | Forward::Proxy {
                terms: Terms { snat, .. },
                ..
            }) = &server.forward;
            let Snat::Pool(name) = snat else { return None };
            self.snat_pools.get(name)
        });
        pools.flat_map(|pool| pool.addresses.clone()).collect()
    }
}

/// `mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Proxy virtual servers are refused, no key is ever loaded.
    PassthroughOnly,
    /// Both planes.
    Mixed,
}

/// `[network]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// Where clients come from; virtual addresses live on the first one.
    pub client_interfaces: Vec<String>,
    /// Where members are; may repeat a client interface (one-arm).
    pub server_interfaces: Vec<String>,
    /// How the packet programs are attached.
    pub attach: Attach,
    /// How many passthrough flows are tracked at once (`max_flows`).
    pub max_flows: u32,
    /// Ports of the box's own addresses that SNAT may use; absent: those beside the range of the box's own sockets.
    pub snat_ports: Option<PortRange>,
    /// Ports that SNAT never uses.
    pub snat_exclude: Vec<PortRange>,
    /// VLANs whose tagged frames reach virtual servers (`vlans`); empty: every VLAN.
    pub vlans: BTreeSet<u16>,
    /// What guards every virtual server before its own policy; has no connection rate.
    pub guard: Guard,
}

/// Ports from one to another, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRange {
    /// The lowest.
    pub first: u16,
    /// The highest; never below the lowest.
    pub last: u16,
}

/// `[timeouts]`: how long a passthrough flow may idle, by phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// Half-open: the client has not acknowledged the member's SYN.
    pub syn: Duration,
    /// Open both ways.
    pub established: Duration,
    /// One side has finished.
    pub half_closed: Duration,
    /// Both have; so long a SNAT port rests.
    pub closing: Duration,
}

impl Default for Timeouts {
    /// RFC 5382 §5, REQ-5: at least 2 h 4 min established, 4 min in transitory states. RFC 9293 §3.6.1: a member holds a
    /// connection that it closed in TIME-WAIT, on Linux for 60 s.
    fn default() -> Self {
        Self {
            syn: Duration::from_secs(64),
            established: Duration::from_secs(2 * 3600 + 4 * 60),
            half_closed: Duration::from_secs(4 * 60),
            closing: Duration::from_secs(60),
        }
    }
}

/// `[snat.NAME]`: addresses of the box that serve SNAT alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnatPool {
    /// The table's name.
    pub name: Name,
    /// Never empty, unique, at most [`lb_common::pair::SOURCE_PAIRS`] of each family.
    pub addresses: Vec<IpAddr>,
    /// Its ports; absent: 1024 to 65535.
    pub ports: Option<PortRange>,
    /// Ports of these addresses that are never used.
    pub exclude: Vec<PortRange>,
}

/// `[log]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Log {
    /// A line when a passthrough flow ends.
    pub flows: bool,
    /// Most of these lines in a second; the others are counted.
    pub flows_per_second: u32,
}

/// `network.attach`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attach {
    /// XDP on NICs with native support, TC elsewhere.
    Auto,
    /// XDP in the driver.
    Xdp,
    /// XDP behind the driver; any interface, slower.
    XdpGeneric,
    /// TC ingress: tcx, or clsact on kernels before 6.6.
    Tc,
}

/// `[virtual_server.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtualServer {
    /// The table's name.
    pub name: Name,
    /// Where clients connect to.
    pub at: Places,
    /// Which plane carries it, and how.
    pub forward: Forward,
    /// The pool that serves it.
    pub pool: Name,
    /// Who may connect, beside the policies of the network.
    pub guard: Guard,
}

impl VirtualServer {
    /// Its first address and port together: no other virtual server has them, unless one has a longer prefix.
    pub fn socket_addr(&self) -> SocketAddr {
        self.at.first()
    }
}

/// Addresses and ports of a virtual server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// The virtual address, or the first of the prefix.
    pub address: IpAddr,
    /// Bits of the address that count: 32 or 128, less for a prefix.
    pub length: u8,
    /// TCP ports from the first to the last, host order; never empty, never 0, sorted and disjoint.
    pub ports: Vec<(u16, u16)>,
}

impl Places {
    /// The first address and port together.
    pub fn first(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.ports.first().map_or(0, |range| range.0))
    }

    /// More than one address?
    pub fn is_prefix(&self) -> bool {
        self.length < if self.address.is_ipv4() { 32 } else { 128 }
    }

    /// Does it serve this address and port?
    pub fn serves(&self, address: SocketAddr) -> bool {
        let mut ports = self.ports.iter();
        self.holds(address.ip()) && ports.any(|(from, to)| (from..=to).contains(&&address.port()))
    }

    /// Is this address one of them?
    pub fn holds(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4()
            && Range::prefix(address, self.length) == Range::prefix(self.address, self.length)
    }

    /// Every port.
    pub fn each_port(&self) -> impl Iterator<Item = u16> + '_ {
        self.ports.iter().flat_map(|(from, to)| *from..=*to)
    }
}

impl From<SocketAddr> for Places {
    fn from(at: SocketAddr) -> Self {
        Self {
            address: at.ip(),
            length: if at.is_ipv4() { 32 } else { 128 },
            ports: vec![(at.port(), at.port())],
        }
    }
}

/// As people write it: `203.0.113.10:465`, `[2001:db8::/64]:25,587,1000-1010`.
impl fmt::Display for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut address = self.address.to_string();
        if self.is_prefix() {
            address.push_str(&format!("/{}", self.length));
        }
        if self.address.is_ipv6() {
            address = format!("[{address}]");
        }
        let ports = self.ports.iter().map(|(from, to)| match from == to {
            true => from.to_string(),
            false => format!("{from}-{to}"),
        });
        write!(f, "{address}:{}", ports.collect::<Vec<_>>().join(","))
    }
}

/// `virtual_server.forward` with the keys that belong to each choice.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    clippy::large_enum_variant,
    reason = "there is one for each virtual server, behind an Arc"
)]
pub enum Forward {
    /// The kernel plane.
    Passthrough {
        /// Whose address the member sees.
        snat: Snat,
        /// A PROXY protocol header, version 2, tells the member who the client is.
        proxy_protocol: bool,
    },
    /// The proxy plane.
    Proxy {
        /// TLS towards the client.
        client_tls: ClientTls,
        /// All else.
        terms: Terms,
        /// TLS towards the members.
        server_tls: ServerTls,
        /// Members that offer XCLIENT are told by it who the client is.
        xclient: bool,
    },
}

/// `virtual_server.snat`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Snat {
    /// The client's address stays; the members route replies through this box.
    None,
    /// The box's own address on the way to the member.
    Automap,
    /// An address of a SNAT pool, in turn.
    Pool(Name),
}

/// `[certificate.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// The table's name.
    pub name: Name,
    /// PEM: leaf first, then intermediates.
    pub chain: PathBuf,
    /// PEM: PKCS#8, SEC1 or PKCS#1.
    pub key: PathBuf,
}

/// `[pool.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// The table's name.
    pub name: Name,
    /// How a member is chosen.
    pub method: Method,
    /// Absent: every member counts as up.
    pub monitor: Option<Name>,
    /// What becomes of the connections of a member that its monitor finds down.
    pub on_down: OnDown,
    /// Never empty, at most [`lb_common::layout::POOL_MEMBERS`], names and addresses unique.
    pub members: Vec<Member>,
}

/// `pool.method`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// The member with the fewest connections of both planes.
    LeastConnections,
    /// Each in turn.
    RoundRobin,
}

/// `pool.on_down`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDown {
    /// They go on as far as they can.
    Leave,
    /// They are ended at once, so that clients come back to another member.
    Reset,
}

/// `[[pool.NAME.member]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Unique in its pool; `address:port` where the file names none.
    pub name: Name,
    /// Where it listens.
    pub address: SocketAddr,
}

/// `[monitor.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Monitor {
    /// The table's name.
    pub name: Name,
    /// What is asked of a member.
    pub probe: Probe,
    /// From one probe's start to the next.
    pub interval: Duration,
    /// A probe that takes longer has failed.
    pub timeout: Duration,
    /// Good probes in a row until a down member is up.
    pub rise: u32,
    /// Bad probes in a row until an up member is down.
    pub fall: u32,
}

/// `monitor.type` with the keys that belong to each choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// A connection that opens.
    Tcp,
    /// Greeting, EHLO, QUIT, each reply awaited (RFC 5321 §3.1, §4.1.1.1).
    Smtp {
        /// The name said in EHLO.
        helo: String,
    },
}
