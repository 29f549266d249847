//! The programs loaded in a network namespace of their own: two links, known neighbours, no traffic.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use lb_userspace::{
    dataplane::{KernelPlane, Numbers, Remover},
    model::{
        Attach, Forward, Generation, Log, Member, Method, Mode, Name, Network, OnDown, Pool, Snat,
        VirtualServer,
    },
};

/// What became of a packet, whatever the hook calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Sent,
    Passed,
    Dropped,
}

pub const PROGRAMS: [&str; 3] = ["balance_tc", "balance_xdp", "balance_xdp_generic"];
pub const CLIENT_MAC: [u8; 6] = [2, 0, 0, 0, 1, 2];
pub const MEMBER_MAC: [u8; 6] = [2, 0, 0, 0, 2, 2];

pub struct Rig {
    pub plane: KernelPlane,
    pub generation: Generation,
    pub numbers: Numbers,
    pub program: &'static str,
    bpffs: PathBuf,
    remover: Remover,
}

impl Rig {
    /// Runs `test` once for every program, each in a fresh namespace and with fresh tables.
    pub fn each(
        name: &str,
        generation: impl Fn() -> Generation + Sync,
        flows: u32,
        test: impl Fn(&mut Rig) + Sync,
    ) {
        for program in PROGRAMS {
            std::thread::scope(|scope| {
                let run = scope.spawn(|| {
                    let mut rig = Rig::new(name, program, generation(), flows);
                    test(&mut rig);
                });
                if let Err(panic) = run.join() {
                    eprintln!("{name} fails on {program}");
                    std::panic::resume_unwind(panic);
                }
            });
        }
    }

    fn new(name: &str, program: &'static str, generation: Generation, flows: u32) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "the packet programs need root to load"
        );
        #[expect(
            unsafe_code,
            reason = "only this thread moves to a namespace of its own"
        )]
        // SAFETY: network namespaces are per thread, and no file descriptor table is unshared.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
            .expect("a network namespace");
        let mut lines = [
            "link set lo up",
            "link add c0 type veth peer name c1",
            "link add s0 type veth peer name s1",
            "addr add 10.0.1.1/24 dev c0",
            "addr add 10.0.2.1/24 dev s0",
            "addr add fd00:1::1/64 dev c0 nodad",
            "addr add fd00:2::1/64 dev s0 nodad",
            "link set c0 up",
            "link set c1 up",
            "link set s0 up",
            "link set s1 up",
            "neigh add 10.0.1.2 lladdr 02:00:00:00:01:02 dev c0 nud permanent",
            "neigh add fd00:1::2 lladdr 02:00:00:00:01:02 dev c0 nud permanent",
        ]
        .map(str::to_owned)
        .to_vec();
        for member in 11..=14 {
            for network in ["10.0.2.", "fd00:2::"] {
                lines.push(format!(
                    "neigh add {network}{member} lladdr 02:00:00:00:02:02 dev s0 nud permanent"
                ));
            }
        }
        // In one go: on an emulated machine, starting a program is what takes the time.
        let batch = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(batch.path(), lines.join("\n")).expect("the file");
        ip(&format!("-batch {}", batch.path().display()));
        for family in ["ipv4", "ipv6"] {
            for interface in ["c0", "s0"] {
                std::fs::write(format!("/proc/thread-self/net/../../../sys/net/{family}/conf/{interface}/forwarding"), "1")
                    .or_else(|_| std::fs::write(format!("/proc/sys/net/{family}/conf/{interface}/forwarding"), "1"))
                    .expect("forwarding");
            }
        }
        let bpffs = std::env::temp_dir().join(format!(
            "smtplb-prog-{name}-{program}-{}",
            std::process::id()
        ));
        let mut plane =
            KernelPlane::load(&bpffs, flows, false).unwrap_or_else(|error| panic!("{error:#}"));
        let remover = plane.remover();
        plane
            .pass_natively(&["c0", "s0"])
            .unwrap_or_else(|error| panic!("{error:#}"));
        let numbers = plane.number(&generation).expect("numbers");
        plane
            .apply(&generation, &numbers, |_| true, 1)
            .expect("the generation");
        Self {
            plane,
            generation,
            numbers,
            program,
            bpffs,
            remover,
        }
    }

    /// How often a packet that the stack gets is counted: what XDP passes on, by the TC program behind it.
    pub fn counts_passed(&self) -> u64 {
        u64::from(self.program == "balance_tc")
    }

    /// One frame in by an interface; what became of it, and the frame afterwards.
    pub fn send(&mut self, frame: &[u8], interface: &str) -> (Outcome, Vec<u8>) {
        let (code, out) = self
            .plane
            .run_packet(self.program, frame, index(interface))
            .unwrap_or_else(|error| panic!("{error:#}"));
        let outcome = match (self.program, code as i32) {
            ("balance_tc", 7) | ("balance_xdp" | "balance_xdp_generic", 3 | 4) => Outcome::Sent,
            ("balance_tc", -1) | ("balance_xdp" | "balance_xdp_generic", 2) => Outcome::Passed,
            ("balance_tc", 2) | ("balance_xdp" | "balance_xdp_generic", 1) => Outcome::Dropped,
            other => panic!("unexpected return code {other:?}"),
        };
        (outcome, out)
    }

    /// Goes on with another generation.
    pub fn apply(&mut self, generation: Generation) {
        self.numbers = self.plane.number(&generation).expect("numbers");
        self.plane
            .apply(&generation, &self.numbers, |_| true, 1)
            .unwrap_or_else(|error| panic!("{error:#}"));
        self.generation = generation;
    }

    /// Where the maps are pinned.
    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// How often this reason was counted.
    pub fn drops(&self, reason: &str) -> u64 {
        self.plane.drops()[reason]
    }

    /// The number of a member by its place in the pool.
    pub fn member(&self, pool: &str, place: usize) -> u16 {
        let pool = &self.generation.pools[pool];
        self.numbers.members[&(pool.name.clone(), pool.members[place].address)]
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.remover.remove(&self.generation).expect("the pins go");
        let _ = std::fs::remove_dir(&self.bpffs);
    }
}

