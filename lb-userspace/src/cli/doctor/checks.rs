//! The looks at the box: what is read, and how it is judged.

use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{Finding, Level};
use crate::{
    dataplane::Feature,
    model::{Attach, Forward, Generation},
};

/// Fewer SNAT ports than this fill up on a busy day.
const FEW_PORTS: u16 = 8192;
/// Fewer descriptors than this limit the proxy before its memory does: a session has two.
const FEW_FILES: u64 = 65_536;
/// The proxy asks for this many waiting connections per listener.
const BACKLOG: u64 = 4096;
/// 2025-01-01: a clock before it was never set.
const EARLIEST: Duration = Duration::from_secs(1_735_689_600);

/// The box, seen through its files below a root: another one in tests.
pub(super) struct Box {
    root: PathBuf,
}

impl Box {
    pub(super) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    fn read(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.root.join(path.trim_start_matches('/'))).ok()?;
        Some(text.trim().to_owned())
    }

    fn number(&self, path: &str) -> Option<u64> {
        self.read(path)?.parse().ok()
    }

    /// The kernel and what it has.
    pub(super) fn kernel(&self, features: &[Feature]) -> Vec<Finding> {
        let release = self.read("/proc/sys/kernel/osrelease").unwrap_or_default();
        let mut parts = release
            .split(['.', '-'])
            .map_while(|part| part.parse::<u32>().ok());
        let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        let mut findings = vec![match version >= (5, 15) {
            true => Finding::ok("kernel", release),
            false => Finding::new(
                "kernel",
                Level::Wrong,
                format!("{release} is older than 5.15"),
                "Boot Linux 5.15 or newer.",
            ),
        }];
        findings.push(match self.root.join("sys/kernel/btf/vmlinux").exists() {
            true => Finding::ok("kernel types (BTF)", "there"),
            false => Finding::new(
                "kernel types (BTF)",
                Level::Wrong,
                "/sys/kernel/btf/vmlinux is missing",
                "Use a kernel built with CONFIG_DEBUG_INFO_BTF=y; those of distributions are.",
            ),
        });
        findings.extend(features.iter().map(feature));
        findings
    }

    /// The privileges and limits of whoever asks.
    pub(super) fn process(&self) -> Vec<Finding> {
        let status = self.read("/proc/self/status").unwrap_or_default();
        let effective = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))
            .and_then(|word| u64::from_str_radix(word.trim(), 16).ok())
            .unwrap_or(0);
        let missing: Vec<_> = [
            ("CAP_NET_ADMIN", 12),
            ("CAP_NET_RAW", 13),
            ("CAP_PERFMON", 38),
            ("CAP_BPF", 39),
        ]
        .into_iter()
        .filter(|(_, bit)| effective & (1 << bit) == 0)
        .map(|(name, _)| name)
        .collect();
        let mut findings = vec![match missing.is_empty() {
            true => Finding::ok("capabilities", "all four"),
            false => Finding::new(
                "capabilities",
                Level::Unknown,
                format!("this command lacks {}", missing.join(", ")),
                "Run it as root; the installed service has its own.",
            ),
        }];
        let limits = self.read("/proc/self/limits").unwrap_or_default();
        let files = limits
            .lines()
            .find_map(|line| line.strip_prefix("Max open files"))
            .and_then(|line| line.split_whitespace().nth(1))
            .and_then(|word| word.parse::<u64>().ok());
        if let Some(files) = files {
            findings.push(match files >= FEW_FILES {
                true => Finding::ok("open files", format!("{files} at most")),
                false => Finding::new(
                    "open files",
                    Level::Warning,
                    format!("{files} at most, so {} proxy sessions", files / 2),
                    "Raise the hard limit (ulimit -Hn, LimitNOFILE=); the installed unit does.",
                ),
            });
        }
        findings
    }

    /// Settings of the whole box.
    pub(super) fn system(&self) -> Vec<Finding> {
        let mut findings = vec![self.ports(), clock(SystemTime::now())];
        if let Some(most) = self.number("/proc/sys/net/core/somaxconn") {
            findings.push(match most >= BACKLOG {
                true => Finding::ok("waiting connections", format!("{most} per listener")),
                false => Finding::new(
                    "waiting connections",
                    Level::Warning,
                    format!("net.core.somaxconn = {most} is less than the proxy asks for"),
                    "sysctl -w net.core.somaxconn=4096",
                ),
            });
        }
        findings.push(self.conntrack());
        findings.push(self.neighbours());
        findings
    }

    fn ports(&self) -> Finding {
        let check = "SNAT ports";
        let text = self.read("/proc/sys/net/ipv4/ip_local_port_range");
        let mut bounds = text.as_deref().unwrap_or_default().split_whitespace();
        let mut bound = || bounds.next().and_then(|word| word.parse::<u16>().ok());
        let (Some(low), Some(high)) = (bound(), bound()) else {
            return Finding::new(check, Level::Unknown, "no net.ipv4.ip_local_port_range", "");
        };
        let free = low.saturating_sub(1024).max(u16::MAX - high);
        match free >= FEW_PORTS {
            true => Finding::ok(check, format!("{free} beside the box's own {low}-{high}")),
            false => Finding::new(
                check,
                Level::Warning,
                format!(
                    "net.ipv4.ip_local_port_range = {low} {high} leaves {free}, and so {free} passthrough connections to \
                     a member at a time"
                ),
                "sysctl -w net.ipv4.ip_local_port_range='32768 60999'",
            ),
        }
    }

    fn conntrack(&self) -> Finding {
        let check = "connection tracking";
        let folder = "/proc/sys/net/netfilter";
        let count = self.number(&format!("{folder}/nf_conntrack_count"));
        let most = self.number(&format!("{folder}/nf_conntrack_max"));
        match (count, most) {
            (Some(count), Some(most)) if count >= most / 10 * 9 => Finding::new(
                check,
                Level::Wrong,
                format!("{count} of {most} entries are in use"),
                "When it is full, new sessions of the proxy are dropped: raise net.netfilter.nf_conntrack_max, or add \
                 `notrack` rules for the virtual addresses. Passthrough flows do not use it.",
            ),
            (Some(count), Some(most)) => Finding::ok(
                check,
                format!(
                    "{count} of {most} entries; passthrough flows use none, but resets of ended flows count as invalid: \
                     a rule that drops `ct state invalid` on output would stop them"
                ),
            ),
            _ => Finding::ok(check, "not loaded"),
        }
    }

    fn neighbours(&self) -> Finding {
        let check = "neighbours";
        let table = self.read("/proc/net/arp").unwrap_or_default();
        let known = table.lines().skip(1).count() as u64;
        let most = self.number("/proc/sys/net/ipv4/neigh/default/gc_thresh3");
        let most = most.unwrap_or(1024);
        if known >= most / 10 * 9 {
            return Finding::new(
                check,
                Level::Wrong,
                format!("{known} of at most {most} IPv4 neighbours are known"),
                "Beyond it packets are lost: raise net.ipv4.neigh.default.gc_thresh3.",
            );
        }
        Finding::ok(check, format!("{known} of at most {most} known"))
    }

    /// The interfaces and members of a configuration.
    pub(super) fn network(&self, generation: &Generation) -> Vec<Finding> {
        let network = &generation.network;
        let mut names: Vec<&String> = network.client_interfaces.iter().collect();
        for name in &network.server_interfaces {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let mut families = BTreeSet::new();
        for server in &generation.virtual_servers {
            if matches!(server.forward, Forward::Passthrough { .. }) {
                families.insert(match server.at.address {
                    IpAddr::V4(_) => "ipv4",
                    IpAddr::V6(_) => "ipv6",
                });
            }
        }
        let mut findings = Vec::new();
        for name in names {
            let folder = self.root.join("sys/class/net").join(name);
            if !folder.exists() {
                findings.push(Finding::new(
                    &format!("interface {name}"),
                    Level::Wrong,
                    "there is none of this name",
                    "Correct client_interfaces or server_interfaces, or create it.",
                ));
                continue;
            }
            findings.push(self.link(name));
            for family in &families {
                findings.push(self.forwarding(family, name));
            }
            if network.client_interfaces.contains(name) {
                findings.extend(self.reverse_path(name, network.client_interfaces.len()));
            }
            findings.extend(self.offloads(name, network.attach));
        }
        findings.extend(self.unreachable(generation));
        findings
    }

    fn link(&self, name: &str) -> Finding {
        let check = format!("interface {name}");
        let state = self.read(&format!("/sys/class/net/{name}/operstate"));
        match state.as_deref() {
            Some("up" | "unknown") => Finding::ok(&check, "up"),
            state => Finding::new(
                &check,
                Level::Wrong,
                format!("is {}", state.unwrap_or("in no known state")),
                &format!("ip link set {name} up; look at its cable or peer."),
            ),
        }
    }

    fn forwarding(&self, family: &str, name: &str) -> Finding {
        let check = format!("forwarding of {family} on {name}");
        match self.number(&format!("/proc/sys/net/{family}/conf/{name}/forwarding")) {
            Some(0) => Finding::new(
                &check,
                Level::Warning,
                "off",
                "smtplb switches it on when it starts. If it runs, another program has switched it off again: find which.",
            ),
            Some(_) => Finding::ok(&check, "on"),
            None => Finding::new(
                &check,
                Level::Wrong,
                format!("{name} has no {family}"),
                "Switch the family on there (sysctl disable_ipv6), or remove its virtual servers.",
            ),
        }
    }

    /// The programs send packets on before the stack looks at their sources; sessions of the proxy pass the stack.
    fn reverse_path(&self, name: &str, clients: usize) -> Option<Finding> {
        let of = |name: &str| self.number(&format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"));
        let strict = of("all").unwrap_or(0).max(of(name).unwrap_or(0)) == 1;
        (strict && clients > 1).then(|| {
            Finding::new(
                &format!("reverse path filter on {name}"),
                Level::Warning,
                "strict, and clients arrive on more than one interface",
                &format!(
                    "Sessions of clients that are routed by another interface are dropped unseen: \
                     sysctl -w net.ipv4.conf.{name}.rp_filter=2"
                ),
            )
        })
    }

    fn offloads(&self, name: &str, attach: Attach) -> Option<Finding> {
        let physical = self
            .root
            .join("sys/class/net")
            .join(name)
            .join("device")
            .exists();
        let xdp = matches!(attach, Attach::Xdp | Attach::XdpGeneric);
        (xdp && !physical).then(|| {
            Finding::new(
                &format!("offloads of {name}"),
                Level::Warning,
                "XDP on a virtual link loses partial checksums and segmentation",
                "Use attach = \"auto\", or switch them off at both ends: ethtool -K IF tx off gro on.",
            )
        })
    }

    /// Members that the kernel has asked for in vain.
    fn unreachable(&self, generation: &Generation) -> Vec<Finding> {
        let table = self.read("/proc/net/arp").unwrap_or_default();
        let silent: BTreeSet<&str> = table
            .lines()
            .skip(1)
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                let (address, _, flags) = (words.next()?, words.next()?, words.next()?);
                (flags == "0x0").then_some(address)
            })
            .collect();
        let mut findings = Vec::new();
        for pool in generation.pools.values() {
            for member in &pool.members {
                let address = member.address.ip().to_string();
                if silent.contains(address.as_str()) {
                    findings.push(Finding::new(
                        &format!("member {}/{}", pool.name, member.name),
                        Level::Warning,
                        format!("{address} does not answer ARP"),
                        "Is it switched on, and on this network?",
                    ));
                }
            }
        }
        findings
    }
}

