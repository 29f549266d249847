//! Which ports of a SNAT address are usable: what is configured, less what the box itself uses there.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use lb_common::pair::PLACES;

use crate::model::{Generation, Places, PortRange, SnatPool};

/// Fewer SNAT ports than this are worth a warning.
const FEW_PORTS: u32 = 8192;
/// Below are the ports of the box's own services (RFC 6335 §6).
const LOWEST: u16 = 1024;

/// A set of ports, one bit each.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Ports(pub Box<[u64; PLACES]>);

impl Ports {
    /// Every number: slots that no port belongs to.
    pub(super) fn all() -> Self {
        Self(Box::new([u64::MAX; PLACES]))
    }

    /// These ranges.
    pub(super) fn of(ranges: &[PortRange]) -> Self {
        let mut ports = Self(Box::new([0; PLACES]));
        for range in ranges {
            for port in range.first..=range.last {
                ports.0[usize::from(port) / 64] |= 1 << (port % 64);
            }
        }
        ports
    }

    /// Takes ports out.
    pub(super) fn without(mut self, ranges: &[PortRange]) -> Self {
        for (word, other) in self.0.iter_mut().zip(Self::of(ranges).0.iter()) {
            *word &= !other;
        }
        self
    }

    /// How many there are.
    pub(super) fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }
}

/// What holds for the box's own addresses, looked up once for a generation.
pub(super) struct LocalPorts {
    range: PortRange,
    exclude: Vec<PortRange>,
    sockets: Vec<(IpAddr, u16)>,
    servers: Vec<Places>,
}

impl LocalPorts {
    /// Reads what the box's own sockets use.
    pub(super) fn read(generation: &Generation) -> Self {
        let network = &generation.network;
        let servers = generation.virtual_servers.iter();
        Self {
            range: network.snat_ports.unwrap_or_else(beside_local_range),
            exclude: network.snat_exclude.clone(),
            sockets: local_sockets(),
            servers: servers.map(|server| server.at.clone()).collect(),
        }
    }

    /// The usable ports of one of the box's own addresses.
    pub(super) fn automap(&self, address: IpAddr) -> Ports {
        let sockets = self.sockets.iter();
        let bound = sockets
            .filter(|(local, _)| *local == address || local.is_unspecified())
            .map(|(_, port)| (*port, *port));
        let served = self.servers.iter().filter(|at| at.holds(address));
        let taken: Vec<_> = bound
            .chain(served.flat_map(|at| at.ports.iter().copied()))
            .map(|(first, last)| PortRange { first, last })
            .collect();
        let ports = Ports::of(&[self.range])
            .without(&self.exclude)
            .without(&taken);
        if ports.count() < FEW_PORTS {
            log::warn!(
                "{} ports of {address} are left for SNAT, and so {0} passthrough connections to a member at a time; narrow \
                 net.ipv4.ip_local_port_range, set `snat_ports`, or use a SNAT pool",
                ports.count()
            );
        }
        ports
    }

    /// The usable ports of an address that serves SNAT alone.
    pub(super) fn pool(&self, pool: &SnatPool) -> Ports {
        let range = pool.ports.unwrap_or(PortRange {
            first: LOWEST,
            last: u16::MAX,
        });
        Ports::of(&[range])
            .without(&self.exclude)
            .without(&pool.exclude)
    }
}

/// The larger range beside the one that the box's own sockets use, so that they never meet.
fn beside_local_range() -> PortRange {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut bounds = text
        .split_whitespace()
        .map_while(|word| word.parse::<u16>().ok());
    let (low, high) = match (bounds.next(), bounds.next()) {
        (Some(low), Some(high)) => (low, high),
        _ => (32_768, 60_999),
    };
    let below = low.saturating_sub(LOWEST);
    if below >= u16::MAX - high {
        return PortRange {
            first: LOWEST,
            last: (low - 1).max(LOWEST),
        };
    }
    PortRange {
        first: high + 1,
        last: u16::MAX,
    }
}

/// Addresses and ports that the box's own TCP sockets are bound to.
fn local_sockets() -> Vec<(IpAddr, u16)> {
    let mut found = Vec::new();
    for table in ["tcp", "tcp6"] {
        // Of the thread: tests run each in a network namespace of its own.
        let text = fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default();
        let rows = text.lines().skip(1);
        found.extend(rows.filter_map(|row| local_end(row.split_whitespace().nth(1)?)));
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// `0100007F:0019`: the words of the address as the machine has them, and the port.
fn local_end(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = Vec::with_capacity(16);
    for at in (0..address.len()).step_by(8) {
        let word = u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let address = match <[u8; 4]>::try_from(&bytes[..]) {
        Ok(four) => IpAddr::V4(Ipv4Addr::from(four)),
        Err(_) => IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(&bytes[..]).ok()?)),
    };
    Some((address.to_canonical(), port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_socket_table_is_read() {
        assert_eq!(
            local_end("0100007F:0019"),
            Some(("127.0.0.1".parse().unwrap(), 25))
        );
        assert_eq!(
            local_end("00000000000000000000000001000000:01D1"),
            Some(("::1".parse().unwrap(), 465))
        );
        for hostile in [
            "",
            ":",
            "01:0019",
            "é0000000:1",
            "0100007F",
            "0100007F:12345",
        ] {
            assert_eq!(local_end(hostile), None, "{hostile}");
        }
    }

    #[test]
    fn ranges_and_holes() {
        let range = |first, last| PortRange { first, last };
        let ports = Ports::of(&[range(1000, 1100), range(65_535, 65_535)])
            .without(&[range(1001, 1001), range(1090, 2000)]);
        assert_eq!(ports.count(), 90);
        assert_eq!(Ports::all().count(), 65_536);
    }
}
