//! The kernel plane in a namespace of its own, with as many flows as a test wants: opened by their own first packets.

use std::{
    net::SocketAddrV4,
    path::{Path, PathBuf},
    sync::Barrier,
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use aya::programs::ProgramFd;
use lb_common::{addr::Addr, tcp::Phase};
use lb_userspace::{
    dataplane::{FlowSnapshot, KernelPlane, Remover},
    model::Generation,
};
use rustix::net::{AddressFamily, SocketType, netdevice::name_to_index, socket};

use super::replay::{Ends, Hook, Replay, Run};
use crate::lab::{self, Namespace};

/// TCP flags.
pub const SYN: u8 = 0x02;
/// Of a client that has had enough.
pub const RST: u8 = 0x04;
/// Of everything else.
pub const ACK: u8 = 0x10;
/// No more data from the sender.
pub const FIN: u8 = 0x01;
/// The virtual server.
pub const SERVICE: SocketAddrV4 = SocketAddrV4::new(std::net::Ipv4Addr::new(10, 0, 1, 100), 465);

/// Where a packet comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// By the interface towards clients.
    Clients,
    /// By the interface towards members.
    Members,
}

/// The kernel plane, and packets for it.
pub struct Population {
    plane: Option<KernelPlane>,
    remover: Remover,
    generation: Generation,
    bpffs: PathBuf,
    /// What puts the packets in front of the programs.
    pub replay: Replay,
    interfaces: [u32; 2],
}

/// Makes a namespace with two links and known neighbours, and runs `work` in it.
///
/// # Errors
/// When this is not root, and what `work` returns.
pub fn alone<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = lab::lone_machine("alone")?;
    wire(&namespace)?;
    namespace.enter(work)
}

fn wire(namespace: &Namespace) -> Result<()> {
    namespace.ip(&[
        "link add c0 type veth peer name c1",
        "link add s0 type veth peer name s1",
        "addr add 10.0.1.1/24 dev c0",
        "addr add 10.0.2.1/24 dev s0",
        "link set c0 up",
        "link set c1 up",
        "link set s0 up",
        "link set s1 up",
        "neigh add 10.0.1.2 lladdr 02:00:00:00:01:02 dev c0 nud permanent",
        "neigh add 10.0.2.11 lladdr 02:00:00:00:02:02 dev s0 nud permanent",
        "route add 10.64.0.0/10 via 10.0.1.2",
    ]
    .map(str::to_owned))?;
    for (name, value) in [
        ("net/ipv4/ip_forward", "1"),
        // Nearly every port is left for SNAT.
        ("net/ipv4/ip_local_port_range", "1024 2047"),
    ] {
        namespace.sysctl(name, value)?;
    }
    Ok(())
}

/// A configuration with one virtual server, and `members` members that are all on one address: each port is a range of
/// SNAT ports of its own. `more` is put in front of it.
pub fn config(members: u16, snat: &str, more: &str) -> String {
    let mut text = format!(
        "[network]\nclient_interfaces = [\"c0\"]\nserver_interfaces = [\"s0\"]\n{more}\n\
         [virtual_server.mx]\naddress = \"{}\"\nport = {}\nforward = \"passthrough\"\npool = \"mx\"\n\
         snat = \"{snat}\"\n[pool.mx]\nmethod = \"round-robin\"\n",
        SERVICE.ip(),
        SERVICE.port()
    );
    for number in 0..members {
        text.push_str(&format!(
            "[[pool.mx.member]]\nname = \"m{number}\"\naddress = \"10.0.2.11\"\nport = {}\n",
            4000 + number
        ));
    }
    text
}