fn feature(feature: &Feature) -> Finding {
    let (major, minor) = feature.since;
    let missing = format!("missing; Linux {major}.{minor} has it");
    match (feature.present, feature.without) {
        (Some(true), _) => Finding::ok(feature.name, "there"),
        (Some(false), None) => Finding::new(
            feature.name,
            Level::Wrong,
            missing,
            "Boot a newer kernel, or one with this switched on.",
        ),
        (Some(false), Some(without)) => {
            Finding::new(feature.name, Level::Warning, missing, without)
        }
        (None, _) => Finding::new(
            feature.name,
            Level::Unknown,
            "the kernel may not be asked",
            "Run this command as root.",
        ),
    }
}

fn clock(now: SystemTime) -> Finding {
    let age = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    match age >= EARLIEST {
        true => Finding::ok("clock", "set"),
        false => Finding::new(
            "clock",
            Level::Wrong,
            "stands before 2025",
            "Certificates would count as not yet valid: start a time service.",
        ),
    }
}

pub(super) fn bpffs(path: &Path) -> Finding {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mounted = mounts.lines().any(|line| {
        let mut words = line.split(' ').skip(1);
        words.next() == path.to_str() && words.next() == Some("bpf")
    });
    match (mounted, path.exists()) {
        (true, _) => Finding::ok("bpffs", format!("{} is one", path.display())),
        (false, true) => Finding::ok(
            "bpffs",
            format!("{} is mounted when needed", path.display()),
        ),
        (false, false) => Finding::ok("bpffs", format!("{} is made when needed", path.display())),
    }
}

