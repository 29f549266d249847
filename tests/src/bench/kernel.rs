//! `cargo xtask bench kernel`: nanoseconds per packet, by the kernel's test-run.
//!
//! A replay program makes each packet of a run another one and calls the packet program; the same replay in front of a
//! program that does nothing is what is subtracted, and what the ratio is to. Every population is walked in random
//! order, and each packet waits for the one before: a table's cache misses are paid in full, as they are on a wire.

use std::{collections::BTreeMap, net::SocketAddrV4, path::PathBuf};

use anyhow::{Context, Result, ensure};
use lb_common::addr::Addr;
use lb_userspace::{
    dataplane::{KernelPlane, Remover},
    model::Generation,
};
use rustix::net::{AddressFamily, SocketType, netdevice::name_to_index, socket};
use serde::Serialize;

use super::{
    Machine, Spread,
    replay::{Ends, Hook, Replay},
};
use crate::lab::{self, Namespace};

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const SERVICE: &str = "10.0.1.100:465";
/// Members, all on one address: each port is a range of SNAT ports of its own.
const MEMBERS: u16 = 32;
/// Packets of a run where one flow is enough.
const HOT_RUN: u32 = 1 << 18;
/// First packets of a run.
const NEW_RUN: u32 = 1 << 14;

/// How much to measure.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Options {
    /// Rounds, in each of which everything is measured once
    #[arg(long, default_value_t = 9)]
    pub rounds: u32,
    /// The largest number of flows, a power of two
    #[arg(long, default_value_t = 1 << 20)]
    pub flows: u32,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// One figure.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// `tc`, `xdp`, `xdp_generic`
    pub hook: &'static str,
    /// `forward`, `reverse`, `syn`, `untouched`
    pub packet: &'static str,
    /// How many flows the packets belong to; their number where they belong to none.
    pub flows: u32,
    /// Nanoseconds per packet of the replay in front of the program that does nothing.
    pub empty_ns: Spread,
    /// Nanoseconds per packet beyond that.
    pub net_ns: Spread,
    /// Replay and program together by replay alone.
    pub ratio: Spread,
}

/// Everything.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Where and when.
    pub machine: Machine,
    /// Rounds.
    pub rounds: u32,
    /// Instructions that the verifier walked, by program; absent where the kernel does not tell.
    pub verified: BTreeMap<String, u32>,
    /// Figures, by number of flows, packet and hook.
    pub figures: Vec<Figure>,
}

impl Report {
    /// For people.
    pub fn text(&self) -> String {
        let mut text = format!(
            "{}; {} rounds: median (lowest–highest)\n\n{:<10} {:>8}  {:<12} {:>20} {:>20} {:>18}\n",
            self.machine.text(),
            self.rounds,
            "PACKET",
            "FLOWS",
            "HOOK",
            "NET NS",
            "EMPTY NS",
            "RATIO"
        );
        for figure in &self.figures {
            text.push_str(&format!(
                "{:<10} {:>8}  {:<12} {:>20} {:>20} {:>18}\n",
                figure.packet,
                figure.flows,
                figure.hook,
                figure.net_ns.text(0),
                figure.empty_ns.text(0),
                figure.ratio.text(1)
            ));
        }
        for (program, count) in &self.verified {
            text.push_str(&format!("{program}: {count} instructions verified\n"));
        }
        text
    }
}

/// Measures everything.
///
/// # Errors
/// When this is not root, or something was not carried that should have been: then no figure would mean anything.
pub fn run(options: Options) -> Result<Report> {
    ensure!(
        options.flows.is_power_of_two() && options.flows >= 1 << 10,
        "--flows has to be a power of two from 1024"
    );
    let machine = Machine::this();
    let namespace = lab::lone_machine("bench")?;
    namespace.enter(|| {
        wire(&namespace)?;
        let mut report = Report {
            machine,
            rounds: options.rounds,
            verified: BTreeMap::new(),
            figures: Vec::new(),
        };
        let middle = (1 << 16).min(options.flows);
        let mut bench = Bench::new(middle, options.rounds)?;
        for hook in Hook::ALL {
            let program = format!("balance_{}", hook.name());
            if let Ok(count) = bench.plane()?.verified_instructions(&program) {
                report.verified.insert(program, count);
            }
        }
        bench.open(middle)?;
        bench.measure(1, &mut report.figures)?;
        bench.measure(middle, &mut report.figures)?;
        drop(bench);
        if options.flows > middle {
            let mut bench = Bench::new(options.flows, options.rounds)?;
            bench.open(options.flows)?;
            bench.measure(options.flows, &mut report.figures)?;
        }
        let all = NEW_RUN * 3 * options.rounds;
        let mut bench = Bench::new(all.next_power_of_two(), options.rounds)?;
        bench.measure_new(&mut report.figures)?;
        Ok(report)
    })
}