impl Population {
    /// Loads the plane, with nothing attached, for this many flows and lists of this many packets.
    ///
    /// # Errors
    /// When the configuration is faulty, or the kernel refuses something.
    pub fn new(config: &str, flows: u32, packets: u32) -> Result<Self> {
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), config)?;
        let (generation, _) =
            lb_userspace::config::load(file.path()).map_err(|error| anyhow!("{error}"))?;
        let bpffs = std::env::temp_dir().join(format!("smtplb-alone-{}", std::process::id()));
        let mut plane = KernelPlane::load(&bpffs, flows, false)?;
        let remover = plane.remover();
        // A test-run that comes from an interface needs it to have a program.
        plane.pass_natively(&["c0", "s0"])?;
        let numbers = plane.number(&generation)?;
        plane.apply(&generation, &numbers, |_| true, 1)?;
        let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
        Ok(Self {
            plane: Some(plane),
            remover,
            generation,
            bpffs,
            replay: Replay::load(packets.next_power_of_two())?,
            interfaces: [name_to_index(&socket, "c0")?, name_to_index(&socket, "s0")?],
        })
    }

    /// The plane.
    ///
    /// # Errors
    /// Never, while the value lives.
    pub fn plane(&mut self) -> Result<&mut KernelPlane> {
        self.plane.as_mut().context("the plane is gone")
    }

    /// Lets go of the plane, as a daemon that dies does; where the next one finds it.
    pub fn leave(&mut self) -> &Path {
        self.plane = None;
        &self.bpffs
    }

    /// Every flow.
    ///
    /// # Errors
    /// As [`Self::plane`].
    pub fn flows(&mut self) -> Result<Vec<FlowSnapshot>> {
        Ok(self.plane()?.flows())
    }

    /// The program of a hook that packets come to first.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn program(&mut self, hook: Hook) -> Result<ProgramFd> {
        self.plane()?.program(&format!("balance_{}", hook.name()))
    }

    /// Runs packets of the list through the program of a hook, or through one that does nothing.
    ///
    /// # Errors
    /// When the kernel refuses to.
    pub fn run(&mut self, hook: Hook, full: bool, count: u32, from: From) -> Result<Run> {
        let program = match full {
            true => Some(self.program(hook)?),
            false => None,
        };
        let ingress = self.interfaces[from as usize];
        self.replay.run(hook, program.as_ref(), count, ingress)
    }

    /// Sends packets by TC; what became of the last one.
    ///
    /// # Errors
    /// When the kernel refuses to.
    pub fn send(
        &mut self,
        packets: impl ExactSizeIterator<Item = Ends>,
        from: From,
    ) -> Result<Run> {
        let count = u32::try_from(packets.len())?;
        self.replay.fill(packets)?;
        self.run(Hook::Tc, true, count, from)
    }

    /// As [`Self::send`], where the last one has to go on.
    ///
    /// # Errors
    /// When it does not.
    pub fn carry(
        &mut self,
        packets: impl ExactSizeIterator<Item = Ends>,
        from: From,
    ) -> Result<()> {
        let run = self.send(packets, from)?;
        ensure!(
            run.verdict == Hook::Tc.sent(),
            "verdict {}: {:?}",
            run.verdict,
            self.plane()?.drops()
        );
        Ok(())
    }

    /// Opens flows of clients by number, and establishes them; packets of every flow, from clients and from members.
    ///
    /// # Errors
    /// When not every one opens.
    pub fn open(&mut self, numbers: std::ops::Range<u32>) -> Result<(Vec<Ends>, Vec<Ends>)> {
        let wanted = self.flows()?.len() + numbers.len();
        self.open_more(numbers)?;
        let flows = self.flows()?;
        ensure!(flows.len() == wanted, "{} of {wanted} flows", flows.len());
        self.packets()
    }

    /// As [`Self::open`], where records of ended flows may be used again.
    ///
    /// # Errors
    /// When not every one opens.
    pub fn open_more(&mut self, numbers: std::ops::Range<u32>) -> Result<()> {
        let mut at = numbers.start;
        while at < numbers.end {
            // As in life, none stays half-open for long: old ones would make room for new ones.
            let upto = numbers.end.min(at + STEP);
            let first = (at..upto).map(|number| packet_of(number, SYN));
            self.carry(first, From::Clients)?;
            self.establish((upto - at) as usize)?;
            at = upto;
        }
        Ok(())
    }

    /// Packets of every flow that is established, from clients and from members.
    ///
    /// # Errors
    /// As [`Self::plane`].
    pub fn packets(&mut self) -> Result<(Vec<Ends>, Vec<Ends>)> {
        let flows = self.flows()?;
        let open = flows.iter().filter(|flow| flow.phase == Phase::Established);
        let packets: Vec<_> = open.map(packets).collect::<Result<_>>()?;
        Ok(packets.into_iter().unzip())
    }

    /// Sends lists of packets by TC, each by a thread and a replay of its own, all at the same time.
    ///
    /// # Errors
    /// When the kernel refuses to.
    pub fn send_at_once(
        &mut self,
        replays: &mut [Replay],
        lists: Vec<Vec<Ends>>,
        from: From,
    ) -> Result<()> {
        let (program, ingress) = (self.program(Hook::Tc)?, self.interfaces[from as usize]);
        let counts: Vec<u32> = lists.iter().map(|list| list.len() as u32).collect();
        for (replay, list) in replays.iter_mut().zip(lists) {
            replay.fill(list.into_iter())?;
        }
        let start = Barrier::new(counts.len());
        std::thread::scope(|scope| {
            let threads = replays.iter_mut().zip(counts).map(|(replay, count)| {
                let (start, program) = (&start, &program);
                scope.spawn(move || {
                    start.wait();
                    replay.run(Hook::Tc, Some(program), count, ingress)
                })
            });
            let threads: Vec<_> = threads.collect();
            for thread in threads {
                thread.join().map_err(|_| anyhow!("a thread has died"))??;
            }
            Ok(())
        })
    }

    /// Completes the handshakes of all half-open flows.
    ///
    /// # Errors
    /// When there are more or fewer than expected.
    pub fn establish(&mut self, expected: usize) -> Result<()> {
        let (mut clients, mut members) = (Vec::new(), Vec::new());
        for flow in self.flows()?.iter().filter(|flow| flow.phase == Phase::Syn) {
            let (client, member) = packets(flow)?;
            members.push(Ends {
                flags: SYN | ACK,
                ..member
            });
            clients.push(client);
        }
        ensure!(
            clients.len() == expected,
            "{} of {expected} flows opened: {:?}",
            clients.len(),
            self.plane()?.drops()
        );
        self.carry(members.into_iter(), From::Members)?;
        self.carry(clients.into_iter(), From::Clients)
    }
}