pub(super) fn state(path: &Path) -> Finding {
    let check = "state directory";
    match fs::metadata(path) {
        Ok(found) if found.is_dir() && !found.permissions().readonly() => {
            Finding::ok(check, path.display().to_string())
        }
        Ok(_) => Finding::new(
            check,
            Level::Wrong,
            format!("{} is no directory that can be written", path.display()),
            "States of members and settings to set back are kept there: name another with --state.",
        ),
        Err(_) => Finding::ok(check, format!("{} is made when needed", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A box of these files.
    fn a_box(files: &[(&str, &str)]) -> (tempfile::TempDir, Box) {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let the_box = Box::new(folder.path());
        (folder, the_box)
    }

    fn worst(findings: &[Finding]) -> Level {
        findings
            .iter()
            .map(|finding| finding.level)
            .max()
            .unwrap_or(Level::Ok)
    }

    #[test]
    fn an_old_kernel_is_wrong_and_a_missing_feature_is_named() {
        let (_folder, old) = a_box(&[("proc/sys/kernel/osrelease", "5.10.0-28-amd64\n")]);
        assert_eq!(old.kernel(&[])[0].level, Level::Wrong);
        let (_folder, new) = a_box(&[
            ("proc/sys/kernel/osrelease", "6.1.0\n"),
            ("sys/kernel/btf/vmlinux", ""),
        ]);
        let mut tcx = Feature {
            name: "tcx links",
            since: (6, 6),
            without: Some("less"),
            present: Some(false),
        };
        let findings = new.kernel(std::slice::from_ref(&tcx));
        assert_eq!(worst(&findings), Level::Warning);
        assert_eq!(findings[2].found, "missing; Linux 6.6 has it");
        tcx.without = None;
        assert_eq!(worst(&new.kernel(&[tcx])), Level::Wrong);
    }

    #[test]
    fn a_narrow_range_of_ports_and_a_full_table_are_told() {
        let (_folder, narrow) = a_box(&[
            ("proc/sys/net/ipv4/ip_local_port_range", "2048\t64000\n"),
            ("proc/sys/net/netfilter/nf_conntrack_count", "950\n"),
            ("proc/sys/net/netfilter/nf_conntrack_max", "1000\n"),
        ]);
        assert_eq!(narrow.ports().level, Level::Warning);
        assert!(narrow.ports().found.contains("leaves 1535"));
        assert_eq!(narrow.conntrack().level, Level::Wrong);
        let (_folder, usual) =
            a_box(&[("proc/sys/net/ipv4/ip_local_port_range", "32768\t60999\n")]);
        assert_eq!(usual.ports().level, Level::Ok);
        assert_eq!(usual.conntrack().level, Level::Ok);
    }

    #[test]
    fn interfaces_and_members_are_looked_at() {
        let text = r#"
            [network]
            client_interfaces = ["eth0", "eth2"]
            server_interfaces = ["eth1"]
            attach = "xdp"
            [virtual_server.s]
            address = "203.0.113.1"
            port = 465
            forward = "passthrough"
            pool = "p"
            [pool.p]
            [[pool.p.member]]
            address = "10.0.0.9"
            port = 465
        "#;
        let (generation, _) = crate::config::parse("smtplb.toml", text).unwrap();
        let (_folder, the_box) = a_box(&[
            ("sys/class/net/eth0/operstate", "up\n"),
            ("sys/class/net/eth1/operstate", "down\n"),
            ("proc/sys/net/ipv4/conf/all/rp_filter", "1\n"),
            ("proc/sys/net/ipv4/conf/eth0/forwarding", "0\n"),
            ("proc/sys/net/ipv4/conf/eth1/forwarding", "1\n"),
            (
                "proc/net/arp",
                "IP address HW type Flags HW\n10.0.0.9 0x1 0x0 00:00:00:00:00:00 * eth1\n",
            ),
        ]);
        let findings = the_box.network(&generation);
        let level = |check: &str| {
            let found = findings.iter().find(|finding| finding.check == check);
            found
                .unwrap_or_else(|| panic!("{check}: {findings:?}"))
                .level
        };
        assert_eq!(level("interface eth0"), Level::Ok);
        assert_eq!(level("interface eth1"), Level::Wrong);
        assert_eq!(level("interface eth2"), Level::Wrong);
        assert_eq!(level("forwarding of ipv4 on eth0"), Level::Warning);
        assert_eq!(level("forwarding of ipv4 on eth1"), Level::Ok);
        assert_eq!(level("reverse path filter on eth0"), Level::Warning);
        assert_eq!(level("offloads of eth0"), Level::Warning);
        assert_eq!(level("member p/10.0.0.9:465"), Level::Warning);
    }

    #[test]
    fn a_clock_that_was_never_set() {
        assert_eq!(clock(UNIX_EPOCH).level, Level::Wrong);
        assert_eq!(clock(UNIX_EPOCH + EARLIEST).level, Level::Ok);
    }
}