/// Two links, with neighbours that are known.
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

/// The kernel plane with one population.
struct Bench {
    // Dropped first: nothing holds a pin any more when they go.
    plane: Option<KernelPlane>,
    remover: Remover,
    generation: Generation,
    bpffs: PathBuf,
    replay: Replay,
    rounds: u32,
    interfaces: [u32; 2],
    forward: Vec<Ends>,
    reverse: Vec<Ends>,
}

impl Bench {
    fn new(flows: u32, rounds: u32) -> Result<Self> {
        let generation = generation()?;
        let bpffs = std::env::temp_dir().join(format!("smtplb-bench-{}", std::process::id()));
        // A little room: the table must not be what makes new flows slow.
        let mut plane = KernelPlane::load(&bpffs, flows + flows / 4, false)?;
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
            replay: Replay::load(flows.max(1 << 16))?,
            rounds,
            interfaces: [name_to_index(&socket, "c0")?, name_to_index(&socket, "s0")?],
            forward: Vec::new(),
            reverse: Vec::new(),
        })
    }

    fn plane(&mut self) -> Result<&mut KernelPlane> {
        self.plane.as_mut().context("the plane is gone")
    }

    /// Opens flows by their first three packets, and learns what members take for the clients.
    fn open(&mut self, count: u32) -> Result<()> {
        let [clients, servers] = self.interfaces;
        let first = (0..count).map(|number| packet_of(number, SYN));
        self.replay.fill(first)?;
        self.run_all(Hook::Tc, count, clients)?;
        let flows: Vec<_> = self.plane()?.flow_table().all().collect();
        ensure!(
            flows.len() == count as usize,
            "{} of {count} flows opened: {:?}",
            flows.len(),
            self.plane()?.drops()
        );
        for flow in &flows {
            let (client, service) = (end(flow.route.client())?, SERVICE.parse()?);
            let [member, snat] = [end(flow.route.member())?, end(flow.route.snat())?];
            self.forward.push(Ends {
                src: client,
                dst: service,
                flags: ACK,
            });
            self.reverse.push(Ends {
                src: member,
                dst: snat,
                flags: ACK,
            });
        }
        shuffle(&mut self.forward);
        shuffle(&mut self.reverse);
        let answers = self.reverse.iter().map(|ends| Ends {
            flags: SYN | ACK,
            ..*ends
        });
        self.replay.fill(answers)?;
        self.run_all(Hook::Tc, count, servers)?;
        self.replay.fill(self.forward.iter().copied())?;
        self.run_all(Hook::Tc, count, clients)
    }

    fn run_all(&mut self, hook: Hook, count: u32, ingress: u32) -> Result<()> {
        let program = self.program(hook)?;
        let run = self.replay.run(hook, Some(&program), count, ingress)?;
        ensure!(
            run.verdict == hook.sent(),
            "{}: verdict {} instead of {}; {:?}",
            hook.name(),
            run.verdict,
            hook.sent(),
            self.plane()?.drops()
        );
        Ok(())
    }

    fn program(&mut self, hook: Hook) -> Result<aya::programs::ProgramFd> {
        self.plane()?.program(&format!("balance_{}", hook.name()))
    }

    /// Packets of established flows in both directions, and packets of none, for every hook.
    fn measure(&mut self, flows: u32, figures: &mut Vec<Figure>) -> Result<()> {
        let run = flows.max(HOT_RUN);
        let [clients, servers] = self.interfaces;
        let few = |all: &[Ends]| all[..flows as usize].to_vec();
        let strangers = (0..flows).map(|number| Ends {
            dst: SocketAddrV4::new([10, 0, 1, 200].into(), 443),
            ..packet_of(number, ACK)
        });
        let cases = [
            ("forward", few(&self.forward), clients, true),
            ("reverse", few(&self.reverse), servers, true),
            ("untouched", strangers.collect(), clients, false),
        ];
        for (packet, list, ingress, goes_on) in cases {
            self.replay.fill(list.into_iter())?;
            let mut samples = [const { Vec::new() }; 3];
            for _ in 0..self.rounds {
                for hook in Hook::ALL {
                    let wanted = if goes_on { hook.sent() } else { hook.passed() };
                    samples[hook as usize].push(self.pair(hook, run, ingress, wanted)?);
                }
            }
            let measured = Hook::ALL.into_iter().zip(samples);
            figures.extend(measured.map(|(hook, samples)| figure(hook, packet, flows, &samples)));
        }
        Ok(())
    }

    /// First packets, each of a client that was never seen.
    fn measure_new(&mut self, figures: &mut Vec<Figure>) -> Result<()> {
        let clients = self.interfaces[0];
        let mut samples = [const { Vec::new() }; 3];
        let mut from = 0;
        for _ in 0..self.rounds {
            for hook in Hook::ALL {
                let list = (from..from + NEW_RUN).map(|number| packet_of(number, SYN));
                self.replay.fill(list)?;
                samples[hook as usize].push(self.pair(hook, NEW_RUN, clients, hook.sent())?);
                from += NEW_RUN;
            }
        }
        let opened = self.plane()?.flow_table().all().count();
        ensure!(
            opened == from as usize,
            "{opened} of {from} flows opened: {:?}",
            self.plane()?.drops()
        );
        let measured = Hook::ALL.into_iter().zip(samples);
        figures.extend(measured.map(|(hook, samples)| figure(hook, "syn", NEW_RUN, &samples)));
        Ok(())
    }

    /// Nothing, then the program: nanoseconds per packet of each.
    fn pair(&mut self, hook: Hook, run: u32, ingress: u32, wanted: u32) -> Result<[f64; 2]> {
        let program = self.program(hook)?;
        let empty = self.replay.run(hook, None, run, ingress)?;
        let full = self.replay.run(hook, Some(&program), run, ingress)?;
        ensure!(
            full.verdict == wanted && empty.verdict == hook.passed(),
            "{}: verdicts {} and {}",
            hook.name(),
            empty.verdict,
            full.verdict
        );
        Ok([f64::from(empty.nanoseconds), f64::from(full.nanoseconds)])
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.plane = None;
        if let Err(error) = self.remover.remove(&self.generation) {
            eprintln!("bench: {error:#}");
        }
        let _ = std::fs::remove_dir(&self.bpffs);
    }
}