/// MAC address of an interface.
pub fn mac(interface: &str) -> [u8; 6] {
    let out = ip(&format!("-o link show {interface}"));
    let words: Vec<_> = out.split_whitespace().collect();
    let at = words
        .iter()
        .position(|word| *word == "link/ether")
        .expect("a MAC address");
    let mut mac = [0; 6];
    for (to, from) in mac.iter_mut().zip(words[at + 1].split(':')) {
        *to = u8::from_str_radix(from, 16).expect("hexadecimal");
    }
    mac
}

pub fn index(interface: &str) -> u32 {
    use rustix::net::{AddressFamily, SocketType, netdevice::name_to_index, socket};
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None).expect("a socket");
    name_to_index(socket, interface).expect("an interface index")
}

pub fn ip(arguments: &str) -> String {
    let out = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .expect("ip runs");
    assert!(
        out.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).expect("text")
}

/// A generation of passthrough virtual servers, each `(name, address, snat, members)` with a pool of its own.
pub fn generation(method: Method, servers: &[(&str, &str, Snat, &[&str])]) -> Generation {
    let mut generation = Generation {
        mode: Mode::Mixed,
        network: Network {
            client_interfaces: vec!["c0".to_owned()],
            server_interfaces: vec!["s0".to_owned()],
            attach: Attach::Auto,
            max_flows: 1024,
            snat_ports: None,
            snat_exclude: Vec::new(),
            vlans: Default::default(),
            guard: Default::default(),
        },
        log: Log {
            flows: true,
            flows_per_second: 1000,
        },
        virtual_servers: Vec::new(),
        pools: Default::default(),
        monitors: Default::default(),
        certificates: Default::default(),
        snat_pools: Default::default(),
        timeouts: Default::default(),
        session: Default::default(),
        policies: Default::default(),
    };
    for (name, address, snat, members) in servers {
        let address: SocketAddr = address.parse().expect("an address");
        let name: Name = Arc::from(*name);
        let members = members
            .iter()
            .map(|member| Member {
                name: Arc::from(*member),
                address: member.parse().expect("an address"),
            })
            .collect();
        generation.virtual_servers.push(Arc::new(VirtualServer {
            name: name.clone(),
            at: address.into(),
            forward: Forward::Passthrough {
                snat: snat.clone(),
                proxy_protocol: name.starts_with("told"),
            },
            pool: name.clone(),
            guard: Default::default(),
        }));
        let pool = Pool {
            name: name.clone(),
            method,
            monitor: None,
            on_down: OnDown::Leave,
            members,
        };
        generation.pools.insert(name, Arc::new(pool));
    }
    generation
}
