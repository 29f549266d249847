//! Two boxes that cannot be told apart by their neighbours: one balances with smtplb, the other with nftables NAT.
//!
//! ```text
//! port ── cli0 own srv0 ── port      the same addresses and MAC addresses twice,
//! port ── cli0 nft srv0 ── port      all four ports in one more namespace
//! ```

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use lb_userspace::{
    config,
    dataplane::{KernelPlane, Remover},
    model::Generation,
};

use super::{packet::Ends, port::Port};
use crate::lab::{Namespace, Pass, prefix};

pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 0x0a, 0x11];
pub const MEMBER_MAC: [u8; 6] = [2, 0, 0, 0, 0x0b, 0x21];
pub const BOX_MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0x0c, 1], [2, 0, 0, 0, 0x0c, 2]];
/// MTU of the link to the members: less than the clients', so that a box has to say so.
pub const MEMBER_MTU: usize = 1420;
/// Flow records: more than all connections of the longest run.
const FLOWS: u32 = 131_072;
const SERVICES: u8 = 2;

/// One of the two boxes, with a raw port behind each of its interfaces.
#[derive(Debug)]
pub struct TwinBox {
    pub namespace: Namespace,
    /// Client's side, member's side.
    pub ports: [Port; 2],
}

/// Both of them.
pub struct Boxes {
    pub own: TwinBox,
    pub nft: TwinBox,
    pub plane: KernelPlane,
    /// Do members see the box instead of the client?
    pub snat: bool,
    _passes: Vec<Pass>,
    /// Where the raw ports are.
    pub outside: Namespace,
    generation: Generation,
    remover: Remover,
    folder: PathBuf,
}

impl Boxes {
    /// Builds them with SNAT; `attach` is the hook of our own, `extra` more of its `[network]`.
    ///
    /// # Errors
    /// When this is not root, or the kernel lacks something.
    pub fn build(attach: &str, extra: &str) -> Result<Self> {
        Self::build_with(attach, extra, true)
    }

    /// Builds them with or without SNAT.
    ///
    /// # Errors
    /// As [`Self::build`].
    pub fn build_with(attach: &str, extra: &str, snat: bool) -> Result<Self> {
        prefix::remove_leftovers(false);
        let name = prefix::new();
        let folder = prefix::folder(&name);
        let outside = Namespace::create(&format!("{name}-out"))?;
        let own = twin(&name, "own", &outside)?;
        let nft = twin(&name, "nft", &outside)?;
        nft.namespace.enter(|| load_ruleset(&ruleset(snat)))?;
        let mut passes = Vec::new();
        if attach.starts_with("xdp") {
            for port in ["own-c", "own-s"] {
                passes.push(Pass::attach(&outside, port)?);
            }
        }
        let (generation, _) = config::parse("twin.toml", &configuration(attach, extra, snat))
            .map_err(|faults| anyhow::anyhow!("{faults:?}"))?;
        let bpffs = folder.join("bpf");
        std::fs::create_dir_all(&folder)?;
        let plane = own.namespace.enter(|| {
            let mut plane = KernelPlane::load(&bpffs, FLOWS, false)?;
            let numbers = plane.number(&generation)?;
            plane.apply(&generation, &numbers, |_| true, 1)?;
            plane.attach(&generation)?;
            Ok(plane)
        })?;
        Ok(Self {
            own,
            nft,
            snat,
            remover: plane.remover(),
            plane,
            _passes: passes,
            outside,
            generation,
            folder,
        })
    }

    /// Tells the nft box which port to choose for connections: those that smtplb has chosen.
    ///
    /// # Errors
    /// When nft refuses.
    pub fn agree(&self, chosen: &[(Ends, u16)]) -> Result<()> {
        let mut text = "flush map inet twin ports4\nflush map inet twin ports6\n".to_owned();
        for (ends, port) in chosen {
            let map = if ends.client.is_ipv4() {
                "ports4"
            } else {
                "ports6"
            };
            let _ = writeln!(
                text,
                "add element inet twin {map} {{ {} . {} . {} : {} . {port} }}",
                ends.client.ip(),
                ends.client.port(),
                ends.member.ip(),
                ends.snat,
            );
        }
        self.nft.namespace.enter(|| load_ruleset(&text))
    }
}

impl Drop for Boxes {
    fn drop(&mut self) {
        let _ = self.remover.remove(&self.generation);
        prefix::remove_folder(&self.folder);
    }
}

/// The ends of the connection with this number; ports repeat after 60,000 connections of a family, by another client.
pub fn ends(number: usize, v6: bool) -> Ends {
    let host = (number / 60_000 % 4) as u8;
    let service = (number % usize::from(SERVICES)) as u8;
    let port = 1024 + (number % 60_000) as u16;
    Ends {
        client: SocketAddr::new(address(71, 11 + host, v6), port),
        service: SocketAddr::new(address(71, 100 + service, v6), 465),
        member: SocketAddr::new(address(72, 21 + service, v6), 4465),
        snat: address(72, 1, v6),
    }
}

/// 10.71.0.11 or fd71::11: the same digits in both families.
pub fn address(net: u8, host: u8, v6: bool) -> IpAddr {
    let digits = |number: u8| u16::from_str_radix(&number.to_string(), 16).unwrap_or_default();
    if v6 {
        Ipv6Addr::new(0xfd00 | digits(net), 0, 0, 0, 0, 0, 0, digits(host)).into()
    } else {
        Ipv4Addr::new(10, net, 0, host).into()
    }
}

fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}

