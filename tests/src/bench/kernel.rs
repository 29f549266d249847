//! `cargo xtask bench kernel`: nanoseconds per packet, by the kernel's test-run.
//!
//! A replay program makes each packet of a run another one and calls the packet program; the same replay in front of a
//! program that does nothing is what is subtracted, and what the ratio is to. Every population is walked in random
//! order, and each packet waits for the one before: a table's cache misses are paid in full, as they are on a wire.

use std::{collections::BTreeMap, net::SocketAddrV4};

use anyhow::{Result, ensure};
use serde::Serialize;

use super::{
    Machine, Spread,
    population::{self, ACK, From, Population, STEP, SYN, packet_of},
    replay::{Ends, Hook},
};

/// Members, each with a range of SNAT ports of its own: enough for a million flows.
const MEMBERS: u16 = 32;
/// Members that first packets are spread over: a large pool.
const CHOICE: u16 = 16;
/// Packets of a run where one flow is enough.
const HOT_RUN: u32 = 1 << 18;
/// First packets of a run.
const NEW_RUN: u32 = STEP;

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
    /// `forward`, `reverse`, `untouched`, `syn`, `cookie`
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
    population::alone(|| {
        let mut report = Report {
            machine,
            rounds: options.rounds,
            verified: BTreeMap::new(),
            figures: Vec::new(),
        };
        let middle = (1 << 16).min(options.flows);
        let mut bench = Bench::new(MEMBERS, middle, options.rounds)?;
        for hook in Hook::ALL {
            let program = format!("balance_{}", hook.name());
            let plane = bench.population.plane()?;
            if let Ok(count) = plane.verified_instructions(&program) {
                report.verified.insert(program, count);
            }
        }
        bench.open(middle)?;
        bench.measure(1, &mut report.figures)?;
        bench.measure(middle, &mut report.figures)?;
        drop(bench);
        if options.flows > middle {
            let mut bench = Bench::new(MEMBERS, options.flows, options.rounds)?;
            bench.open(options.flows)?;
            bench.measure(options.flows, &mut report.figures)?;
        }
        let all = NEW_RUN * (3 * options.rounds + 2);
        let mut bench = Bench::new(CHOICE, all.next_power_of_two(), options.rounds)?;
        bench.measure_new(&mut report.figures)?;
        Ok(report)
    })
}

/// One population, measured.
struct Bench {
    population: Population,
    rounds: u32,
    forward: Vec<Ends>,
    reverse: Vec<Ends>,
}

impl Bench {
    fn new(members: u16, flows: u32, rounds: u32) -> Result<Self> {
        let config = population::config(members, "automap", "");
        Ok(Self {
            // A little room: the table must not be what makes new flows slow.
            population: Population::new(&config, 2 * flows + (2 << 16), flows.max(1 << 16))?,
            rounds,
            forward: Vec::new(),
            reverse: Vec::new(),
        })
    }

    /// Opens flows, and puts their packets into an order that nothing guesses.
    fn open(&mut self, count: u32) -> Result<()> {
        (self.forward, self.reverse) = self.population.open(0..count)?;
        shuffle(&mut self.forward);
        shuffle(&mut self.reverse);
        Ok(())
    }

    /// Packets of established flows in both directions, and packets of none, for every hook.
    fn measure(&mut self, flows: u32, figures: &mut Vec<Figure>) -> Result<()> {
        let run = flows.max(HOT_RUN);
        let few = |all: &[Ends]| all[..flows as usize].to_vec();
        let strangers = (0..flows).map(|number| Ends {
            dst: SocketAddrV4::new([10, 0, 1, 200].into(), 443),
            ..packet_of(number, ACK)
        });
        let cases = [
            ("forward", few(&self.forward), From::Clients, true),
            ("reverse", few(&self.reverse), From::Members, true),
            ("untouched", strangers.collect(), From::Clients, false),
        ];
        for (packet, list, from, goes_on) in cases {
            self.population.replay.fill(list.into_iter())?;
            let mut samples = [const { Vec::new() }; 3];
            for _ in 0..self.rounds {
                for hook in Hook::ALL {
                    let wanted = if goes_on { hook.sent() } else { hook.passed() };
                    samples[hook as usize].push(self.pair(hook, run, from, wanted)?);
                }
            }
            let measured = Hook::ALL.into_iter().zip(samples);
            figures.extend(measured.map(|(hook, samples)| figure(hook, packet, flows, &samples)));
        }
        Ok(())
    }

    /// First packets, each of a client that was never seen.
    fn measure_new(&mut self, figures: &mut Vec<Figure>) -> Result<()> {
        let mut samples = [const { Vec::new() }; 3];
        let mut from = 0;
        for _ in 0..self.rounds {
            for hook in Hook::ALL {
                samples[hook as usize].push(self.first(hook, from, hook.sent())?);
                self.population.establish(NEW_RUN as usize)?;
                from += NEW_RUN;
            }
        }
        let measured = Hook::ALL.into_iter().zip(samples);
        figures.extend(measured.map(|(hook, samples)| figure(hook, "syn", NEW_RUN, &samples)));
        // The same with all the half-open flows that there may be.
        let mut samples = [const { Vec::new() }; 3];
        for _ in 0..2 {
            self.first(Hook::Tc, from, Hook::Tc.sent())?;
            from += NEW_RUN;
        }
        let flows = self.population.flows()?.len();
        for _ in 0..self.rounds {
            for hook in Hook::ALL {
                samples[hook as usize].push(self.first(hook, from, hook.returned())?);
            }
        }
        ensure!(
            self.population.flows()?.len() == flows,
            "a cookie left a flow behind"
        );
        let measured = Hook::ALL.into_iter().zip(samples);
        figures.extend(measured.map(|(hook, samples)| figure(hook, "cookie", NEW_RUN, &samples)));
        Ok(())
    }

    /// First packets of clients from a number on.
    fn first(&mut self, hook: Hook, from: u32, wanted: u32) -> Result<[f64; 2]> {
        let list = (from..from + NEW_RUN).map(|number| packet_of(number, SYN));
        self.population.replay.fill(list)?;
        self.pair(hook, NEW_RUN, From::Clients, wanted)
    }

    /// Nothing, then the program: nanoseconds per packet of each.
    fn pair(&mut self, hook: Hook, run: u32, from: From, wanted: u32) -> Result<[f64; 2]> {
        let empty = self.population.run(hook, false, run, from)?;
        let full = self.population.run(hook, true, run, from)?;
        ensure!(
            full.verdict == wanted && empty.verdict == hook.passed(),
            "{}: verdicts {} and {}: {:?}",
            hook.name(),
            empty.verdict,
            full.verdict,
            self.population.plane()?.drops()
        );
        Ok([f64::from(empty.nanoseconds), f64::from(full.nanoseconds)])
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