fn figure(hook: Hook, packet: &'static str, flows: u32, samples: &[[f64; 2]]) -> Figure {
    Figure {
        hook: hook.name(),
        packet,
        flows,
        empty_ns: Spread::of(samples.iter().map(|[empty, _]| *empty)),
        net_ns: Spread::of(samples.iter().map(|[empty, full]| full - empty)),
        ratio: Spread::of(samples.iter().map(|[empty, full]| full / empty.max(1.0))),
    }
}

/// A client of its own for each number, as spread as clients are.
fn packet_of(number: u32, flags: u8) -> Ends {
    let address = 0x0a40_0000 | (number >> 2);
    let port = 20_000 + (number & 3) * 977 + (number >> 7) % 500;
    Ends {
        src: SocketAddrV4::new(address.into(), port as u16),
        dst: SERVICE.parse().expect("an address and port"),
        flags,
    }
}

fn end((address, port): (Addr, u16)) -> Result<SocketAddrV4> {
    match address.to_socket_addr(port) {
        std::net::SocketAddr::V4(end) => Ok(end),
        std::net::SocketAddr::V6(end) => anyhow::bail!("{end} is not of this benchmark"),
    }
}

/// Always the same order, and one that no prefetcher guesses (a linear congruential generator).
fn shuffle(packets: &mut [Ends]) {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for at in (1..packets.len()).rev() {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        packets.swap(at, (state >> 33) as usize % (at + 1));
    }
}

/// From the text that an administrator would write.
fn generation() -> Result<Generation> {
    let service: SocketAddrV4 = SERVICE.parse()?;
    let mut text = format!(
        "[network]\nclient_interfaces = [\"c0\"]\nserver_interfaces = [\"s0\"]\n\
         [virtual_server.mx]\naddress = \"{}\"\nport = {}\nforward = \"passthrough\"\npool = \"mx\"\n\
         snat = \"automap\"\n[pool.mx]\nmethod = \"round-robin\"\n",
        service.ip(),
        service.port()
    );
    for number in 0..MEMBERS {
        text.push_str(&format!(
            "[[pool.mx.member]]\nname = \"m{number}\"\naddress = \"10.0.2.11\"\nport = {}\n",
            4000 + number
        ));
    }
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), text)?;
    let (generation, _) =
        lb_userspace::config::load(file.path()).map_err(|error| anyhow::anyhow!("{error}"))?;
    Ok(generation)
}