fn twin(prefix: &str, name: &str, outside: &Namespace) -> Result<TwinBox> {
    let namespace = Namespace::create(&format!("{prefix}-{name}"))?;
    for (setting, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv6/conf/all/accept_dad", "0"),
        ("net/ipv6/conf/default/accept_dad", "0"),
        ("net/ipv4/icmp_ratelimit", "0"),
        ("net/ipv6/icmp/ratelimit", "0"),
    ] {
        namespace.sysctl(setting, value)?;
    }
    for (setting, value) in [
        ("net/ipv4/icmp_msgs_per_sec", "1000000"),
        ("net/ipv4/icmp_msgs_burst", "1000000"),
    ] {
        // One setting for the whole machine before Linux 6.11; absent in a namespace then.
        let _ = namespace.sysctl(setting, value);
    }
    let mut lines = Vec::new();
    for (side, (interface, net)) in [("cli0", 71), ("srv0", 72)].into_iter().enumerate() {
        let port = format!("{name}-{}", ["c", "s"][side]);
        outside.ip(&[format!(
            "link add {port} type veth peer name {interface} netns {}",
            namespace.name()
        )])?;
        // No stack takes part out there.
        outside.sysctl(&format!("net/ipv6/conf/{port}/disable_ipv6"), "1")?;
        outside.ip(&[format!("link set {port} up")])?;
        lines.extend([
            format!("link set {interface} address {}", mac(BOX_MACS[side])),
            format!("link set {interface} up"),
            format!("address add {}/24 dev {interface}", address(net, 1, false)),
            format!(
                "address add {}/64 dev {interface} nodad",
                address(net, 1, true)
            ),
        ]);
        let neighbour = mac([CLIENT_MAC, MEMBER_MAC][side]);
        for host in [11, 12, 13, 14, 21, 22, 250] {
            for v6 in [false, true] {
                lines.push(format!(
                    "neigh add {} lladdr {neighbour} dev {interface} nud permanent",
                    address(net, host, v6)
                ));
            }
        }
    }
    for service in 0..SERVICES {
        lines.push(format!(
            "address add {}/32 dev cli0",
            address(71, 100 + service, false)
        ));
        lines.push(format!(
            "address add {}/128 dev cli0 nodad",
            address(71, 100 + service, true)
        ));
    }
    lines.push(format!("link set srv0 mtu {MEMBER_MTU}"));
    namespace.ip(&lines)?;
    let ports = outside.enter(|| {
        Ok([
            Port::open(&format!("{name}-c"))?,
            Port::open(&format!("{name}-s"))?,
        ])
    })?;
    Ok(TwinBox { namespace, ports })
}

fn configuration(attach: &str, extra: &str, snat: bool) -> String {
    let snat = if snat { "automap" } else { "none" };
    let mut text = format!(
        "[network]\nclient_interfaces = [\"cli0\"]\nserver_interfaces = [\"srv0\"]\nattach = \"{attach}\"\n{extra}\n"
    );
    for v6 in [false, true] {
        for service in 0..SERVICES {
            let ends = ends(usize::from(service), v6);
            let name = format!("twin{service}-{}", if v6 { "v6" } else { "v4" });
            let _ = write!(
                text,
                "[virtual_server.{name}]\naddress = \"{}\"\nport = {}\nforward = \"passthrough\"\npool = \"{name}\"\nsnat = \"{snat}\"\n\
                 [pool.{name}]\n[[pool.{name}.member]]\naddress = \"{}\"\nport = {}\n",
                ends.service.ip(),
                ends.service.port(),
                ends.member.ip(),
                ends.member.port(),
            );
        }
    }
    text
}

fn ruleset(snat: bool) -> String {
    let mut text = "table inet twin {\n\
        map ports4 { type ipv4_addr . inet_service . ipv4_addr : ipv4_addr . inet_service; }\n\
        map ports6 { type ipv6_addr . inet_service . ipv6_addr : ipv6_addr . inet_service; }\n\
        chain before { type nat hook prerouting priority dstnat;\n"
        .to_owned();
    for v6 in [false, true] {
        let (family, open, close) = if v6 {
            ("ip6", "[", "]")
        } else {
            ("ip", "", "")
        };
        for service in 0..SERVICES {
            let ends = ends(usize::from(service), v6);
            let _ = writeln!(
                text,
                "{family} daddr {} tcp dport {} dnat {family} to {open}{}{close}:{}",
                ends.service.ip(),
                ends.service.port(),
                ends.member.ip(),
                ends.member.port(),
            );
        }
    }
    text.push_str("}\nchain behind { type nat hook postrouting priority srcnat;\n");
    for (family, map) in [("ip", "ports4"), ("ip6", "ports6")] {
        if !snat {
            break;
        }
        let _ = writeln!(
            text,
            "tcp dport 4465 snat {family} to {family} saddr . tcp sport . {family} daddr map @{map}"
        );
    }
    text.push_str("}\n}\n");
    text
}

/// In the namespace this thread is in. Bad checksums are translated like good ones, and windows are not judged: so does
/// smtplb, and the ends of the connection do it anyway.
fn load_ruleset(text: &str) -> Result<()> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start nft")?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    std::io::Write::write_all(&mut stdin, text.as_bytes())?;
    drop(stdin);
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "nft: {}\n{text}",
        String::from_utf8_lossy(&output.stderr)
    );
    for (setting, value) in [
        ("nf_conntrack_checksum", "0"),
        ("nf_conntrack_tcp_be_liberal", "1"),
        ("nf_conntrack_tcp_loose", "0"),
        // smtplb lets a port rest for a minute; in a long run it would come again before conntrack forgets it.
        ("nf_conntrack_tcp_timeout_time_wait", "5"),
        ("nf_conntrack_tcp_timeout_close", "5"),
        ("nf_conntrack_tcp_timeout_last_ack", "5"),
    ] {
        std::fs::write(format!("/proc/sys/net/netfilter/{setting}"), value)
            .with_context(|| format!("cannot set {setting}"))?;
    }
    Ok(())
}