/// Flows that are opened at a time: with more of them half-open, clients would get SYN cookies.
pub const STEP: u32 = 1 << 13;

/// What an established flow looks like, from the client and from the member.
fn packets(flow: &FlowSnapshot) -> Result<(Ends, Ends)> {
    let client = Ends {
        src: end(flow.route.client())?,
        dst: SERVICE,
        flags: ACK,
    };
    let member = Ends {
        src: end(flow.route.member())?,
        dst: end(flow.route.snat())?,
        flags: ACK,
    };
    Ok((client, member))
}

impl Drop for Population {
    fn drop(&mut self) {
        self.plane = None;
        if let Err(error) = self.remover.remove(&self.generation) {
            eprintln!("{error:#}");
        }
        let _ = std::fs::remove_dir(&self.bpffs);
    }
}

/// A client of its own for each number, as spread as clients are.
pub fn packet_of(number: u32, flags: u8) -> Ends {
    let address = 0x0a40_0000 | (number >> 2);
    let port = 20_000 + (number & 3) * 977 + (number >> 7) % 500;
    Ends {
        src: SocketAddrV4::new(address.into(), port as u16),
        dst: SERVICE,
        flags,
    }
}

fn end((address, port): (Addr, u16)) -> Result<SocketAddrV4> {
    match address.to_socket_addr(port) {
        std::net::SocketAddr::V4(end) => Ok(end),
        std::net::SocketAddr::V6(end) => bail!("{end} is not of this population"),
    }
}
